"""Traces of the bits of a step: what they hold, that they change nothing, and that they name what differs."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import _torch
from purestep.errors import ConfigError
from purestep.record.bits_trace import BitsTrace

ROOT = Path(__file__).parents[2]
TX = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()]
        self.body = nn.Sequential(*first, nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
        self.head = nn.Linear(144, 10)

    def forward(self, x):
        return self.head(self.body(x))


def loss_fn(net, batch):
    scores = net(batch["x"])
    hits = scores.argmax(1) == batch["y"]
    return nn.functional.cross_entropy(scores, batch["y"]), {"accuracy": hits.float().mean()}


@pytest.fixture(scope="module")
def state():
    return ps.init(Net, TX, seed=0)


@pytest.fixture(scope="module")
def batch():
    return {"x": ps.random.normal(ps.random.key(1), (8, 1, 6, 6)), "y": torch.arange(8) % 10}


@pytest.fixture
def replaced():
    """`replaced(name, function)`: the CPU kernel of an operator, until the test ends; function(kernel, *args)."""
    library = torch.library.Library("aten", "IMPL")

    def put(name, function):
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def run(keys, *args, **kwargs):
                return function(lambda *a, **k: kernel(keys, *a, **k), *args, **kwargs)

            library.impl(name, run, "CPU", with_keyset=True)

    yield put
    library._destroy()


def by_hand(state, batch):
    def loss(params):
        out, buffers = ps.apply(state.model, params, state.buffers, batch["x"], rng=state.rng)
        return nn.functional.cross_entropy(out, batch["y"]), buffers

    grads, (value, buffers) = ps.grad_and_value(loss, has_aux=True)(state.params)
    return state.apply_gradients(TX, grads, buffers=buffers), {"loss": value}


def names(trace):
    return [operation.name for operation in trace.operations]


# --- a trace changes nothing ------------------------------------------------------------------------------------------

STEPS = {
    "eager": lambda: ps.make_step(loss_fn, TX),
    "microbatches": lambda: ps.make_step(loss_fn, TX, microbatches=2),
    "plan": lambda: ps.make_step(loss_fn, TX, plan=ps.sharding.ddp(1)),
    "torch.func": lambda: ps.make_step(loss_fn, TX, engine="func"),
    "wrapped": lambda: ps.wrap_step(ps.make_step(loss_fn, TX), lambda step, state, batch: step(state, batch)),
    "by hand": lambda: by_hand,
    "evaluation": lambda: ps.make_eval(loss_fn),
    "graph": lambda: ps.jit(ps.make_step(loss_fn, TX), backend="eager"),
    "graphs of microbatches": lambda: ps.jit(ps.make_step(loss_fn, TX, microbatches=2), backend="eager"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_traced_step_has_the_bits_of_the_step(name, state, batch, tmp_path):
    step = STEPS[name]()
    files = [tmp_path / "a.bits", tmp_path / "b.bits"]
    first, second = (ps.trace_bits(step, state, batch, file) for file in files)
    assert not ps.diff(first.returned, STEPS[name]()(state, batch))
    assert len(first.operations) > 10
    assert first == second
    assert files[0].read_bytes() == files[1].read_bytes()
    assert BitsTrace.load(files[0]) == first
    assert ps.compare_bits(*files).equal
    assert str(ps.compare_bits(first, files[1])) == f"equal: {len(first.operations)} operations"
    phases = {operation.phase for operation in first.operations}
    update = {"forward"} if name == "evaluation" else {"forward", "backward", "update"}
    assert phases == update if not name.startswith("graph") else "graph" in phases


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


MODELS = {
    "lstm": lambda: nn.LSTM(4, 3, batch_first=True),
    "gru": lambda: nn.GRU(4, 3),
    "attention": lambda: Attention(4, 2, dropout=0.1),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_kernels_leave_unset_is_in_no_trace(name):
    model = MODELS[name]

    def loss(net, batch):
        return net(batch)[0].square().mean()

    tx = ps.optim.sgd(0.1)
    state, batch = ps.init(model, tx, seed=0), ps.random.normal(ps.random.key(0), (5, 7, 4))
    step = ps.make_step(loss, tx)
    first = ps.trace_bits(step, state, batch)
    litter = [torch.full((n,), float("nan")) for n in range(1, 4000, 7)]  # other bytes in the memory that comes next
    del litter
    assert ps.compare_bits(first, ps.trace_bits(step, state, batch)).equal
    assert not ps.diff(first.returned, step(state, batch))


def test_a_donating_step_is_traced_as_it_runs(state, batch):
    mine = ps.tree.map(lambda x: x.clone(), state)
    trace = ps.trace_bits(ps.donate(ps.make_step(loss_fn, TX)), mine, batch)
    assert not ps.diff(trace.returned, ps.make_step(loss_fn, TX)(state, batch))
    with pytest.raises(ps.errors.DonatedStateError):
        ps.make_step(loss_fn, TX)(mine, batch)


def test_hooks_and_modes_end_with_the_trace(state, batch):
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    before = [len(h) for h in hooks]

    def fails(state, batch):
        by_hand(state, batch)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        ps.trace_bits(fails, state, batch)
    assert [len(h) for h in hooks] == before
    assert _torch.dispatch_modes() == 0
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_module_that_fails_and_is_caught_is_left(state, batch):
    def step(state, batch):
        net = ps.to_module(state)
        with torch.no_grad():
            with contextlib.suppress(RuntimeError):
                net.head(batch["x"])
            return net.body[2](batch["x"]) + 1, {}

    gelu, add = ps.trace_bits(step, state, batch).operations[-2:]
    assert (gelu.name, bool(gelu.module), add.name, add.module) == ("aten.gelu", True, "aten.add.Tensor", "")


def test_calls_of_other_threads_are_not_seen(state, batch):
    def step(state, batch):
        other = threading.Thread(target=lambda: nn.Linear(2, 2)(torch.ones(1, 2)))
        other.start()
        other.join()
        return torch.relu(state), {}

    (operation,) = ps.trace_bits(step, torch.ones(3), batch).operations
    assert (operation.name, operation.module) == ("aten.relu", "")


def test_what_an_import_computes_is_no_part_of_the_step(tmp_path, monkeypatch):
    (tmp_path / "module_with_a_tensor.py").write_text("import torch\nONE = torch.ones(3) * 2")
    monkeypatch.syspath_prepend(tmp_path)

    def step(state, batch):
        import module_with_a_tensor

        return state + module_with_a_tensor.ONE, {}

    try:
        assert names(ps.trace_bits(step, torch.ones(3), ())) == ["aten.add.Tensor"]
    finally:
        sys.modules.pop("module_with_a_tensor", None)


def test_a_mode_that_only_watches_counts_as_none():
    class Other(_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Watch(_torch.Watcher):
        __torch_dispatch__ = Other.__torch_dispatch__

    with Watch():
        assert _torch.dispatch_modes() == 0
        with Other(), Watch():
            assert _torch.dispatch_modes() == 1


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_operations_have_module_phase_and_line(state, batch):
    trace = ps.trace_bits(ps.make_step(loss_fn, TX, microbatches=2), state, batch)
    found = {(op.name, op.module, op.phase) for op in trace.operations}
    for name, module in (
        ("convolution", "body.0"),
        ("native_batch_norm", "body.1"),
        ("gelu", "body.2"),
        ("convolution", "body.3"),
    ):
        assert (f"aten.{name}", module, "forward") in found
        assert (f"aten.{name}_backward", module, "backward") in found
    assert ("aten.mm", "head", "backward") in found
    assert ("aten.nll_loss_backward", "", "backward") in found
    phases = [op.phase for op in trace.operations]
    # Two microbatches: the sum of their gradients, and the update, come after a backward pass.
    turns = [p for i, p in enumerate(phases) if i == 0 or p != phases[i - 1]]
    forward = ["forward", "backward", "update"]
    assert turns == forward * 2
    argmax = [op for op in trace.operations if op.name == "aten.argmax"]
    assert [op.phase for op in argmax] == ["forward", "forward"]
    assert argmax[0].place.endswith("in loss_fn")
    assert "test_trace_bits.py:" in argmax[0].place
    assert argmax[0].code == 'hits = scores.argmax(1) == batch["y"]'
    backward = next(op for op in trace.operations if op.name == "aten.nll_loss_backward")
    assert backward.code == 'return nn.functional.cross_entropy(scores, batch["y"]), {"accuracy": hits.float().mean()}'
    assert any(op.place.startswith("purestep/optim/") for op in trace.operations if op.phase == "update")
    assert str(ROOT) not in json.dumps([op.place for op in trace.operations])


def test_a_graph_names_its_lines(state, batch):
    trace = ps.trace_bits(ps.jit(ps.make_step(loss_fn, TX), backend="eager"), state, batch)
    operation = next(op for op in trace.operations if op.name == "aten.convolution_backward")
    assert operation.phase == "graph"
    assert operation.place == "the graph"
    assert "torch.ops.aten.convolution_backward.default(" in operation.code


def test_a_graph_inside_of_a_function_is_run_and_its_tracing_is_not_seen(state, batch):
    inner = ps.jit(ps.make_step(loss_fn, TX), backend="eager")
    first, second = (ps.trace_bits(lambda state, batch: inner(state, batch), state, batch) for _ in range(2))
    assert names(first) == names(second)
    assert {operation.phase for operation in first.operations} == {"graph"}


def test_a_recomputed_block_keeps_its_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return ps.checkpoint(self.inner, x).square().mean()

    tx = ps.optim.sgd(0.1)
    state = ps.init(Block, tx, seed=0)
    step = ps.make_step(lambda net, batch: net(batch), tx)
    trace = ps.trace_bits(step, state, torch.ones(2, 4))
    where = [(op.phase, op.module) for op in trace.operations if op.name == "aten.tanh"]
    assert where == [("forward", "inner.1"), ("backward", "inner.1")]
    assert not ps.diff(trace.returned, step(state, torch.ones(2, 4)))


def test_a_model_of_nobody_has_paths_from_its_class():
    x = torch.ones(2, 4)
    made = []

    def step(state, batch):
        made.append(nn.Sequential(nn.Flatten(), nn.Tanh()))
        return made[-1](state), {}

    assert [op.module for op in ps.trace_bits(step, x, x).operations] == ["Sequential.1"]


def ops_of(function, *tensors):
    return ps.trace_bits(lambda state, batch: function(*state), tensors, ()).operations


def test_in_place_operations_give_what_they_wrote():
    x = torch.ones(3)
    (a,), (b,) = ops_of(lambda x: x.clone(), x), ops_of(lambda x: x + 0, x)
    clone, add = ops_of(lambda x: x.clone().add_(1), x)
    assert a.outputs == b.outputs == clone.outputs == add.inputs
    assert (add.name, len(add.outputs), add.outputs[0].kind) == ("aten.add_.Tensor", 1, "float32[3]")
    _, _, foreach = ops_of(lambda x: torch._foreach_add_([x.clone(), x.clone()], 1.0), x)
    assert foreach.outputs == (add.outputs[0], add.outputs[0])  # it returns nothing
    *_, out = ops_of(lambda x: torch.add(x, 1, out=x.clone()), x)
    assert out.outputs == add.outputs


def test_unwritten_memory_has_no_digest():
    def step(x):
        buffer = torch.empty(3)
        buffer.copy_(x)
        return buffer

    empty, copy = ops_of(step, torch.ones(3))
    assert [out.digest for out in empty.outputs] == [""]
    assert copy.outputs == ops_of(lambda x: x.clone(), torch.ones(3))[0].outputs


def test_batch_norm_gives_the_statistics_it_writes_untold():
    mean, var, x = torch.zeros(2), torch.ones(2), torch.arange(6.0).reshape(3, 2)
    (operation,) = [
        op
        for op in ops_of(lambda x, m, v: nn.functional.batch_norm(x, m, v, training=True), x, mean, var)
        if "norm" in op.name
    ]
    assert [out.kind for out in operation.outputs] == ["float32[3, 2]", *["float32[2]"] * 4]
    assert operation.outputs[-1] != operation.inputs[-1]


def test_operations_of_several_outputs_give_all():
    (operation,) = ops_of(lambda x: x.topk(2), torch.tensor([3.0, 1.0, 2.0]))
    assert [out.kind for out in operation.outputs] == ["float32[2]", "int64[2]"]
    (item,) = ops_of(lambda x: x.item(), torch.tensor(2.5))
    assert [out.kind for out in item.outputs] == ["float"]


def test_views_compute_nothing():
    x = torch.ones(2, 3)

    def views(x):
        return (
            x.t(),
            x.view(3, 2),
            x[0],
            x.expand(4, 2, 3),
            x.detach(),
            torch.ops.aten._unsafe_view(x, [6]),
            x.unbind(),
        )

    assert ops_of(views, x) == ()
    (operation,) = ops_of(lambda x: x.t()[1].exp(), x)
    assert operation.name == "aten.exp"


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(0, 3),
        torch.tensor([float("nan"), -0.0, float("inf")]),
        torch.tensor([1 + 2j, float("nan")]).conj(),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        torch.tensor(7, dtype=torch.int16),
    ],
    ids=lambda x: str(x.dtype),
)
def test_any_tensor_has_a_digest(value, tmp_path):
    trace = ps.trace_bits(lambda state, batch: (state.clone(), {}), value, (), tmp_path / "a.bits", values=True)
    (operation,) = [op for op in trace.operations if "clone" in op.name]
    assert operation.outputs[0].digest
    assert operation.outputs == operation.inputs
    if value.layout == torch.strided:
        loaded = BitsTrace.load(tmp_path / "a.bits").values[len(trace.operations) - 1][0]
        assert not ps.diff(loaded, value.resolve_conj())


def test_equal_nan_is_equal_and_another_nan_is_not():
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a, b, c = (
        ps.trace_bits(lambda s, b: (s.clone(), {}), x, (), values=True) for x in (bits, bits.clone(), bits.flip(0))
    )
    assert ps.compare_bits(a, b).equal
    found = ps.compare_bits(a, c)
    assert (found.kind, found.largest.index, found.largest.ulp) == ("bits", (0,), None)


# --- comparing --------------------------------------------------------------------------------------------------------


def nudged(tensor, ulps):
    flat = tensor.reshape(-1).clone()
    flat.view(torch.int32)[5] += ulps
    return flat.reshape(tensor.shape)


def test_a_kernel_that_differs_is_named(state, batch, replaced, tmp_path):
    step = ps.make_step(loss_fn, TX)
    ps.trace_bits(step, state, batch, tmp_path / "a.bits", values=True)

    def wrong(kernel, grad, x, weight, *rest):
        of_x, of_weight, of_bias = kernel(grad, x, weight, *rest)
        # The second convolution has four channels in, and its gradient comes first.
        return of_x, nudged(of_weight, 2) if weight.shape[1] == 4 else of_weight, of_bias

    replaced("convolution_backward", wrong)
    ps.trace_bits(step, state, batch, tmp_path / "b.bits", values=True)
    found = ps.compare_bits(tmp_path / "a.bits", tmp_path / "b.bits")
    assert str(found).startswith("the first operation that differs is aten.convolution_backward in body.3, 2 ulp\n")
    assert (found.kind, found.a.phase, found.inputs_equal, found.outputs) == ("bits", "backward", True, (1,))
    assert (found.largest.index, found.largest.ulp) == ((0, 0, 1, 2), 2)
    assert found.differing > 1
    text = str(found)
    assert (
        f"where:     operation {found.position} of {len(BitsTrace.load(tmp_path / 'a.bits').operations)}, backward, "
        in text
    )
    assert "in forward: return self.head(self.body(x))" in text
    assert "inputs:    equal" in text
    assert f"{found.a.outputs[1].digest} and {found.b.outputs[1].digest}" in text
    assert f"at [0, 0, 1, 2]: {found.largest.a!r} and {found.largest.b!r}, 2 ulp" in text


def test_values_may_be_kept_of_chosen_operations(state, batch, replaced, tmp_path):
    step = ps.make_step(loss_fn, TX)
    a = ps.trace_bits(step, state, batch)
    replaced("gelu", lambda kernel, x, **options: nudged(kernel(x, **options), 1))
    b = ps.trace_bits(step, state, batch)
    found = ps.compare_bits(a, b)
    assert found.largest is None
    assert str(found).startswith("the first operation that differs is aten.gelu in body.2\n")
    assert f"trace both with values=[{found.position}]" in str(found)
    with_value = ps.trace_bits(step, state, batch, tmp_path / "b.bits", values=[found.position])
    assert list(with_value.values) == [found.position]
    assert with_value == b
    again = BitsTrace.load(tmp_path / "b.bits")
    assert not ps.diff(again.values[found.position], with_value.values[found.position])


def test_another_number_of_threads_is_found():
    x = ps.random.normal(ps.random.key(0), (1 << 18,))

    def step(state, batch):
        return (state * 1.5).sum(), {}

    before = torch.get_num_threads()
    traces = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            traces.append(ps.trace_bits(step, x, (), values=True))
    finally:
        torch.set_num_threads(before)
    found = ps.compare_bits(*traces)
    assert (found.a.name, found.inputs_equal) == ("aten.sum", True)
    assert found.conditions == {"threads": (1, 2)}
    assert str(found).endswith("made with: threads 1 and 2")
    assert found.largest.ulp >= 1


def test_a_line_of_code_that_differs_is_found(state, batch):
    def other(net, batch):
        scores = net(batch["x"] * 1.0)
        return nn.functional.cross_entropy(scores, batch["y"])

    a, b = (ps.trace_bits(ps.make_step(f, TX), state, batch) for f in (loss_fn, other))
    found = ps.compare_bits(a, b)
    assert (found.kind, found.a.name, found.b.name) == ("operation", "aten.convolution", "aten.mul.Tensor")
    text = str(found)
    assert text.startswith(
        f"the traces part at operation {found.position}: aten.convolution in body.0 -> float32[8, 4, 6, 6] in a, "
    )
    assert 'in other: scores = net(batch["x"] * 1.0)' in text


def test_a_number_of_the_code_that_differs_is_found():
    x = torch.ones(3)
    a, b = (ps.trace_bits(lambda s, _, c=c: ((s + 1) * c, {}), x, ()) for c in (0.5, 0.25))
    found = ps.compare_bits(a, b)
    assert (found.kind, found.position, found.inputs_equal) == ("bits", 1, False)
    assert "arguments: (x, 0.5) and (x, 0.25)" in str(found)


def test_a_trace_that_goes_on_is_found():
    x = torch.ones(3)
    a, b = ps.trace_bits(lambda s, _: (s + 1, {}), x, ()), ps.trace_bits(lambda s, _: ((s + 1).exp(), {}), x, ())
    found = ps.compare_bits(a, b)
    assert (found.kind, found.position, found.a, found.b.name) == ("operation", 1, None, "aten.exp")
    assert str(found).startswith("the traces part at operation 1: none in a, aten.exp (forward, outside of modules)")


def test_other_shapes_are_another_operation():
    a, b = (ps.trace_bits(lambda s, _: (s.exp(), {}), torch.ones(n), ()) for n in (2, 3))
    found = ps.compare_bits(a, b)
    assert (found.kind, found.given) == ("operation", ("state",))


def test_another_sample_is_named(state, batch):
    step = ps.make_step(loss_fn, TX)
    other = batch | {"x": batch["x"].clone()}
    other["x"][3, 0, 2, 2] += 1
    found = ps.compare_bits(ps.trace_bits(step, state, batch), ps.trace_bits(step, state, other))
    assert found.given == ("batch['x']",)
    assert (found.a.name, found.a.module, found.inputs_equal) == ("aten.convolution", "body.0", False)
    assert "given:     other bits: batch['x']" in str(found)
    assert "number 0 differs, and no operation before it does: the state or the batch" in str(found)


def test_a_constant_that_differs_is_told_from_a_kernel():
    constants = [torch.ones(3), torch.zeros(3)]
    a, b = (ps.trace_bits(lambda s, _, c=c: (s + c, {}), torch.ones(3), ()) for c in constants)
    assert "number 1 differs, and no operation before it does: a constant" in str(ps.compare_bits(a, b))


def test_what_is_no_operation_shows_in_the_result():
    def step(number):
        return lambda state, batch: (torch.from_numpy(state.exp().numpy() + number), {})

    found = ps.compare_bits(*(ps.trace_bits(step(n), torch.ones(3), ()) for n in (1, 2)))
    assert (found.kind, found.equal) == ("result", False)
    assert "are equal, and the result is not" in str(found)


def test_the_largest_difference_of_complex_numbers():
    a = torch.tensor([[1 + 2j, 3 + 4j]])
    b = a.clone()
    torch.view_as_real(b)[0, 1, 1] = torch.nextafter(torch.tensor(4.0), torch.tensor(5.0))
    found = ps.compare_bits(*(ps.trace_bits(lambda s, _: (s.clone(), {}), x, (), values=True) for x in (a, b)))
    assert (found.largest.index, found.largest.a, found.largest.ulp) == ((0, 1, 1), 4.0, 1)


NATIVE = """
import torch, sys
from torch import nn
import purestep as ps
tx = ps.optim.adamw(1e-2)
step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
state = ps.init(lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), tx, seed=0)
ps.trace_bits(step, state, ps.random.normal(ps.random.key(1), (33, 64)), sys.argv[1], values=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64")
    or not torch.backends.mkl.is_available()
    or not torch.cpu._is_avx2_supported(),
    reason="portable bits are those of x86-64",
)
def test_traces_of_other_processes_and_bits_are_compared(tmp_path):
    files = [tmp_path / f"{name}.bits" for name in ("native", "again", "portable")]
    for file, mode in zip(files, ("native", "native", "portable"), strict=True):
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PURESTEP_", "ATEN_", "MKL_CBWR", "ONEDNN_"))
        }
        command = [sys.executable, "-c", NATIVE, str(file)]
        subprocess.run(command, env=environment | {"PURESTEP_BITS": mode}, cwd=ROOT, check=True, timeout=300)
    assert ps.compare_bits(files[0], files[1]).equal
    found = ps.compare_bits(files[0], files[2])
    assert found.conditions["bits"] == ("native", "portable")
    # Where both run the same kernels, all may be equal; where not, the operation is named and its distance is known.
    assert found.equal or (found.kind == "bits" and found.inputs_equal and found.largest.ulp >= 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_split_tensors_are_refused(inside, zygote):
    script = f"""
import torch, torch.distributed as dist, purestep as ps
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
split = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
state = torch.ones(()) if {inside} else {{"w": split}}
try:
    ps.trace_bits(lambda state, batch: (split * 2, {{}}), state, torch.ones(4))
except ps.errors.ConfigError as error:
    print(error)
dist.destroy_process_group()
"""
    done = zygote.run(script)
    assert "bits are traced in one process, and this tensor is split over several" in done.stdout, done.stderr
    assert ("where:   aten.mul.Tensor: float32[4]" if inside else "where:   state['w']: float32[4]") in done.stdout


def test_a_compiled_step_is_refused(state, batch):
    with pytest.raises(ConfigError, match=r"the operations of a compiled step cannot be seen\n.*backend='inductor'"):
        ps.trace_bits(ps.jit(ps.make_step(loss_fn, TX)), state, batch)


def test_positions_are_numbers(state, batch):
    with pytest.raises(ConfigError, match="values= is True, or the positions of operations"):
        ps.trace_bits(by_hand, state, batch, values=["aten.mm"])


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "a.bits"
    ps.trace_bits(lambda state, batch: ((state + 1).exp(), {}), torch.ones(3), (), file)
    return file


DAMAGE = {
    "cut off": lambda lines: lines[:-1],
    "a line less": lambda lines: [lines[0], *lines[2:]],
    "not JSON": lambda lines: [lines[0], "{", *lines[2:]],
    "another format": lambda lines: [json.dumps({"format": "x"}), *lines[1:]],
    "a head that is a list": lambda lines: ["[]", *lines[1:]],
    "an unknown field": lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | {"x": 1}), *lines[2:]],
    "a missing field": lambda lines: [lines[0], json.dumps({"name": "x", "inputs": [], "outputs": []}), *lines[2:]],
    "no lines": lambda lines: [],
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_refused(name, compressed, written):
    content = "\n".join(DAMAGE[name](written.read_text().splitlines())).encode()
    written.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ConfigError, match="this is no whole trace of bits") as caught:
        ps.compare_bits(written, written)
    assert str(written) in str(caught.value)


def test_a_cut_compressed_file_and_a_missing_one_are_refused(written, tmp_path):
    packed = gzip.compress(written.read_bytes())
    written.write_bytes(packed[: len(packed) // 2])
    for file in (written, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="this is no whole trace of bits"):
            ps.compare_bits(file, file)


def test_a_file_of_another_version_is_refused(written):
    head, *rest = written.read_text().splitlines()
    written.write_text("\n".join([json.dumps(json.loads(head) | {"version": 2}), *rest]))
    with pytest.raises(ConfigError, match=r"written by another version of purestep\n.*version 2, this one reads 1"):
        ps.compare_bits(written, written)


def test_a_large_trace_is_compressed(tmp_path):
    def step(state, batch):
        for _ in range(400):
            state = state + 1
        return state, {}

    trace = ps.trace_bits(step, torch.ones(3), (), tmp_path / "a.bits")
    assert (tmp_path / "a.bits").read_bytes().startswith(b"\x1f\x8b")
    assert (tmp_path / "a.bits").stat().st_size < 400 * 60
    assert BitsTrace.load(tmp_path / "a.bits") == trace


def test_a_trace_prints_what_it_is(written):
    text = repr(BitsTrace.load(written))
    assert text.startswith(f"BitsTrace(2 operations: 2 forward; torch {torch.__version__}, devices cpu, ")
    assert "threads 1, bits native" in text
