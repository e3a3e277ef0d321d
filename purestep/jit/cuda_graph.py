"""CUDA graphs of donated steps: the whole compiled call is recorded once and replayed with one launch.

A recording reads and writes fixed addresses. A donated state stays where it is, so only the batch is copied in and the
small outputs (metrics) are copied out. Nothing waits for the device. Kernels that draw are seeded before each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.random.card_dropout import Recording

Run = Callable[[list[Tensor]], Sequence[Any]]
Work = Callable[[], Sequence[Any]]
Record = Callable[[Work, Sequence[torch.Generator]], tuple[Callable[[], None], Sequence[Any]]]


class Replay:
    """Run a compiled graph from a recording.

    Args:
        run: the compiled graph; it overwrites the donated inputs.
        donated: positions of the donated inputs.
        record: captures the work of a function without running it, which draws from the generators; returns a function
            that replays it, and the tensors that will hold the outputs.
    """

    def __init__(self, run: Run, donated: Sequence[int], record: Record | None = None) -> None:
        self._run = run
        self._donated = frozenset(donated)
        self._record = record or _record_cuda
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._outputs: Sequence[Any] = ()
        self._drawing = Recording()

    def __call__(self, tensors: list[Tensor]) -> Sequence[Any]:
        if self._replay is None or self._moved(tensors):
            self._start(tensors)
        else:
            for i, (held, given) in enumerate(zip(self._inputs, tensors, strict=True)):
                if i not in self._donated:
                    held.copy_(given, non_blocking=True)
        if self._replay is not None:
            self._drawing.seed()
            self._replay()
        # The next replay writes into the same memory.
        return [output.clone() for output in self._outputs]

    def _moved(self, tensors: list[Tensor]) -> bool:
        """Tell whether the state has other addresses than the recorded one, which the recording would write to."""
        return any(self._inputs[i].data_ptr() != tensors[i].data_ptr() for i in self._donated)

    def _start(self, tensors: list[Tensor]) -> None:
        self._replay, self._outputs = None, ()
        self._inputs = [x if i in self._donated else x.clone() for i, x in enumerate(tensors)]
        self._drawing = Recording()
        # The first run loads and tunes kernels: it must not be recorded, and must not change the state.
        with self._drawing.active(ready=False):
            self._run([x.clone() for x in self._inputs])
        with self._drawing.active(ready=True):
            self._replay, self._outputs = self._record(lambda: self._run(list(self._inputs)), self._drawing.generators)


def _record_cuda(work: Work, generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], Sequence[Any]]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = work()
    return graph.replay, outputs
