"""Stop a process, or fail its disk, at one chosen file operation of a save, and look at what is left.

A scenario is acted in a forked process that counts every operation on its directory by Python's audit events (and by
`os.fsync`, which has none), in whatever thread. At operation `at` the process is killed, or the operation is refused,
once or from then on. What has to hold then: the newest snapshot that was durable, or a later one, is there and whole,
and the next process goes on from it; a training ends with the digest of the undisturbed one.

    python -m tests.snapshot.strikes 10000     # so many SIGKILLs, in turns over all scenarios; what `make kills` calls
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import purestep as ps
from purestep.errors import SaveFailed, SnapshotError
from purestep.snapshot import Base, Ranks, Store, all_, best, durable_directories, latest, orbax_io, reader
from purestep.snapshot.listing import Entry, Index

Promise = Callable[[int], None]  # called with each step that is durable from now on
Hook = Callable[[], None]  # called when operations begin to count
HOWS = ("kill", "once ENOSPC", "on ENOSPC", "once EIO", "on EIO")
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def preload() -> None:
    """Import here what each of thousands of forked processes would import."""
    for name in (
        "orbax.checkpoint",
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.testing._internal.distributed.fake_pg",
    ):
        importlib.import_module(name)


# --- the process that is struck ---------------------------------------------------------------------------------------


class _Counter:
    """Counts the operations of this process on a directory, and strikes at one of them."""

    def __init__(self, root: Path, at: int, how: str) -> None:
        self.root, self.at, self.count = str(root), at, 0
        self.how, _, name = how.partition(" ")
        self.errno = getattr(errno, name, 0)
        self._lock = threading.Lock()

    def install(self) -> None:
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if self._here(descriptor):
                self._operation()
            sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        if (event in _CHANGES or writes) and self._here(args[0]):
            self._operation()

    def _here(self, path: Any) -> bool:
        with contextlib.suppress(OSError, TypeError, ValueError):
            text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
            # A tree is removed by names relative to its open directories.
            return text.startswith(self.root) or not os.path.isabs(text)
        return False

    def _operation(self) -> None:
        with self._lock:
            self.count += 1
            now = self.count
        if self.how == "kill" and now == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.how == "once" and now == self.at) or (self.how == "on" and now >= self.at):
            raise OSError(self.errno, os.strerror(self.errno))


def forked(body: Callable[[Promise], None]) -> tuple[int, list[int]]:
    """Run a function in a forked process; return how it ended, and what it and its own children promised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            warnings.simplefilter("ignore")

            def promise(step: int) -> None:
                os.write(writer, f"{step}\n".encode())

            body(promise)
            code = 0
        except BaseException:
            _shown()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        promised = [int(line) for line in pipe]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), promised


def _shown() -> None:
    if "STRIKES_VERBOSE" in os.environ:
        traceback.print_exc()


# --- a store in a loop of one's own -----------------------------------------------------------------------------------


def value(step: int, revision: int = 0) -> dict[str, Any]:
    """A small state that says which one it is."""
    return {"w": torch.full((40,), float(step)), "big": torch.arange(300) + step, "n": step, "revision": revision}


def _save(store: Store, promise: Promise, step: int, revision: int = 0, **options: Any) -> None:
    with contextlib.suppress(SaveFailed, SnapshotError):
        store.save(step, value(step, revision), metrics={"loss": float(-step)}, **options)
        store.wait()
        promise(step)


def _with_store(use: Callable[[Store, Promise], None], keep: Any = None) -> Callable[[Path, Promise, Hook], None]:
    def act(place: Path, promise: Promise, hook: Hook) -> None:
        hook()
        with contextlib.suppress(SaveFailed), Store(place / "snapshots", keep=keep or latest(1)) as store:
            use(store, promise)

    return act


def saves(store: Store, promise: Promise) -> None:
    """A step after the other."""
    for step in (1, 2, 3):
        _save(store, promise, step)


def replaces(store: Store, promise: Promise) -> None:
    """A step is saved three times, as after a signal in an evaluation."""
    _save(store, promise, 1)
    for revision in range(3):
        _save(store, promise, 2, revision, replace=True)


def shares_a_base(store: Store, promise: Promise) -> None:
    """A tensor is written once for two snapshots, and anew for others, whose base replaces the first."""
    base = Base(frozenset({"['big']"}))
    _save(store, promise, 1, base=base)
    for revision in range(2):
        _save(store, promise, 2, revision, replace=True, base=base)


def goes_back(store: Store, promise: Promise) -> None:
    """Back on purpose, by both ways there are: what is deleted is promised no more."""
    for step in (1, 2, 3, 4):
        _save(store, promise, step)
    if 2 in store.steps():
        promise(2)
        with contextlib.suppress(OSError, SnapshotError):
            store.delete_after(2)
    if 1 in store.steps():
        promise(1)
    _save(store, promise, 1, 1, replace=True)


def replaces_damage(store: Store, promise: Promise) -> None:
    """A damaged snapshot, and a directory of another owner, are in the way of a save."""
    _save(store, promise, 1)
    with contextlib.suppress(OSError):
        (store.root / "3" / "meta").mkdir(parents=True)
        (store.root / "4").mkdir()
    for step in (3, 4):
        _save(store, promise, step)


def _next_writer(place: Path) -> None:
    root = place / "snapshots"
    durable_directories.clean(root)
    with Store(root) as store:
        step = (store.latest() or 0) + 1
        store.save(step, value(step), metrics={"loss": 0.0})
    if Store(root).latest() != step:
        raise AssertionError(f"saved {step}, found {Store(root).steps()}")


# --- two ranks --------------------------------------------------------------------------------------------------------


def _as_rank(rank: int, link: socket.socket, place: Path, promise: Promise) -> None:
    """Save as one of two ranks, each of which holds half of a tensor. Rank 0 makes the promises."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)  # for a mesh; nothing is sent over it
    mesh = DeviceMesh("cpu", [0, 1])
    lines = link.makefile("r", encoding="ascii")  # not "rw", which forgets what it has read ahead when it writes

    def exchange(own: Any) -> list[Any]:
        link.sendall(json.dumps(own).encode("ascii") + b"\n")
        text = lines.readline()
        if not text:
            raise ConnectionError("the other rank is gone")
        return [own, json.loads(text)] if rank == 0 else [json.loads(text), own]

    def halved(step: int, revision: int) -> dict[str, Any]:
        whole = value(step, revision)
        half = whole["big"].chunk(2)[rank].clone()
        return whole | {"big": DTensor.from_local(half, mesh, [Shard(0)], run_check=False)}

    ranks = Ranks(rank, 2, exchange, timeout=0.2)
    with Store(place / "snapshots", ranks=ranks) as store:
        for step, revision in ((1, 0), (2, 0), (2, 1), (3, 0)):
            with contextlib.suppress(SaveFailed, SnapshotError):
                store.save(step, halved(step, revision), metrics={"loss": 0.0}, replace=True)
                store.wait()
                if rank == 0:
                    promise(step)


def _two_ranks(struck: int) -> Callable[[Path, Promise, Hook], None]:
    def act(place: Path, promise: Promise, hook: Hook) -> None:
        """Become one of two processes, the one that is struck. The pipe of promises ends with both."""
        ends = socket.socketpair()
        other = os.fork()
        rank, link = (struck, ends[0]) if other else (1 - struck, ends[1])
        ends[1 if other else 0].close()
        if other == 0:
            try:
                _as_rank(rank, link, place, promise)
            except BaseException:
                _shown()
            finally:
                os._exit(0)
        hook()
        _as_rank(rank, link, place, promise)

    return act


# --- trainings --------------------------------------------------------------------------------------------------------

_X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
_SET = {"x": _X, "y": _X.sum(1, keepdim=True)}
_EPOCHS, _BATCHES = 3, 2  # batches an epoch


def train(run_dir: Path, promise: Promise, *, signal_at: str = "") -> ps.Result:
    """Train a little, with an evaluation and a snapshot each epoch; say which snapshots are durable.

    Args:
        run_dir: of the run.
        promise: called with the snapshots that there are at the start, and with each that is durable.
        signal_at: "evaluation" or "save": where a SIGTERM comes, in the second epoch.
    """
    seen = {"evaluations": 0}

    def loss_fn(net: nn.Module, batch: Any) -> torch.Tensor:
        return (net(batch["x"]) - batch["y"]).square().mean()

    def held_out(net: nn.Module, batch: Any) -> torch.Tensor:
        seen["evaluations"] += not batch["x"].is_meta
        if signal_at == "evaluation" and seen["evaluations"] == 3:  # two batches each
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(net, batch)

    tx = ps.optim.adamw(1e-2)
    if have := ps.snapshot.steps(run_dir):
        promise(have[-1])
    events = ps.run(
        ps.make_step(loss_fn, tx),
        ps.init(lambda: nn.Linear(3, 1), tx, seed=0),
        ps.data.batches(_SET, 8, seed=0),
        until=ps.epochs(_EPOCHS),
        run_dir=run_dir,
        callbacks=[
            ps.callbacks.evaluate(held_out, ps.data.batches(_SET, 8, shuffle=False), every=ps.every.epoch()),
            ps.callbacks.snapshots(every=ps.every.epoch(), keep=latest(1)),
        ],
    )
    for event in events:
        if isinstance(event, ps.loop.Saved):
            promise(event.step)
        elif isinstance(event, ps.loop.EpochDone) and signal_at == "save" and events.loop.cursor.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    return events.result()


def _trains(**options: Any) -> Callable[[Path, Promise, Hook], None]:
    def act(place: Path, promise: Promise, hook: Hook) -> None:
        hook()
        with contextlib.suppress(SnapshotError):  # a disk that is full from the first operation on
            train(place, promise, **options)

    return act


def _prepared(**options: Any) -> Callable[[Path], None]:
    def prepare(place: Path) -> None:
        train(place, lambda step: None, **options)

    return prepare


def _finish(place: Path) -> None:
    """End the training, and compare its digest with that of the undisturbed one."""
    straight = place.with_name("digest")
    found = ps.digest(train(place, lambda step: None).state)
    if not straight.exists():
        straight.write_text(found)
    if found != straight.read_text():
        raise AssertionError(f"digest {found}, of the straight run {straight.read_text()}")


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is struck.

    Attributes:
        act: what the process does, in a directory.
        prepare: what another one did there before.
        go_on: what the next one does; it raises when that is not right.
        ranks: whether it is two processes, so that the other one has to notice a strike.
    """

    act: Callable[[Path, Promise, Hook], None]
    prepare: Callable[[Path], None] | None = None
    go_on: Callable[[Path], None] = _next_writer
    training: bool = False


SCENARIOS = {
    "saves": Scenario(_with_store(saves)),
    "replaces": Scenario(_with_store(replaces)),
    "keeps the best": Scenario(_with_store(saves, best("loss", 1, "max") | latest(1))),
    "goes back": Scenario(_with_store(goes_back, all_())),
    "shares a base": Scenario(_with_store(shares_a_base)),
    "replaces damage": Scenario(_with_store(replaces_damage)),
    "two ranks, the first": Scenario(_two_ranks(0)),
    "two ranks, the second": Scenario(_two_ranks(1)),
    "trains": Scenario(_trains(), None, _finish, True),
    "trains, an evaluation made up for": Scenario(_trains(), _prepared(signal_at="evaluation"), _finish, True),
    "trains, a signal in an evaluation": Scenario(_trains(signal_at="evaluation"), None, _finish, True),
    "trains, a signal in a save": Scenario(_trains(signal_at="save"), None, _finish, True),
}


class Range:
    """One scenario in a place of its own, struck again and again.

    Attributes:
        count: how many operations it does when nothing happens.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.scenario, self.place = name, SCENARIOS[name], place
        self._before = place.with_name(f"{place.name}.before")
        for path in (self._before, place):
            shutil.rmtree(path, ignore_errors=True)
        (self._before / "snapshots").mkdir(parents=True)
        if self.scenario.prepare is not None:
            prepare = self.scenario.prepare
            self._checked(forked(lambda promise: prepare(self._before))[0], "its preparation")
        code, promised, self.count = self._act(0, "count")
        self._checked(code, "without a strike")
        if not promised or self._broken(promised):
            raise AssertionError(f"{name}, without a strike: promised {promised}, {self._broken(promised)}")
        self._checked(forked(lambda promise: self.scenario.go_on(place))[0], "the process after it")

    def _checked(self, code: int, what: str) -> None:
        if code:
            raise AssertionError(f"{self.name}, {what}: exit code {code}; STRIKES_VERBOSE=1 shows why")

    def _act(self, at: int, how: str) -> tuple[int, list[int], int]:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._before, self.place)
        counter = _Counter(self.place, at, how)
        counted = self.place.with_name(f"{self.place.name}.count")
        counted.unlink(missing_ok=True)

        def body(promise: Promise) -> None:
            try:
                self.scenario.act(self.place, promise, counter.install)
            finally:
                counted.write_text(str(counter.count))

        code, promised = forked(body)
        return code, promised, int(counted.read_text()) if counted.exists() else 0

    def _broken(self, promised: list[int]) -> str | None:
        """Tell what of the promise does not hold."""
        newest = next(iter(self._whole()), None)
        if promised and (newest is None or newest.step < promised[-1]):
            return f"promised {promised[-1]}, the newest whole snapshot is {newest}"
        if newest is None or self.scenario.training:
            return None
        found = Store(newest.path.parent).restore(step=newest.step).value
        if ps.tree.equal(found, value(newest.step, found["revision"])):
            return None
        return f"the snapshot of step {newest.step} holds something else"

    def _whole(self) -> Iterator[Entry]:
        for entry in reversed(Index(self.place / "snapshots").revisions()):
            with contextlib.suppress(SnapshotError):
                reader.check(entry.path, orbax_io.read_arrays)
                yield entry

    missed = False  # whether the last strike came after the end

    def strike(self, at: int, how: str) -> str | None:
        """Strike once, and tell what does not hold afterwards."""
        code, promised, performed = self._act(at, how)
        problem = self._broken(promised)
        # How often ranks look for each other's files depends on the load, so this time there may be fewer operations.
        self.missed = code == 0 and 0 < performed < at
        if problem is None and self.missed:
            return None
        if problem is None and how == "kill" and code != -signal.SIGKILL:
            problem = f"exit code {code}: it was not killed"
        if problem is None and how == "kill":
            problem = self._went_on()
        return problem and f"{self.name}, operation {at} of {self.count}, {how}: {problem}"

    def _went_on(self) -> str | None:
        code, _ = forked(lambda promise: self.scenario.go_on(self.place))
        if code:
            return f"the next process ended with {code}"
        halves = sorted(path.name for path in (self.place / "snapshots").glob(f"*{durable_directories.MARK}*"))
        return f"left half-written: {halves}" if halves else None


def main() -> None:
    """Kill as often as asked, at every operation of every scenario in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, help="how many SIGKILLs")
    parser.add_argument("--only", default="", help="scenarios whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    preload()
    done, tried, problems, began = collections.Counter[str](), collections.Counter[str](), [], time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        ranges = [Range(name, Path(place) / f"r{i}") for i, name in enumerate(SCENARIOS) if options.only in name]
        while (kills := sum(done.values())) < options.kills:
            one = ranges[kills % len(ranges)]
            # Every operation once, then again: what threads do at the same time differs from one time to the next.
            problem = one.strike(tried[one.name] % one.count + 1, "kill")
            tried[one.name] += 1
            done[one.name] += not one.missed
            if problem is not None:
                problems.append(problem)
                print(problem, flush=True)
    print(f"{'scenario':36} {'operations':>10} {'kills':>6}")
    for one in ranges:
        print(f"{one.name:36} {one.count:10} {done[one.name]:6}")
    print(f"{sum(done.values())} kills in {time.monotonic() - began:.0f} s, {len(problems)} times something was lost")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
