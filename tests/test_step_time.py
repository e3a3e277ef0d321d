"""The time of a step, from operations and bytes that are counted by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError
from purestep.sharding import ddp, fsdp

TX = ps.optim.sgd(0.1)


def loss_fn(net, batch):
    return net(batch).square().mean()


def counted(model, batch, sizes=None, loss=loss_fn, **options):
    with torch.device("meta"):
        state = ps.init(model(), TX)
    return ps.step_memory(ps.make_step(loss, TX, **options), state, batch, sizes)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))

    def forward(self, x):
        return self.block(x)


FIRST, SECOND = 2 * 12 * 20, 2 * 20 * 8  # of a sample


@pytest.mark.parametrize(
    ("sizes", "options", "samples", "passes"),
    [
        (None, {}, 24, (2, 3)),  # no gradient of the input: forward, and one product in the backward pass
        (None, {"microbatches": 4}, 24, (2, 3)),
        (None, {"checkpoint": "block"}, 24, (3, 3)),  # forward once more, up to the last input that is needed
        ({"data": 4}, {"plan": ddp()}, 6, (2, 3)),
        ({"fsdp": 3}, {"plan": fsdp(), "microbatches": 6}, 8, (2, 3)),
        (None, {"policy": "bf16-mixed"}, 24, (2, 3)),
    ],
)
def test_operations_are_those_counted_by_hand(sizes, options, samples, passes):
    found = counted(Net, torch.empty(24, 12, device="meta"), sizes, **options)
    assert found.flops == samples * (passes[0] * FIRST + passes[1] * SECOND)


class Attending(nn.Module):
    """Attention with 3 heads of 4, whose query has a gradient, after a convolution."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv1d(5, 36, 3, padding=1)

    def forward(self, x):
        q, k, v = self.into(x).transpose(1, 2).unflatten(2, (3, 3, 4)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_and_attention_are_counted(device):
    found = counted(Attending, torch.empty(2, 5, 7, device=device))
    convolution = 2 * 2 * 7 * 36 * 5 * 3  # samples, positions, channels
    product = 2 * 2 * 3 * 7 * 7 * 4  # samples, heads, positions, width: of queries and keys, or with values
    # Two products forward; a kernel of attention computes the first one again in its backward pass of four.
    assert found.flops in (2 * convolution + (2 + 5) * product, 2 * convolution + (2 + 4) * product)


def test_seconds_are_operations_and_bytes_over_their_rates():
    found = counted(Net, torch.empty(24, 12, device="meta"), {"data": 4}, plan=ddp())
    params = 12 * 20 + 20 + 20 * 8 + 8
    assert sum(found.sent.values()) == 2 * 3 * (params * 4) // 4
    time = found.seconds(flops=1e6, bandwidth=1e3)
    assert time.compute == 6 * (2 * FIRST + 3 * SECOND) / 1e6
    assert time.send == 2 * 3 * params / 1e3
    assert (time.hidden, time.apart) == (max(time.compute, time.send), time.compute + time.send)
    assert "a step, nothing sent meanwhile" in str(time)


def test_what_is_not_known_is_refused():
    with torch.device("meta"):
        state = ps.init(Net(), TX)
    with pytest.raises(ConfigError, match=r"not known(.|\n)*ps\.step_memory\(step, state, batch, sizes\)"):
        ddp().dry_run(state, {"data": 4}).seconds(flops=1e12, bandwidth=1e9)
    with pytest.raises(ConfigError, match="bandwidth is a rate above 0"):
        counted(Net, torch.empty(4, 12)).seconds(flops=1e12, bandwidth=0)
