"""The usual plans by name, and their products.

`single`, `ddp`, `zero1`, `zero2`, `fsdp`, `hsdp`, `tensor_parallel`, `context_parallel`, `expert_parallel`, `pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purestep.arguments import Count, Name, Whole, checked
from purestep.distributed.mesh import mesh
from purestep.errors import ConfigError, explain
from purestep.sharding.families import tensor_rules
from purestep.sharding.plan import Attention, Plan, Zero
from purestep.sharding.spec import Offload, Rules, Spec
from purestep.sharding.stages import AXIS, Schedule, expanded
from purestep.tree import Filter


@checked(ConfigError)
def single(*, offload: Offload | None = None) -> Plan:
    """One process and its device, for what a plan says besides: what is offloaded to the CPU.

    Args:
        offload: what lives on the CPU between steps: the "optimizer" state, or the "params" too. Updates run there.
            On a machine whose device is the CPU it changes nothing.

    Examples:
        >>> single(offload="optimizer").replicas
        1
    """
    return Plan(mesh({"data": 1}), (), fallback="replicate", offload=offload)


@checked(ConfigError)
def ddp(size: int = -1, *, offload: Offload | None = None, **settings: Any) -> Plan:
    """Data parallelism: every rank holds the whole state and computes its own microbatches.

    Args:
        size: ranks; by default all of the job, which is 1 on a laptop.
        offload: what lives on the CPU between steps, where the state is on a card: the "optimizer" state, or the
            "params" too.
        **settings: of `Plan`: `reduction`, ...

    Examples:
        >>> ddp(4).spec("weight", (8, 8)), ddp().replicas
        (Spec(), 1)
    """
    return Plan(mesh({"data": size}), (), **({"fallback": "replicate", "offload": offload} | settings))


@checked(ConfigError)
def zero1(size: int = -1, *, min_size: Whole = 0, offload: Offload | None = None, **settings: Any) -> Plan:
    """Data parallelism with the optimizer state split over all ranks (ZeRO-1): each updates a part of the parameters.

    Parameters are whole on every rank, and so are gradients until a rank has added up its microbatches: then each rank
    is sent the parts that it updates. After an update the ranks send each other those. The bits are those of `ddp()`.

    Args:
        size: ranks; by default all of the job.
        min_size: leave the state of tensors of fewer elements whole.
        offload: what lives on the CPU between steps, where the state is on a card: the "optimizer" state, or the
            "params" too.
        **settings: of `Plan`: `fallback`, `reduction`, ...

    Examples:
        >>> plan = zero1(4)
        >>> plan.spec("weight", (8, 3)), plan.spec("weight", (8, 3), "optimizer")
        (Spec(), Spec('data'))

    Reference: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    arXiv 1910.02054.
    """
    return _zero(1, size, min_size, {"offload": offload} | settings)


@checked(ConfigError)
def zero2(size: int = -1, *, min_size: Whole = 0, offload: Offload | None = None, **settings: Any) -> Plan:
    """Data parallelism with optimizer state and gradients split over all ranks (ZeRO-2).

    Parameters are whole on every rank. During the backward pass each rank gets the sums of its own parts of the
    gradients, bucket by bucket, and lets go of the rest. The bits are those of `ddp()`.

    Args:
        size: ranks; by default all of the job.
        min_size: leave the state and the gradients of tensors of fewer elements whole.
        offload: what lives on the CPU between steps, where the state is on a card: the "optimizer" state, or the
            "params" too.
        **settings: of `Plan`: `fallback`, `reduction`, ...

    Examples:
        >>> zero2(4).zero, zero2(4).mesh
        (2, mesh({'data': 4}))

    Reference: as of `zero1`.
    """
    return _zero(2, size, min_size, {"offload": offload} | settings)


def _zero(stage: Zero, size: int, min_size: int, settings: dict[str, Any]) -> Plan:
    settings = {"fallback": "replicate"} | settings
    return Plan(mesh({"data": size}), (("*", Spec(auto="data")),), min_size=min_size, zero=stage, **settings)


@checked(ConfigError)
def fsdp(size: int = -1, *, min_size: Whole = 0, offload: Offload | None = None, **settings: Any) -> Plan:
    """Fully sharded data parallelism (ZeRO-3): params, gradients and optimizer state are split over all ranks.

    A tensor is split along its first dim that the number of ranks divides. One without such a dim is whole on every
    rank, unless `fallback="pad"`.

    Args:
        size: ranks; by default all of the job.
        min_size: leave tensors of fewer elements whole.
        offload: what lives on the CPU between steps, where the state is on a card: the "optimizer" state, or the
            "params" too.
        **settings: of `Plan`: `reshard_after_forward`, `units`, `fallback`, `reduction`, ...

    Examples:
        >>> plan = fsdp(4)
        >>> plan.spec("weight", (8, 3)), plan.spec("weight", (3, 8)), plan.spec("bias", (3,))
        (Spec('fsdp'), Spec(None, 'fsdp'), Spec())
    """
    settings = {"fallback": "replicate", "offload": offload} | settings
    return Plan(mesh({"fsdp": size}), _EVERYWHERE, min_size=min_size, **settings)


@checked(ConfigError)
def hsdp(*, fsdp: int, data: int = -1, min_size: Whole = 0, offload: Offload | None = None, **settings: Any) -> Plan:
    """Hybrid sharding: the state is split over `fsdp` ranks, and that group is repeated over the axis `data`.

    Args:
        fsdp: ranks that hold one state together: those of one machine, say.
        data: such groups; by default what is left of the job.
        min_size: leave tensors of fewer elements whole.
        offload: what lives on the CPU between steps, where the state is on a card: the "optimizer" state, or the
            "params" too.
        **settings: of `Plan`.

    Examples:
        >>> hsdp(fsdp=2, data=4).mesh
        mesh({'data': 4, 'fsdp': 2})
    """
    settings = {"fallback": "replicate", "offload": offload} | settings
    return Plan(mesh({"data": data, "fsdp": fsdp}), _EVERYWHERE, min_size=min_size, **settings)


@checked(ConfigError)
def tensor_parallel(
    rules: str | Rules | Mapping[Any, Spec], size: int, *, axis: Name = "tensor", **settings: Any
) -> Plan:
    """Tensor parallelism: matrices are split over `size` ranks, which compute every microbatch together.

    Args:
        rules: the name of a family of models, see `tensor_rules`; or `(filter, Spec)` pairs, or a dict of them, over
            the axis: `Spec("tensor")` for the weight of a layer whose outputs are split, `Spec(None, "tensor")` for one
            whose inputs are. What no rule matches is whole; under the rules of a family a matrix has to match.
        size: ranks.
        axis: name of the mesh axis; rules of families are for "tensor".
        **settings: of `Plan`: `tensor_parts`, which fixes the bits on any number of ranks, `sequence_parallel`, ...

    Examples:
        >>> tensor_parallel("llama", 2, tensor_parts=4).tensor_cut("model.layers.0.self_attn.q_proj.weight", (64, 64))
        (0, (64,))
        >>> plan = ddp() * tensor_parallel({"*.up.weight": Spec("tensor"), "*.down.weight": Spec(None, "tensor")}, 2)
        >>> plan.mesh
        mesh({'data': -1, 'tensor': 2})
    """
    if isinstance(rules, str):
        rules = tensor_rules(rules)
    pairs: Any = rules.items() if isinstance(rules, Mapping) else rules
    found: tuple[tuple[Filter, Spec], ...] = tuple(pairs)
    return Plan(mesh({axis: size}), found, **({"fallback": "replicate"} | settings))


@checked(ConfigError)
def context_parallel(
    size: int, *, parts: Count | None = None, attention: Attention = "gather", axis: Name = "context", **settings: Any
) -> Plan:
    """Context parallelism: each sequence is split over `size` ranks, which compute runs of its positions.

    Parameters are whole on every rank of the axis. Attention needs the keys and values of all positions, layer by
    layer; every other layer computes with the positions of a rank.

    Args:
        size: ranks.
        parts: into how many runs a sequence is cut, a power of two times `size`; `size` by default. The bits depend on
            it, and not on the number of ranks.
        attention: "gather" brings the keys and values of all positions to every rank, which keeps them until the
            backward pass. "ring" passes them on from rank to rank, and each rank folds them into its output part by
            part: in either pass it has those of its own positions, of those at hand, and of those on their way. The
            bits are those of "ring" with as many parts, and agree with "gather" to rounding.
        axis: name of the mesh axis.
        **settings: of `Plan`: `reduction`, ...

    Examples:
        >>> plan = ddp() * context_parallel(2, parts=4)
        >>> plan.mesh, plan.parts
        (mesh({'data': -1, 'context': 2}), 4)

    References: Llama Team, "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2, which gathers keys and
    values; Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889.
    """
    defaults: dict[str, Any] = {"fallback": "replicate", "context": True, "tensor_parts": parts, "attention": attention}
    return Plan(mesh({axis: size}), (), **(defaults | settings))


@checked(ConfigError)
def expert_parallel(
    size: int = -1,
    *,
    experts: str | tuple[str, ...] = ("experts", "*.experts"),
    shard: bool = False,
    axis: Name = "expert",
    **settings: Any,
) -> Plan:
    """Expert parallelism: each rank holds some of the experts of MoE blocks, and tokens are sent to their experts.

    The ranks of the axis compute different microbatches, as by `ddp`. What is no expert is whole on every rank.

    Args:
        size: ranks, which divide the number of experts; by default all of the job.
        experts: globs of the modules that are `Experts`.
        shard: split all other parameters over the same ranks, as `fsdp` does.
        axis: name of the mesh axis.
        **settings: of `Plan`: `reduction`, `units`, ...

    Examples:
        >>> plan = ddp(2) * expert_parallel(4)
        >>> plan.spec("layers.0.mlp.experts.down_proj", (8, 16, 32)), plan.spec("layers.0.mlp.gate.weight", (8, 32))
        (Spec('expert'), Spec())
        >>> plan.replicas
        8

    Reference: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    arXiv 2006.16668.
    """
    globs = (experts,) if isinstance(experts, str) else tuple(experts)
    rules: list[tuple[Filter, Spec]] = [(tuple(f"{glob}.*" for glob in globs), Spec(axis))]
    if shard:
        rules.append(("*", Spec(auto=axis)))
    defaults: dict[str, Any] = {"fallback": "replicate", "batch": ("data", axis), "experts": globs, "expert_axis": axis}
    return Plan(mesh({axis: size}), rules, **(defaults | settings))


@checked(ConfigError)
def pipeline(
    stages: Sequence[str | Sequence[str]], size: int = -1, *, schedule: Schedule = "1f1b", **settings: Any
) -> Plan:
    """Pipeline parallelism: each rank holds and computes a run of the layers of a model, and passes on what comes out.

    While one rank computes a microbatch, the next computes the one before, so a step wants several (`microbatches=` of
    `make_step`). The bits are those of one process with as many microbatches.

    Args:
        stages: for each stage the paths of its submodules and parameters, in the order in which the model calls them;
            globs and ranges as `"blocks.0-5"` are paths, too. `even_stages(model, count)` makes them. A stage begins
            where its first submodule is called.
        size: ranks; by default what the others leave of the job. It divides the number of stages.
        schedule: "1f1b" and "gpipe" give each rank one run of stages; "interleaved" gives rank r the stages r,
            r + size, r + 2 size, ..., so that ranks wait less and send more. "gpipe" computes all forward passes first,
            and keeps the activations of all microbatches.
        **settings: of `Plan`: `reduction`, ...

    Examples:
        >>> plan = pipeline([["embed", "blocks.0-1"], ["blocks.2-3", "head"]], 2)
        >>> plan.spec("embed.weight", (10, 4)), plan.spec("blocks.3.weight", (4, 4))
        (Spec(at={'stage': 0}), Spec(at={'stage': 1}))

    Reference: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    arXiv 2104.04473.
    """
    chosen = tuple(map(expanded, stages))
    if not chosen:
        raise ConfigError(explain("a pipeline has at least one stage", where=f"pipeline(stages={stages!r})"))
    return Plan(mesh({AXIS: size}), (), stages=chosen, schedule=schedule, **({"fallback": "replicate"} | settings))


_EVERYWHERE = (("*", Spec(auto="fsdp")),)
