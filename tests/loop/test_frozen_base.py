"""Runs whose snapshots share what is frozen: resumed, forked, verified, and on other numbers of processes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import CorruptSnapshot, TemplateMismatch
from purestep.snapshot import manifest
from purestep.snapshot.stored_digest import check as check_digests

HERE = Path(__file__).parent
TX = ps.optim.adam(1e-2)


def experiment(until=4, *, seed=0, rule=None):
    rule = ps.lora("0", rank=2) if rule is None else rule
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    data = ps.data.batches({"x": x, "y": x[:, :3].sin()}, 5, seed=3)
    model = rule(lambda: nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 3)))
    step = ps.make_step(lambda net, batch: (net(batch["x"]) - batch["y"]).square().mean(), TX)
    saving = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.all_())
    return ps.Experiment(step, ps.init(model, TX, seed=seed), data, until=ps.steps(until), callbacks=[saving])


def used(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_run_of_adapters_resumes_and_is_the_undisturbed_one(tmp_path):
    whole = experiment(6).fit(run_dir=tmp_path / "whole")
    run_dir = tmp_path / "parts"
    experiment(4).fit(run_dir=run_dir)
    with pytest.raises(
        TemplateMismatch, match=r"trained beside another base(.|\n)*state\.buffers\['0.weight'\](.|\n)* and 1 more"
    ):
        experiment(6, seed=1).fit(run_dir=run_dir)
    resumed = experiment(6).fit(run_dir=run_dir)
    assert ps.digest(resumed.state) == ps.digest(whole.state)
    assert len(set(ps.compare(run_dir, tmp_path / "whole").digests)) == 1
    frozen = {n: whole.state.buffers[n] for n in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")}
    for step in (2, 4, 6):  # BatchNorm's statistics are no parameters: they are in each snapshot
        assert manifest(run_dir, step).base.digest == ps.digest(frozen)
        assert manifest(run_dir, step).digests["state"] == manifest(tmp_path / "whole", step).digests["state"]
    nbytes = sum(t.nbytes for t in frozen.values())
    assert used(run_dir / "snapshots" / "base") > nbytes > 4 * used(run_dir / "snapshots" / "6")

    state = experiment().state
    assert ps.digest(ps.restore(run_dir, state)) == ps.digest(whole.state)
    assert ps.digest(ps.open(run_dir).state(state, step=4)) != ps.digest(whole.state)
    child = ps.fork(run_dir, at=3, run_dir=tmp_path / "child", experiment=experiment())
    assert ps.digest(experiment(6).fit(run_dir=child.path).state) == ps.digest(whole.state)
    assert ps.verify(run_dir, experiment(6)).ok
    assert ps.verify(child.path, experiment(6)).ok

    shutil.rmtree(run_dir / "snapshots" / "base")
    with pytest.raises(CorruptSnapshot, match="the base of the snapshot is not there"):
        ps.restore(run_dir, state, step=4)


@pytest.mark.slow
def test_a_remote_copy_has_the_base_once(tmp_path):
    url = f"file://{tmp_path / 'there'}"
    remote = ps.Remote(url, keep=ps.snapshot.latest(2))
    first = experiment(6)
    whole = ps.fit(first.step, first.state, first.data, until=ps.steps(6), run_dir=tmp_path / "here", remote=remote)
    assert sum(1 for _ in (tmp_path / "there" / "base").iterdir()) == 1
    shutil.rmtree(tmp_path / "here")
    again = experiment(8)
    ps.fit(again.step, again.state, again.data, until=ps.steps(8), run_dir=tmp_path / "new", remote=remote)
    assert remote.steps() == [6, 8]
    fetched = remote.fetch(tmp_path / "fetched", step=6)
    assert ps.digest(ps.restore(fetched, again.state)) == ps.digest(whole.state)
    # A copy whose base is not complete does not count; what nothing refers to goes.
    (part,) = (tmp_path / "there" / "base").iterdir()
    (part / "copy.json").unlink()
    assert remote.steps() == []


def started(zygote, world, root, until):
    jobs = [
        zygote.popen(HERE / "ranks_base.py", str(rank), str(world), str(root), str(until), preload=zygote.RANKS)
        for rank in range(world)
    ]
    ended = []
    for child in jobs:
        with child:
            ended.append((*child.communicate(200), child.returncode))
    assert [code for *_, code in ended] == [0] * world, "\n".join(err[-3000:] for _, err, _ in ended)
    (digest,) = {out.splitlines()[-1] for out, *_ in ended}
    return digest


@pytest.mark.slow
def test_a_base_in_bf16_that_is_split_goes_on_with_other_numbers_of_processes(zygote, tmp_path):
    sys.path.insert(0, str(HERE))
    from ranks_base import experiment as on_one

    whole = {n: ps.digest(on_one(n).fit(run_dir=tmp_path / f"whole-{n}").state) for n in (4, 6, 8)}
    root = tmp_path / "run" / "snapshots"
    assert started(zygote, 2, tmp_path, 4) == whole[4]
    assert len(list((root / "base").iterdir())) == 2  # each rank its part
    assert manifest(tmp_path / "run", 4).base.digest == manifest(tmp_path / "run", 2).base.digest
    assert used(root / "base") > 4 * used(root / "4")
    assert started(zygote, 1, tmp_path, 6) == whole[6]
    assert len(list((root / "base").iterdir())) == 3  # the snapshot of 4 is kept, and has the two
    assert started(zygote, 2, tmp_path, 8) == whole[8]
    check_digests(root / "8")
    assert ps.digest(ps.restore(tmp_path / "run", on_one(8).state)) == whole[8]
