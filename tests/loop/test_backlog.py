"""A logger behind its queue: rows keep their order, none waits, what is too much is counted, and closing is bounded."""

import threading
import time

import pytest

from purestep.loop import log_queue
from purestep.loop.log_queue import Backlog, DroppedRowsWarning


class Sink:
    """Notes what it is told. It waits for `gate` before each row, and raises on row `broken`."""

    def __init__(self, broken=None):
        self.told, self.gate, self.broken = [], threading.Event(), broken
        self.gate.set()

    def log(self, step, row):
        self.gate.wait(30)
        if step == self.broken:
            raise OSError("no connection")
        self.told.append(step)

    def flush(self):
        self.told.append("flush")

    def close(self):
        self.told.append("close")


@pytest.fixture
def stuck():
    """A backlog whose sink hangs in its first row, until the test is over."""
    sink = Sink()
    sink.gate.clear()
    log = Backlog(sink, "slow()")
    log.log(0, {})
    while log._queue.qsize():
        time.sleep(0.001)
    yield log, sink
    sink.gate.set()
    log._thread.join(10)


def test_rows_keep_their_order_and_a_flush_waits_for_them():
    sink = Sink()
    log = Backlog(sink, "sink")
    for step in range(300):
        log.log(step, {})
        if step % 100 == 99:
            log.flush()
            assert sink.told[-1] == "flush"
    log.close()
    assert sink.told == [*range(100), "flush", *range(100, 200), "flush", *range(200, 300), "flush", "close"]
    assert not log._thread.is_alive()


def test_a_row_never_waits_and_what_is_too_much_is_counted(stuck):
    log, sink = stuck
    began = time.monotonic()
    for step in range(1, log_queue.ROWS + 8):
        log.log(step, {})
    assert time.monotonic() - began < 2
    assert log.dropped == 7
    sink.gate.set()
    with pytest.warns(DroppedRowsWarning, match=r"slow\(\) is slower than training: 7 rows of the log were left out"):
        log.close()
    assert sink.told == [*range(log_queue.ROWS + 1), "close"]


def test_a_flush_is_bounded_and_not_tried_again_while_the_sink_is_behind(stuck):
    log, sink = stuck
    began = time.monotonic()
    log.flush(0.2)
    assert 0.2 <= time.monotonic() - began < 2
    log.flush(30)
    assert time.monotonic() - began < 4
    sink.gate.set()
    while not log._behind.is_set():
        time.sleep(0.001)
    log.flush(30)
    log.close()
    assert sink.told == [0, "flush", "flush", "close"]


@pytest.mark.parametrize("waiting", [3, log_queue.ROWS, log_queue.ROWS + 5])
def test_closing_is_bounded_and_counts_what_is_lost(stuck, waiting):
    log, sink = stuck
    for step in range(waiting):
        log.log(step, {})
    began = time.monotonic()
    with pytest.warns(DroppedRowsWarning, match=f": {waiting + 1} rows of the log were left out"):
        log.close(0.2)
    assert time.monotonic() - began < 2
    sink.gate.set()  # a thread that comes free later still writes what it has, and ends
    log._thread.join(10)
    assert not log._thread.is_alive()
    assert sink.told[-1] == "close"


def test_what_a_sink_raises_comes_out_of_the_next_call_and_of_close():
    for call in (lambda log: log.log(2, {}), lambda log: log.flush(), lambda log: log.close()):
        sink = Sink(broken=1)
        log = Backlog(sink, "sink")
        log.log(1, {})
        while log._error is None:
            time.sleep(0.001)
        with pytest.raises(OSError, match="no connection"):
            call(log)
        with pytest.raises(OSError, match="no connection"):
            log.close()
        assert sink.told[-1] == "close"
