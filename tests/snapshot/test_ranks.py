"""Several ranks write one store: `ranks_of_a_job.py` in four gloo processes, and what each of them saw."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from purestep import tree
from purestep.errors import ConfigError, CorruptSnapshot, SnapshotError, TemplateMismatch, TreeError
from purestep.snapshot import Ranks, Store, durable_directories
from purestep.snapshot.codec import encode
from purestep.snapshot.packing import Piece
from purestep.snapshot.shards import copy_overlap, count, full_box, overlap

JOB = Path(__file__).with_name("ranks_of_a_job.py")


@pytest.fixture(scope="session")
def job(zygote, once):
    """What the ranks have seen, and the root of their stores."""
    root = once("job", lambda root: _start(zygote, root))
    return json.loads((root / "seen.json").read_text()), root


@pytest.fixture(scope="session")
def every_pair(zygote, once):
    """What the ranks have seen where each layout restored what each has saved."""
    root = once("every-pair", lambda root: _start(zygote, root, "every pair"))
    return json.loads((root / "seen.json").read_text())


def _start(zygote, root, *options):
    environment = dict(os.environ) | {"WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                zygote.popen(JOB, str(root), *options, env=environment | {"RANK": str(rank)}, preload=zygote.RANKS)
            )
            for rank in range(4)
        ]
        ended = [child.communicate(timeout=240) for child in started]
        last = 0 if options else -signal.SIGKILL
        assert [child.returncode for child in started] == [0, 0, 0, last], "".join(t for _, t in ended)
    (root / "seen.json").write_text(json.dumps([json.loads(out) for out, _ in ended[:3]]))


def seen_by_all(job, name):
    """What every rank has seen, which is the same."""
    first, *others = [seen[name] for seen in job[0]]
    for other in others:
        assert other == first
    return first


def test_layouts_restore_what_other_layouts_saved(job):
    check_everywhere(job[0], 25)


@pytest.mark.slow
def test_every_layout_restores_what_every_layout_saved(every_pair):
    check_everywhere(every_pair, 49)


def check_everywhere(by_rank, pairs):
    found = {}
    for seen in by_rank:
        found |= {name: found.get(name, True) and good for name, good in seen["everywhere"].items()}
    assert len(found) == pairs
    assert [name for name, good in found.items() if not good] == []


def test_each_rank_writes_what_it_owns_and_no_copy_of_it(job):
    _, root = job
    parts = job[0][0]["parts"]
    assert parts["4 rows"] == parts["2x2 tiles"] == ["0", "1", "2", "3"]
    assert (parts["2x2 hybrid"], parts["2 plain"]) == (["0", "1"], ["0"])
    for number, layout in enumerate(parts):
        made = Store(root / "all" / str(number)).read_manifest(3)
        wanted = sum(count(full_box(leaf)) for leaf in made.leaves if leaf.has_bytes)
        assert sum(count(piece.box) for piece in made.pieces) == wanted, layout
        by_rank = [sum(piece.nbytes for piece in made.pieces if piece.rank == rank) for rank in range(4)]
        if layout == "4 rows":
            assert max(by_rank[1:]) < 0.27 * (sum(by_rank) - 1_600_000)  # all but the single row, which rank 0 has


def test_one_process_reads_every_layout_without_torch_distributed(job, zygote):
    script = """
import sys
from pathlib import Path
import purestep as ps
from purestep import snapshot, tree
for path in sorted((Path(sys.argv[1]) / "all").iterdir()):
    value = ps.restore(path)
    assert value["tied"] is value["weight"]
    print(tree.digest(value) == snapshot.manifest(path, 3).digest, tree.digest(value)[:8])
print("torch.distributed.tensor" in sys.modules)
"""
    done = zygote.run(script, str(job[1]), preload="orbax.checkpoint xxhash")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines), lines[-1]) == (0, "", 8, "False")
    assert len(set(lines[:-1])) == 1
    assert lines[0].startswith("True ")


def test_every_rank_gets_the_same_answers(job):
    idle, done, after, again, back, different, bad, unchecked, closed = seen_by_all(job, "answers")
    assert (idle, done, after) == ([[], 0], [[1, 2, 3], [2, 3], 3, 3, 2], [[], 0])
    assert again[0] == "SnapshotError"
    assert again[1].startswith("step 3 is not after the latest snapshot, of step 3\n")
    assert back[:2] == [[2], True]
    assert "no snapshot of step 9" in back[2][1]
    assert different == ["SnapshotError", "ranks save different steps\n  where:   by rank: [5, 5, 6, 5]"]
    for kind, text in (bad, unchecked):
        assert (kind, text.split("\n")[0]) == ("TreeError", "rank 3: a leaf of type builtins.type cannot be stored")
    assert closed[1].startswith("the store is closed")


def test_a_failure_on_one_rank_is_told_once_on_all_and_leaves_what_was_there(job):
    *failures, left = seen_by_all(job, "failure")
    for rank, step, ((kind, text), once, quick, newest) in zip((1, 0, 2, 0), (2, 3, 4, 5), failures, strict=True):
        assert (kind, once, quick, newest) == ("SaveFailed", None, True, 1)
        assert text.startswith(f"the save of step {step} failed\n  where:   ROOT/failure/{step}\n")
        assert f"why:     rank {rank}: OSError: [Errno 28] No space left on device\n  instead" in text
        assert text.endswith("untouched: 1")
    assert left == ["1", "9"]


def test_damage_and_mismatch_on_one_rank_are_the_verdict_of_all(job):
    first = job[0][0]["damage"]
    assert [seen["damage"][2] for seen in job[0]] == [1, 0, 0]  # warnings: once a job
    for seen in job[0]:
        step, same, _, skipped, asked, odd, absent = seen["damage"]
        assert (step, same) == (1, True)
        assert skipped == [2, first[3][1]]
        assert skipped[1].startswith("rank 3: stored leaves are corrupt\n  where:   ['large']: float32[603, 611]\n")
        assert asked[0] == "CorruptSnapshot"
        assert "restore(step=1)" in asked[1]
        assert odd[0] == "TemplateMismatch"
        assert odd[1].startswith("rank 2: the snapshot does not have the structure")
        assert absent[0] == "SnapshotError"
        assert "are of steps 1, 2" in absent[1]


def test_states_of_plans_come_back_under_other_plans(job):
    equal, placed, split = seen_by_all(job, "plans")
    assert (equal, placed) == (True, True)
    assert min(split.values()) >= 12


def test_a_rank_that_dies_in_a_save_is_named_and_the_snapshot_before_is_good(job):
    seen, root = job
    for rank, each in enumerate(seen):
        kind, text = each["death"]
        if rank and kind == "Abandoned":  # rank 0 was the first to lose patience
            assert text.endswith(" gave up the save of step 2")
            continue
        assert (kind, text.split("\n")[0]) == ("SnapshotError", "rank 3 did not write its shards of step 2 within 1 s")
        assert f"where:   rank {rank} of 4 waited in ROOT/2.purestep-tmp-" in text
    assert Store(root / "death").steps() == [1]
    assert Store(root / "death").restore().skipped == ()
    with Store(root / "death") as store:
        store.save(2, {"w": torch.ones(2)})
    assert sorted(path.name for path in (root / "death").iterdir()) == ["2"]
    assert not [path for path in root.rglob(f"*{durable_directories.MARK}*") if path.parts[-2] != "death"]


# --- in one process ---------------------------------------------------------------------------------------------------


def test_ranks_are_checked():
    for bad in ({"rank": 1, "size": 1}, {"rank": -1}, {"rank": 0, "size": 2}):
        with pytest.raises(ConfigError, match="ranks are numbered from 0, and exchange values"):
            Ranks(**bad)


def test_what_one_rank_met_is_raised_on_all():
    reports = [None, ["CorruptSnapshot", "bytes"], ["TemplateMismatch", "shapes"]]
    for rank, mine in enumerate([None, CorruptSnapshot("bytes"), TemplateMismatch("shapes")]):
        with pytest.raises(TemplateMismatch, match=r"^rank 1: bytes\nrank 2: shapes$"):
            Ranks(rank, 3, lambda value: reports).raise_everywhere(mine)
    Ranks(0, 3, lambda value: [None] * 3).raise_everywhere(None)
    same = [["TreeError", "x"]] * 2
    with pytest.raises(TreeError, match=r"^x$"):  # what all met is said once
        Ranks(0, 2, lambda value: same).raise_everywhere(TreeError("x"))
    with pytest.raises(SnapshotError, match=r"^rank 1: what$"):
        Ranks(0, 2, lambda value: [None, ["OSError", "what"]]).raise_everywhere(None)


def test_boxes_lay_into_each_other(seed):
    torch.manual_seed(seed)
    for _ in range(50):
        shape = tuple(torch.randint(1, 6, (3,)).tolist())
        value = torch.randint(0, 1 << 60, shape)
        (leaf,) = encode(value).leaves
        boxes = []
        for _ in range(2):
            start = tuple(int(torch.randint(0, n, ())) for n in shape)
            boxes.append(
                (start, tuple(int(torch.randint(1, n - s + 1, ())) for s, n in zip(start, shape, strict=True)))
            )
        cuts = [tuple(slice(s, s + n) for s, n in zip(*box, strict=True)) for box in boxes]
        target = torch.full(boxes[1][1], -1)
        source = tree.tensor_bytes(value[cuts[0]]).copy()
        laid = copy_overlap(leaf, source, boxes[0], target.reshape(-1).view(torch.uint8).numpy(), boxes[1])
        wanted = torch.full(shape, -1)
        wanted[cuts[0]] = value[cuts[0]]
        assert torch.equal(target, wanted[cuts[1]])
        assert laid == count(overlap(*boxes)) == int((target != -1).sum())


def test_pieces_are_json():
    piece = Piece(3, (0, 2), (4, 5), 1, "arena-0", 8, 80, "0" * 16)
    assert Piece.from_json(json.loads(json.dumps(list(piece)))) == piece
