"""`Policy`: numerical precision as a value, and `policy`, which makes one from a name or from words.

A policy can be compared, hashed and printed, and has no effect by itself. `apply` is a pure transform of a state, and
`make_step(..., policy=)` and `make_eval(..., policy=)` cast as it says.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar

import torch

from purestep.arguments import Judge, checked
from purestep.errors import PrecisionError, explain
from purestep.precision import convert_state, int8
from purestep.precision.describe import PolicyDescription, describe
from purestep.precision.float8 import RECIPES
from purestep.precision.loss_scale import DynamicLossScale, LossScale, NoLossScale
from purestep.precision.rules import NORMS, DType, Rule, Where, dtype_of, rule, word
from purestep.views import Block, Table, View

S = TypeVar("S")
_DROPOUT = ("portable", "device")


Word = Annotated[
    torch.dtype,
    Judge("a dtype such as torch.float32, or a word for one", lambda value: isinstance(value, (torch.dtype, str))),
]


@checked(PrecisionError)
@dataclasses.dataclass(frozen=True)
class Policy(View):
    """The dtypes of a step. Made by `policy`; `replace` and `where` return a changed one.

    Attributes:
        param: dtype of parameters and floating-point buffers at rest, in the state.
        compute: dtype of the parameters, buffers and inputs that modules compute with.
        output: dtype of the output of the model, and so of the loss.
        reduce: dtype in which gradients of microbatches are summed.
        master: dtype of master weights in the optimizer state; None for none.
        loss_scale: a loss scale with plain numbers.
        rules: other settings by path or by class of module; of two that apply, the later one counts.
        autocast: run the loss function under `torch.autocast` to `compute`, which chooses by operator, instead of
            casting parameters and inputs by module.
        float8: recipe of torchao for linear layers, or None.
        int8: recipe for linear layers in int8, "full" or "forward", or None.
        dropout: "portable" draws the masks of dropout from `ps.random`, with the same bits on every device, and writes
            attention with dropout out; "device" lets a CUDA card's own kernels draw them, seeded from the same keys,
            with attention fused. See `ps.random.device_dropout`.
        name: the name that it was made from; ignored in comparisons.
    """

    param: Word = torch.float32
    compute: Word = torch.float32
    output: Word = torch.float32
    reduce: Word = torch.float32
    master: Word | None = None
    loss_scale: LossScale = dataclasses.field(default_factory=NoLossScale)
    rules: tuple[Rule, ...] = ()
    autocast: bool = False
    float8: str | None = None
    int8: str | None = None
    dropout: str = "portable"
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        # Words become dtypes here, so that policies made from either are equal and have one hash.
        for field in ("param", "compute", "output", "reduce", "master"):
            value = getattr(self, field)
            if value is not None or field != "master":
                object.__setattr__(self, field, dtype_of(value, where=field))
        scale: Any = self.loss_scale
        if scale is None:
            object.__setattr__(self, "loss_scale", NoLossScale())
        elif not isinstance(scale, LossScale):
            instead = "loss_scale=ps.precision.StaticLossScale(1024.0)"
            raise PrecisionError(explain("this is not a loss scale", where=f"loss_scale={scale!r}", instead=instead))
        if self.float8 is not None and self.float8 not in RECIPES:
            where = f"float8={self.float8!r}"
            raise PrecisionError(
                explain("torchao has no such float8 recipe", where=where, instead=f"one of {', '.join(RECIPES)}")
            )
        if self.int8 is not None and (self.int8 not in int8.RECIPES or self.float8 is not None):
            both = "linear layers multiply in float8 or in int8"
            what = "there is no such int8 recipe" if self.float8 is None else both
            where = f"int8={self.int8!r}, float8={self.float8!r}"
            raise PrecisionError(explain(what, where=where, instead=f"one of {', '.join(int8.RECIPES)}"))
        if self.dropout not in _DROPOUT:
            raise PrecisionError(
                explain(
                    "dropout is drawn by purestep, or by the kernels of the device",
                    where=f"dropout={self.dropout!r}",
                    instead=" or ".join(f'dropout="{word}"' for word in _DROPOUT),
                )
            )
        if self.autocast:
            _check_autocast(self)

    @property
    def copied(self) -> torch.dtype | None:
        """Dtype of the copies of parameters that a model computes with; None where each operation makes its own."""
        return None if self.autocast else self.compute

    def replace(self, **changes: Any) -> Policy:
        """Return the policy with some fields changed; dtypes may be words.

        Raises:
            PrecisionError: there is no such field, or its value is no dtype, loss scale or recipe.

        Examples:
            >>> print(policy("bf16-mixed").replace(reduce="bf16", rules=()))
            params=f32,compute=bf16,output=f32,reduce=bf16
        """
        fields = [f.name for f in dataclasses.fields(self)]
        if odd := sorted(changes.keys() - set(fields)):
            raise PrecisionError(
                explain(
                    f"a policy has no {odd[0]!r}", where=f"policy(..., {odd[0]}=...)", instead=", ".join(fields[:-1])
                )
            )
        return dataclasses.replace(self, **{"name": "", **changes})

    def where(
        self,
        filter: Where | list[str],
        *,
        param: DType | None = None,
        compute: DType | None = None,
        output: DType | None = None,
        float8: bool | None = None,
        int8: bool | None = None,
    ) -> Policy:
        """Return the policy with one rule more: other settings for some modules, which override earlier rules.

        Args:
            filter: globs of dotted names of modules, parameters or buffers, a function of the name, or module classes
                (`ps.precision.NORMS` are torch's normalisation layers). The rule applies to everything inside of the
                modules that it matches.
            param: dtype at rest.
            compute: dtype of the computation. The output of the module is cast to the dtype of the module around it.
            output: dtype of the output of the matched module, instead of that.
            float8: False excludes linear layers from float8.
            int8: False excludes them from int8.

        Raises:
            PrecisionError: the rule changes nothing. A rule that matches nothing is refused by `apply` and by the step.

        Examples:
            >>> policy("bf16-true").where("head", compute="f32", output="f32").rules[0].where
            'head'
        """
        added = rule(filter, param=param, compute=compute, output=output, float8=float8, int8=int8)
        return self.replace(rules=(*self.rules, added))

    def apply(self, state: S) -> S:
        """Return a train state with the dtypes, master weights and loss scale of this policy; see
        `convert_state.apply`.

        The state may be under any other policy. A widening cast is exact, so `bf16-true` -> `32` keeps every value, and
        under a policy without master weights those of the state become its parameters.

        Args:
            state: a `TrainState`, of `ps.init` or of any step of a run. It is not changed.

        Returns:
            A state of the same structure, but for master weights and the loss scale.

        Raises:
            PrecisionError: a rule matches nothing.

        Examples:
            >>> import purestep as ps
            >>> from torch import nn
            >>> state = ps.init(lambda: nn.Linear(3, 2), ps.optim.sgd(0.1))
            >>> half = policy("bf16-master").apply(state)
            >>> half.params["weight"].dtype, half.opt_state.master["weight"].dtype
            (torch.bfloat16, torch.float32)
            >>> ps.tree.equal(policy("32").apply(half), state)
            True
        """
        return convert_state.apply(self, state)

    def describe(self, value: object) -> PolicyDescription:
        """Return what this policy does to each module of a model: dtypes at rest, of the computation, of the result.

        Args:
            value: a `TrainState`, under any policy, or a module; on the meta device too. It is not changed.

        Returns:
            A value that shows itself as a table of the modules that have tensors of their own, or a rule.

        Raises:
            PrecisionError: a rule matches nothing, or there is no model whose modules the rules could go by.

        Examples:
            >>> from torch import nn
            >>> chosen = policy("bf16-mixed", rules=()).where(nn.LayerNorm, compute="f32")
            >>> chosen.describe(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
            params=f32,compute=bf16,output=f32,reduce=f32,[LayerNorm:compute=f32]
            module     type        elements  at rest  computes in  returns  by rule
            the model  Sequential                     bf16         f32
            0          Linear            16  f32      bf16         bf16
            1          LayerNorm          8  f32      f32          bf16     LayerNorm:compute=f32
            96 B at rest
            gradients of microbatches are summed in f32
        """
        return describe(self, value)

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        fields: list[tuple[str, object]] = [
            ("parameters at rest", word(self.param)),
            (
                "modules compute in",
                f"{word(self.compute)}, by operator (autocast)" if self.autocast else word(self.compute),
            ),
            ("the model returns", word(self.output)),
            ("gradients of microbatches are summed in", word(self.reduce)),
            ("master weights", None if self.master is None else word(self.master)),
            ("linear layers multiply in float8", self.float8),
            ("linear layers multiply in int8", self.int8),
            ("dropout has the bits of", None if self.dropout == "portable" else "the device"),
            ("loss scale", None if isinstance(self.loss_scale, NoLossScale) else repr(self.loss_scale)),
            *((f"rule {number}", str(rule)) for number, rule in enumerate(self.rules)),
        ]
        return [Table(("policy", self.name), [field for field in fields if field[1] is not None], wide=True)]

    def cast_to_param(self, values: S) -> S:
        """Return a tree with its floating-point leaves in the dtype at rest; rules by name apply to names of leaves.

        Examples:
            >>> policy("bf16-true").cast_to_param({"w": torch.ones(2)})
            {'w': tensor([1., 1.], dtype=torch.bfloat16)}

        Reference: `jmp.Policy.cast_to_param`.
        """
        return convert_state.cast_tree(self, values, "param")

    def cast_to_compute(self, values: S) -> S:
        """Return a tree with its floating-point leaves in the dtype of the computation, for a hand-written step.

        Examples:
            >>> policy("bf16-mixed").cast_to_compute({"x": torch.ones(2), "label": torch.ones(2, dtype=torch.int64)})
            {'x': tensor([1., 1.], dtype=torch.bfloat16), 'label': tensor([1, 1])}

        Reference: `jmp.Policy.cast_to_compute`.
        """
        return convert_state.cast_tree(self, values, "compute")

    def cast_to_output(self, values: S) -> S:
        """Return a tree with its floating-point leaves in the dtype of outputs.

        Examples:
            >>> policy("bf16-mixed").cast_to_output({"logits": torch.ones(2, dtype=torch.bfloat16)})
            {'logits': tensor([1., 1.])}

        Reference: `jmp.Policy.cast_to_output`.
        """
        return convert_state.cast_tree(self, values, "output")

    def __str__(self) -> str:
        words = [f"params={word(self.param)}", f"compute={word(self.compute)}", f"output={word(self.output)}"]
        words += [f"reduce={word(self.reduce)}"]
        words += [f"master={word(self.master)}"] if self.master is not None else []
        words += ["autocast"] if self.autocast else []
        words += [f"float8={self.float8}"] if self.float8 else []
        words += [f"int8={self.int8}"] if self.int8 else []
        words += [] if self.dropout == "portable" else [f"dropout={self.dropout}"]
        words += [] if isinstance(self.loss_scale, NoLossScale) else [f"loss_scale={self.loss_scale!r}"]
        return ",".join([*words, *(f"[{rule}]" for rule in self.rules)])


def _check_autocast(chosen: Policy) -> None:
    changing = [rule for rule in chosen.rules if rule.required and (rule.compute or rule.output)]
    if chosen.float8 or chosen.int8 or changing or chosen.compute not in (torch.float16, torch.bfloat16):
        where = f"where({changing[0].where!r})" if changing else f"compute={word(chosen.compute)}"
        where = "float8" if chosen.float8 else "int8" if chosen.int8 else where
        raise PrecisionError(
            explain(
                "autocast needs compute=f16 or bf16, and no rule, float8 or int8 that chooses another dtype",
                where=where,
                why="it chooses the dtype of each operator itself",
                instead="rules with param= only, or autocast=False",
            )
        )


f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Not required: many models have no normalisation layers, and a named policy must fit them, too.
_KEEP_NORMS = Rule(NORMS, compute=f32, required=False)
_STORE_NORMS = Rule(NORMS, param=f32, compute=f32, required=False)

_NAMED = {
    "32": Policy(),
    "64": Policy(f64, f64, f64, f64),
    "bf16-mixed": Policy(compute=bf16, rules=(_KEEP_NORMS,)),
    "16-mixed": Policy(compute=f16, loss_scale=DynamicLossScale(), rules=(_KEEP_NORMS,)),
    "bf16-true": Policy(bf16, bf16, f32, bf16),
    "16-true": Policy(f16, f16, f32, f16),
    "bf16-master": Policy(bf16, bf16, f32, f32, master=f32, rules=(_STORE_NORMS,)),
    "float8": Policy(compute=bf16, float8="tensorwise", rules=(_KEEP_NORMS,)),
    "int8": Policy(compute=bf16, int8="full", rules=(_KEEP_NORMS,)),
}
_ALIASES = {"32-true": "32", "64-true": "64"}
NAMES = tuple(_NAMED)
"""The named policies."""

_FIELDS = {"p": "param", "params": "param", "param": "param", "c": "compute", "o": "output", "r": "reduce"}


@checked(PrecisionError)
def policy(spec: str | int | Policy, **changes: Any) -> Policy:
    """Return a precision policy from its name, from words, or from another policy.

    Args:
        spec: one of

            - `32`, `64`: everything in that precision;
            - `bf16-mixed`, `16-mixed`: float32 parameters, the model computes in the half precision, normalisation
              layers and the loss in float32. `16-mixed` has a dynamic loss scale, and is float16 on a CPU too;
            - `bf16-true`, `16-true`: everything but the loss in the half precision, optimizer state included;
            - `bf16-master`: bfloat16 parameters, float32 master weights in the optimizer state, normalisation layers
              float32;
            - `float8`: linear layers in float8 by torchao, the rest as `bf16-mixed`;
            - `int8`: linear layers in int8 with a scale for each row, the rest as `bf16-mixed`;

            or the long form `params=f32,compute=bf16,output=f32`, which also takes `reduce=` and `master=` and has no
            rules: compute, output and reduce are those of params by default.
        **changes: fields of `Policy` to change: `autocast=True`, `loss_scale=StaticLossScale(1024.0)`, `reduce="f32"`.

    Raises:
        PrecisionError: an unknown name or word.

    Examples:
        >>> print(policy("bf16-true"))
        params=bf16,compute=bf16,output=f32,reduce=bf16
        >>> policy("params=f32,compute=bf16,output=f32").compute
        torch.bfloat16

    References:
        `precision=` of the Lightning Trainer, for the names; `jmp.get_policy`, for the long form.
    """
    if isinstance(spec, Policy):
        return spec.replace(**changes) if changes else spec
    text = str(spec).strip() if isinstance(spec, (str, int)) and not isinstance(spec, bool) else ""
    name = _ALIASES.get(text, text)
    if name in _NAMED:
        chosen = dataclasses.replace(_NAMED[name], name=name)
    elif "=" in text:
        chosen = _from_words(text)
    else:
        hint = {"16": "16-mixed or 16-true", "bf16": "bf16-mixed or bf16-true", "fp8": "float8"}.get(text)
        raise PrecisionError(
            explain(
                "there is no such precision policy",
                where=f"policy({spec!r})",
                instead=hint or f"one of {', '.join(NAMES)}\nor 'params=f32,compute=bf16,output=f32'",
            )
        )
    return chosen.replace(**changes) if changes else chosen


def _from_words(text: str) -> Policy:
    values: dict[str, torch.dtype] = {}
    for part in text.split(","):
        key, _, value = (s.strip() for s in part.partition("="))
        field = _FIELDS.get(key, key)
        if field not in ("param", "compute", "output", "reduce", "master") or field in values:
            raise PrecisionError(
                explain(
                    f"a policy in words has no {key!r}" if field not in values else f"{key!r} occurs twice",
                    where=f"policy({text!r})",
                    instead="params=f32,compute=bf16,output=f32,reduce=f32,master=f32",
                )
            )
        values[field] = dtype_of(value, where=key)
    rest = values.setdefault("param", values.get("master") or f32)
    for field in ("compute", "output", "reduce"):
        values.setdefault(field, rest)
    return Policy(**values, name=text)  # type: ignore[arg-type]
