"""A snapshot of one policy is read under another when asked, and refused when not."""

from __future__ import annotations

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep.errors import TemplateMismatch
from purestep.precision import policy

TX = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-2))


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


def fit(name, run_dir, state=None, **options):
    state = policy(name).apply(ps.init(make_model, TX)) if state is None else state
    return ps.fit(
        ps.make_step(loss_fn, TX, policy=name),
        state,
        ps.data.batches({"x": torch.randn(24, 4, generator=torch.Generator().manual_seed(0))}, 8, seed=0),
        until=ps.steps(options.pop("until", 3)),
        run_dir=run_dir,
        callbacks=[ps.callbacks.snapshots(every=ps.every.steps(3))],
        **options,
    ).state


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("32", "bf16-mixed"),
        ("bf16-true", "32"),
        ("32", "16-mixed"),
        ("16-mixed", "32"),
        ("32", "bf16-master"),
        ("bf16-master", "32"),
        ("bf16-master", "16-true"),
        ("64", "bf16-master"),
    ],
)
@pytest.mark.parametrize("like_under", slow_but(["old", "new", "none"], "new"))
def test_with_a_policy_it_is_converted(old, new, like_under, tmp_path):
    saved = fit(old, tmp_path)
    like = ps.init(make_model, TX, seed=5)
    if like_under != "none":
        like = policy(old if like_under == "old" else new).apply(like)
    found = ps.restore(tmp_path, like=like, policy=new)
    assert not ps.diff(found, policy(new).apply(saved))
    assert list(found.params) == list(saved.params)
    assert int(found.step) == 3
    ps.make_step(loss_fn, TX, policy=new)(found, {"x": torch.randn(8, 4)})


@pytest.mark.parametrize(("old", "new"), [("bf16-true", "32"), ("32", "bf16-master"), ("16-mixed", "32")])
def test_without_one_it_is_refused(old, new, tmp_path):
    fit(old, tmp_path)
    with pytest.raises(TemplateMismatch, match="the snapshot does not have the structure of the template"):
        ps.restore(tmp_path, like=policy(new).apply(ps.init(make_model, TX)))


def test_the_policy_does_not_excuse_another_model(tmp_path):
    fit("32", tmp_path)
    other = ps.init(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), TX)
    with pytest.raises(TemplateMismatch, match=r"state\.params\['2\.weight'\]: stored .*\[2, 8\].*, like= .*\[3, 8\]"):
        ps.restore(tmp_path, like=other, policy="bf16-true")
    with pytest.raises(TemplateMismatch, match="nothing"):
        ps.restore(tmp_path, like=ps.init(make_model, ps.optim.sgd(0.1)), policy="bf16-true")


@pytest.mark.parametrize(("old", "new"), [("32", "bf16-mixed"), ("bf16-mixed", "float8")])
def test_a_run_does_not_go_on_under_another_policy(old, new, tmp_path):
    """These states look alike, so the manifest has to know."""
    fit(old, tmp_path)
    with pytest.raises(TemplateMismatch, match="saved under another precision policy") as caught:
        fit(new, tmp_path, until=6)
    assert "ps.restore(run_dir, like=state, policy=policy)" in str(caught.value)
    fit(old, tmp_path, until=6)


def test_it_goes_on_under_another_policy_in_another_run(tmp_path):
    fit("32", tmp_path / "a")
    state = ps.restore(tmp_path / "a", like=ps.init(make_model, TX), policy="bf16-mixed")
    assert int(fit("bf16-mixed", tmp_path / "b", state=state, until=3).step) == 6
