"""How cost on the host grows with what a run is made of: `python -m benchmarks.growth [--resume]`.

Writes `results/growth.json`, and from it `growth.md` and `growth.png`; `--resume` measures the curves that are missing,
`--report` none.
`growth_curves.py` has what is measured.

Each curve is the cost of one thing at growing sizes: CPU time of the process (of a save, wall time until `save`
returns; or bytes), the least of a few repeats. The exponent is the slope of the last two sizes on logarithmic axes: 0
where the cost does not depend on the size, 1 where it is linear.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.growth_curves import CURVES, Curve
from benchmarks.report import table

FOLDER = Path(__file__).parent / "results"
NOTE = (
    "With 10,000 tensors a step grows faster than their number because torch's operators do: a hand-written loop of "
    "the same model took 44 ms with 1,000 tensors and 554 ms with 10,000, beside 46 and 676 ms of ours in turns in one "
    "process. The store of a rendezvous is torch's. Snapshots are measured in a directory in memory (`/dev/shm`), "
    "where there is one; a state of 1,000 MB or more on the disk, since state, copy and file together are three times "
    "its size. The state ends at {most:,} MB: other programs held the rest of the machine's memory. Ranks are "
    "pretended (`fake_ranks.py`): what this process does for them is real, and nothing is sent."
)
WORST = 1.15  # exponent that still counts as linear
SMALL = 2.0  # times the cost of the size before: at least so much, before an exponent says anything


def main() -> int:
    """Measure all curves, write table and plot, and return how many grow faster than linearly."""
    import torch

    torch.set_num_threads(1)
    file = FOLDER / "growth.json"
    goes_on = {"--resume", "--report"} & set(sys.argv)
    kept: dict[str, list[float]] = json.loads(file.read_text()) if goes_on and file.exists() else {}
    for curve in CURVES:
        if len(kept.get(curve.name, [])) != len(curve.sizes) and "--report" not in sys.argv:
            kept[curve.name] = [curve.cost(size) for size in curve.sizes]
            names = [known.name for known in CURVES]
            file.write_text(json.dumps({n: kept[n] for n in names if n in kept}, indent=1) + "\n")
            print(f"{curve.name}: {', '.join(map(curve.shown, kept[curve.name]))}", file=sys.stderr, flush=True)
    found = [(curve, kept[curve.name]) for curve in CURVES if len(kept.get(curve.name, [])) == len(curve.sizes)]
    (FOLDER / "growth.md").write_text(report(found))
    plot(found, FOLDER / "growth.png")
    return sum(faster_than_linear(curve, values) for curve, values in found)


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Return the slope between the last two sizes on logarithmic axes.

    Example:
        >>> exponent((1, 10, 100), [1.0, 1.0, 10.0])
        1.0
    """
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def faster_than_linear(curve: Curve, values: list[float]) -> bool:
    """Tell whether a curve grows faster than its size at its end."""
    return exponent(curve.sizes, values) > WORST and values[-1] > SMALL * values[-2]


def report(found: list[tuple[Curve, list[float]]]) -> str:
    """Return the table in Markdown."""
    rows = []
    for curve, values in found:
        shown = ", ".join(f"{size:,}: {curve.shown(v)}" for size, v in zip(curve.sizes, values, strict=True))
        each = (values[-1] - values[0]) / (curve.sizes[-1] - curve.sizes[0])
        rows.append(
            [curve.what, curve.against, shown, curve.shown(max(each, 0.0)), f"{exponent(curve.sizes, values):.2f}"]
        )
    about = machine.describe()
    where = f"{about['cpu']}, {about['cores']} cores, load {os.getloadavg()[0]:.1f}, Python {about['python']}"
    head = ["what", "against", "cost at each size", "for one more", "exponent at the end"]
    about_curves = (__doc__ or "").strip().rpartition("\n\n")[2]
    note = NOTE.format(most=next(curve.sizes[-1] for curve in CURVES if curve.against == "MB of state"))
    if missing := [curve.name for curve in CURVES if curve not in [known for known, _ in found]]:
        note += f" Not measured in this run: {'; '.join(missing)}."
    return f"# How host cost grows\n\n{where}. {about_curves}\n\n{table(head, rows)}\n\n{note}\n"


def plot(found: list[tuple[Curve, list[float]]], path: Path) -> None:
    """Draw each curve on logarithmic axes, with a line of slope 1 beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4
    figure, axes = plt.subplots(math.ceil(len(found) / columns), columns, figsize=(15, 11), squeeze=False)
    for axis, (curve, values) in zip(axes.flat, found, strict=False):
        axis.loglog(curve.sizes, values, "o-", color="#2a6f97")
        linear = [values[-1] * size / curve.sizes[-1] for size in curve.sizes]
        axis.loglog(curve.sizes, linear, ":", color="#888888")
        axis.set_ylim(min(values) / 3, max(values) * 3)
        axis.set_title(curve.what, fontsize=8)
        axis.set_xlabel(curve.against, fontsize=8)
        axis.set_ylabel(curve.unit, fontsize=8)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
