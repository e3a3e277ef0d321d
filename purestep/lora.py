"""`lora`: low-rank adapters beside frozen layers, by a rule of names, merged back, and in files of their own.

The adapters are ordinary parameters of the model that `init` is given, so steps, plans, jit and snapshots treat them as
any other; the layers that they adapt keep the names of their weights, so files of weights and rules of plans fit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.arguments import Count, Decay, Finite, Location, checked
from purestep.distributed.mesh import this_rank
from purestep.errors import ConfigError, StepError, TemplateMismatch, explain
from purestep.lora_layers import LoraLayer, adapted, linear_kinds, refusal
from purestep.module_tensors import Definition, slots
from purestep.sharding import Plan, Spec, placement
from purestep.snapshot import export
from purestep.state import TrainState, definition
from purestep.trainable import frozen_names
from purestep.tree import Filter
from purestep.weights.files import stored_weights
from purestep.weights.matching import matched
from purestep.weights.stored import leaf_like, read_metadata

T = TypeVar("T", nn.Module, Callable[[], nn.Module])
_BASE = "base_digest"  # in the header of a file of adapters
_ADAPTERS = ("*.lora_A", "*.lora_B", "lora_A", "lora_B")


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Lora:
    """A rule of which layers get adapters; `lora` makes it, and calling it adapts a model.

    Attributes:
        names, rank, alpha, dropout, train, base, embeddings: see `ps.lora`.
    """

    names: Filter
    rank: Count = 8
    alpha: Finite[float] | None = None
    dropout: Decay[float] = 0.0
    train: Filter | None = None
    base: torch.dtype | None = None
    embeddings: Filter | None = None

    def __call__(self, model: T) -> T:
        """Return the adapted model: of a module a copy, of a function that makes one a function.

        Raises:
            ConfigError: the rule matches no layer, or one that cannot be adapted.
        """
        if isinstance(model, nn.Module):
            return self._adapted(copy.deepcopy(model))
        return lambda: self._adapted(model())

    def plan(self, plan: Plan) -> Plan:
        """Return a plan with the adapters in full on every process, and everything else as it is.

        Examples:
            >>> import purestep as ps
            >>> plan = ps.lora("*").plan(ps.sharding.fsdp(4))
            >>> plan.spec("0.weight", (8, 8)), plan.spec("0.lora_A", (8, 8))
            (Spec('fsdp'), Spec())
        """
        return dataclasses.replace(plan, rules=((_ADAPTERS, Spec()), *plan.rules))

    def _adapted(self, model: nn.Module) -> nn.Module:
        for name, layer in self._targets(model).items():
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, adapted(layer, self.rank, self._alpha, self.dropout))
        trained = [n for n, _ in model.named_parameters() if self.train is not None and tree.matches(self.train, n)]
        if self.train is not None and not trained:
            raise ConfigError(explain("the filter train= matches no parameter", where=repr(self.train)))
        for name, parameter in model.named_parameters():
            if name in trained or name.rpartition(".")[2] in LoraLayer.adapters:
                continue
            parameter.requires_grad_(False)
            if self.base is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(self.base)
        return model

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = _chosen(model, self.names, linear_kinds(), "linear layer") if self.names != () else {}
        if self.embeddings is not None:
            chosen |= _chosen(model, self.embeddings, (nn.Embedding,), "embedding")
        shared = {name for name, places in slots(model).params.items() if len(places) > 1}
        for name, layer in chosen.items():
            owner = model.get_submodule(name.rpartition(".")[0])
            why = refusal(layer)
            if why is None and isinstance(owner, nn.MultiheadAttention):
                why = "nn.MultiheadAttention multiplies by its weight without calling the layer"
            elif why is None and (f"{name}.weight" in shared or f"{name}.weight" not in slots(model).params):
                why = "its weight is shared with another layer, which an update would change, too"
            if why is not None:
                rule = self.embeddings if isinstance(layer, nn.Embedding) else self.names
                raise ConfigError(
                    explain(
                        "lora: a layer that the rule matches cannot be adapted",
                        where=f"{name!r}, matched by {rule!r}",
                        why=why,
                        instead="a rule that leaves it out: ps.lora(['*.q_proj', '*.v_proj']), or a function of names",
                    )
                )
        return chosen


def _chosen(model: nn.Module, names: Filter, kinds: tuple[type[nn.Module], ...], kind: str) -> dict[str, nn.Module]:
    found = {name: m for name, m in model.named_modules() if name and isinstance(m, kinds)}
    chosen = {name: m for name, m in found.items() if tree.matches(names, name)}
    if not chosen:
        shown = ", ".join(map(repr, [*found][:8])) or "none"
        raise ConfigError(
            explain(
                f"lora: the rule matches no {kind}",
                where=f"{names!r}; {kind}s of {type(model).__qualname__}: {shown}",
                instead="ps.lora('*.q_proj', rank=8), ps.lora('*')   # every linear layer",
            )
        )
    return chosen


@checked(ConfigError)
def lora(
    names: Filter,
    *,
    rank: Count = 8,
    alpha: Finite[float] | None = None,
    dropout: Decay[float] = 0.0,
    train: Filter | None = None,
    base: torch.dtype | None = None,
    embeddings: Filter | None = None,
) -> Lora:
    """Return a rule that puts low-rank adapters beside linear layers, and embeddings, and freezes all else.

    An adapted layer computes `x W^T + b + alpha / rank * dropout(x) A^T B^T` with `A: [rank, in]` and `B: [out, rank]`.
    B begins at zero, so the model begins as it is without adapters. Row i of an adapted embedding is
    `W[i] + alpha / rank * B A[:, i]`, without dropout; there A begins at zero.

    Args:
        names: a filter of dotted names of linear layers (`nn.Linear`, and `Conv1D` of transformers, of which GPT-2 is
            made): a glob, several, or a function of the name; `()` for none.
        rank: of the update.
        alpha: scale of the update times the rank; by default the rank, so that the scale is 1.
        dropout: probability with which elements of an adapter's input are dropped in training.
        train: a filter of other parameters that stay trained, such as a new head.
        base: dtype of the frozen floating-point parameters, such as `torch.bfloat16`; by default they keep theirs. The
            adapters and what `train` matches keep float32.
        embeddings: a filter of names of `nn.Embedding`; none by default.

    Returns:
        The rule. `rule(model)` is the adapted module, or a function that makes it if `model` is one.

    Raises:
        ConfigError: on being called, that the rule matches no linear layer, or one that cannot be adapted: a subclass
            of `nn.Linear`, a layer whose weight is tied, the projection inside `nn.MultiheadAttention`, an embedding
            with `max_norm`.

    Examples:
        >>> import purestep as ps
        >>> rule = ps.lora("0", rank=2, alpha=4)
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> state = ps.init(rule(model), ps.optim.adam(1e-3))
        >>> {name: tuple(t.shape) for name, t in state.params.items()}, list(state.buffers)
        ({'0.lora_A': (2, 3), '0.lora_B': (5, 2)}, ['0.weight', '0.bias', '2.weight', '2.bias'])
        >>> list(ps.merge_lora(state).params)
        ['0.weight', '0.bias', '2.weight', '2.bias']

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    return Lora(names, rank, alpha, dropout, train, base, embeddings)


@checked(ConfigError, failed=True)
def merge_lora(state: TrainState) -> TrainState:
    """Return a state of the model without adapters, whose weights have the updates added: `W + alpha / rank * B A`.

    Parts of a split weight are updated where they are. Sums are computed in float32 and rounded to the dtype of the
    weight.

    Args:
        state: of a model that `ps.lora` adapted.

    Returns:
        A state to evaluate, save (`ps.save_weights`) or make a module of (`ps.to_module`). All parameters are in its
        params; its optimizer state is empty, so `ps.init` begins another training: `ps.init(ps.to_module(merged), tx)`.

    Raises:
        StepError: the model has no adapters.
    """
    module: nn.Module = copy.deepcopy(definition(state).module)
    own = {**state.params, **state.buffers}
    layers = {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise StepError(explain("the model of the state has no adapters", instead="ps.lora('*.q_proj')(model)"))
    for name, layer in layers.items():
        dots = f"{name}."
        a, b = (placement.gather(own.pop(f"{dots}{key}")) for key in LoraLayer.adapters)
        factors = (a.T, b.T) if layer.transposed else (b, a)
        own[f"{dots}weight"] = _merged(own[f"{dots}weight"], *factors, layer.scale)
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, layer.without())
    known = slots(module, fresh=True).params
    return state.replace(
        params={name: own[name] for name in known},
        buffers={name: value for name, value in own.items() if name not in known},
        opt_state=None,
        loss_scale=None,
        model=Definition(module),
    )


def _merged(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Add the update `left right` to a weight, or to this rank's part of it."""
    (row, column), (rows, columns) = placement.shard_of(weight)
    update = left[row : row + rows].float() @ right[:, column : column + columns].float()
    part = placement.part_of(weight)
    merged = (part.float() + scale * update).to(part.dtype)
    return placement.rewrap(merged, weight) if placement.is_split(weight) else merged


# --- files of adapters ------------------------------------------------------------------------------------------------


@checked(ConfigError)
def save_adapters(state: TrainState, path: Location) -> Path:
    """Write what trains of a state, and the digest of the frozen base, as one file of safetensors.

    Args:
        state: of a model with adapters, or with any other frozen parameters. If it is split over processes, every
            process calls this function; rank 0 writes.
        path: ends in `.safetensors`.

    Returns:
        The absolute path.

    Raises:
        ConfigError: another suffix.
        MissingExtra: it needs `pip install "purestep[export]"`.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(ps.lora("0")(nn.Sequential(nn.Linear(3, 5))), ps.optim.adam(1e-3))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     sorted(ps.interop.read_weights(save_adapters(state, f"{directory}/a.safetensors")))
        ['0.lora_A', '0.lora_B']
    """
    target = Path(path).absolute()
    if target.suffix != ".safetensors":
        raise ConfigError(
            explain("a file of adapters ends in .safetensors", where=f"path: {path}", instead="'adapters.safetensors'")
        )
    metadata = {"format": "pt", "written_by": "purestep", "step": str(int(state.step)), _BASE: _base_digest(state)}
    values = {name: placement.gather(p).detach().cpu().contiguous() for name, p in state.params.items()}
    return export.write_file(target, values, metadata) if this_rank() == 0 else target


@checked(ConfigError, failed=True)
def load_adapters(state: TrainState, path: Location) -> TrainState:
    """Return a state with the trained parameters of a file that `save_adapters` wrote, beside the base they belong to.

    Step, key and optimizer state stay as they are.

    Args:
        state: of the same model with the same base, from `ps.init(rule(model), tx, weights=...)`.
        path: the file.

    Raises:
        ConfigError: no such file, or one that `save_adapters` did not write.
        TemplateMismatch: the frozen parameters are not those beside which the adapters were trained; names or shapes
            that do not fit.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(ps.lora("0")(nn.Sequential(nn.Linear(3, 5))), ps.optim.adam(1e-3))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     loaded = load_adapters(state, save_adapters(state, f"{directory}/a.safetensors"))
        >>> len(ps.diff(loaded, state))
        0
    """
    stored = stored_weights(path)
    recorded = read_metadata(Path(path)).get(_BASE)
    if recorded is None:
        raise ConfigError(
            explain(
                "the file does not say which base its tensors belong to",
                where=str(path),
                instead="ps.load_weights(state, path, strict=False)   # for a file of another program",
            )
        )
    if (own := _base_digest(state)) != recorded:
        raise TemplateMismatch(
            explain(
                "the adapters were trained beside another base",
                where=f"{path}: base {recorded[:16]}; frozen parameters of the state: {own[:16]}",
                why="a low-rank update means something only beside the very weights it was trained with",
                instead="ps.init(rule(model), tx, weights=the_base_of_that_run)   # in the same dtype: base=\n"
                "ps.load_weights(state, path, strict=False)   # to take them all the same",
            )
        )
    found = matched(stored, None, state.params, None, None, str(path))
    return state.replace(params={name: leaf_like(p, found[name]) for name, p in state.params.items()})


def _base_digest(state: TrainState) -> str:
    return tree.digest({name: state.buffers[name] for name in frozen_names(state)})
