"""The workflow of the forge and the hooks of pre-commit: only targets of the Makefile, at the versions it installs."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
HOOKS = [h for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for h in r["hooks"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def commands(workflow):
    """Each command of a workflow, once for every row of its job's matrix."""
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for target in matrix.get("target", [""]) if "run" in step else []:
                yield step["run"].replace("${{ matrix.target }}", target)


def wrong(command):
    """What is wrong with a command of a workflow, or None."""
    tool, target, *settings = re.sub(r'="[^"]*"', "=", command).split()
    if tool != "make" or "\n" in command.strip():
        return f"does more than to call make: {command}"
    unknown = {s.split("=")[0] for s in settings} - set(re.findall(r"^([A-Z_]+) \??=", MAKEFILE, re.MULTILINE))
    if target not in TARGETS or unknown:
        return f"the Makefile has no {target if target not in TARGETS else unknown}"
    return None


def test_jobs_call_targets_of_the_makefile_and_nothing_else():
    called = list(commands(WORKFLOW))
    assert len(called) > 3
    assert [problem for problem in map(wrong, called) if problem] == []
    assert set("lint docs test test-slow test-oldest test-newest".split()) <= {c.split()[1] for c in called}


@pytest.mark.parametrize("command", ["pytest tests", "make nothing", "make test TYPO=1", "make lint\npip install x"])
def test_a_wrong_command_is_found(command):
    assert wrong(command)


def test_the_forge_runs_the_versions_of_python_that_the_project_claims():
    tested = set(WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"])
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", c)}
    assert tested == claimed
    assert PROJECT["requires-python"] == ">=" + min(claimed, key=lambda v: int(v.split(".")[1]))


def test_hooks_have_the_versions_that_make_installs():
    pinned = set((ROOT / "constraints.txt").read_text().split())
    asked = [version for hook in HOOKS for version in hook.get("additional_dependencies", [])]
    assert len(asked) == 2
    assert [version for version in asked if version not in pinned] == []
    (mypy,) = (hook for hook in HOOKS if hook["id"] == "mypy")
    assert mypy["entry"].startswith(re.search(r"^VENV := (\S+)$", MAKEFILE, re.MULTILINE)[1] + "/bin/python")


def test_the_local_run_calls_make_only():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    called = [line.strip() for line in lines if line.strip().startswith("make ") and "$" not in line]
    assert {"make lint", "make docs"} <= set(called)
    assert [problem for problem in map(wrong, called) if problem] == []


def test_the_selection_for_the_ends_of_the_range_names_tests_that_exist():
    text = re.search(r"^ENDS \?= (.*?[^\\])\n", MAKEFILE, re.MULTILINE | re.DOTALL)[1]
    named = re.findall(r"(?:[a-z_]+/)*test_[a-z_]+\.py", text.replace("tests/", ""))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
