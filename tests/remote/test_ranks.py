"""Several ranks write one run directory; rank 0 copies it, and any number of ranks begins by the copy elsewhere."""

import json
import os
import socket
from pathlib import Path

import pytest

import purestep as ps

SCRIPT = Path(__file__).with_name("ranks_job.py")
pytestmark = [pytest.mark.slow]


def ranks(zygote, size, run_dir, url, until, answer):
    """What each of some ranks saw of one run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        zygote.popen(
            SCRIPT,
            *(str(run_dir), url, str(until), str(answer)),
            env=base | (several | {"RANK": str(rank)} if size > 1 else {}),
            preload=zygote.RANKS,
        )
        for rank in range(size)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert child.returncode == 0, errors
    return [json.loads(Path(f"{answer}-{rank}.json").read_text()) for rank in range(size)]


def test_ranks_begin_by_the_copy_and_agree_on_what_happened(zygote, tmp_path):
    url = f"file://{tmp_path}/there/run"
    (whole,) = ranks(zygote, 1, tmp_path / "whole", f"file://{tmp_path}/there/whole", 9, tmp_path / "w")
    first = ranks(zygote, 2, tmp_path / "a", url, 5, tmp_path / "a1")
    assert first[0]["events"] == first[1]["events"]
    assert "Copied(step=5)" in first[0]["events"]
    assert ps.Remote(url).steps() == [5]
    second = ranks(zygote, 2, tmp_path / "b", url, 7, tmp_path / "b1")
    assert all("Resumed(step=5)" in rank["events"] for rank in second)
    (third,) = ranks(zygote, 1, tmp_path / "c", url, 9, tmp_path / "c1")
    assert "Resumed(step=7)" in third["events"]
    assert third["digest"] == whole["digest"]
    assert ps.Remote(url).steps() == [9]
