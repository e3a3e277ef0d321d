"""The figure of matplotlib that learning curves are drawn on. Imported when one is drawn, because it needs an extra."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class CurvesFigure(Figure):
    """A figure that a notebook shows without pyplot, which would keep it alive and change global state."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, dpi=100, format="png", metadata={"Software": None})
        return content.getvalue()
