"""Whenever a process is killed, or its disk fails: the newest durable snapshot is there and whole. See `strikes.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_marks import slow_but

from tests.snapshot.strikes import SCENARIOS

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.snapshot import strikes
strikes.preload()
"""
SAMPLE = """
import json, random
name, place, seed = sys.argv[2:]
one, draw, problems = strikes.Range(name, strikes.Path(place)), random.Random(seed), []
for how in strikes.HOWS if not one.scenario.training else ("kill", "on ENOSPC"):
    problems += [one.strike(at, how) for at in draw.sample(range(1, one.count + 1), 2)]
print(json.dumps([problem for problem in problems if problem]))
"""
EVERY_FIFTH = """
import json
one = strikes.Range(sys.argv[2], strikes.Path(sys.argv[3]))
problems = [one.strike(at, "kill") for at in range(1 + int(sys.argv[4]) % 5, one.count + 1, 5)]
print(json.dumps([problem for problem in problems if problem]))
"""
HASTY = """
import json
from purestep.snapshot import writer
write = writer.write
def hasty(root, *args, **kwargs):
    for entry in strikes.Index(root).revisions():  # before the new one is durable
        strikes.durable_directories.remove(entry.path)
    write(root, *args, **kwargs)
writer.write = hasty
one = strikes.Range(sys.argv[2], strikes.Path(sys.argv[3]))
problems = [one.strike(at, "kill") for at in range(one.count // 2, one.count, 11)]
print(json.dumps([problem for problem in problems if problem]))
"""


@pytest.fixture
def problems(zygote, tmp_path):
    """What a script finds lost. It runs in a process of its own: one that has used tensorstore must not fork."""

    def found(script: str, *arguments: str) -> list[str]:
        place = str(tmp_path / "run")
        done = zygote.run(SCRIPT + script, str(ROOT), arguments[0], place, *arguments[1:], timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return found


@pytest.mark.parametrize("name", slow_but(SCENARIOS, "saves"))
def test_nothing_is_lost_at_some_operations(name, problems, seed):
    assert problems(SAMPLE, name, str(seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_at_every_fifth_operation(name, problems, seed):
    assert problems(EVERY_FIFTH, name, str(seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saves", "replaces"])
def test_a_store_that_deletes_too_early_is_caught(name, problems):
    assert any("the newest whole snapshot is None" in problem for problem in problems(HASTY, name))
