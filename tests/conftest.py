"""What every test shares: one torch thread, hypothesis without deadlines, seeds that print when a test fails."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports numpy, torch or JAX: some read these only once. Subprocesses of tests inherit them.
# scikit-learn imports pandas where it is there, and pandas pyarrow, whose allocator has a thread: no zygote forks that.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PURESTEP_DEVICE": "cpu"}
for _name, _value in {**_ENVIRONMENT, "JE_ARROW_MALLOC_CONF": "background_thread:false"}.items():
    os.environ.setdefault(_name, _value)

# Whichever test starts the fork server of its process: workers find torch there, as those of `ps.data.batches` do.
multiprocessing.set_forkserver_preload(["__main__", "purestep.data.workers"])

import hypothesis
import numpy as np
import pytest
import torch
from _pytest.doctest import DoctestModule
from shared_interpreter import Interpreter

from purestep.testing.zygote import Zygotes

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


PACKAGE = Path(__file__).parents[1] / "purestep"


class Sparing:
    """Keeps pytest from importing a file to find nothing in it: no example, or no test that is not slow."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick  # whether slow tests are left out

    @pytest.hookimpl
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if collection_path.suffix != ".py":
            return None
        text = collection_path.read_text()
        if PACKAGE in collection_path.parents:
            return True if ">>>" not in text else None
        return True if self.quick and "\npytestmark = [pytest.mark.slow" in text else None

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(self, file_path: Path) -> Iterator[None]:
        found = yield
        return found if PACKAGE in file_path.parents else [x for x in found if not isinstance(x, DoctestModule)]


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin, because the hooks of this file see only the files beside it.
    config.pluginmanager.register(Sparing(quick=config.option.markexpr == "not slow"))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Bits of CPU kernels depend on the number of threads, and two cores are shared with other workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OurZygotes(Zygotes):
    """Zygotes with the list of modules that every job of several ranks preloads, so that one zygote serves them all."""

    RANKS = "xxhash torch.distributed.tensor orbax.checkpoint"


@pytest.fixture(scope="session")
def zygote() -> Iterator[OurZygotes]:
    """Forks processes that have torch already: `zygote.run(script, *arguments)`, `zygote.popen(...)`; see its file."""
    with OurZygotes(("-W", "error")) as zygotes:
        yield zygotes


@pytest.fixture(scope="session")
def bare() -> Iterator[Any]:
    """Runs code in an interpreter that has imported nothing but numpy and torch: `bare.run(code, *arguments)`."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Does a piece of work once in a session: `directory = once("bits", work)` is where `work(directory)` left files.

    The workers of pytest-xdist share it: whoever comes first does it, and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def done(name: str, work: Callable[[Path], None]) -> Path:
        with open(root / f"{name}.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            directory = Path(lock.read() or tmp_path_factory.mktemp(name))
            if not lock.tell():
                work(directory)  # where it fails, nothing is written, and the next one begins in a directory of its own
                lock.write(str(directory))
            return directory

    return done


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, stable between runs; python's, numpy's and torch's generators start from it."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
