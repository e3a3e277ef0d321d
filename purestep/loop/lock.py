"""The exclusive lock of a run directory: one process owns it, and the lock dies with that process.

`flock` holds it where the file system has locks. Elsewhere a lease does: a file that names host and process, whose time
the owner renews. The lock also knows the directory it was taken in, and tells when the path names another one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import socket
import stat
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from purestep.errors import ConfigError, SnapshotError, explain

LEASE = "lock.lease"
RENEW_SECONDS, STALE_SECONDS = 10.0, 60.0
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}

# The locks that this process holds, by device and inode of the run directory. A fork copies their descriptors, and
# with them a `flock`: it would live as long as any forked DataLoader worker. So a child closes its copies at once.
_held: dict[tuple[int, int], Lock] = {}
_changing = threading.RLock()  # held while a process forks, so that no child misses a descriptor


def _disown() -> None:
    for lock in _held.values():
        lock.disown()
    _held.clear()
    _changing.release()


os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_disown)


class _Holder(Protocol):
    """What keeps other processes out: `flock`, or a lease."""

    def close(self) -> None: ...

    def disown(self) -> None:
        """Forget the holder in a forked child, without releasing what the parent holds."""

    def lost(self) -> str | None:
        """Return how another process came to own the directory; None while this one does."""


class Lock:
    """An exclusive lock on a run directory, which dies with its process, or outlives the run that still writes.

    Args:
        run_dir: an existing directory.

    Raises:
        ConfigError: another run holds it, in a living process or in this one.
        SnapshotError: a file of the lock is a symbolic link, or no regular file.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run_dir, Lock(Path(run_dir)) as lock:
        ...     print(lock.trouble())
        None
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._kept = False
        self._directory = -1
        self._holder: _Holder | None = None

    def __enter__(self) -> Self:
        if _is_held(self.run_dir):
            gc.collect()  # a run that a cell has left by an error holds itself, in a cycle with its generator
        with _changing:
            self._directory = os.open(self.run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                key = _identity(os.fstat(self._directory))
                if key in _held:
                    raise _refused_here(self.run_dir)
                self._holder = _hold(self.run_dir, self._directory)
            except BaseException:
                os.close(self._directory)
                raise
            _held[key] = self
        return self

    def trouble(self) -> str | None:
        """Return what became of the run directory when its path names another one, or none; None while all is well."""
        held = os.fstat(self._directory)
        try:
            same = _identity(os.stat(self.run_dir)) == _identity(held)
        except OSError:
            same = False
        if not same:
            return _moved(self.run_dir, self._directory, held)
        return self._holder.lost() if self._holder is not None else None

    def keep_while(self, busy: Callable[[float], bool]) -> None:
        """Hold it on, beyond the end of the run, until nothing is busy any more."""

        def wait() -> None:
            while busy(threading.TIMEOUT_MAX):
                pass
            self._release()

        self._kept = True
        threading.Thread(target=wait, name="purestep-lock", daemon=True).start()

    def disown(self) -> None:
        """Close this process's copies of the descriptors, after a fork: the lock stays the parent's."""
        os.close(self._directory)
        if self._holder is not None:
            self._holder.disown()
        self._holder = None

    def __exit__(self, *error: object) -> None:
        if not self._kept:
            self._release()

    def _release(self) -> None:
        with _changing:
            if self._holder is None:  # a forked child leaves the `with` block of its parent
                return
            _held.pop(_identity(os.fstat(self._directory)), None)
            self._holder.close()
            self._holder = None
            os.close(self._directory)


def _refused(run_dir: Path, holder: str, instead: str = "wait for it, end it, or use another run_dir=") -> ConfigError:
    return ConfigError(
        explain(
            "another process is running in this run directory",
            where=f"{run_dir}, {holder}",
            why="two runs would overwrite each other's snapshots",
            instead=instead,
        )
    )


def _refused_here(run_dir: Path) -> ConfigError:
    return ConfigError(
        explain(
            "another run of this very process uses this run directory",
            where=f"{run_dir}, process {os.getpid()}",
            why="two runs would overwrite each other's snapshots",
            instead="end that run first: drain the iterator of ps.run or drop it, or wait for its last snapshot\n"
            "or another run_dir=",
        )
    )


def _is_held(run_dir: Path) -> bool:
    try:
        return _identity(os.stat(run_dir)) in _held
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _moved(run_dir: Path, directory: int, held: os.stat_result) -> str:
    now = None
    with contextlib.suppress(OSError):  # only Linux tells the path of a descriptor
        now = os.readlink(f"/proc/self/fd/{directory}")
    if held.st_nlink == 0 or (now is not None and now.endswith(" (deleted)")):
        what, place = "the run directory was deleted while the run used it", "it is gone, with all that was in it"
    else:
        what = "the run directory was moved while the run used it"
        place = f"it is at {now} now" if now is not None else "it is elsewhere now"
    return explain(
        what,
        where=f"{run_dir}; {place}",
        why="a new directory of that name would hold a part of the run, and might belong to another one",
        instead="move it back, or stop this run and start it again with run_dir= where it is now",
    )


def _open_file(name: str, directory: int, run_dir: Path, flags: int) -> int:
    """Open a file of the lock, in the directory itself: never what a symbolic link of that name leads to."""
    try:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _not_ours(run_dir / name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_ours(run_dir / name)
    return descriptor


def refuse_link(path: Path) -> None:
    """Refuse a directory in a run directory that leads out of it.

    Raises:
        SnapshotError: the path is a symbolic link.
    """
    if path.is_symlink():
        raise _not_ours(path)


def _not_ours(path: Path) -> SnapshotError:
    return SnapshotError(
        explain(
            "something in the run directory is a symbolic link, or no file of ours",
            where=str(path),
            why="to write there would change what lies outside of the run directory, and its lock does not cover that",
            instead="remove it, or use another run_dir=; the run directory itself may be a link to another disk",
        )
    )


# --- flock ------------------------------------------------------------------------------------------------------------


def _hold(run_dir: Path, directory: int) -> _Holder:
    descriptor = _open_file("lock", directory, run_dir, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        try:
            if error.errno in _NO_LOCKS:
                return _leased(run_dir, directory, error)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            raise _refused(run_dir, f"process {holder}") from error
        finally:
            os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return _Flock(descriptor)


class _Flock:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # for a child that was forked and has not closed its copy yet, too
        os.close(self._descriptor)

    def disown(self) -> None:
        os.close(self._descriptor)  # the open file is the parent's, too, so this releases nothing

    def lost(self) -> str | None:
        return None


# --- a lease, where there are no locks --------------------------------------------------------------------------------


def _leased(run_dir: Path, directory: int, error: OSError) -> _Holder:
    lease = _Lease(run_dir, directory)
    lease.take()
    text = explain(
        "the file system of the run directory has no locks; a lease keeps other runs out instead",
        where=f"{run_dir}: {error.strerror}",
        why=f"the lease is a file that this process renews every {RENEW_SECONDS:.0f} s. It is void when the process is "
        f"dead, and to other machines {STALE_SECONDS:.0f} s after it was renewed last",
        instead="do not start two runs in this directory at the same moment, or use a file system with locks",
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return lease


class _Lease:
    """A file `lock.lease` that names its owner, and a thread that renews the file's time while the process lives.

    Ages are differences of two times that the file system itself has set, so the clocks of machines need not agree.
    """

    def __init__(self, run_dir: Path, directory: int) -> None:
        self._run_dir = run_dir
        self._directory = os.dup(directory)
        self._owner = {**_place(), "pid": os.getpid(), "started": _started(os.getpid()), "token": os.urandom(8).hex()}
        self._ended = threading.Event()
        self._closing = threading.Lock()  # so that the thread never uses the number of a closed descriptor

    def take(self) -> None:
        """Write the lease, over a stale one.

        Raises:
            ConfigError: its owner lives, as far as can be told from here.
        """
        mine = f"{LEASE}.{self._owner['token']}"
        try:
            descriptor = _open_file(mine, self._directory, self._run_dir, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._owner, file)
            self._refuse_living(os.stat(mine, dir_fd=self._directory).st_mtime)
            # A rename replaces the link itself where the name is one. Of two that take it at once the last one wins.
            os.rename(mine, LEASE, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(mine, dir_fd=self._directory)
            os.close(self._directory)
            raise
        threading.Thread(target=self._renew, name="purestep-lease", daemon=True).start()

    def _refuse_living(self, now: float) -> None:
        owner, renewed = self._read()
        if owner is None:
            return
        if all(owner.get(name) == value for name, value in _place().items()):
            pid = owner.get("pid")
            if type(pid) is int and _started(pid) is not None and _started(pid) == owner.get("started"):
                raise _refused(self._run_dir, f"process {pid}")
        elif now - renewed < STALE_SECONDS:
            holder = f"process {owner.get('pid')} on {owner.get('host')}, seen {max(0.0, now - renewed):.0f} s ago"
            again = f"wait for it or end it; the lease is void {STALE_SECONDS:.0f} s after it was last seen"
            raise _refused(self._run_dir, holder, f"{again}; or use another run_dir=")

    def _read(self) -> tuple[dict[str, Any] | None, float]:
        """Return what the lease says of its owner (None for no lease), and when it was renewed."""
        try:
            descriptor = _open_file(LEASE, self._directory, self._run_dir, os.O_RDONLY)
        except FileNotFoundError:
            return None, 0.0
        with os.fdopen(descriptor, "rb") as file:
            content, renewed = file.read(10_000), os.fstat(file.fileno()).st_mtime
        try:
            owner = json.loads(content)
        except (ValueError, RecursionError):
            owner = None
        return owner if isinstance(owner, dict) else {}, renewed

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError), self._closing:
                if not self._ended.is_set() and self.lost() is None:
                    os.utime(LEASE, dir_fd=self._directory)

    def lost(self) -> str | None:
        try:
            owner, _ = self._read()
        except (OSError, SnapshotError):
            owner = {}
        if owner is not None and owner.get("token") == self._owner["token"]:
            return None
        other = owner or {}
        return explain(
            "another run has taken this run directory over",
            where=f"{self._run_dir}, process {other.get('pid', 'unknown')} on {other.get('host', 'unknown')}",
            why=f"the file system has no locks, and this process did not renew its lease for {STALE_SECONDS:.0f} s",
            instead="end this run; the other one goes on from the last snapshot",
        )

    def close(self) -> None:
        self._ended.set()
        with self._closing:
            if self.lost() is None:
                with contextlib.suppress(OSError):
                    os.unlink(LEASE, dir_fd=self._directory)
            os.close(self._directory)

    def disown(self) -> None:
        os.close(self._directory)  # a forked child has no thread that renews, and takes no lock another thread may hold


def _place() -> dict[str, str]:
    """Return where a process number means one process: the host, its boot and the namespace of its processes."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> str | None:
    """Return when a living process of this machine started, in the kernel's ticks; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)  # without /proc all that can be told is whether the number is in use
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    except OSError:
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]
