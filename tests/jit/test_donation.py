"""A donated state is written in place, is never read half old and half new, and cannot be used again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import DonatedStateError, StepError
from purestep.jit import jit
from purestep.optim.kernels import sliced
from purestep.testing import assert_trees_equal, check_pure

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def pointers(state):
    return [leaf.data_ptr() for leaf in ps.tree.leaves(state)]


@pytest.fixture
def trained_state(cases, batches):
    """A donating step, the state it returned after a first call, and the consumed one before."""
    case = cases["plain"]
    step = jit(case.step(), backend="eager", donate=True)
    old = case.state()
    new, _ = step(old, batches(1)[0])
    return step, old, new


def test_the_new_state_has_the_memory_of_the_old(cases, batches):
    case = cases["batch norm"]
    step, state = jit(case.step(), backend="eager", donate=True), case.state()
    before = pointers(state)
    for batch in batches(3):
        state, _ = step(state, batch)
        assert pointers(state) == before


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.params,
        lambda s: s.loss_scale,
        lambda s: s.replace(step=torch.tensor(0)),
        lambda s: ps.tree.leaves({"nested": s}),
        lambda s: torch.utils._pytree.tree_leaves([s]),
        lambda s: ps.digest(s),
        lambda s: copy.deepcopy(s),
        lambda s: pickle.dumps(s),
        lambda s: ps.to_module(s),
    ],
)
def test_any_use_of_a_consumed_state_raises(trained_state, use):
    _, old, _ = trained_state
    with pytest.raises(DonatedStateError, match="this TrainState was consumed by Step"):
        use(old)


def test_the_message_of_a_consumed_state(trained_state, batches):
    step, old, new = trained_state
    with pytest.raises(DonatedStateError) as caught:
        step(old, batches(1)[0])
    assert "state, metrics = step(state, batch)   # go on with the state that was returned" in str(caught.value)
    assert repr(old) == "<TrainState, consumed by Step>"
    step(new, batches(1)[0])


def test_without_donation_nothing_is_consumed(cases, batches):
    case, batch = cases["plain"], batches(1)[0]
    state, step = case.state(), jit(case.step(), backend="eager")
    before = ps.digest(state)
    new, _ = step(state, batch)
    assert ps.digest(state) == before
    assert not set(pointers(new.params)) & set(pointers(state.params))


def test_check_pure_refuses_a_donating_step(trained_state, batches):
    step, _, new = trained_state
    with pytest.raises(AssertionError, match="a donating step consumes its state"):
        check_pure(step, new, batches(1)[0])


def test_states_inside_plain_containers_are_consumed(cases, batches):
    case = cases["plain"]
    inner = case.step()

    def both(states, batch):
        out = {name: inner(state, batch)[0] for name, state in states.items()}
        return out, {}

    states = {"a": case.state(1), "b": case.state(2)}
    held = states["a"]
    new, _ = jit(both, backend="eager", donate=True)(states, batches(1)[0])
    with pytest.raises(DonatedStateError):
        _ = held.params
    assert_trees_equal(new["b"], inner(case.state(2), batches(1)[0])[0])


# --- values that move between leaves ----------------------------------------------------------------------------------


@ps.pytree
class Pair:
    a: torch.Tensor
    b: torch.Tensor


def rotate(state, x):
    return Pair(state.b, state.a + x), {"old": state.a, "view": state.b[1:], "new": state.a + x, "x": x}


def swap(state, x):
    return Pair(state.b, state.a), {}


def transpose(state, x):
    return Pair(state.a.T.contiguous(), state.b.flip(0)), {"seen": state.a.T}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [rotate, swap, transpose])
def test_leaves_may_trade_places(function, backend):
    torch.manual_seed(0)
    a, b, x = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    step = jit(function, backend=backend, donate=True)
    expected, actual = Pair(a.clone(), b.clone()), Pair(a.clone(), b.clone())
    history = []
    for _ in range(3):
        expected, want = function(expected, x)
        actual, got = step(actual, x)
        history.append((got, copy.deepcopy(want)))
        assert_trees_equal(ps.tree.leaves(actual), ps.tree.leaves(expected))
    # What was returned besides the state keeps its values when the state is overwritten later.
    for got, want in history:
        assert_trees_equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_holds_one_tensor_twice(backend):
    step = jit(lambda s, x: (Pair(s.a + x, 0.5 * s.b + 0.5 * s.a), {}), backend=backend, donate=True)
    shared = torch.ones(5)
    state = Pair(shared, shared)
    for _ in range(2):
        state, _ = step(state, torch.ones(5))
    assert state.a.tolist() == [3.0] * 5
    assert state.b.tolist() == [1.5] * 5


def test_leaves_that_are_views_of_one_buffer_or_expanded():
    step = jit(lambda s, x: (Pair(s.a + x, s.b + s.a.sum()), {}), backend="eager", donate=True)
    flat = torch.arange(6.0)
    new, _ = step(Pair(flat[:3], flat[2:]), torch.ones(3))
    assert (new.a.tolist(), new.b.tolist()) == ([1, 2, 3], [5, 6, 7, 8])
    wide = torch.ones(1).expand(3)
    step = jit(lambda s, x: (Pair((s.a + x).clone(), s.b + 1), {}), backend="eager", donate=True)
    with pytest.raises(StepError, match="strides"):
        step(Pair(wide, torch.ones(3)), torch.arange(3.0))


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_that_shares_memory_with_the_state(first, monkeypatch):
    """A compiled kernel may write the state before another reads the batch, so the batch has to be a copy."""
    from purestep.jit import backends

    shared = []

    def spying(traced, mode):
        def run(tensors):
            state = {x.untyped_storage().data_ptr() for x in tensors[:2]}
            shared.append(tensors[2].untyped_storage().data_ptr() in state)
            return traced.graph.forward(*tensors)

        return run

    def function(s, x):
        return Pair(s.a * 2 + x.sum(), s.b + x), {}

    monkeypatch.setitem(backends._BACKENDS, "eager", spying)
    step = jit(function, backend="eager", donate=True)
    state = Pair(torch.ones(3), torch.ones(3))
    if not first:
        state, _ = step(state, torch.zeros(3))
    expected, _ = function(copy.deepcopy(state), state.a.clone())
    new, _ = step(state, state.a)
    assert_trees_equal(new, expected)
    assert not any(shared)


def test_a_state_that_stays_as_it_is():
    step = jit(lambda s, x: (s, {"sum": s.a.sum() + x}), backend="eager", donate=True)
    state = Pair(torch.ones(2), torch.zeros(2))
    new, metrics = step(state, torch.tensor(1.0))
    assert (new.a.tolist(), float(metrics["sum"])) == ([1, 1], 3.0)


def test_a_state_alone():
    step = jit(lambda s: Pair(s.a + 1, s.b), backend="eager", donate=True)
    state = Pair(torch.zeros(2), torch.ones(2))
    at = pointers(state)
    state = step(step(state))
    assert state.a.tolist() == [2, 2]
    assert pointers(state) == at


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda s, x: ({"a": s.a}, {}), "state.a is missing"),
        (lambda s, x: (Pair(s.a[:1], s.b), {}), "state.a was float32[2] and comes back as float32[1]"),
        (lambda s, x: (Pair(s.a.double(), s.b), {}), "state.a was float32[2] and comes back as float64[2]"),
        (lambda s, x: {"loss": x}, "state.a is missing"),
    ],
)
def test_a_donating_function_returns_a_state(function, where):
    state = Pair(torch.ones(2), torch.ones(2))
    with pytest.raises(StepError) as caught:
        jit(function, backend="eager", donate=True)(state, torch.ones(2))
    assert "a donating function returns a state like the one it was given, first" in str(caught.value)
    assert where in str(caught.value)
    assert state.a.tolist() == [1, 1]


def test_a_step_that_fails_halfway_leaves_no_state_behind(monkeypatch):
    from purestep.jit import backends

    def breaking(traced, mode):
        def run(tensors):
            tensors[0].zero_()
            raise MemoryError

        return run

    monkeypatch.setitem(backends._BACKENDS, "eager", breaking)
    state = Pair(torch.ones(2), torch.ones(2))
    with pytest.raises(MemoryError):
        jit(lambda s: Pair(s.a + 1, s.b), backend="eager", donate=True)(state)
    with pytest.raises(DonatedStateError, match="which failed while it wrote over it"):
        _ = state.b


# --- with the loop and snapshots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_a_pending_snapshot_is_not_overwritten(compiled, cases, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(sliced, "WORTH", 16)  # or nothing is written over eagerly
    case = cases["plain"]
    step, state = case.step(), case.state()
    step = jit(step, backend="eager", donate=True) if compiled else ps.donate(step)
    digests = []
    with ps.snapshot.Store(tmp_path / "snapshots", keep=ps.snapshot.latest(3)) as store:
        for number, batch in enumerate(batches(3)):
            store.save(number, state)
            digests.append(ps.digest(state))
            state, _ = step(state, batch)
        store.wait()
        for number, digest in enumerate(digests):
            restored = store.restore(case.state(), step=number)
            assert ps.digest(restored.value) == digest


def test_fit_with_a_donating_step_has_the_bits_of_fit_without(cases, tmp_path):
    case = cases["dropout"]
    data = {"x": torch.randn(20, 7), "y": torch.randint(0, 5, (20,))}

    def run(step, where):
        batches = ps.data.batches(data, 5, seed=0)
        save = ps.callbacks.snapshots(every=ps.every.steps(2))
        return ps.fit(step, case.state(), batches, until=ps.epochs(2), run_dir=where, callbacks=[save])

    plain = run(jit(case.step(), backend="eager"), tmp_path / "plain")
    donated = run(jit(case.step(), backend="eager", donate=True), tmp_path / "donated")
    assert_trees_equal(donated.state, plain.state)
    assert donated.metrics == plain.metrics


def test_frozen_parameters_are_not_copied_by_microbatches(batches):
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 5))
    tx = ps.optim.sgd(0.1)

    def loss_fn(net, batch):
        return nn.functional.cross_entropy(net(batch["x"]), batch["y"])

    step = ps.make_step(loss_fn, tx, microbatches=2)
    expected = actual = None
    expected, actual = ps.init(model, tx, frozen="0.*"), ps.init(model, tx, frozen="0.*")
    at = actual.buffers["0.weight"].data_ptr()
    compiled = jit(step, backend="eager", donate=True)
    for batch in batches(3, 12):
        expected, _ = step(expected, batch)
        actual, _ = compiled(actual, batch)
    assert_trees_equal(actual, expected)
    assert actual.buffers["0.weight"].data_ptr() == at


# --- CUDA graphs, replayed by hand ------------------------------------------------------------------------------------


def test_a_recording_copies_the_batch_in_and_the_metrics_out():
    from purestep.jit.cuda_graph import Replay

    runs = []

    def run(tensors):
        state, batch = tensors
        tensors.clear()
        state += batch
        runs.append(1)
        return [state.sum()]

    def record(work, generators):
        # As in a real recording nothing happens yet, and every replay writes its output to one place.
        place = torch.zeros(())
        return (lambda: place.copy_(work()[0])), [place]

    replay, seen = Replay(run, [0], record), []
    state = torch.zeros(2)
    for value in (1.0, 2.0, 3.0):
        seen.append(replay([state, torch.full((2,), value)])[0])
    assert state.tolist() == [6.0, 6.0]
    assert [float(x) for x in seen] == [2.0, 6.0, 12.0]
    other = torch.zeros(2)
    assert float(replay([other, torch.ones(2)])[0]) == 2.0
    assert (other.tolist(), state.tolist()) == ([1.0, 1.0], [6.0, 6.0])
