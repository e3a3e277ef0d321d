"""What a progress bar and a live cell show of a run at one moment, as text and numbers."""

from __future__ import annotations

from collections.abc import Mapping


class Frame:
    """The content of the bar at one moment, as text and numbers."""

    def __init__(
        self,
        *,
        epoch: int,
        epochs: int | None,
        batch: int,
        length: int | None,
        metrics: Mapping[str, float],
        rate: float | None,
        note: str,
        batches: int = 0,
        total: int | None = None,
        run_left: float | None = None,
        place: str = "",
    ) -> None:
        # After the last epoch all are complete, and the bar still names the last one.
        self.title = f"epoch {epoch + 1}" if epochs is None else f"epoch {min(epoch + 1, epochs)}/{epochs}"
        if epochs is not None and epoch >= epochs and length is not None:
            batch = length
        self.batch, self.length = batch, length
        self.position = f"{batch}/{length}" if length is not None else f"{batch} batches"
        numbers = [f"{name} {value:.4g}" for name, value in metrics.items()]
        self.rate = "" if rate is None else f"{rate:.1f} batches/s" if rate < 100 else f"{rate:,.0f} batches/s"
        self.left = ""
        if rate and length is not None and batch < length:
            self.left = f"{duration((length - batch) / rate)} left"
        self.text = "  ".join([*numbers, *([note] if note else [])])
        self.batches, self.total, self.place = batches, total, place
        self.run_left = "" if run_left is None else f"{duration(run_left)} left"


def duration(seconds: float) -> str:
    """Return a number of seconds as minutes and seconds, or hours, minutes and seconds.

    Examples:
        >>> duration(7.2), duration(83), duration(7384)
        ('0:07', '1:23', '2:03:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
