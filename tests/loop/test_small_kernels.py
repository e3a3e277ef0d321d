"""The check before the first step loads no compiler, replaces no module, and gives the shapes that torch gives."""

import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import purestep as ps
from purestep.preflight import dry_run, small_kernels
from purestep.preflight.small_kernels import small_kernels as active

HEAVY = "[name for name in ('sympy', 'torch._dynamo') if name in sys.modules]"

# A step of each kind of model, run by `fit` in a process that has loaded no compiler.
STEPS = f"""
import json, sys, torch
import purestep as ps
from torch import nn
from torch.nn import functional as F
sys.path.insert(0, "examples")
import digits, gpt

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 9, batch_first=True), nn.Linear(9, 3)
    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(6, 3)
    def forward(self, x):
        return self.head(F.silu(self.attention(x, x, x)[0]).mean(1))

x, y = torch.randn(8, 5, 6), torch.randint(0, 3, (8,))
def classify(net, batch):
    scores = net(batch["x"])
    return F.cross_entropy(scores, batch["y"]), {{"accuracy": ps.metrics.accuracy(scores, batch["y"])}}
text = torch.randint(0, 256, (3, 65))
jobs = {{
    "cnn": (digits.make_model, digits.loss_fn, {{"image": torch.randn(8, 1, 8, 8), "label": y}}),
    "gpt": (gpt.GPT, gpt.loss_fn, {{"x": text[:, :-1], "y": text[:, 1:]}}),
    "rnn": (Recurrent, classify, {{"x": x, "y": y}}),
    "attention": (Attending, classify, {{"x": x, "y": y}}),
}}
tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3))
checked = []
from purestep.preflight import check as precheck
inner = precheck.check_step
precheck.check_step = lambda *given: checked.append(inner(*given))
for name, (make, loss_fn, batch) in jobs.items():
    ps.fit(ps.make_step(loss_fn, tx), ps.init(make, tx), [batch] * 2, until=ps.steps(2),
           callbacks=[ps.callbacks.evaluate(loss_fn, [batch])])
    print(json.dumps([name, checked[-1] is not None, {HEAVY}]))
"""

# A library that a step imports first.
IMPORTER = """
import sys, pathlib, tempfile, threading, torch
import purestep as ps
from torch import nn
folder = tempfile.mkdtemp()
sys.path.insert(0, folder)
pathlib.Path(folder, "mylib.py").write_text("import sympy")
seen, found = threading.Event(), []

def elsewhere():
    seen.wait()
    import torch._dynamo
    found.append(type(torch._dynamo).__name__)

other = threading.Thread(target=elsewhere)
other.start()

def loss_fn(net, batch):
    import mylib
    seen.set()
    other.join()
    return net(batch["x"]).square().mean()

assert "sympy" not in sys.modules
tx = ps.optim.sgd(0.1)
state = ps.init(lambda: nn.Linear(3, 1), tx)
ps.fit(ps.make_step(loss_fn, tx), state, [{"x": torch.ones(2, 3)}], until=ps.steps(1))
import mylib, sympy
assert mylib.sympy is sympy
print(mylib.sympy.__version__ == sympy.__version__, found)
"""


def f(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


i, image = f(4, 5, dtype=torch.int64), f(2, 3, 9, 9)
CALLS = {
    "add": lambda: f(4, 1, 6) + f(5, 1),
    "promote": lambda: f(4, 5, dtype=torch.bfloat16) * i + 2.5,
    "where": lambda: torch.where(f(4, 5) > 0, f(4, 5), 0.0),
    "mm": lambda: f(4, 5) @ f(5, 7),
    "bmm": lambda: torch.einsum("bij,bjk->bik", f(3, 4, 5), f(3, 5, 6)),
    "reduce": lambda: (f(4, 5, 6).sum((0, 2)), f(4, 5).mean(), f(4, 5).var(1), f(4, 5).amax(0), i.argmax(1)),
    "softmax": lambda: F.log_softmax(f(4, 5).mT, -1),
    "conv": lambda: F.conv2d(f(2, 3, 9, 9), f(6, 3, 3, 3), f(6), stride=2, padding=1),
    "channels_last": lambda: F.relu(f(2, 3, 9, 9).to(memory_format=torch.channels_last)),
    "pool": lambda: (F.max_pool2d(image, 2), F.avg_pool2d(image, 3), F.adaptive_avg_pool2d(image, 4)),
    "norms": lambda: (F.layer_norm(f(4, 5), (5,)), F.group_norm(f(4, 6, 3), 2)),
    "batch norm": lambda: F.batch_norm(image, f(3), f(3), training=True),
    "losses": lambda: (F.cross_entropy(f(4, 5), i[:, 0]), F.mse_loss(f(4), f(4)), F.l1_loss(f(4), f(4))),
    "index": lambda: (f(4, 5)[i[0] % 4], f(4, 5).gather(1, i), f(4, 5).index_select(0, i[0]), F.embedding(i, f(9, 3))),
    "views": lambda: (f(4, 6).view(2, 2, 6).transpose(0, 2).reshape(-1), f(4, 5).unfold(1, 2, 1), f(4, 1).expand(4, 5)),
    "join": lambda: (torch.cat([f(4, 5), f(2, 5)]), torch.stack([f(4), f(4)], 1), f(4, 5).split(2)),
    "foreach": lambda: (torch._foreach_mul([f(4), f(2, 3)], 2.0), torch._foreach_norm([f(4), f(2, 3)], 2)),
    "interpolate": lambda: F.interpolate(f(2, 3, 8, 8), scale_factor=2),
    "attention": lambda: F.scaled_dot_product_attention(f(2, 3, 5, 4), f(2, 3, 5, 4), f(2, 3, 5, 4), is_causal=True),
    "linalg": lambda: (torch.linalg.qr(f(4, 3)), torch.linalg.norm(f(4, 3))),
    "fft": lambda: torch.fft.rfft(f(4, 8)),
    "sort": lambda: (f(4, 5).sort(1), f(4, 5).topk(2), f(4, 5).cumsum(0)),
}


KERNELS = f"""
import json, sys, torch
sys.path.insert(0, "tests/loop")
import test_small_kernels as test
loaded = {{}}
for name, call in test.CALLS.items():
    with test.active():
        call()
    loaded[name] = {HEAVY}
print(json.dumps(loaded))
"""


def laid_out(value):
    if isinstance(value, (tuple, list)):
        return [laid_out(v) for v in value]
    # Kernels differ in what nobody can see: the strides of an empty tensor, and of a dim of one element.
    stride = [n for n, size in zip(value.stride(), value.shape, strict=True) if size > 1] if value.numel() else None
    return value.dtype, value.shape, stride, value.storage_offset(), value.device.type


def outcome(call):
    try:
        return laid_out(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def agrees(call):
    """Tell what both kinds of kernels say, which has to be the same."""
    with active():
        quick = outcome(call)
    assert quick == outcome(call)
    return quick


def test_a_small_fit_loads_no_compiler(zygote):
    done = zygote.run(STEPS)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [[name, True, []] for name in ("cnn", "gpt", "rnn", "attention")]


def test_a_module_that_a_step_imports_is_the_real_one(zygote):
    done = zygote.run(IMPORTER)
    assert (done.returncode, done.stdout) == (0, "True ['module']\n"), done.stderr


@pytest.mark.parametrize("name", CALLS)
def test_kernels_say_what_those_of_torch_say(name):
    assert not isinstance(agrees(CALLS[name]), str)


WRONG = {
    "mm": lambda: f(4, 5) @ f(4, 5),
    "cat": lambda: torch.cat([f(4, 5), f(4, 6)]),
    "broadcast": lambda: f(4, 5) + f(4, 6),
    "read": lambda: f(1).item(),
    "nonzero": lambda: f(4).nonzero(),
    "mask": lambda: f(4)[f(4) > 0],
    "copy to the CPU": lambda: f(4).to("cpu"),
    "real numbers": lambda: f(4) + torch.ones(4),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_is_refused_in_the_words_of_torch(name):
    assert isinstance(agrees(WRONG[name]), str)


def test_kernels_load_no_compiler(zygote):
    done = zygote.run(KERNELS)
    assert done.returncode == 0, done.stderr
    assert {name: modules for name, modules in json.loads(done.stdout).items() if modules} == {}


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@given(
    shapes, shapes, dtypes, dtypes, st.booleans(), st.sampled_from([torch.add, torch.mul, torch.maximum, torch.atan2])
)
def test_elementwise_calls_agree_on_any_shapes(a, b, first, second, transposed, call):
    x, y = torch.empty(a, dtype=first, device="meta"), torch.empty(b, dtype=second, device="meta")
    agrees(lambda: call(x.mT if transposed and x.dim() > 1 else x, y))
    agrees(lambda: call(x, x))
    agrees(lambda: torch._foreach_add([x, y], [x, y]))
    agrees(lambda: torch._foreach_mul([x, y], 2.0))


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4), dtypes)
def test_products_and_reductions_agree_on_any_shapes(sizes, dtype):
    a, b, c, d = sizes
    x = torch.empty(a, b, c, dtype=dtype, device="meta")
    agrees(lambda: (x.sum(1), x.amax(0, keepdim=True), x.argmax(2)))
    agrees(lambda: torch.matmul(x, torch.empty(c, d, dtype=dtype, device="meta")))
    agrees(lambda: x.repeat(b, a, 1, d))


def test_results_share_memory_as_they_do_on_torchs_kernels():
    with active():
        x = f(4, 6)
        assert x.mul_(2) is x
        torch._foreach_add_([x], 1.0)
        for view in (x.view(2, 12), x[1:], torch.ops.aten._unsafe_view(x, (24,))):
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        out = f(4, 6)
        assert torch.add(x, x, out=out) is out
        assert (x * 2).untyped_storage()._cdata != x.untyped_storage()._cdata


def test_nothing_outside_is_drawn_from_or_written():
    generator, counter = torch.Generator(), torch.tensor(0.0)
    before = generator.get_state()
    with active():
        outcome(lambda: torch.rand(4, device="meta", generator=generator))
        outcome(lambda: counter.add_(f()))
        outcome(lambda: f(4).add_(counter))
    assert torch.equal(generator.get_state(), before)
    assert float(counter) == 0.0


@pytest.fixture
def run_for_real(monkeypatch):
    """The calls that were run on zeros: operator, and elements of the largest of them."""
    ran = []
    shapes = small_kernels._Call.shapes

    def counted(call, args, kwargs):
        done = shapes(call, args, kwargs)
        ran.append((call._func.overloadpacket.__name__, max((z.numel() for z, _ in call._zeros), default=0)))
        return done

    monkeypatch.setattr(small_kernels._Call, "shapes", counted)
    return ran


LARGE = {
    "outer": lambda: f(1 << 20, 1) - f(1, 1 << 20),
    "mm": lambda: f(4096, 4096) @ f(4096, 4096),
    "conv": lambda: F.conv2d(f(64, 64, 64, 64), f(64, 64, 3, 3)),
    "repeat": lambda: f(1 << 10).repeat(1 << 20),
    "zeros": lambda: torch.zeros(1 << 20, 1 << 10, device="meta"),
    "arange": lambda: torch.arange(1 << 30, device="meta"),
    "embedding": lambda: F.embedding(f(1 << 20, dtype=torch.int64), f(4096, 4096)),
    "interpolate": lambda: F.interpolate(f(1, 3, 8, 8), size=(1 << 13, 1 << 13)),
    "sum": lambda: f(1 << 14, 1 << 14).sum(0),
    "sum of a slice": lambda: f(1 << 14, 1 << 14)[:, :2].sum(0),
    "svd": lambda: torch.linalg.svd(f(2048, 2048)),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_call_is_not_run(name, run_for_real):
    agrees(LARGE[name])
    assert run_for_real == []


def test_one_element_stands_for_a_large_elementwise_call(run_for_real):
    x = f(1 << 15, 1 << 15)
    assert agrees(lambda: torch.addcdiv(x, x, x * 2.0))[1] == x.shape
    assert run_for_real == [("mul", 1), ("addcdiv", 1)]


def test_time_has_a_bound(run_for_real, monkeypatch):
    monkeypatch.setattr(small_kernels, "_SECONDS", 0.0)
    agrees(lambda: f(3) + f(3))
    assert run_for_real == []


def test_another_thread_has_torchs_kernels(run_for_real):
    with active():
        other = threading.Thread(target=lambda: f(3) + f(3))
        other.start()
        other.join()
        assert run_for_real == []
        f(3) + f(3)
    assert len(run_for_real) == 1


def test_bytes_kept_for_the_backward_pass_are_those_of_torchs_kernels(monkeypatch):
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))

    tx = ps.optim.adamw(1e-3)
    step = ps.make_step(lambda net, b: F.cross_entropy(net(b["x"]), b["y"]), tx)
    batch = {"x": torch.randn(16, 3, 8, 8), "y": torch.zeros(16, dtype=torch.int64)}
    found = dry_run.dry_run(step, ps.init(model, tx), batch)
    monkeypatch.setattr(small_kernels, "_SECONDS", 0.0)
    assert found.error is None
    assert found.kept == dry_run.dry_run(step, ps.init(model, tx), batch).kept > 0
