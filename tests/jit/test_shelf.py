"""Compiled graphs on disk: found again by what they compute, refused when damaged, and never wrong."""

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from purestep import tree
from purestep.jit import backends, disk_cache, jit
from purestep.jit.trace import trace


def traced(function, *arguments):
    leaves, structure = tree.flatten((arguments, {}))
    return trace(function, leaves, structure, paths=list)


def name_of(function, *arguments, mode=None):
    return disk_cache.key(traced(function, *arguments), mode)


def f(x, y):
    return torch.tanh(x @ y) * 2 + x.sum()


X, Y = torch.randn(5, 3), torch.randn(3, 3)


def test_a_name_says_what_a_graph_computes(monkeypatch):
    name = name_of(f, X, Y)
    assert name == name_of(f, X + 1, Y * 2)
    others = [
        name_of(lambda x, y: torch.tanh(x @ y) * 3 + x.sum(), X, Y),
        name_of(lambda x, y: torch.tanh(x @ y) * 2 + y.sum(), X, Y),
        name_of(f, torch.randn(6, 3), Y),
        name_of(f, X.double(), Y.double()),
        name_of(f, X, Y.t()),
        name_of(f, X, Y, mode="max-autotune-no-cudagraphs"),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    others.append(name_of(f, X, Y))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch._inductor.config.patch({"cpp.min_chunk_size": 77}):
        others.append(name_of(f, X, Y))
    monkeypatch.setenv("TORCHINDUCTOR_ANYTHING", "1")
    others.append(name_of(f, X, Y))
    assert len({name, *others}) == len(others) + 1


def test_graphs_with_tensors_in_them_have_no_name():
    graph = traced(f, X, Y)
    graph.graph.register_buffer("c", torch.tensor([1.0, 2.0, 3.0]))
    with graph.graph.graph.inserting_before(next(n for n in graph.graph.graph.nodes if n.op == "call_function")):
        graph.graph.graph.get_attr("c")
    assert disk_cache.key(graph, None) is None
    with torch._inductor.config.patch(force_disable_caches=True):
        assert name_of(f, X, Y) is None


def test_a_source_that_asks_for_something_else_is_not_kept(tmp_path):
    def module(text, **names):
        file = tmp_path / "module.py"
        file.write_text(textwrap.dedent(text))
        made = types.ModuleType("module")
        made.__file__ = str(file)
        made.__dict__.update(names, torch=torch)
        exec(compile(file.read_text(), str(file), "exec"), made.__dict__)
        return made.call

    plain = """
        from math import inf
        half = torch.float16
        class Runner:
            def call(self, args):
                (x,) = args
                return (torch.where(x > inf, x, sum([x, x])).to(half),)
        call = Runner().call
    """
    kept, files = disk_cache.written(module(plain))
    assert files == {}
    assert kept.load(tmp_path)([torch.ones(2)])[0].dtype == torch.float16
    assert disk_cache.written(module(plain.replace("torch.where", "helper"), helper=torch.where)) is None
    extern = types.SimpleNamespace(mm=torch.mm)
    calls = plain.replace("torch.where", "extern_kernels.mm")
    assert disk_cache.written(module(calls, extern_kernels=extern))[0].extern == ["mm"]
    assert disk_cache.written(module(calls, extern_kernels=types.SimpleNamespace(mm=torch.bmm))) is None
    assert disk_cache.written(len) is None


def step(state, batch):
    grad = batch.t() @ (batch @ state["w"])
    new = {"w": state["w"] - 0.1 * torch.tanh(grad), "n": state["n"] + 1}
    return new, {"loss": grad.square().mean()}


def arguments():
    g = torch.Generator().manual_seed(3)
    return {"w": torch.randn(6, 2, generator=g), "n": torch.tensor(0)}, torch.randn(4, 6, generator=g)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One graph, compiled and put on a shelf of its own: the folder, and what a step gave."""
    directory = tmp_path_factory.mktemp("inductor")
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
    try:
        result = jit(step)(*arguments())
        yield directory, result
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@pytest.mark.slow
def test_what_is_on_the_shelf_is_not_compiled_again(compiled, monkeypatch):
    _, expected = compiled
    monkeypatch.setattr(backends, "_compiled", None)
    state, metrics = jit(step)(*arguments())
    assert tree.digest((state, metrics)) == tree.digest(expected)
    for donate in (False, True):
        with pytest.raises(Exception, match="cannot compile"):
            jit(lambda state, batch: step(state, batch + 1), donate=donate)(*arguments())


def files_of(compiled):
    (folder,) = [p.parent for p in compiled[0].glob("purestep/*/*/kept.json")]
    return folder


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGE = {
    "a flipped byte": ("0.so", flipped),
    "a cut file": ("0.so", lambda data: data[:-100]),
    "a missing file": ("0.so", None),
    "no list": ("kept.json", None),
    "a cut list": ("kept.json", lambda data: data[:-9]),
    "another list": ("kept.json", lambda data: b"{}"),
    "another kernel": (
        "kept.json",
        lambda data: json.dumps(json.loads(data) | {"kernels": {"cpp_fused": ["0.so", "nothing"]}}).encode(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_damaged_is_not_taken(compiled, what):
    folder = files_of(compiled)
    assert disk_cache.take(folder.name) is not None
    file, change = DAMAGE[what]
    before = (folder / file).read_bytes()
    (folder / file).unlink()
    try:
        if change is not None:
            (folder / file).write_bytes(change(before))
        assert disk_cache.take(folder.name) is None
    finally:
        (folder / file).write_bytes(before)


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
import purestep as ps
from torch import nn

def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])

tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-2))
model = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
state = ps.init(model, tx, seed=0)
step = ps.jit(ps.make_step(loss_fn, tx), donate=True)
g = torch.Generator().manual_seed(0)
for _ in range(3):
    batch = {"x": torch.randn(16, 6, generator=g), "y": torch.randint(0, 3, (16,), generator=g)}
    state, metrics = step(state, batch)
print(ps.digest((state, metrics)), "torch._inductor.lowering" in sys.modules)
"""


@pytest.mark.slow
def test_another_process_runs_what_the_first_one_compiled(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    (cold, imported), (warm, again) = said
    assert cold == warm
    assert (imported, again) == ("True", "False")
