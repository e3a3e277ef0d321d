"""Which architectures of transformers, timm and torchvision `ps.jit` traces, with which bits, and in which time.

Random weights, tiny configurations, no download. It has an environment of its own, `benchmarks/zoo-requirements.txt`:

    python -m benchmarks.zoo                    # all, a table on the standard output
    python -m benchmarks.zoo bert swin_tiny     # some
    python -m benchmarks.zoo --compile bert     # with Inductor, which compiles each
    python -m benchmarks.zoo --time bert        # and the time of a step beside torch.compile, which compiles each twice
    python -m benchmarks.zoo --check bert       # and exit code 1 where a cell is not what it should be

Each row is five SGD steps of the step itself, beside a loop that is written by hand, in float64 where the model can;
two of `ps.jit(step, backend="eager")`; and five of Inductor, from one state on the same batches. A new process goes on
from a snapshot after the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import logging
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import purestep as ps
from benchmarks.architectures import ROWS, Row
from purestep.random.torch_mode import KeyedRandom
from purestep.snapshot import Store

STEPS, RATE = 5, 0.01  # at 0.1 rounding alone changes a ResNet with BatchNorm over two images by half in three steps
ROUNDS, ROUND = 7, 10  # of the times of a step: rounds in turns, steps in each
TOLERANCE = 1e-4  # of a parameter after five steps, relative to the largest of its tensor
COLUMNS = {
    "loop": "loop by hand",
    "pure": "pure",
    "traces": "traces",
    "bits": "bits",
    "retraces": "traced again",
    "seconds": "trace, CPU s",
    "inductor": "Inductor",
    "time": "step / torch.compile",
    "resume": "resume",
}
Cells = dict[str, str]


def started(row: Row, tx: Any = None) -> tuple[Any, Any, list[Any]]:
    """Return the step, the first state and the batches of a row."""
    tx = tx or ps.optim.sgd(RATE)
    generator = torch.Generator().manual_seed(0)
    batches = [row.batch(generator) for _ in range(STEPS)]
    return ps.make_step(row.loss, tx), ps.init(row.model, tx, seed=0), batches


def trained(step: Any, state: Any, batches: list[Any]) -> Any:
    for batch in batches:
        state, _ = step(state, batch)
    return state


def filled(net: Any, state: Any) -> Any:
    """Return a model in training with copies of the values of a state."""
    values = {**state.params, **state.buffers}
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name in values:
                tensor.copy_(values[name])
    return net.train()


def by_hand(row: Row, state: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Train the model in a loop as it is written everywhere, and return its parameters.

    It draws from the keys that a step draws from, so that dropout masks are the same ones.
    """
    net = filled(row.model(), state)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        with KeyedRandom(ps.random.fold_in(state.rng, index, 0)):
            loss = row.loss(net, batch)
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters() if name in state.params}


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a parameter, relative to the largest of its tensor, or to 0.001."""
    pairs = [(expected[name], found[name]) for name in expected if expected[name].numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)


def in_float64(row: Row) -> Row:
    """Return a row in float64, where another order of the same sums stays far below a real difference."""

    def batch(generator: torch.Generator) -> dict[str, Any]:
        return {name: _double(value) for name, value in row.batch(generator).items()}

    return dataclasses.replace(row, model=lambda: row.model().double(), batch=batch)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def worded(value: float) -> str:
    return "same bits" if value == 0 else f"{value:.0e}"


def attempted(cell: Callable[[], str]) -> str:
    """Return a cell, or why there is none."""
    try:
        return cell()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        return f"no: {type(error).__name__}: {'; '.join(lines)}".replace("|", "/")[:230]


@dataclasses.dataclass
class Measurement:
    """The cells of one architecture, measured one after another."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        self.row = ROWS[self.name]
        self.step, self.state, self.batches = started(self.row)
        self.digest = ps.tree.digest(self.state)
        self.middle = trained(self.step, self.state, self.batches[:1])
        self.second = trained(self.step, self.middle, self.batches[1:2])
        self.last = trained(self.step, self.second, self.batches[2:])

    def save(self) -> None:
        with Store(self.folder / self.name) as store:
            store.save(1, self.middle)
            store.wait()
        (self.folder / self.name / "digest").write_text(ps.tree.digest(self.second))

    def loop(self) -> str:
        with contextlib.suppress(RuntimeError):  # a model with masks made for float32
            row = in_float64(self.row)
            step, state, batches = started(row)
            largest = difference(trained(step, state, batches).params, by_hand(row, state, batches))
            if math.isfinite(largest):
                return worded(largest)
        return worded(difference(self.last.params, by_hand(self.row, self.state, self.batches)))

    def pure(self) -> str:
        again = trained(self.step, self.state, self.batches[:1])
        same = ps.tree.equal(again, self.middle) and ps.tree.digest(self.state) == self.digest
        return "yes" if same else "no"

    def traced(self) -> Cells:
        compiled = ps.jit(self.step, backend="eager")
        began = time.process_time()

        def compile() -> str:
            compiled.compile(self.state, self.batches[0])
            return "yes"

        traces = attempted(compile)
        if traces != "yes":
            return {"traces": traces, "bits": attempted(self.gradients_eager)}
        seconds = time.process_time() - began
        bits = attempted(
            lambda: "same" if ps.tree.equal(trained(compiled, self.state, self.batches[:2]), self.second) else "differ"
        )
        return {"traces": "yes", "bits": bits, "retraces": str(len(compiled.retraces)), "seconds": f"{seconds:.1f}"}

    def gradients_eager(self) -> str:
        """Compare the bits of a step of which only the update is compiled, as the refusal says to write."""
        compiled = ps.jit(self.step, backend="eager", unjittable="eager")
        same = ps.tree.equal(trained(compiled, self.state, self.batches[:2]), self.second)
        return 'same, unjittable="eager"' if same else "differ"

    def inductor(self) -> str:
        largest = difference(self.last.params, trained(ps.jit(self.step), self.state, self.batches).params)
        if largest <= TOLERANCE:
            return worded(largest)
        # Through BatchNorm over two images rounding grows to anything; in float64 a real difference would stay.
        step, state, batches = started(in_float64(self.row))
        double = difference(trained(step, state, batches).params, trained(ps.jit(step), state, batches).params)
        return f"{worded(double)} (float64)"

    def cells(self, *, compile: bool, timed: bool) -> Cells:
        cells = {"loop": attempted(self.loop), "pure": attempted(self.pure), **self.traced()}
        if cells["traces"] == "yes" and compile:
            cells["inductor"] = attempted(self.inductor)
        if cells["traces"] == "yes" and timed:
            cells["time"] = attempted(lambda: f"{time_ratio(self.row):.2f}")
        return cells


def time_ratio(row: Row) -> float:
    """Return the CPU time of a compiled, donated AdamW step over that of `torch.compile` of the model and fused AdamW.

    Both in turns in one process; the median of the ratios of the rounds.
    """
    step, state, batches = started(row, ps.optim.adamw(1e-3))
    batch, ours = batches[0], ps.jit(step, donate=True)
    net = filled(row.model(), state)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    loss_of = torch.compile(lambda batch: row.loss(net, batch))

    def our_round() -> None:
        nonlocal state
        for _ in range(ROUND):
            state, _ = ours(state, batch)

    def their_round() -> None:
        for _ in range(ROUND):
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()

    def cpu_time(run: Callable[[], None]) -> float:
        began = time.thread_time()
        run()
        return time.thread_time() - began

    our_round(), their_round()  # compiles
    return statistics.median(cpu_time(our_round) / cpu_time(their_round) for _ in range(ROUNDS))


def resumed(name: str, folder: Path) -> str:
    """Tell whether this process gets the bits of the one that saved the middle of a training."""
    file = folder / name / "digest"
    if not file.exists():
        return ""
    step, state, batches = started(ROWS[name])
    middle = ps.restore(folder / name, like=state)
    return "same" if ps.tree.digest(trained(step, middle, batches[1:2])) == file.read_text() else "differ"


def faults(cells: Cells) -> list[str]:
    """Return the cells that are not what they should be. One that was not measured is none."""
    expected = {"pure": "yes", "traces": "yes", "bits": "same", "retraces": "0", "resume": "same"}
    wrong = [
        f"{name}: {cells[name]}" for name, value in expected.items() if not cells.get(name, value).startswith(value)
    ]
    for name in ("loop", "inductor"):
        cell = cells.get(name, "same bits")
        if cell.startswith("same bits"):
            continue
        if cell.startswith("no") or not float(cell.partition(" ")[0]) <= TOLERANCE:
            wrong.append(f"{name}: {cell}")
    return wrong


def main(arguments: list[str]) -> int:
    """Measure, and print each row as it is measured; then, from a new process, what a resume gives."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments[:1] == ["--resume"]:
        for name in arguments[2:]:
            print(f"{name}\t{resumed(name, Path(arguments[1]))}", flush=True)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="an architecture, or a part of some names; all without any"
    )
    parser.add_argument("--compile", action="store_true", help="compare Inductor's parameters")
    parser.add_argument("--time", action="store_true", help="compare the time of a step with torch.compile")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a cell is not what it should be")
    told = parser.parse_args(arguments)
    names = [name for name in ROWS if not told.names or any(_means(part, name) for part in told.names)]
    versions = [f"{n} {version(n)}" for n in ("torch", "transformers", "timm", "torchvision") if version(n)]
    print(f"{platform.processor() or platform.machine()}, one thread; {', '.join(versions)}\n", flush=True)
    columns = [column for column in COLUMNS if column != "resume"]
    print("| architecture |", " | ".join(COLUMNS[column] for column in columns), "|")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    measured: dict[str, Cells] = {}
    with tempfile.TemporaryDirectory(prefix="purestep-zoo-") as folder:
        for name in names:
            measured[name] = row_of(name, Path(folder), compile=told.compile, timed=told.time)
            print(f"| {name} |", " | ".join(measured[name].get(column, "") for column in columns), "|", flush=True)
        call = [sys.executable, "-m", "benchmarks.zoo", "--resume", folder, *names]
        lines = subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\nresumed in a new process:")
    for name, _, cell in (line.partition("\t") for line in lines):
        measured[name]["resume"] = cell
    for cell, of in itertools.groupby(
        sorted(names, key=lambda n: measured[n]["resume"]), lambda n: measured[n]["resume"]
    ):
        print(f"{cell or 'not measured'}: {', '.join(of)}")
    wrong = [f"{name}: {fault}" for name in names for fault in faults(measured[name])]
    if told.check and wrong:
        print("\nwrong:", *wrong, sep="\n  ")
    return int(told.check and bool(wrong))


def _means(part: str, name: str) -> bool:
    return part == name if part in ROWS else part in name


def row_of(name: str, folder: Path, *, compile: bool, timed: bool) -> Cells:
    try:
        measurement = Measurement(name, folder)
        measurement.save()
    except Exception as error:
        why = str(error).partition("\n")[0]
        return {"loop": f"no: {type(error).__name__}: {why}"[:230]}
    return measurement.cells(compile=compile, timed=timed)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main(sys.argv[1:]))
