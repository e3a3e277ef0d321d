"""The command line in this process: settings in and out, errors in one or two lines, tables."""

from __future__ import annotations

import email.message
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import shared_experiment
import yaml

import purestep as ps
from purestep.cli import doctor
from purestep.cli.command import COMMANDS, main
from purestep.record.kinds import REQUIRED, SettingError, kind_of, settings_of
from purestep.record.settings import decode, encode
from purestep.step_protocol import Seat


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An experiment that this process imports once."""
    before = list(sys.path)
    yield shared_experiment.write(tmp_path_factory.mktemp("experiment"))
    sys.path[:] = before
    sys.modules.pop("sine_experiment", None)


@pytest.fixture
def command(capsys, file, tmp_path, monkeypatch):
    """Calls the command in an empty directory; FILE is the experiment: returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(line: str | list[str]) -> tuple[int, str, str]:
        words = line.split() if isinstance(line, str) else line
        code = main([word.replace("FILE", str(file)) for word in words])
        out, errors = capsys.readouterr()
        return code, out, errors

    return call


def config(command, line: str | list[str]) -> dict:
    code, out, errors = command(["run", "FILE", "--print-config", *(line.split() if isinstance(line, str) else line)])
    assert (code, errors) == (0, "")
    return yaml.safe_load(out)


# --- malformed command lines ------------------------------------------------------------------------------------------

MALFORMED = {
    # a command line: what its one or two lines say
    "rnu FILE": "no command 'rnu'.*purestep run",
    "--jobs 2": "no option --jobs",
    "run": "required: FILE",
    "run nowhere.py": "no such file: nowhere.py",
    "run experiment": "FILE is a Python file",
    "run FILE extra": "no argument 'extra'",
    "run FILE:nothing": "no function 'nothing'",
    "run FILE --sead 1": "--sead is no setting.*--seed",
    "run FILE --optimzer lion": "--optimzer is no setting.*--optimizer",
    "run FILE --width 3": "--width is no setting.*--model.width",
    "run FILE --seed one": "--seed must be a whole number, not 'one'",
    "run FILE --seed 1.5": "--seed must be a whole number",
    "run FILE --seed": "--seed has no value",
    "run FILE --scale fast": "--scale must be a number, not 'fast'",
    "run FILE --drop fast": "--drop must be a number or none",
    "run FILE --clip perhaps": "--clip must be True or False",
    "run FILE --loss squared": "--loss must be 'square' or 'abs'.*--loss square",
    "run FILE --noise much": "--noise must be one of none, some",
    "run FILE --sizes 1,x": "--sizes must be a sequence, each a whole number",
    "run FILE --until 5parsecs": "--until must be the end of a run, such as 5epochs",
    "run FILE --policy bf16-mixd": "--policy must be a precision policy.*--policy bf16-mixed",
    "run FILE --plan fdsp": "--plan must be one of ddp, fsdp, hsdp, single, zero1, zero2 or none.*--plan fsdp",
    "run FILE --optimizer adamx": "--optimizer must be a name such as adamw.*--optimizer adam",
    "run FILE --optimizer lion": "--optimizer.learning_rate has no default",
    "run FILE --optimizer __import__('os')": "--optimizer must be a name",
    "run FILE --optimizer adamw(lr=1)": "--optimizer.lr is no setting",
    "run FILE --optimizer.learning_rte 1": "--optimizer.learning_rte is no setting.*--optimizer.learning_rate",
    "run FILE --optimizer.learning_rate -1": "--optimizer cannot be made: .*learning_rate=-1",
    "run FILE --optimizer.b1.x 1": "--optimizer.b1 has no settings of its own",
    "run FILE --data 3": "--data is a group of settings.*--data.samples",
    "run FILE --model Cnn": "--model must be one of Mlp, Linear",
    "run FILE --model Linear --model.width 3": "--model.width is no setting",
    "run FILE --config missing.yaml": "--config missing.yaml cannot be read",
    "run FILE --config list.yaml": "--config list.yaml holds no settings",
    "run FILE --config wrong.yaml": "wrong.yaml: --sead is no setting.*--seed",
    "run FILE --dry-run 0": "--dry-run: must be a whole number from 1 on",
    "run FILE --processes many": "--processes: must be a whole number",
    "run FILE --resume perhaps": "--resume must be auto, must, never",
    "run FILE --device gpu": "--device gpu: .*--device cpu",
    "run FILE --logger csw": "--logger must be one of csv, .*--logger csv",
    "run FILE:broken": "learning_rate=-1.0",
    "run FILE:broken --lr 0.1": "nothing says when the run ends",
    "run plain.py": "no function that is annotated to return a ps.Experiment",
    "run two.py": "several experiments.*two.py:one or two.py:two",
    "sweep FILE --seed 0..x": "--seed must be a whole number, not '0..x'",
    "sweep FILE --seed 1,1": "two runs of the sweep have the same settings",
    "sweep FILE --halving 2 --until 9steps": "--halving keeps one run in two or more, by a metric",
    "sweep FILE --halving 2 --metric a --until 1steps --seed 0..3": "the runs are too short",
    "sweep FILE --seed": "--seed has no value",
    "sweep FILE --vmap --jobs 2": "--vmap trains runs together in one process.*one of the two",
    "sweep FILE --vmap 3": "no argument '3'",
    "sweep FILE --vmap=yes": "--vmap: ignored explicit argument 'yes'",
    "sweep FILE --vmp": "--vmp",
    "run FILE --vmap": "--vmap is no setting",
    "plot nowhere curves.svg": "OUT must end with .png.*curves.png",
    "sweep FILE --jobs none": "--jobs: must be a whole number",
    "runs nowhere": "no such directory: nowhere",
    "runs --sort": "--sort: expected one argument",
    "runs --srt name": "there is no option --srt.*--sort",
    "show nowhere": "no such run: nowhere",
    "show .": "no run directory: ..*purestep runs .",
    "replay . --at 5": "no run directory",
    "replay nowhere": "required: --at",
    "fork nowhere --at zero": "--at: must be a whole number from 1 on",
    "compare nowhere": "required: B",
    "export nowhere model.safetensors": "no such run: nowhere",
    "completion fsh": "invalid choice: 'fsh'",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_command_line_is_answered_in_two_lines(command, tmp_path, line):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "wrong.yaml").write_text("sead: 1\n")
    (tmp_path / "plain.py").write_text("def experiment(): ...\n")
    made = "import purestep as ps\ndef one() -> ps.Experiment: ...\ndef two() -> ps.Experiment: ...\n"
    (tmp_path / "two.py").write_text(made)
    code, out, errors = command(line)
    sys.modules.pop("plain", None), sys.modules.pop("two", None)
    assert (code, out) == (2, "")
    assert 1 <= len(errors.splitlines()) <= 2
    assert re.search(MALFORMED[line], errors.replace("\n", " ")), errors
    assert "Traceback" not in errors


def test_an_error_of_the_file_is_shown_from_that_file_on(command, tmp_path):
    (tmp_path / "unimportable.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "unparsable.py").write_text("def f(:\n")
    code, out, errors = command("run unimportable.py")
    lines = errors.splitlines()
    assert (code, out, lines[0]) == (1, "", "Traceback (most recent call last):")
    assert lines[1].endswith('unimportable.py", line 1, in <module>')
    assert lines[-1] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    code, out, errors = command("run unparsable.py")
    assert (code, out) == (1, "")
    assert errors.splitlines()[0].endswith('unparsable.py", line 1')


@pytest.mark.parametrize(("flag", "value"), [("--no-clip", False), ("--clip", True)])
def test_a_sweep_takes_switches(command, tmp_path, flag, value):
    assert command(f"sweep FILE {flag} --until 1steps --run-dir sweep")[0] == 0
    assert [run.settings["clip"] for run in ps.runs(tmp_path / "sweep")] == [value]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_from_types_defaults_and_docstrings(command):
    found = config(command, "")
    assert found["optimizer"] == {"name": "adamw", "learning_rate": 0.003}
    assert (found["until"], found["policy"], found["plan"], found["noise"]) == ("2 epochs", "32", None, "none")
    code, out, errors = command("run FILE --help")
    assert (code, errors) == (0, "")
    for part in ("--model.width N", "hidden units", "--optimizer.learning_rate", "--dry-run N", "random numbers"):
        assert part in out


def test_text_becomes_values_of_the_types(command):
    line = "--seed 3 --scale 1e-3 --drop none --tags a,b --sizes [1,2] --clip --until 5epochs|100steps --noise some"
    found = config(command, line)
    assert {name: found[name] for name in "seed scale drop tags sizes clip until noise".split()} == {
        "seed": 3,
        "scale": 1e-3,
        "drop": None,
        "tags": ["a", "b"],
        "sizes": [1, 2],
        "clip": True,
        "until": "5 epochs or 100 steps",
        "noise": "some",
    }
    assert config(command, "--clip --no-clip")["clip"] is False
    assert config(command, ["--seed=-1", "--drop=0.5"])["drop"] == 0.5


def test_classes_and_functions_go_by_name_and_dotted_flags(command):
    found = config(command, "--optimizer.learning_rate 1e-4 --optimizer lion --model Linear --model.bias false")
    assert found["optimizer"] == {"name": "lion", "learning_rate": 1e-4}
    assert found["model"] == {"name": "Linear", "bias": False}
    line = "--optimizer.learning_rate cosine_decay_schedule(0.1,50) --optimizer.learning_rate.alpha 0.5 --plan fsdp"
    found = config(command, line)
    schedule = {"name": "cosine_decay_schedule", "init_value": 0.1, "decay_steps": 50, "alpha": 0.5}
    assert found["optimizer"] == {"name": "adamw", "learning_rate": schedule}
    assert found["plan"] == {"name": "fsdp"}
    chained = config(command, ["--optimizer", "chain(clip_by_global_norm(1.0), adamw(3e-3, b1=0.8))"])["optimizer"]
    assert chained["transforms"][1] == {"name": "adamw", "learning_rate": 0.003, "b1": 0.8}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--optimizer lion --optimizer.learning_rate 1e-5 --optimizer.mask *.weight --model Linear --tags a,b",
        "--optimizer muon(warmup_cosine_decay_schedule(0.0,0.1,5,50)) --plan hsdp(fsdp=2) --drop 0.1 --until 1h",
        "--policy bf16-mixed --sizes [] --noise some --data.batch 10 --plan zero2 --plan.offload optimizer",
    ],
)
def test_a_printed_config_gives_the_same_config(command, tmp_path, line):
    found = config(command, line)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(found))
    assert config(command, "--config a.yaml") == found
    later = config(command, "--config a.yaml --seed 9")
    assert later == {**found, "seed": 9}


def test_yaml_may_name_what_it_changes_only(command, tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer: sgd(1e-2)\ndata: {batch: 10}\n")
    (tmp_path / "b.yaml").write_text("optimizer: {momentum: 0.9}\nscale: 1e-2\n")
    found = config(command, "--config a.yaml --config b.yaml")
    assert found["optimizer"] == {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9}
    assert (found["data"], found["scale"]) == ({"samples": 200, "batch": 10}, 0.01)


def every_optimizer():
    for name, maker in kind_of(ps.optim.GradientTransformation).makers.items():
        needed = {setting.name: 0.01 for setting in settings_of(maker) if setting.default is REQUIRED}
        try:
            yield name, maker(**needed)
        except (ps.errors.PurestepError, TypeError):
            continue  # it takes another transformation, or a count


def test_every_optimizer_is_written_and_read_back():
    kind, names = kind_of(ps.optim.GradientTransformation), []
    for name, value in every_optimizer():
        plain = json.loads(json.dumps(encode(value, kind, "tx")))
        assert decode(plain, kind, "tx") == value
        names.append(name)
    assert {"adamw", "lion", "muon", "sgd", "lamb", "schedule_free_adamw", "amsgrad"} <= set(names)
    assert len(names) > 50
    for value in (ps.optim.sam(ps.optim.sgd(0.1), rho=0.1), ps.optim.accumulate(ps.optim.adamw(1e-3), every=4)):
        assert decode(encode(value, kind, "tx"), kind, "tx") == value


def test_what_no_text_stands_for_is_refused():
    tx = ps.optim.adamw(lambda step: 0.1)
    with pytest.raises(SettingError, match=r"the setting tx is no call of the functions of ps\.optim"):
        encode(tx, kind_of(ps.optim.GradientTransformation), "tx")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_recorded_and_shown(command):
    line = "run FILE --run-dir runs/a --until 2epochs --optimizer lion --optimizer.learning_rate 1e-3 --json"
    code, out, errors = command(line)
    told = json.loads(out)
    assert (code, errors, told["reason"], told["batches"]) == (0, "", "reached 2 epochs", 20)
    run = ps.open("runs/a")
    assert run.settings["optimizer"] == {"name": "lion", "learning_rate": 1e-3}
    assert run.header(20).info["identity"]["settings"]["scale"] == 1.0
    assert run.programs[0].function == "experiment"
    assert "class Settings" in run.programs[0].source
    assert run.digest == told["digest"]
    (row,) = json.loads(command("runs --json --sort batches")[1])
    assert (row["name"], row["batches"], row["settings"]["scale"]) == ("a", 20, 1.0)
    assert "lion(learning_rate=0.001)" in command("show runs/a")[1]
    assert [row["position"] for row in json.loads(command("snapshots runs/a --json")[1])] == [10, 20]
    code, out, errors = command("replay runs/a --at 20 --from 18 --json")
    rows = json.loads(out)
    assert (code, errors, [row["position"] for row in rows]) == (0, "", [19, 20])
    assert (rows[1]["digest"], rows[1]["as stored"]) == (run.digest, True)


@pytest.mark.slow
def test_runs_are_forked_compared_bisected_and_verified(command):
    command("run FILE --run-dir runs/a --until 3epochs")
    code, _, errors = command("fork runs/a --at 25 --optimizer.learning_rate 1e-4 --until 4epochs --run-dir runs/b")
    assert (code, errors) == (0, "")
    rows = json.loads(command("runs --json --sort name")[1])
    assert [row["settings"]["optimizer"]["learning_rate"] for row in rows] == [3e-3, 1e-4]
    assert "a@25" in command("runs")[1]
    assert command("verify runs/a --every 3")[1].splitlines() == ["steps     a", "20 to 30  the same bits", "verified"]
    code, _, errors = command("diff runs/a runs/b --at 40")
    assert (code, "no snapshot at 40" in errors) == (2, True)
    code, out, _ = command("diff runs/a runs/b")
    assert (code, "state.params" in out) == (1, True)
    code, out, _ = command("diff runs/a runs/a")
    assert (code, out) == (0, "the same bits\n")
    assert "setting optimizer.learning_rate" in command("compare runs/a runs/b")[1]
    assert command("run FILE --run-dir runs/c --until 3epochs --optimizer.learning_rate 1e-3")[0] == 0
    code, out, _ = command("bisect runs/a runs/c")
    assert (code, "state.params" in out) == (1, True)
    assert command("export runs/a model.pt --best val/loss")[1].endswith("model.pt\n")
    assert command("plot runs/a curves.png --metric val/loss")[1].endswith("curves.png\n")


def test_a_dry_run_writes_nothing(command, tmp_path):
    code, out, _ = command("run FILE --dry-run 2")
    assert (code, "a dry run of 2 batches" in out) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_a_resume_under_other_settings_says_which(command):
    assert command("run FILE --run-dir a --until 1epochs")[0] == 0
    with pytest.warns(ps.loop.RunChangedWarning, match=r"settings\.scale: saved with 1\.0, now 2\.0"):
        command("run FILE --run-dir a --scale 2")
    # Where it ends is no part of what it is.
    assert command("run FILE --run-dir b --until 1steps")[0] == 0
    code, out, errors = command("run FILE --run-dir b --until 2steps --strict")
    assert (code, errors, "reached 2 steps" in out) == (0, "", True)
    code, _, errors = command("run FILE --run-dir a --scale 3 --until 3epochs --strict")
    assert (code, "settings.scale" in errors) == (1, True)


def test_a_sweep_is_a_table_and_goes_on(command, tmp_path):
    line = "sweep FILE --seed 0..1 --scale 1,2 --until 3steps --run-dir s"
    code, out, errors = command(line)
    assert (code, errors) == (0, "")
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [
        [seed, scale] for seed in ("0", "1") for scale in ("1", "2")
    ]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/*/metrics.csv")}
    assert len(stamps) == 4
    assert command(line)[1] == out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_sweep_trains_runs_together(command, tmp_path):
    """Each is a run like that of the command without --vmap, and is executed again with its own bits."""
    line = "sweep FILE --seed 0..1 --until 2steps --run-dir s --vmap --json"
    code, out, errors = command(line)
    rows = json.loads(out)
    assert (code, errors) == (0, "")
    assert [row["how"] for row in rows] == ["vmapped"] * 2
    assert len({row["digest"] for row in rows}) == 2
    name = "s/seed=1"
    run = ps.open(name)
    assert (run.programs[0].function, run.programs[0].file.endswith("sine_experiment.py")) == ("experiment", True)
    assert (run.settings["seed"], run.seat_at(2)) == (1, Seat(1, 2))
    replayed = json.loads(command(f"replay {name} --at 2 --json")[1])
    assert (replayed[0]["digest"], replayed[0]["as stored"]) == (run.digest, True)
    assert command(f"verify {name}")[:2] == (0, f"steps   {Path(name).name}\n0 to 2  the same bits\nverified\n")
    assert "run 2 of 2 together" in command(f"show {name}")[1]
    assert json.loads(command(line)[1]) == rows


@pytest.mark.slow
def test_runs_that_trained_together_are_compared_forked_and_bisected(command, tmp_path):
    line = "sweep FILE --seed 0..1 --until 2epochs --run-dir s"
    assert command(f"{line} --vmap --metric val/loss --halving 2")[0] == 0
    assert command(f"{line.replace('--run-dir s', '--run-dir t')} --scale 1,2 --vmap --optimizer sgd(0.01)")[0] == 0
    tables = json.loads(command("runs s --json")[1])
    assert sorted(row["why"] for row in tables) == ["reached 1 epochs", "reached 2 epochs"]
    first, other = "t/seed=0,scale=1", "t/seed=1,scale=1"
    assert "as run 1 of 2" in command(f"show {first}")[1]
    assert "setting seed" in command(f"compare {first} {other}")[1]
    assert command(f"diff {first} {other}")[0] == 1
    assert command(f"diff {first} {first}")[0] == 0
    code, out, errors = command(f"bisect {first} {other}")
    assert (code, "first state" in out, errors) == (1, True, "")
    assert command(f"plot {first} curves.png")[0] == 0
    # A fork before the first snapshot executes the steps up to there, together as they were.
    code, out, errors = command(f"fork {first} --at 5 --scale 2 --until 2epochs --run-dir child")
    assert (code, errors) == (0, "")
    assert ps.open("child").parent.digest == next(iter(ps.replay(first, made_of(first), 4, 5))).digest
    # The same run alone parts from it by rounding: the first operation that differs is found in the mapped step.
    assert command("run FILE --seed 0 --scale 1 --optimizer sgd(0.01) --until 2epochs --run-dir alone")[0] == 0
    code, out, errors = command(f"bisect {first} alone --operation")
    assert (code, errors) == (1, "")
    assert "aten." in out


def made_of(run_dir):
    function = sys.modules["sine_experiment"].experiment
    assert ps.open(run_dir).programs[0].function == function.__name__
    return function


def test_a_sweep_is_halved(command, tmp_path):
    line = "sweep FILE --seed 0..3 --until 4steps --run-dir s --halving 2 --metric train/loss --json"
    code, out, errors = command(line)
    assert (code, errors) == (0, "")
    rows = json.loads(out)
    ends = sorted(row["why"] for row in rows)
    assert ends == ["left at 1 steps", "left at 1 steps", "left at 2 steps", "reached 4 steps"]
    best = next(row for row in rows if row["batches"] == 4)
    assert command(f"run FILE --seed {best['values']['seed']} --until 4steps --run-dir r --json")[0] == 0
    assert ps.open(tmp_path / "r").digest == best["digest"]
    assert command(line)[1] == out
    assert "another factor" in command(line.replace("halving 2", "halving 3"))[2]


def test_help_of_every_command(command):
    for name in COMMANDS:
        code, out, errors = command(f"{name} --help")
        assert (code, errors) == (0, "")
        assert out.startswith(f"usage: purestep {name}")


def test_the_doctor_knows_the_extras_by_the_metadata_of_the_package(command, monkeypatch):
    told = email.message.Message()
    for name, value in [
        ("Provides-Extra", "one"),
        ("Provides-Extra", "two"),
        ("Provides-Extra", "both"),
        ("Provides-Extra", "docs"),
        ("Requires-Dist", "torch<3,>=2.11"),
        ("Requires-Dist", "no-such-base"),
        ("Requires-Dist", "rich[jupyter]>=13; extra == 'one'"),
        ("Requires-Dist", 'no_such.thing<2; platform_system != "Windows" and extra == "two"'),
        ("Requires-Dist", 'purestep[one,two]; extra == "both"'),
        ("Requires-Dist", "no-such-docs; extra == 'docs'"),
    ]:
        told[name] = value
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: told)
    code, out, _ = command("doctor --json")
    rows = {row["what"]: row for row in json.loads(out)}
    version = importlib.metadata.version
    assert code == 1
    assert (rows["torch"]["value"], rows["no-such-base"]["verdict"]) == (version("torch"), "BAD")
    assert (rows["extra one"]["value"], rows["extra one"]["verdict"]) == (f"rich {version('rich')}", "ok")
    assert rows["extra two"]["value"] == rows["extra both"]["value"] == "missing: no_such.thing"
    assert (rows["extra both"]["verdict"], rows["extra both"]["fix"]) == ("note", 'pip install "purestep[both]"')
    assert (rows["extra docs"]["verdict"], rows["extra docs"]["fix"]) == ("ok", "")


def test_every_extra_of_the_project_is_read(monkeypatch):
    """The metadata of a build from this pyproject.toml, which an old installation need not have."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    told = email.message.Message()
    for extra, requirements in project["optional-dependencies"].items():
        told["Provides-Extra"] = extra
        for line in requirements:
            requirement, _, marker = line.partition(";")
            told["Requires-Dist"] = f"{requirement}; {marker + ' and' if marker else ''} extra == '{extra}'"
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: told)
    found = doctor.required()
    assert set(found) == {"", *project["optional-dependencies"]}
    assert set(found["remote"]) == {"fsspec", "s3fs", "gcsfs", "huggingface_hub"}
    assert all(names for extra, names in found.items() if extra)


def test_the_doctor_finds_what_is_wrong(command, monkeypatch):
    assert {"torch", "threads", "disk", "ports"} <= {row["what"] for row in json.loads(command("doctor --json")[1])}
    monkeypatch.setattr("socket.create_server", lambda *_: (_ for _ in ()).throw(OSError("no ports here")))
    code, out, _ = command("doctor")
    assert code == 1
    assert any(line.startswith("ports") and "BAD" in line for line in out.splitlines())
