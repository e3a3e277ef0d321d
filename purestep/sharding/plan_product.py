"""The product of two plans: the one that does what both do, on the mesh of both."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from purestep import tree
from purestep.distributed.mesh import Mesh
from purestep.errors import ConfigError, explain
from purestep.sharding.spec import REPLICATED, Both, Spec


def product(left: Any, right: Any) -> dict[str, Any]:
    """Return the arguments of the plan that does what two plans do; see `Plan.__mul__`.

    Plans are `Any` here, because `plan.py` imports this file.
    """
    shared = [a for a in left.mesh.axes if a in right.mesh.axes]
    if shared:
        raise ConfigError(
            explain(
                f"both plans have the mesh axis {shared[0]!r}",
                where=f"{left.mesh!r} * {right.mesh!r}",
                instead="fsdp() * tensor_parallel(rules, size=4), or one Plan with the rules of both",
            )
        )
    if left.tensor_axes and right.tensor_axes and left.context != right.context:
        refuse_context(left, right)
    for one, other in ((left, right), (right, left)):
        if one.expert_axis and (other.model_axes or other.shard_axes):
            refuse_experts(left, right)
    batch = tuple(dict.fromkeys([*left.batch, *right.batch]))
    sizes = dict(zip(left.mesh.axes + right.mesh.axes, left.mesh.sizes + right.mesh.sizes, strict=True))
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(
            explain(
                "both plans take what is left of the job",
                where=f"{left.mesh!r} * {right.mesh!r}",
                instead="name the size of one: hsdp(fsdp=8), or ddp() * fsdp(8)",
            )
        )
    ordered = [a for a in batch if a in sizes] + [a for a in sizes if a not in batch]
    mesh = Mesh(tuple(ordered), tuple(sizes[a] for a in ordered))
    settings = {f.name: _agreed(left, right, f) for f in dataclasses.fields(left) if f.name in _SETTINGS}
    return {"mesh": mesh, "rules": _rules(left, right, batch), "batch": batch, **settings}


def refuse_context(left: Any, right: Any) -> NoReturn:
    """Refuse to split both positions and matrices."""
    raise ConfigError(
        explain(
            "context parallelism and tensor parallelism do not go together",
            where=f"{left.mesh!r} * {right.mesh!r}",
            why="ranks compute a microbatch together over one axis: they split its positions, or matrices",
            instead="ddp() * context_parallel(4), fsdp() * context_parallel(4)\n"
            "or tensor_parallel(rules, 4, sequence_parallel=True), which splits positions between the split layers",
        )
    )


def refuse_experts(left: Any, right: Any) -> NoReturn:
    """Refuse to split experts once more, and to send tokens that several ranks have parts of."""
    raise ConfigError(
        explain(
            "expert parallelism goes with data parallelism only",
            where=f"{left.mesh!r} * {right.mesh!r}",
            why="a rank computes whole experts, with whole tokens that the ranks of the axis send it",
            instead="ddp() * expert_parallel(4)\n"
            "or ddp() * expert_parallel(4, shard=True), which splits all other parameters over the same ranks, as fsdp",
        )
    )


# The defaults of a plan; in a product of two, the factor whose value is no default decides.
_SETTINGS: dict[str, Any] = {
    "fallback": "replicate",
    "min_size": 0,
    "units": None,
    "reshard_after_forward": True,
    "reduction": "tree",
    "sync_batchnorm": False,
    "zero": 3,
    "offload": None,
    "compress": None,
    "tensor_parts": None,
    "sequence_parallel": False,
    "context": False,
    "attention": "gather",
    "experts": (),
    "expert_axis": "",
    "stages": (),
    "schedule": "1f1b",
}


def _agreed(left: Any, right: Any, field: dataclasses.Field[Any]) -> Any:
    a, b, default = getattr(left, field.name), getattr(right, field.name), _SETTINGS[field.name]
    if a != b and default not in (a, b):
        raise ConfigError(
            explain(
                f"the two plans disagree about {field.name}",
                where=f"{a!r} and {b!r}",
                instead=f"give both the same {field.name}",
            )
        )
    return b if a == default else a


def _rules(left: Any, right: Any, batch: tuple[str, ...]) -> tuple[tuple[tree.Filter, Spec], ...]:
    # In the order of pairs, the first that matches a name is the pair of the first matches of both.
    one, two = [*left.rules, ("*", REPLICATED)], [*right.rules, ("*", REPLICATED)]
    found = [(_both(f, g), _joined(s, t, batch)) for f, s in one for g, t in two]
    kept: list[tuple[tree.Filter, Spec]] = []
    for rule in found:
        if all(rule[0] != earlier and earlier != "*" for earlier, _ in kept):
            kept.append(rule)
    return tuple(kept)


def _both(f: tree.Filter, g: tree.Filter) -> tree.Filter:
    return g if f == "*" or f == g else f if g == "*" else Both(f, g)


def _joined(a: Spec, b: Spec, batch: tuple[str, ...]) -> Spec:
    dims = [
        sorted(
            (*(a.entries[d] if d < len(a.entries) else ()), *(b.entries[d] if d < len(b.entries) else ())),
            key=lambda axis: axis in batch,
        )
        for d in range(max(len(a.entries), len(b.entries)))
    ]
    return Spec(*dims, auto=(*a.auto, *b.auto), fused=max(a.fused, b.fused, key=len))
