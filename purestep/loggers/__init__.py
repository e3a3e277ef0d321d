"""Loggers: where the rows of a run go. `csv()` and the others are values; the loop opens and feeds their sinks."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.loggers.base import Logger as Logger
    from purestep.loggers.base import Sink as Sink
    from purestep.loggers.base import SkippedMediaWarning as SkippedMediaWarning
    from purestep.loggers.csv import csv as csv
    from purestep.loggers.csv import read_csv as read_csv
    from purestep.loggers.media import Histogram as Histogram
    from purestep.loggers.media import Image as Image
    from purestep.loggers.media import Text as Text
    from purestep.loggers.media_files import read_media as read_media
    from purestep.loggers.mlflow import mlflow as mlflow
    from purestep.loggers.tensorboard import tensorboard as tensorboard
    from purestep.loggers.wandb import wandb as wandb

__getattr__, __dir__ = attach(__name__)
