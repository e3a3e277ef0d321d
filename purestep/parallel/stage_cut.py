"""One stage of a model: a loss function as it is, of which a rank computes the part between two of its submodules.

What lies before the stage is called on tensors without memory, and what the model makes of the batch alone is real on
every rank: masks, positions, decisions drawn from the key. At the first submodule of the stage what it is given comes
from the rank before; at that of the next stage the call ends, and what that one would be given goes there. `pipeline`
says when, and sends.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from purestep import _torch as torch_names
from purestep import tree
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import active
from purestep.functional.binding import Binding
from purestep.module_tensors import slots
from purestep.parallel._torch import FakeTensor, FakeTensorMode, written_by
from purestep.sharding.plan import Plan
from purestep.sharding.stages import submodules

Tensors = Mapping[str, Tensor]
Call = Callable[..., Any]


class Left(BaseException):
    """Ends the call of a model where the next stage begins; no error, so that no `except Exception` takes it."""


class Elsewhere(FakeTensorMode):
    """Makes the tensors that another rank computes: they have a shape, and no memory.

    Attributes:
        run: the call that is going on, which is told what is computed with such tensors.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.run: Run | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        elsewhere = [x for x in tree.leaves((args, kwargs or {})) if isinstance(x, FakeTensor)]
        if elsewhere and self.run is not None:
            self.run.check_used(func, elsewhere)
        if elsewhere and any(not isinstance(x, FakeTensor) for x in written_by(func, args)):
            _refuse_write(func)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.run is not None:
            self.run.note(out)
        return out


def _refuse_write(func: Any) -> NoReturn:
    raise ConfigError(  # no TypeError: an operator of Python would take that for an operand it does not know
        explain(
            "a tensor made of the batch is written with what another stage computes",
            where=f"{func}, outside of the submodules of any stage",
            why="this rank does not have the values, and the ranks after it would compute with those from before",
            instead="y = x + update   # a new tensor; or the write inside of a submodule of a stage",
        )
    )


class Cut:
    """A model in stages. Made by `cut_of`, once for a plan and a model.

    Args:
        plan: with stages over several ranks.
        module: the model.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        self.plan, self.module, self.count = plan, module, len(plan.cut)
        self.mode = Elsewhere()
        self.stage_of: dict[nn.Module, int] = {}
        self.paths: dict[nn.Module, str] = {}
        for child, (stage, path) in submodules(module, plan.stage_of).items():
            self.stage_of[child], self.paths[child] = stage, path
        known, owners = slots(module), _owners(module)
        self.users: dict[str, list[int]] = {}
        for name, places in known.params.items():
            found = {plan.stage_of(f"{owners[id(place)]}.{key}".lstrip(".")) for place, key in places}
            self.users[name] = sorted(stage for stage in found if stage is not None)
        self.tied = [
            (name, place, key, plan.stage_of(f"{owners[id(place)]}.{key}".lstrip(".")))
            for name, users in self.users.items()
            for place, key in known.params[name]
            if len(users) > 1
        ]
        self.buffers = {name: plan.stage_of(name) for name in known.buffers}
        self._fakes: dict[tuple[Any, ...], Tensor] = {}
        self._known: dict[Any, tuple[Any, int]] = {}
        self._names: dict[int, str] = {}
        self.masks: dict[Any, dict[int, list[int]]] = {}

    def fake(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return what stands for a tensor that another rank has."""
        key = name, tuple(shape), like.dtype, like.device
        if key not in self._fakes:
            with self.mode:
                self._fakes[key] = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
            self._names[id(self._fakes[key])] = name
        return self._fakes[key]

    def name_of(self, x: Tensor) -> str | None:
        """Return the name of the parameter or buffer that a tensor stands for."""
        return self._names.get(id(x))

    def copy(self, x: Tensor) -> Tensor:
        """Return another tensor without memory that is laid out like one."""
        with self.mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def entry(self, stage: int) -> str:
        """Return the paths of a stage, for errors."""
        return ", ".join(self.plan.cut[stage][:4])

    @contextlib.contextmanager
    def around(self, run: Run) -> Iterator[None]:
        """Have the calls of the submodules of stages decided by a run, for the length of a `with` block."""
        changed: list[tuple[nn.Module, type[nn.Module]]] = []
        before = _running.get(self.module)
        _running[self.module] = run
        # A tied parameter is bound in all of its places: ahead of the stage, the others must not compute with it.
        places = [(n, place, key, place[key]) for n, place, key, stage in self.tied if stage != run.stage]
        try:
            for name, place, key, bound in places:
                place[key] = self.fake(name, bound.shape, bound)
            for child in self.stage_of:
                own: Any = type(child)
                if not issubclass(own, _Decided):  # a recomputation enters the context within that of the pass
                    child.__class__ = _decided(own)
                    _roots[child] = self.module
                    changed.append((child, own))
            yield
        finally:
            for child, own in changed:
                child.__class__ = own
            for _, place, key, bound in places:
                place[key] = bound
            if before is None:
                del _running[self.module]
            else:
                _running[self.module] = before

    def refuse_elsewhere(self, run: Run, func: Any, x: Tensor) -> NoReturn:
        """Refuse a stage that computes with what it was not given."""
        name = self._names.get(id(x))
        shown = f"a tensor of shape {list(x.shape)}" if name is None else f"the parameter {name!r}"
        raise ConfigError(  # see `_refuse_write`
            explain(
                f"stage {run.now} of the pipeline computes with {shown} of another stage",
                where=f"in {func}, after the call of {run.at!r}",
                why="a stage has its own parameters, what its first submodule is given, and what follows from the "
                "batch alone",
                instead="pass it as an argument of the first submodule of the stage, or begin the stage elsewhere"
                if name is None
                else f"name {name!r} in the stage that computes with it",
            )
        )

    def may_use(self, name: str, stage: int) -> bool:
        """Tell whether a stage computes with a parameter or a buffer."""
        return stage in self.users[name] if name in self.users else self.buffers[name] in (None, stage)

    def refuse_order(self, run: Run, path: str, stage: int) -> NoReturn:
        """Refuse a model that does not call its stages one after the other."""
        raise StepError(
            explain(
                f"{path!r} of stage {stage} is called in the middle of stage {run.now}",
                where=f"after {run.at!r}",
                why="each microbatch goes through the stages once, in their order",
                instead="stages in the order in which the model calls its parts: "
                'pipeline([["embed", "blocks.0-2"], ["blocks.3-5", "head"]])',
            )
        )


class Run:
    """One call of a loss function, of which a stage is computed here.

    Args:
        cut: the stages.
        stage: which one; the number after the last for none: then only what is sent at each cut is found out.
        receive: returns the tensors that the stage before has sent.
        mask: which of the leaves of the arguments are sent at each cut; filled by a run of no stage.
    """

    def __init__(
        self, cut: Cut, stage: int, receive: Callable[[int], Sequence[Tensor | None]], mask: dict[int, list[int]]
    ) -> None:
        self.cut, self.stage, self.receive, self.mask = cut, stage, receive, mask
        self.now, self.at = 0, ""
        self.incoming: Incoming | None = None
        self.outgoing: list[Tensor] | None = None
        self.again = False
        self.real = False
        self.made: dict[int, tuple[int | None, Tensor]] = {}

    @property
    def probing(self) -> bool:
        """Whether it computes no stage."""
        return self.stage == self.cut.count

    def begin(self) -> None:
        """Begin the call of the loss function."""
        self._enter(0)

    def end(self) -> None:
        """End it."""
        self.real, self.cut.mode.run = False, None

    def _enter(self, stage: int) -> None:
        self.now = stage
        self.real = stage == self.stage
        self.cut.mode.run = self if self.real or self.probing else None

    def check_used(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Refuse what a stage does not have, among the tensors that it computes with."""
        for x in tensors:
            name = self.cut.name_of(x)
            stages = self.made.get(id(x), (None, x))[0]
            if self.real or (stages not in (None, self.now) if name is None else not self.cut.may_use(name, self.now)):
                self.cut.refuse_elsewhere(self, func, x)

    def note(self, out: Any) -> None:
        """Note in which stage something was made."""
        for x in tree.leaves(out):
            if isinstance(x, FakeTensor):
                self.made[id(x)] = self.now, x

    def call(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        """Return what a submodule of a stage returns in this run."""
        cut = self.cut
        stage, path = cut.stage_of[module], cut.paths[module]
        if self.again:
            # A recomputation calls what belongs to the stage, and its first submodule as the forward pass did.
            if self.incoming is not None and path == self.incoming.path:
                args, kwargs = self.incoming.repeated()
            return call(module, *args, **kwargs)
        if stage not in (self.now, self.now + 1):
            cut.refuse_order(self, path, stage)
        if stage > self.now:
            args, kwargs = self._cross(stage, path, args, kwargs)
        self.at = path
        return call(module, *args, **kwargs) if self.real else self._elsewhere(module, call, args, kwargs)

    def _cross(self, stage: int, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, structure = tree.flatten((args, kwargs))
        chosen = [i for i, x in enumerate(leaves) if isinstance(x, FakeTensor)]
        if self.probing:
            self.mask[stage] = chosen
        if self.real:
            self.outgoing = [leaves[i] for i in self.mask[stage]]
            self.end()
            raise Left
        self._enter(stage)
        if self.probing:
            # The same shapes as tensors of this stage: the others stay with the stage before.
            leaves = [self.cut.copy(x) if i in chosen else x for i, x in enumerate(leaves)]
            return cast(tuple[Any, Any], tree.unflatten(structure, leaves))
        if stage != self.stage:
            return args, kwargs
        if chosen != self.mask[stage]:
            raise StepError(explain("ranks disagree about what is sent to a stage", where=f"stage {stage}, at {path}"))
        self.incoming = Incoming(path, leaves, structure, chosen, self.receive(len(chosen)))
        return self.incoming.given()

    def _elsewhere(self, module: nn.Module, call: Call, args: Any, kwargs: Any) -> Any:
        """Return the shapes of what a submodule of another stage returns, computed once for the same arguments."""
        leaves, structure = tree.flatten((args, kwargs))
        mode = cast(Binding, active.stack()[-1]).mode
        try:
            kinds = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
            key = self.cut.paths[module], module.training, structure, kinds
            found = self.cut._known.get(key)
        except TypeError:  # an argument that is no tensor and cannot be hashed
            key, found = None, None
        if found is not None:
            mode.calls += found[1]
            if self.probing:
                self.note(found[0])
            return found[0]
        before = mode.calls
        with torch.no_grad():
            out = call(module, *args, **kwargs)
        rest = [x for x in tree.leaves(out) if not isinstance(x, FakeTensor)]
        if key is not None and not any(isinstance(x, Tensor) for x in rest):
            self.cut._known[key] = out, mode.calls - before
        return out


class Incoming:
    """What a stage is given: it comes from the rank before, and its gradients go back there.

    Args:
        path: of the submodule that is given it.
        leaves, structure: of the arguments as this rank has them.
        chosen: which of the leaves are replaced.
        tensors: by what.
    """

    def __init__(
        self, path: str, leaves: list[Any], structure: Any, chosen: list[int], tensors: Sequence[Tensor | None]
    ) -> None:
        self.path, self.leaves, self.structure, self.chosen = path, leaves, structure, chosen
        self.tensors = [cast(Tensor, x) for x in tensors]
        self.trained = [i for i, x in enumerate(self.tensors) if x.requires_grad]
        self.anchor = torch.zeros((), requires_grad=True)
        self.grads: list[Tensor | None] = [None] * len(self.tensors)

    def given(self) -> tuple[Any, Any]:
        """Return the arguments, as results of an operation: the stage may write into them, and their gradients come."""
        found = list(self.tensors)
        if self.trained and torch.is_grad_enabled():
            for i, x in zip(self.trained, _Entered.apply(self, self.anchor), strict=True):
                found[i] = x
        return self._with(found)

    def repeated(self) -> tuple[Any, Any]:
        """Return the arguments for a recomputation."""
        return self._with([x.detach().requires_grad_(x.requires_grad) for x in self.tensors])

    def _with(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        leaves = list(self.leaves)
        for i, x in zip(self.chosen, tensors, strict=True):
            leaves[i] = x
        return cast(tuple[Any, Any], tree.unflatten(self.structure, leaves))


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, incoming: Incoming, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.incoming = incoming
        ctx.set_materialize_grads(False)
        return tuple(incoming.tensors[i].detach() for i in incoming.trained)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None]:
        for i, grad in zip(ctx.incoming.trained, grads, strict=True):
            ctx.incoming.grads[i] = grad
        return None, None


# --- the calls of submodules ------------------------------------------------------------------------------------------

_running: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_roots: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


class _Decided(nn.Module):
    """Marks the classes that stand in for those of the submodules of stages."""


@functools.lru_cache(maxsize=256)
def _decided(own: Any) -> type[nn.Module]:
    call: Call = own.__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = _running.get(_roots[self])
        return call(self, *args, **kwargs) if run is None else run.call(self, call, args, kwargs)

    names = {"__call__": __call__, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return cast(type[nn.Module], type(own.__name__, (own, _Decided), names))


def _owners(module: nn.Module) -> dict[int, str]:
    """Return the path of the submodule that each dict of parameters belongs to."""
    return {id(torch_names.parameters_of(m)): path for path, m in module.named_modules(remove_duplicate=False)}


_cuts: weakref.WeakKeyDictionary[nn.Module, dict[Any, Cut]] = weakref.WeakKeyDictionary()


def cut_of(plan: Plan, module: nn.Module) -> Cut:
    """Return a model in stages; the same object for a plan on the same mesh."""
    key = plan, plan.mesh.shape
    known = _cuts.setdefault(module, {})
    if key not in known:
        known[key] = Cut(plan, module)
    return known[key]


def run_of(module: nn.Module) -> Run:
    """Return the run that decides the calls of a model."""
    return _running[module]
