"""What a plan refuses, with what to write instead.

A plan is `Any` here, because `plan.py` imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from purestep.errors import ConfigError, explain
from purestep.sharding.spec import Spec


def is_rule(rule: object) -> bool:
    """Tell whether a value is a pair, as a rule is."""
    return isinstance(rule, tuple) and len(rule) == 2


def check(plan: Any) -> None:
    """Refuse a plan with a malformed rule, or words that do not go together."""
    for rule in plan.rules:
        if not is_rule(rule) or not isinstance(rule[1], Spec):
            instead = 'Plan(mesh, [("*.weight", Spec("fsdp")), ("*", Spec())])'
            raise ConfigError(explain("a rule is a pair of a filter and a Spec", where=repr(rule), instead=instead))
    for word, value, known in (
        ("fallback", plan.fallback, ("replicate", "error", "pad")),
        ("reduction", plan.reduction, ("tree", "fast")),
        ("zero", plan.zero, (1, 2, 3)),
        ("offload", plan.offload, (None, "optimizer", "params")),
        ("compress", plan.compress, (None, "bf16", "fp16")),
        ("schedule", plan.schedule, ("1f1b", "gpipe", "interleaved")),
        ("attention", plan.attention, ("gather", "ring")),
    ):
        if value not in known:
            raise ConfigError(explain(f"{word} is one of {', '.join(map(repr, known))}", where=f"{word}={value!r}"))
    if plan.zero < 3 and plan.tensor_axes and not plan.context:
        raise ConfigError(
            explain(
                "ZeRO 1 and 2 keep parameters whole, and tensor parallelism splits them",
                where=f"zero={plan.zero} on {plan.mesh!r}",
                instead="fsdp() * tensor_parallel(rules, size=2)",
            )
        )
    if plan.attention == "ring" and not plan.context:
        raise ConfigError(
            explain(
                "ring attention passes on runs of positions, which context parallelism cuts",
                where=f"attention='ring' on {plan.mesh!r}",
                instead='ps.sharding.context_parallel(2, attention="ring")',
            )
        )
    if plan.zero < 3 and plan.expert_axis:
        raise ConfigError(
            explain(
                "ZeRO 1 and 2 keep parameters whole, and expert parallelism splits experts",
                where=f"zero={plan.zero} on {plan.mesh!r}",
                instead="ddp() * expert_parallel(size=2)\nor ddp() * expert_parallel(size=2, shard=True)",
            )
        )
    if bool(plan.experts) != bool(plan.expert_axis) or (plan.expert_axis and plan.expert_axis not in plan.batch):
        raise ConfigError(
            explain(
                "experts are split over one of the batch axes",
                where=f"experts={plan.experts!r}, expert_axis={plan.expert_axis!r}, batch={plan.batch!r}",
                instead='Plan(mesh, [("*.experts.*", Spec("expert"))], batch="expert", experts="*.experts", '
                'expert_axis="expert")',
            )
        )
    if plan.stages:
        _check_pipeline(plan)
    if plan.compress is not None and plan.reduction == "tree":
        raise ConfigError(
            explain(
                "gradients that are sent in another dtype have other bits on another number of ranks",
                where=f'compress={plan.compress!r}, reduction="tree"',
                why="what a rank adds up itself is not rounded",
                instead=f'ddp(compress={plan.compress!r}, reduction="fast")\n'
                'or ps.make_step(..., policy=ps.precision.policy("bf16-mixed", reduce="bf16")): '
                "every gradient is rounded, the same bits everywhere",
            )
        )
    if plan.sync_batchnorm and plan.reduction == "tree":
        raise ConfigError(
            explain(
                "batch norm over ranks has other bits on another number of ranks",
                where='sync_batchnorm=True, reduction="tree"',
                why="statistics are those of the microbatches that are computed at the same time",
                instead='ddp(sync_batchnorm=True, reduction="fast")\n'
                "or leave it out: statistics of each microbatch, the same bits everywhere",
            )
        )


def _check_pipeline(plan: Any) -> None:
    """Refuse stages that are empty, and what a pipeline does not do beside."""
    if not all(plan.stages):
        raise ConfigError(explain("a stage has at least one entry", where=f"stages={plan.stages!r}"))
    where = f"{len(plan.stages)} stages on {plan.mesh!r}"
    if "stage" not in plan.mesh.axes or "stage" in plan.batch:
        instead = "ps.sharding.pipeline(stages)"
        raise ConfigError(
            explain("stages need a mesh axis 'stage' over which the batch is the same", where=where, instead=instead)
        )
    beside = {
        "tensor and context parallelism": bool(plan.tensor_axes),
        "expert parallelism": bool(plan.expert_axis),
        "rules over the axis 'stage'": any("stage" in spec.axes for _, spec in plan.rules),
        "offload": plan.offload is not None,
        "sync_batchnorm": plan.sync_batchnorm,
    }
    refused = [name for name, there in beside.items() if there]
    if refused:
        raise ConfigError(
            explain(
                f"a pipeline does not go with {' and '.join(refused)}",
                where=where,
                why="a rank computes all of a layer of its stages, with parameters that are whole for the length of a "
                "step; over the batch axes they may be split, as by ddp, zero1, zero2, fsdp and hsdp",
                instead="ps.sharding.fsdp() * ps.sharding.pipeline(stages, 2)",
            )
        )


def check_stages(plan: Any, ranks: int) -> None:
    """Refuse a number of stages that the ranks cannot share."""
    count = len(plan.stages)
    if count % ranks:
        raise ConfigError(
            explain(
                f"{count} stages cannot be shared equally by {ranks} ranks",
                where=repr(plan.mesh),
                instead=f"ps.sharding.pipeline(ps.sharding.even_stages(model, {ranks}))",
            )
        )


def refuse_unstaged(plan: Any, name: str, shape: Sequence[int], stage: int | None) -> NoReturn:
    """Refuse a parameter that no stage has, or that a rank cannot have none of."""
    if stage is None:
        raise ConfigError(
            explain(
                "no stage of the pipeline has a parameter",
                where=f"{name}: {list(shape)}; the stages are {', '.join(map(str, plan.stages))}",
                instead="name it, or the path of a submodule above it, in the stage that computes with it",
            )
        )
    raise ConfigError(
        explain(
            "a parameter without dims cannot be a part of a pipeline",
            where=f"{name}: [] in stage {stage}",
            why="ranks of other stages hold an empty tensor in its place, and one number is never empty",
            instead="nn.Parameter(torch.ones(1))",
        )
    )


def refuse_axes(plan: Any) -> NoReturn:
    """Refuse a mesh with several axes over which the batch is the same."""
    raise ConfigError(
        explain(
            "ranks compute a microbatch together over one axis of the mesh",
            where=f"{plan.mesh!r}, batch={plan.batch!r}: {', '.join(plan.model_axes)}",
            instead='one tensor axis; name the axes over which batches differ: Plan(..., batch=("data", "fsdp"))',
        )
    )


def check_parts(plan: Any, size: int) -> None:
    """Refuse a number of parts that the ranks of the tensor axis cannot share."""
    share, rest = divmod(plan.parts, size)
    # Sums of a rank are nodes of the tree of all parts only then.
    if rest or (size > 1 and share & (share - 1)):
        raise ConfigError(
            explain(
                f"{plan.parts} parts cannot be shared by {size} ranks",
                where=f"tensor_parts={plan.parts} on {plan.mesh!r}",
                why="each rank computes a power of two of them, so that sums are added in one order on any number",
                instead=f"tensor_parts={size}, or {2 * size}, {4 * size}, ...",
            )
        )


def refuse_cut(plan: Any, name: str, shape: Sequence[int], spec: Spec) -> NoReturn:
    """Refuse a parameter that has no equal parts."""
    raise ConfigError(
        explain(
            f"a parameter cannot be cut into {plan.parts} equal parts",
            where=f"{name}: {list(shape)} under {spec!r}",
            instead="fallback='replicate' keeps such tensors whole on every rank; or fewer parts",
        )
    )


def refuse_unmatched(plan: Any, name: str, shape: Sequence[int]) -> NoReturn:
    """Refuse a parameter that no rule matches."""
    raise ConfigError(
        explain(
            "no rule of the plan matches a parameter",
            where=f"{name}: {list(shape)}",
            why=f"fallback='error', and the rules are for {', '.join(repr(f) for f, _ in plan.rules) or 'nothing'}",
            instead='end the rules with ("*", Spec()), or fallback="replicate": it is then whole on every rank',
        )
    )


def refuse_count(plan: Any, count: int) -> NoReturn:
    """Refuse a number of microbatches that the ranks cannot share."""
    replicas = plan.replicas
    near = sorted({max(1, count // replicas) * replicas, (max(0, count) // replicas + 1) * replicas})
    raise ConfigError(
        explain(
            f"{count} microbatches cannot be shared equally by {replicas} ranks",
            where=repr(plan.mesh),
            why="every rank computes the same number of microbatches",
            instead=f"make_step(..., microbatches={' or '.join(map(str, near))}, plan=plan), or another multiple of "
            f"{replicas}",
        )
    )


def refuse_factor(other: object) -> NoReturn:
    """Refuse what a plan is multiplied by."""
    raise ConfigError(
        explain(
            f"a plan is multiplied by a Plan, not by a {type(other).__name__}",
            where=f"plan * {other!r}",
            instead="fsdp() * tensor_parallel(rules, size=4)",
        )
    )
