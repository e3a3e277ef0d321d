"""Draws from the generators of Python and numpy inside a model: keyed as torch's are, and no other stream moves."""

from __future__ import annotations

import _thread
import os
import random as python_random
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from random import random as draw_by_name

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep import tree
from purestep.errors import RandomnessError, TraceError
from purestep.functional import apply, bind
from purestep.random import global_generators, host_draws, host_trap, watch_all

DRAWS = {
    "np.random.rand": lambda: np.random.rand(),
    "np.random.randn, cached": lambda: np.random.randn() + 2 * np.random.randn(),
    "np.random.standard_normal, odd": lambda: np.random.standard_normal(3).sum(),
    "np.random.randint": lambda: np.random.randint(1000),
    "np.random.choice": lambda: np.random.choice(np.arange(1000)),
    "np.random.permutation": lambda: np.random.permutation(100)[0],
    "np.random.shuffle": lambda: _shuffled(np.random.shuffle),
    "np.random.beta": lambda: np.random.beta(0.4, 0.4),
    "np.random.multinomial": lambda: np.random.multinomial(1000, [0.5, 0.5])[0],
    "np.random.bytes": lambda: np.random.bytes(4)[0],
    "np.random.sample": lambda: np.random.sample(),
    "a thousand of numpy": lambda: np.random.rand(1000).sum(),
    "random.random": lambda: python_random.random(),
    "random.random by name": lambda: draw_by_name(),
    "random.gauss": lambda: python_random.gauss(0, 1),
    "random.gauss, cached": lambda: python_random.gauss(0, 1) + 2 * python_random.gauss(0, 1),
    "random.randint": lambda: python_random.randint(0, 1000),
    "random.shuffle": lambda: _shuffled(python_random.shuffle),
    "random.sample": lambda: python_random.sample(range(1000), 3)[0],
    "random.getrandbits": lambda: python_random.getrandbits(10),
    "exactly a whole period of words": lambda: [python_random.getrandbits(32) for _ in range(624)][-1] / 2**32,
    "from a C loop": lambda: next(iter(python_random.random, 2.0)),
    "both": lambda: np.random.rand() * python_random.random(),
}


def _shuffled(shuffle):
    values = list(range(1000))
    shuffle(values)
    return values[0]


@pytest.mark.parametrize("name", [*DRAWS, "torch.rand", "torch.randn, odd"])
def test_all_generators_are_looked_at_together(name):
    draw = DRAWS.get(name) or {"torch.rand": lambda: torch.rand(1), "torch.randn, odd": lambda: torch.randn(3)}[name]
    before = watch_all.states()
    assert watch_all.states() is before
    assert not watch_all.moved(before)
    first = draw()
    assert watch_all.states() is not before
    assert watch_all.moved(before)
    watch_all.put_back(before)
    assert not watch_all.moved(before)
    assert torch.equal(torch.as_tensor(draw()), torch.as_tensor(first))
    watch_all.put_back(before)


class Notes:
    """What a model drew, kept by a function, so that the model itself remembers nothing."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        return Notes()

    def __call__(self, drawn):
        self.seen.append(drawn)
        return drawn


class Drawing(nn.Module):
    """A model that scales its result by what a function draws."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.lin = draw, nn.Linear(3, 1)
        self.note = Notes()

    @property
    def seen(self):
        return self.note.seen

    def forward(self, x):
        return self.lin(x) * (1.0 + self.note(float(self.draw())))


X = torch.ones(4, 3)


def loss_fn(net, batch):
    return net(batch).square().mean()


def training(draw, **options):
    tx = ps.optim.sgd(0.01)
    state = ps.init(lambda: Drawing(draw), tx, seed=3)
    return ps.make_step(loss_fn, tx, **options), state


def drawn(state):
    return state.model.module.seen


def hosts():
    state = np.random.get_state(legacy=False)
    words = state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"]
    return python_random.getstate(), words, torch.get_rng_state().tolist()


def stir():
    """Bring the global generators to another place, with a second normal number cached in each."""
    python_random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    np.random.randn(), python_random.gauss(0, 1)


def _settled():
    """The times of the other threads, once all of them wait: a worker still runs when its result is there."""
    before, after, end = {}, host_draws._other_threads(), time.monotonic() + 5
    while before != after and time.monotonic() < end:
        time.sleep(0.01)
        before, after = after, host_draws._other_threads()
    return after


@pytest.fixture(autouse=True)
def settled():
    """What earlier tests of this process left behind may still be ending; a thread that has run may have drawn."""
    _settled()


# --- the draws are those of the key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_a_function_of_the_key_and_the_callers_stream_stays(name):
    step, state = training(DRAWS[name])
    stir()
    before = hosts()
    first, _ = step(state, X)
    assert hosts() == before
    np.random.rand(7), python_random.random()  # a caller that is elsewhere changes nothing
    before = hosts()
    again, _ = step(state, X)
    assert hosts() == before
    assert tree.digest(first) == tree.digest(again)
    _, other = training(DRAWS[name])
    fresh, _ = step(other, X)  # of a module that nobody knows yet
    assert tree.digest(fresh) == tree.digest(first)
    step(first, X)
    *_, last, next_one = drawn(state)
    assert next_one != last  # the next step draws other numbers


def test_the_caller_gets_the_numbers_it_would_have_got():
    def numbers():
        return [np.random.randn(), python_random.gauss(0, 1), np.random.rand(), python_random.random()]

    stir()
    expected = numbers()
    for name in ("np.random.randn, cached", "random.gauss, cached"):
        step, state = training(DRAWS[name])
        for _ in range(3):
            stir()
            state, _ = step(state, X)
            assert numbers() == expected


def test_python_and_numpy_draw_different_numbers():
    step, state = training(lambda: np.random.rand() - python_random.random())
    step(state, X)
    assert drawn(state)[-1] != 0


def test_the_key_of_each_microbatch_is_its_own_and_evaluations_have_one():
    step, state = training(DRAWS["np.random.rand"], microbatches=2)
    step(state, X)
    first, second = drawn(state)[-2:]
    assert first != second
    evaluate = ps.make_eval(loss_fn)
    evaluate(state, X), evaluate(state, X)
    assert drawn(state)[-1] == drawn(state)[-2] not in (first, second)


def test_nested_calls_have_their_own_keys():
    teacher = Drawing(DRAWS["np.random.rand"])
    weights = dict(teacher.named_parameters())

    class Student(Drawing):
        def forward(self, x):
            before = float(np.random.rand())
            y, _ = apply(teacher, weights, {}, x, rng=ps.random.key(5))
            self.seen.append((before, teacher.seen[-1], float(np.random.rand())))
            return self.lin(x) + y.detach()

    student = Student(None)
    stir()
    before = hosts()
    for _ in range(3):
        apply(student, dict(student.named_parameters()), {}, X, rng=ps.random.key(1))
        assert hosts() == before
    assert student.seen[-1] == student.seen[-2]
    apply(teacher, weights, {}, X, rng=ps.random.key(5))
    assert teacher.seen[-1] == student.seen[-1][1]
    assert len({*student.seen[-1]}) == 3


def test_a_model_that_seeds_by_itself_gets_what_it_asks_for():
    def seeded():
        np.random.seed(4), python_random.seed(4)
        return np.random.rand() + python_random.random()

    step, state = training(seeded)
    stir()
    before = hosts()
    step(state, X)
    assert hosts() == before
    assert drawn(state)[-1] == seeded()


def test_a_model_that_begins_to_draw_later_is_keyed_from_then_on():
    draws = {"now": False}

    def draw():
        return np.random.rand() if draws["now"] else 0.0

    step, state = training(draw)
    states = [state]
    for number in range(6):
        draws["now"] = number >= 3
        stir()
        before = hosts()
        states.append(step(states[-1], X)[0])
        assert hosts() == before
    assert tree.digest(step(states[3], X)[0]) == tree.digest(states[4])
    draws["now"] = False
    assert len(drawn(state)) == 8  # the call that drew first was done again
    step(states[-1], X)
    assert len(drawn(state)) == 9


def test_draws_of_a_checkpointed_block_are_those_of_its_forward_pass():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.note = Notes()
            self.lin = nn.Linear(3, 1)

        def block(self, x):
            drawn = self.note((float(np.random.rand()), python_random.random()))
            return self.lin(x) * drawn[0] * drawn[1]

        def forward(self, x):
            return ps.checkpoint(self.block, x) * (1 + np.random.rand()) + ps.checkpoint(self.block, x)

    tx = ps.optim.sgd(0.01)
    state, step = ps.init(Blocks, tx), ps.make_step(loss_fn, tx)
    stir()
    before = hosts()
    for _ in range(2):
        state.model.module.note.seen.clear()
        step(state, X)
        one, two, *again = state.model.module.note.seen[-4:]
        assert one != two
        assert sorted(again) == sorted([one, two])
        assert hosts() == before


def test_a_draw_in_the_backward_pass_is_refused():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * np.random.rand()

    tx = ps.optim.sgd(0.01)
    step = ps.make_step(lambda net, batch: Noisy.apply(net(batch)).square().mean(), tx)
    state = ps.init(lambda: nn.Linear(3, 1), tx)
    stir()
    before = hosts()
    with pytest.raises(RandomnessError, match="in the backward pass"):
        step(state, X)
    assert hosts() == before


def test_torchs_own_generator_past_the_function_mode_is_keyed_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Dropout(0.5))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 8)

        def forward(self, x):
            return scripted(self.lin(x))

    tx = ps.optim.sgd(0.01)
    step = ps.make_step(loss_fn, tx)
    stir()
    before = hosts()
    results = [ps.fit(step, ps.init(Net, tx), [X], until=ps.steps(1)).state for _ in range(2)]
    results += [step(ps.init(Net, tx), X)[0] for _ in range(2)]
    assert len({tree.digest(state) for state in results}) == 1
    assert hosts() == before


def test_an_exception_leaves_the_callers_stream():
    def fail():
        np.random.rand(), python_random.random()
        raise ZeroDivisionError

    step, state = training(fail)
    for _ in range(3):  # unknown, then known to draw
        stir()
        before = hosts()
        with pytest.raises(ZeroDivisionError):
            step(state, X)
        assert hosts() == before


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["np.random.rand", "random.gauss", "both"])
def test_two_runs_of_one_seed_are_equal_and_so_is_a_resumed_one(name, tmp_path):
    step, _ = training(DRAWS[name])
    tx = step.tx

    def run(steps, directory=None):
        stir()
        state = ps.init(lambda: Drawing(DRAWS[name]), tx, seed=3)
        callbacks = [ps.callbacks.snapshots(every=ps.every.steps(3))] if directory else []
        return ps.fit(step, state, [X] * 10, until=ps.steps(steps), run_dir=directory, callbacks=callbacks).state

    straight = run(8)
    python_random.seed(1)
    assert tree.digest(run(8)) == tree.digest(straight)
    run(5, tmp_path / "run")
    assert tree.digest(run(8, tmp_path / "run")) == tree.digest(straight)
    by_hand = ps.init(lambda: Drawing(DRAWS[name]), tx, seed=3)
    for _ in range(8):
        by_hand, _ = step(by_hand, X)
    assert tree.digest(by_hand) == tree.digest(straight)


def test_check_pure_passes_a_model_that_draws_and_finds_entropy():
    step, state = training(DRAWS["both"])
    ps.testing.check_pure(step, state, X)
    step, state = training(lambda: np.random.default_rng().random())
    with pytest.raises(AssertionError, match="other bits the second time"):
        ps.testing.check_pure(step, state, X)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "generator"), [("np.random.rand", "numpy.random"), ("random.random by name", "Python's random")]
)
def test_jit_refuses_a_draw_with_its_line(name, generator):
    step, state = training(DRAWS[name])
    stir()
    before = hosts()
    with pytest.raises(TraceError) as error:
        ps.jit(step, backend="eager")(state, X)
    assert hosts() == before
    assert str(error.value).splitlines()[0] == f"the function draws from {generator}"
    assert "test_host_draws.py:" in str(error.value)
    assert f'"{name}": lambda' in str(error.value)
    step(state, X)  # eager, it goes on
    with pytest.raises(TraceError, match="the function draws from"):
        ps.jit(step, backend="eager", donate=False)(state, X)


def test_jit_refuses_a_draw_outside_of_any_model_and_one_that_no_trap_sees():
    with pytest.raises(TraceError, match="numpy"):
        ps.jit(lambda x: x * np.random.rand(), backend="eager")(X)
    stir()
    before = hosts()
    with pytest.raises(TraceError, match="a global generator of Python or numpy"):
        # Called by C code, which no profiler hears of.
        ps.jit(lambda x: x * next(iter(python_random.random, 2.0)), backend="eager")(X)
    assert hosts() == before


@pytest.mark.parametrize("name", ["np.random.rand", "random.random", "from a C loop"])
def test_without_a_key_a_draw_is_refused(name):
    net = Drawing(DRAWS[name])
    weights = dict(net.named_parameters())
    for _ in range(2):
        stir()
        before = hosts()
        with pytest.raises(RandomnessError, match="but was given no key"):
            apply(net, weights, {}, X)
        assert hosts() == before
    apply(net, weights, {}, X, rng=ps.random.key(0))
    with pytest.raises(RandomnessError, match="but was given no key"):
        apply(net, weights, {}, X)


def test_under_vmap_a_draw_is_refused():
    step, state = training(DRAWS["np.random.rand"])
    many = tree.map(lambda leaf: torch.stack([leaf, leaf]), state)
    with pytest.raises(RandomnessError, match=r"inside a torch\.func transform"):
        torch.vmap(step, in_dims=(0, None))(many, X)


def test_a_block_cannot_be_done_again():
    draws = {"now": True}
    net = Drawing(lambda: np.random.rand() if draws["now"] else 0.0)
    weights = dict(net.named_parameters())

    def call():
        with bind(net, weights, rng=ps.random.key(0)) as bound:
            bound(X)
        return net.seen[-1]

    assert call() == call()  # it draws in its first call
    net = Drawing(net.draw)
    weights, draws["now"] = dict(net.named_parameters()), False
    call()
    draws["now"] = True
    stir()
    before = hosts()
    with pytest.raises(RandomnessError, match="after calls that did not"):
        call()
    assert hosts() == before


def test_under_a_plan_draws_are_keyed_and_one_that_comes_late_is_refused_where_ranks_may_wait():
    draws, plan = {"now": True}, ps.sharding.ddp()
    step, state = training(lambda: np.random.rand() if draws["now"] else 0.0)
    planned = ps.make_eval(loss_fn, plan=plan)
    placed = plan.place(ps.init(lambda: Drawing(state.model.module.draw), step.tx, seed=3))
    expected = tree.digest(ps.make_eval(loss_fn)(state, X))
    assert [tree.digest(planned(placed, X)) for _ in range(3)] == [expected] * 3
    draws["now"] = False
    placed = plan.place(ps.init(lambda: Drawing(state.model.module.draw), step.tx, seed=3))
    planned(placed, X)
    draws["now"] = True
    stir()
    before = hosts()
    with pytest.raises(RandomnessError, match=r"cannot be done again(.|\n)*or let the model draw in its first call"):
        planned(placed, X)
    assert hosts() == before
    assert tree.digest(planned(placed, X)) == expected  # it is known now


def test_under_a_plan_without_exchanges_in_the_forward_pass_a_late_draw_is_keyed():
    draws, plan = {"now": True}, ps.sharding.ddp()
    step, state = training(lambda: np.random.rand() if draws["now"] else 0.0)
    planned = ps.make_step(loss_fn, step.tx, plan=plan)
    placed = plan.place(ps.init(lambda: Drawing(state.model.module.draw), step.tx, seed=3))
    expected = tree.digest(step(state, X)[0])
    draws["now"] = False
    planned(placed, X)
    draws["now"] = True
    stir()
    before = hosts()
    assert tree.digest(planned(placed, X)[0]) == expected
    assert hosts() == before


# --- other threads, other profilers -----------------------------------------------------------------------------------


class Neighbour:
    """A thread that draws from the global generators all the time."""

    def __init__(self, name=None):
        self.name = name

    def __enter__(self):
        self.numbers, self.stop = [], threading.Event()
        python_random.seed(7), np.random.seed(7)
        self.thread = threading.Thread(target=self.work, name=self.name)
        self.thread.start()
        return self

    def work(self):
        while not self.stop.is_set() and len(self.numbers) < 200_000:
            self.numbers.append((python_random.random(), np.random.rand(), np.random.randn()))
            self.stop.wait(1e-4)

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


# Orbax draws in the thread of a save, Weights & Biases in that of its logger.
@pytest.mark.parametrize("name", ["neighbour", "purestep-save-1", "purestep-log-WandB(project='p')"])
def test_the_stream_of_another_thread_is_not_disturbed(name):
    step, state = training(lambda: 0.5)
    with Neighbour(name) as neighbour:
        for _ in range(50):
            state, _ = step(state, X)
        for _ in range(300):  # one of these calls sees the generators move
            with bind(nn.Linear(3, 1), {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}) as net:
                net(X)
    numbers = neighbour.numbers
    python_random.seed(7), np.random.seed(7)
    assert numbers
    assert numbers == [(python_random.random(), np.random.rand(), np.random.randn()) for _ in numbers]


def test_a_model_is_keyed_beside_a_thread_that_draws():
    step, state = training(DRAWS["np.random.rand"])
    first, _ = step(state, X)
    step, other = training(DRAWS["np.random.rand"])
    with Neighbour() as neighbour:
        while len(neighbour.numbers) < 10:
            pass
        again, _ = step(other, X)
    assert other.model.module is not state.model.module
    assert drawn(other)[-1] == drawn(state)[-1]
    assert tree.digest(first) == tree.digest(again)


@pytest.fixture(params=["a pool", "a waiting thread", "a hash", "an ended thread of C"])
def leftover(request):
    """A thread that does not draw, as other libraries and earlier tests leave them behind."""
    stop, begun = threading.Event(), threading.Event()

    def work():
        begun.set()
        while not stop.is_set():
            sum(range(1000))  # it runs, and only its name tells that it does not draw

    if request.param == "a pool":
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: np.random.rand(), range(6)))  # it drew before
            yield
    elif request.param == "a waiting thread":
        thread = threading.Thread(target=stop.wait)
        thread.start()
        yield
        stop.set(), thread.join()
    elif request.param == "a hash":
        thread = threading.Thread(target=work, name="purestep-hash-3")
        thread.start(), begun.wait()
        yield
        stop.set(), thread.join()
    else:
        before = set(threading.enumerate())
        _thread.start_new_thread(lambda: (threading.current_thread(), begun.set()), ())
        begun.wait()
        yield
        for thread in set(threading.enumerate()) - before:  # Python 3.13 takes it from the list itself
            assert isinstance(thread, threading._DummyThread)
            del threading._active[thread.ident]


def test_an_idle_thread_is_not_taken_for_one_that_draws(leftover):
    """Draws that only a comparison of the generators shows are still refused, and the caller's stream is put back."""
    test_jit_refuses_a_draw_outside_of_any_model_and_one_that_no_trap_sees()
    test_without_a_key_a_draw_is_refused("from a C loop")
    test_under_a_plan_draws_are_keyed_and_one_that_comes_late_is_refused_where_ranks_may_wait()
    test_a_block_cannot_be_done_again()
    test_an_exception_leaves_the_callers_stream()


def test_a_thread_that_has_run_may_have_drawn():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(python_random.random).result()
        before = _settled()
        assert host_draws._all_idle(before)
        pool.submit(python_random.random).result()
        assert not host_draws._all_idle(before)
        assert not host_draws._all_idle(None)  # not measured: any thread might have
        before = _settled()
    assert not host_draws._all_idle(before)  # one has ended
    before = host_draws._other_threads()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        assert not host_draws._all_idle(before)  # one has begun


def test_a_profiler_of_the_caller_stays():
    seen = []

    def profile(frame, event, argument):
        seen.append(event)

    for name in ("np.random.rand", "random.random"):
        step, state = training(DRAWS[name])
        sys.setprofile(profile)
        try:
            first, _ = step(state, X)
            assert sys.getprofile() is profile
        finally:
            sys.setprofile(None)
        assert seen
        assert tree.digest(first) == tree.digest(step(state, X)[0])


# --- the mechanism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", [n for n in DRAWS if n != "a thousand of numpy"])
def test_any_draw_changes_what_is_read_and_is_undone(name, quick, monkeypatch):
    own = global_generators._Generators()
    assert own.quick, "the words of the generators were not found: each step takes 100 us more"
    own.quick = quick
    stir()
    before, whole = own.read(), hosts()
    assert own.read() == before
    DRAWS[name]()
    assert own.read() != before
    own.write(before)
    assert own.read() == before
    assert hosts() == whole


def test_another_bit_generator_of_numpy_is_kept():
    kept = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        expected = np.random.rand(3).tolist()
        np.random.set_bit_generator(np.random.PCG64(3))
        with global_generators.preserved():
            np.random.rand(5)
        assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(kept)


def test_the_trap_is_touched_by_draws_only_and_goes_with_the_first():
    touched = []
    trap = host_draws.Trap(touched.append)
    trap.open()
    python_random.getstate(), np.random.RandomState(3).rand(), python_random.Random(3).gauss(0, 1)
    assert not trap.touched
    np.random.permutation(3)
    assert not isinstance(np.random.get_bit_generator(), host_trap._Trapped)
    assert sys.getprofile() is None
    python_random.random()
    trap.close()
    assert touched == ["numpy.random"]


class Augmented:
    """A data set that draws from the global generators, which `ps.data` seeds for each sample."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = [np.random.randn(), python_random.gauss(0, 1), float(torch.rand(()))]
        return torch.full((3,), float(index)) + torch.tensor(noise, dtype=torch.float32)


@pytest.mark.parametrize("name", ["nothing", "both"])
def test_the_draws_of_a_data_set_and_of_the_model_do_not_meet(name):
    draw = DRAWS.get(name, lambda: 0.5)
    data = ps.data.batches(Augmented(), 4, seed=1)
    expected = [batch.tolist() for batch in data.epoch(0)]
    seen = []

    def noting(net, batch):
        if not batch.is_meta and batch.tolist() not in seen[-1:]:  # the call that drew first was done again
            seen.append(batch.tolist())
        return loss_fn(net, batch)

    tx = ps.optim.sgd(0.001)
    step = ps.make_step(noting, tx)
    stir()
    before = hosts()
    result = ps.fit(step, ps.init(lambda: Drawing(draw), tx), data, until=ps.epochs(1))
    assert hosts() == before
    assert seen == expected
    by_hand = ps.init(lambda: Drawing(draw), tx)
    for batch in data.epoch(0):
        by_hand, _ = step(by_hand, batch)
    assert tree.digest(by_hand) == tree.digest(result.state)


def test_the_line_of_a_library_whose_name_begins_with_torchs():
    file = f"{os.path.dirname(torch.__file__)}vision/boxes.py"
    library: dict[str, object] = {"line": host_trap.calling_line}
    exec(compile("def drawn():\n    return line()\n", file, "exec"), library)
    assert library["drawn"]() == "boxes.py:2 in drawn"
