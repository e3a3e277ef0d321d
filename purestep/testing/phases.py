"""Names of the operations of a run on its directory, equal in every run: the moments at which a fault can strike.

`fine` distinguishes every operation on every file of a snapshot, `coarse` only the stages of a save.
"""

from __future__ import annotations

import re

from purestep.snapshot.durable_directories import MARK

_TEMPORARY = re.compile(re.escape(MARK) + r"[^/]*")
_STAGE = re.compile(r"/snapshots(/(trial|N)(\.tmp)?(/meta|/parts/N/state[^/]*|/parts)?)?")


def fine(operation: str, path: str) -> str:
    """Name an operation on a path below the run directory.

    Examples:
        >>> fine("fsync", "/snapshots/40.purestep-tmp-7-1-ab12cd34/parts/0/state/arena-0/0")
        'fsync /snapshots/N.tmp/parts/N/state/arena-N/N'
    """
    return f"{operation} {re.sub('[0-9]+', 'N', _TEMPORARY.sub('.tmp', path))}"


def coarse(phase: str) -> str:
    """Name the stage of a phase.

    Examples:
        >>> coarse("fsync /snapshots/N.tmp/parts/N/state/arena-N/N"), coarse("unlink /metrics.csv.N.partial")
        ('fsync /snapshots/N.tmp/parts/N/state', 'unlink /metrics.csv')
    """
    operation, _, path = phase.partition(" ")
    found = _STAGE.match(path)
    return f"{operation} {found.group() if found else re.sub(r'[.]N.*', '', path)}"


def in_save(phase: str) -> bool:
    """Tell whether a phase belongs to a save, deletion of older snapshots included.

    Examples:
        >>> [in_save(name) for name in ("rename /snapshots/N.tmp", "rmdir /snapshots/trial.tmp", "open /metrics.csv")]
        [True, False, False]
    """
    return "/snapshots" in phase and "/trial" not in phase
