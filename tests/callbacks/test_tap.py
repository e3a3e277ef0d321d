import torch
from torch import nn

import purestep as ps


def test_an_epoch_is_told_with_its_number_and_means():
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
    state, data = ps.init(lambda: nn.Linear(2, 1), tx, seed=0), ps.data.batches({"x": torch.randn(10, 2)}, 4)
    told = []
    tap = ps.callbacks.tap(lambda event, loop: told.append((event, dict(loop.status.metrics))))
    with ps.run(step, state, data, until=ps.epochs(2), callbacks=[tap]) as events:
        iterated = [event for event in events if isinstance(event, ps.loop.EpochDone)]
    rows = [(event, metrics) for event, metrics in told if isinstance(event, ps.loop.EpochDone)]
    assert [event.epoch for event, _ in rows] == [1, 2]
    assert [event for event, _ in rows] == iterated
    for event, metrics in rows:
        assert event.row["train/loss_epoch"] == metrics["train/loss_epoch"]
