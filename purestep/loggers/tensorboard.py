"""TensorBoard event files in the run directory, written by torch's `SummaryWriter`.

Owns the mapping of rows to scalars and of a resume to TensorBoard's purge. An extra: nothing is imported before a sink
opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purestep.arguments import Name, checked
from purestep.errors import ConfigError, explain, import_extra
from purestep.loggers.base import Logger, Sink
from purestep.loggers.media import Histogram, Image, Text


@dataclass(frozen=True)
class TensorBoard(Logger):
    """Rows go to event files under `run_dir/name`. Made by `tensorboard`."""

    name: str = "tensorboard"
    flush_seconds: float = 30.0

    def open(self, run_dir: Path, *, resume_step: int | None = None) -> Sink:
        import_extra("tensorboard", extra="tensorboard", needed_by="loggers.tensorboard")
        module = import_extra("torch.utils.tensorboard", extra="tensorboard", needed_by="loggers.tensorboard")
        # Readers drop the events of earlier files from the purge step on: those after the resumed step, or all of them.
        purge = 0 if resume_step is None else resume_step + 1
        folder = run_dir / self.name
        folder.mkdir(parents=True, exist_ok=True)
        writer = module.SummaryWriter(str(folder), purge_step=purge, flush_secs=self.flush_seconds)
        return TensorBoardSink(writer, first_step=resume_step or 0)


@checked(ConfigError)
def tensorboard(*, name: Name = "tensorboard", flush_seconds: float = 30.0) -> TensorBoard:
    """Log scalars for TensorBoard: `tensorboard --logdir runs`.

    The x-axis is `state.step`. Event files hold float32, so numbers are rounded; `metrics.csv` has them exactly.
    Hyperparameters appear in the HPARAMS tab; images, histograms and texts in tabs of their own.

    Args:
        name: of the directory of event files inside the run directory.
        flush_seconds: seconds after which an event is written to the disk, above 0.

    Returns:
        A logger: a frozen value. `open(run_dir)` returns its sink.

    Raises:
        ConfigError: `flush_seconds` is not positive.
        MissingExtra: when it is opened and `tensorboard` is not installed (`pip install "purestep[tensorboard]"`).

    Examples:
        >>> tensorboard(flush_seconds=5.0)
        TensorBoard(name='tensorboard', flush_seconds=5.0)
    """
    if not flush_seconds > 0:
        what = f"flush_seconds={flush_seconds!r} is not a positive number of seconds"
        raise ConfigError(explain(what, instead="tensorboard(flush_seconds=30.0)"))
    return TensorBoard(name, flush_seconds)


class TensorBoardSink(Sink):
    """An open `SummaryWriter`."""

    takes = (Image, Histogram, Text)

    def __init__(self, writer: Any, *, first_step: int) -> None:
        super().__init__(first_step=first_step)
        self._writer = writer

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def _write_media(self, step: int, name: str, value: Image | Histogram | Text) -> None:
        if isinstance(value, Text):
            self._writer.add_text(name, value.text, step)
        elif isinstance(value, Histogram):
            self._writer.add_histogram_raw(
                name,
                min=value.edges[0],
                max=value.edges[-1],
                num=value.counts.sum(),
                sum=value.total,
                sum_squares=value.squares,
                bucket_limits=value.edges[1:].tolist(),
                bucket_counts=value.counts.tolist(),
                global_step=step,
            )
        else:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # SummaryWriter.add_image needs Pillow to make the PNG that we have.
            height, width, channels = value.pixels.shape
            picture = Summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=value.content()
            )
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)

    def _write_hparams(self, values: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would write them into a second run: write the records of the plugin into this one.
        for record in hparams({k: str(v) if v is None else v for k, v in values.items()}, {}):
            self._writer.file_writer.add_summary(record)

    def flush(self) -> None:
        self._writer.flush()

    def _close(self) -> None:
        self._writer.close()
