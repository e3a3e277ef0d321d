"""Where the time of a run goes: by part, without what runs inside of it, and no part of what a run is."""

import time

import pytest
import torch

import purestep as ps
from purestep.loop.stopwatch import Stopwatch


def test_a_part_does_not_count_those_inside_of_it(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.part("step"):  # from 0 to 1, 3 to 7, 15 to 31
        for _ in watch.over("data", [None]):  # 1 to 3; 7 to 15 finds that there is no more
            pass
    assert watch.seconds == {"step": 1.0 + 4.0 + 16.0, "data": 2.0 + 8.0}


def test_seconds_move_from_the_open_part_to_another(monkeypatch):
    now = iter([0.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.part("step"):
        watch.move("data", 2.0)
        watch.move("data", 8.0)
    assert watch.seconds == {"step": 21.0, "data": 10.0}


def test_an_error_ends_its_parts():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch.part("step"):
        list(watch.over("data", (1 / n for n in (1, 0))))
    before = dict(watch.seconds)
    with watch.part("save"):
        pass
    assert {name: watch.seconds[name] for name in before} == before


def test_a_run_says_where_its_time_went(tmp_path):
    def slow_batches(epoch):
        for _ in range(4):
            time.sleep(0.02)
            yield {"x": torch.ones(2, 3)}

    def loss_fn(net, batch):
        return net(batch["x"]).square().mean()

    def slow_loss(net, batch):
        time.sleep(0.01)
        return loss_fn(net, batch)

    tx = ps.optim.sgd(0.1)
    began = time.perf_counter()
    result = ps.fit(
        ps.make_step(loss_fn, tx),
        ps.init(lambda: torch.nn.Linear(3, 1), tx),
        slow_batches,
        until=ps.epochs(2),
        run_dir=tmp_path / "a",
        callbacks=[ps.callbacks.evaluate(slow_loss, [{"x": torch.ones(2, 3)}] * 3, name="held_out")],
    )
    seconds, whole = result.seconds, time.perf_counter() - began
    assert {"data", "step", "check", "evaluate", "save"} <= set(seconds)
    assert seconds["data"] >= 8 * 0.02
    assert seconds["evaluate"] >= 2 * 3 * 0.01
    assert sum(seconds.values()) <= whole
    assert "seconds" not in str(result)  # two runs of the same bits show the same
