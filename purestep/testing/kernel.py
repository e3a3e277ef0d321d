"""Faults by the operating system: refuse the writes of a process, enforce permissions, mount a small disk.

So a fault affects every line that uses the disk, also in C++ libraries. Linux only, and partly only for root; the
functions `*_why_not` return the reason why a fault is impossible on this machine.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

# Numbers of system calls by machine, because seccomp filters by number.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS: dict[str, dict[str, tuple[int, ...]]] = {
    "x86_64": {
        "write": (1,),
        "store": (18, 20, 40, 77, 285, 296, 326, 328),  # pwrite, writev, sendfile, ftruncate, fallocate, ...
        "sync": (74, 75, 277),
        "open": (2,),
        "openat": (257,),
        "make": (83, 85, 258),  # mkdir, creat, mkdirat
        "move": (82, 84, 86, 87, 88, 263, 264, 265, 266, 316),  # rename, rmdir, link, unlink, symlink, ...
    },
    "aarch64": {
        "write": (64,),
        "store": (46, 47, 66, 68, 70, 71, 285, 287),
        "sync": (82, 83, 84),
        "open": (),
        "openat": (56,),
        "make": (34,),
        "move": (35, 36, 37, 38, 276),
    },
}
# The refused system calls of each error: a full disk still renames and deletes, a read-only disk does nothing.
_REFUSED = {
    errno.ENOSPC: ("write", "store", "make", "creating"),
    errno.EIO: ("write", "store", "sync"),
    errno.EROFS: ("make", "move", "creating", "opening"),
}
_SET_NO_NEW_PRIVS, _SECCOMP_SET_FILTER, _ALL_THREADS = 38, 1, 1
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# --- refusing ---------------------------------------------------------------------------------------------------------


@functools.cache
def refusing_why_not() -> str:
    """Return why system calls of a process cannot be refused on this machine; "" if they can."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return "needs Linux on x86-64 or arm64"
    # A filter cannot be removed, so it is tried in another process, which loads only this file.
    trial = f"import os, runpy\nrunpy.run_path({__file__!r})['refuse']({errno.EIO}, [])\nos._exit(0)"
    done = subprocess.run([sys.executable, "-I", "-c", trial], capture_output=True, check=False, timeout=60)
    return "" if done.returncode == 0 else "needs seccomp, which this system does not let a process use"


def refuse(number: int, spared: Iterable[int]) -> None:
    """Make the kernel refuse disk operations from now on, in all threads of this process; this cannot be undone.

    Args:
        number: the error: ENOSPC, EIO or EROFS. As on a real disk, the error determines the refused operations.
        spared: descriptors that may be written to, besides the open pipes and sockets.

    Raises:
        OSError: the kernel refuses the filter.
    """
    machine, kinds = platform.machine(), _REFUSED[number]
    calls, answer = _CALLS[machine], _ERRNO | number
    rules: list[list[bytes]] = []
    for kind in kinds:
        if kind == "write":
            free = sorted({*spared, *_no_files()})
            rules += [_when(call, _unless_first_is(free, answer)) for call in calls["write"]]
        elif kind in ("creating", "opening"):
            flags = os.O_CREAT if kind == "creating" else os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC
            rules += [_when(call, _when_flags(1, flags, answer)) for call in calls["open"]]
            rules += [_when(call, _when_flags(2, flags, answer)) for call in calls["openat"]]
        else:
            rules += [_when(call, [_return(answer)]) for call in calls[kind]]
    program = b"".join(
        [
            _load(4),
            _jump_equal(_ARCHITECTURES[machine], 1, 0),
            _return(_ALLOW),
            _load(0),
            *(line for rule in rules for line in rule),
            _return(_ALLOW),
        ]
    )
    _install(program, machine)


def _no_files() -> Iterable[int]:
    """Return the descriptors of this process that are no files: pipes, sockets and so on."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISREG(os.fstat(int(name)).st_mode):
                yield int(name)
        except OSError:
            continue


def _install(program: bytes, machine: str) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    lines = ctypes.create_string_buffer(program, len(program))
    given = Program(len(program) // 8, ctypes.cast(lines, ctypes.c_void_p))
    libc = _libc()
    libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(_SECCOMP[machine], _SECCOMP_SET_FILTER, _ALL_THREADS, ctypes.byref(given)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# Filters are BPF programs: lines of (code, jump if true, jump if false, number); offsets are those of `seccomp_data`.


def _line(code: int, number: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("HBBI", code, true, false, number)


def _load(offset: int) -> bytes:
    return _line(0x20, offset)


def _return(value: int) -> bytes:
    return _line(0x06, value)


def _jump_equal(number: int, true: int, false: int) -> bytes:
    return _line(0x15, number, true, false)


def _when(call: int, then: Sequence[bytes]) -> list[bytes]:
    """Return a program that runs lines if the loaded system call has a number, then loads the number again."""
    body = [*then, _load(0)]
    return [_jump_equal(call, 0, len(body)), *body]


def _unless_first_is(descriptors: Sequence[int], answer: int) -> list[bytes]:
    tests = [_jump_equal(n, len(descriptors) - i, 0) for i, n in enumerate(descriptors)]
    return [_load(16), *tests, _return(answer)]


def _when_flags(position: int, flags: int, answer: int) -> list[bytes]:
    return [_load(16 + 8 * position), _line(0x45, flags, 0, 1), _return(answer)]


# --- permissions ------------------------------------------------------------------------------------------------------

_CAPABILITY_VERSION, _OVERRIDES = 0x20080522, (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def obey_permissions() -> None:
    """Make this process obey the permissions of directories, even as root. Call it before starting threads.

    Raises:
        OSError: the kernel refuses to drop the capabilities.
    """
    if os.geteuid():
        return

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Sets(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    header, sets, libc = Header(_CAPABILITY_VERSION, 0), (Sets * 2)(), _libc()
    failed = libc.capget(ctypes.byref(header), sets)
    for name in ("effective", "permitted"):
        setattr(sets[0], name, getattr(sets[0], name) & ~_OVERRIDES)
    if failed or libc.capset(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@functools.cache
def permissions_why_not() -> str:
    """Return why a process cannot lose write permission for a directory on this machine; "" if it can."""
    if os.name != "posix" or (os.geteuid() == 0 and sys.platform != "linux"):
        return "needs a user who is not root, or Linux"
    return ""


# --- a small disk -----------------------------------------------------------------------------------------------------


@functools.cache
def small_disk_why_not() -> str:
    """Return why no small file system can be mounted on this machine; "" if it can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs root on Linux, to mount a small file system"
    with tempfile.TemporaryDirectory() as place:
        try:
            mount(Path(place), 1 << 16)
        except OSError:
            return "needs the right to mount a small file system"
        unmount(Path(place))
    return ""


def mount(place: Path, nbytes: int) -> None:
    """Mount a file system of `nbytes` bytes in memory on a directory.

    Raises:
        OSError: it cannot be mounted.
    """
    options = f"size={nbytes}".encode()
    if _libc().mount(b"purestep", os.fsencode(place), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))


def unmount(place: Path) -> None:
    """Unmount a file system, now or as soon as no process uses it."""
    detach = 2
    _libc().umount2(os.fsencode(place), detach)
