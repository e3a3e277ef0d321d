"""`purestep doctor`: checks of the machine and the installation, with advice."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from purestep.cli import show
from purestep.cli.usage import version
from purestep.distributed import launchers

OK, NOTE, BAD = "ok", "note", "BAD"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        what: name of the check.
        value: what was found.
        verdict: "ok"; "note" if it costs speed or a feature; "BAD" if a run will fail.
        fix: what to do; "" for nothing.
    """

    what: str
    value: str
    verdict: str = OK
    fix: str = ""


def doctor(arguments: argparse.Namespace) -> int:
    """Run all checks; exit code 1 if a run will fail."""
    found = list(findings())
    if arguments.json:
        show.as_json([dataclasses.asdict(finding) for finding in found])
    else:
        show.table(["what", "found", "", "what to do"], [list(dataclasses.astuple(f)) for f in found], widest=100)
    return int(any(finding.verdict == BAD for finding in found))


def findings() -> Iterator[Finding]:
    """Yield the findings of each check; a check that raises is a finding."""
    for check in CHECKS:
        try:
            yield from check()
        except importlib.metadata.PackageNotFoundError as error:
            yield Finding(check.__name__.strip("_"), f"not known: {error}", NOTE, "pip install . where its sources are")
        except Exception as error:
            yield Finding(check.__name__.strip("_").replace("_", " "), f"{type(error).__name__}: {error}", BAD)


def _versions() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    yield Finding("python", platform.python_version(), OK if ok else BAD, "" if ok else "Python 3.11 or later")
    yield Finding("purestep", f"{version()} in {Path(__file__).parents[1]}")
    for name in required().get("", ()):
        found = _installed(name)
        yield Finding(name, found or "missing", OK if found else BAD, "" if found else f"pip install {name}")


# For work on purestep itself: a training needs none of them.
_OF_DEVELOPERS = {"dev", "docs", "notebooks"}


def required() -> dict[str, list[str]]:
    """Return the distributions that the installed purestep names, by extra; "" for what it always needs.

    Raises:
        PackageNotFoundError: it is not installed, and runs from its sources.
    """
    told = importlib.metadata.metadata("purestep")
    found: dict[str, list[str]] = {"": [], **{extra: [] for extra in told.get_all("Provides-Extra") or ()}}
    for line in told.get_all("Requires-Dist") or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
        name = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", requirement)
        if name is None:
            continue
        # An extra may stand for others: purestep[s3,gs].
        others = (name[2] or "").replace(" ", "").split(",") if name[1] == "purestep" else []
        found.setdefault(extra[1] if extra else "", []).extend([f"purestep[{o}]" for o in others] or [name[1]])
    return {extra: list(_expanded(names, found)) for extra, names in found.items()}


def _expanded(names: Iterable[str], found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name in names:
        other = name.removeprefix("purestep[").removesuffix("]")
        if other == name:
            yield name
        else:
            yield from _expanded(found.get(other, ()), found)


def _installed(name: str) -> str:
    """Return the version of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extras() -> Iterator[Finding]:
    for extra, names in required().items():
        if not extra:
            continue
        found = {name: _installed(name) for name in names}
        missing = [name for name, version_ in found.items() if not version_]
        there = ", ".join(f"{name} {version_}" for name, version_ in found.items() if version_)
        wanted = bool(missing) and extra not in _OF_DEVELOPERS
        value = f"missing: {', '.join(missing)}" if missing else there
        fix = f'pip install "purestep[{extra}]"' if wanted else ""
        yield Finding(f"extra {extra}", value, NOTE if wanted else OK, fix)


def _cards() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, and sees no card" if built else "this torch is built for CPUs"
        yield Finding("cards", f"none: {why}", NOTE if built else OK, "check the driver: nvidia-smi" if built else "")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"card {index}",
            f"{card.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
            f"bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
        )


def _compilers() -> Iterator[Finding]:
    name = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if name is None or shutil.which(name) is None:
        yield Finding(
            "C++ compiler", "none", NOTE, "ps.jit compiles with one: apt install g++, or xcode-select --install"
        )
    else:
        yield Finding("C++ compiler", str(shutil.which(name)))


def _threads() -> Iterator[Finding]:
    import torch

    from purestep._cpus import available_cpus

    threads, cpus = torch.get_num_threads(), available_cpus()
    fix = "OMP_NUM_THREADS=1, or torch.set_num_threads(1): bits on a CPU depend on this number" if threads > 1 else ""
    yield Finding(
        "threads", f"{threads} of {cpus} usable CPUs", OK if threads <= cpus else NOTE, fix if threads > 1 else ""
    )
    yield Finding("CPU kernels", torch.backends.cpu.get_cpu_capability())


def _bits() -> Iterator[Finding]:
    from purestep import bits

    here = bits.portable_here()
    yield Finding(
        "bits", f"{bits.mode()}; portable ones {'can' if here else 'cannot'} be computed here", OK if here else NOTE
    )


def _disks() -> Iterator[Finding]:
    """Write, sync and rename a file, as a save does."""
    place = Path("runs") if Path("runs").is_dir() else Path()
    usage = shutil.disk_usage(place)
    free = f"{usage.free / 2**30:.1f} GiB free in {place.absolute()}"
    low = usage.free < 2**30
    yield Finding("disk", free, NOTE if low else OK, "snapshots need room: another --run-dir" if low else "")
    try:
        with tempfile.TemporaryDirectory(dir=place) as directory:
            start, file = time.perf_counter(), Path(directory, "a")
            with file.open("wb") as out:
                out.write(os.urandom(1 << 20))
                out.flush()
                os.fsync(out.fileno())
            file.rename(file.with_name("b"))
            seconds = time.perf_counter() - start
    except OSError as error:
        yield Finding("writing there", str(error), BAD, "another --run-dir, or the rights of this one")
        return
    slow = seconds > 1
    yield Finding(
        "1 MiB written and synced", f"{seconds * 1e3:.0f} ms", NOTE if slow else OK, "a local disk" if slow else ""
    )
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    if shared is not None:
        low = shared < 64 << 20
        fix = "workers pass batches through it: docker run --shm-size=1g" if low else ""
        yield Finding("shared memory", f"{shared / 2**20:.0f} MiB free", NOTE if low else OK, fix)


def _ports() -> Iterator[Finding]:
    """Listen on a port of this machine, as torchrun does."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=2),
        ):
            yield Finding("ports", f"127.0.0.1:{server.getsockname()[1]} listens")
    except OSError as error:
        yield Finding("ports", str(error), BAD, "several processes meet on a port of this machine")
    try:
        address = socket.gethostbyname(socket.gethostname())
        yield Finding("host name", f"{socket.gethostname()} is {address}")
    except OSError as error:
        fix = "a line in /etc/hosts, or MASTER_ADDR: jobs of several processes look it up"
        yield Finding("host name", f"{socket.gethostname()}: {error}", NOTE, fix)


def _job() -> Iterator[Finding]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS", "PURESTEP_BITS", "OMP_NUM_THREADS")
    there = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    yield Finding("environment", there or "no variable of a job")
    launch = launchers.launch_of()
    if launch is not None and launch.size > 1:
        yield Finding("job", f"{launch.launcher} started this process as rank {launch.rank} of {launch.size}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _extras,
    _cards,
    _compilers,
    _threads,
    _bits,
    _disks,
    _ports,
    _job,
)
