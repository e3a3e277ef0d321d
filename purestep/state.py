"""`TrainState`: all that a training step reads and writes, in one immutable pytree.

Owns the state, its construction (`init`), the one way to advance it (`apply_gradients`) and the way back to a module.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import random as python_random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from purestep import _torch, bits, random, transforms, tree
from purestep.arguments import DeviceChoice, Location, Seed, checked
from purestep.devices import default_device
from purestep.donation import apart, donation_of
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import Definition, Slots, slots
from purestep.optim.base import GradientTransformation, check_transformation, next_count
from purestep.optim.kernels.sliced import advance
from purestep.random import global_generators, remembered
from purestep.tree import Filter, pytree, static
from purestep.views import Block, Printed

if TYPE_CHECKING:
    from purestep.sharding import Plan
    from purestep.weights import Weights


@pytree
class TrainState(Printed):
    """All that a step reads and writes. Extend it by subclassing with `@ps.pytree`, or use any pytree of several.

    Attributes:
        step: int64[], updates applied so far; the only counter that schedules read.
        params: trained parameters by name.
        buffers: everything else of the module by name: BatchNorm statistics, frozen parameters, tables.
        opt_state: state of the gradient transformation.
        rng: int64[2] key. Never advanced: fold `step` into it.
        loss_scale: state of a loss scale, None without one.
        model: the module without its weights. It belongs to the structure and is not a leaf.
    """

    step: Tensor
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    opt_state: Any
    rng: Tensor
    loss_scale: Any = None
    model: Definition | None = static(default=None)

    def replace(self, **changes: object) -> Self:
        """Return the state with some fields changed."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        unknown = changes.keys() - self.__dict__.keys()
        if unknown:
            fields = ", ".join(self.__dict__)
            raise StepError(
                explain(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}", where=f"fields: {fields}")
            )
        new.__dict__.update(changes)
        return new

    def apply_gradients(
        self,
        tx: GradientTransformation,
        grads: object,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        accept: Tensor | None = None,
        last_use: bool = False,
        **extra: Any,
    ) -> Self:
        """Return the state after one update.

        A transformation that skips updates (`optim.apply_if_finite`) leaves params, its inner state, buffers and
        `step` as they are when it skips.

        Args:
            tx: the transformation whose `init` made `opt_state`.
            grads: gradients, of the structure of `params`.
            buffers: buffers after the forward pass; unchanged by default.
            accept: 0-d bool tensor: whether the update counts. Otherwise the state stays as it is. None: it counts.
            last_use: says that the step reads params and optimizer state of this state no more after the call. If it
                is donated (`ps.donate`), its memory is then written over; otherwise nothing is.
            **extra: passed to `tx.update`, besides `step`.

        Raises:
            StepError: gradients or buffers of other names, or gradients of other shapes, than those of the state.
        """
        _check_same("gradients", grads, "params", self.params)
        if buffers is not None and buffers.keys() != self.buffers.keys():
            _check_same("buffers", dict(buffers), "buffers", self.buffers)
        donation = donation_of(self) if last_use else None
        reuse = donation is not None and bool(donation.memory)
        if donation is not None and reuse:
            grads, buffers, extra = apart((grads, buffers, extra), donation.memory)
            donation.written = True
        with transforms.unrecorded():
            params, opt_state = advance(
                *(tx, grads, self.opt_state, self.params), accept=accept, reuse=reuse, step=self.step, **extra
            )
        return self.advanced(tx, params, opt_state, buffers, accept)

    def advanced(
        self,
        tx: GradientTransformation,
        params: dict[str, Tensor],
        opt_state: object,
        buffers: Mapping[str, Tensor] | None,
        accept: Tensor | None,
    ) -> Self:
        """Return the state with what an update made of it; the second half of `apply_gradients`.

        Args:
            tx: the transformation.
            params: the new parameters.
            opt_state: the new state of the transformation; it may be on another device.
            buffers, accept: as of `apply_gradients`.
        """
        with transforms.unrecorded():
            applied = tx.applied(opt_state)
            if applied is not None:
                applied = applied.to(self.step.device, non_blocking=True)
            if accept is not None:
                applied = accept if applied is None else applied & accept
            buffers = self.buffers if buffers is None else dict(buffers)
            if applied is None:
                step = next_count(self.step)
                remembered.follow(self.step, step, 1)
            else:
                step = self.step + applied.to(self.step.dtype)
                buffers = tree.select(applied, buffers, self.buffers)
        return self.replace(step=step, params=params, buffers=buffers, opt_state=opt_state)

    def view(self) -> Iterable[Block]:
        """Return the blocks that show it: each leaf with its path, dtype and shape."""
        from purestep.display import notebook

        return notebook.show(self, root="state").view()


def _shapes(tensors: dict[str, Any]) -> list[torch.Size | None]:
    if not set(map(type, tensors.values())) <= {Tensor}:
        return [x.shape if isinstance(x, Tensor) else None for x in tensors.values()]
    return list(map(_shape_of, tensors.values()))


_shape_of = operator.attrgetter("shape")


def _check_same(what: str, given: Any, field: str, own: Mapping[str, Tensor]) -> None:
    if type(given) is dict and type(own) is dict and list(given) == list(own) and _shapes(given) == _shapes(own):
        return
    left, right = tree.names(given), tree.names(own)
    odd = sorted(set(left) ^ set(right))
    if odd or len(left) != len(right) or tree.structure(given) != tree.structure(own):
        where = f"{odd[0]!r} is only in the {what if odd[0] in left else field}" if odd else str(tree.structure(given))
        raise StepError(
            explain(
                f"the {what} do not have the structure of state.{field}",
                where=where,
                instead="grads, value = ps.grad_and_value(loss_of)(state.params)\nstate.apply_gradients(tx, grads)",
            )
        )
    for name, a, b in zip(left, tree.leaves(given), tree.leaves(own), strict=True):
        if what == "gradients" and getattr(a, "shape", None) != b.shape:
            where = f"{name!r}: {tree.describe(a)}, state.params: {tree.describe(b)}"
            raise StepError(explain("a gradient does not have the shape of its parameter", where=where))


def definition(state: Any) -> Definition:
    """Return the model of a state, or say how to get one."""
    found = getattr(state, "model", None)
    if not isinstance(found, Definition):
        instead = "state = ps.init(model, tx, seed=0)\nor write the step by hand with ps.apply(model, ...)"
        if isinstance(state, nn.Module):  # what callbacks do with a function around an evaluation step
            instead += "\nor ps.wrap_step(step, function), if a function around a step was taken for a loss function"
        raise StepError(
            explain(
                "the state holds no model to bind the params to",
                where=f"state: {type(state).__qualname__}",
                instead=instead,
            )
        )
    return found


@checked(ConfigError)
def init(
    model: nn.Module | Callable[[], nn.Module],
    tx: GradientTransformation,
    *,
    seed: Seed = 0,
    frozen: Filter | None = None,
    device: DeviceChoice | None = "auto",
    plan: Plan | None = None,
    deferred: bool = False,
    weights: Location | Weights | None = None,
) -> TrainState:
    """Make the first state of a run.

    Args:
        model: a module, whose weights are copied; or a function (a module class, say) that makes one: it is called
            under `seed`, so that the weights are a function of the seed alone, whatever was drawn before.
        tx: gradient transformation.
        seed: integer in [0, 2**64). The key of all randomness of the run.
        frozen: path filter (a glob, several, or a function of the name) of parameters that are not trained. They get no
            gradient and no optimizer state and live in `state.buffers`. Parameters with `requires_grad=False` are
            frozen too.
        device: where the state lives, and batches with it. "auto": where the module is, if its maker has put it on
            another device than the CPU; under a plan where its process group sends tensors from; otherwise
            `ps.default_device()`, the accelerator of this machine. The weights are made on the CPU, so their bits do
            not depend on the device.
        plan: where the parts of the state live, see `ps.sharding`. The bits are those of the state without a plan.
        deferred: for models that fit no single process: record what the function does to tensors without memory, then
            compute one tensor at a time and keep this process's part. Each random number depends on the seed and on
            the name of its parameter, so the bits are the same under every plan and without one, but they are not
            those of `deferred=False`.
        weights: values for the parameters and buffers: a file or directory of named tensors (see
            `ps.interop.read_weights`), or `ps.Weights(path, rename=..., keep=...)` where names differ. With `deferred`
            each process reads its part of each tensor from the file and initial values are not computed, so a
            pretrained model may be larger than the memory of one process.

    Returns:
        TrainState at step 0. The module is not changed, and later changes to it do not reach the state.

    Raises:
        StepError: the module has parameters without a shape yet (lazy modules), nothing to train, or a filter that
            matches nothing; `deferred` with a module that exists, or one that reads the values of its tensors.
        ConfigError: `tx` is no gradient transformation, `device` no device, `plan` no plan, or it does not fit the job
            or the parameters, or one of its rules matches nothing; no such file of weights.
        TemplateMismatch: names or shapes of the weights do not fit the model; the error lists them.
        SnapshotError: the weights cannot be read.

    Examples:
        >>> from purestep import optim
        >>> state = init(lambda: nn.Linear(3, 2), optim.sgd(0.1), seed=0)
        >>> {name: tuple(p.shape) for name, p in state.params.items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    check_transformation(tx)
    rng = random.key(seed)
    if plan is not None:
        from purestep.sharding.plan import check_plan

        check_plan(plan, "ps.init")
    if weights is not None:
        from purestep.weights.matching import weights_of

        weights = weights_of(weights)
    asked = None if device in (None, "auto") else default_device(device)
    if asked is None and plan is not None:
        asked = plan.mesh.device
    if deferred:
        return _deferred(model, tx, rng, frozen, asked or default_device(), plan, weights)
    if not isinstance(model, nn.Module):
        with _seeded(random.fold_in(rng, "init")):
            model = _made(model)
    if plan is None or plan.offload is None:
        state = _first(model, tx, rng, frozen, asked, weights)
        return state if plan is None else plan.place(state)
    from purestep.sharding.placement import place

    # Made on the CPU: the card may have no room for what is offloaded.
    state = _first(model, tx, rng, frozen, torch.device("cpu"), weights)
    return place(plan, state, asked or default_device())


def _first(
    model: nn.Module,
    tx: GradientTransformation,
    rng: Tensor,
    frozen: Filter | None,
    device: torch.device | None,
    weights: Weights | None,
) -> TrainState:
    found = slots(model)
    tensors = {name: places[0][0][places[0][1]] for name, places in (found.params | found.buffers).items()}
    _check_shapes(model, tensors)
    trained = _trained(model, found, tensors, frozen)
    if device is None and all(tensor.device.type == "cpu" for tensor in tensors.values()):
        device = default_device()
    copied = {name: t.detach().clone().to(device or t.device) for name, t in tensors.items()}
    if weights is not None:
        from purestep.weights.matching import loaded

        copied = loaded(weights, model, copied)
    params = {name: copied[name] for name in trained}
    place = next(iter(params.values())).device
    key, step = rng.to(place), torch.zeros((), dtype=torch.int64, device=place)
    if place.type == "cuda":
        remembered.remember(key, rng.tolist())
        remembered.remember(step, 0)
    return TrainState(
        step=step,
        params=params,
        buffers={name: t for name, t in copied.items() if name not in params},
        opt_state=tx.init(params),
        rng=key,
        model=Definition(model),
    )


def _deferred(
    model: nn.Module | Callable[[], nn.Module],
    tx: GradientTransformation,
    rng: Tensor,
    frozen: Filter | None,
    device: torch.device,
    plan: Plan | None,
    weights: Weights | None,
) -> TrainState:
    from purestep.sharding.deferred_init import materialize

    if isinstance(model, nn.Module):
        raise StepError(
            explain(
                "deferred init needs a function that makes the model",
                where=f"model: {type(model).__qualname__}",
                why="the weights of a module that exists are in memory already",
                instead="state = ps.init(lambda: Model(config), tx, seed=0, plan=plan, deferred=True)",
            )
        )
    key = random.fold_in(rng, "init")
    with _seeded(key):
        described = materialize(
            lambda: _first(_made(model), tx, rng, frozen, torch.device("cpu"), weights), key, plan=plan, device=device
        )
    return described.replace(rng=rng.to(described.step.device))


def _made(factory: Callable[[], nn.Module]) -> nn.Module:
    made = factory()
    if not isinstance(made, nn.Module):
        raise StepError(
            explain(
                "init needs a module, or a function that makes one",
                where=f"it returned {tree.describe(made)}",
                instead="state = ps.init(lambda: nn.Linear(64, 10), tx, seed=0)",
            )
        )
    return made


def _trained(model: nn.Module, found: Slots, tensors: dict[str, Tensor], frozen: Filter | None) -> list[str]:
    hit = [n for n in found.params if frozen is not None and tree.matches(frozen, n)]
    if frozen is not None and not hit:
        raise StepError(
            explain(
                "the filter frozen= matches no parameter",
                where=f"frozen={frozen!r}; parameters: {', '.join(list(found.params)[:8])}, ...",
            )
        )
    trained = [n for n in found.params if tensors[n].requires_grad and n not in hit]
    if not trained:
        raise StepError(
            explain(
                "the model has no parameter to train",
                where=f"{type(model).__qualname__} with {len(found.params)} parameters",
                why="all are frozen, by requires_grad=False or by frozen=",
            )
        )
    return trained


def _check_shapes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise StepError(
                explain(
                    "a lazy module has no shapes yet",
                    where=f"{type(model).__qualname__}: {name!r}",
                    instead="model(example_input)  # once, then ps.init(model, tx)",
                )
            )


@contextlib.contextmanager
def _seeded(rng: Tensor) -> Iterator[None]:
    """Seed the python, numpy and torch generators from a key, and put their states back afterwards."""
    low, high = rng.tolist()
    saved = global_generators.read()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            python_random.seed(low + (high << 32))
            np.random.seed(low)
            torch.manual_seed(low + ((high & 0x7FFFFFFF) << 32))
            yield
    finally:
        global_generators.write(saved)


@checked(ConfigError, failed=True)
def to_module(state: TrainState, module: nn.Module | None = None) -> nn.Module:
    """Make an ordinary module from a state: to export, to publish, or to use without purestep.

    Of a state that is split over processes each of them gets the whole module, so each calls it.

    Args:
        state: a state made by `init`.
        module: a module to load the weights into, in place; by default a new one is made.

    Returns:
        The module, in evaluation mode, with its own copy of the weights.

    Raises:
        StepError: the state holds no model and none is given, or the one that is given has other tensors.

    Examples:
        >>> from purestep import optim
        >>> state = init(lambda: nn.Linear(3, 2), optim.sgd(0.1))
        >>> torch.equal(to_module(state).weight, state.params["weight"])
        True
    """
    tensors = {name: bits.whole(t) for name, t in {**state.params, **state.buffers}.items()}
    if module is None:
        if state.model is None:
            raise StepError(explain("the state holds no model", instead="ps.to_module(state, module)"))
        module = copy.deepcopy(state.model.module)
        for name, places in (slots(module).params | slots(module).buffers).items():
            copied = tensors[name].detach().clone()
            if isinstance(places[0][0][places[0][1]], nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=name in state.params)
            for place, key in places:
                place[key] = copied
        for m in slots(module).rnns:
            _torch.init_flat_weights(m)
        return module.eval()
    found = slots(module, fresh=True)
    own = {name: places[0][0][places[0][1]] for name, places in (found.params | found.buffers).items()}
    odd = sorted(own.keys() ^ tensors.keys())
    odd = odd or [name for name, tensor in own.items() if tensor.shape != tensors[name].shape]
    if odd:
        sides = (tree.describe(d[odd[0]]) if odd[0] in d else "missing" for d in (own, tensors))
        raise StepError(
            explain(
                f"the state does not fit the module {type(module).__qualname__}",
                where="{!r}: {} in the module, {} in the state".format(odd[0], *sides),
                instead="ps.to_module(state)   # makes the module that the state was made for",
            )
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return module.eval()
