"""What is kept of a forward pass for the backward pass, by rule: recomputed, or moved to the CPU.

Owns `Checkpoint`. While a model is bound, the submodules that a rule names are called through `functional.checkpoint`,
or under hooks that move what they save. Only the class of such a submodule is another one for that time: its name, its
tensors and its hooks are what they were, so plans gather its parameters around the checkpoint, not inside of it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from purestep import transforms, tree
from purestep.arguments import checked
from purestep.errors import ConfigError, explain
from purestep.functional import checkpoint
from purestep.tree import Filter

if TYPE_CHECKING:
    from torch.utils.checkpoint import CheckpointPolicy

_HOSTS = ("cpu", "meta")


@checked(ConfigError)
@dataclass(frozen=True)
class Checkpoint:
    """Which submodules do not store their activations; an argument of `ps.make_step(..., checkpoint=)`.

    The bits of a step do not change: random numbers are drawn from the same keys again, and buffers are updated once.

    Args:
        modules: globs of paths of submodules, or a function of the path: `"blocks.*"`. Of nested ones that match the
            outermost counts.
        keep: names of operators of torch (aten) whose results are stored all the same, because they take long to
            compute: `("mm", "addmm", "bmm")`. By default nothing is.
        offload: copy what is stored to the CPU until the backward pass asks for it, and recompute nothing.

    Raises:
        ConfigError: `keep` names an operator that torch does not have, or goes with `offload`.

    Examples:
        >>> Checkpoint("blocks.*", keep=["mm"])
        Checkpoint(modules='blocks.*', keep=('mm',), offload=False)
    """

    modules: Filter
    keep: str | tuple[str, ...] = ()
    offload: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.modules, list):
            object.__setattr__(self, "modules", tuple(self.modules))
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        unknown = [name for name in self.keep if not hasattr(torch.ops.aten, name)]
        if unknown:
            raise ConfigError(
                explain(
                    "keep= names operators of torch",
                    where=f"torch.ops.aten has no {unknown[0]!r}",
                    instead='keep=("mm", "addmm", "bmm")   # as torch.ops.aten has them',
                )
            )
        if self.keep and self.offload:
            raise ConfigError(
                explain(
                    "what is moved to the CPU is not recomputed, so there is nothing to keep from that",
                    where=f"keep={self.keep!r}, offload=True",
                    instead="Checkpoint(modules, keep=...) or Checkpoint(modules, offload=True)",
                )
            )

    def around(self, module: nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return what makes the context in which a model is called.

        Raises:
            ConfigError: no submodule matches.
        """
        chosen = _chosen(self.modules, module)
        return functools.partial(_entered, chosen, self)


def as_checkpoint(value: Filter | Checkpoint | None) -> Checkpoint | None:
    """Return the rule that a filter of paths stands for; a rule is itself."""
    return value if value is None or isinstance(value, Checkpoint) else Checkpoint(value)


_found: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[nn.Module]]] = weakref.WeakKeyDictionary()


def _chosen(rule: Filter, module: nn.Module) -> list[nn.Module]:
    known = _found.setdefault(module, {})
    if rule not in known:
        paths: list[str] = []
        for path, _ in module.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer in paths)
            if path and not inside and tree.matches(rule, path):
                paths.append(path)
        if not paths:
            _refuse(rule, [path for path, _ in module.named_modules() if path])
        known[rule] = [module.get_submodule(path) for path in paths]
    return known[rule]


def _refuse(rule: Filter, paths: list[str]) -> None:
    shown = rule if isinstance(rule, str) else getattr(rule, "__name__", repr(rule))
    near = difflib.get_close_matches(str(shown), paths, n=3, cutoff=0.3) or paths[:3]
    raise ConfigError(
        explain(
            "checkpoint= matches no submodule",
            where=f"{shown!r}; there are: {', '.join(near) or 'none'}",
            why="nothing would be recomputed; filters are globs over dotted paths, such as 'blocks.*'",
            instead="mend the path, or leave checkpoint= out",
        )
    )


@contextlib.contextmanager
def _entered(modules: list[nn.Module], rule: Checkpoint) -> Iterator[None]:
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in modules:
            own: Any = type(module)
            # A recomputation enters the context again, within that of the forward pass or after it.
            if not issubclass(own, _Rerouted):
                module.__class__ = _rerouted(own, rule)
                changed.append((module, own))
        yield
    finally:
        for module, own in changed:
            module.__class__ = own


class _Rerouted(nn.Module):
    """Marks the classes that stand in for those of submodules."""


@functools.lru_cache(maxsize=256)
def _rerouted(own: Any, rule: Checkpoint) -> type[nn.Module]:
    call: Callable[..., Any] = own.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or transforms.active():
            return call(self, *args, **kwargs)
        if rule.offload:
            tensors = (x for x in [*self.parameters(), *self.buffers()] if x.device.type not in _HOSTS)
            stays = frozenset(x.untyped_storage().data_ptr() for x in tensors)
            with torch.autograd.graph.saved_tensors_hooks(functools.partial(_to_cpu, stays), _back):
                return call(self, *args, **kwargs)
        run = functools.partial(call, self)
        return checkpoint(_Selective(run, tuple(rule.keep)) if rule.keep else run, *args, **kwargs)

    names = {"__call__": __call__, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return cast(type[nn.Module], type(own.__name__, (own, _Rerouted), names))


class _Selective:
    """A call of which the results of some operators are stored at first, and taken from there when it runs again.

    The modes that do so are entered here, not as `context_fn` of torch: there they would also see how a model is bound
    again, which is no part of what was stored.
    """

    def __init__(self, call: Callable[..., Any], keep: tuple[str, ...]) -> None:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        self.call = call
        first, self.again = create_selective_checkpoint_contexts(functools.partial(_policy, keep))
        self.contexts = [first]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.contexts.pop() if self.contexts else self.again:
            return self.call(*args, **kwargs)


def _policy(keep: tuple[str, ...], _: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    from torch.utils.checkpoint import CheckpointPolicy

    packet = getattr(operator, "overloadpacket", operator)
    kept = getattr(packet, "__name__", "") in keep
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# --- on the CPU -------------------------------------------------------------------------------------------------------


def _to_cpu(stays: frozenset[int], saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """Copy what a forward pass saves, but for parameters, which are on the card anyway.

    Args:
        stays: addresses of the storages of those.
        saved: what is saved: an activation, or a parameter or a view of one.
    """
    if saved.device.type in _HOSTS or saved.untyped_storage().data_ptr() in stays:
        return saved
    if not torch.cuda.is_available():
        return saved.device, saved.to("cpu")
    there = torch.empty_like(saved, device="cpu", pin_memory=True)
    # On the stream of the computation: the copy back, in the backward pass, comes behind it there.
    there.copy_(saved, non_blocking=True)
    return saved.device, there


def _back(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, there = packed
    return there.to(device, non_blocking=True)
