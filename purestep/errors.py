"""The exception family of purestep.

Every message says what happened, where (path, shape, dtype), why it is refused, and what to write instead.
`explain` puts the four parts in that order, so that messages read alike wherever they come from.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def explain(what: str, *, where: str | None = None, why: str | None = None, instead: str | None = None) -> str:
    """Return the text of an error: what happened, where, why, and what to write instead.

    Args:
        what: one sentence without a full stop.
        where: a path, with shape and dtype where there are any.
        why: the reason it is refused.
        instead: what to write instead; code is welcome and may span lines.

    Examples:
        >>> print(explain("the loss is not a scalar", where="loss: float32[8]", instead="return loss.mean()"))
        the loss is not a scalar
          where:   loss: float32[8]
          instead: return loss.mean()
    """
    lines = [what]
    for label, text in (("where:", where), ("why:", why), ("instead:", instead)):
        if text:
            lines.append(f"  {label:<8} " + text.replace("\n", "\n           "))
    return "\n".join(lines)


def nearest_name(word: str, known: Iterable[str]) -> str:
    """Return the known name most similar to a word, for the advice of an error; "" if none is similar.

    Examples:
        >>> nearest_name("untl", ["until", "seed"]), nearest_name("zzz", ["until"])
        ('until', '')
    """
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else ""


class PurestepError(Exception):
    """Base of every error that purestep raises on purpose."""


class TreeError(PurestepError, ValueError):
    """A pytree holds a leaf, or has a structure, that the call cannot take."""


class KeyShapeError(PurestepError, ValueError):
    """A PRNG key is malformed, or a draw was asked for that keys cannot give."""


class RandomnessError(PurestepError, RuntimeError):
    """Something asked the global random number generators for numbers inside a pure step."""


class StepError(PurestepError, TypeError):
    """A step, a loss function or a model broke the contract of a pure step."""


class MetricError(PurestepError, ValueError):
    """A metric has a name, a value or a weight that cannot be merged or logged."""


class DataError(PurestepError, ValueError):
    """A data set, a batch or a loader cannot be used as asked."""


class OptimError(PurestepError, ValueError):
    """A gradient transformation or a schedule was given something it cannot use."""


class ConfigError(PurestepError, ValueError):
    """Arguments that are each fine do not fit together."""


class PrecisionError(PurestepError, ValueError):
    """A precision policy is malformed, or does not fit the model or the state."""


class TraceError(PurestepError, TypeError):
    """A function that `jit` was given cannot be traced into one graph."""


class CompileError(PurestepError, RuntimeError):
    """A traced function cannot be compiled by the backend that was asked for."""


class OutOfMemory(PurestepError, RuntimeError):
    """A step needs more memory than its device has."""


class DonatedStateError(PurestepError, RuntimeError):
    """A state was used again after a donating step had consumed it."""


class SnapshotError(PurestepError, RuntimeError):
    """A snapshot cannot be written or read."""


class CorruptSnapshot(SnapshotError):
    """Stored bytes are missing, truncated or not the bytes that were saved."""


class TemplateMismatch(SnapshotError):
    """A snapshot is intact, but is not of the structure, shape or dtype that was asked for."""


class SaveFailed(SnapshotError):
    """A save did not become durable; earlier snapshots are untouched."""


class RankError(PurestepError, RuntimeError):
    """The processes of a run differ in what must be the same, or one of them failed or does not answer."""


class MissingExtra(PurestepError, ImportError):
    """A feature needs a package that is an extra of purestep and is not installed."""


def import_extra(module: str, *, extra: str, needed_by: str) -> ModuleType:
    """Import a module that only an extra of purestep brings.

    Args:
        module: dotted name of the module.
        extra: name of the extra, as in `pip install "purestep[extra]"`.
        needed_by: what the user called, as code.

    Raises:
        MissingExtra: the module cannot be imported; the message says what to install.

    Examples:
        >>> try:
        ...     import_extra("no_such_module", extra="plots", needed_by="ui.learning_curves")
        ... except MissingExtra as error:
        ...     print(error)
        ui.learning_curves needs the module no_such_module, which cannot be imported
          why:     No module named 'no_such_module'
          instead: pip install "purestep[plots]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"{needed_by} needs the module {module}, which cannot be imported"
        raise MissingExtra(explain(what, why=str(error), instead=f'pip install "purestep[{extra}]"')) from error
