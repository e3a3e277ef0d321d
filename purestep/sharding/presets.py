"""The usual plans by name: `ddp`, `fsdp`, `hsdp`, `tensor_parallel`, and their products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from purestep.arguments import Name, Whole, checked
from purestep.distributed.mesh import mesh
from purestep.errors import ConfigError
from purestep.sharding.families import tensor_rules
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Rules, Spec
from purestep.tree import Filter


@checked(ConfigError)
def ddp(size: int = -1, **settings: Any) -> Plan:
    """Data parallelism: every rank holds the whole state and computes its own microbatches.

    Args:
        size: ranks; by default all of the job, which is 1 on a laptop.
        **settings: of `Plan`: `reduction`, ...

    Examples:
        >>> ddp(4).spec("weight", (8, 8)), ddp().replicas
        (Spec(), 1)
    """
    return Plan(mesh({"data": size}), (), **({"fallback": "replicate"} | settings))


@checked(ConfigError)
def fsdp(size: int = -1, *, min_size: Whole = 0, **settings: Any) -> Plan:
    """Fully sharded data parallelism (ZeRO-3): params, gradients and optimizer state are split over all ranks.

    A tensor is split along its first dim that the number of ranks divides. One without such a dim is whole on every
    rank, unless `fallback="pad"`.

    Args:
        size: ranks; by default all of the job.
        min_size: leave tensors of fewer elements whole.
        **settings: of `Plan`: `reshard_after_forward`, `units`, `fallback`, `reduction`, ...

    Examples:
        >>> plan = fsdp(4)
        >>> plan.spec("weight", (8, 3)), plan.spec("weight", (3, 8)), plan.spec("bias", (3,))
        (Spec('fsdp'), Spec(None, 'fsdp'), Spec())
    """
    return Plan(mesh({"fsdp": size}), _EVERYWHERE, min_size=min_size, **({"fallback": "replicate"} | settings))


@checked(ConfigError)
def hsdp(*, fsdp: int, data: int = -1, min_size: Whole = 0, **settings: Any) -> Plan:
    """Hybrid sharding: the state is split over `fsdp` ranks, and that group is repeated over the axis `data`.

    Args:
        fsdp: ranks that hold one state together: those of one machine, say.
        data: such groups; by default what is left of the job.
        min_size: leave tensors of fewer elements whole.
        **settings: of `Plan`.

    Examples:
        >>> hsdp(fsdp=2, data=4).mesh
        mesh({'data': 4, 'fsdp': 2})
    """
    settings = {"fallback": "replicate"} | settings
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


_EVERYWHERE = (("*", Spec(auto="fsdp")),)
