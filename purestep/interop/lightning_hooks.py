"""Hooks of a LightningModule that a pure step cannot run, and the code to write instead.

Owns the first check of `from_lightning`: an overridden hook that would not be called is an error, because a run without
the hook would train another model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from purestep.errors import ConfigError, explain

# Hooks that purestep calls, or whose work the caller of `fit` does.
_RUN = frozenset(
    "training_step validation_step test_step predict_step forward configure_optimizers on_after_batch_transfer "
    "train_dataloader val_dataloader test_dataloader predict_dataloader prepare_data teardown".split()
)
_MOMENT = "a callback: ps.callbacks.tap to look, ps.callbacks.transform to change the state"
_OWN_TX = "ps.optim.chain(..., lit.tx) with ps.make_step(lit.loss_fn, tx)"
_INSTEAD: Mapping[str, str] = {
    "setup": "call module.setup('fit') before, then without=('setup',)",
    "configure_model": "call module.configure_model() before, then without=('configure_model',)",
    "configure_sharded_model": "a plan: ps.init(lit.module, lit.tx, plan=ps.sharding.fsdp())",
    "configure_callbacks": "ps.fit(..., callbacks=[...])",
    "configure_gradient_clipping": "ps.optim.chain(ps.optim.clip_by_global_norm(1.0), lit.tx)",
    "optimizer_step": _OWN_TX,
    "optimizer_zero_grad": "nothing: gradients of a pure step are never kept",
    "lr_scheduler_step": "a schedule: lr=ps.optim.StepLR(0.1, 30)",
    "backward": "ps.make_step(lit.loss_fn, lit.tx); what is added to the loss belongs into training_step",
    "transfer_batch_to_device": "ps.data.to_device; batches go to the device of the state",
    "on_before_batch_transfer": "do it in the data set, or in training_step",
    "on_train_batch_start": "ps.wrap_step(lit.step, function), or " + _MOMENT,
    "on_train_batch_end": "return it as a metric, or ps.wrap_step(lit.step, function)",
    "on_before_optimizer_step": "ps.optim.monitor({'grad_norm': ps.optim.global_norm}) in a chain, or " + _OWN_TX,
    "on_after_backward": "ps.optim.monitor({'grad_norm': ps.optim.global_norm}) in a chain",
    "on_before_backward": "do it in training_step",
    "on_before_zero_grad": _MOMENT,
    "on_save_checkpoint": "a field of the state, which is saved: class MyState(ps.TrainState)",
    "on_load_checkpoint": "ps.load_weights(state, path, rename=...)",
    "on_train_epoch_end": "a metric that merges over batches (ps.metrics), or ps.callbacks.tap(function)",
    "on_validation_epoch_end": "a metric that merges over batches (ps.metrics): self.log takes one",
    "on_test_epoch_end": "a metric that merges over batches (ps.metrics): self.log takes one",
    "on_validation_model_eval": "nothing: an evaluation binds the model in evaluation mode",
    "on_validation_model_train": "nothing: training mode is that of the module",
}


def library() -> list[type[nn.Module]]:
    """Return the classes `LightningModule` of the packages that the program has imported.

    Their modules cannot exist before the import, so nothing is imported here.
    """
    packages = ("lightning.pytorch", "pytorch_lightning")
    found = [getattr(sys.modules[p], "LightningModule", None) for p in packages if p in sys.modules]
    return [cls for cls in found if isinstance(cls, type)]


def overridden(module: nn.Module, name: str, base: type[nn.Module]) -> bool:
    """Tell whether a module overrides a hook of Lightning, whose default does nothing."""
    own, theirs = getattr(type(module), name, None), getattr(base, name, None)
    return own is not None and (own is not theirs or name in vars(module))


def hooks_of(base: type[nn.Module]) -> list[str]:
    """Return the names of all hooks that Lightning's Trainer calls on a module."""
    called = [n for n, f in inspect.getmembers(base, inspect.isfunction) if n.startswith("on_") or n in _INSTEAD]
    return sorted(set(called) - _RUN)


def check(module: nn.Module, base: type[nn.Module], without: tuple[str, ...]) -> None:
    """Refuse a module with overridden hooks that would not be called, unless the caller leaves them out.

    Raises:
        ConfigError: there are such hooks, listed with the code to write instead; or `without` names another hook.
    """
    found = [name for name in hooks_of(base) if overridden(module, name, base)]
    odd = sorted(set(without) - set(found))
    if odd:
        where = f"without={without!r}; overridden: {', '.join(found) or 'none'}"
        raise ConfigError(
            explain(f"{odd[0]!r} is no hook that the module overrides and a run would not call", where=where)
        )
    lost = [name for name in found if name not in without]
    if lost:
        name = type(module).__qualname__
        raise ConfigError(
            explain(
                "the module overrides hooks that a pure step does not call",
                where=f"{name}: {', '.join(lost)}",
                why="training would go on without them, silently",
                instead="\n".join(f"{hook}: {_INSTEAD.get(hook, _MOMENT)}" for hook in lost)
                + f"\nor leave them out: ps.from_lightning(module, without={tuple(lost)!r})",
            )
        )


def check_kind(module: Any) -> type[nn.Module]:
    """Return the class `LightningModule` that a module inherits from.

    Raises:
        ConfigError: the module is no LightningModule, or optimizes manually.
    """
    base = next((cls for cls in library() if isinstance(module, cls)), None)
    if base is None:
        raise ConfigError(
            explain(
                "from_lightning takes a LightningModule",
                where=f"{type(module).__module__}.{type(module).__qualname__}",
                instead="ps.from_lightning(LitModel())\nps.init(model, tx)   # for any other nn.Module",
            )
        )
    if not module.automatic_optimization:
        raise ConfigError(
            explain(
                "the module optimizes by hand",
                where=f"{type(module).__qualname__}.automatic_optimization = False",
                why="manual_backward and optimizer.step change things in the middle of training_step",
                instead="one state and one ps.make_step for each optimizer, called in turn by a step of yours:\n"
                "def step(states, batch): ...   # a dict of states is a state",
            )
        )
    return base
