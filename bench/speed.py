"""How fast a machine is now, against when a job began: predictions hold for the machine as it was calibrated."""

from __future__ import annotations

import statistics

import torch

from opweave.cost_model import measure
from opweave.cost_model.calibrate import op_sample


class Speed:
    """A few ops timed when a job begins, right behind calibration, and again later: guests of one host come and go. On a CPU; all ranks
    make one and read it together."""

    ROWS = (
        "aten.mm.default/float32/256x256x256", "aten.mm.default/float32/128x1024x512", "aten.add.Tensor/float32/512x256",
        "aten.gelu.default/float32/256x1024", "aten.native_layer_norm.default/float32/512x256",
    )  # fmt: skip

    def __init__(self) -> None:
        self._rows = [row for row in measure.rows((torch.float32,)) if row.name in self.ROWS]
        self._first = self._now()

    def _now(self) -> list[float]:
        samples = [op_sample(row, torch.device("cpu"), 0.02) for row in self._rows]
        return [sample["seconds"] for sample in samples]

    def drift(self) -> float:
        """Seconds of the same ops now over those then, the median of them."""
        return statistics.median(now / then for now, then in zip(self._now(), self._first, strict=True))
