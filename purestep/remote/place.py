"""`Remote`: where the copy of a run directory is, as a value; looking into it, and bringing a run from there."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from purestep import _cells
from purestep.arguments import Count, Location, Name, NonNegative, checked
from purestep.errors import ConfigError, explain
from purestep.remote.files import Files
from purestep.snapshot.retention import Keep, all_

if TYPE_CHECKING:
    from purestep.remote.mirror import Mirror


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Remote:
    """The copy of a run directory elsewhere, through fsspec; `fit(..., remote=)` keeps it up to date.

    Args:
        url: of a directory of its own for the run: "s3://bucket/runs/a", "gs://...", "hf://datasets/me/runs/a",
            "file:///disk/runs/a", "memory://a", or any other that fsspec knows.
        keep: which snapshots are kept there; those that the run keeps on its disk by default.
        on_error: when a copy fails: "continue" warns and tries again later, "stop" ends the run.
        tries: how often each operation is tried before it counts as failed, at least 1.
        pause: seconds before the second try; twice as long before each further one, 30 at most.
        storage_options: what the file system of the url takes, see fsspec: credentials, endpoints. They are not shown.

    Raises:
        ConfigError: the url has no protocol.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> data, remote = ps.data.batches({"x": torch.ones(8, 2)}, 4), ps.Remote("memory://example")
        >>> first = ps.fit(step, state, data, until=ps.steps(3), run_dir=tempfile.mkdtemp(), remote=remote)
        >>> remote.steps()
        [3]
        >>> elsewhere = ps.fit(step, state, data, until=ps.steps(5), run_dir=tempfile.mkdtemp(), remote=remote)
        >>> straight = ps.fit(step, state, data, until=ps.steps(5))
        >>> ps.digest(elsewhere.state) == ps.digest(straight.state), remote.steps()
        (True, [5])
    """

    url: Name
    _: dataclasses.KW_ONLY
    keep: Keep | None = None
    on_error: Literal["continue", "stop"] = "continue"
    tries: Count = 5
    pause: NonNegative[float] = 1.0
    storage_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        if "://" not in str(self.url):
            raise ConfigError(
                explain(
                    "the url of a remote copy has no protocol",
                    where=f"url={self.url!r}",
                    instead='"s3://bucket/runs/a", or "file:///disk/runs/a" for a directory of this machine',
                )
            )

    def open(self, halted: threading.Event | None = None) -> Files:
        """Return the files there.

        Args:
            halted: set when the caller gives up.

        Raises:
            ConfigError: fsspec does not know such a url.
            MissingExtra: what fsspec needs for it is not installed.
        """
        return Files(self.url, self.storage_options, tries=self.tries, pause=self.pause, halted=halted)

    def mirror(self, run_dir: Path, keep: Keep) -> Mirror:
        """Return what keeps the copy of a run directory up to date, under the preservation policy of its store."""
        from purestep.remote.mirror import Mirror

        return Mirror(self.open, run_dir, keep, self.keep or keep)

    def steps(self) -> list[int]:
        """Return the steps of the complete snapshots there, in order.

        Raises:
            SnapshotError: the place does not answer.
        """
        from purestep.remote import copies

        return sorted(copies.current(copies.listed(self.open())))

    def fetch(self, run_dir: Location, *, step: int | None = None) -> Path:
        """Bring a run here: its record, and its snapshots, each verified; `ps.open` and `ps.restore` read it then.

        Args:
            run_dir: where to; no run may use it meanwhile. Snapshots that are there stay, other files are replaced.
            step: only this snapshot; all by default.

        Returns:
            The run directory.

        Raises:
            CorruptSnapshot: no copy is intact, or not that of `step`.
            SnapshotError: there is no copy, or the place does not answer.
        """
        from purestep.remote import copies
        from purestep.remote.pull import pull

        files, target = self.open(), _cells.located(run_dir)
        found = copies.listed(files)
        chosen = [copy for copy in found if step is None or copy.header.step == step]
        pull(files, chosen, copies.record(files), target, all_(), step=step)
        return target

    def push(self, run_dir: Location) -> list[int]:
        """Copy what is missing there of a run that is not going on; nothing is deleted there.

        Args:
            run_dir: the run directory.

        Returns:
            The steps of the complete snapshots there.

        Raises:
            SnapshotError: the place does not answer.
        """
        mirror = self.mirror(_cells.located(run_dir), all_())
        mirror.update(prune=False)
        return mirror.steps()
