"""Metrics of classification: `accuracy` and `confusion`, with the meaning scikit-learn gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.errors import MetricError, explain
from purestep.metrics.metric import Mean, mean
from purestep.tree import pytree
from purestep.views import Block, Note, Printed, Table

_SHOWN = 40  # classes of a table of counts


@pytree
class Confusion(Printed):
    """Counts of (label, prediction) pairs, from which accuracy and macro-averaged precision, recall and F1 follow.

    Attributes:
        counts: int64[classes, classes], rows are labels, columns predictions.

    Examples:
        >>> c = confusion(torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> c.counts.tolist(), round(c.compute()["accuracy"], 3)
        ([[1, 0], [1, 1]], 0.667)
        >>> c
        label  0  1
            0  1  0
            1  1  1
        accuracy 0.6667, precision 0.75, recall 0.75, f1 0.6667
    """

    counts: Tensor

    def merge(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def view(self) -> list[Block]:
        """Return the blocks that show it: the counts, a row for each label, and what follows from them."""
        if self.counts.is_meta or len(self.counts) > _SHOWN:
            return [Note(f"Confusion({tree.describe(self.counts)})")]
        rows = [[label, *row] for label, row in enumerate(self.counts.tolist())]
        follows = ", ".join(f"{name} {value:.4g}" for name, value in self.compute().items())
        return [Table(["label", *map(str, range(len(rows)))], rows), Note(follows)]

    def compute(self) -> dict[str, float]:
        counts = self.counts.to(torch.float64)
        hits, labels, predictions = counts.diagonal(), counts.sum(1), counts.sum(0)
        seen = labels + predictions > 0  # as in scikit-learn: a class that is neither label nor prediction is left out
        recall, precision = hits / labels.clamp(min=1), hits / predictions.clamp(min=1)
        f1 = 2 * hits / (labels + predictions).clamp(min=1)
        return {
            "accuracy": float(hits.sum() / counts.sum()),
            "precision": float(precision[seen].mean()),
            "recall": float(recall[seen].mean()),
            "f1": float(f1[seen].mean()),
        }


@checked(MetricError, failed=True)
def accuracy(logits: Tensor, labels: Tensor, *, ignore_index: int | None = None, top_k: int = 1) -> Mean:
    """Fraction of correct predictions: the largest logit (or one of the `top_k` largest) is that of the label.

    Args:
        logits: floating point [..., classes].
        labels: integer [...], class indices.
        ignore_index: samples with this label have weight 0.
        top_k: a prediction is correct if the label is among so many largest logits.

    Returns:
        `Mean` over the samples, as 0-d tensors on the device of the logits.

    Raises:
        MetricError: the shapes do not match, or there are fewer than `top_k` classes.

    Examples:
        >>> float(accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])))
        0.5
    """
    _check(logits, labels, ignore_index, "accuracy")
    if not 1 <= top_k <= logits.shape[-1]:
        where = f"top_k={top_k}, logits: {tree.describe(logits)}"
        raise MetricError(explain("top_k lies between 1 and the number of classes", where=where))
    if top_k == 1:
        hits = logits.argmax(-1) == labels
    else:
        hits = (logits.topk(top_k, dim=-1).indices == labels.unsqueeze(-1)).any(-1)
    return mean(hits, None if ignore_index is None else labels != ignore_index)


@checked(MetricError, failed=True)
def confusion(logits: Tensor, labels: Tensor, *, ignore_index: int | None = None) -> Confusion:
    """Count (label, prediction) pairs.

    Args:
        logits: floating point [..., classes].
        labels: integer [...], class indices.
        ignore_index: samples with this label are left out.

    Returns:
        `Confusion`, with counts int64[classes, classes].

    Raises:
        MetricError: the shapes do not match.

    Examples:
        >>> confusion(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, -1]), ignore_index=-1).counts.tolist()
        [[1, 0], [0, 0]]
    """
    _check(logits, labels, ignore_index, "confusion")
    classes = logits.shape[-1]
    labels, predictions = labels.reshape(-1).to(torch.int64), logits.argmax(-1).reshape(-1)
    counted = torch.ones_like(labels) if ignore_index is None else (labels != ignore_index).to(torch.int64)
    # One histogram of label * classes + prediction, without a data-dependent shape: samples left out add zero.
    pairs = torch.where(counted == 1, labels, 0) * classes + predictions
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
    return Confusion(counts.scatter_add(0, pairs, counted).reshape(classes, classes))


def _check(logits: Tensor, labels: Tensor, ignore_index: object, name: str) -> None:
    if logits.shape[:-1] != labels.shape:
        raise MetricError(
            explain(
                f"{name} needs one label for each row of logits",
                where=f"logits: {tree.describe(logits)}, labels: {tree.describe(labels)}",
                instead="logits of shape (..., classes) and labels of shape (...); "
                "for (N, classes, ...) logits move the classes last: logits.movedim(1, -1)",
            )
        )
    if ignore_index is not None and not isinstance(ignore_index, int):
        raise MetricError(explain(f"{name}: ignore_index is a label, an integer", where=f"{ignore_index=}"))
