"""From results to a table in Markdown and a bar chart. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import sharding, targets
from benchmarks.peers import ALL as PEERS
from benchmarks.training import ratio, spread

Results = Mapping[str, Any]
SNAPSHOT = {"block": "blocking", "total": "durable", "restore": "restore", "delete": "deleting"}


def markdown(results: Results, others: Iterable[Results] = ()) -> str:
    """Return the whole report.

    Args:
        results: of this run.
        others: of all processors, this one among them; those of another one are set beside it.
    """
    parts = [_heading(results), _verdicts(results)]
    sections: dict[str, Callable[[Any], str]] = {
        "training": _training,
        "compile_time": _compile_time,
        "memory": _memory,
        "precision": _precision,
        "snapshots": _snapshots,
        "loop_cost": _loop_cost,
        "host_cost": _host_cost,
        "imports": _imports,
        "sharding": _sharding,
        "portable": _portable,
        "ensembles": _ensembles,
    }
    for name, show in sections.items():
        if name in results and "error" not in results[name]:
            parts.append(show(results[name]))
        elif name in results:
            parts.append(f"## {name}: failed\n\n    {results[name]['error'].strip().splitlines()[-1]}")
    elsewhere = [other for other in others if other["machine"]["cpu"] != results["machine"]["cpu"]]
    if elsewhere and "training" in results and "error" not in results["training"]:
        parts.append(_processors([results, *elsewhere]))
    return "\n\n".join(parts) + "\n"


def _processors(every: list[Results]) -> str:
    """The time of a step over that of the hand-written loop, on each processor that was seen."""
    rows = []
    for workload, found in every[0]["training"].items():
        for name in found["peers"]:
            cells = [_over_loop(results.get("training", {}).get(workload), name) for results in every]
            rows.append([found["title"], PEERS[name].title, *cells])
    head = ["model", "trainer", *(results["machine"]["cpu"] for results in every)]
    dates = ", ".join(results["date"] for results in every)
    return f"## On each processor\n\nThe column `x` of each; measured on {dates}.\n\n" + table(head, rows)


def _over_loop(found: Any, name: str) -> str:
    if found is None or not {name, "loop"} <= found["peers"].keys():
        return "-"
    middle, low, high = ratio(found, name, "loop")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _heading(results: Results) -> str:
    machine = results["machine"]
    took = results.get("took", {"all": results.get("seconds", 0.0)})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"# Benchmark, {results['settings']}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}; "
        f"Python {machine['python']}; {machine['compiler']}; {versions}. One thread per process; load at the start "
        f"{machine['load']:.1f}; {sum(took.values()) / 60:.0f} minutes, {results['date']}. A ratio is the "
        "median of the ratios of rounds, in brackets its quartiles."
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(names)
    return "\n".join(text)


def _verdicts(results: Results) -> str:
    rows = []
    for v in targets.verdicts(results):
        unit = f" {v.target.unit}" if v.target.unit else ""
        reached = "-" if v.reached is None else f"{v.reached:.2f}{unit} [{v.low:.2f}, {v.high:.2f}]"
        rows.append([v.target.what, f"<= {v.target.limit:g}{unit}", reached, v.text])
    return table(["what", "target", "reached", "verdict"], rows)


def _training(results: Any) -> str:
    parts = ["## Time of a step\n\n`x` is the time of a step over that of the hand-written loop with AdamW foreach."]
    for found in results.values():
        rows = []
        for name, peer in found["peers"].items():
            against = _over_loop(found, name)  # "-" where the baseline was not run, or failed
            time = f"{_time(peer['us'])} [{_time(peer['us_min'])}, {_time(peer['us_max'])}]"
            rows.append(
                [
                    PEERS[name].title,
                    against,
                    time,
                    _time(peer["cpu_us"]),
                    f"{peer['cores']:.2f}",
                    ", ".join(_time(us) for us in peer.get("us_processes", [])) or "-",
                ]
            )
        rows += [[PEERS[name].title, "-", _why(text), "-", "-", "-"] for name, text in found["failed"].items()]
        parts.append(
            f"**{found['title']}**\n\n"
            + table(
                ["trainer", "x", "a step, median [min, max]", "CPU time", "cores used", "median of each process"], rows
            )
        )
    return "\n\n".join(parts)


def _why(text: str) -> str:
    return "left out: " + text.strip().splitlines()[-1].replace("|", "/")[:160]


def _time(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.2f} ms" if us < 100_000 else f"{us / 1000:.0f} ms"


def _compile_time(results: Any) -> str:
    rows = []
    for workload, found in results.items():
        for name, seconds in found["seconds"].items():
            if seconds["warm"]:
                shown = [", ".join(f"{s:.1f}" for s in seconds[k]) for k in ("cold", "warm", "cold_cpu", "warm_cpu")]
                rows.append([workload, PEERS[name].title, *shown])
        rows += [[workload, PEERS[name].title, _why(text), "-", "-", "-"] for name, text in found["failed"].items()]
    head = ["model", "trainer", "empty cache", "cache filled", "CPU, empty", "CPU, filled"]
    return "## First step, seconds\n\n" + table(head, rows)


def _memory(results: Any) -> str:
    base = results["peers"].get("loop-fused", {}).get("peak")
    rows = [
        [
            PEERS[n].title,
            "-" if base is None else f"{v['peak'] / base:.2f}",
            f"{v['peak']:.0f} MB",
            f"{v['loaded']:.0f} MB",
            f"{v['grown']:.0f} MB",
        ]
        for n, v in results["peers"].items()
    ]
    head = ["trainer", "/ hand-written fused", "peak", "after imports", "difference"]
    return "## Peak resident memory, 50 M parameters\n\n" + table(head, rows)


def _precision(results: Any) -> str:
    rows = []
    for workload, found in results.items():
        if workload == "failed":
            continue
        for policy, v in found.items():
            middle, low, high = v["ratio"]
            memory = [f"{v['peak']:.0f} MB", f"{v['grown']:.0f} MB"] if "peak" in v else ["-", "-"]
            rows.append([workload, policy, f"{middle:.2f} [{low:.2f}, {high:.2f}]", _time(v["us"]), *memory])
    rows += [["-", policy, _why(text), "-", "-", "-"] for policy, text in results["failed"].items()]
    head = ["model", "policy", "step / that of 32", "a step", "peak memory", "without imports"]
    return "## Precision policies, eager\n\n" + table(head, rows)


def _portable(results: Any) -> str:
    rows = []
    for workload, found in results.items():
        for trainer, v in found.items():
            middle, low, high = v["ratio"]
            times = [_time(v["portable"]), _time(v["native"])]
            rows.append([workload, trainer, f"{middle:.2f} [{low:.2f}, {high:.2f}]", *times])
    head = ["model", "step", "portable / native", "a portable step", "a native step"]
    return "## Portable bits, CPU time\n\n" + table(head, rows)


def _snapshots(results: Any) -> str:
    import statistics

    rows = []
    for name, rounds in results["rounds"].items():
        if rounds:
            middle = [f"{statistics.median(r[what] for r in rounds):.2f} s" for what in SNAPSHOT]
            rows.append([{"torch": "torch.save + fsync, torch.load"}.get(name, name), *middle])
    rows += [[name, _why(text), "-", "-", "-"] for name, text in results["failed"].items()]
    return (
        f"## Snapshot of {results['mb']} MB\n\n" + table(["", *SNAPSHOT.values()], rows) + "\n\n"
        "All restore from the page cache. A store deletes what its policy does not keep once a snapshot is durable, in "
        "the background; what deleting one takes is in the last column."
    )


def _loop_cost(results: Any) -> str:
    step, key, bare = (results[k] for k in ("step_us", "key_us", "bare_us"))
    return (
        "## Cost of `fit`\n\n"
        f"MLP, jit, donated: a bare loop takes {bare[0]:.0f} us a step; `fit` adds {step[0]:.1f} us "
        f"[{step[1]:.1f}, {step[2]:.1f}], and {key[0]:.2f} us [{key[1]:.2f}, {key[2]:.2f}] for each further metric "
        f"(CPU time; {results['rounds']} turns of {results['steps']} steps, after each of which `fit` logs). A call of "
        f"`fit` costs {results['call_ms'][0]:.0f} ms besides its steps, which is the check before the first of them."
    )


HOST_COST = {
    "loader_us": ("`fit` over torch's DataLoader, beyond a bare loop over it, a batch", "us"),
    "batches_us": ("`fit` over `ps.data.batches`, beyond a bare loop over it, a batch", "us"),
    "evaluate_us": ("`ps.evaluate`, beyond a bare loop of its compiled step, a batch", "us"),
    "samples_us": ("a list of samples as data, beyond torch's collation, a sample", "us"),
    "foreach": ("eager step / hand-written loop, AdamW foreach", ""),
    "fused": ("eager step, fused=True / hand-written loop, AdamW fused", ""),
    "first_batch_s": ("new process: `import purestep` after torch, to one eager batch trained", "s"),
    "first_import_s": ("of this, the import", "s"),
}


def _host_cost(results: Any) -> str:
    rows = []
    for name, (what, unit) in HOST_COST.items():
        middle, low, high = results[name]
        rows.append([what, f"{middle:.3g} {unit}".rstrip(), f"[{low:.3g}, {high:.3g}]"])
    return "## Around a step, CPU time\n\nMLP, batch 32.\n\n" + table(["what", "median", "quartiles"], rows)


def _sharding(results: Any) -> str:
    parts = ["## Steps on two gloo processes\n\n`x` is the time of a step over that of torch's, eager."]
    for model, found in results.items():
        rows = []
        for name, seconds in found["seconds"].items():
            base = "torch fully_shard" if "fsdp" in name or "fully" in name else "torch ddp"
            middle, low, high = sharding.ratio(results, model, name, base)
            rows.append([name, f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{1 / spread(seconds)[0]:.1f}"])
        rows += [[name, "-", _why(text)] for name, text in found["failed"].items()]
        parts.append(f"**{model}**\n\n" + table(["variant", "x", "steps a second"], rows))
    return "\n\n".join(parts)


def _ensembles(results: Any) -> str:
    rows = []
    for name, ms in results["ms"].items():
        middle, low, high = results["ratio"].get(name, (1.0, 1.0, 1.0))
        rows.append([name, _time(ms * 1000), f"{middle:.2f} [{low:.2f}, {high:.2f}]"])
    compiled = ", ".join(f"{name} {seconds:.1f}" for name, seconds in results["compile"].items())
    return (
        f"## A step of {results['members']} small MLPs, CPU time\n\n"
        + table(["", "a step of all", "stacked / this"], rows)
        + f"\n\nCompiling with an empty cache, seconds: {compiled}."
    )


def _imports(results: Any) -> str:
    rows = [[name, *(f"{s:.2f} s" for s in found["seconds"])] for name, found in results.items()]
    return "## Import\n\n" + table(["library", "median", "lower quartile", "upper quartile"], rows)


def chart(results: Results, path: Path) -> None:
    """Draw the time of a step of every trainer on every workload, relative to the hand-written loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {name: each for name, each in results["training"].items() if "loop" in each["peers"]}
    figure, axes = plt.subplots(1, len(found), figsize=(4.6 * len(found), 4.8), squeeze=False)
    for axis, each in zip(axes[0], found.values(), strict=True):
        names = list(each["peers"])[::-1]
        values = [ratio(each, name, "loop") for name in names]
        middles = [v[0] for v in values]
        errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        colors = ["#2a6f97" if PEERS[name].ours else "#b5b5b5" for name in names]
        axis.barh(range(len(names)), middles, xerr=errors, color=colors, error_kw={"lw": 0.8, "ecolor": "#444444"})
        for i, value in enumerate(middles):
            axis.text(value, i, f" {value:.2f}", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), [PEERS[name].title for name in names], fontsize=7)
        axis.axvline(1.0, color="#444444", lw=0.8, ls=":")
        axis.set_title(each["title"], fontsize=9)
        axis.set_xlabel("time of a step / hand-written loop, AdamW foreach", fontsize=7)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
