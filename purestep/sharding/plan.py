"""Plans: where each tensor of a state lives, and which process computes which microbatches.

A `Plan` is a value of names and numbers: ordered rules from path globs to specs over the axes of a mesh. It moves
nothing itself: `placement` does, and steps, loops and snapshots ask it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from purestep import tree
from purestep.arguments import Count, Whole, checked
from purestep.distributed.mesh import Mesh
from purestep.distributed.mesh import mesh as mesh_of
from purestep.errors import ConfigError, explain
from purestep.sharding import dry_run as dry_runs
from purestep.sharding import placement as placing
from purestep.sharding import plan_checks, plan_product
from purestep.sharding import report as descriptions
from purestep.sharding import stages as staging
from purestep.sharding.families import OfFamily
from purestep.sharding.leaf_roles import Kind, follow
from purestep.sharding.spec import REPLICATED, Both, Fallback, Offload, Rules, Spec, blocks_of, resolve
from purestep.views import Block, Note, Table, View

T = TypeVar("T")
Reduction = Literal["tree", "fast"]
Zero = Literal[1, 2, 3]
Compress = Literal["bf16", "fp16"]
Attention = Literal["gather", "ring"]


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Plan(View):
    """Where each tensor of a state lives, and who computes which microbatches.

    Args:
        mesh: the processes.
        rules: ordered `(filter, Spec)` pairs; filters are those of `tree.matches`, over dotted names of parameters. The
            first that matches wins. Optimizer state lives where its parameter lives; steps, keys, counters and buffers
            that are not parameters are whole on every rank.
        batch: axes over which microbatches are distributed. Those that split parameters too take them in turns, the
            others contiguous runs, so that each sum is a subtree of the same tree on every topology.
        fallback: what happens to a parameter that no rule matches, an axis that the mesh does not have, or a dim that
            is not divisible: "error", "replicate" (whole on every rank) or "pad" (a dim is split unevenly).
        min_size: automatic specs leave tensors of fewer elements whole.
        units: globs of submodules whose parameters are gathered together; by default each child of a list or sequence.
        reshard_after_forward: free gathered parameters after the forward pass and gather them again in the backward.
        reduction: "tree" sums gradients in one fixed order, so that the bits do not depend on the topology; "fast" by
            the collectives of the backend.
        zero: the stage of ZeRO, which says what the rules split: 1 the optimizer state, 2 the gradients too, 3 the
            parameters too.
        offload: what lives on the CPU between steps, where the state is on a card: None, the "optimizer" state, or the
            "params" too. Updates then run on the CPU.
        compress: with `reduction="fast"`, the dtype in which ranks exchange gradients: "bf16" or "fp16"; by default
            their own. What the model adds to buffers, and parameters that `fsdp` leaves whole, are sent as they are.
        tensor_parts: into how many parts the dims over the tensor axis are cut, a power of two times its ranks; as many
            as ranks by default. The bits depend on this number, and not on that of the ranks.
        sequence_parallel: what is computed between the split layers is split over the positions of a sequence,
            dim 1 of `[batch, position, width]`, where the parts divide it.
        context: the ranks of the tensor axis compute runs of positions of each sequence, with whole parameters;
            `context_parallel` makes such a plan.
        attention: with `context`, how queries meet the keys and values of other ranks: "gather" brings all of them to
            every rank, "ring" passes them on from rank to rank.
        experts: globs of the modules of experts whose parameters `expert_axis` splits along dim 0; `expert_parallel`
            makes such a plan.
        expert_axis: the batch axis over which tokens are sent to the ranks of their experts, in place of gathering
            those; "" for none.
        stages: of a pipeline over the axis `stage`: for each stage the paths of its submodules and parameters, with
            globs and ranges (`"blocks.0-5"`).
        schedule: the order in which a pipeline computes: "1f1b", "gpipe", or "interleaved", where each rank has
            several stages that lie apart.

    Raises:
        ConfigError: a rule that is not a pair of a filter and a Spec, or a word that is not one of those above.

    Examples:
        >>> from purestep.sharding import mesh
        >>> plan = Plan(mesh({"fsdp": 4}), [("*.bias", Spec()), ("*", Spec("fsdp"))])
        >>> plan.spec("0.weight", (8, 3)), plan.spec("0.bias", (8,))
        (Spec('fsdp'), Spec())
        >>> plan.replicas
        4
    """

    mesh: Mesh
    rules: Rules = ()
    _: dataclasses.KW_ONLY
    batch: str | tuple[str, ...] = ("data", "fsdp")
    fallback: Fallback = "error"
    min_size: Whole = 0
    units: str | tuple[str, ...] | None = None
    reshard_after_forward: bool = True
    reduction: Reduction = "tree"
    sync_batchnorm: bool = False
    zero: Zero = 3
    offload: Offload | None = None
    compress: Compress | None = None
    tensor_parts: Count | None = None
    sequence_parallel: bool = False
    context: bool = False
    attention: Attention = "gather"
    experts: str | tuple[str, ...] = ()
    expert_axis: str = ""
    stages: staging.Stages = ()
    schedule: staging.Schedule = "1f1b"

    def __post_init__(self) -> None:
        rules = tuple((_frozen(rule[0]), rule[1]) if plan_checks.is_rule(rule) else rule for rule in self.rules)
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "batch", _names(self.batch))
        object.__setattr__(self, "experts", _names(self.experts))
        object.__setattr__(self, "units", None if self.units is None else _names(self.units))
        object.__setattr__(self, "stages", tuple(map(staging.expanded, self.stages)))
        plan_checks.check(self)

    # --- who computes what ---

    @property
    def data_axes(self) -> tuple[str, ...]:
        """Batch axes of the mesh that split no parameter: microbatches are contiguous runs over them."""
        return tuple(a for a in self.batch if a in self.mesh.axes and a not in self._named)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """Batch axes of the mesh that rules may split parameters over: microbatches take turns over them."""
        return tuple(a for a in self.batch if a in self.mesh.axes and a in self._named)

    @property
    def model_axes(self) -> tuple[str, ...]:
        """Axes of the mesh over which the batch is the same: tensor parallelism, pipelines."""
        return tuple(a for a in self.mesh.axes if a not in self.batch)

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """Axes of the mesh over which ranks compute each layer together."""
        return tuple(a for a in self.model_axes if not (self.stages and a == staging.AXIS))

    # --- stages ---

    @property
    def pipelined(self) -> bool:
        """Whether ranks compute one microbatch after each other, each its stages."""
        return bool(self.stages) and self.mesh.size(staging.AXIS) > 1

    @property
    def cut(self) -> staging.Stages:
        """The stages as the ranks of this mesh run them.

        Examples:
            >>> from purestep.sharding import pipeline
            >>> stages = [["embed", "blocks.0-1"], ["blocks.2-3", "head"]]
            >>> pipeline(stages).on({"stage": 2}).cut[1], len(pipeline(stages).on({"stage": 1}).cut)
            (('blocks.2', 'blocks.3', 'head'), 1)
        """
        ranks = self.mesh.size(staging.AXIS)
        plan_checks.check_stages(self, ranks)
        return staging.cut(self.stages, ranks, self.schedule)

    def stage_of(self, name: str) -> int | None:
        """Return the number of the stage of `cut` that a submodule or a tensor belongs to; None for none."""
        return staging.stage_of(self.cut, name)

    def home(self, stage: int) -> int:
        """Return the coordinate of the rank that computes a stage of `cut`."""
        return stage % self.mesh.size(staging.AXIS)

    @property
    def tensor_axis(self) -> str:
        """The axis over which ranks compute each microbatch together; "" where there is none, or several.

        Raises:
            ConfigError: `tensor_parts` is no power of two times its ranks.
        """
        axes = [a for a in self.tensor_axes if self.mesh.size(a) > 1]
        if not axes and (self.tensor_parts or 1) > 1:
            axes = list(self.tensor_axes)
        if len(axes) != 1:
            return ""
        plan_checks.check_parts(self, self.mesh.size(axes[0]))
        return axes[0]

    def check_computed(self) -> None:
        """Refuse a plan by which ranks would compute together over several axes: such a state can only be placed.

        Raises:
            ConfigError: names the axes.
        """
        if not self.tensor_axis and self.mesh.size(*self.tensor_axes) > 1:
            plan_checks.refuse_axes(self)

    @property
    def parts(self) -> int:
        """Into how many parts the dims over the tensor axis are cut."""
        return self.tensor_parts or self.mesh.size(*self.tensor_axes)

    def tensor_cut(self, name: str, shape: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
        """Return the dim of a parameter that the tensor axis splits, and the lengths of the matrices that lie side by
        side along it; None where the parameter is whole on every rank of the axis.

        Examples:
            >>> from purestep.sharding import tensor_parallel
            >>> plan = tensor_parallel({"qkv.weight": Spec("tensor", fused=3), "*.weight": Spec(None, "tensor")}, 2)
            >>> plan.tensor_cut("qkv.weight", (12, 4)), plan.tensor_cut("out.weight", (4, 4))
            ((0, (4, 4, 4)), (1, (4,)))
        """
        axis, found = self.tensor_axis, self._first(name)
        if not axis or found is None:
            return None
        at = next((d for d, entry in enumerate(found.entries) if axis in entry), None)
        if at is None or at >= len(shape):
            return None
        blocks = blocks_of(shape[at], found.fused, self.parts)
        if blocks is None and self.fallback == "error":
            plan_checks.refuse_cut(self, name, shape, found)
        return None if blocks is None else (at, blocks)

    def _first(self, name: str) -> Spec | None:
        return next((s for f, s in self.rules if tree.matches(f, name)), None)

    @property
    def _named(self) -> set[str]:
        return {axis for _, spec in self.rules for axis in spec.axes}

    @property
    def replicas(self) -> int:
        """Number of ranks that compute different microbatches (W)."""
        return self.mesh.size(*self.data_axes, *self.shard_axes)

    @property
    def sent_dtype(self) -> torch.dtype | None:
        """The dtype in which ranks exchange gradients; None for that in which they are summed.

        Examples:
            >>> from purestep.sharding import ddp
            >>> ddp(reduction="fast", compress="bf16").sent_dtype
            torch.bfloat16
        """
        return None if self.compress is None else {"bf16": torch.bfloat16, "fp16": torch.float16}[self.compress]

    @property
    def index(self) -> int:
        """This rank's number among those that compute different microbatches."""
        return self.mesh.index(*self.data_axes, *self.shard_axes)

    def microbatches(self, count: int, *, rank: int | None = None) -> tuple[int, ...]:
        """Return the numbers of the microbatches that a rank computes, in its order.

        Args:
            count: microbatches of a global batch (V); a multiple of `replicas`.
            rank: this process by default.

        Raises:
            ConfigError: `count` is not a multiple of `replicas`; the message names numbers that are.

        Examples:
            >>> from purestep.sharding import hsdp, mesh
            >>> plan = hsdp(fsdp=2).on(mesh({"data": 2, "fsdp": 2}))
            >>> [plan.microbatches(8, rank=r) for r in range(4)]
            [(0, 2), (1, 3), (4, 6), (5, 7)]
        """
        runs, turns = self.data_axes, self.shard_axes
        if self.zero == 1:
            # Gradients stay whole on every rank, so each adds up a run of its own before it sends anything.
            runs, turns = (*runs, *turns), ()
        outer, inner = self.mesh.size(*runs), self.mesh.size(*turns)
        if count < 1 or count % (outer * inner):
            plan_checks.refuse_count(self, count)
        start = self.mesh.index(*runs, rank=rank) * (count // outer)
        turn = self.mesh.index(*turns, rank=rank)
        return tuple(start + m * inner + turn for m in range(count // (outer * inner)))

    # --- where what lives ---

    def spec(self, name: str, shape: Sequence[int], kind: Kind = "params") -> Spec:
        """Return where a parameter lives: the first rule that matches its name, for its shape on this mesh.

        Args:
            name: of the parameter.
            shape: of the whole tensor.
            kind: "optimizer" for the optimizer state that follows it, which lives elsewhere under ZeRO 1 and 2.

        Raises:
            ConfigError: no rule matches, or the spec does not fit, under `fallback="error"`; more entries than dims.
        """
        if not self.pipelined:
            return self._by_rules(name, shape, kind)
        stage = self.stage_of(name)
        if stage is None or not shape:
            plan_checks.refuse_unstaged(self, name, shape, stage)
        return Spec(*self._by_rules(name, shape, kind).entries, at={staging.AXIS: self.home(stage)})

    def _by_rules(self, name: str, shape: Sequence[int], kind: Kind) -> Spec:
        found = self._first(name)
        if found is None:
            if self.fallback == "error" and not self.stages:
                plan_checks.refuse_unmatched(self, name, shape)
            return REPLICATED
        if self.zero < 3 and kind != "optimizer":
            return REPLICATED
        axis = self.tensor_axis
        if axis in found.axes and self.tensor_cut(name, shape) is None:
            found = Spec(*[tuple(a for a in entry if a != axis) for entry in found.entries], auto=found.auto)
        sizes = dict(zip(self.mesh.axes, self.mesh.shape, strict=True))
        return resolve(found, sizes, shape, fallback=self.fallback, min_size=self.min_size, where=name)

    def specs(self, value: object) -> Any:
        """Return a tree like a state (or like a tree of parameters) with the Spec of each leaf."""
        specs = [REPLICATED if f.name is None else self.spec(f.name, f.shape, f.kind) for f in follow(value)]
        return tree.unflatten(tree.structure(value), specs)

    def unit(self, name: str) -> str:
        """Return the submodule with which a parameter is gathered; "" is the root.

        Examples:
            >>> from purestep.sharding import fsdp
            >>> fsdp().unit("blocks.3.attention.weight"), fsdp().unit("head.weight")
            ('blocks.3', '')
        """
        parents = name.split(".")[:-1]
        prefixes = [".".join(parents[: i + 1]) for i in range(len(parents))]
        if self.units is None:
            return next((p for p in prefixes if p.rsplit(".", 1)[-1].isdigit()), "")
        return next((p for p in prefixes if tree.matches(self.units, p)), "")

    def is_expert(self, name: str) -> bool:
        """Tell whether a parameter is of experts that are split: tokens come to it, and it is not gathered.

        Examples:
            >>> from purestep.sharding import expert_parallel
            >>> plan = expert_parallel()
            >>> plan.is_expert("layers.0.mlp.experts.down_proj"), plan.is_expert("layers.0.mlp.gate.weight")
            (True, False)
        """
        return any(tree.matches(f"{glob}.*", name) for glob in self.experts)

    def on(self, mesh: Mesh | Mapping[str, int]) -> Plan:
        """Return this plan on another mesh, which may be one that is not here."""
        return dataclasses.replace(self, mesh=mesh if isinstance(mesh, Mesh) else mesh_of(mesh))

    def place(self, value: T) -> T:
        """Return a state whose leaves live where this plan says; see `sharding.placement.place`."""
        return placing.place(self, value)

    def gather(self, value: T) -> T:
        """Return a state of whole plain tensors, on every rank; every rank calls it."""
        return placing.gather(value)

    def describe(self, value: object, *, rank: int = 0) -> descriptions.Description:
        """Return where each leaf of a state lives: spec, shape and bytes on a rank. Print it.

        Args:
            value: a state, or any tree of tensors, on the meta device too.
            rank: whose parts; rank 0 holds the largest.

        Examples:
            >>> import torch
            >>> from purestep.sharding import fsdp
            >>> print(fsdp(4).describe({"w": torch.zeros(8, 2), "b": torch.zeros(2)}))
            mesh({'fsdp': 4}), rank 0 of 4
            path   leaf           spec          on a rank  bytes
            -----  -------------  ------------  ---------  -----
            ['b']  float32[2]     Spec()        [2]            8
            ['w']  float32[8, 2]  Spec('fsdp')  [2, 2]        16
            -----  -------------  ------------  ---------  -----
                                                all           24
        """
        return descriptions.describe(self, value, rank=rank)

    def dry_run(
        self,
        value: object,
        sizes: Mapping[str, int] | None = None,
        *,
        microbatches: int | None = None,
        compute_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        donate: bool = True,
    ) -> dry_runs.DryRun:
        """Return what a step would need of a rank, on a machine that need not be here. Print it.

        Activations are not in it: `ps.step_memory(step, state, batch)` knows them.

        Args:
            value: a state, on the meta device if it is large: `with torch.device("meta"): model = ...`.
            sizes: of the mesh axes; those of this plan's mesh by default.
            microbatches: V of the step; one per replica by default.
            compute_dtype: dtype in which parameters are gathered; their own by default.
            reduce_dtype: dtype in which gradients are summed; the parameters' by default.
            donate: whether the step donates its state, so that the new one takes its memory.

        Examples:
            >>> import torch
            >>> from purestep.sharding import fsdp
            >>> run = fsdp().dry_run({"blocks.0.w": torch.zeros(1024, 8, device="meta")}, {"fsdp": 1024})
            >>> run.memory, run.sent
            ({'params': 32, 'grads': 32768, 'sums': 65536}, {'gather': 65472, 'reduce': 32736})
        """
        plan = self if sizes is None else self.on(sizes)
        return dry_runs.dry_run(
            *(plan, value),
            microbatches=microbatches,
            compute_dtype=compute_dtype,
            reduce_dtype=reduce_dtype,
            donate=donate,
        )

    def view(self) -> list[Block]:
        """Return the blocks that show it: the axes of its mesh, its rules, and its settings."""
        axes = [
            (axis, "the rest" if size == -1 else size, self._splits(axis))
            for axis, size in zip(self.mesh.axes, self.mesh.sizes, strict=True)
        ]
        rules = [(_filter_text(filter), str(spec)) for filter, spec in self.rules]
        if "*" not in [filter for filter, _ in self.rules]:
            rules += [("anything else", "refused" if self.fallback == "error" else "whole on every rank")]
        names = "fallback min_size units reshard_after_forward reduction sync_batchnorm zero offload compress".split()
        names += ["tensor_parts", "sequence_parallel", "context"] if self.tensor_axes else []
        names += ["attention"] if self.context else []
        names += ["experts", "expert_axis"] if self.expert_axis else []
        names += ["schedule"] if self.stages else []
        settings = [(name, str(getattr(self, name))) for name in names]
        if self.stages:
            rules = [(" ".join(entries), f"stage {number}") for number, entries in enumerate(self.stages)]
        return [
            Table(("axis", "ranks", "splits"), axes),
            Table(("parameters", "where they live"), rules),
            Note(", ".join(f"{name}={value}" for name, value in settings)),
        ]

    def _splits(self, axis: str) -> str:
        if self.stages and axis == staging.AXIS:
            return "stages"
        over = ["microbatches"] if axis in self.batch else ["positions"] if self.context else []
        split = {1: "optimizer state", 2: "gradients", 3: "parameters"}[self.zero]
        return " and ".join([*over, *([split] if axis in self._named else [])]) or "nothing"

    def __mul__(self, other: Plan) -> Plan:
        """Return the plan that does both: the axes of both meshes, each tensor split by the specs of both.

        Axes of the batch stand outside of the others, so that a tensor-parallel group is one run of ranks, and split a
        dim that both split last, so that gathering over them gives whole tensor-parallel parts.

        Raises:
            ConfigError: `other` is no plan, an axis is in both meshes, both take what is left of the job, or they
                disagree about a setting.

        Examples:
            >>> from purestep.sharding import fsdp, tensor_parallel
            >>> plan = fsdp(2) * tensor_parallel({"*.up.weight": Spec("tensor")}, size=2)
            >>> plan.mesh
            mesh({'fsdp': 2, 'tensor': 2})
            >>> plan.spec("0.up.weight", (8, 4)), plan.spec("0.norm.weight", (8,))
            (Spec(('tensor', 'fsdp')), Spec('fsdp'))
        """
        if not isinstance(other, Plan):
            plan_checks.refuse_factor(other)
        return Plan(**plan_product.product(self, other))


def check_plan(plan: object, where: str) -> None:
    """Refuse what is given as a plan and is none; None is no plan and passes.

    Args:
        plan: what a caller gave.
        where: the call it was given to, as code.

    Raises:
        ConfigError: it is the name of a preset, the preset itself, or something else.

    Examples:
        >>> check_plan("fsdp", "ps.make_step")
        Traceback (most recent call last):
        purestep.errors.ConfigError: a plan is a Plan, not a str
          where:   ps.make_step(plan='fsdp')
          instead: plan=ps.sharding.fsdp()
    """
    if plan is None or isinstance(plan, Plan):
        return
    name = plan if isinstance(plan, str) else getattr(plan, "__name__", "")
    calls = {
        "ddp": "ddp()",
        "hsdp": "hsdp(fsdp=8)",
        "pipeline": "pipeline(stages)",
        "tensor_parallel": "tensor_parallel(rules, size=2)",
    }
    raise ConfigError(
        explain(
            f"a plan is a Plan, not a {type(plan).__name__}",
            where=f"{where}(plan={plan!r})" if isinstance(plan, str) or not name else f"{where}(plan={name})",
            instead=f"plan=ps.sharding.{calls.get(name, 'fsdp()')}",
        )
    )


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _filter_text(filter: tree.Filter) -> str:
    if isinstance(filter, Both):
        return f"{_filter_text(filter.first)} and {_filter_text(filter.second)}"
    if callable(filter):
        return str(filter if isinstance(filter, OfFamily) else getattr(filter, "__qualname__", type(filter).__name__))
    return filter if isinstance(filter, str) else " or ".join(filter)


def _frozen(filter: tree.Filter) -> tree.Filter:
    return tuple(filter) if isinstance(filter, list) else filter
