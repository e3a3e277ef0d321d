"""Experts on one process that has all of them: their results, what is left of a call, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.errors import ConfigError, StepError
from purestep.parallel.expert_parallel import Dispatcher
from purestep.sharding import Experts, Spec, context_parallel, ddp, expert_parallel, fsdp, tensor_parallel, zero1

COUNT, WIDTH = 4, 6
TX = ps.optim.sgd(0.1)


class Stacked(nn.Module):
    def __init__(self, count=COUNT, rate=0.0):
        super().__init__()
        self.num_experts, self.rate = count, rate
        self.weight, self.bias = nn.Parameter(torch.randn(count, WIDTH, WIDTH)), nn.Parameter(torch.randn(count, WIDTH))

    def forward(self, tokens, chosen, weights):
        out = torch.einsum("nw,nkvw->nkv", tokens, self.weight[chosen]) + self.bias[chosen]
        return F.dropout((out.tanh() * weights[..., None]).sum(1), self.rate)


class Net(nn.Module):
    def __init__(self, experts, chosen=2):
        super().__init__()
        self.router, self.experts, self.chosen = nn.Linear(WIDTH, COUNT), experts, chosen

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.chosen)
        return self.experts(x, chosen, weights)


def stepped(experts, plan, loss_fn=lambda net, x: net(x).square().mean(), jit=False):
    state = ps.init(lambda: Net(experts()), TX, seed=0, plan=plan)
    step = ps.make_step(loss_fn, TX, microbatches=2, plan=plan)
    return (ps.jit(step, backend="eager") if jit else step)(state, torch.linspace(-1, 2, 7 * WIDTH).view(7, WIDTH))


def test_experts_one_by_one_compute_what_they_compute_together():
    new, metrics = stepped(Stacked, expert_parallel())
    plain, expected = stepped(Stacked, None)
    assert float(metrics["loss"].compute()) == pytest.approx(float(expected["loss"].compute()), rel=1e-6)
    for name, tensor in plain.params.items():
        torch.testing.assert_close(new.params[name], tensor, msg=name)


def test_a_module_is_left_as_it_was():
    net = Net(Stacked())
    held = dict(net.experts.named_parameters())
    dispatcher = Dispatcher(expert_parallel(), net)
    x = torch.randn(5, WIDTH)
    wanted = net(x)
    with dispatcher.around(None, None)():
        torch.testing.assert_close(net(x), wanted)
        assert "forward" in vars(net.experts)
    assert "forward" not in vars(net.experts)
    assert net.experts.num_experts == COUNT
    assert dict(net.experts.named_parameters()) == held
    assert isinstance(net.experts, Experts)
    assert not isinstance(net, Experts)


class Lone(Stacked):
    def forward(self, tokens, chosen=None, weights=None):
        return tokens


class Other(Net):
    def forward(self, x):
        return self.experts(x + self.router(x).sum())


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = COUNT
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))


def _called(net):
    with Dispatcher(expert_parallel(), net).around(None, None)():
        net(torch.ones(1, WIDTH))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stepped(Listed, expert_parallel()), "these are no experts that can be shared over ranks"),
        (lambda: stepped(lambda: nn.Linear(WIDTH, WIDTH), expert_parallel()), "these are no experts"),
        (lambda: stepped(Stacked, expert_parallel(experts="*router")), "these are no experts"),
        (lambda: stepped(Stacked, expert_parallel(experts="*.expert")), "a rule of the plan matches no parameter"),
        (lambda: Dispatcher(expert_parallel(experts="*.expert"), Net(Stacked())), "has no experts of this name"),
        (lambda: stepped(lambda: Stacked(rate=0.5), expert_parallel()), "experts drew random numbers"),
        (lambda: _called(Other(Lone())), "were not called with tokens, their experts and their weights"),
        (lambda: stepped(Stacked, expert_parallel(), jit=True), "no gradients of this step can be compiled"),
        (lambda: fsdp(2) * expert_parallel(2), "expert parallelism goes with data parallelism only"),
        (lambda: expert_parallel(2) * tensor_parallel({"*": Spec("tensor")}, 2), "goes with data parallelism only"),
        (lambda: context_parallel(2) * expert_parallel(2), "goes with data parallelism only"),
        (lambda: zero1(2) * expert_parallel(2), "goes with data parallelism only"),
        (lambda: ddp(2) * expert_parallel(2, zero=2), "ZeRO 1 and 2 keep parameters whole"),
        (lambda: expert_parallel(2, batch="data"), "experts are split over one of the batch axes"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_expert_that_there_is_not():
    net, dispatcher = Net(Stacked()), None
    dispatcher = Dispatcher(expert_parallel(), net)
    with dispatcher.around(None, None)(), pytest.raises(StepError, match="expert 9 of 4"):
        net.experts(torch.ones(1, WIDTH), torch.tensor([[9]]), torch.ones(1, 1))


def test_a_dry_run_gathers_no_experts():
    params = {"a.experts.w": torch.zeros(8, 4), "a.router.w": torch.zeros(4)}
    run = (ddp(2) * expert_parallel(4)).dry_run(params)
    experts, router = 128, 16
    # The experts of a rank are all-reduced with the one other rank that has the same.
    assert (run.memory["params"], "gathered" in run.memory) == (experts // 4 + router, False)
    assert run.sent == {"gather": 0, "reduce": experts // 4 + 2 * router * 7 // 8}
    shard = (ddp(2) * expert_parallel(4, shard=True)).dry_run(params)
    assert shard.memory["params"] == (experts + router) // 4
