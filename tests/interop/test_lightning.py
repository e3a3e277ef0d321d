"""A LightningModule run by purestep, held against Lightning's own Trainer on the same batches.

The Trainer is the oracle: losses and parameters have to be its, to the bit where a lifted optimizer is exact (no
parameter more than doubles or halves in one update), else to rounding.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, MetricError, StepError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Lightning about its own imports
    import lightning.pytorch as pl
    import torchmetrics

# Importing Lightning takes longer than all of these tests. Its warnings are about workers, logging and the like.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPOCHS = 3
SCHEDULERS = {
    "none": lambda o, total: None,
    "epoch": lambda o, total: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "step": lambda o, total: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"},
    "frequency": lambda o, total: {
        "scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.7),
        "interval": "step",
        "frequency": 3,
    },
    "momentum too": lambda o, total: {
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=total),
        "interval": "step",
    },
}


class Lit(pl.LightningModule):
    def __init__(self, optimizer="Adam", scheduler="none", groups=False, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.unused_scale = nn.Parameter(torch.ones(1))
        self.seen: list = []

    def forward(self, x):
        return self.head(self.body(x)) * self.unused_scale

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"largest": x.max(), "weighted": x.mean()}, reduce_fx="max", on_step=False, on_epoch=True)
        return {"loss": loss, "extra": 1}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean(), prog_bar=True)
        self.log("hits", (logits.argmax(1) == y).float().sum(), reduce_fx="sum")

    def test_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        made = getattr(torch.optim, self.hparams.optimizer)
        extra = {"momentum": 0.9} if self.hparams.optimizer == "SGD" else {}
        if self.hparams.groups:
            groups = [
                {"params": self.body.parameters(), "lr": 0.03},
                {"params": self.head.parameters(), "weight_decay": 0.1},
            ]
        else:
            groups = list(self.parameters())
        optimizer = made(groups, lr=self.hparams.lr, **extra)
        total = self.trainer.estimated_stepping_batches if self.hparams.scheduler == "momentum too" else None
        scheduler = SCHEDULERS[self.hparams.scheduler](optimizer, total)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def data(seed):
    x = torch.randn(37, 6)  # 37 samples: the last batch is short
    table = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())
    return torch.utils.data.DataLoader(table, 8), torch.utils.data.DataLoader(table, 10)


def by_lightning(module, data, root):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    noted = Losses()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[noted],
    )
    trainer.fit(module, *data)
    return trainer, noted.losses


def by_us(lit, data, **options):
    losses = []
    run = ps.run(lit.step, lit.state, data[0], until=ps.epochs(EPOCHS), callbacks=[lit.evaluate(data[1])], **options)
    for event in run:
        if isinstance(event, ps.loop.StepsDone):
            losses += [float(step["loss"].compute()) for step in event.metrics]
    return run.result(), losses


def lit_of(module, data, **options):
    return ps.from_lightning(module, epochs=EPOCHS, steps_per_epoch=len(data[0]), **options)


ROWS = {  # optimizer, scheduler, whether in param groups
    "Adam": ("Adam", "none", False),
    **{f"SGD, {scheduler}": ("SGD", scheduler, False) for scheduler in SCHEDULERS},
    "AdamW, momentum too": ("AdamW", "momentum too", False),
    "SGD, groups": ("SGD", "epoch", True),
    "RMSprop, groups": ("RMSprop", "frequency", True),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_run_of_lightning_is_ours(row, data, tmp_path):
    optimizer, scheduler, groups = ROWS[row]
    module = Lit(optimizer, scheduler, groups)
    lit = lit_of(module, data)
    trainer, theirs = by_lightning(module, data, tmp_path)
    result, ours = by_us(lit, data)
    assert len(ours) == len(theirs) == EPOCHS * 5
    # What is read is total / weight of the mean, in float32; the loss inside of the step has Lightning's bits.
    assert ours == pytest.approx(theirs, rel=3e-7)
    state = {**result.state.params, **result.state.buffers}
    for name, tensor in module.state_dict().items():
        if optimizer == "Adam":
            assert torch.equal(state[name], tensor), name
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-7), name
    for name in ("val_loss", "val_acc", "hits"):
        assert result.metrics[f"val/{name}"] == pytest.approx(float(trainer.callback_metrics[name]), rel=1e-6)
    assert result.metrics["train/train_loss_epoch"] == pytest.approx(
        float(trainer.callback_metrics["train_loss_epoch"]), rel=1e-6
    )
    assert result.metrics["train/largest_epoch"] == pytest.approx(float(trainer.callback_metrics["largest"]))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = ps.load_weights(lit.state, checkpoint)
    assert all(torch.equal(loaded.params[name], p) for name, p in module.named_parameters())


def test_a_lifted_optimizer_sees_the_very_numbers_of_the_scheduler(data):
    rates = lit_of(Lit("SGD", "step"), data).tx
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i in range(EPOCHS * 5):
        assert rates.hyperparams(None, torch.tensor(i))["learning_rate"].item() == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_the_test_step_and_its_returned_loss(data):
    lit = lit_of(Lit(), data)
    row = lit.evaluate(data[1], part="test").evaluate(lit.state, lambda: False)
    x, y = data[1].dataset.tensors
    net = ps.to_module(lit.state)
    assert row == {"test/loss": pytest.approx(float(nn.functional.cross_entropy(net(x), y)), rel=1e-6)}


def test_it_resumes_and_is_pure(data, tmp_path):
    lit = lit_of(Lit("SGD", "step"), data)
    make = lambda: {"step": lit.step, "state": lit.state, "train": data[0], "callbacks": [lit.evaluate(data[1])]}  # noqa: E731
    ps.testing.check_resume(make, batches=7, at=[3])
    ps.testing.check_pure(lit.step, lit.state, next(iter(data[0])))


def test_a_transformation_of_ours_can_be_jitted(data):
    lit = lit_of(Lit(), data, tx=ps.optim.adamw(1e-2))
    batch = next(iter(data[0]))
    eager, _ = lit.step(lit.state, batch)
    compiled, metrics = ps.jit(lit.step, backend="eager")(lit.state, batch)
    ps.testing.assert_trees_close(compiled.params, eager.params, rtol=1e-5, atol=1e-6)
    assert {"loss", "train_loss", "largest", "weighted"} <= set(metrics)


class Measured(Lit):
    """Metrics as Lightning's guides write them: called and logged as objects, in a collection, in a list."""

    def __init__(self):
        super().__init__()
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.val_auroc = torchmetrics.AUROC(task="multiclass", num_classes=3)
        several = {"f1": torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")}
        self.val_several = torchmetrics.MetricCollection(several, prefix="val_")
        self.listed = nn.ModuleList([torchmetrics.MeanMetric()])

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.train_acc(logits, batch[1])
        self.log("acc", self.train_acc, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.val_auroc.update(logits.softmax(1), batch[1])
        self.val_several(logits, batch[1])
        self.log("auroc", self.val_auroc)
        self.log_dict(self.val_several)
        self.listed[0](batch[0].mean(1))
        self.log("listed", self.listed[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_torchmetrics_objects_are_exact_values(compiled, data, tmp_path):
    module = Measured()
    lit = lit_of(module, data)
    trainer, _ = by_lightning(module, data, tmp_path)
    result, _ = by_us(lit, data)
    for name in ("auroc", "val_f1", "listed"):
        assert result.metrics[f"val/{name}"] == pytest.approx(float(trainer.callback_metrics[name]), rel=1e-5), name
    assert result.metrics["train/acc_epoch"] == pytest.approx(float(trainer.callback_metrics["acc"]), rel=1e-6)
    assert isinstance(lit.state.model.module.train_acc, torchmetrics.Metric)
    if compiled:
        ours = lit_of(module, data, tx=ps.optim.sgd(0.1))
        batch = next(iter(data[0]))
        metrics = ps.jit(ours.step, backend="eager")(ours.state, batch)[1]
        assert float(metrics["acc"].compute()) == float(ours.step(ours.state, batch)[1]["acc"].compute())


def test_a_metric_that_was_not_called_cannot_be_logged(data):
    class Wrong(Measured):
        def training_step(self, batch, batch_idx):
            self.log("acc", self.train_acc)
            return self(batch[0]).mean()

    class Reads(Measured):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).mean() * self.train_acc.num_classes

    for variant, error, text in ((Wrong, MetricError, "was not called"), (Reads, StepError, "train_acc.num_classes")):
        lit = lit_of(variant(), data)
        with pytest.raises(error, match=text):
            lit.step(lit.state, next(iter(data[0])))


def test_settings_are_the_hyperparameters(data):
    assert lit_of(Lit(lr=0.5), data).settings == {"optimizer": "Adam", "scheduler": "none", "groups": False, "lr": 0.5}


def test_it_prints_as_its_parts(data):
    lines = repr(lit_of(Lit(lr=0.5), data)).splitlines()
    assert lines[0].split() == ["LightningModule", "Lit"]
    assert [line.split("  ")[0] for line in lines[-6:]] == [
        "lit.evaluate(data)",
        "lit.evaluate(data, part='test')",
        *(f"setting {name}" for name in ("optimizer", "scheduler", "groups", "lr")),
    ]


def test_the_module_is_left_as_it_was(data):
    module = Lit()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    by_us(lit_of(module, data), data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert "log" not in vars(module)
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


def test_parameters_that_the_optimizer_was_not_given_stay(data):
    class Head(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    lit = lit_of(Head(), data)
    after, _ = lit.step(lit.state, next(iter(data[0])))
    moved = {name for name in after.params if not torch.equal(after.params[name], lit.state.params[name])}
    assert moved == {"head.weight", "head.bias"}


# --- what is refused, by name -----------------------------------------------------------------------------------------


def variant(**methods):
    return type("Variant", (Lit,), methods)()


def test_hooks_that_would_be_lost_are_listed(data):
    module = variant(on_train_epoch_end=lambda self: None, optimizer_step=lambda self, *a, **k: None)
    with pytest.raises(ConfigError) as caught:
        lit_of(module, data)
    text = str(caught.value)
    assert "Variant: on_train_epoch_end, optimizer_step" in text
    assert "optimizer_step: ps.optim.chain(..., lit.tx)" in text
    assert "without=('on_train_epoch_end', 'optimizer_step')" in text
    assert lit_of(module, data, without=("on_train_epoch_end", "optimizer_step")).tx == lit_of(Lit(), data).tx
    with pytest.raises(ConfigError, match="'on_fit_end' is no hook"):
        lit_of(module, data, without=("on_fit_end",))


def test_batches_are_transferred_as_the_module_says(data):
    class Doubled(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    torch.manual_seed(0)
    doubled = lit_of(Doubled(), data)
    plain = lit_of(Lit(), data)
    x, y = next(iter(data[0]))
    state = plain.state.replace(params=doubled.state.params)
    ours, theirs = doubled.step(doubled.state, (x, y))[1], plain.step(state, (x * 2, y))[1]
    assert float(ours["loss"].compute()) == float(theirs["loss"].compute())


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (lambda self, batch, i: self(batch[0]).mean() * (i % 2), StepError, "the step uses batch_idx"),
        (
            lambda self, batch, i: self(batch[0]).mean() * self.current_epoch,
            StepError,
            "reads self.trainer.current_epoch",
        ),
        (lambda self, batch, i: self(batch[0]).mean() * self.global_step, StepError, "reads self.trainer"),
        (lambda self, batch, i: self.logger.log_metrics({}), StepError, "reads self.trainer"),
        (lambda self, batch, i: self.optimizers(), StepError, "reads self.trainer"),
        (lambda self, batch, i: None, StepError, "training_step returns a loss"),
        (lambda self, batch, i: self.log("x", self.head), MetricError, "was given a Linear, which remembers"),
        (lambda self, batch, i: self.log("x", batch[0]), MetricError, "takes one number"),
        (
            lambda self, batch, i: self.log("x", 1.0, reduce_fx="median"),
            MetricError,
            "is 'mean', 'sum', 'min' or 'max'",
        ),
    ],
)
def test_what_a_pure_step_cannot_know_is_an_error(body, error, text, data):
    lit = lit_of(variant(training_step=body), data)
    with pytest.raises(error, match=text):
        lit.step(lit.state, next(iter(data[0])))
    assert "log" not in vars(lit.state.model.module)


def optimizers(make):
    return variant(configure_optimizers=lambda self: make(torch.optim.SGD(self.parameters(), lr=0.1), self))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda o, self: None, "configure_optimizers returns none"),
        (lambda o, self: [o, o], "configure_optimizers returns 2 optimizers"),
        (lambda o, self: ([o], [torch.optim.lr_scheduler.ReduceLROnPlateau(o)]), "a scheduler that reads a metric"),
        (lambda o, self: [self.trainer.datamodule], "configure_optimizers reads self.trainer.datamodule"),
    ],
)
def test_what_is_no_transformation_is_an_error(make, text, data):
    with pytest.raises(ConfigError, match=text):
        lit_of(optimizers(make), data)


def test_the_length_is_asked_for_where_it_is_needed(data):
    for module in (Lit(scheduler="epoch"), Lit(scheduler="momentum too")):
        with pytest.raises(ConfigError, match="configure_optimizers needs to know"):
            ps.from_lightning(module)
    assert ps.from_lightning(Lit()).tx == lit_of(Lit(), data).tx


def test_manual_optimization_and_other_modules(data):
    module = Lit()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="the module optimizes by hand"):
        lit_of(module, data)
    with pytest.raises(ConfigError, match="from_lightning takes a LightningModule"):
        ps.from_lightning(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="the module has no test_step"):
        lit_of(type("Bare", (Lit,), {"test_step": pl.LightningModule.test_step})(), data).evaluate(data[1], part="test")
