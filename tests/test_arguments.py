"""Every public callable, called with malformed values in turn at each of its parameters.

Each call ends in an error of ours that names the argument, or the value is a legal one: either its annotation says so
(`LEGAL`), or a table below does (`ACCEPTED`), with the reason. There is no third outcome: nothing obscure, no nonsense
that is taken without a word.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import warnings
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep.arguments import Count, Decay, Fraction, Judge, NonNegative, Range, check_of, checked
from purestep.errors import ConfigError, PurestepError

ROOMS = "callbacks data loggers metrics optim precision random sharding snapshot testing tree display".split()

VALUES: dict[str, Any] = {
    "None": None,
    "text": "nonsense",
    "empty text": "",
    "bytes": b"x",
    "-1": -1,
    "0": 0,
    "1": 1,
    "2.5": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "True": True,
    "[]": [],
    "{}": {},
    "()": (),
    "[1, 'x']": [1, "x"],
    "object": object(),
    "function": lambda *args, **kwargs: None,
    "class": dict,
    "matrix": torch.ones(2, 3),
    "complex": 1j,
    "10**30": 10**30,
    "array": np.ones(3),
}

# What a word of an annotation allows.
LEGAL = {
    "NonNegative": "0 1 2.5",
    "Positive": "1 2.5",
    "Limit": "1 2.5 inf",
    "Decay": "0",
    "Fraction": "0 1",
    "Finite": "-1 0 1 2.5",
    "Count": "1",
    "Whole": "0 1",
    "Seed": "0 1",
    "Name": "text",
    "Location": "text",
    "bool": "True",
    "str": "text, empty text",
    "int": "-1 0 1",
    "float": "-1 0 1 2.5 inf -inf",
    "None": "None",
    "Filter": "text, empty text, [], (), function",
    "Callable": "function class",
    "LossFn": "function class",
    "Transform": "function class",
    "ScalarOrSchedule": "function",
    "Schedule": "function",
    "Condition": "function",
    "Sequence": "[] ()",
    "Rules": "[] ()",
    "tuple": "[] ()",
    "list": "[] ()",
    "Mapping": "{}",
    "Tensor": "matrix",
}
_NARROW = {"NonNegative", "Positive", "Limit", "Decay", "Fraction", "Finite", "Count", "Whole", "Seed", "Name"}
EVERYTHING = frozenset(VALUES)
NUMBERS = frozenset("-1 0 1 2.5 nan inf -inf True 10**30".split())
ITERABLE = frozenset(["[]", "()", "[1, 'x']", "function", "class"])

# What no annotation says: (callable, parameter) -> the values, and why.
ACCEPTED: dict[tuple[str, str], tuple[frozenset[str], str]] = {}


def accept(names: str, values: Any, why: str) -> None:
    for name in names.split():
        function, _, parameter = name.rpartition(".")
        ACCEPTED[function, parameter] = (frozenset(values), why)


def legal(annotation: str) -> frozenset[str]:
    """The labels that the words of an annotation allow; a range takes the place of the type that it narrows."""
    words = set(re.findall(r"\w+", annotation))
    if words & _NARROW:
        words -= {"int", "float", "str", "Scalar", "Tensor"}
    if "Literal" in words:
        words -= {"str"}
    labels = ", ".join(
        LEGAL[word] if "," in LEGAL[word] else LEGAL[word].replace(" ", ", ") for word in words & set(LEGAL)
    )
    return frozenset(filter(None, labels.split(", ")))


# --- how each is called rightly ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> dict[str, Any]:
    """A right argument for each name that a required parameter has, and `callable.parameter` where one name differs."""
    root = tmp_path_factory.mktemp("arguments")
    tx = ps.optim.sgd(0.1)
    state = ps.init(lambda: nn.Linear(2, 1), tx)
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
    batches = ps.data.batches({"x": torch.ones(8, 2)}, 4)
    ps.fit(step, state, batches, until=ps.steps(2), run_dir=root / "run", callbacks=[ps.callbacks.snapshots()])
    tree, halves = {"a": torch.ones(2)}, [ps.optim.constant_schedule(1.0)] * 2
    cycle = {"init_value": 0.0, "peak_value": 1.0, "decay_steps": 5, "warmup_steps": 1, "end_value": 0.0}
    return {
        # ensembles
        "stack.states": [state, state],
        "unstack.stacked": {"w": torch.ones(2, 3)},
        "workers": 2,
        "average_workers.state": ps.local_sgd(step, workers=2, every=2).begin(state),
        # sharding
        "tensor_rules.family": "gpt",
        # data
        "per_rank.make": lambda share: [torch.ones(2)],
        "shares": 2,
        # loggers
        "Image.pixels": torch.ones(2, 3),
        "Histogram.values": torch.ones(3),
        # optim
        **dict.fromkeys("learning_rate decay step_size clipping weight_decay eta gamma schedule base_lr".split(), 0.1),
        **dict.fromkeys("threshold max_norm max_delta value init_value peak_value max_lr power".split(), 1.0),
        **dict.fromkeys("decay_rate end_value amount".split(), 0.5),
        **dict.fromkeys("decay_steps transition_steps total_steps T_max T_0".split(), 10),
        **dict.fromkeys("warmup_steps every n".split(), 2),
        "inner": tx,
        "tx": tx,
        "schedule_free.inner": ps.optim.scale_by_adam(0.0),
        "condition": lambda step: step % 2 == 0,
        "mask": "*w",
        "transforms": {"a": tx},
        "labels": lambda name: "a",
        "lift.optimizer": torch.optim.SGD,
        "lift.lr": 0.1,
        "scheduler": torch.optim.lr_scheduler.StepLR,
        "lift_scheduler.step_size": 3,
        "StepLR.step_size": 3,
        "schedules": halves,
        "boundaries": [3],
        "cosine_kwargs": [cycle],
        "interpolate_type": "linear",
        "lr_lambda": lambda step: 1.0,
        "milestones": (2, 4),
        "measures": {"n": lambda updates: torch.ones(())},
        "factory": ps.optim.sgd,
        # runs
        "step": step,
        "state": state,
        "like": state,
        "train": batches,
        "data": batches,
        "sources": [batches],
        "until": ps.steps(1),
        "directory": ps.predict(state, lambda net, batch: net(batch["x"]), batches, to=root / "predictions"),
        "predict.function": lambda net, batch: net(batch["x"]),
        "make_predict.function": lambda net, batch: net(batch["x"]),
        **dict.fromkeys("preds target".split(), torch.tensor([1.0, 2.0, 4.0])),
        **dict.fromkeys(
            "precision.labels recall.labels f1.labels perplexity.labels".split(), torch.tensor([0, 1, 2, 0])
        ),
        "text": "5 epochs | 1000 steps",
        "loss_fn": lambda net, batch: net(batch["x"]).mean(),
        "model": lambda: nn.Linear(2, 1),
        "module": nn.Linear(2, 1),
        "params": state.params,
        "apply.module": nn.Flatten(),
        "apply.params": {},
        "function": lambda *args: torch.ones(()),
        "s": 1.0,
        "run_dir": root / "run",
        "out": root / "model.pt",
        "out_png": root / "curves.png",
        "path": root / "run" / "metrics.csv",
        "load_weights.path": ps.save_weights(state, root / "weights.pt"),
        "save_weights.path": root / "saved.pt",
        "lora.names": "*",
        "save_adapters.path": root / "adapters.safetensors",
        "load_adapters.path": ps.save_adapters(state, root / "adapters.safetensors"),
        "merge_lora.state": ps.init(ps.lora("0")(nn.Sequential(nn.Linear(2, 1))), tx),
        "source": root / "run",
        "root": root / "store",
        "manifest.step": 2,
        "url": "memory://arguments",
        "runs.root": root,
        **dict.fromkeys("run bisect.a bisect.b compare.a compare.b".split(), root / "run"),
        **dict.fromkeys(["experiment", "experiment_a"], ps.Experiment(step, state, batches)),
        "experiment.function": lambda lr=0.1: ps.Experiment(step, state, batches),
        "first": 0,
        "last": 2,
        "restore.like": state,
        "loss": torch.tensor(1.0),
        "weight": 1.0,
        "monitor": "val/loss",
        "metric": "val/loss",
        "name": "n",
        "dataset": {"x": torch.ones(8, 2)},
        "batch_size": 4,
        "batch": {"x": torch.ones(4, 2)},
        "device": "cpu",
        **dict.fromkeys(["transform.every", "observe.every"], ps.every.steps(2)),
        # values
        **dict.fromkeys("tree a b actual expected on_true on_false".split(), tree),
        "key": ps.random.key(0),
        "shape": (2,),
        "p": 0.5,
        "rate": 0.5,
        "x": torch.ones(3),
        "permutation.x": 4,
        "logits": torch.randn(4, 3),
        "accuracy.labels": torch.tensor([0, 1, 2, 0]),
        "confusion.labels": torch.tensor([0, 1, 2, 0]),
        "seed": 0,
        "metrics": {"loss": ps.metrics.mean(1.0)},
        "merge.a": {"loss": ps.metrics.mean(1.0)},
        "merge.b": {"loss": ps.metrics.mean(1.0)},
        "values": {"loss": torch.ones(())},
        "samples": 4,
        "spec": "32",
        "where": "*",
        "StaticLossScale.value": 2.0,
        "filter": "*",
        "select.condition": torch.tensor(True),
        "structure": ps.tree.structure([0]),
        "leaves": [torch.ones(1)],
        "size": 1,
        "fsdp": 1,
        "sizes": {"data": 1},
        "Mesh.sizes": (1,),
        "axes": ("data",),
        "mesh": ps.sharding.mesh({"data": 1}),
        "modules": "blocks.*",
        "offload": "params",
        "plan": ps.sharding.ddp(1),
        "microbatches": 1,
        "rules": {"*": ps.sharding.Spec(None)},
        "pipeline.stages": [["weight", "bias"]],
        "even_stages.model": torch.nn.Sequential(torch.nn.Linear(1, 1)),
        "even_stages.count": 1,
        "project": "p",
        "state_or_module": state,
        # records
        **dict.fromkeys(
            ("compare_bits.a", "compare_bits.b"), ps.trace_bits(lambda s, b: (s + 1, {}), torch.ones(2), ())
        ),
    }


NODE = "a pytree node or a result: its fields are leaves, which tree.map may make anything"
MADE = "made by a function that is walked"
BASE = "a base class or a protocol, without arguments of its own"
TREE = "takes any tree"
# Callables that are not walked, and why.
LEFT_OUT: dict[str, str] = {
    "step_memory": "not walked yet: a malformed state or batch ends in the error of a dry run, which may not name it",
    **dict.fromkeys(
        "LocalState "
        "Result TrainState metrics.Confusion metrics.Last metrics.Max metrics.Mean metrics.Min metrics.Series "
        "metrics.Sum metrics.ClassScore metrics.Perplexity metrics.R2 metrics.Moments metrics.Pearson metrics.RootMean "
        "metrics.TorchmetricsState Predictions Evaluation "
        "optim.EmptyState precision.MasterWeightsState precision.ModuleDtypes precision.NoLossScale "
        "precision.PolicyDescription sharding.LocalBatch snapshot.Manifest "
        "snapshot.Restored testing.Report display.Summary".split(),
        NODE,
    ),
    **dict.fromkeys(
        "tree.Difference tree.Differences tree.consume tree.diff_leaves tree.digest_leaves tree.map_with_name "
        "tree.find tree.node_build tree.node_class tree.node_fields tree.node_name tree.replaced tree.select "
        "tree.stable_name tree.tensor_bytes tree.unflatten metrics.entries".split(),
        "for the rooms of purestep",
    ),
    "data.concat": "sources by position, each of them what as_source takes",
    **dict.fromkeys(
        "data.Batches data.SampleShard data.Share snapshot.Base snapshot.Ranks snapshot.Scope display.ProgressSink "
        "metrics.Recorder".split(),
        MADE,
    ),
    **dict.fromkeys(
        "callbacks.Callback callbacks.Evaluator callbacks.Instrument callbacks.Observer callbacks.Reducer "
        "callbacks.SnapshotPolicy callbacks.Transformer callbacks.Watcher data.Shardable data.Source "
        "loggers.Logger loggers.Sink metrics.Metric metrics.Growing optim.GradientTransformation "
        "optim.Rule optim.ScheduleBase precision.LossScale "
        "snapshot.Keep sharding.Experts".split(),
        BASE,
    ),
    **dict.fromkeys(
        "diff digest tree.count tree.diff tree.digest tree.equal tree.flatten tree.leaves tree.names tree.nbytes "
        "tree.parts tree.paths tree.structure tree.describe testing.comparable metrics.are_plain metrics.fold "
        "metrics.to_host metrics.sample_count data.sample_count optim.global_norm precision.all_finite".split(),
        TREE,
    ),
    **dict.fromkeys(
        "data.available_cpus random.is_host static pytree tree.pytree tree.static".split(), "declares, or reads"
    ),
    **dict.fromkeys(
        "optim.apply_updates optim.averaged optim.from_torch optim.get optim.set optim.to_torch "
        "optim.schedule_free_eval_params optim.transformation apply to_module freeze thaw refresh_batchnorm "
        "callbacks.count_flops".split(),
        "works on a state, whose structure it checks: tests/optim, tests/test_functional.py, tests/test_trainable.py",
    ),
    **dict.fromkeys(
        "testing.check_faults testing.check_resume snapshot.consolidate restore fork export from_lightning".split(),
        "writes, compiles, or needs a process or a library: its own tests",
    ),
    "metrics.from_torchmetrics": "imports torchmetrics, which takes two seconds: tests/metrics",
    "testing.check_transformation": "updates as often as it is told, 10**30 times as well: its own tests",
}

# What is wrong with these values, only the user's own function can say, and its error is the one to see.
USERS_OWN = {
    ("check_pure", "batch"),
    ("check_pure", "step"),
    ("trace_bits", "batch"),
    ("trace_bits", "step"),
    ("map", "function"),
    ("bind", "around"),
    ("evaluate", "loss_fn"),
    ("evaluate", "of"),
    ("predict", "function"),
    ("predict", "of"),
}

# Errors that speak of a parameter by another word.
NAMED_OTHERWISE = {
    ("Batches", "dataset"): "data set|dataset|batch",
    ("fit", "state"): "state|TrainState",
    ("init", "model"): "module|model",
    ("policy", "spec"): "policy",
    ("take", "n"): "limit",
    ("evaluate", "data"): "data|batch",
    ("load_predictions", "directory"): "no predictions",
    ("evaluate", "loss_fn"): "loss function|loss_fn",
    ("evaluate", "of"): "of|state",
    ("predict", "data"): "data|batch",
    ("predict", "function"): "function|prediction",
    ("predict", "of"): "of|state",
    ("lars", "trust_mask"): "mask",
    ("lift", "lr"): "learning_rate",
    ("partition", "transforms"): "transformation",
    ("Plan", "rules"): "rule",
    ("Spec", "auto"): "spec",
    ("muon", "adam_learning_rate"): "learning_rate",
    ("muon", "adam_weight_decay"): "weight_decay",
    ("fit", "train"): "data|batch",
    ("run", "train"): "data|batch",
    ("zip", "sources"): "data|sources|source",
    ("Mesh", "axes"): "mesh",
    ("Mesh", "sizes"): "mesh",
    ("mesh", "sizes"): "mesh",
    ("ddp", "size"): "mesh",
    ("fsdp", "size"): "mesh",
    ("zero1", "size"): "mesh",
    ("zero2", "size"): "mesh",
    ("context_parallel", "axis"): "mesh",
    ("context_parallel", "size"): "mesh",
    ("expert_parallel", "axis"): "mesh",
    ("expert_parallel", "size"): "mesh",
    ("pipeline", "size"): "mesh",
    ("tensor_parallel", "axis"): "mesh",
    ("tensor_parallel", "size"): "mesh",
    ("restore", "run_dir"): "no snapshot",
    ("manifest", "run_dir"): "no snapshot",
    ("merge", "a"): "metrics",
    ("merge", "b"): "metrics",
    ("assert_trees_close", "actual"): "trees",
    ("assert_trees_close", "expected"): "trees",
    ("assert_trees_equal", "actual"): "trees",
    ("assert_trees_equal", "expected"): "trees",
    ("compare_bits", "a"): "trace of bits",
    ("compare_bits", "b"): "trace of bits",
    ("learning_curves", "source"): "columns|file",
    ("learning_curves", "keys"): "draw",
    ("plot", "source"): "columns|file",
    ("plot", "keys"): "draw",
    ("summary", "state_or_module"): "summarise",
    **dict.fromkeys([("bisect", "b"), ("compare", "b")], "run directory"),
    **dict.fromkeys([("bisect", "experiment_a"), ("bisect", "experiment_b")], "experiment"),
}

accept(
    "donate.step jit.function grad_and_value.function checkpoint.function run.step",
    "function class".split(),
    "a function",
)
accept(
    "evaluate.data predict.data as_source.data prefetch.data stream.data take.data run.train zip.sources",
    ITERABLE,
    "batches, or a function",
)
accept("Plan.zero", ["1"], "the first stage")
accept("Plan.stages", ["[]", "()"], "no pipeline")
accept("Histogram.values", [*NUMBERS - {"10**30"}, "[]", "()", "matrix", "array"], "whatever is made of real numbers")
accept("unstack.stacked", ["matrix"], "a tree of one tensor")
accept("Image.pixels", ["matrix"], "a tensor")
accept("to_device.batch", EVERYTHING, "a leaf that cannot be moved stays as it is")
accept("local_batch.batch", "None [] {} () matrix array".split(), "a batch without leaves has one sample")
accept("as_metrics.values", ["{}"], "no metrics")
accept("as_metrics.samples", EVERYTHING, "read where a metric is a plain number")
accept("mean.value mean.weight", NUMBERS, "a loss may be NaN, and so may its weight; True counts as 1")
accept("DynamicLossScale.value DynamicLossScale.counter StaticLossScale.value", EVERYTHING, NODE)
accept("Rule.where", "text, empty text, [], (), function, class".split(", "), "a filter, or a class of modules")
accept("Spec.auto", "None, text, empty text, [], ()".split(", "), "an axis, several or none")
accept("bind.rng", EVERYTHING, "read at the first draw")
accept("bind.buffers", "None, empty text, 0, [], {}, ()".split(", "), "no buffers")
accept(
    " ".join(f"{draw}.shape" for draw in "bernoulli bits categorical normal randint uniform".split()),
    "empty text, bytes, {}".split(", "),
    "drawn in every step: anything with the lengths of the dims in it",
)
accept(
    "bernoulli.p categorical.dim dropout.rate permutation.x randint.low randint.high split.n uniform.maxval "
    "accuracy.top_k confusion.ignore_index accuracy.ignore_index "
    "precision.ignore_index recall.ignore_index f1.ignore_index perplexity.ignore_index",
    ["True"],
    "called in every step: True is 1, as for Python",
)
accept("confusion.logits precision.logits recall.logits f1.logits", ["array"], "read by methods that both have")
accept("masked.mask freeze.mask", "text, empty text, function".split(", "), "a filter")
accept("local_batch.microbatches Store.verify", ["True"], "True is 1, or what it says")
accept(
    "every.steps.n every.epoch.n every.seconds.s steps.n epoch.n seconds.s minutes.n hours.n fit.grace_seconds",
    ["10**30"],
    "never due",
)
accept("Remote.storage_options", ["{}"], "no options")
accept("load_weights.rename", ["{}"], "nothing is renamed")
accept("Weights.rename", ["{}", "function", "class"], "nothing is renamed; a function is called when names are matched")
accept("map.tree assert_trees_equal.root", EVERYTHING, TREE)
accept("Experiment.state Experiment.data", EVERYTHING, "what `fit` is given: it checks them, with the step")
accept("Experiment.step", ["function"], "a function")
accept("experiment.function", ["function"], "it is called later")
accept("summary.state_or_module", ["matrix"], "a tree of one tensor")
accept("Policy.loss_scale", ["None"], "no loss scale")
accept("matches.filter", ["{}"], "no glob")
accept("check_pure.batch", [], "the batch is the step's")
accept("trace_bits.values", ["[]", "{}", "()"], "no positions")


def public() -> list[tuple[str, str]]:
    """Room and name of each public function and class of purestep, errors and warnings left out."""
    found = []
    for room in ("", *ROOMS):
        module = getattr(ps, room) if room else ps
        for name in dir(module):
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("purestep") and not name.startswith("_")
            if not ours or not callable(value) or name in ("attach", "every", "checked", "explain"):
                continue
            if isinstance(value, type) and issubclass(value, (Exception, Warning)):
                continue
            found.append((room, name))
    return [*found, *(("every", name) for name in ("steps", "epoch", "seconds"))]


def the_callable(room: str, name: str) -> Any:
    return getattr(ps.every if room == "every" else getattr(ps, room) if room else ps, name)


def base_arguments(function: Any, room: str, name: str, right: dict[str, Any]) -> dict[str, Any]:
    """Right arguments for the required parameters of a callable."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        keys = (f"{room}.{name}.{parameter.name}", f"{name}.{parameter.name}")
        special = next((right[key] for key in keys if key in right), None)
        if special is not None:
            found[parameter.name] = special
        elif parameter.default is parameter.empty and parameter.kind not in (2, 4):
            assert parameter.name in right, f"{name}: say in `right` what {parameter.name} is when it is right"
            found[parameter.name] = right[parameter.name]
    found |= {k.partition(".")[2]: v for k, v in right.items() if k.startswith(f"{name}.") and k.count(".") == 1}
    return found


def use(value: Any) -> None:
    """Do with a made thing what it is for, so that what is wrong with it cannot hide until then."""
    params = {"w": torch.ones(3, 2), "b": torch.ones(2, 2)}
    if isinstance(value, ps.optim.GradientTransformation):
        loss = {"value": torch.tensor(1.0), "value_fn": lambda p: sum((x * x).sum() for x in p.values())}
        updates, state = value.update(params, value.init(params), params, step=torch.tensor(1), **loss)
        value.apply(params, updates, state)
    elif isinstance(value, ps.optim.ScheduleBase):
        value(3)
    elif isinstance(value, ps.bind):
        with value:
            pass
    elif isinstance(value, types.GeneratorType):  # predictions
        next(value, None)
    elif isinstance(value, ps.trainer.Run):
        for _ in value:
            pass


def outcome(function: Any, arguments: dict[str, Any], parameter: str) -> str:
    """ "refused" by name, "accepted", or what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(function(**arguments))
    except (PurestepError, AssertionError, FileNotFoundError) as error:
        named = f"{parameter}|{NAMED_OTHERWISE.get((function.__name__, parameter), parameter)}"
        if len(inspect.signature(function).parameters) == 1:
            named += f"|{function.__name__}"  # the call is shown, and it has one argument
        return "refused" if re.search(rf"\b({named})\b", str(error)) else f"an error that does not name it: {error}"
    except Exception as error:
        if (function.__name__, parameter) in USERS_OWN:
            return "refused"
        return f"obscure: {type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("room", "name"), [pair for pair in public() if ".".join(pair).lstrip(".") not in LEFT_OUT], ids=lambda part: part
)
def test_each_malformed_argument_is_refused_by_name_or_legal(room, name, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = the_callable(room, name)
    wrong = []
    base = base_arguments(function, room, name, right)
    use(function(**base))
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        allowed = legal(str(parameter.annotation)) | ACCEPTED.get((name, parameter.name), (frozenset(), ""))[0]
        for label, value in VALUES.items():
            result = outcome(function, {**base, parameter.name: value}, parameter.name)
            if result != "refused" and not (result == "accepted" and label in allowed):
                wrong.append(f"{name}({parameter.name}={label}): {result}"[:200])
    assert not wrong, "\n".join(wrong)


# --- the mechanism ----------------------------------------------------------------------------------------------------


def test_an_error_of_the_function_itself_that_names_the_argument_comes_first():
    with pytest.raises(ConfigError, match=r"optim\.lift\(torch\.optim\.AdamW"):
        ps.make_step(lambda net, batch: net(batch), torch.optim.AdamW)
    with pytest.raises(ps.errors.OptimError, match="it is the decay of an average"):
        ps.optim.adam(1e-3, b1=1.0)


def test_an_error_about_a_derived_value_gives_way_to_one_that_names_the_argument():
    with pytest.raises(ps.errors.OptimError, match=r"cosine_onecycle_schedule: div_factor must be a finite number > 0"):
        ps.optim.cosine_onecycle_schedule(10, 1.0, div_factor=-1.0)


def test_where_the_call_has_an_effect_arguments_are_only_looked_at_when_it_fails():
    done = []

    @checked(ConfigError, failed=True)
    def save(name: str, count: Count) -> None:
        done.append((name, count + 1))

    save("a", 0)
    assert done == [("a", 1)]
    with pytest.raises(ConfigError, match="save: count must be a whole number >= 1"):
        save("a", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (NonNegative[float], [0, 0.0, 3, np.float32(1)], [-1, math.nan, math.inf, True, "1", None, 2**63]),
        (Decay[float | torch.Tensor], [0, 0.5, torch.tensor(3.0)], [1, -0.1, torch.ones(2), torch.tensor(True)]),
        (Fraction[float] | None, [None, 0, 1], [1.5, "x"]),
        (Count, [1, np.int64(3)], [0, 1.0, True, 2**63]),
        (tuple[float, float], [(1, 2), [1.0, 2.0]], [(1,), (1, "x"), 1]),
        (list[str], [[], ["a"], ("a",)], ["a", [1]]),
        (dict[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, []]),
        (torch.dtype, [torch.float16], ["float16", float]),
        (Any, [1, None, "x"], []),
    ],
)
def test_a_type_becomes_a_check(kind, good, bad):
    check = check_of(kind)
    assert [value for value in good if check(value) is not None] == []
    assert [value for value in bad if check(value) is None] == []


def test_a_judge_in_an_annotation_counts_alone():
    even = Judge("an even number", lambda value: isinstance(value, int) and value % 2 == 0)
    check = check_of(Annotated[int, even])
    assert (check(2), check(3)) == (None, "an even number")


def test_a_range_says_what_it_is():
    assert Range(0, 1, "[)").called("number") == "a number in [0, 1)"
    assert Range(1, math.inf, "[)").called("whole number") == "a whole number >= 1"
    assert Range(closed="()").called("number") == "a finite number"


def test_optax_code_ports_by_position():
    """Where optax has a function of the same name, its positional parameters mean the same, as far as they go."""
    optax = pytest.importorskip("optax")
    other = {"weight_decay_mask": "mask", "trust_ratio_mask": "trust_mask", "ns_coeffs": "ns_coefficients"}
    other |= {
        "fast_optimizer": "inner",
        "optimizer": "inner",
        "base_optimizer": "inner",
        "should_transform_fn": "condition",
    }
    other |= {"param_labels": "labels", "step_size_fn": "schedule", "inner_factory": "factory", "state": "opt_state"}
    wrong = []
    for name in sorted(set(dir(ps.optim)) & (set(dir(optax)) | set(dir(optax.contrib)))):
        ours, theirs = getattr(ps.optim, name), getattr(optax, name, getattr(optax.contrib, name, None))
        if not inspect.isfunction(ours) or not callable(theirs) or name in DIFFERENT_FROM_OPTAX:
            continue
        mine = [p.name for p in inspect.signature(ours).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        order = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        wrong += [f"{name}: {mine} {order}"] if mine != [other.get(p, p) for p in order][: len(mine)] else []
    assert wrong == []


# The same word for another thing; a value of optax's in our position is refused by its type.
DIFFERENT_FROM_OPTAX = {"sam", "adafactor", "lbfgs", "skip_large_updates"}
