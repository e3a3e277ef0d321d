"""The processes of a run, and what they tell each other: small values, at named moments.

Owns joining (`launchers` reads who started them), the exchange of Python values over a gloo group of its own, and
saying which rank did not answer. It moves no tensors of a model; without several processes every function is the
identity.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import os
import pickle
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from purestep import devices
from purestep.arguments import Positive, checked
from purestep.distributed import _torch, launchers
from purestep.distributed.join import join
from purestep.errors import ConfigError, RankError, explain

T = TypeVar("T")
_SLOT = 1024  # bytes a rank sends at once; what is longer follows in a second exchange
# In the messages of collectives whose other side is gone; gloo gives them no type of their own.
_SIGNS = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting", "pair closure")
_GRACE = 3.0  # seconds in which the ranks that wait say so, when one does not answer


@dataclasses.dataclass
class _Membership:
    """What this process knows of the others."""

    timeout: float = 600.0
    owner: Any = None  # the default process group that `group` belongs to
    group: Any = None
    joined: bool = False  # whether the default group is ours to leave
    position: str = "the start"
    heard: dict[int, str] = dataclasses.field(default_factory=dict)
    failed: bool = False
    warned: bool = False  # whether it was said that this process is alone where several tasks have room


_me = _Membership()


def rank() -> int:
    """Return the number of this process, 0 when it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    launch = _launch()
    return launch.rank if launch else 0


def size() -> int:
    """Return the number of processes of this job: those of the process group, or those that a launcher started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    launch = _launch()
    return launch.size if launch else 1


def neighbours() -> int:
    """Return how many processes of this job share this machine, this one included, as far as its launcher says so."""
    launch = _launch()
    return max(launch.local_size, 1) if launch and size() > 1 else 1


def _launch() -> launchers.Launch | None:
    return launchers.launch_of() if dist.is_available() else None


@checked(ConfigError)
def initialize(*, backend: str | None = None, timeout: Positive[float] | None = None) -> bool:
    """Join the processes of this job. Plans and `fit` call it; call it first to choose its arguments.

    The job was started by torchrun (on one machine or several, also by Kubeflow and TorchX), by SLURM's `srun`, or by
    the `mpirun` or `mpiexec` of an MPI: `purestep.distributed.launchers` reads their environment variables, and sets
    those of torchrun from them, which torch and other libraries look for.

    Nothing happens in a process that is alone, or whose process group there is already (the timeout is taken over for
    the exchanges of this module).

    Args:
        backend: of `torch.distributed`; by default gloo, and NCCL or XCCL for tensors on the card that is the default
            device (`ps.default_device`). That card becomes the current one, unless the backend is gloo alone.
        timeout: seconds after which a rank that does not answer is an error; 600 by default.

    Returns:
        Whether there are several processes.

    Raises:
        ConfigError: the timeout is not positive; or the environment is that of one of several processes and does not
            say how to find the others, with the variables that are there and what to type.
        RankError: not all processes came within the timeout.
    """
    if timeout is not None:
        if not timeout > 0:
            raise ConfigError(explain("a timeout is a positive number of seconds", where=f"timeout={timeout!r}"))
        _me.timeout = float(timeout)
    if not _several():
        return False
    if not dist.is_initialized():
        backend = backend or devices.backend()
        devices.select(devices.of_backend(backend))
        try:
            join(backend, _me.timeout)
        except RuntimeError as error:
            raise RankError(
                explain(
                    f"rank {rank()} of {size()} could not join the others within {_me.timeout:g} s",
                    where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
                    why=_brief(error),
                )
            ) from error
        _me.joined = True
        atexit.register(_leave)
    return True


def _several() -> bool:
    """Whether this job has several processes; a group that is there already has the last word."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    if launchers.adopt() is not None:
        return True
    text = None if _me.warned else launchers.alone_in_allocation()
    if text is not None:
        _me.warned = True
        warnings.warn(text, launchers.LauncherWarning, stacklevel=3)
    return False


def _leave() -> None:
    # A group with a dead member may not be left in order; the end of the process does it.
    if _me.joined and not _me.failed and dist.is_initialized():
        _me.owner = _me.group = None
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def timeout() -> float:
    """Return the seconds after which a rank that does not answer is an error."""
    return _me.timeout


def at(position: str) -> None:
    """Say where this process is (`batch 40`): for the messages of all ranks, when one fails or does not answer."""
    _me.position = position


# --- exchanging values ------------------------------------------------------------------------------------------------


def gather(value: T, *, what: str = "a value") -> list[T]:
    """Return the values of all ranks, in their order. Collective: every rank calls it, with the same `what`.

    Args:
        value: a small Python value that can be pickled.
        what: what is exchanged; ranks that exchange different things are told so instead of being mixed up.

    Raises:
        RankError: a rank failed, did not answer within the timeout, or is elsewhere in the program.

    Examples:
        >>> gather({"a": 1})
        [{'a': 1}]
    """
    if not initialize():
        return [value]
    try:
        messages = _exchange(pickle.dumps((what, _me.position, value)))
    except RuntimeError as error:
        raise lost(error, what) from error
    entries = [pickle.loads(message) for message in messages]
    _me.heard = {number: position for number, (_, position, _) in enumerate(entries)}
    if len({label for label, _, _ in entries}) > 1:
        _me.failed = True
        raise RankError(
            explain(
                "the ranks are at different places in the program",
                where="; ".join(f"{_ranks([n])}: {label} ({at})" for n, (label, at, _) in enumerate(entries)),
                why="they decided differently, from different data, arguments or code",
            )
        )
    return [value for _, _, value in entries]


def broadcast(value: T, *, what: str = "a value") -> T:
    """Return the value of rank 0. Collective, like `gather`; what the other ranks give is not looked at.

    Examples:
        >>> broadcast(3)
        3
    """
    if not initialize():
        return value
    first: Any = gather(value if rank() == 0 else None, what=what)[0]
    return cast(T, first)


def agree(value: T, *, what: str, instead: str | None = None) -> T:
    """Return the value, which has to be the same on every rank. Collective.

    Raises:
        RankError: on every rank, with the ranks that differ.

    Examples:
        >>> agree(4, what="microbatches")
        4
    """
    agree_each({what: value}, what=what, instead=instead)
    return value


def agree_each(values: Mapping[str, object], *, what: str, instead: str | None = None) -> None:
    """Check that named values are the same on every rank: in one exchange. Collective.

    Args:
        values: by name, the same names everywhere; compared by their repr.
        what: what is exchanged, as in `gather`.
        instead: what to do about a difference.

    Raises:
        RankError: on every rank, with what differs and between which ranks.
    """
    texts = gather({name: repr(value) for name, value in values.items()}, what=what)
    refuse_different(
        {name: {n: entry.get(name, "nothing") for n, entry in enumerate(texts)} for name in texts[0]}, instead=instead
    )


def refuse_different(values: Mapping[str, Mapping[int, str]], *, instead: str | None = None) -> None:
    """Refuse values that are not the same on every rank; what each rank has is known here already.

    Args:
        values: by name, the text of each rank.
        instead: what to do about a difference.

    Raises:
        RankError: with what differs and between which ranks.
    """
    differences = []
    for name, texts in values.items():
        groups: dict[str, list[int]] = {}
        for number, text in texts.items():
            groups.setdefault(text, []).append(number)
        if len(groups) > 1:
            shown = "; ".join(f"{_ranks(numbers)}: {_short(text)}" for text, numbers in groups.items())
            differences.append((name, f"{name}: {shown}"))
    if not differences:
        return
    _me.failed = True
    raise RankError(
        explain(
            f"the ranks differ in {', '.join(name for name, _ in differences)}",
            where="\n".join(text for _, text in differences),
            why="every rank runs the same program on the same values; only the rows of a batch differ",
            instead=instead,
        )
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _exchange(data: bytes) -> list[bytes]:
    group, count = _control(), size()
    # All ranks have to send the same number of bytes, and none knows how many the others have: so a slot of fixed size
    # with the length in front, and the rest, if any rank has one, in a second exchange of the greatest length.
    head = torch.zeros(_SLOT, dtype=torch.uint8)
    head[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    first = data[: _SLOT - 8]
    head[8 : 8 + len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
    heads = [torch.empty_like(head) for _ in range(count)]
    dist.all_gather(heads, head, group=group)
    raw = [bytes(h.numpy()) for h in heads]
    lengths = [int.from_bytes(r[:8], "little") for r in raw]
    longest = max(lengths)
    firsts = [r[8 : 8 + n] for r, n in zip(raw, lengths, strict=True)]
    if longest <= _SLOT - 8:
        return firsts
    rest = torch.zeros(longest - (_SLOT - 8), dtype=torch.uint8)
    mine = data[_SLOT - 8 :]
    if mine:
        rest[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    rests = [torch.empty_like(rest) for _ in range(count)]
    dist.all_gather(rests, rest, group=group)
    return [
        first + bytes(r.numpy())[: max(n - (_SLOT - 8), 0)] for first, r, n in zip(firsts, rests, lengths, strict=True)
    ]


def _control() -> dist.ProcessGroup | None:
    """A group of our own, so that exchanges never meet the collectives of a step; made when first used."""
    owner = dist.group.WORLD
    if _me.owner is not owner:
        _me.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_me.timeout))
        _me.owner = owner
    return _me.group


# --- when a rank is lost ----------------------------------------------------------------------------------------------


def failed(error: BaseException) -> None:
    """Leave word for the other ranks why this one ends. Its own error goes on; they find the word when they miss it."""
    _me.failed = True
    if isinstance(error, RankError):
        return  # what others did, which they tell themselves
    if dist.is_available() and dist.is_initialized() and size() > 1:
        _note("failed", f"failed at {_me.position}: {_brief(error)}")


def is_lost(error: BaseException) -> bool:
    """Tell whether an error comes from a collective that others did not take part in."""
    if isinstance(error, RankError) or not isinstance(error, RuntimeError) or size() == 1:
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(sign in text for sign in _SIGNS)


def lost(error: BaseException, what: str) -> RankError:
    """Return the error that says which rank did not answer, from what all of them left as word."""
    _me.failed = True
    _note("waited", f"waited for the others at {_me.position}")
    words = _words()
    mine = rank()
    silent = [n for n in range(size()) if n not in words and n != mine]
    told = [f"rank {n} {word}" for n, word in sorted(words.items()) if n != mine]
    told += [f"rank {n} says nothing; it was last heard of at {_me.heard.get(n, 'the start')}" for n in silent]
    return RankError(
        explain(
            f"rank {mine} got no answer from the others in {what} at {_me.position}",
            where="; ".join(told),
            why=f"{_brief(error)} (timeout: {_me.timeout:g} s)",
            instead="start again: a run with a run_dir continues at its last snapshot; "
            "torchrun --max-restarts=3 does that by itself",
        )
    )


def _note(kind: str, text: str) -> None:
    with contextlib.suppress(Exception):
        _board().set(f"{kind}/{rank()}", text)


def _words() -> dict[int, str]:
    """What the ranks left as word, waiting a moment for those that are about to."""
    found: dict[int, str] = {}
    end = time.monotonic() + _GRACE
    while len(found) < size() and time.monotonic() < end:
        for number in range(size()):
            for kind in ("failed", "waited"):
                with contextlib.suppress(Exception):
                    board = _board()
                    if board.check([f"{kind}/{number}"]):
                        found[number] = board.get(f"{kind}/{number}").decode()
                        break
        if any(word.startswith("failed") for word in found.values()):
            break
        time.sleep(0.05)
    return found


def _board() -> dist.Store:
    return dist.PrefixStore("purestep", _torch.default_store())


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _brief(error: BaseException) -> str:
    """The first line of an error, without what gloo wraps around it."""
    text = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"^\[\S+\.cc:\d+\] ", "", text).split(". This is typically caused by")[0]
    return f"{type(error).__name__}: {text}"[:400]
