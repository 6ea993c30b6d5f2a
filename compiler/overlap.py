"""What hides what in a step with copies between tiers: the streams of the selection problem.

A copy engine, the disk and the CPU run beside the computation of their own phase: what the forward pass fetches cannot be hidden behind the
backward pass. So each phase takes as long as the busiest of its streams, and the step the sum of its phases: with c_p the computation of
phase p and s_kp what stream k has to do in it,

    T = sum over p of max(c_p, max over k of s_kp) = c + max over all choices of at most one stream per phase of sum (s_kp - c_p).

The second form is what a selection problem knows: one maximum, here over streams that are sums of one stream per phase. The CPU's updates
of parameters whose gradients wait in the memory of their narrow form (`tiers.defer_update`) go on beside the next step's forward pass: all
of the computation hides them, in a stream of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from .residency import DISK, HOST

FWD, BWD = "fwd", "bwd"
CPU = "cpu"
# What a tier's copies occupy, per direction; the disk reads and writes through one path.
STREAMS = {(HOST, "out"): "device_to_host", (HOST, "in"): "host_to_device", (DISK, "out"): "disk", (DISK, "in"): "disk"}

Key = tuple[str, str]  # (stream, phase); the phase of what all of the step hides is ""
Seconds = Mapping[Key, np.ndarray]


class Overlap:
    """The streams of a step with these tiers. share: of the computation's seconds that hide copies."""

    def __init__(self, tiers: Sequence[str], share: float) -> None:
        self.share = share
        engines = list(dict.fromkeys(STREAMS[tier, way] for tier in tiers for way in ("out", "in")))
        late = [CPU] if HOST in tiers else []
        self.keys: list[Key] = [(name, FWD) for name in engines] + [(name, BWD) for name in (*engines, *late)]
        forward = [[], *([(name, FWD)] for name in engines)]
        backward = [[], *([(name, BWD)] for name in (*engines, *late))]
        sums = [f + b for f, b in itertools.product(forward, backward) if f + b]
        self._sums: dict[str, list[Key]] = {" + ".join(f"{name} {phase}" for name, phase in keys): keys for keys in sums}
        if late:
            self.keys.append((CPU, ""))
            self._sums[CPU] = [(CPU, "")]

    @property
    def streams(self) -> tuple[str, ...]:
        """Names for the selection problem."""
        return tuple(self._sums)

    def of(self, seconds: Seconds) -> dict[str, np.ndarray]:
        """Seconds per stream of the selection problem, from those per stream and phase; what is nothing is left out."""
        out: dict[str, np.ndarray] = {}
        for name, keys in self._sums.items():
            parts = [seconds[key] for key in keys if key in seconds]
            if parts and np.any(total := sum(parts[1:], parts[0])):
                out[name] = total
        return out

    def hidden_behind(self, seconds: np.ndarray, phase: str) -> dict[str, np.ndarray]:
        """What computation of so many seconds in a phase takes off each stream."""
        return self.of({key: -self.share * seconds for key in self.keys if key[1] in (phase, "")})
