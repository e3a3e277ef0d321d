"""The examples in shorter forms: each begun once as a user begins it, and then by the zygote, which is quicker."""

import hashlib
import importlib
import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_marks import slow_but
from shared_signals import send_when_logged

import purestep as ps
from examples.catalogue import EXAMPLES, Example, holds, judged, line

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
PAGE = FOLDER / "README.md"
# Files of the folder that are no examples: the list, what runs it, and what others share.
OTHERS = {"catalogue.py", "run_all.py", "hydra/experiment.py", "cartpole.py", "transformer.py"}
# Examples that quick tests run.
QUICK = ("segmentation.py",)

# What the example imports, which is most of what it costs to start it.
LOADED = "sklearn.datasets orbax.checkpoint torch.utils.tensorboard matplotlib.figure matplotlib.backends.backend_agg"


@pytest.fixture
def run(zygote):
    def run(script, *arguments, fresh=False):
        if not fresh:
            return zygote.run(ROOT / "examples" / script, *map(str, arguments), preload=LOADED, timeout=400)
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)

    return run


@pytest.mark.parametrize("file", slow_but([e.file for e in EXAMPLES if e.smoke is not None], *QUICK))
def test_an_example_in_its_smoke_setting_has_the_result_it_should(zygote, tmp_path, file):
    example = next(example for example in EXAMPLES if example.file == file)
    script, arguments = ROOT / "examples" / file, shlex.split(example.smoke)
    done = zygote.run(script, *arguments, preload="" if file in QUICK else LOADED, cwd=tmp_path, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    assert judged(example, done.returncode, done.stdout, example.smoke_expects)[1] == "", done.stdout


def test_the_list_and_the_table_name_every_example_and_none_is_long():
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")} - OTHERS
    assert sorted(e.file for e in EXAMPLES) == sorted(there)
    rows = re.findall(
        r"^\| \[`(.*?)`\]\(\1\) \| (.*?) \| (\d+) \| \d+ s \| (.*?): .+ \|$", PAGE.read_text(), re.MULTILINE
    )
    lines = {e.file: len((FOLDER / e.file).read_text().splitlines()) for e in EXAMPLES}
    assert rows == [(e.file, e.shows, str(lines[e.file]), e.result) for e in EXAMPLES]
    assert {file: count for file, count in lines.items() if count >= 200} == {}


def test_a_result_is_judged_by_what_is_expected():
    assert holds("98.7% of 359", "> 0.98")
    assert not holds("0.97 after 3 epochs", "> 0.98")
    assert holds("1.9e-1", "< 0.2")
    assert not holds("nan", "< 0.2")
    assert holds("the same bits", "the same bits")
    example = Example("x.py", "nothing", "accuracy", line("accuracy"), "> 0.9")
    assert judged(example, 0, "accuracy  0.5\naccuracy  0.95\n", example.expects) == ("0.95", "")
    assert judged(example, 0, "accuracy  0.85\n", example.expects) == ("0.85", "expected > 0.9")
    assert judged(example, 1, "accuracy  0.95\n", example.expects) == ("", "exit code 1")
    assert judged(example, 0, "precision  0.95\n", example.expects)[1].startswith("it printed no line like")


def test_the_runner_fails_where_an_example_does_and_writes_what_it_measured(tmp_path):
    for name in ("run_all.py", "catalogue.py", "README.md"):
        shutil.copy(FOLDER / name, tmp_path / name)
    (tmp_path / "digits.py").write_text("print('held-out accuracy, best kept  99.00%')\n")
    (tmp_path / "gpt.py").write_text("raise SystemExit('no text')\n")
    command = [sys.executable, "run_all.py", "digits.py", "gpt.py", "--write"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(r"^digits.py +\d+\.\d +\d+\.\d  held-out accuracy: 99.00%$", done.stdout, re.MULTILINE)
    assert re.search(r"^gpt.py +\d+\.\d +\d+\.\d  FAILED: exit code 1\nno text\n", done.stdout, re.MULTILINE)
    assert "1 of 2 ran as they should" in done.stdout
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"\(digits.py\) \|[^|]*\| 1 \| 0 s \| held-out accuracy: 99.00% \|\n", page)
    assert re.sub(r".*\(digits.py\).*\n", "", page) == re.sub(r".*\(digits.py\).*\n", "", PAGE.read_text())


@pytest.mark.slow
def test_the_gan_reads_a_folder_and_names_the_damaged_files_of_one(tmp_path):
    dcgan = importlib.import_module("examples.dcgan")
    rng, folder, picture = np.random.default_rng(0), tmp_path / "images", tmp_path / "out/samples.png"
    folder.mkdir()
    for number in range(11):
        image = Image.fromarray(rng.integers(0, 256, (17, 21, 3), dtype=np.uint8))
        image.save(folder / f"{number:02}.{'png' if number % 2 else 'jpg'}")
    made = dcgan.experiment(dcgan.Settings(data=folder, size=16, width=4, batch=4, samples=picture))
    assert made.fit(run_dir=tmp_path / "run", until=ps.epochs(5)).metrics["val/distance"] > 0
    with Image.open(picture) as image:
        assert image.size == (128, 128)

    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    assert len(dcgan.Folder(folder, 16)) == 11
    (folder / "03.png").write_bytes((folder / "05.png").read_bytes())  # whole, and another one
    (folder / "04.jpg").write_bytes((folder / "04.jpg").read_bytes()[:-200])
    (folder / "06.jpg").unlink()
    (folder / "SHA256SUMS").write_text("\n".join(line for line in sums if "04.jpg" not in line))
    with pytest.raises(ps.errors.DataError, match="3 images of 10 are damaged") as refused:
        dcgan.experiment(dcgan.Settings(data=folder))
    assert re.search(r"03.png: its checksum is not that of .*\n.*04.jpg: .*truncated.*\n.*06.jpg: ", str(refused.value))
    with pytest.raises(ps.errors.DataError, match="there are no images"):
        dcgan.Folder(tmp_path / "nothing", 16)


@pytest.mark.slow
def test_the_classifier_says_what_a_folder_needs(monkeypatch):
    classifier = importlib.import_module("examples.image_classifier")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ps.errors.DataError, match="pip install torchvision"):
        classifier.experiment(classifier.Settings(data=FOLDER))


def digest_of(out):
    return re.search(r"digest of the last state\s+([0-9a-f]{64})", out).group(1)


@pytest.mark.slow
def test_digits_learns_continues_and_leaves_what_it_says(run, tmp_path):
    first = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 2, "--workers", 2, fresh=True)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "learning_curves.png",
        "metrics.csv",
        "snapshots",
        "tensorboard",
    }
    assert float(re.search(r"accuracy, last\s+([\d.]+)%", first.stdout).group(1)) > 90
    again = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 2, "--workers", 2)
    alone = run("digits.py", "--run-dir", tmp_path / "b", "--epochs", 2, "--workers", 0)
    assert digest_of(first.stdout) == digest_of(again.stdout) == digest_of(alone.stdout)
    assert len(ps.snapshot.steps(tmp_path / "a")) == 2


@pytest.mark.slow
def test_the_killed_run_ends_with_the_digest_of_the_straight_one(zygote, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("demo_resume", ROOT / "examples" / "demo_resume.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    children, start = [], demo.start

    def fork(run_dir, epochs, workers):
        if run_dir.name == "straight":
            return start(run_dir, epochs, workers)
        arguments = map(str, ("--run-dir", run_dir, "--epochs", epochs, "--workers", workers))
        children.append(zygote.popen(demo.SCRIPT, *arguments, preload=LOADED, stderr=None))
        return children[-1]

    monkeypatch.setattr(demo, "start", fork)
    monkeypatch.setattr(sys, "argv", f"demo --run-dir {tmp_path} --epochs 4 --kills 2 --workers 0".split())
    try:
        assert demo.main() == 0
    finally:
        for child in children:
            child.__exit__()
    said = capsys.readouterr().out
    assert said.count("killed ") == 3
    assert [child.returncode for child in children] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert "the same bits" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_script_with_its_code(zygote, tmp_path, number, code):
    script, arguments = ROOT / "examples" / "digits.py", ("--epochs", "50", "--workers", "0")
    process = zygote.popen(script, "--run-dir", str(tmp_path), *arguments, preload=LOADED)
    out, errors = send_when_logged(process, tmp_path / "metrics.csv", 2, number)
    assert (process.returncode, errors) == (code, "")
    assert f"interrupted by {signal.Signals(number).name}" in out
    assert len(ps.snapshot.steps(tmp_path)) >= 1


@pytest.mark.slow
def test_the_transformer_in_float8_learns_like_the_one_in_bfloat16(zygote):
    # What torchao says while it is imported goes to stderr: its extensions for GPUs are not loaded here.
    arguments = "--no-jit --steps 12 --megabytes 0.05 --width 32 --layers 1 --context 16".split()
    done = zygote.run(FOLDER / "float8_transformer.py", *arguments, preload=LOADED, timeout=400)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^\S+ +(\S+) nats a byte", done.stdout, re.MULTILINE)]
    assert len(losses) == 2
    assert max(losses) < 5
    assert 0 < abs(losses[0] - losses[1]) < 0.2


@pytest.mark.slow
def test_the_gpt_learns_and_says_its_digest(run):
    found = [run("gpt.py", "--steps", 4, "--megabytes", 0.05, "--plan", plan) for plan in ("ddp", "fsdp")]
    assert [(r.returncode, r.stderr) for r in found] == [(0, ""), (0, "")]
    assert float(re.search(r"training loss, last\s+([\d.]+)", found[0].stdout).group(1)) < 5.6
    assert digest_of(found[0].stdout) == digest_of(found[1].stdout)
