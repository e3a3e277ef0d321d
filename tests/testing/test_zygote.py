"""A child of the zygote is what a new interpreter would be, but for what is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

FACTS = """
import atexit, json, os, signal, sys, threading, warnings
atexit.register(print, "at exit")
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "name": __name__,
    "file": globals().get("__file__"), "here": "json" in sys.modules["__main__"].__dict__, "env": os.environ["ZYGOTE"],
    "home": "HOME" in os.environ, "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "chld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "threads": threading.active_count(),
    "main thread": threading.current_thread() is threading.main_thread(), "tty": sys.stdout.isatty(),
    "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:3], "options": sys.warnoptions, "stdin": sys.stdin.read(),
}))
"""
ENDS = [
    "",
    "sys.exit(3)",
    "sys.exit('words')",
    "1 / 0",
    "os.kill(os.getpid(), 9)",
    "raise KeyboardInterrupt",
    "os._exit(5)",
]


def interpreter(code, *arguments, env, cwd):
    command = [sys.executable, "-W", "error", *(["-c", code] if isinstance(code, str) else [str(code)]), *arguments]
    return subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("as_file", [False, True])
def test_it_is_what_an_interpreter_is(zygote, tmp_path, as_file):
    env = {"PATH": os.environ["PATH"], "ZYGOTE": "1"}
    code = FACTS
    if as_file:
        code = tmp_path / "script.py"
        code.write_text(FACTS)
    found = zygote.run(code, "a", "b", env=env, cwd=tmp_path)
    expected = interpreter(code, "a", "b", env=env, cwd=tmp_path)
    assert found.stdout.endswith("}\nat exit\n")
    assert found.stdout == expected.stdout
    assert (found.returncode, found.stderr) == (expected.returncode, expected.stderr) == (0, "")


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_an_interpreter_ends(zygote, tmp_path, end):
    code = f"import os, sys\nprint('begun', flush=True)\n{end}"
    found, expected = zygote.run(code, cwd=tmp_path), interpreter(code, env=dict(os.environ), cwd=tmp_path)
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_torch_is_there_already_and_children_share_nothing(zygote):
    code = (
        "import sys; print('torch' in sys.modules); sys.modules.pop('torch'); import numpy; print(numpy.random.rand())"
    )
    first, second = zygote.run(code).stdout.split(), zygote.run(code).stdout.split()
    assert first[0] == second[0] == "True"
    assert first[1] != second[1]


def test_a_child_can_be_talked_to_and_killed(zygote):
    code = "import os, sys, time\nprint(sys.stdin.readline(), os.getpid(), flush=True)\ntime.sleep(60)"
    with zygote.popen(code, stdin=subprocess.PIPE) as child, zygote.popen("input()", stdin=subprocess.PIPE) as other:
        child.stdin.write("hello\n")
        child.stdin.flush()
        assert child.stdout.readline() == "hello\n"
        assert int(child.stdout.readline()) == child.pid
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == -signal.SIGTERM
        assert other.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.01)
    assert other.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(child.pid)


def test_a_child_that_takes_too_long_is_killed(zygote):
    with pytest.raises(subprocess.TimeoutExpired):
        zygote.run("import time; print(1); time.sleep(60)", timeout=0.2)


def test_much_output_does_not_block(zygote):
    done = zygote.run("import sys; print('x' * 10**6); print('y' * 10**6, file=sys.stderr); sys.exit(4)")
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (4, 10**6 + 1, 10**6 + 1)


def test_a_child_starts_children(zygote, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing as mp

def square(x):
    return x * x

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        with mp.get_context(method).Pool(1) as pool:
            print(pool.map(square, [3]))
""")
    done = zygote.run(script)
    assert (done.stdout, done.stderr) == ("[9]\n[9]\n", "")


def test_it_is_quick(zygote):
    zygote.run("")
    began = time.monotonic()
    for _ in range(5):
        zygote.run("import purestep")
    assert time.monotonic() - began < 5  # five times torch would be 10 s


@pytest.mark.slow
def test_nobody_outlives_the_session(zygote):
    zygotes = type(zygote)()
    child = zygotes.popen("import time; time.sleep(60)", stdout=None, stderr=None)
    zygotes.close()
    assert not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_with_threads_it_refuses(zygote, tmp_path, monkeypatch):
    """A fork keeps one thread only: what the others hold stays locked for ever."""
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    (tmp_path / "starts_a_thread.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    zygotes = type(zygote)()
    with pytest.raises(RuntimeError, match="the zygote has 2 threads"):
        zygotes.run("", preload="starts_a_thread")
    zygotes.close()
