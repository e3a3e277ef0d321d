"""The base class of gradient transformations, and the addition of updates to parameters.

Owns `GradientTransformation`, `apply_updates` and helpers of the transformations: reading a learning rate, requiring
parameters, refusing a tree of another structure. `foreach` loops over leaves, this file does not.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, runtime_checkable

import torch
from torch import Tensor

from purestep import tree
from purestep._torch import all_modes, transform_level
from purestep.errors import ConfigError, OptimError, explain
from purestep.optim.kernels import foreach as fx
from purestep.optim.scope import IN_FULL, Combinator, Kernel, Scoped, check_scope, inside
from purestep.tree import Structure
from purestep.views import Block, Curves, Panel, Tree, View

Scalar = float | Tensor
StepNumber = int | Tensor  # updates applied so far: 0-d int64 in a train state
Schedule = Callable[[Any], Any]
ScalarOrSchedule = Scalar | Schedule
T = TypeVar("T")


@tree.pytree(eq=True)
class EmptyState:
    """The state of a stateless transformation."""


@runtime_checkable
class Drawable(Protocol):
    """A hyperparameter that can be drawn over the steps: a schedule."""

    def panel(self, title: str) -> Panel | None: ...


class GradientTransformation(Scoped, View):
    """A pure rule that turns gradients into updates, as a frozen value: it prints, compares and pickles.

    Subclasses are decorated with `@transformation` and override `update`; those with a state also override `init`. The
    state is a `@pytree` class with named fields, so that its paths read well. Arguments are never changed.

    Attributes:
        scope: the part of gradients, parameters and state that one call of `update` needs.
            "element": any slice of any tensor; the update of an element depends on that element only, to the bit.
            "tensor": a full tensor: norms of a layer, matrix products.
            "tree", the default: all tensors, in full: a global norm, a line search, or unknown.
            Steps slice long tensors, and plans pass shards, only if the scope allows it: "tree" is always right.
            `ps.testing.check_transformation` proves a narrower scope. A wrapper declares its own work only: a wrapper
            of scope "element" around a transformation of scope "tree" has scope "tree".

    Examples:
        >>> @transformation
        ... class Halve(GradientTransformation):
        ...     scope = "element"
        ...
        ...     def update(self, updates, state, params=None, **extra):
        ...         return tree.map(lambda u: u / 2, updates), state
        >>> Halve().update({"w": torch.ones(2)}, Halve().init({"w": torch.zeros(2)}))[0]
        {'w': tensor([0.5000, 0.5000])}
    """

    argument_hint: ClassVar[str] = "ps.optim.adamw(3e-4), or ps.optim.lift(torch.optim.AdamW, lr=3e-4) for torch's own"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(declared := cls.__dict__.get("scope"), str):
            check_scope(declared, cls)
        for name, in_full in IN_FULL.items():
            if name in cls.__dict__:
                setattr(cls, name, in_full(cls.__dict__[name]))

    @property
    def name(self) -> str:
        """The name of this transformation in `repr` and in the paths of a chain's state."""
        return _snake(type(self).__name__)

    def init(self, params: Any) -> Any:
        """Return the state before the first update, for a pytree of parameters."""
        return EmptyState()

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        """Return the transformed updates and the next state; the inputs are not changed.

        Args:
            updates: gradients, or the updates of the previous transformation; a pytree like `params`.
            state: the state returned by `init` or by the last `update`.
            params: the current parameters; a transformation that needs them raises an error without.
            **extra: further values of the caller: `step=` (0-d int64, number of applied updates, the only clock of
                schedules), `value=` (the loss), `value_fn=` (params -> loss), ... Unknown ones are passed on.
        """
        raise OptimError(explain(f"{type(self).__name__} has no update rule", instead="override `update`"))

    def apply(self, params: Any, updates: Any, state: Any) -> Any:
        """Return the parameters after an update, from the updates and the state that `update` returned."""
        return apply_updates(params, updates)

    def advance(self, updates: Any, state: Any, params: Any, *, reuse: bool = False, **extra: Any) -> tuple[Any, Any]:
        """Return the parameters and the state after an update: `update`, then `apply`.

        Kernels that can do both in one pass over the memory override it.

        Args:
            updates, state, params, **extra: as for `update`.
            reuse: whether `params` and `state` are donated, so that the result may be written into their memory.
        """
        proposed, following = self.update(updates, state, params, **extra)
        return self.apply(params, proposed, following), following

    def applied(self, state: Any) -> Tensor | None:
        """Tell whether the last update was applied, as a 0-d bool tensor; None means that it always is."""
        return None

    def refused(self, state: Any) -> Tensor | None:
        """Tell whether the last update was due and refused (it was not finite, or too large), as a 0-d bool tensor.

        None means that updates are never refused. A call of `accumulate` that only accumulates refuses nothing.
        """
        return None

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        """Return the current hyperparameters and measurements by name: floats or 0-d tensors."""
        return {}

    def _one_pass(self) -> bool:
        """Whether `advance` ends in a special kernel; `update` and then `apply` have the same result, more slowly."""
        return isinstance(self, Kernel)

    def only_fused(self) -> bool:
        """Whether `advance` is a single fused kernel, so that slicing would save no memory."""
        return isinstance(self, Kernel) and self.fused

    def view(self) -> list[Block]:
        """Return the blocks of the display: the tree of its parts, and the curves of its schedules."""
        panels = [panel for name, schedule in _schedules(self) if (panel := schedule.panel(name)) is not None]
        return [self.outline(), *([Curves(panels)] if panels else [])]

    def outline(self, label: str = "") -> Tree:
        """Return the tree of this transformation and its parts, with their arguments.

        Args:
            label: what it is called by what holds it; its own name by default.
        """
        named = label if label in ("", self.name) else f"{label}: {self.name}"
        members = [member for member in inside(self) if isinstance(member, GradientTransformation)]
        return Tree(named or self.name, self._note(members), self._branches(members))

    def _note(self, members: list[GradientTransformation]) -> str:
        if not members:  # as it prints itself, without its name
            return repr(self).removeprefix(f"{self.name}(").removesuffix(")")
        return _arguments(self, without=members)

    def _branches(self, members: list[GradientTransformation]) -> tuple[Tree, ...]:
        return tuple(member.outline() for member in members)

    def __repr__(self) -> str:
        return f"{self.name}({_arguments(self)})"


class Wrapper(GradientTransformation):
    """A transformation around one `inner`, whose state keeps the inner one in a field `inner`."""

    inner: GradientTransformation

    def applied(self, state: Any) -> Tensor | None:
        return self.inner.applied(state.inner)

    def refused(self, state: Any) -> Tensor | None:
        return self.inner.refused(state.inner)

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return self.inner.hyperparams(state.inner, step)


class ElementWrapper(Combinator, Wrapper):  # type: ignore[override]  # its scope follows from what is in it
    """A wrapper that by itself acts element by element: its scope is that of what is in it."""


@dataclass_transform(frozen_default=True)
def transformation(cls: type[T]) -> type[T]:
    """Make a subclass of `GradientTransformation` a frozen dataclass that keeps the short `repr` of the base."""
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


def apply_updates(params: T, updates: Any) -> T:
    r"""Return `params + updates`, out of place; each parameter keeps its dtype.

    Args:
        params: a pytree of tensors.
        updates: a pytree of the same structure; updates of a wider dtype are added in that dtype and rounded once.

    Raises:
        OptimError: the two trees differ in structure.

    Examples:
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})
        {'w': tensor([1.5000, 0.5000])}
    """
    values, treedef = tree.flatten(params)
    return tree.unflatten(treedef, fx.cast(fx.add(values, same_leaves(updates, treedef, params, "updates")), values))


# --- helpers of the transformations -----------------------------------------------------------------------------------


def same_leaves(other: Any, treedef: Structure, like: Any, what: str) -> list[Tensor]:
    """Return the leaves of a tree that must match another one leaf by leaf, or raise an error with the difference."""
    values = tree.leaves(other)
    if len(values) != treedef.num_leaves:
        left, right = set(tree.names(like)), set(tree.names(other))
        odd = sorted(left ^ right)
        where = f"{odd[0]!r} is only in {'the ' + what if odd[0] in right else 'the other tree'}" if odd else None
        raise OptimError(
            explain(
                f"the {what} have {len(values)} leaves where {treedef.num_leaves} were expected",
                where=where,
                why="gradients, parameters and optimizer state must come from the same parameters",
                instead="opt_state = tx.init(params)   # with the parameters whose gradients you pass to tx.update",
            )
        )
    return values


def need_params(params: Any, name: str, why: str = "its update depends on the parameters") -> Any:
    """Return the parameters, or raise the error that says how to pass them."""
    if params is None:
        raise OptimError(
            explain(
                f"{name} needs the parameters", why=why, instead="tx.update(grads, opt_state, params, step=state.step)"
            )
        )
    return params


def need_step(step: StepNumber | None, name: str) -> Any:
    """Return the number of applied updates, or raise the error that says how to pass it."""
    if step is None:
        raise OptimError(
            explain(
                f"{name} needs the step",
                why="its update depends on the number of applied updates, which the train state counts",
                instead="tx.update(grads, opt_state, params, step=state.step)",
            )
        )
    return step


def value_at(value: ScalarOrSchedule, step: StepNumber | None, name: str = "learning_rate") -> Scalar:
    """Return a hyperparameter at a step: a number or tensor itself, or the value of a schedule at the step."""
    if not callable(value):
        return value
    if step is None:
        raise OptimError(
            explain(
                f"{name} is a schedule, and `update` was called without a step",
                where=f"{name}: {value!r}",
                why="a schedule reads only the number of applied updates, which the train state counts",
                instead="tx.update(grads, opt_state, params, step=state.step)",
            )
        )
    return as_scalar(value(step), name, value)


def as_scalar(result: Any, name: str, function: Any) -> Scalar:
    """Return the result of a user's function of the step, or refuse a result that is no number."""
    if isinstance(result, (Tensor, numbers.Real)):
        return result  # type: ignore[return-value]  # a number of numpy is one, too
    raise OptimError(
        explain(
            f"{name} is a function of the step that did not return a number",
            where=f"{name}: {function!r} returned {result!r:.80}",
            instead="lambda step: 0.1 * 0.5 ** (step / 1000)   # a number or a 0-d tensor",
        )
    )


def is_zero(value: Any) -> bool:
    """Tell whether a hyperparameter is the number 0; a tensor never is, as reading it would wait for the device."""
    return not isinstance(value, Tensor) and value == 0


def zeros_like(params: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tree of zeros of the parameters' shapes, dtypes and devices."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype), params)


def new_count(params: Any) -> Tensor:
    """Return a 0-d int64 zero on the device of the parameters."""
    device = next((p.device for p in tree.leaves(params) if isinstance(p, Tensor)), None)
    return torch.zeros((), dtype=torch.int64, device=device)


def next_count(count: Tensor) -> Tensor:
    """Return a count and one more."""
    # Inside of a trace the number is a constant of the graph.
    eager = type(count) is Tensor and count.is_cpu and not torch.compiler.is_compiling()
    return torch.add(count, _ONE) if eager and not all_modes() and transform_level() is None else count + 1


_ONE = torch.ones((), dtype=torch.int64, device="cpu")  # torch would make one of a number in each addition


def wide(count: Any) -> Tensor:
    """Return a count in float64, where the device has it, so that bias corrections round only once."""
    tensor = torch.as_tensor(count)
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def scalar_like(value: Any, like: Tensor) -> Tensor:
    """Return a number or a tensor in the dtype and on the device of another; a number is rounded once."""
    if isinstance(value, Tensor):
        return value.to(like)
    # Filled on the device: a copy of a number from the host would wait for it, and fail where a graph is recorded.
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _snake(name: str) -> str:
    return "".join(("_" + c.lower() if c.isupper() and i else c.lower()) for i, c in enumerate(name))


def _schedules(tx: Any) -> list[tuple[str, Drawable]]:
    """Return the schedules among the arguments of a transformation and its parts, each once."""
    names = [field.name for field in dataclasses.fields(tx)] if dataclasses.is_dataclass(tx) else []
    found = [(name, value) for name in names if isinstance(value := getattr(tx, name), Drawable)]
    found += [pair for member in inside(tx) for pair in _schedules(member)]
    return list({id(schedule): (name, schedule) for name, schedule in found}.values())


def _arguments(value: Any, without: Sequence[Any] = ()) -> str:
    shown = []
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        held = content if isinstance(content, tuple) else (content,)
        if any(item is member for item in held for member in without):
            continue
        if field.default is not dataclasses.MISSING and _same(content, field.default):
            continue
        shown.append(f"{field.name}={content!r}")
    return ", ".join(shown)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def check_transformation(tx: Any) -> None:
    """Refuse a value that is no gradient transformation.

    Raises:
        ConfigError: it is none; for an optimizer of torch with the code to write instead.
    """
    if isinstance(tx, GradientTransformation):
        return
    kind = tx if isinstance(tx, type) else type(tx)
    name = f"{kind.__module__}.{kind.__qualname__}"
    torchs = kind.__name__ if issubclass(kind, torch.optim.Optimizer) else "AdamW"
    raise ConfigError(
        explain(
            "a step needs a gradient transformation",
            where=f"tx: {'the class ' if tx is kind else 'a '}{name}",
            why="the state of an optimizer lives in the state of the run, not in an object beside it",
            instead=f"tx = ps.optim.adamw(3e-4), or ps.optim.lift(torch.optim.{torchs}, lr=3e-4) for a torch optimizer",
        )
    )
