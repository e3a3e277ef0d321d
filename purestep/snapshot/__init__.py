"""Snapshots: a tree on disk, committed atomically, with a manifest of checksums.

`Store` writes and reads one directory; the functions here look into the snapshots of a run, which `ps.restore` reads.
Importing this loads neither Orbax nor torch.
"""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.snapshot.digest import Scope as Scope
    from purestep.snapshot.header import Base as Base
    from purestep.snapshot.listing import DIRECTORY as DIRECTORY
    from purestep.snapshot.listing import root_of as root_of
    from purestep.snapshot.manifest import Manifest as Manifest
    from purestep.snapshot.manifest import environment as environment
    from purestep.snapshot.of_run import consolidate as consolidate
    from purestep.snapshot.of_run import manifest as manifest
    from purestep.snapshot.of_run import steps as steps
    from purestep.snapshot.processes import Ranks as Ranks
    from purestep.snapshot.reader import Restored as Restored
    from purestep.snapshot.reader import Verify as Verify
    from purestep.snapshot.retention import Keep as Keep
    from purestep.snapshot.retention import all_ as all_
    from purestep.snapshot.retention import best as best
    from purestep.snapshot.retention import every_steps as every_steps
    from purestep.snapshot.retention import latest as latest
    from purestep.snapshot.store import Store as Store

__getattr__, __dir__ = attach(__name__)
