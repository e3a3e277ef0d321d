"""What a CUDA graph of a donated step records: nothing that comes from the host.

A recording repeats the kernels and not the host. A copy from pageable memory cannot be recorded, and a tensor of the
CPU that a kernel reads would keep the value that it had when the graph was recorded. `jit.cuda_graph` records the whole
compiled graph, so no operator in it may have tensors of both. What is computed on the CPU alone, of numbers of the
code, is the same in every call.
"""

from __future__ import annotations

import pytest
import torch
from shared_fake_cuda import needs_cuda_build, on_cuda
from shared_gpt import TOKENS, TinyGPT

import purestep as ps
from purestep import grad
from purestep.jit import constants, donation_graph
from purestep.jit._torch import fake_tensor_mode
from purestep.jit.trace import Traced, trace
from tests.device.test_steps import ROWS, STEPS

pytestmark = needs_cuda_build
# A step of several microbatches is compiled in two pieces, of which the second is an update, as those of OPTIMIZERS.
WHOLE = sorted(
    name for name in STEPS if "microbatches" not in name and name not in ("evaluation", "prediction", "wrapped")
)


def recorded(function, state, batch) -> Traced:
    """Return the graph that is recorded of a function of state and batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad, "_gradient", lambda value, one, inputs: [torch.empty_like(x) for x in inputs])
        with fake_tensor_mode(allow_non_fake_inputs=True):
            given = on_cuda(state), on_cuda(batch)
        leaves, structure = ps.tree.flatten((given, {}))
        names = [str(i) for i in range(len(leaves))]
        found = trace(function, leaves, structure, paths=lambda: names, state_leaves=len(ps.tree.leaves(state)))
        donation_graph.epilogue(found, given[0], len(leaves), donate=True, name="step")
        # Without a card a constant cannot be put there.
        patch.setattr(constants, "_moved", lambda constant, like: constant)
        constants.place(found)
    return found


def crossings(traced: Traced) -> list[str]:
    """Operators with tensors of the CPU and of the card, and inputs on the CPU."""
    found = []
    for node in traced.graph.graph.nodes:
        values = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
        kinds = {x.device.type for x in ps.tree.leaves(values) if isinstance(x, torch.Tensor)}
        if node.op != "output" and ("cpu" in kinds if node.op == "placeholder" else {"cpu", "cuda"} <= kinds):
            found.append(f"{node.name}: {node.target} {node.args}")
    return found


def update_by(tx):
    def update(state, batch):
        return state.apply_gradients(tx, state.params, value=state.step.to(torch.float32)), {}

    return update


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"lift"}))  # which cannot be traced
def test_an_update_records_nothing_of_the_host(name):
    tx = ROWS[name]()
    assert crossings(recorded(update_by(tx), ps.init(TinyGPT, tx, seed=0), TOKENS)) == []


@pytest.mark.parametrize("name", WHOLE)
def test_a_step_records_nothing_of_the_host(name):
    assert crossings(recorded(*STEPS[name]())) == []


def test_a_copy_from_the_host_is_caught(monkeypatch):
    def update(state, batch):
        table = torch.tensor([0.5, 0.25], device=state.step.device)
        new = {name: p * table[0] for name, p in state.params.items()}
        return state.replace(params=new), {"here": torch.ones(3), "there": torch.ones(3, device="cuda").cpu()}

    state = ps.init(TinyGPT, ps.optim.sgd(0.1), seed=0)
    assert [line.split(":")[0] for line in crossings(recorded(update, state, TOKENS))] == ["_to_copy_1"]
    monkeypatch.setattr(constants, "_copied", lambda module, node: None)
    assert [line.split(":")[0] for line in crossings(recorded(update, state, TOKENS))] == ["_to_copy", "_to_copy_1"]
