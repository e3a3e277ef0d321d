"""One stage of one microbatch: its forward pass, and its backward pass when the schedule comes to it.

Owns `Stages`, what a rank knows of its stages in a step, and `Pass`, the exchange of one of them with the ranks before
and after. `stage_cut` calls the model, `wire` sends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from purestep import transforms, tree
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import GradientScope
from purestep.grad import pulled_back, stop_gradient
from purestep.microbatch import Context, Gradients, MicrobatchExchange, NoExchange, Prepared, Tensors, Weight, both
from purestep.parallel._torch import FakeTensor, ValueOfAnotherStage
from purestep.parallel.stage_cut import Cut, Run, cut_of
from purestep.parallel.wire import Key, Lines, Wire
from purestep.parallel.zero import gathered, of_this_rank, split_over_batch
from purestep.precision.cast_params import Uncast
from purestep.sharding import placement
from purestep.sharding.plan import Plan
from purestep.sharding.stages import AXIS
from purestep.state import TrainState

Prepare = Callable[[TrainState, Any, int, MicrobatchExchange], Prepared]


class Stages:
    """What a rank knows of its stages in one step.

    Args:
        plan: with stages.
        module: the model, as the policy has it.
        at_rest: the state, with DTensors.
        view: the same with local parts.
        prepare: makes ready one microbatch.

    Attributes:
        view: with whole parameters of its stages, and the values of tied ones that live on other ranks.
        own: the stages of this rank, in order.
        tied: the stages that share a parameter, by its name.
    """

    def __init__(self, plan: Plan, module: nn.Module, at_rest: TrainState, view: TrainState, prepare: Prepare) -> None:
        self.plan, self.at_rest, self.prepare = plan, at_rest, prepare
        lines = Lines(plan.mesh.group(AXIS), plan.mesh.twin(AXIS))
        self.wire = Wire(lines, view.step.device)
        # All ranks make a group at once, and some may have nothing to send in it.
        for axes in (plan.data_axes, plan.shard_axes, (*plan.data_axes, *plan.shard_axes)):
            plan.mesh.group(*axes)
        self.cut = cut_of(plan, module)
        self.shapes = {n: tuple(x.shape) for n, x in (at_rest.params | at_rest.buffers).items()}
        self.here = plan.mesh.coordinate()[AXIS]
        self.own = [s for s in range(self.cut.count) if plan.home(s) == self.here]
        self.tied = {n: users for n, users in self.cut.users.items() if len(users) > 1}
        self.view = self._with_tied(self._gathered(view))

    def others(self, home: int) -> list[int]:
        """Return the ranks of the pipeline but one."""
        return [r for r in range(len(self.wire.ranks)) if r != home]

    def _gathered(self, view: TrainState) -> TrainState:
        """Return a view with whole parameters of the stages of this rank: they stay for the length of the step.

        A schedule comes back to a stage for each microbatch, several of which are under way at a time.
        """
        plan, held = self.plan, self.at_rest.params | self.at_rest.buffers
        split = {n: x for n, x in held.items() if placement.is_split(x)}
        mine = of_this_rank(plan, split_over_batch(plan, split, "params"))
        found = gathered(plan, view.params | view.buffers, held, mine)
        return view.replace(
            params={n: found.get(n, x) for n, x in view.params.items()},
            buffers={n: found.get(n, x) for n, x in view.buffers.items()},
        )

    def _with_tied(self, view: TrainState) -> TrainState:
        held, got = view.params | view.buffers, {}
        for item, (name, users) in enumerate(self.tied.items()):
            _check_tied(self.plan, name, users)
            home, key = self.plan.home(users[0]), Key("tied", users[0], 0, item)
            if self.here == home:
                for other in sorted({self.plan.home(u) for u in users} - {home}):
                    self.wire.send(other, key, [held[name].detach()])
            elif self.here in {self.plan.home(u) for u in users}:
                (got[name],) = self.wire.receive(home, key)
        return view.replace(
            params={n: got.get(n, x) for n, x in view.params.items()},
            buffers={n: got.get(n, x) for n, x in view.buffers.items()},
        )

    def mask(self, data: Any, train: bool) -> dict[int, list[int]]:
        """Return which leaves of the arguments are sent at each cut, found out once for each kind of batch."""
        cut = self.cut
        leaves, structure = tree.flatten(data)
        kinds = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)
        key = structure, kinds, train, torch.is_grad_enabled()
        if key not in cut.masks:
            mask: dict[int, list[int]] = {}
            probe = Pass(self, cut.count, 0, train=train)
            probe.run = Run(cut, cut.count, _nothing, mask)
            prepared = self.prepare(self.view, data, 0, probe)
            try:
                with GradientScope(), torch.no_grad():
                    prepared.loss_of(prepared.tracked)
            except ValueOfAnotherStage as error:
                # The loss may read numbers: the last stage has them.
                if len(mask) < cut.count - 1:
                    raise _no_value(probe.run) from error
            if len(mask) < cut.count - 1:
                _refuse_end(cut, len(mask))
            cut.masks[key] = mask
        return cut.masks[key]

    def told_buffers(self, found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the buffers after a step, with what each stage made of its own.

        Args:
            found: the buffers after each of this rank's stages.
        """
        old, cut = self.view.buffers, self.cut
        new = {n: placement.part_of(x) for n, x in self.at_rest.buffers.items()}
        for buffers in found:
            new |= {n: x for n, x in buffers.items() if x is not old[n]}
        for stage in range(cut.count):
            names = [n for n in old if cut.buffers.get(n) == stage]
            if not names:
                continue
            home, key = self.plan.home(stage), Key("buffers", stage)
            if self.here == home:
                for other in self.others(home):
                    self.wire.send(other, key, [new[n] if new[n] is not old[n] else None for n in names])
            else:
                received = self.wire.receive(home, key)
                new |= {n: x for n, x in zip(names, received, strict=True) if x is not None}
        return new


def _nothing(count: int) -> NoReturn:
    raise RuntimeError("a run of no stage receives nothing")


def _no_value(run: Run) -> StepError:
    return StepError(
        explain(
            "a model cannot be cut into stages: what it does depends on the values of a tensor",
            where=f"after the call of {run.at!r}",
            why="every rank calls all of the model up to its stage, and of what other stages compute it knows the "
            "shapes only",
            instead="ps.sharding.fsdp()\nor a model without .item(), if x.sum() > 0, x[mask] before the last stage",
        )
    )


def _refuse_end(cut: Cut, stage: int) -> NoReturn:
    raise StepError(
        explain(
            f"the loss function ended before stage {stage + 1} of the pipeline began",
            where=f"none of {cut.entry(stage + 1)} was called",
            why="a stage begins where the first of its submodules is called, and the last ends with the loss",
            instead="leave the stage out, or name submodules that the model calls",
        )
    )


def _check_tied(plan: Plan, name: str, users: Sequence[int]) -> None:
    if plan.stage_of(name) != users[0]:
        raise ConfigError(
            explain(
                f"{name!r} is shared by several stages and lives in a later one than the first of them",
                where=f"it is a parameter of stage {plan.stage_of(name)}, and stages {users} compute with it",
                why="its gradients are added on the way from the last stage to the first",
                instead="define the module that is called first before the other one: its name is the parameter's",
            )
        )


class Pass(NoExchange):
    """One stage of one microbatch, forward and backward; the exchange of a step, see `MicrobatchExchange`.

    Args:
        stages: of this rank.
        stage: which stage.
        index: which microbatch.
        train: whether the model is in training mode, and a backward pass follows.
    """

    repeatable = False  # another stage waits for what it sends

    def __init__(self, stages: Stages, stage: int, index: int, *, train: bool = True) -> None:
        self.stages, self.stage, self.index, self.train = stages, stage, index, train
        self.last = stage == stages.cut.count - 1
        self.run: Run
        self.scope: GradientScope
        self.leaves: Tensors
        self.aliases: dict[str, Tensor] = {}
        self.value: Any = None
        self.aux: Any = None

    # --- what a step calls, see `MicrobatchExchange` ---

    def check(self, state: TrainState) -> None:
        pass  # what is not here is replaced by what has no memory

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        self.cast, self.params = cast, params
        return {n: x for n, x in params.items() if self.stage in self.stages.cut.users[n]}

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        cut, shapes = self.stages.cut, self.stages.shapes
        params = {n: tracked[n] if n in tracked else cut.fake(n, shapes[n], x) for n, x in self.params.items()}
        given = {n: x if cut.may_use(n, self.stage) else cut.fake(n, shapes[n], x) for n, x in buffers.items()}
        mine = functools.partial(cut.around, self.run)
        return params, given, mine if around is None else functools.partial(both, around, mine)

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        cut = self.stages.cut
        kept = {n: x if cut.may_use(n, self.stage) and n not in cut.users else old[n] for n, x in new.items()}
        for name, x in kept.items():
            if isinstance(x, FakeTensor) and self.stage < cut.count:
                _refuse_buffer(name)
        return kept

    # --- what the pipeline calls ---

    def forward(self, data: Any) -> None:
        """Compute the stage, and send what comes out to the next."""
        stages, cut = self.stages, self.stages.cut
        self.run = Run(cut, self.stage, self._receive, stages.mask(data, self.train))
        prepared = stages.prepare(stages.view, data, self.index, self)
        self.leaves = {n: x.detach().requires_grad_(self.train) for n, x in prepared.tracked.items()}
        with GradientScope() as self.scope, transforms.recorded() if self.train else transforms.unrecorded():
            self.value, aux = prepared.loss_of(self.leaves)
            self.aux = stop_gradient(aux)
        # The run would hold this pass, which holds it: only Python's collector, which seldom looks, would free them. Of
        # parameters in the compute dtype the backward pass needs those of this stage, which `leaves` has.
        self.run.receive, self.params = _nothing, {}
        if self.last:
            return
        outgoing = self.run.outgoing
        if outgoing is None:
            _refuse_end(cut, self.stage)
        # Created last, so that what later stages add to the gradient of a tied parameter comes first, as in one graph.
        later = [n for n in self.leaves if stages.tied.get(n, [self.stage])[-1] > self.stage]
        self.aliases = {n: self.leaves[n].view_as(self.leaves[n]) for n in later}
        stages.wire.send(stages.plan.home(self.stage + 1), Key("forward", self.stage + 1, self.index), outgoing)

    def _receive(self, count: int) -> Sequence[Tensor | None]:
        stages = self.stages
        return stages.wire.receive(stages.plan.home(self.stage - 1), Key("forward", self.stage, self.index))

    def backward(self) -> Gradients:
        """Compute the gradients of the stage, and send those of what it was given to the stage before."""
        incoming = self.run.incoming
        weight, new, metrics = self.aux
        if self.last:
            values, given = [self.value], [torch.ones_like(self.value)]
        else:
            values, given, weight = self._received_gradients(weight)
        inputs = [*self.leaves.values(), *([incoming.anchor] if incoming is not None else [])]
        inputs = [x for x in inputs if x.requires_grad]
        self.run.again = True
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if values and inputs:
            with self.scope.backward():
                found = pulled_back(values, given, inputs)
        grads = dict(zip(self.leaves, found, strict=False))
        if incoming is not None:
            self._send_backward(incoming.grads, weight)
        self._send_tied(grads)
        whole = {n: torch.zeros_like(x) if grads[n] is None else grads[n] for n, x in self.leaves.items()}
        own = {n: x for n, x in whole.items() if self.stages.plan.stage_of(n) == self.stage}
        return Gradients(self.cast.reduced(own), weight, new, metrics)

    def _received_gradients(self, weight: Weight) -> tuple[list[Tensor], list[Tensor], Weight]:
        """Return what the stage sent and their gradients, and the weight of the loss."""
        stages, outgoing = self.stages, self.run.outgoing or []
        key = Key("backward", self.stage, self.index)
        *grads, weighted = stages.wire.receive(stages.plan.home(self.stage + 1), key)
        pairs = [(x, g) for x, g in zip(outgoing, grads, strict=True) if g is not None and x.requires_grad]
        for item, (name, users) in enumerate(stages.tied.items()):
            if name in self.aliases:
                later = next(u for u in users if u > self.stage)
                key = Key("tied gradients", self.stage, self.index, item)
                (grad,) = stages.wire.receive(stages.plan.home(later), key)
                pairs += [] if grad is None else [(self.aliases[name], grad)]
        return [x for x, _ in pairs], [g for _, g in pairs], weight if weighted is None else weighted

    def _send_backward(self, grads: Sequence[Tensor | None], weight: Weight) -> None:
        stages, weighted = self.stages, weight if isinstance(weight, Tensor) else None
        key = Key("backward", self.stage - 1, self.index)
        stages.wire.send(stages.plan.home(self.stage - 1), key, [*grads, weighted])

    def _send_tied(self, grads: Mapping[str, Tensor | None]) -> None:
        stages = self.stages
        for item, (name, users) in enumerate(stages.tied.items()):
            earlier = [u for u in users if u < self.stage]
            if name in grads and earlier:
                key = Key("tied gradients", earlier[-1], self.index, item)
                stages.wire.send(stages.plan.home(earlier[-1]), key, [grads[name]])


def _refuse_buffer(name: str) -> NoReturn:
    raise StepError(
        explain(
            f"the buffer {name!r} is set to what another stage computes",
            where="outside of the submodules of any stage",
            why="every rank has its own copy of a buffer that belongs to no stage",
            instead=f"name {name!r} in the stage that computes it",
        )
    )
