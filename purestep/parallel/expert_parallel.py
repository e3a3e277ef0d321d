"""Expert parallelism inside of a step: tokens go to the rank that has their expert, and its results come back.

Owns the exchange of tokens, forward and backward, and the gradients of experts, one for each microbatch whose tokens
they have seen. `fsdp` adds these up in the tree of all microbatches. The experts of a model are called one by one, with
the tokens of one microbatch, so the shapes, and with them the bits, do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from purestep import tree
from purestep.distributed import collectives
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import active
from purestep.functional.binding import Binding
from purestep.microbatch import Context, both
from purestep.module_tensors import slots
from purestep.parallel.per_model import PerModel
from purestep.sharding.experts import Experts
from purestep.sharding.local_batches import aligned
from purestep.sharding.plan import Plan


class Taker(Protocol):
    """What takes the gradients of experts, see `ExpertSums`."""

    def called(self, module: str) -> None: ...

    def take(self, module: str, by_rank: Sequence[dict[str, Tensor]]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Taking:
    """Where the gradients of experts go on a rank that has some of them.

    Attributes:
        anchor: a tensor that is differentiated: gradients are taken on the way to it.
        taker: is told of each call of a module, and given its gradients for the microbatch of each rank.
    """

    anchor: Tensor
    taker: Taker


class Bank:
    """One module of experts in a model.

    Args:
        name: of the module.
        module: itself.
        size: ranks that share its experts.
    """

    def __init__(self, name: str, module: nn.Module, size: int) -> None:
        self.name, self.module = name, module
        found = slots(module).params
        lengths = {key: int(group[0][0][group[0][1]].shape[0]) for key, group in found.items() if _ndim(group)}
        self.count = module.num_experts if isinstance(module, Experts) else 0
        if len(lengths) < len(found) or {*lengths.values()} != {self.count}:
            _refuse_module(name, module, lengths)
        if self.count % size:
            raise ConfigError(
                explain(
                    f"{self.count} experts cannot be shared equally by {size} ranks",
                    where=f"{name}: {type(module).__name__}",
                    instead=f"expert_parallel(size=...) with a divisor of {self.count}",
                )
            )
        self.own = self.count // size
        self.places = {key: [(place, at) for place, at in group] for key, group in found.items()}
        self.original: Callable[..., Tensor] = module.forward
        self.signature = inspect.signature(module.forward)

    def held(self) -> dict[str, Tensor]:
        """Return the parameters as they are bound now, by their names in the module."""
        return {key: group[0][0][group[0][1]] for key, group in self.places.items()}

    def some(self, params: Mapping[str, Tensor], tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Return what some experts make of tokens, with their parameters `[experts, ...]`; `counts` says how many
        tokens each of them has, in order."""
        saved = [(place, at, place[at]) for group in self.places.values() for place, at in group]
        drawn = _draws()
        try:
            for key, group in self.places.items():
                for place, at in group:
                    place[at] = params[key]
            self.module.__dict__["num_experts"] = len(counts)
            chosen = torch.repeat_interleave(torch.tensor(counts)).to(tokens.device).unsqueeze(1)
            out = self.original(tokens, chosen, tokens.new_ones(len(tokens), 1))
        finally:
            self.module.__dict__["num_experts"] = self.count
            for place, at, tensor in saved:
                place[at] = tensor
        if _draws() != drawn:
            raise ConfigError(
                explain(
                    "experts drew random numbers under expert parallelism",
                    where=f"{self.name}: {type(self.module).__name__}",
                    why="the key of a step is that of a microbatch, and a rank computes tokens of several",
                    instead="dropout before or behind the experts, where each token is on its own rank",
                )
            )
        if out.shape != tokens.shape:
            raise StepError(
                explain(
                    "experts return a tensor like the tokens that they were given",
                    where=f"{self.name} returned {tree.describe(out)} for {tree.describe(tokens)}",
                )
            )
        return out


class Dispatcher:
    """What sends the tokens of a model to their experts. Made by `dispatcher`, once for a plan and a model.

    Args:
        plan: with an axis of experts.
        module: the model.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        self.group = plan.mesh.group(plan.expert_axis)
        self.size = collectives.size_of(self.group)
        # One call for all experts of a rank may use grouped kernels, whose bits depend on how many there are.
        self.together = plan.reduction == "fast"
        found = [(name, sub) for name, sub in module.named_modules() if tree.matches(plan.experts, name)]
        if not found:
            raise ConfigError(
                explain(
                    "the model has no experts of this name",
                    where=f"experts={plan.experts!r} in {type(module).__name__}",
                    instead=f"experts='...', one of {', '.join(_candidates(module)) or 'its modules'}",
                )
            )
        self.banks = [Bank(name, sub, self.size) for name, sub in found]
        self.names = {f"{bank.name}.{key}" for bank in self.banks for key in bank.places}

    def around(self, taking: Taking | None, inner: Context | None) -> Context:
        """Return what makes the context that the model runs in: its experts get their tokens from all ranks there.

        Args:
            taking: where gradients go; None where parameters are whole, or nothing is differentiated.
            inner: the context inside of it.
        """
        return functools.partial(both, functools.partial(self._dispatching, taking), inner)

    @contextlib.contextmanager
    def _dispatching(self, taking: Taking | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for bank in self.banks:
                own = bank.module.__dict__
                before: dict[str, Any] = {key: own[key] for key in ("forward", "num_experts") if key in own}
                own["forward"] = functools.partial(self._forward, bank, taking)
                stack.callback(_put_back, own, before)
            yield

    def _forward(self, bank: Bank, taking: Taking | None, *args: Any, **kwargs: Any) -> Tensor:
        """Do what a module of experts does, with the tokens of this rank."""
        given = bank.signature.bind(*args, **kwargs).args
        if len(given) != 3:
            _refuse_call(bank, given)
        tokens, chosen, weights = given
        rows, ids = tokens.flatten(0, -2), chosen.flatten(0, -2)
        # One row for each token and expert, in the order of the experts, and so in that of the ranks.
        order = torch.argsort(ids.reshape(-1), stable=True)
        counts = torch.bincount(ids.reshape(-1), minlength=bank.count)
        if len(counts) > bank.count:
            raise StepError(
                explain(
                    "a token was sent to an expert that there is not",
                    where=f"{bank.name}: expert {len(counts) - 1} of {bank.count}",
                )
            )
        counts = counts.view(self.size, bank.own)
        received = _all_to_all(counts, [1] * self.size, [1] * self.size, self.group)
        sent, arriving = counts.sum(1).tolist(), received.tolist()
        lengths = [sum(by_expert) for by_expert in arriving]
        pairs = rows.unsqueeze(1).expand(-1, ids.shape[1], -1).flatten(0, 1)[order]
        anchor = None if taking is None else taking.anchor
        here = self._exchange(anchor, pairs, sent, lengths)
        back = self._exchange(anchor, self._computed(bank, taking, here, arriving), lengths, sent)
        found = back[torch.argsort(order)].view(*ids.shape, -1)
        return (found * weights.reshape(*ids.shape, 1)).to(tokens.dtype).sum(1).view(tokens.shape)

    def _exchange(self, anchor: Tensor | None, rows: Tensor, sent: list[int], lengths: list[int]) -> Tensor:
        if self.group is None:
            return rows
        out: Tensor = _Exchange.apply(anchor, rows, sent, lengths, self.group)
        return out

    def _computed(self, bank: Bank, taking: Taking | None, rows: Tensor, arriving: list[list[int]]) -> Tensor:
        """Return what the experts of this rank make of rows, which are in the order of ranks, and then of experts."""
        lengths = [[sum(by_expert)] if self.together else by_expert for by_expert in arriving]
        experts = self._experts(bank, taking)
        pieces = iter(rows.split([count for each in lengths for count in each]))
        found = []
        for source, each in enumerate(lengths):
            for number, count in enumerate(each):
                piece = next(pieces)
                if not count:
                    continue
                numbers = arriving[source] if self.together else [count]
                found.append(bank.some(experts[source][number], aligned(piece), numbers))
        return torch.cat(found) if found else rows.clone()

    def _experts(self, bank: Bank, taking: Taking | None) -> list[list[dict[str, Tensor]]]:
        """Return the parameters of each expert of this rank, or of all at once, for the microbatch of each rank."""
        held = bank.held()
        names, groups = list(held), 1 if self.together else bank.own
        outputs: Sequence[Tensor]
        if taking is None:
            outputs = _Apart.apply(groups, 1, None, None, *held.values()) * self.size
        else:
            taking.taker.called(bank.name)
            take = functools.partial(_taken, taking.taker, bank.name, names)
            outputs = _Apart.apply(groups, self.size, take, taking.anchor, *held.values())
        width = len(names)
        each = [dict(zip(names, outputs[i : i + width], strict=True)) for i in range(0, len(outputs), width)]
        return [each[i : i + groups] for i in range(0, len(each), groups)]


def _taken(taker: Taker, module: str, names: Sequence[str], by_rank: Sequence[Sequence[Tensor]]) -> None:
    taker.take(module, [dict(zip((f"{module}.{n}" for n in names), grads, strict=True)) for grads in by_rank])


def _put_back(own: dict[str, Any], before: Mapping[str, Any]) -> None:
    for key in ("forward", "num_experts"):
        if key in before:
            own[key] = before[key]
        else:
            own.pop(key, None)


_dispatchers = PerModel(Dispatcher)


def dispatcher(plan: Plan, module: nn.Module) -> Dispatcher:
    """Return what sends the tokens of a model to the ranks of their experts, under a plan with an axis of experts."""
    return _dispatchers(plan, module)


def _draws() -> int:
    bindings = [x for x in active.stack() if isinstance(x, Binding)]
    return bindings[-1].mode.calls if bindings else 0


def _ndim(group: Sequence[tuple[Any, str]]) -> int:
    place, at = group[0]
    return int(place[at].ndim)


def _candidates(module: nn.Module) -> list[str]:
    return [
        name for name, sub in module.named_modules() if isinstance(sub, Experts) and isinstance(sub.num_experts, int)
    ]


def _refuse_call(bank: Bank, given: Sequence[Any]) -> NoReturn:
    raise ConfigError(
        explain(
            "experts were not called with tokens, their experts and their weights",
            where=f"{bank.name}: {type(bank.module).__name__}({', '.join(map(tree.describe, given))})",
            why="what an expert is given has to be known before it is computed, to be sent to another rank",
            instead="experts(tokens, chosen, weights): [n, width], int64[n, k], [n, k]",
        )
    )


def _refuse_module(name: str, module: nn.Module, lengths: Mapping[str, int]) -> NoReturn:
    raise ConfigError(
        explain(
            "these are no experts that can be shared over ranks",
            where=f"{name}: {type(module).__name__}, "
            + (", ".join(f"{key}[{n}, ...]" for key, n in lengths.items()) or "without parameters"),
            why="ps.sharding.Experts says what they are: a module with `num_experts`, which is dim 0 of each of its "
            "parameters, called with tokens [n, width], their experts [n, k] and weights [n, k]",
            instead="one parameter for all experts, [experts, ...], in place of a list of modules; the router outside",
        )
    )


# --- what travels -----------------------------------------------------------------------------------------------------


def _all_to_all(rows: Tensor, sent: list[int], lengths: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows that the members of a group have sent to this one, in the order of their ranks."""
    if group is None:
        return rows
    # Bytes can be sent of any dtype.
    raw = rows.contiguous().view(torch.uint8) if rows.element_size() < 4 else rows.contiguous()
    received = raw.new_empty(sum(lengths), *raw.shape[1:])
    dist.all_to_all_single(received, raw, lengths, sent, group=group)
    return received.view(rows.dtype)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, and their gradients back. `anchor` is an input only so that every rank runs `backward`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor | None, rows: Tensor, sent: list[int], lengths: list[int], group: Any
    ) -> Tensor:
        ctx.how = sent, lengths, group
        return _all_to_all(rows, sent, lengths, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sent, lengths, group = ctx.how
        return None, _all_to_all(grad, lengths, sent, group), None, None, None


class _Apart(torch.autograd.Function):
    """Parameters `[experts, ...]` in equal groups of experts, so many times over: once for each microbatch.

    The results are in the order of microbatches, groups, parameters. Where `take` is given it gets the gradients, and
    `anchor` none, which is an input only so that autograd calls `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any, groups: int, times: int, take: Callable[..., None] | None, anchor: Tensor | None, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.how = groups, take, [(p.shape, p.dtype, p.device) for p in params]
        each = [aligned(p.chunk(groups)[i]) for i in range(groups) for p in params]
        return tuple(p.view_as(p) for _ in range(times) for p in each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        groups, take, kinds = ctx.how
        width = groups * len(kinds)
        by_source = [_joined(grads[i : i + width], kinds) for i in range(0, len(grads), width)]
        if take is None:
            return None, None, None, None, *by_source[0]
        take(by_source)
        return None, None, None, None, *(None for _ in kinds)


def _joined(grads: Sequence[Tensor | None], kinds: Sequence[tuple[torch.Size, Any, Any]]) -> list[Tensor]:
    """Return the gradient of each parameter, from those of its groups of experts; None is one without tokens."""
    found = []
    for at, (shape, dtype, device) in enumerate(kinds):
        whole = torch.zeros(shape, dtype=dtype, device=device)
        groups = grads[at :: len(kinds)]
        for part, grad in zip(whole.chunk(len(groups)), groups, strict=True):
            if grad is not None:
                part.copy_(grad)
        found.append(whole)
    return found
