"""`LocalState`: the states of all workers as one value, where a plan places them, and their average.

Each leaf of a worker's train state has the workers as its first dim, which is split over the data axes of a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from purestep import _torch, tree
from purestep.arguments import checked
from purestep.errors import ConfigError, StepError, explain
from purestep.module_tensors import Definition, slots
from purestep.sharding import placement
from purestep.sharding.local_batches import aligned
from purestep.sharding.plan import Plan
from purestep.sharding.spec import REPLICATED, Spec, resolve
from purestep.state import TrainState
from purestep.tree import pytree
from purestep.treesum import TreeSum
from purestep.views import Block, Printed


@pytree
class LocalState(Printed):
    """The states of workers that train apart. Made by `LocalStep.begin`.

    Attributes:
        step: int64[], batches trained on so far.
        workers: a train state whose leaves are stacked: the workers are their first dim. `ps.unstack` parts it.
        outer: of DiLoCo: the params after the last average, and the state of the outer transformation; else None.
    """

    step: Tensor
    workers: TrainState
    outer: TrainState | None = None

    def replace(self, **changes: object) -> Self:
        """Return the state with some fields changed."""
        values: dict[str, Any] = {"step": self.step, "workers": self.workers, "outer": self.outer}
        return type(self)(**values | changes)

    def view(self) -> Iterable[Block]:
        """Return the blocks that show it: each leaf with its path, dtype and shape."""
        from purestep.display import notebook

        return notebook.show(self, root="state").view()


@pytree
class PowerState(Printed):
    """A train state, and what workers remember of the gradients that PowerSGD has sent. Made by `PowerStep.begin`.

    Attributes:
        step: int64[], batches trained on so far.
        train: the train state, which all workers share.
        errors: by parameter that is compressed, what each worker has not sent yet: [W, *shape].
        q: by parameter, the right factor of the last step, where the next one begins: [m, rank].
    """

    step: Tensor
    train: TrainState
    errors: dict[str, Tensor]
    q: dict[str, Tensor]

    def view(self) -> Iterable[Block]:
        """Return the blocks that show it: each leaf with its path, dtype and shape."""
        from purestep.display import notebook

        return notebook.show(self, root="state").view()


# The field of each kind of state whose leaves have the workers as their first dim.
_STACKED: tuple[tuple[type[Any], str], ...] = ((LocalState, "workers"), (PowerState, "errors"))


@dataclasses.dataclass(frozen=True)
class WorkerPlan(Plan):
    """The plan of a step of workers: it splits them over its data axes, everything else is whole on every rank."""

    @classmethod
    def of(cls, plan: Plan) -> WorkerPlan:
        """Return the plan of workers over the data axes of a plan.

        Raises:
            ConfigError: the plan splits parameters, or repeats the batch along an axis.
        """
        if plan.shard_axes or plan.model_axes or plan.rules:
            raise ConfigError(
                explain(
                    "workers that train apart need a plan that splits no parameter",
                    where=repr(plan),
                    why="each worker is whole on one rank",
                    instead="plan=ps.sharding.ddp()",
                )
            )
        return cls(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})

    def specs(self, value: object) -> Any:
        """Return a tree like a state with the Spec of each leaf."""
        sizes = dict(zip(self.mesh.axes, self.mesh.shape, strict=True))
        nodes = [(path, field) for kind, field in _STACKED for path, _ in tree.find(value, kind, "value")]
        stacked = tuple(f"{path}.{field}{end}" for path, field in nodes for end in ".[")

        def spec(path: str, leaf: Any) -> Spec:
            if not path.startswith(stacked):
                return REPLICATED
            return resolve(Spec(self.data_axes), sizes, leaf.shape, fallback="error", where=path)

        leaves, structure = tree.flatten(value)
        return tree.unflatten(structure, map(spec, tree.paths(value, "value"), leaves))


def steps_of(step: Tensor) -> int | None:
    """Return how many steps were taken; None in a dry run, which has no values, and looks at the dearest step."""
    return None if step.is_meta or _torch.is_fake(step) else int(step)


# --- one worker of several --------------------------------------------------------------------------------------------


def repeated(state: TrainState, count: int) -> TrainState:
    """Return the stacked state of workers that all begin alike; its tensors are views of the given ones.

    Raises:
        StepError: a leaf of the state is no tensor.
    """
    for path, leaf in zip(tree.paths(state, "state"), tree.leaves(state), strict=True):
        if not isinstance(leaf, Tensor):
            raise StepError(
                explain(
                    "a state of workers holds tensors only",
                    where=f"{path}: {tree.describe(leaf)}",
                    why="each leaf gets the workers as its first dim",
                )
            )
    return tree.map(lambda leaf: leaf.expand(count, *leaf.shape), state)


def one_of(workers: TrainState, place: int) -> TrainState:
    """Return the worker at a place of a stacked state, at aligned addresses: bits of matrix products depend on them."""
    return tree.map(lambda leaf: aligned(leaf[place]), workers)


def together(states: Sequence[TrainState]) -> TrainState:
    """Return the stacked state of workers; a single one is not copied."""
    if len(states) == 1:
        # Contiguous like a stack of several, so that no stride depends on how many are here.
        return tree.map(lambda leaf: leaf.contiguous().unsqueeze(0), states[0])
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


# --- their average ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Which leaves of a train state an average of workers takes the mean of, and the dtype in which each is summed.

    Made by `averaged_fields`.
    """

    dtypes: tuple[torch.dtype | None, ...]

    def of(self, worker: TrainState) -> list[Tensor]:
        """Return those leaves of a worker, to be summed."""
        pairs = zip(self.dtypes, tree.leaves(worker), strict=True)
        return [leaf.to(dtype) for dtype, leaf in pairs if dtype is not None]

    def means(self, sums: Sequence[Tensor], worker: TrainState, count: int) -> list[Tensor]:
        """Return the means of those leaves, in the dtypes that a worker has them in, from sums over so many workers."""
        pairs = zip(self.dtypes, tree.leaves(worker), strict=True)
        own = [leaf.dtype for dtype, leaf in pairs if dtype is not None]
        return [(x / count).to(dtype) for x, dtype in zip(sums, own, strict=True)]

    def put(self, worker: TrainState, means: Iterable[Tensor]) -> TrainState:
        """Return a worker's state with means in place of those leaves."""
        leaves, structure = tree.flatten(worker)
        rest = iter(means)
        pairs = zip(self.dtypes, leaves, strict=True)
        return tree.unflatten(structure, [leaf if dtype is None else next(rest) for dtype, leaf in pairs])


def averaged_fields(worker: TrainState, *, optimizer: bool) -> Averaged:
    """Choose floating params, floating buffers that are no frozen parameters, and, if asked for, the optimizer state.

    All else is a worker's own. Halves are summed in float32. Buffers and 0-d values are summed in float64, where the
    mean of equal float32 numbers is that number: a table that no step changes keeps its bits.
    """
    model = worker.model
    frozen = set(slots(model.module).params) if isinstance(model, Definition) else set()
    mps = worker.step.device.type == "mps"

    def dtype_of(path: tuple[Any, ...], leaf: Tensor) -> torch.dtype | None:
        own = path[0] in ("params", "buffers") or (optimizer and path[0] == "opt_state")
        if not own or not (leaf.is_floating_point() or leaf.is_complex()):
            return None
        if path[0] == "buffers" and ".".join(map(str, path[1:])) in frozen:
            return None
        if leaf.is_complex() or leaf.dtype == torch.float64:
            return leaf.dtype
        return torch.float64 if not mps and (path[0] == "buffers" or leaf.ndim == 0) else torch.float32

    return Averaged(tuple(map(dtype_of, tree.parts(worker), tree.leaves(worker))))


@checked(StepError)
def average_workers(state: LocalState) -> TrainState:
    """Return the mean of all workers, as a train state like that of one of them.

    Params, floating buffers (BatchNorm statistics) and the floating part of the optimizer state are means; step, key
    and counters are those of the first worker. Under a plan every rank calls it, and all get the same bits, which do
    not depend on the number of processes.

    Args:
        state: of a run of `ps.local_sgd` or `ps.diloco`.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.local_sgd(ps.make_step(lambda net, x: net(x).square().mean(), tx), workers=2, every=8)
        >>> state = step.begin(ps.init(lambda: torch.nn.Linear(3, 1), tx))
        >>> state, metrics = step(state, torch.randn(4, 3))
        >>> state.workers.params["weight"].shape, average_workers(state).params["weight"].shape
        (torch.Size([2, 1, 3]), torch.Size([1, 3]))
    """
    stacked = placement.gather(state.workers)
    count = int(stacked.step.shape[0])
    workers = [one_of(stacked, place) for place in range(count)]
    fields = averaged_fields(workers[0], optimizer=True)
    total: TreeSum[list[Tensor]] = TreeSum(lambda a, b: [x + y for x, y in zip(a, b, strict=True)])
    for worker in workers:
        total.add(fields.of(worker))
    return tree.map(torch.clone, fields.put(workers[0], fields.means(total.result(), workers[0], count)))
