"""How long a step takes on a machine that is not here: what it computes and sends, over what a rank can."""

from __future__ import annotations

import dataclasses

from purestep.views import Block, Note, Printed, Table


@dataclasses.dataclass(frozen=True, repr=False)
class StepTime(Printed):
    """Seconds of a step of a rank; prints as a table.

    Attributes:
        compute: of the passes, without those that a rank waits.
        send: of what it sends, if it sends without a pause.
        waits: the part of a step in which it waits for the stages of a pipeline.
    """

    compute: float
    send: float
    waits: float = 0.0

    @property
    def hidden(self) -> float:
        """Seconds of a step if all is sent while the rank computes: the longer of both. No step is faster."""
        return max(self.compute / (1 - self.waits), self.send)

    @property
    def apart(self) -> float:
        """Seconds of a step if nothing is sent while the rank computes: the sum of both."""
        return self.compute / (1 - self.waits) + self.send

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        rows = [
            ("compute", f"{self.compute:.3g} s"),
            ("send", f"{self.send:.3g} s"),
            ("a step, all of it sent meanwhile", f"{self.hidden:.3g} s"),
            ("a step, nothing sent meanwhile", f"{self.apart:.3g} s"),
        ]
        waits = [Note(f"a rank waits {self.waits:.1%} of a step")] if self.waits else []
        return [Table(("", ""), rows, title="time of a step", right=(1,)), *waits]
