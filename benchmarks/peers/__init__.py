"""The trainers that are compared, by name. Each name is imported in the worker process that runs it, and only there."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from benchmarks.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Peer:
    """Where a trainer is, and what the table calls it.

    Attributes:
        name: short name.
        title: what the table says.
        where: module and class, `benchmarks.peers.<module>:<Class>`.
        options: passed to the class.
        ours: whether it is purestep.
    """

    name: str
    title: str
    where: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: bool = False

    def make(self, work: Workload) -> Any:
        """Build the trainer for a workload: model, optimizer, data; nothing has been trained or compiled yet."""
        module, name = self.where.split(":")
        return getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)(work, **self.options)

    def load(self) -> None:
        """Import what the trainer needs."""
        importlib.import_module(f"benchmarks.peers.{self.where.split(':')[0]}")


ALL: dict[str, Peer] = {
    p.name: p
    for p in (
        Peer("loop", "hand-written loop, AdamW foreach", "loops:Loop", {"optimizer": "foreach"}),
        Peer("loop-fused", "hand-written loop, AdamW fused", "loops:Loop", {"optimizer": "fused"}),
        Peer("compile", "torch.compile of the model, AdamW fused", "loops:Loop", {"optimizer": "fused", "compiled": 1}),
        Peer("compile-all", "torch.compile of model and AdamW", "loops:Loop", {"optimizer": "foreach", "compiled": 2}),
        Peer("lightning", "Lightning Trainer, barebones", "lightning_:Trainer"),
        Peer("lightning-log", "Lightning Trainer, one self.log", "lightning_:Trainer", {"log": True}),
        Peer("fabric", "Lightning Fabric", "lightning_:Fabric"),
        Peer("accelerate", "Accelerate", "accelerate_:Accelerate"),
        Peer("ignite", "PyTorch Ignite, supervised trainer", "ignite_:Ignite"),
        Peer("keras", "Keras 3 on torch, fit", "keras_:Keras"),
        Peer("jax", "JAX + flax + optax, jit, donated", "jax_:Jax"),
        Peer("ps-eager", "purestep, eager", "ours:Ours", ours=True),
        Peer("ps-fused", "purestep, eager, fused=True", "ours:Ours", {"fused": True}, ours=True),
        Peer("ps-eager-donate", "purestep, eager, donated", "ours:Ours", {"donate": True}, ours=True),
        Peer(
            "ps-fused-donate",
            "purestep, eager, fused=True, donated",
            "ours:Ours",
            {"fused": True, "donate": True},
            ours=True,
        ),
        Peer("ps-jit", "purestep, jit", "ours:Ours", {"jit": True}, ours=True),
        Peer("ps-donate", "purestep, jit, donated", "ours:Ours", {"jit": True, "donate": True}, ours=True),
        Peer("ps-fit", "purestep, fit over jit, donated", "ours:Fit", {"jit": True, "donate": True}, ours=True),
    )
}
POLICIES = ("32", "64", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "bf16-master", "float8")
ALL |= {
    f"policy-{name}": Peer(f"policy-{name}", name, "ours:Ours", {"policy": name, "fused": False}, ours=True)
    for name in POLICIES
}
