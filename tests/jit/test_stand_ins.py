"""Traces without Dynamo: the same graph, nothing left behind, and the real modules as soon as anything needs them."""

import pytest

LIGHT = """
import sys
import torch
from torch import nn
import purestep as ps

REAL = ("torch._dynamo", "torch._inductor", "torch._higher_order_ops.triton_kernel_wrap")

def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])

def compiled():
    layers = nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Dropout(0.3), nn.BatchNorm1d(7), nn.Linear(7, 3)
    model = nn.Sequential(*layers)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3))
    state = ps.init(model, tx, seed=0)
    batch = {"x": torch.randn(6, 5), "y": torch.arange(6) % 3}
    step = ps.jit(ps.make_step(loss_fn, tx), donate=True, backend="eager")
    return step.graph(state, batch)

def of_ours():
    modules = list(sys.modules.items())
    return [(name, key) for name, m in modules for key, value in list(vars(m).items())
            if type(value).__module__ == "purestep.jit.stand_ins" and name != "purestep.jit.stand_ins"]

before = set(sys.modules)
graph = compiled()
assert not any(name in sys.modules for name in REAL), "imported all the same"
assert not any(name.startswith(REAL) for name in sys.modules), "submodules stayed"
assert of_ours() == [], of_ours()
assert not [f for f in sys.meta_path if type(f).__module__ == "purestep.jit.stand_ins"]
from torch._subclasses.fake_tensor import FakeTensorMode
assert "__dynamo_disable" not in vars(FakeTensorMode.__torch_dispatch__.__wrapped__)

calls = []
def asks(x):
    calls.append(1)
    try:
        import torch._dynamo
        return x + len(torch._dynamo.list_backends())
    except Exception:
        return x
asking = ps.jit(asks, backend="eager")
backends = torch.tensor(1.0) * 0 + asking(torch.zeros(()))
assert len(calls) == 2 and backends == len(torch._dynamo.list_backends()), (calls, backends)
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
import torch._inductor
assert torch._inductor.config is sys.modules["torch._inductor.config"]
assert compiled() == graph
"""

# Both ways of asking, from another thread, in the middle of a trace; then an error of the function itself.
THREAD = """
import sys, threading
import torch
import purestep as ps

found, calls = [], []
def other():
    import torch._dynamo
    from torch._dynamo.utils import counters
    assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
    found.append((torch._dynamo.utils.counters is counters, torch._dynamo.OptimizedModule))

def function(x):
    calls.append(1)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return x * 2

assert ps.jit(function, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
assert len(calls) == 2 and found[0] == found[1] and found[0][0], (calls, found)
"""

ERROR = """
import sys
import torch
import purestep as ps

calls = []
def function(x):
    calls.append("torch._dynamo.eval_frame" in sys.modules)
    raise KeyError("mine")
try:
    ps.jit(function, backend="eager")(torch.ones(2))
except KeyError as error:
    assert error.args == ("mine",), error
assert calls[:2] == [False, True], calls
"""


def test_a_trace_without_dynamo_is_the_trace_with_it(zygote):
    done = zygote.run(LIGHT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", [THREAD, ERROR], ids=["another thread", "an error"])
def test_whatever_asks_for_more_gets_the_real_modules(zygote, script):
    done = zygote.run(script)
    assert done.returncode == 0, done.stderr
