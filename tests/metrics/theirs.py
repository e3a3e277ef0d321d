"""The metrics of torchmetrics that are converted in tests, with the columns of the table that each is updated with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchmetrics as tm
    from torchmetrics import classification, clustering, image, retrieval, text, wrappers

CLASSES = 4


def table(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Columns of n samples; every metric of `METRICS` takes some of them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    return {
        "logits": torch.randn(n, CLASSES, generator=g),
        "label": torch.randint(0, CLASSES, (n,), generator=g),
        "prob": torch.rand(n, generator=g),
        "flag": torch.randint(0, 2, (n,), generator=g),
        "probs": torch.rand(n, 3, generator=g),
        "flags": torch.randint(0, 2, (n, 3), generator=g),
        "x": x,
        "y": x + 0.5 * torch.randn(n, generator=g),
        "xs": torch.randn(n, 2, generator=g),
        "ys": torch.randn(n, 2, generator=g),
        "positive": torch.rand(n, generator=g) + 0.5,
        "target": torch.rand(n, generator=g) + 0.5,
        "p": torch.softmax(torch.randn(n, CLASSES, generator=g), -1),
        "q": torch.softmax(torch.randn(n, CLASSES, generator=g), -1),
        "tokens": torch.randn(n, 5, 7, generator=g),
        "words": torch.randint(0, 7, (n, 5), generator=g),
        "image": torch.rand(n, 3, 12, 12, generator=g),
        "other": torch.rand(n, 3, 12, 12, generator=g),
        "query": torch.randint(0, 5, (n,), generator=g),
    }


Row = tuple[Callable[[], Any], str]
ALL: dict[str, Row] = {
    "accuracy": (lambda: tm.Accuracy("multiclass", num_classes=CLASSES), "logits label"),
    "accuracy macro": (lambda: tm.Accuracy("multiclass", num_classes=CLASSES, average="macro"), "logits label"),
    "top 2": (lambda: tm.Accuracy("multiclass", num_classes=CLASSES, top_k=2, average="micro"), "logits label"),
    "accuracy per class": (lambda: tm.Accuracy("multiclass", num_classes=CLASSES, average=None), "logits label"),
    "precision": (lambda: tm.Precision("multiclass", num_classes=CLASSES, average="macro"), "logits label"),
    "recall": (lambda: tm.Recall("multiclass", num_classes=CLASSES, average="weighted"), "logits label"),
    "f1": (lambda: tm.F1Score("multiclass", num_classes=CLASSES, average="macro"), "logits label"),
    "specificity": (lambda: tm.Specificity("multiclass", num_classes=CLASSES, average="macro"), "logits label"),
    "jaccard": (lambda: tm.JaccardIndex("multiclass", num_classes=CLASSES), "logits label"),
    "kappa": (lambda: tm.CohenKappa("multiclass", num_classes=CLASSES), "logits label"),
    "matthews": (lambda: tm.MatthewsCorrCoef("multiclass", num_classes=CLASSES), "logits label"),
    "confusion": (lambda: tm.ConfusionMatrix("multiclass", num_classes=CLASSES), "logits label"),
    "hamming": (lambda: tm.HammingDistance("multiclass", num_classes=CLASSES), "logits label"),
    "hinge": (lambda: tm.HingeLoss("multiclass", num_classes=CLASSES), "logits label"),
    "stat scores": (lambda: tm.StatScores("multiclass", num_classes=CLASSES), "logits label"),
    "auroc": (lambda: tm.AUROC("multiclass", num_classes=CLASSES), "logits label"),
    "auroc binned": (lambda: tm.AUROC("multiclass", num_classes=CLASSES, thresholds=20), "logits label"),
    "average precision": (lambda: tm.AveragePrecision("multiclass", num_classes=CLASSES), "logits label"),
    "calibration": (lambda: tm.CalibrationError("multiclass", num_classes=CLASSES), "logits label"),
    "binary accuracy": (lambda: tm.Accuracy("binary"), "prob flag"),
    "binary auroc": (lambda: tm.AUROC("binary"), "prob flag"),
    "binary f1": (lambda: tm.F1Score("binary"), "prob flag"),
    "binary roc": (lambda: tm.ROC("binary"), "prob flag"),
    "multilabel f1": (lambda: tm.F1Score("multilabel", num_labels=3), "probs flags"),
    "exact match": (lambda: tm.ExactMatch("multilabel", num_labels=3), "probs flags"),
    "ranking loss": (lambda: classification.MultilabelRankingLoss(3), "probs flags"),
    "mse": (tm.MeanSquaredError, "x y"),
    "rmse": (lambda: tm.MeanSquaredError(squared=False), "x y"),
    "mae": (tm.MeanAbsoluteError, "x y"),
    "mape": (tm.MeanAbsolutePercentageError, "positive target"),
    "r2": (tm.R2Score, "x y"),
    "pearson": (tm.PearsonCorrCoef, "x y"),
    "pearson of two": (lambda: tm.PearsonCorrCoef(num_outputs=2), "xs ys"),
    "spearman": (tm.SpearmanCorrCoef, "x y"),
    "kendall": (tm.KendallRankCorrCoef, "x y"),
    "concordance": (tm.ConcordanceCorrCoef, "x y"),
    "explained variance": (tm.ExplainedVariance, "x y"),
    "cosine": (lambda: tm.CosineSimilarity(reduction="mean"), "xs ys"),
    "kl": (tm.KLDivergence, "p q"),
    "log cosh": (tm.LogCoshError, "x y"),
    "minkowski": (lambda: tm.MinkowskiDistance(3), "x y"),
    "tweedie": (lambda: tm.TweedieDevianceScore(1.5), "positive target"),
    "rse": (tm.RelativeSquaredError, "x y"),
    "mean": (tm.MeanMetric, "x"),
    "sum": (tm.SumMetric, "x"),
    "max": (tm.MaxMetric, "x"),
    "min": (tm.MinMetric, "x"),
    "perplexity": (text.Perplexity, "tokens words"),
    "psnr": (lambda: image.PeakSignalNoiseRatio(data_range=1.0), "image other"),
    "ssim": (lambda: image.StructuralSimilarityIndexMeasure(data_range=1.0, kernel_size=3, sigma=0.5), "image other"),
    "total variation": (lambda: image.TotalVariation(reduction="mean"), "image"),
    "retrieval map": (retrieval.RetrievalMAP, "prob flag query"),
    "retrieval ndcg": (retrieval.RetrievalNormalizedDCG, "prob flag query"),
    "cramer": (lambda: tm.CramersV(num_classes=5, bias_correction=False), "query label"),
    "mutual information": (clustering.MutualInfoScore, "query label"),
    "classwise": (
        lambda: wrappers.ClasswiseWrapper(tm.Accuracy("multiclass", num_classes=CLASSES, average=None)),
        "logits label",
    ),
    "multioutput": (lambda: wrappers.MultioutputWrapper(tm.MeanSquaredError(), 2), "xs ys"),
    "sum of two": (lambda: tm.MeanSquaredError() + tm.MeanAbsoluteError(), "x y"),
    "collection": (
        lambda: tm.MetricCollection(
            {
                "f1": tm.F1Score("multiclass", num_classes=CLASSES, average="macro"),
                "recall": tm.Recall("multiclass", num_classes=CLASSES, average="macro"),
                "auroc": tm.AUROC("multiclass", num_classes=CLASSES),
            },
            prefix="all_",
        ),
        "logits label",
    ),
}
# Their value is no row of numbers: what of it goes to the log.
PICK: dict[str, Callable[[Any], Any]] = {
    "confusion": lambda m: {"trace": m.diagonal().sum(), "corner": m[0, 1]},
    "binary roc": lambda curve: {"sum": curve[0].sum() + 2 * curve[1].sum(), "points": curve[2].numel()},
}


def arguments(columns: dict[str, torch.Tensor], names: str) -> list[torch.Tensor]:
    return [columns[name] for name in names.split()]


def whole(name: str, columns: dict[str, torch.Tensor]) -> Any:
    """What torchmetrics itself computes for all samples at once, as a row."""
    make, names = ALL[name]
    metric = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.update(*arguments(columns, names))
        value = metric.compute()
    return flat(PICK[name](value) if name in PICK else value)


def flat(value: Any) -> dict[str, float]:
    """A value by our rules: a number, vectors by number, dicts by key."""
    if isinstance(value, dict):
        return {f"{k}/{j}" if j else str(k): x for k, v in value.items() for j, x in flat(v).items()}
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return {str(i): float(x) for i, x in enumerate(value)}
    return {"": float(value)}
