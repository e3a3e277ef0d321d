"""`on_saved`: your own function, called with the directory of each snapshot once it is durable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from purestep.arguments import Name, checked
from purestep.callbacks.base import Reducer
from purestep.errors import ConfigError
from purestep.loop.events import Event, LoopState, Saved
from purestep.loop.resume import store_root
from purestep.loop.roles import Observer
from purestep.snapshot.listing import Index


@dataclasses.dataclass(frozen=True)
class OnSaved(Reducer, Observer):
    """See `on_saved`."""

    function: Callable[[Path, int], object] = dataclasses.field(repr=False)
    name: str

    def identity(self) -> None:
        """Return None: it cannot change the run."""

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Sink:
        return _Sink(self.function, None if run_dir is None else Index(store_root(run_dir)))


@dataclasses.dataclass(frozen=True)
class _Sink:
    function: Callable[[Path, int], object]
    index: Index | None

    def receive(self, event: Event, loop: LoopState) -> None:
        if isinstance(event, Saved) and self.index is not None:
            for entry in self.index.entries():
                if entry.step == event.step and entry.header is not None:
                    self.function(entry.path, event.step)

    def close(self) -> None:
        """Nothing is held open."""


@checked(ConfigError)
def on_saved(function: Callable[[Path, int], object], *, name: Name = "on_saved") -> OnSaved:
    """Call a function with the directory of each snapshot, once it is durable: to copy it, or to start an evaluation.

    It is called between two steps, in the first process of a run; training waits for it. It cannot change the run; if
    it raises, it is reported and left out, and training goes on. The preservation policy may delete the snapshot when
    the next one is durable. For copies through fsspec there is `fit(..., remote=)`, which does not wait.

    Args:
        function: `function(directory, step)`; `step` counts batches.
        name: of the callback.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> data, saved = ps.data.batches({"x": torch.ones(8, 2)}, 4), []
        >>> watch = ps.callbacks.on_saved(lambda directory, step: saved.append((directory.name, step)))
        >>> _ = ps.fit(step, state, data, until=ps.steps(3), run_dir=tempfile.mkdtemp(), callbacks=[watch])
        >>> saved
        [('3', 3)]
    """
    return OnSaved(function, name)
