"""Metrics of torchmetrics as pure values: equal to torchmetrics on all samples, however they are batched and spread."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import os
import pickle
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from shared_marks import slow_but

import purestep as ps
from purestep import tree
from purestep.errors import MetricError, TraceError
from purestep.metrics import compute, fold, from_torchmetrics, to_host

HERE = Path(__file__).parent
QUICK = "accuracy confusion auroc pearson max collection classwise spearman".split()


@functools.cache
def theirs():
    """The table, whose import of torchmetrics takes two seconds: only the tests that use it wait."""
    spec = importlib.util.spec_from_file_location("theirs", HERE / "theirs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["theirs"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def names():
    """Read from the source: collecting tests must not import torchmetrics."""
    lines = (HERE / "theirs.py").read_text().partition("ALL: ")[2].partition("\n}\n")[0].splitlines()
    return [line.split('"')[1] for line in lines if line.startswith('    "')]


def converted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some warn that they keep every sample
        return from_torchmetrics(theirs().ALL[name][0](), pick=theirs().PICK.get(name))


def steps(name, columns, cuts):
    function = converted(name)
    parts = [{k: v[a:b] for k, v in columns.items()} for a, b in itertools.pairwise(cuts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of classes that a batch has not
        return [{"m": function(*theirs().arguments(part, theirs().ALL[name][1]))} for part in parts]


def rows_agree(row, name, wanted):
    """Compare the entries of a metric, `name` or `name/...`."""
    got = {k.removeprefix(name).removeprefix("/"): v for k, v in row.items() if f"{k}/".startswith(f"{name}/")}
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_table_is_long_enough():
    assert len(names()) > 50
    assert set(QUICK) < set(names())


@pytest.mark.parametrize("name", slow_but(names(), *QUICK))
def test_uneven_batches_give_what_torchmetrics_gives_for_all_samples(name):
    columns = theirs().table(61, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs().whole(name, columns)
    made = steps(name, columns, [0, 13, 14, 30, 55, 61])
    before = tree.digest([step["m"] for step in made])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fold({}, to_host(made))
        # Chunks of steps are folded one after the other: the loop reads some from the device, then others.
        parts = fold(fold({}, to_host(made[:2])), to_host(made[2:]))
        tree_like = {"m": made[0]["m"].merge(made[1]["m"]).merge(made[2]["m"].merge(made[3]["m"]).merge(made[4]["m"]))}
        for found in (whole, parts, tree_like):
            rows_agree(compute(found), "m", wanted)
        assert tree.digest(whole) == tree.digest(parts)
    assert tree.digest([step["m"] for step in made]) == before


@pytest.mark.parametrize("name", slow_but(names(), "auroc", "collection"))
def test_states_go_into_a_snapshot_and_come_back_without_a_template(name, tmp_path):
    columns = theirs().table(40, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *rest = steps(name, columns, [0, 17, 31, 40])
        with ps.snapshot.Store(tmp_path) as store:
            store.save(1, fold({}, to_host([first])))
        found = fold(ps.restore(tmp_path), to_host(rest))
        rows_agree(compute(found), "m", theirs().whole(name, columns))


# --- in a run ---------------------------------------------------------------------------------------------------------


def start(zygote, directory, size, mode):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job = HERE / "converted_job.py"
    children = [
        zygote.popen(
            job,
            directory,
            mode,
            env=base | (several | {"RANK": str(r)} if size > 1 else {}),
            preload=f"{zygote.RANKS} torchmetrics",
        )
        for r in range(size)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(240)
            assert (child.returncode, errors) == (0, "")
    return [json.loads((directory / f"{mode}-{size}-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "fsdp"])
def test_a_run_on_two_ranks_resumed_in_the_middle_gives_what_torchmetrics_gives(mode, zygote, tmp_path):
    """Training metrics of an epoch of uneven microbatches, and an evaluation, on two ranks and on one."""
    answers = start(zygote, tmp_path, 2, mode) + start(zygote, tmp_path / "alone", 1, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # here, as torchmetrics on two ranks would gather from both
        wanted = [
            {name: theirs().whole(name, theirs().table(*size)) for name in names()} for size in ((50, 0), (23, 1))
        ]
    for answer in answers:
        assert answer["stopped"] == "reached 2 steps"
        epoch = {k.removesuffix("_epoch"): v for k, v in answer["row"].items() if k.endswith("_epoch")}
        for name in names():
            rows_agree(epoch, f"train/{name}", wanted[0][name])
            rows_agree(answer["row"], f"val/{name}", wanted[1][name])
    assert len({answer["digest"] for answer in answers}) == 1


# --- graphs and transforms --------------------------------------------------------------------------------------------


TRACED = "accuracy precision confusion kappa mse r2 psnr".split()


@pytest.mark.parametrize("name", slow_but(TRACED, "precision"))
def test_an_update_that_reads_no_values_goes_into_a_graph(name):
    columns = theirs().table(31, 3)
    function = converted(name)
    given = theirs().arguments(columns, theirs().ALL[name][1])
    found = ps.jit(lambda *args: function(*args), backend="eager")(*given)
    assert tree.equal(found.states, function(*given).states)
    assert found.compute() == function(*given).compute() if name != "confusion" else True


def test_members_of_an_ensemble_have_metrics_of_their_own():
    columns = theirs().table(12, 4)
    function = converted("f1")
    logits = torch.stack([columns["logits"], columns["logits"].flip(0), -columns["logits"]])
    found = torch.vmap(lambda x: function(x, columns["label"]))(logits)
    for i in range(3):
        assert tree.equal(tree.map(lambda x, i=i: x[i], found), function(logits[i], columns["label"]))


def test_an_update_that_reads_values_says_so_under_jit():
    columns = theirs().table(9, 3)
    function = converted("binary accuracy")
    with pytest.raises(TraceError, match="the function asks for the value of a traced tensor"):
        ps.jit(lambda p, y: function(p, y), backend="eager")(columns["prob"], columns["flag"])


def test_a_compiled_step_and_a_preflight_take_converted_metrics(tmp_path):
    accuracy, auroc = converted("accuracy macro"), converted("auroc")

    def loss_fn(net, batch):
        logits = net(batch["x"])
        return torch.nn.functional.cross_entropy(logits, batch["y"]), {"acc": accuracy(logits, batch["y"])}

    def evaluation(net, batch):
        logits = net(batch["x"])
        return torch.nn.functional.cross_entropy(logits, batch["y"]), {"auroc": auroc(logits.softmax(-1), batch["y"])}

    g = torch.Generator().manual_seed(0)
    columns = {"x": torch.randn(22, 5, generator=g), "y": torch.randint(0, 4, (22,), generator=g)}
    tx = ps.optim.sgd(0.1)
    state = ps.init(lambda: torch.nn.Linear(5, 4), tx, seed=0)
    data = ps.data.batches(columns, 8, drop_last=False)
    rows = []
    for step in (ps.make_step(loss_fn, tx), ps.jit(ps.make_step(loss_fn, tx), backend="eager")):
        result = ps.fit(
            step,
            state,
            data,
            until=ps.epochs(2),
            callbacks=[
                ps.callbacks.evaluate(evaluation, data),
                ps.callbacks.early_stopping("val/auroc", mode="max", patience=9),
            ],
        )
        rows.append(dict(result.metrics))
        logits = ps.to_module(result.state)(columns["x"]).detach()
        assert result.metrics["val/auroc"] == pytest.approx(float(theirs().ALL["auroc"][0]()(logits, columns["y"])))
    assert rows[0] == rows[1]


def test_it_is_pure_and_copies():
    function = converted("pearson of two")
    columns = theirs().table(20, 5)
    xs, ys = columns["xs"], columns["ys"]
    again = [function(xs, ys), copy.deepcopy(function)(xs, ys), pickle.loads(pickle.dumps(function(xs, ys)))]
    assert len({tree.digest(state) for state in again}) == 1
    metric = theirs().ALL["mse"][0]()
    function = from_torchmetrics(metric)
    metric.update(torch.ones(3), torch.zeros(3))
    assert float(function(torch.ones(2), torch.ones(2)).compute()) == 0
    assert not metric._computed


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused_by_name():
    tm = theirs().tm
    from torchmetrics import classification, regression, wrappers

    class Hidden(tm.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.tensor(0.0), "sum")

        def update(self, x):
            self.total += x.sum()
            self.last = x

        def compute(self):
            return self.total

    for metric, text in (
        (wrappers.MinMaxMetric(tm.MeanMetric()), "MinMaxMetric has no value that can be merged"),
        (wrappers.Running(tm.MeanMetric(), 3), "Running has no value that can be merged"),
        (wrappers.BootStrapper(tm.MeanMetric()), "the global random generator"),
        (wrappers.MetricTracker(tm.MeanMetric(), maximize=True), "MetricTracker has no value"),
        (regression.NormalizedRootMeanSquaredError(), "merges no more than two parts"),
        (tm.functional.mean_squared_error, r"takes a metric or a collection(.|\n)*functional has functions"),
        (from_torchmetrics(tm.MeanMetric()), "converted already"),
        (None, "takes a metric or a collection"),
    ):
        with pytest.raises(MetricError, match=text):
            from_torchmetrics(metric)
    with pytest.raises(MetricError, match=r"Hidden keeps something of a batch outside of its states\n  where:   last"):
        from_torchmetrics(Hidden())(torch.ones(3))
    samplewise = from_torchmetrics(classification.MultilabelAccuracy(3, multidim_average="samplewise"))
    one, two = (samplewise(torch.rand(n, 3, 4), torch.ones(n, 3, 4, dtype=torch.int64)) for n in (1, 2))
    with pytest.raises(MetricError, match="differ in their dims"):
        one.merge(two)
    a, b = from_torchmetrics(tm.MeanSquaredError()), from_torchmetrics(tm.MeanSquaredError(squared=False))
    with pytest.raises(MetricError, match="with different settings do not merge"):
        a(torch.ones(2), torch.ones(2)).merge(b(torch.ones(2), torch.ones(2)))
    matrix = from_torchmetrics(tm.ConfusionMatrix("binary"))(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    assert matrix.value().tolist() == [[1, 0], [0, 1]]
    with pytest.raises(MetricError, match=r"no number and no dict of numbers(.|\n)*int64\[2, 2\](.|\n)*pick=lambda"):
        compute({"m": matrix})
    lost = tree.replaced(matrix, source="gone.Metric#0")
    with pytest.raises(MetricError, match=r"was not converted in this process(.|\n)*from_torchmetrics\(gone.Metric"):
        lost.compute()


def test_an_object_of_torchmetrics_is_refused_with_the_line_to_write():
    tm = theirs().tm
    accuracy = tm.Accuracy("multiclass", num_classes=3)

    def returns_it(net, batch):
        return net(batch).mean(), {"accuracy": batch_metric(batch)}

    def batch_metric(batch):
        return tm.MeanMetric()

    def calls_it(net, batch):
        return net(batch).mean(), {"accuracy": accuracy(net(batch), batch)}

    with pytest.raises(
        MetricError, match=r"(?s)accuracy in .*calls_it: MulticlassAccuracy.*from_torchmetrics\(accuracy\)"
    ):
        ps.make_step(calls_it, ps.optim.sgd(0.1))
    with pytest.raises(MetricError, match="an object of torchmetrics, which a pure step cannot update"):
        ps.make_eval(calls_it)
    state = ps.init(lambda: torch.nn.Linear(2, 3), ps.optim.sgd(0.1))
    with pytest.raises(
        MetricError, match=r"(?s)metrics\['accuracy'\]: MeanMetric.*accuracy = ps.metrics.from_torchmetrics"
    ):
        ps.make_eval(returns_it)(state, torch.ones(4, 2))
    converted_one = from_torchmetrics(accuracy)
    with pytest.raises(MetricError, match=r"is a function that was not called(.|\n)*\{'accuracy': accuracy\(preds"):
        ps.metrics.as_metrics({"accuracy": converted_one}, 3)
