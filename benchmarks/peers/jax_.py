"""JAX with flax and optax: one jitted step that donates its state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import jax_models, workloads
from benchmarks.peers.base import Trainer
from benchmarks.workloads import Workload


class Jax(Trainer):
    def __init__(self, work: Workload) -> None:
        self.work = work
        self.batches = [(jnp.asarray(jax_models.images_last(x)), jnp.asarray(y)) for x, y in work.batches()]
        model = jax_models.MODELS[work.kind](work.sizes)
        w = workloads
        tx = optax.adamw(w.LEARNING_RATE, *w.BETAS, eps=w.EPS, weight_decay=w.WEIGHT_DECAY)
        params = jax_models.from_torch(work.arrays())
        first = model.init(jax.random.key(0), self.batches[0][0])
        stats = {"batch_stats": first["batch_stats"]} if "batch_stats" in first else {}
        self.state = (params, stats, tx.init(params))

        def loss_of(params: Any, stats: Any, x: Any, y: Any) -> Any:
            logits, stats = model.apply({"params": params, **stats}, x, mutable=list(stats))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: Any, y: Any) -> Any:
            params, stats, opt_state = state
            (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), stats, opt_state), loss

        self.step = step

    def train(self, steps: int) -> float:
        state, step = self.state, self.step
        for x, y in self.feed(steps):
            state, loss = step(state, x, y)
        self.state = jax.block_until_ready(state)
        return float(loss)
