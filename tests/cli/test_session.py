"""The terminal sessions of docs/cli.md, run again; and what only a process of its own shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import shared_experiment
from shared_signals import send_when_logged

import purestep as ps

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cli.md"
COMMAND = "import sys; from purestep.cli.command import main; sys.exit(main())"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def purestep(*words: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """The real command, in an interpreter of its own."""
    command = [sys.executable, "-m", "purestep", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def sessions(page: str) -> list[tuple[str, list[str]]]:
    """Each command of a page with the lines that it printed."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", page, re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def masked(lines: list[str]) -> list[str]:
    """Lines without what another machine, another moment or another folder changes."""
    text = "\n".join(lines)
    text = re.sub(r"\b(?=\w*\d)[0-9a-f]{7,64}\b", "DIGEST", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", text)
    text = re.sub(r"\S*/(?=runs/|sine\.py|curves|model)", "", text)
    text = re.sub(r"(?m)^(program|commit|torch)\b.*", r"\1", text)
    text = re.sub(r"\b\d+ ulp|-?\d+\.\d+(e-?\d+)?|\d+ differ\b", "N", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def write_experiment(directory: Path) -> None:
    (directory / "sine.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1])


@pytest.mark.slow
def test_the_sessions_of_the_page(zygote, tmp_path):
    write_experiment(tmp_path)
    told = sessions(PAGE.read_text())
    assert len(told) >= 18
    for line, lines in told:
        name, *words = shlex.split(line)
        assert name == "purestep"
        done = zygote.run(COMMAND, *words, cwd=tmp_path, env=ENVIRONMENT)
        shown = (done.stdout + done.stderr).splitlines()
        assert "Traceback" not in done.stderr
        if words[0] == "doctor":  # of another machine
            assert {row.split("  ")[0] for row in shown} >= {row.split("  ")[0] for row in lines}
        else:
            assert masked(shown) == masked(lines), line


@pytest.mark.slow
def test_a_printed_config_reproduces_the_digest(zygote, tmp_path):
    file = shared_experiment.write(tmp_path)
    flags = "--optimizer lion --optimizer.learning_rate 1e-3 --model.width 8 --seed 3 --scale 2 --until 1epochs".split()
    first = purestep("run", file, *flags, "--run-dir", "a", "--json", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    printed = zygote.run(COMMAND, "run", str(file), *flags, "--print-config", cwd=tmp_path, env=ENVIRONMENT)
    (tmp_path / "a.yaml").write_text(printed.stdout)
    words = ("run", str(file), "--config", "a.yaml", "--run-dir", "b", "--json")
    again = zygote.run(COMMAND, *words, cwd=tmp_path, env=ENVIRONMENT)
    assert json.loads(again.stdout)["digest"] == json.loads(first.stdout)["digest"]
    assert ps.open(tmp_path / "a").settings == ps.open(tmp_path / "b").settings


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_as_it_ends_fit(zygote, tmp_path, number, code):
    words = ("run", str(shared_experiment.write(tmp_path)), "--run-dir", "a", "--until", "5000epochs")
    process = zygote.popen(COMMAND, *words, cwd=tmp_path, env=ENVIRONMENT)
    out, errors = send_when_logged(process, tmp_path / "a" / "metrics.csv", 3, number)
    assert (process.returncode, errors) == (code, "")
    assert "the same command continues it" in out
    assert ps.snapshot.steps(tmp_path / "a")


@pytest.mark.slow
def test_a_sweep_of_runs_together_that_was_killed_goes_on_with_the_same_bits(zygote, tmp_path):
    file = shared_experiment.write(tmp_path)
    words = ("sweep", str(file), "--seed", "0..1", "--until", "6epochs", "--vmap", "--json")
    process = zygote.popen(COMMAND, *words, "--run-dir", "killed", cwd=tmp_path, env=ENVIRONMENT)
    send_when_logged(process, tmp_path / "killed" / "seed=1" / "metrics.csv", 25, signal.SIGKILL)
    reached = [ps.snapshot.steps(tmp_path / "killed" / f"seed={seed}") for seed in range(2)]
    assert all(0 < steps[-1] < 60 for steps in reached)
    again, straight = (
        zygote.run(COMMAND, *words, "--run-dir", name, cwd=tmp_path, env=ENVIRONMENT) for name in ("killed", "whole")
    )
    assert (again.returncode, again.stderr, straight.returncode) == (0, "", 0)
    digests = [[row["digest"] for row in json.loads(done.stdout)] for done in (again, straight)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 2


def test_help_needs_no_torch_and_a_table_neither(bare, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text('{"format": 1, "settings": {"lr": 0.1}}')
    code = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy")]:
    del sys.modules[name]
sys.modules["torch"] = sys.modules["numpy"] = None  # an import of them is an error now
from purestep.cli.command import main
assert main(["--help"]) == main(["run", "--help"]) == main(["--version"]) == 0
assert main(["runs", sys.argv[1]]) == main(["runs", sys.argv[1], "--json"]) == 0
assert main(["runz"]) == 2
"""
    done = bare.run(code, str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert '"lr": 0.1' in done.stdout


def test_help_is_fast(tmp_path):
    """In seconds of the processor, because other tests keep both cores busy; 0.08 where this was written."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert purestep("--help", cwd=tmp_path).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_the_entry_point_is_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["purestep"].partition(":")
    assert getattr(import_module(module), name)(["--version"]) == 0


@pytest.mark.slow
def test_hydra_composes_and_sweeps_an_experiment(tmp_path):
    pytest.importorskip("hydra")
    words = ["--multirun", "model=mlp,conv", "optimizer=lion", "data=small", "until=1 epochs", "hydra.sweep.dir=sweep"]
    command = [sys.executable, str(ROOT / "examples" / "hydra" / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = ps.runs(tmp_path / "sweep")
    assert [row.settings["model"]["name"] for row in table] == ["Mlp", "Conv"]
    assert {row.why for row in table} == {"reached 1 epochs"}
    assert table[0].settings["optimizer"] == {"name": "lion", "learning_rate": 3e-4}
    flags = "--model Conv --optimizer lion --optimizer.learning_rate 3e-4 --data.samples 256 --data.batch 32".split()
    file = ROOT / "examples" / "hydra" / "experiment.py"
    same = purestep("run", file, *flags, "--until", "1epochs", "--run-dir", "same", "--json", cwd=tmp_path)
    assert json.loads(same.stdout)["digest"] == table[1].digest


@pytest.mark.slow
def test_hydra_refuses_what_no_setting_is(tmp_path):
    pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    def make(tx: ps.optim.GradientTransformation, *, seed: int = 0) -> ps.Experiment:
        raise AssertionError("it is not called")

    with pytest.raises(ps.errors.ConfigError, match=r"the setting tx\.lr is no setting"):
        ps.Experiment.of(make, OmegaConf.create({"tx": {"name": "sgd", "lr": 0.1}}))
