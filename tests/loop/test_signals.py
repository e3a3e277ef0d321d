"""Signals are noted while a run is active, and given back however it is left."""

from __future__ import annotations

import os
import signal
import threading

from purestep.loop.signals import Signals


def test_handlers_are_given_back_when_another_thread_leaves():
    heard = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        signals = Signals().__enter__()
        thread = threading.Thread(target=signals.__exit__)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            if heard:
                break
        assert heard == [signal.SIGTERM]
        assert not signals.unread
    finally:
        signal.signal(signal.SIGTERM, old)
