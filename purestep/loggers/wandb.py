"""Weights & Biases: one tracked run a run directory, continued on resume.

Owns the mapping of rows to `run.log` and the id that ties a run directory to its tracked run. An extra: nothing is
imported before a sink opens.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purestep.arguments import Name, checked
from purestep.errors import ConfigError, import_extra
from purestep.loggers.base import STEP, Logger, Sink, remembered_id, write_atomically
from purestep.loggers.media import Histogram, Image, Text

ID_FILE = "wandb.json"


@dataclass(frozen=True)
class Wandb(Logger):
    """Rows go to one run of Weights & Biases. Made by `wandb`."""

    project: str | None = None
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: str | None = None

    def open(self, run_dir: Path, *, resume_step: int | None = None) -> Sink:
        module = import_extra("wandb", extra="wandb", needed_by="loggers.wandb")
        run_dir.mkdir(parents=True, exist_ok=True)
        run_id = remembered_id(run_dir / ID_FILE, resume=resume_step is not None)
        run = module.init(
            project=self.project,
            name=self.name,
            entity=self.entity,
            group=self.group,
            tags=list(self.tags) or None,
            mode=self.mode,
            dir=str(run_dir),
            id=run_id,
            resume="allow" if run_id else None,
        )
        write_atomically(run_dir / ID_FILE, json.dumps({"id": run.id}) + "\n")
        # wandb's own step counts calls of log and cannot go back: state.step is a metric, and the x-axis of the others.
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return WandbSink(run, module, first_step=resume_step or 0)


@checked(ConfigError)
def wandb(
    *,
    project: str | None = None,
    name: Name | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: tuple[str, ...] | list[str] = (),
    mode: str | None = None,
) -> Wandb:
    """Log to Weights & Biases, with `state.step` as the x-axis.

    A resumed run continues the tracked run of its run directory. Steps that are repeated after a crash are logged again
    at the same x. Images need Pillow.

    Args:
        project, name, entity, group, tags: as in `wandb.init`.
        mode: "online", "offline" or "disabled"; by default that of the environment (`WANDB_MODE`).

    Returns:
        A logger: a frozen value. `open(run_dir)` returns its sink.

    Raises:
        MissingExtra: when it is opened and `wandb` is not installed (`pip install "purestep[wandb]"`).

    Examples:
        >>> wandb(project="digits", mode="offline").mode
        'offline'
    """
    return Wandb(project, name, entity, group, tuple(tags), mode)


class WandbSink(Sink):
    """A started run of Weights & Biases."""

    takes = (Image, Histogram, Text)

    def __init__(self, run: Any, module: Any, *, first_step: int) -> None:
        super().__init__(first_step=first_step)
        self._run, self._module = run, module

    def _write(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row | {STEP: step})

    def _write_media(self, step: int, name: str, value: Image | Histogram | Text) -> None:
        if isinstance(value, Text):
            shown = self._module.Html(f"<pre>{html.escape(value.text)}</pre>")
        elif isinstance(value, Histogram):
            shown = self._module.Histogram(np_histogram=(value.counts, value.edges))
        else:
            pixels = value.pixels
            shown = self._module.Image(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        self._run.log({name: shown, STEP: step})

    def _write_hparams(self, values: dict[str, Any]) -> None:
        self._run.config.update(values, allow_val_change=True)

    def _close(self) -> None:
        self._run.finish()
