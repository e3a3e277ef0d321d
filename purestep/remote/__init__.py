"""Copies of a run directory elsewhere, through fsspec: in an object store, on another machine.

`Remote` says where; a run with `fit(..., remote=)` copies its snapshots there, and begins from there on a new machine.
"""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.remote.mirror import Mirror as Mirror
    from purestep.remote.place import Remote as Remote

__getattr__, __dir__ = attach(__name__)
