"""The list of the examples: what each shows, its quick arguments, and what its result has to be.

`run_all.py` runs them and the tests smoke-test them; a new example is a row here and a row in README.md.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass


def line(name: str) -> str:
    """Return the pattern of the line `name  value` of what an example prints."""
    return rf"^{re.escape(name)}  +(\S.*)$"


@dataclass(frozen=True)
class Example:
    """One script.

    Attributes:
        file: its path in this folder.
        shows: what it shows, for the table of README.md.
        result: name of its result in the tables.
        printed: pattern of the result in what it prints, with one group; the last match counts.
        expects: what holds of the result: "> 0.9", "< 2.5", or a text that is in it.
        quick: arguments with which `make examples` runs it; its defaults without any.
        smoke: arguments for a run of a few seconds, for the test; None where a test of its own runs it, or its parts.
        smoke_expects: what holds of the result of that run.
    """

    file: str
    shows: str
    result: str
    printed: str
    expects: str
    quick: str = ""
    smoke: str | None = None
    smoke_expects: str = ""

    def found(self, out: str) -> str | None:
        """Return the result in what the example printed; None where it is missing."""
        matches = re.findall(self.printed, out, re.MULTILINE)
        return matches[-1].strip() if matches else None


def number(text: str) -> float | None:
    """Return the number that a text begins with: 0.987 of "98.7%" and of "0.987 after 3 epochs"."""
    match = re.match(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(\s*%)?", text)
    if match is None:
        return None
    return float(match.group(1)) / (100 if match.group(2) else 1)


def holds(result: str, expects: str) -> bool:
    """Return whether a result is what is expected of it, see `Example.expects`."""
    sign, _, bound = expects.partition(" ")
    if sign not in ("<", ">"):
        return expects in result
    value = number(result)
    return value is not None and {"<": operator.lt, ">": operator.gt}[sign](value, float(bound))


def judged(example: Example, code: int, out: str, expects: str) -> tuple[str, str]:
    """Return the result of an example, and why it failed: empty if it did not."""
    result = example.found(out)
    if code:
        return "", f"exit code {code}"
    if result is None:
        return "", f"it printed no line like {example.printed}"
    return result, "" if holds(result, expects) else f"expected {expects}"


SAME_BITS = r"^(the same bits)"
EXAMPLES = (
    # --- a training from start to end ---
    Example(
        "digits.py",
        "the main example: data, model, schedule, evaluation, snapshots, resume",
        "held-out accuracy",
        line("held-out accuracy, best kept"),
        "> 0.97",
    ),
    Example(
        "own_trainer.py",
        "a trainer of your own at every level: a step by hand, a loop, events, callbacks; the same bits by each",
        "held-out accuracy",
        line("held-out accuracy of all levels"),
        "> 0.96",
        smoke="--epochs 3 --target 0.9 --width 64",
        smoke_expects="> 0.9",
    ),
    # --- images ---
    Example(
        "image_classifier.py",
        "a classifier of digits, or of a folder of images with torchvision, on one device or many",
        "held-out accuracy",
        line("val/accuracy"),
        "> 0.98",
        smoke="--epochs 2 --lr 1e-2 --batch 32",
        smoke_expects="> 0.8",
    ),
    Example(
        "dcgan.py",
        "two networks as two states of one step; a folder of images is checked before the first step",
        "Frechet distance of generated digits",
        line("val/distance"),
        "< 7",
        smoke="--epochs 5 --width 8 --lr 2e-3",
        smoke_expects="< 16",
    ),
    Example(
        "vae.py",
        "an autoencoder whose noise comes from the key of the step; a callback that writes pictures",
        "held-out bound of the log likelihood [nats]",
        line("val/elbo"),
        "> -24.5",
        smoke="--epochs 5 --hidden 64",
        smoke_expects="> -29",
    ),
    Example(
        "segmentation.py",
        "a U-Net on shapes that are drawn from keys; intersection over union as a metric of its own",
        "held-out mean IoU",
        line("val/iou"),
        "> 0.85",
        smoke="--samples 64 --size 16 --width 8 --batch 8 --epochs 3 --lr 1e-2",
        smoke_expects="> 0.25",
    ),
    Example(
        "finetune.py",
        "three runs, each from the end of another: pretrained, with a frozen body, thawed with learning rates by group",
        "held-out accuracy",
        r"^all +[\d,]+ +(\S+)",
        "> 0.88",
        smoke="--epochs 1 --few-epochs 2 --width 8",
        smoke_expects="> 0.1",
    ),
    Example(
        "lora.py",
        "low-rank adapters beside frozen layers, merged at the end; a snapshot has what trains",
        "held-out loss [nats a byte]",
        line("held-out loss, adapted"),
        "< 2.9",
        smoke="--steps 4 --pretraining 4 --rank 2",
        smoke_expects="< 6",
    ),
    # --- several trainings in one step ---
    Example(
        "kfold.py",
        "cross-validation: all folds trained in one vmapped step, each as if it were alone",
        "cross-validated accuracy",
        line("cross-validated accuracy"),
        "> 0.97",
        smoke="--folds 4 --lrs 1e-3 --epochs 3",
        smoke_expects="> 0.9",
    ),
    Example(
        "maml.py",
        "meta-learning: gradients through an inner training, tasks drawn from keys",
        "loss on new tasks after adapting, by that before",
        line("val/ratio"),
        "< 0.6",
        smoke="--batches 40 --inner-steps 2",
        smoke_expects="< 0.97",
    ),
    # --- language models, plans and precision ---
    Example(
        "gpt.py",
        "a small GPT on one process or on many, under every plan",
        "held-out loss [nats a byte]",
        line("held-out loss, last"),
        "< 2.6",
    ),
    Example(
        "float8_transformer.py",
        "linear layers in float8, under a plan, compiled; the loss beside that of bfloat16",
        "held-out loss [nats a byte]",
        line("held-out loss in float8"),
        "< 3",
    ),
    Example(
        "tensor_parallel_gpt.py",
        "2 processes split the matrices of a GPT, with the digest of 1 process, which reads their snapshot",
        "digests",
        SAME_BITS,
        "the same bits",
        smoke="--steps 2 --megabytes 0.05",
        smoke_expects="the same bits",
    ),
    Example(
        "zero_stages.py",
        "the stages of ZeRO as plans: memory and traffic of a process of a cluster, and the same bits in 2 processes",
        "digests",
        SAME_BITS,
        "the same bits",
        smoke="--steps 2 --width 256 --layers 1",
        smoke_expects="the same bits",
    ),
    # --- learning from rewards ---
    Example(
        "ppo.py",
        "PPO on CartPole: the environments are a data source, the step is pure and learns from a whole rollout",
        "mean return, last epoch",
        line("mean return, last epoch"),
        "> 400",
        smoke="--epochs 1 --steps 32 --passes 2",
        smoke_expects="> 10",
    ),
    Example(
        "dqn.py",
        "DQN on CartPole: network, target network and replay memory are one state, so a resume is exact",
        "mean return, last epoch",
        line("mean return, last epoch"),
        "> 250",
        smoke="--epochs 1 --updates 2 --memory 1000",
        smoke_expects="> 10",
    ),
    # --- the same settings under another tool ---
    Example(
        "hydra/train.py",
        "settings composed by Hydra; the experiment is in `hydra/experiment.py`",
        "held-out loss",
        r"val/loss ([\d.]+)",
        "< 0.3",
    ),
    # --- what is promised, put to the test ---
    Example(
        "demo_resume.py",
        "a run that is killed four times ends with the bits of one that is not",
        "digests",
        SAME_BITS,
        "the same bits",
    ),
    Example(
        "demo_topology.py",
        "1, 2 and 4 processes, replicated, sharded and tensor parallel, compute the same bits",
        "digests",
        SAME_BITS,
        "the same bits",
    ),
    Example(
        "demo_faults.py",
        "a small training is broken in more than twenty ways, and ends with the same bits",
        "runs that ended right",
        r"^all +\d+ +(\d+ of \d+)",
        " of ",
        quick="--times 2",
    ),
)
