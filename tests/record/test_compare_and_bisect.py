"""Two runs beside each other: what differs of their settings, where their logs part, which batch and which leaf."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


@ps.experiment
def small(lr=1e-2, *, changed=None, at=None, donate=False, width=8, every=3):
    """`changed` is a sample that is other than in the other runs; `at` a step in which one weight is."""
    g = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(20, 4, generator=g), "y": torch.randn(20, 1, generator=g)}
    if changed is not None:
        data["x"][changed, 2] += 1e-3
    tx = ps.optim.adamw(lr)
    state = ps.init(lambda: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1)), tx, seed=3)
    inner = ps.make_step(loss_fn, tx)

    def step(state, batch):
        state, metrics = inner(state, batch)
        if at is None:
            return state, metrics
        bias = state.params["1.bias"]
        return state.replace(params={**state.params, "1.bias": torch.where(state.step == at, -bias, bias)}), metrics

    callbacks = [
        ps.callbacks.snapshots(every=ps.every.steps(every), keep=ps.snapshot.all_()),
        ps.callbacks.log(every=ps.every.steps(1)),
    ]
    batches = ps.data.batches(data, 4, seed=1)
    return ps.Experiment(ps.donate(inner) if donate else step, state, batches, until=ps.steps(12), callbacks=callbacks)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    small().fit(run_dir=root / "plain")
    small(changed=7).fit(run_dir=root / "sample")
    small(at=8).fit(run_dir=root / "step")
    small(2e-2).fit(run_dir=root / "rate")
    return root


def first_batch_of(sample):
    """The position of the first batch with a sample, and its place in it."""
    data = small().data
    for position in range(1, 13):
        indices = data.indices((position - 1) // 5, (position - 1) % 5)
        if sample in indices:
            return position, indices.tolist().index(sample)
    raise AssertionError("the sample is never read")


# --- compare ----------------------------------------------------------------------------------------------------------


def test_settings_metrics_and_the_place_where_the_logs_part(root):
    found = ps.compare(root / "plain", ps.open(root / "step"))
    assert found.names == ("plain", "step")
    assert found.settings == {"at": (None, 8)}
    assert found.last_equal == 6
    assert found.parted.step == 9  # the loss of step 9 is the first that sees the weight of step 8
    assert set(found.parted.values) == {"train/loss"}
    a, b = found.parted.values["train/loss"]
    assert a == ps.open(root / "plain").metrics.at(9)["train/loss"] != b
    assert list(found.metrics) == list(ps.open(root / "plain").summary.metrics)
    assert found.log["step"] == list(range(1, 13))
    columns = [found.log[f"train/loss, {name}"] for name in found.names]
    assert columns[0][:8] == columns[1][:8]
    text = repr(found)
    assert "setting at" in text
    assert "the logs part at step 9: train/loss " in text
    assert "equal at 6" in text
    assert "<table>" in found._repr_html_()


def test_equal_runs_and_identities(root, tmp_path):
    small().fit(run_dir=tmp_path / "plain")
    found = ps.compare(root / "plain", tmp_path / "plain")
    assert (found.settings, found.conditions, found.parted, found.last_equal) == ({}, {}, None, 12)
    assert found.names == (str(root / "plain"), str(tmp_path / "plain"))
    assert "the logs do not part; last snapshots equal at 12" in repr(found)
    for lr in (1e-2, 2e-2):
        small(lr, donate=True).fit(run_dir=tmp_path / str(lr))
    found = ps.compare(tmp_path / "0.01", tmp_path / "0.02")
    assert found.settings == {"lr": (1e-2, 2e-2)}
    assert list(found.conditions.values()) == [(1e-2, 2e-2)]
    assert next(iter(found.conditions)).startswith("identity.step.")
    assert (found.parted.step, found.last_equal) == (2, None)


def test_logs_of_other_metrics_are_compared_where_both_have_them(root):
    from purestep.record.compare import _parted
    from purestep.record.run_record import Columns

    nan = float("nan")
    a = Columns({"step": [1, 2, 3, 3], "loss": [nan, 1.0, None, 2.0], "own": [1.0, 2.0, 3.0, None]})
    b = Columns({"step": [1, 2, 3], "loss": [nan, 1.0, 2.5], "other": [0.0, 0.0, 0.0]})
    assert _parted(a, b).step == 3
    assert _parted(a, b).values == {"loss": (2.0, 2.5)}
    assert _parted(a, a) is None
    assert _parted(a, Columns({})) is None


# --- bisect -----------------------------------------------------------------------------------------------------------


def test_one_changed_sample_is_named_with_its_batch_and_leaf(root):
    found = ps.bisect(root / "plain", root / "sample", small)
    position, place = first_batch_of(7)
    assert found
    assert found.batch.position == found.position == position
    (difference,) = found.batch.differences
    assert (difference.path, difference.elements) == ("batch['x']", 1)
    assert (found.batch.rows, found.batch.samples) == ((place,), [(7, 7)])
    assert "samples      7 of the data set\n" in repr(found)
    assert "state.params['0.weight']" in [difference.path for difference in found.leaves]
    assert f"step {position}: batch {(position - 1) % 5} of epoch 0" in repr(found)
    assert "<td>batch[&#x27;x&#x27;]</td>" in found._repr_html_()
    operation = found.operation()
    assert (operation.kind, operation.a.name, operation.inputs_equal) == ("bits", "aten.addmm", False)
    assert str(operation).startswith("the first operation that differs is aten.addmm in 0, ")
    assert operation.largest is not None


def test_one_changed_weight_is_named_and_the_step_can_be_called_again(root):
    found = ps.bisect(root / "plain", root / "step", small)
    assert (found.start, found.batch, found.position) == (6, None, 8)
    (difference,) = found.leaves
    assert (difference.path, difference.elements) == ("state.params['1.bias']", 1)
    assert not ps.diff(*found.before)
    assert not ps.diff(*found.batches)
    calls = zip((None, 8), found.before, found.batches, strict=True)
    after = [small(at=at).step(state, batch)[0] for at, state, batch in calls]
    assert [d.path for d in ps.diff(*after, root="state")] == ["state.params['1.bias']"]
    operation = found.operation()  # the changed code has operations more
    assert operation.kind == "operation"
    assert "torch.where(state.step == at, -bias, bias)" in str(operation)
    text = repr(found)
    assert "equal up to  step 7\n" in text
    assert "first state  step 8: 1 leaf differs\n" in text
    assert text.splitlines()[-1].startswith("state.params['1.bias']  float32[1]       1 ")


@ps.experiment
def summed(threads=1):
    """The sum of many numbers, which is another one with another number of threads."""
    x = ps.random.normal(ps.random.key(0), (8, 1 << 17))

    def step(state, batch):
        return {"total": state["total"] + (batch["x"] * 1.5).sum()}, {}

    saving = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.all_())
    state = {"total": torch.zeros(())}
    return ps.Experiment(step, state, ps.data.batches({"x": x}, 2, seed=0), until=ps.steps(4), callbacks=[saving])


def test_another_number_of_threads_is_named_with_its_operation(tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            summed(threads).fit(run_dir=tmp_path / str(threads))
        torch.set_num_threads(1)
        found = ps.bisect(tmp_path / "1", tmp_path / "2", summed)
        assert torch.get_num_threads() == 1
        operation = found.operation()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert (found.threads, found.batch, found.position, found.recorded) == ((1, 2), None, 1, None)
    assert [leaf.path for leaf in found.leaves] == ["state['total']"]
    assert "threads      1 and 2, as they ran" in repr(found).splitlines()
    assert (operation.a.name, operation.inputs_equal) == ("aten.sum", True)
    assert operation.conditions == {"threads": (1, 2)}


def test_other_orders_name_the_samples(root, tmp_path):
    made = small()
    other = ps.Experiment(made.step, made.state, made.data.replace(seed=2), until=ps.steps(6), callbacks=made.callbacks)
    other.fit(run_dir=tmp_path)
    found = ps.bisect(root / "plain", tmp_path, small, other)
    pairs = list(zip(made.data.indices(0, 0).tolist(), other.data.indices(0, 0).tolist(), strict=True))
    assert found.batch.position == 1
    assert found.batch.samples == [(a, b) for a, b in pairs if a != b] != []
    assert found.end == 6


def test_other_first_states_are_named(root, tmp_path):
    small(width=6).fit(run_dir=tmp_path)
    found = ps.bisect(root / "plain", tmp_path, small)
    assert (found.position, found.batch, found.batches) == (0, None, None)
    assert "state.params['0.weight']" in [difference.path for difference in found.leaves]
    assert "nothing: the first states differ" in repr(found)


def test_equal_runs_do_not_differ(root, tmp_path):
    small(donate=True, every=5).fit(run_dir=tmp_path)
    found = ps.bisect(root / "plain", tmp_path, small)
    assert not found
    assert "equal up to 12" in repr(found)


def test_runs_that_differ_in_what_is_not_executed_here_are_not_called_equal(root):
    with pytest.warns(ps.loop.RunChangedWarning, match=r"settings\.at"):  # the code is not that of the second run
        found = ps.bisect(root / "plain", root / "step", small())
    assert (found.position, found.batch, found.recorded) == (None, None, 9)
    assert found
    assert "snapshots  differ at 9: ps.verify says which run" in repr(found)
    assert ps.bisect(root / "plain", root / "step", small).recorded is None


def test_donated_states_are_kept_for_the_trace(tmp_path):
    small(donate=True).fit(run_dir=tmp_path / "a")
    small(donate=True, changed=7).fit(run_dir=tmp_path / "b")
    found = ps.bisect(tmp_path / "a", tmp_path / "b", small)
    assert found.position == first_batch_of(7)[0]
    assert not ps.diff(*found.before)
    assert int(found.before[0].step) == found.position - 1


def test_a_fork_is_bisected_from_where_it_began(root, tmp_path):
    child = ps.fork(root / "plain", at=7, run_dir=tmp_path / "child", experiment=small)
    small(at=9).fit(run_dir=child.path)
    found = ps.bisect(root / "plain", child.path, small)
    assert (found.start, found.position) == (7, 9)
    assert [difference.path for difference in found.leaves] == ["state.params['1.bias']"]
    with pytest.raises(ConfigError, match=r"no position at which both runs are equal\n  where: .*forked from .* at 7"):
        ps.bisect(root / "rate", child.path, small)
