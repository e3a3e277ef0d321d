"""What the operating system does to a process for the fault harness: the faults are real, where they can be had."""

import errno
import json
import os
import platform
import sys

import pytest

from purestep.testing import kernel

# What can still be done, in the thread that asked and in one that ran before, when the kernel refuses with an error.
REFUSED = """
import errno, json, os, sys, threading
from purestep.testing import kernel
number, place = getattr(errno, sys.argv[1]), sys.argv[2]
old, spared = open(place + "/old", "w"), open(place + "/spared", "w")
read, write = os.pipe()

def tried(call):
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

begun, ended = threading.Event(), []
def other():
    begun.wait()
    ended.append(tried(lambda: os.pwrite(old.fileno(), b"x", 0)))
thread = threading.Thread(target=other)
thread.start()
kernel.refuse(number, [1, 2, spared.fileno()])
begun.set()
thread.join()
print(json.dumps({
    "write": tried(lambda: os.write(old.fileno(), b"x")),
    "write of a thread": ended[0],
    "spared": tried(lambda: os.write(spared.fileno(), b"x")),
    "pipe": tried(lambda: os.write(write, b"x")),
    "read": tried(lambda: open(place + "/old").read()),
    "fsync": tried(lambda: os.fsync(old.fileno())),
    "create": tried(lambda: open(place + "/new", "w")),
    "open": tried(lambda: open(place + "/spared", "r+")),
    "mkdir": tried(lambda: os.mkdir(place + "/made")),
    "rename": tried(lambda: os.rename(place + "/old", place + "/older")),
    "unlink": tried(lambda: os.unlink(place + "/spared")),
}))
"""
DONE = dict.fromkeys(
    "write,write of a thread,spared,pipe,read,fsync,create,open,mkdir,rename,unlink".split(","), "done"
)


@pytest.mark.skipif(bool(kernel.refusing_why_not()), reason=kernel.refusing_why_not())
@pytest.mark.parametrize(
    ("number", "refused"),
    [
        ("ENOSPC", ["write", "write of a thread", "create", "mkdir"]),
        ("EIO", ["write", "write of a thread", "fsync"]),
        ("EROFS", ["create", "open", "mkdir", "rename", "unlink"]),
    ],
)
def test_the_kernel_refuses_what_such_a_disk_refuses(zygote, tmp_path, number, refused):
    done = zygote.run(REFUSED, number, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == DONE | dict.fromkeys(refused, number)


OBEYING = """
import os, sys
from purestep.testing import kernel, shims
os.chmod(sys.argv[1], 0o555)
kernel.obey_permissions()
try:
    open(sys.argv[1] + "/new", "w")
except PermissionError:
    print("forbidden")
from pathlib import Path
shims.give_permission(Path(sys.argv[1]))
open(sys.argv[1] + "/new", "w").close()
"""


@pytest.mark.skipif(bool(kernel.permissions_why_not()), reason=kernel.permissions_why_not())
def test_a_process_can_be_made_to_obey_permissions_root_too(zygote, tmp_path):
    done = zygote.run(OBEYING, str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "forbidden\n", "")


@pytest.mark.skipif(bool(kernel.small_disk_why_not()), reason=kernel.small_disk_why_not())
def test_a_small_disk_is_small_and_goes_away(tmp_path):
    kernel.mount(tmp_path, 1 << 20)
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            (tmp_path / "file").write_bytes(bytes(2 << 20))
        assert caught.value.errno == errno.ENOSPC
    finally:
        kernel.unmount(tmp_path)
    assert not os.path.ismount(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_cannot_says_so(monkeypatch):
    for cached in (kernel.refusing_why_not, kernel.small_disk_why_not, kernel.permissions_why_not):
        monkeypatch.setattr(kernel, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert kernel.refusing_why_not() == "needs Linux on x86-64 or arm64"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert kernel.small_disk_why_not() == "needs root on Linux, to mount a small file system"
    assert kernel.permissions_why_not() == ""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernel.permissions_why_not() == "needs a user who is not root, or Linux"
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "_libc", lambda: None)
    monkeypatch.setattr(kernel.subprocess, "run", lambda *args, **options: type("Done", (), {"returncode": 1}))
    if platform.machine() in kernel._CALLS and sys.platform == "linux":
        assert "seccomp" in kernel.refusing_why_not.__wrapped__()
