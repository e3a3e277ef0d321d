"""Plans and their products, models, and numbers of processes: `python -m benchmarks.plans_table [--plan P --model M]`.

Writes `results/plans.md`. Each model trains {steps} steps of AdamW under each plan, on 1, 2 and 4 gloo processes; a run
on 4 stops after the first of them, 2 processes go on with it and 1 ends it. Compared are the digests of the states;
where bits differ, the largest difference of a parameter over the largest parameter. Memory is what the tensors of
rank 0 hold at most in a donating step; beside it stands what `ps.step_memory` predicts, with activations, or where it
refuses the plan, what `plan.dry_run` does, without them, marked by a star.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.plan_models import MODELS, Model
from benchmarks.report import table

FILE = Path(__file__).parent / "results" / "plans.md"
SIZES = 4, 2, 1  # processes, in the order in which they go on with a run
STEPS, PARTS, PATIENCE = 3, 4, 3000.0
STOPS = {4: 1, 2: 2, 1: STEPS}


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan of the table.

    Attributes:
        name: as it is written.
        make: returns the plan on a number of processes, for a model that `fits`.
        fits: which models it is for.
        promise: what it promises: "bits" on any number of processes, or "agreement".
    """

    name: str
    make: Callable[[int, Model], Any]
    fits: Callable[[Model], bool] = lambda model: True
    promise: str = "bits"


def rows() -> list[Row]:
    """Return the plans of the table, in order; another one is added here."""
    from purestep import sharding as s

    def piped(ranks: int, model: Model) -> Any:
        return s.ddp() * s.pipeline(model.stages or s.even_stages(model.make, 2), size=min(ranks, 2))

    def tensor(ranks: int, model: Model, **settings: Any) -> Any:
        return s.tensor_parallel(model.family or "", size=ranks, tensor_parts=PARTS, **settings)

    def has_rules(model: Model) -> bool:
        return model.family is not None

    def context(ranks: int) -> Any:
        return s.context_parallel(ranks, parts=PARTS)

    return [
        Row("ddp()", lambda n, m: s.ddp()),
        Row("zero1()", lambda n, m: s.zero1()),
        Row("zero2()", lambda n, m: s.zero2()),
        Row("fsdp()", lambda n, m: s.fsdp()),
        Row("hsdp(fsdp=2)", lambda n, m: s.hsdp(fsdp=min(n, 2))),
        Row("tensor_parallel(rules, n)", tensor, has_rules),
        Row("ddp() * tensor_parallel(rules, 2)", lambda n, m: s.ddp() * tensor(min(n, 2), m), has_rules),
        Row("fsdp() * tensor_parallel(rules, 2)", lambda n, m: s.fsdp() * tensor(min(n, 2), m), has_rules),
        Row("context_parallel(n)", lambda n, m: context(n), has_rules),
        Row("ddp() * context_parallel(2)", lambda n, m: s.ddp() * context(min(n, 2)), has_rules),
        Row("fsdp() * context_parallel(2)", lambda n, m: s.fsdp() * context(min(n, 2)), has_rules),
        Row("expert_parallel(n)", lambda n, m: s.expert_parallel(n), lambda m: m.experts),
        Row("expert_parallel(n, shard=True)", lambda n, m: s.expert_parallel(n, shard=True), lambda m: m.experts),
        Row("ddp() * expert_parallel(2)", lambda n, m: s.ddp() * s.expert_parallel(min(n, 2)), lambda m: m.experts),
        # Of what other stages compute a rank knows shapes only, and experts choose by values.
        Row("ddp() * pipeline(stages, 2)", piped, lambda m: not m.experts),
        Row('fsdp(reduction="fast")', lambda n, m: s.fsdp(reduction="fast"), promise="agreement"),
    ]


# --- one process ------------------------------------------------------------------------------------------------------


def work(folder: Path, plan: str, model: str) -> None:
    """Train all rows in one process of a job, and write down what it saw."""
    import torch

    import purestep as ps
    from purestep.distributed import control

    torch.set_num_threads(1)
    control.initialize(timeout=120)
    for row in rows():
        for name, kind in MODELS.items():
            if plan in row.name and model in name and row.fits(kind):
                found = _trained(row, name, kind, folder)
                if ps.sharding.rank() == 0:
                    (folder / f"{control.size()}.jsonl").open("a").write(json.dumps(found) + "\n")


def _trained(row: Row, name: str, model: Model, folder: Path) -> dict[str, Any]:
    """Train a model under a plan: straight, and as a run that other numbers of processes go on with."""
    import torch

    import purestep as ps
    from purestep.distributed import control
    from purestep.sharding import placement
    from purestep.testing.storages import Storages

    size = control.size()
    about = {"plan": row.name, "model": name}
    plan, tx = row.make(size, model), ps.optim.adamw(1e-3)
    step = ps.make_step(model.loss_fn, tx, plan=plan, microbatches=max(SIZES))
    state, donating = ps.init(model.make, tx, seed=0, plan=plan), ps.donate(step)
    predicted, whole_account = _predicted(donating, state, model.batch(0), plan)
    with Storages(placement.local(state)) as storages:
        for number in range(STEPS):
            storages.most = storages.now
            state, _ = donating(state, model.batch(number))
    whole = plan.gather(state)
    if control.rank() == 0:
        torch.save(dict(whole.params), folder / f"{_slug(row.name, name)}-{size}.pt")
    digest = ps.digest(whole)
    del state, whole
    data = [model.batch(number) for number in range(STEPS)]
    result = ps.fit(
        step,
        ps.init(model.make, tx, seed=0, plan=plan),
        data,
        until=ps.steps(STOPS[size]),
        run_dir=folder / _slug(row.name, name),
        callbacks=[ps.callbacks.snapshots(every=ps.every.steps(1), keep=ps.snapshot.latest(1))],
        loggers=(),
    )
    resumed = ps.digest(plan.gather(result.state))
    memory = {"predicted": predicted, "activations": whole_account, "seen": storages.most}
    return about | {"digest": digest, "resumed": resumed} | memory


def _predicted(step: Any, state: Any, batch: Any, plan: Any) -> tuple[int, bool]:
    """Return the bytes that a rank is said to need, and whether its activations are among them."""
    import purestep as ps

    try:
        return ps.step_memory(step, state, batch).nbytes, True
    except ps.errors.StepError:
        return plan.dry_run(state, microbatches=max(SIZES)).nbytes, False


def _slug(plan: str, model: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{plan}-{model}")


# --- all of them ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _job(size: int, arguments: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if size > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.plans_table", *arguments],
            env={**os.environ, **shared, **({"RANK": str(r), "LOCAL_RANK": str(r)} if size > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    try:
        yield jobs
    finally:
        for job in jobs:
            job.kill()


def measure(plan: str = "", model: str = "") -> list[dict[str, Any]]:
    """Run the jobs, and return what they saw by plan and model.

    Raises:
        RuntimeError: a job failed, with its last words.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for size in SIZES:
            with _job(size, ["--work", directory, "--plan", plan, "--model", model]) as jobs:
                words = [job.communicate(timeout=PATIENCE)[1] for job in jobs]
                if failed := [text for job, text in zip(jobs, words, strict=True) if job.returncode]:
                    raise RuntimeError(f"{size} processes: {failed[0][-2000:]}")
            for line in (folder / f"{size}.jsonl").read_text().splitlines():
                row = json.loads(line)
                found.setdefault((row["plan"], row["model"]), {})[str(size)] = row
        for (name, kind), sizes in found.items():
            sizes["apart"] = _apart(folder, name, kind)
    return [{"plan": name, "model": kind, **sizes} for (name, kind), sizes in found.items()]


def _apart(folder: Path, plan: str, model: str) -> float:
    """How far the parameters of several processes are from those of one: largest difference over largest parameter."""
    import torch

    one, *others = (torch.load(folder / f"{_slug(plan, model)}-{size}.pt") for size in sorted(SIZES))
    largest = max(float(x.abs().max()) for x in one.values())
    return max(float((x - other[name]).abs().max()) for other in others for name, x in one.items()) / largest


def verdicts(row: dict[str, Any]) -> tuple[str, str]:
    """Say what came of the digests of 1, 2 and 4 processes, and of the run that all three took part in."""
    digests = [row[str(size)]["digest"] for size in SIZES]
    same = f"`{digests[0][:8]}` on all" if len(set(digests)) == 1 else f"agree to {row['apart']:.0e}"
    last = row[str(min(SIZES))]
    resumed = "the same bits" if last["resumed"] == last["digest"] else "other bits than on one process"
    return same, resumed


def report(found: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    about = machine.describe()
    head = [
        "plan",
        "model",
        "processes 1, 2, 4",
        "resumed 4 to 2 to 1",
        "MB predicted on 1, 2, 4",
        "MB seen on 1, 2, 4",
    ]
    cells = []
    for row in found:
        sizes = [row[str(size)] for size in sorted(SIZES)]
        memory = (
            ", ".join(f"{one['predicted'] / 1e6:.1f}{'' if one['activations'] else '*'}" for one in sizes),
            ", ".join(f"{one['seen'] / 1e6:.1f}" for one in sizes),
        )
        cells.append([f"`{row['plan']}`", row["model"], *verdicts(row), *memory])
    load = f"load {os.getloadavg()[0]:.0f}"
    intro = (__doc__ or "").strip().partition("\n\n")[2].format(steps=STEPS)
    promised = [row.name for row in rows() if row.promise == "agreement"]
    return (
        f"# Plans, models and processes\n\n{about['cpu']}, {about['cores']} cores, {load}, torch "
        f"{about['versions']['torch']}.\n{intro}\n\n{table(head, cells)}\n\nOf these plans "
        f"{', '.join(f'`{name}`' for name in promised)} promise agreement, and the others bits. Plans with "
        f"`tensor_parallel` have `tensor_parts={PARTS}`, and models without rules are not split so.\n"
    )


def broken(found: list[dict[str, Any]]) -> list[str]:
    """Return the rows whose promise does not hold."""
    promised = {row.name: row.promise for row in rows()}
    wrong = []
    for row in found:
        exact = len({row[str(size)]["digest"] for size in SIZES}) == 1
        last = row[str(min(SIZES))]
        kept = exact and last["resumed"] == last["digest"] if promised[row["plan"]] == "bits" else row["apart"] < 1e-3
        wrong += [] if kept else [f"{row['plan']}, {row['model']}"]
    return wrong


def main() -> int:
    """Measure, write the table if it is whole, and return 0 unless a promise is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", default="", help="plans whose name has this in it")
    parser.add_argument("--model", default="", help="models whose name has this in it")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.plan, given.model)
        return 0
    found = measure(given.plan, given.model)
    print(report(found))
    if not given.plan and not given.model:
        FILE.write_text(report(found))
    for name in (wrong := broken(found)):
        print(f"its promise is broken: {name}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
