"""Metrics of classification, with the meaning scikit-learn gives them, and `perplexity`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.errors import MetricError, explain
from purestep.metrics.metric import Computed, Mean, Number, mean, written
from purestep.tree import pytree, static
from purestep.views import Block, Note, Printed, Table

_NO_LABEL = -(2**62)
Average = Literal["micro", "macro", "weighted", "binary"]

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


@pytree
class ClassScore(Computed):
    """Precision, recall or F1, from counts by class. Made by `precision`, `recall` and `f1`.

    Attributes:
        hits, predicted, labelled: int64[classes], how often a class was predicted rightly, predicted, and the label.
        score: which of the three.
        average: over classes.
    """

    hits: Tensor
    predicted: Tensor
    labelled: Tensor
    score: str = static()
    average: str = static()

    def merge(self, other: ClassScore) -> ClassScore:
        counts = (self.hits + other.hits, self.predicted + other.predicted, self.labelled + other.labelled)
        return ClassScore(*counts, self.score, self.average)

    def __repr__(self) -> str:
        return f"{self.score}({written(self.compute())}, average={self.average!r})"

    def compute(self) -> Tensor:
        return self._averaged(*(counts.to(torch.float64) for counts in (self.hits, self.predicted, self.labelled)))

    def by_class(self) -> Tensor:
        """Return the score of each class, float64[classes]; 0 where it is 0 / 0."""
        hits, predicted, labelled = (x.to(torch.float64) for x in (self.hits, self.predicted, self.labelled))
        return self._score(hits, predicted, labelled)

    def _averaged(self, hits: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        if self.average == "micro":
            return self._score(hits.sum(), predicted.sum(), labelled.sum())
        scores = self._score(hits, predicted, labelled)
        if self.average == "binary":
            return scores[1]
        # As in scikit-learn, a class that is neither label nor prediction is left out.
        weights = labelled if self.average == "weighted" else ((predicted + labelled) > 0).to(torch.float64)
        return (scores * weights).sum() / weights.sum()

    def _score(self, hits: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        if self.score == "f1":
            return 2 * hits / (predicted + labelled).clamp(min=1)
        return hits / (predicted if self.score == "precision" else labelled).clamp(min=1)


@pytree
class Perplexity(Computed):
    """The exponential of a mean loss. Made by `perplexity`.

    Attributes:
        total: sum of the losses of the tokens.
        weight: number of tokens.
    """

    total: Number
    weight: Number

    def merge(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Tensor:
        return torch.exp(torch.as_tensor(self.total, dtype=torch.float64) / self.weight)


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
    return Confusion(_counts(logits, labels, ignore_index, "confusion"))


def _counts(logits: Tensor, labels: Tensor, ignore_index: int | None, name: str) -> Tensor:
    """Return int64[classes, classes]: how often a class was the label (row) and the prediction (column)."""
    _check(logits, labels, ignore_index, name)
    classes = logits.shape[-1]
    labels, predictions = labels.reshape(-1).to(torch.int64), logits.argmax(-1).reshape(-1)
    counted = torch.ones_like(labels) if ignore_index is None else (labels != ignore_index).to(torch.int64)
    # One histogram of label * classes + prediction, without a data-dependent shape: samples left out add zero.
    pairs = torch.where(counted == 1, labels, 0) * classes + predictions
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
    return counts.scatter_add(0, pairs, counted).reshape(classes, classes)


@checked(MetricError, failed=True)
def precision(
    logits: Tensor, labels: Tensor, *, average: Average = "macro", ignore_index: int | None = None
) -> ClassScore:
    """Precision: of what is predicted as a class, the fraction that is of it. Exact over batches, no mean of batches.

    Args:
        logits: floating point [..., classes]; the largest is the prediction.
        labels: integer [...], class indices.
        average: "macro", the mean over classes; "weighted" by the labels of each; "micro", over all predictions, which
            is the accuracy; "binary", class 1 of two. `result.by_class()` has all of them.
        ignore_index: samples with this label are left out.

    Raises:
        MetricError: the shapes do not match, or "binary" has other than two classes.

    Examples:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
        >>> float(precision(logits, torch.tensor([0, 1, 0]), average="binary"))
        0.5

    Reference: `sklearn.metrics.precision_score`.
    """
    return _class_score("precision", logits, labels, average, ignore_index)


@checked(MetricError, failed=True)
def recall(
    logits: Tensor, labels: Tensor, *, average: Average = "macro", ignore_index: int | None = None
) -> ClassScore:
    """Recall: of what is of a class, the fraction that is predicted as it. Arguments and errors as of `precision`.

    Examples:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
        >>> float(recall(logits, torch.tensor([0, 1, 0]), average="binary"))
        1.0

    Reference: `sklearn.metrics.recall_score`.
    """
    return _class_score("recall", logits, labels, average, ignore_index)


@checked(MetricError, failed=True)
def f1(logits: Tensor, labels: Tensor, *, average: Average = "macro", ignore_index: int | None = None) -> ClassScore:
    """F1: the harmonic mean of precision and recall. Arguments and errors as of `precision`.

    Examples:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
        >>> round(float(f1(logits, torch.tensor([0, 1, 0]), average="binary")), 4)
        0.6667

    Reference: `sklearn.metrics.f1_score`.
    """
    return _class_score("f1", logits, labels, average, ignore_index)


@checked(MetricError, failed=True)
def perplexity(logits: Tensor, labels: Tensor, *, ignore_index: int | None = None) -> Perplexity:
    """The perplexity of a language model: the exponential of the mean cross-entropy of its tokens, over all batches.

    The mean of the perplexities of batches is larger, and depends on how the samples are batched.

    Args:
        logits: floating point [..., classes].
        labels: integer [...], the tokens.
        ignore_index: tokens with this label, padding say, do not count.

    Raises:
        MetricError: the shapes do not match.

    Examples:
        >>> round(float(perplexity(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64))), 4)
        8.0
    """
    _check(logits, labels, ignore_index, "perplexity")
    # float32 at least: a sum over tokens in bf16 would have no digits left.
    wide = logits.reshape(-1, logits.shape[-1])
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    flat = labels.reshape(-1).to(torch.int64)
    # Torch leaves out -100 unless told otherwise: here no label is left out unless the caller says so.
    ignored = _NO_LABEL if ignore_index is None else ignore_index
    losses = torch.nn.functional.cross_entropy(wide, flat, reduction="none", ignore_index=ignored)
    counted = (flat != ignored).to(losses.dtype)
    found = mean(losses, counted)
    return Perplexity(found.total, found.weight)


def _class_score(score: str, logits: Tensor, labels: Tensor, average: Average, ignore_index: int | None) -> ClassScore:
    if average not in ("micro", "macro", "weighted", "binary"):
        raise MetricError(
            explain(
                f"{score}: average is 'micro', 'macro', 'weighted' or 'binary'",
                where=f"{average=}",
                instead=f"metrics.{score}(logits, labels).by_class()   # all of them" if average is None else None,
            )
        )
    counts = _counts(logits, labels, ignore_index, score)
    if average == "binary" and counts.shape[0] != 2:
        raise MetricError(
            explain(
                f"{score}: average='binary' is the score of class 1 of two",
                where=f"logits: {tree.describe(logits)}",
                instead="average='macro'",
            )
        )
    return ClassScore(counts.diagonal(), counts.sum(0), counts.sum(1), score, average)


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
