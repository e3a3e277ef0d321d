"""Where a state lives: who is asked first, which card a rank takes, and that batches follow; on machines that are only
pretended, because the rule is about what torch says of a machine."""

from __future__ import annotations

import contextlib
import importlib
import threading

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import devices
from purestep.data.to_device import Copies
from purestep.errors import ConfigError
from purestep.loop.identity import RunChangedWarning
from purestep.preflight import check


def make():
    return nn.Linear(3, 1)


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


DATA = {"x": torch.ones(8, 3), "y": torch.ones(8, 1)}
TX = ps.optim.sgd(0.1)


@pytest.fixture
def machine(monkeypatch):
    """Pretends a machine with so many cards of a kind, of which number 1 is current."""

    def pretend(kind: str, count: int = 4, rank: int | None = None):
        monkeypatch.delenv("PURESTEP_DEVICE", raising=False)
        module = getattr(torch, kind) if kind != "mps" else torch.backends.mps
        monkeypatch.setattr(module, "is_available", lambda: True)
        if kind != "mps":
            monkeypatch.setattr(module, "device_count", lambda: count)
            monkeypatch.setattr(module, "current_device", lambda: min(1, count - 1))
        if rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", str(rank))

    return pretend


@pytest.mark.parametrize(
    ("kind", "rank", "expected"),
    [
        ("cuda", None, "cuda:1"),
        ("cuda", 3, "cuda:3"),
        ("xpu", None, "xpu:1"),
        ("xpu", 2, "xpu:2"),
        ("mps", None, "mps"),
        ("mps", 1, "mps"),
    ],
)
def test_the_default_is_the_accelerator_and_under_torchrun_the_card_of_the_local_rank(machine, kind, rank, expected):
    machine(kind, rank=rank)
    assert ps.default_device() == ps.default_device("auto") == torch.device(expected)
    assert ps.default_device(kind) == torch.device(expected)
    assert ps.default_device("cpu") == torch.device("cpu")
    if kind != "mps":
        assert ps.default_device(f"{kind}:0") == torch.device(kind, 0)


def test_cuda_comes_before_the_others_and_the_variable_before_all(machine, monkeypatch):
    machine("mps")
    machine("xpu")
    assert ps.default_device().type == "xpu"
    machine("cuda")
    assert ps.default_device().type == "cuda"
    monkeypatch.setenv("PURESTEP_DEVICE", "cpu")
    assert ps.default_device() == torch.device("cpu")
    monkeypatch.setenv("PURESTEP_DEVICE", "cuda:3")
    assert ps.default_device() == torch.device("cuda:3")
    assert ps.default_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("PURESTEP_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="PURESTEP_DEVICE names a device\n  where:   PURESTEP_DEVICE=gpu"):
        ps.default_device()


def test_portable_bits_are_those_of_cpus(machine, monkeypatch):
    machine("cuda")
    monkeypatch.setattr(devices.portable, "mode", lambda: "portable")
    assert ps.default_device() == torch.device("cpu")


def test_a_rank_without_a_card_is_refused_unless_each_sees_its_own(machine):
    machine("cuda", count=2, rank=2)
    with pytest.raises(ConfigError, match=r"more processes than cards.*\n  where:   LOCAL_RANK=2, 2 cards"):
        ps.default_device()
    machine("cuda", count=1, rank=2)
    assert ps.default_device() == torch.device("cuda:0")


def test_the_process_group_sends_from_the_default_device_and_gloo_takes_no_card(machine, monkeypatch):
    taken = []
    machine("cuda", rank=2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert devices.backend() == "cpu:gloo,cuda:nccl"
    devices.select(devices.of_backend("gloo"))
    assert taken == []
    devices.select(devices.of_backend("cpu:gloo,cuda:nccl"))
    assert taken == [torch.device("cuda:2")]
    assert devices.of_backend("gloo") == torch.device("cpu")
    assert devices.of_backend("fake") is None
    monkeypatch.setenv("PURESTEP_DEVICE", "cpu")
    assert devices.backend() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine("xpu")
    assert devices.backend() == "cpu:gloo,xpu:xccl"


def test_init_puts_a_state_on_the_default_device_but_leaves_a_module_where_somebody_has_put_it(monkeypatch):
    monkeypatch.setenv("PURESTEP_DEVICE", "meta")  # a device that every machine has, and no state is on by itself
    for deferred in (False, True):
        state = ps.init(make, TX, seed=0, deferred=deferred)
        assert {leaf.device.type for leaf in ps.tree.leaves(state)} == {"meta"}
    state = ps.init(make, TX, seed=0, device="cpu")
    assert {leaf.device.type for leaf in ps.tree.leaves(state)} == {"cpu"}
    monkeypatch.setenv("PURESTEP_DEVICE", "cpu")
    assert {leaf.device.type for leaf in ps.tree.leaves(ps.init(nn.Linear(3, 1, device="meta"), TX))} == {"meta"}
    with pytest.raises(ConfigError, match="init: device must be 'auto', or a device"):
        ps.init(make, TX, device="gpu")


def test_fit_moves_the_state_and_leaves_the_one_it_was_given(monkeypatch):
    moved = []
    monkeypatch.setattr(devices, "move", lambda value, device: moved.append(device) or value)
    state, step = ps.init(make, TX, seed=0), ps.make_step(loss_fn, TX)
    batches = ps.data.batches(DATA, 4, seed=0)
    plain = ps.fit(step, state, batches, until=ps.steps(2))
    assert moved == []
    told = ps.fit(step, state, batches, until=ps.steps(2), device="auto")
    assert moved == [torch.device("cpu")]
    assert ps.digest(plain.state) == ps.digest(told.state)
    with pytest.raises(ConfigError, match="device= is a device, 'auto', or None\n  where:   device='gpu'"):
        ps.fit(step, state, batches, until=ps.steps(2), device="gpu")


def test_a_run_goes_on_on_another_device_and_says_that_its_bits_may_differ(tmp_path, monkeypatch):
    def run(until, **options):
        kept = [ps.callbacks.snapshots(every=ps.every.steps(1))]
        batches = ps.data.batches(DATA, 4, seed=0)
        state = ps.init(make, TX, seed=0)
        return ps.fit(
            ps.make_step(loss_fn, TX), state, batches, until=until, run_dir=tmp_path, callbacks=kept, **options
        )

    run(ps.steps(1))
    assert ps.snapshot.manifest(tmp_path, 1).info["step"]["device"] == "cpu"
    monkeypatch.setattr(devices, "name_of", lambda device: "cuda, Some Card")
    with pytest.raises(ps.errors.SnapshotError, match="device: saved under cpu, now cuda, Some Card"):
        run(ps.steps(2), strict=True)
    with pytest.warns(RunChangedWarning, match="its bits may differ from here on\n.*device: saved under cpu") as said:
        result = run(ps.steps(2))
    assert "the device it was saved on: cpu" in str(said[0].message)
    assert int(result.state.step) == 2


class Streams:
    """What `torch.cuda` has of streams; writes down what is asked of it."""

    def __init__(self):
        self.log = []

    def Stream(self, device):
        return Stream("copies", self.log)

    def current_stream(self, device):
        return Stream("current", self.log)

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("off")


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the {event}")


def test_a_batch_is_pinned_and_copied_on_a_stream_of_its_own(monkeypatch):
    streams, kept = Streams(), []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.dtype == torch.int64)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: streams.log.append(f"pin {x.dtype}") or x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: kept.append((x.dtype, stream.name)))
    copies = Copies(torch.device("cpu"), streams)
    batch = {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64), "name": "a", "z": DATA["x"].numpy()}
    moved = copies(batch)
    assert streams.log == [
        *("pin torch.float32", "pin torch.float32", "on copies", "off", "copies records"),
        "current waits for the event of copies",
    ]
    assert moved["name"] == "a"
    assert torch.equal(moved["z"], DATA["x"])
    assert kept == [(torch.float32, "current"), (torch.int64, "current"), (torch.float32, "current")]


def test_batches_of_a_run_and_of_a_loop_of_ones_own_follow_the_state(monkeypatch):
    asked = []
    monkeypatch.setattr(ps.loop.input, "on_device", lambda batch, device: asked.append(device.type) or batch)
    feed = ps.loop.input.Feed(ps.data.as_source([DATA, DATA]), torch.device("cpu"))
    feed.place(torch.device("meta"))
    assert len(list(feed.take(ps.loop.events.Cursor(), 2))) == 2
    assert asked == ["meta", "meta"]
    moved = []
    monkeypatch.setattr(ps.step_protocol, "_HOSTS", ())
    monkeypatch.setattr(ps.step_protocol, "on_device", lambda batch, device: moved.append(device.type) or batch)
    state, step = ps.init(make, TX, seed=0), ps.make_step(loss_fn, TX)
    calls = [step, ps.jit(step, backend="eager"), ps.make_eval(loss_fn), ps.make_predict(lambda net, b: net(b["x"]))]
    calls.append(ps.jit(ps.make_step(loss_fn, TX, microbatches=2), backend="eager"))
    for call in calls:
        moved.clear()
        call(state, DATA)
        assert moved == ["cpu"], call


@pytest.mark.parametrize(
    ("capability", "precision", "policy", "says"),
    [
        ((8, 0), "highest", None, True),
        ((9, 0), "highest", "32", True),
        ((7, 0), "highest", None, False),
        ((8, 0), "high", None, False),
        ((8, 0), "highest", "bf16-mixed", False),
    ],
)
def test_a_card_with_tensor_cores_that_are_not_used_is_mentioned_once(
    machine, monkeypatch, recwarn, capability, precision, policy, says
):
    machine("cuda")
    monkeypatch.setattr(check, "_told", [])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    step = ps.make_step(loss_fn, TX, policy=policy)
    for _ in range(2):
        check.check_precision(step, torch.device("cuda", 0))
    assert [w.category for w in recwarn] == [ps.loop.PrecisionWarning] * says
    assert not says or "bf16-mixed" in str(recwarn[0].message)


def test_the_summary_says_where_and_how_large_a_card_is(machine, monkeypatch):
    state = ps.init(make, TX)
    assert "\non cpu\n4 trained and 0 frozen parameters" in str(ps.display.summary(state))
    machine("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    card = type("Card", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    summary = ps.display.summary(state)
    shown = importlib.import_module("purestep.display.summary")._device(torch.device("cuda", 1))
    assert shown == "cuda:1, Some Card, 80.0 GiB"
    assert summary.devices == ("cpu",)


def test_the_memory_of_a_card_counts_what_torch_holds_and_does_not_use(machine, monkeypatch):
    machine("xpu")
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (100, 1000), raising=False)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device: 20)
    assert devices.free_memory_of(torch.device("xpu", 0)) == 130
    assert devices.free_memory_of(torch.device("meta")) is None


def in_a_thread_of_the_engine(value, one, inputs):
    """Run a backward pass as on a card: in another thread, which gets torch's modes and nothing of Python's threads."""
    modes, found = torch.overrides._get_current_function_mode_stack(), []

    def work():
        for mode in modes:
            torch.overrides._push_mode(mode)
        try:
            found.append(torch.autograd.grad(value, inputs, one, allow_unused=True))
        except BaseException as error:
            found.append(error)
        finally:
            for _ in modes:
                torch.overrides._pop_mode()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Checkpointed(nn.Module):
    def __init__(self, checkpoint):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 1))
        self.checkpoint = checkpoint

    def forward(self, x):
        return self.checkpoint(self.body, x) if self.checkpoint else self.body(x)


@pytest.mark.parametrize("policy", [None, "bf16-mixed", ps.precision.policy("bf16-mixed").replace(autocast=True)])
def test_what_is_recomputed_in_a_thread_of_the_autograd_engine_is_what_was_computed(monkeypatch, policy):
    """On a card the backward pass runs in such a thread, where what this thread has entered is not there."""
    found = {}
    for name, checkpoint in {"stored": None, "recomputed": ps.checkpoint}.items():
        for threaded in (False, True):
            tx = ps.optim.sgd(0.1)
            step = ps.make_step(loss_fn, tx, policy=policy)
            state = ps.init(lambda checkpoint=checkpoint: Checkpointed(checkpoint), tx, seed=0)
            state = state if policy is None else ps.precision.policy(policy).apply(state)
            with monkeypatch.context() as patch:
                if threaded:
                    patch.setattr(ps.grad, "_gradient", in_a_thread_of_the_engine)
                found[name, threaded] = ps.digest(step(state, DATA)[0].params)
    assert len(set(found.values())) == 1, found


def test_a_mode_that_is_entered_in_a_thread_of_the_engine_covers_the_one_outside():
    from purestep.random.torch_random import KeyedRandom

    seen = []

    def work(outer):
        torch.overrides._push_mode(outer)  # as the engine does
        with KeyedRandom(None):
            seen.append(outer.covered)
        torch.overrides._pop_mode()
        seen.append(outer.covered)

    with KeyedRandom(None, refusal="no") as outer:
        thread = threading.Thread(target=work, args=(outer,))
        thread.start()
        thread.join()
    assert seen == [1, 0]
