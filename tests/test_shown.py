"""Every value that a researcher prints shows itself: as HTML in a notebook, as text in a terminal, with its numbers."""

from __future__ import annotations

import math
import random
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.display import notebook
from purestep.errors import ConfigError
from purestep.sharding import Spec

EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """The rows of the tables and the texts of a page whose tags close in order, and which has no script."""

    VOID = frozenset(("path", "circle"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack, self.rows, self.texts, self.points = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "polyline":
            self.points.append(dict(attrs)["points"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.texts.append(data)
        if self.stack[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data

    def fact(self, name: str) -> str:
        return next(row[1] for row in self.rows if row[0] == name)


def page(value) -> Page:
    return Page(value._repr_html_())


# --- runs -------------------------------------------------------------------------------------------------------------


@ps.experiment
def small(lr=0.05, *, note=EVIL, outlier=None):
    tx = ps.optim.sgd(lr)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(13, 3, generator=g)
    if outlier is not None:
        x[outlier] += 1.0

    def loss_fn(net, batch):
        loss = (net(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()
        return loss, {EVIL: loss.detach() * 2}

    data = ps.data.batches({"x": x}, 4, shuffle=False)
    callbacks = [
        ps.callbacks.snapshots(keep=ps.snapshot.all_()),
        ps.callbacks.log(every=ps.every.steps(1)),
        ps.callbacks.evaluate(loss_fn, data, name="val"),
    ]
    state = ps.init(lambda: nn.Linear(3, 1), tx, seed=1)
    return ps.Experiment(ps.make_step(loss_fn, tx), state, data, until=ps.epochs(3), callbacks=callbacks)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def results(root):
    made = {"a": small(), "b": small(outlier=9), "c": small(0.01)}
    return {name: experiment.fit(run_dir=root / name) for name, experiment in made.items()}


def test_a_result_shows_why_it_ended_its_metrics_and_its_curves(results, root):
    result = results["a"]
    shown = page(result)
    assert shown.rows[0] == ["result", "reached 3 epochs"]
    assert (shown.fact("epochs"), shown.fact("batches")) == ("3", str(result.loop.cursor.batches))
    for name, value in result.metrics.items():
        assert shown.fact(name) == f"{value:.4g}"
    assert shown.fact("run directory") == str(root / "a")
    assert "loss" in shown.texts
    assert "epoch" in shown.texts  # the second axis; and no panel of that name
    assert shown.texts.count("epoch") == 2
    text = repr(result)
    assert text == str(result)
    logged = ps.loggers.read_csv(root / "a")["val/loss"]
    row = next(line for line in text.splitlines() if line.startswith("val/loss") and "█" in line)
    first, last = [value for value in logged if value is not None][:: len([v for v in logged if v is not None]) - 1]
    assert row.split()[1:3] == [f"{first:.4g}", f"{last:.4g}"]


def test_runs_of_the_same_bits_show_the_same(tmp_path, monkeypatch):
    """So a notebook that is executed again does not differ."""
    shown = []
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        result = small().fit(run_dir=tmp_path / name / "runs" / "one")
        shown.append((repr(result), result._repr_html_()))
    assert shown[0] == shown[1]
    assert page(result).fact("run directory") == "runs/one"


def test_a_result_without_a_run_directory_shows_its_numbers_and_says_how_to_get_curves():
    result = small().fit(until=ps.steps(2), callbacks=[])
    shown = page(result)
    assert shown.points == []
    assert (shown.rows[0], shown.fact("batches")) == (["result", "reached 2 steps"], "2")
    with pytest.raises(
        ConfigError, match=r"this run kept no log to draw\n  where:   run_dir=None\n(.|\n)*run_dir=\"runs/"
    ):
        result.plot()


def test_a_run_and_a_table_of_runs(results, root):
    run = ps.open(root / "a")
    shown = page(run)
    assert shown.rows[0] == ["run", "a"]
    assert shown.fact("setting note") == EVIL
    assert shown.fact("digest") == ps.digest(results["a"].state)
    assert len(shown.points) == 6  # loss and the other, each of train, of train over an epoch, of val
    assert "train/loss_epoch" in repr(run)
    log = page(run.metrics)
    assert log.rows[0] == list(run.metrics)
    assert [row[0] for row in log.rows[1:]] == [str(step) for step in run.metrics["step"]]
    table = page(ps.runs(root))
    names = table.rows[0]
    assert [row[0] for row in table.rows[1:]] == ["a", "b", "c"]
    assert [row[names.index("lr")] for row in table.rows[1:]] == ["0.05", "0.05", "0.01"]
    assert [row[names.index("note")] for row in table.rows[1:]] == [EVIL] * 3
    values = [f"{results[name].metrics['val/loss']:.4g}" for name in "abc"]
    assert [row[names.index("val/loss")] for row in table.rows[1:]] == values
    assert repr(ps.runs(root)[:0]) == "no runs"


def test_a_comparison_draws_both_and_where_they_part(results, root):
    found = ps.compare(root / "a", root / "b")
    assert found.parted.step == 3  # sample 9 is of the third batch, before its update
    shown = page(found)
    assert shown.rows[0] == ["", "a", "b"]
    assert shown.fact("setting outlier") == ""
    assert "they part at 3" in shown.texts
    panels = {panel.title: panel for panel in found._panels()}
    assert set(panels) == {"loss", EVIL.rpartition("/")[2]}
    lines = {line.name: line for line in panels["loss"].lines}
    assert {name: (line.colour, line.dashed) for name, line in lines.items() if not line.faint} == {
        "a train/loss_epoch": (0, False),
        "b train/loss_epoch": (1, False),
        "a val/loss": (0, True),
        "b val/loss": (1, True),
    }
    assert lines["b val/loss"].points[-1] == (9, results["b"].metrics["val/loss"])
    assert "the logs part at step 3" in repr(found)
    assert {name for name in found.log if name != "step"} == {
        f"{name}, {run}" for name in ps.open(root / "a").metrics if name not in ("step", "epoch") for run in ("a", "b")
    }


def test_what_executes_runs_again_shows_itself(results, root):
    found = ps.bisect(root / "a", root / "b", small)
    shown = page(found)
    assert shown.rows[0] == ["runs", "a and b"]
    assert shown.fact("first batch") == "step 3: batch 2 of epoch 0"
    assert shown.fact("samples") == "9 of the data set"
    (batch,) = found.batch.differences
    assert [f"{batch.elements}", f"{batch.max_abs:.4g}", f"{batch.max_rel:.4g}", f"{batch.max_ulp:,}"] in [
        row[2:] for row in shown.rows
    ]
    for part in (found.batch, found.leaves, found.operation()):
        assert repr(part) == str(part)
        assert page(part).texts
    assert "the first operation that differs" in page(found.operation()).texts[0]
    verified = ps.verify(root / "a", small, every=3)
    assert page(verified).texts[-1] == repr(verified).splitlines()[-1] == "verified"


# --- states and differences -------------------------------------------------------------------------------------------


def test_differences_are_a_sequence_that_shows_itself_as_a_table():
    draw = random.Random(0)
    a = {f"w{n}": torch.randn(draw.randint(1, 9), dtype=torch.float64) for n in range(4)} | {
        EVIL: torch.ones(2),
        "n": 3,
    }
    b = {name: value + 1e-9 if isinstance(value, torch.Tensor) else value + 2 for name, value in a.items()}
    found = ps.diff(a, b, root="s")
    assert isinstance(found, tuple)
    assert sorted(d.path for d in found) == sorted(f"s['{name}']" for name in a if name != EVIL)  # float32 + 1e-9
    for difference in found:
        if difference.path.startswith("s['w"):
            x, y = a[difference.path[3:-2]], b[difference.path[3:-2]]
            rel = ((x - y).abs() / torch.maximum(x.abs(), y.abs())).max()
            assert (difference.max_rel, difference.max_abs) == (float(rel), float((x - y).abs().max()))
    shown = page(found)
    assert shown.rows[0] == ["path", "leaf", "differ", "max abs", "max rel", "max ulp"]
    assert [row[0] for row in shown.rows[1:]] == [d.path for d in found]
    assert [row[4] for row in shown.rows[1:]] == [f"{d.max_rel:.4g}" for d in found]
    assert repr(found).splitlines()[0].split() == ["path", "leaf", "differ", *"max abs max rel max ulp".split()]
    assert page(ps.diff(a, a)).texts == ["equal"]
    long = ps.diff(list(range(500)), [n + 1 for n in range(500)])
    assert repr(long).splitlines()[-1] == page(long).texts[-1] == "... and 300 more"


def test_the_relative_difference_of_odd_values():
    nan, inf = math.nan, math.inf

    def relative(x, y, dtype=torch.float32):
        return ps.diff(torch.tensor([x], dtype=dtype), torch.tensor([y], dtype=dtype))[0].max_rel

    assert [relative(0.0, -0.0), relative(0.0, 1e-30), relative(1.0, -1.0), relative(inf, 1.0)] == [0.0, 1.0, 2.0, inf]
    assert math.isnan(relative(nan, 1.0))
    assert relative(3 + 4j, 0j, torch.complex64) == 1.0
    assert relative(8, 10, torch.int64) == 0.2
    assert ps.diff(1.0, 1.5)[0].max_rel == pytest.approx(1 / 3)
    assert [ps.diff(True, False)[0].max_rel, ps.diff("a", "b")[0].max_rel] == [None, None]
    assert ps.diff(10**400, 1)[0].max_rel == 1.0  # exact: no float is as large


def test_a_state_prints_its_leaves_and_so_does_one_of_a_subclass():
    state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
    assert repr(state).splitlines()[1] == "state.params['bias']: float32[1]"
    assert "float32[1, 2]" in " ".join(page(state).texts)

    @ps.pytree
    class Own(ps.TrainState):
        ema: object = None

    assert repr(Own(**state.__dict__, ema=torch.ones(3))).splitlines()[-1] == "state.ema: float32[3]"


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_print_as_their_numbers():
    mean = ps.metrics.mean(torch.tensor([1.0, 2.0, 6.0]))
    row = {"loss": mean, "tokens": ps.metrics.Sum(torch.tensor(7)), "least": ps.metrics.Min(0.25)}
    assert repr(row) == "{'loss': Mean(3, weight=3), 'tokens': Sum(7), 'least': Min(0.25)}"
    assert page(mean).texts == ["Mean(3, weight=3)"]
    assert "Mean · = 3 · " in " ".join(page(notebook.show(row)).texts)
    assert repr(ps.metrics.mean(torch.ones(2, device="meta"))) == "Mean(float32[], weight=float32[])"
    said = []
    torch.vmap(lambda x: (said.append(repr(ps.metrics.mean(x))), x)[1])(torch.ones(3, 2))
    assert said == ["Mean(float32[], weight=2)"]


def test_metrics_that_compute_more_print_as_what_they_compute():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(37, 3, generator=draw), torch.randint(0, 3, (37,), generator=draw)
    x, y = torch.randn(2, 37, generator=draw)
    made = {
        "RootMean": ps.metrics.rmse(x, y),
        "R2": ps.metrics.r2(x, y),
        "Pearson": ps.metrics.pearson(x, y),
        "Perplexity": ps.metrics.perplexity(logits, labels),
    }
    for name, metric in made.items():
        assert repr(metric) == f"{name}({float(metric):.6g})"
    score = ps.metrics.f1(logits, labels)
    assert repr(score) == f"f1({float(score):.6g}, average={score.average!r})"
    evaluation = ps.evaluate(
        ps.init(lambda: nn.Linear(2, 1), OPTIM.sgd(0.1)), evaluated, [{"x": torch.ones(4, 2)}], name="<b>"
    )
    shown = page(evaluation)
    assert shown.rows == [["", "<b>"], ["loss", str(evaluation).split()[-1]]]
    assert repr(evaluation) == repr(dict(evaluation))


def evaluated(net, batch):
    return net(batch["x"]).square().mean()


def test_a_confusion_matrix_is_a_table():
    labels = torch.tensor([0, 1, 2, 2, 1])
    logits = nn.functional.one_hot(torch.tensor([0, 2, 2, 2, 1]), 3).float()
    found = ps.metrics.confusion(logits, labels)
    assert page(found).rows == [
        ["label", "0", "1", "2"],
        ["0", "1", "0", "0"],
        ["1", "0", "1", "1"],
        ["2", "0", "0", "2"],
    ]
    assert "accuracy 0.8" in repr(found)
    assert repr(ps.metrics.Confusion(torch.zeros(90, 90, dtype=torch.int64))) == "Confusion(int64[90, 90])"


# --- what a run is made of --------------------------------------------------------------------------------------------

OPTIM = ps.optim
SCHEDULES = {
    "constant": OPTIM.constant_schedule(0.1),
    "warmup": OPTIM.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100),
    "stairs": OPTIM.StepLR(1.0, 7),
    "milestones": OPTIM.MultiStepLR(1.0, (10, 30)),
    "restarts": OPTIM.CosineAnnealingWarmRestarts(1.0, 10, 2),
    "cyclic": OPTIM.CyclicLR(0.0, 1.0, 20),
    "exponential": OPTIM.ExponentialLR(1.0, 0.9),
    "decay": OPTIM.exponential_decay(1.0, 20, 0.5),
    "polynomial": OPTIM.polynomial_schedule(1.0, 0.0, 2, 50),
    "one cycle": OPTIM.OneCycleLR(1.0, 100),
    "function": OPTIM.LambdaLR(1.0, lambda step: 0.95**step),
    "lifted": OPTIM.lift_scheduler(torch.optim.lr_scheduler.StepLR, 1.0, total_steps=9, step_size=3),
}
HORIZONS = {"warmup": 100, "stairs": 28, "milestones": 30, "restarts": 70, "cyclic": 80, "exponential": 44, "decay": 80}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_drawn(name):
    schedule = SCHEDULES[name]
    if name in HORIZONS:
        assert schedule.horizon() == HORIZONS[name]
    (panel,) = schedule.view()[1].panels
    for step, value in random.Random(0).sample(list(panel.lines[0].points), 5):
        assert value == schedule(step)
    assert panel.lines[0].points[-1][0] >= schedule.horizon()
    shown = page(schedule)
    assert shown.texts[0] == repr(schedule)
    assert len(shown.points) == 1
    assert str(schedule).splitlines()[0] == repr(schedule)
    assert any(block in str(schedule).splitlines()[-1] for block in "▁▄█")


def test_a_schedule_that_cannot_be_drawn_shows_its_arguments():
    broken = OPTIM.LambdaLR(1.0, lambda step: {}[EVIL])
    assert page(broken).points == []
    assert str(broken) == repr(broken)


def test_a_chain_is_a_tree_of_transformations():
    warm = OPTIM.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
    tx = OPTIM.chain(
        OPTIM.clip_by_global_norm(1.0),
        ("body", OPTIM.masked(OPTIM.adamw(warm), "*<b>*")),
        OPTIM.partition({"a": OPTIM.sgd(0.1, momentum=0.9), "b": OPTIM.freeze("*")}, {"a": "*.w", "b": "*"}),
    )
    lines = str(tx).splitlines()
    assert lines[:3] == ["chain", "├─ clip_by_global_norm  max_norm=1.0", "├─ body: masked  mask='*<b>*'"]
    assert lines[3].startswith("│  ╰─ adamw  learning_rate=join_schedules(")
    assert lines[4].startswith("╰─ partition  by ")
    assert "   ├─ a: sgd  learning_rate=0.1, momentum=0.9" in lines
    assert lines[-1].startswith("learning_rate")
    assert lines[-1].endswith("▁")
    assert repr(tx).startswith("chain(clip_by_global_norm(")  # the code, as before
    shown = page(tx)
    assert {"clip_by_global_norm", "mask='*<b>*'", "a: sgd"} <= set(shown.texts)
    assert len(shown.points) == 1  # the schedule, once
    injected = OPTIM.inject_hyperparams(OPTIM.adamw)(1e-3, weight_decay=0.5)
    assert str(injected) == "adamw  learning_rate=0.001, weight_decay=0.5; in the state"


def test_a_plan_shows_axes_and_rules():
    plan = ps.sharding.hsdp(fsdp=2) * ps.sharding.tensor_parallel({"*.<b>.weight": Spec("tensor")}, size=4)
    shown = page(plan)
    assert shown.rows[:4] == [
        ["axis", "ranks", "splits"],
        ["data", "the rest", "microbatches"],
        ["fsdp", "2", "microbatches and parameters"],
        ["tensor", "4", "parameters"],
    ]
    assert ["*.<b>.weight", "Spec('tensor', auto='fsdp')"] in shown.rows
    assert "fsdp    2         microbatches and parameters" in str(plan).splitlines()
    assert repr(plan).startswith("Plan(mesh=")
    alone = ps.sharding.Plan(ps.sharding.mesh({"a": 2}), [(lambda name: True, Spec("a")), (("x", "y"), Spec())])
    assert [row[0] for row in page(alone).rows[3:]] == [
        "test_a_plan_shows_axes_and_rules.<locals>.<lamb…",
        "x or y",
        "anything else",
    ]
    state = {"w": torch.zeros(8, 2), EVIL: torch.zeros(2)}
    described = page(ps.sharding.fsdp(4).describe(state))
    assert described.rows[-1][-2:] == ["all", str(ps.sharding.fsdp(4).describe(state).nbytes)]
    assert page(ps.sharding.fsdp(4).dry_run(state)).fact("params")


def test_a_model_is_summarised():
    found = ps.display.summary(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    assert page(found).rows[-1] == ["total", "", "24", "9", "136 B", "float32, int64", "yes"]
    assert repr(found) == str(found)


def test_predictions_are_names_and_shapes():
    found = ps.Predictions(torch.arange(300), {EVIL: torch.rand(300, 4), "label": torch.zeros(300, dtype=torch.int64)})
    shown = page(found)
    assert any("300 samples" in text for text in shown.texts)
    assert "predictions.outputs['label']: int64[300]" in repr(found).splitlines()
    assert len(repr(found).splitlines()) == 4


def test_an_experiment_and_a_replayed_step(results, root):
    shown = page(small(0.01))
    assert (shown.fact("setting lr"), shown.fact("setting note")) == ("0.01", EVIL)
    assert (shown.fact("until"), shown.fact("callbacks")) == ("3 epochs", "snapshots, log, val")
    assert repr(small(0.01)) == str(small(0.01))
    (step,) = ps.replay(root / "a", small, 4, 5)
    shown = page(step)
    assert shown.rows[0] == ["position", "5"]
    assert shown.fact("epoch, batch") == "1, 1"
    assert shown.fact("samples") == "[4, 5, 6, 7]"
    assert shown.fact("loss") == f"{step.metrics['loss']:.4g}"
    assert "object at 0x" not in repr(step)
