"""Limits for the selection problem under which the program made of its answer stays within the user's.

The problem adds up live values; the lowered program has copies of an instant beside them (a tensor and its gathered form, buffers of
messages). How much they take is known once a program is there: the next problem gets that much less, and so much that this answer is none
any more. Where the problem then refuses, it got too little, and the next one gets what lies halfway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..runtime.memory import MemoryReport
from .limits import Limits

_CLOSE = 0.02  # limits that differ by no more than this share are one


def excess(peaks: Mapping[str, float], limits: Limits) -> dict[str, float]:
    """Bytes above the limit, by pool; pools that stay within theirs are left out."""
    return {pool: peaks[pool] - limit for pool, limit in limits.items() if peaks.get(pool, 0) > limit}


@dataclass(slots=True)
class Tightening:
    """limits: the user's. current: those of the problem to solve next. leanest: of the programs that were too large, the smallest."""

    limits: Limits
    current: Limits = field(default_factory=dict)
    leanest: MemoryReport | None = None
    _too_large: Limits | None = None
    _refused: Limits | None = None

    def __post_init__(self) -> None:
        self.current = dict(self.limits)

    def program_exceeds(self, memory: MemoryReport, expected: Mapping[str, float]) -> bool:
        """The answer's program needs too much. expected: the peaks that the problem took it for. Whether there is more to try."""
        over = excess(memory.pools, self.limits)
        if self.leanest is None or sum(over.values()) < sum(excess(self.leanest.pools, self.limits).values()):
            self.leanest = memory
        self._too_large = self.current
        if self._refused is not None:
            return self._halfway()
        self.current = self.current | {pool: min(self.current[pool], expected[pool]) - num_bytes for pool, num_bytes in over.items()}
        return min(self.current.values()) > 0 or self.problem_refuses()

    def problem_refuses(self) -> bool:
        """No plan stays within the current limits. Whether there is more to try: not where they are the user's."""
        self._refused = {pool: max(limit, 0.0) for pool, limit in self.current.items()}
        return self._too_large is not None and self._halfway()

    def _halfway(self) -> bool:
        assert self._too_large is not None and self._refused is not None, "there are no two limits to go between"
        pairs = {pool: (self._refused[pool], most) for pool, most in self._too_large.items()}
        self.current = {pool: (least + most) / 2 for pool, (least, most) in pairs.items()}
        return any(most - least > _CLOSE * most for least, most in pairs.values())

    def reason(self) -> str:
        """Why the leanest program was refused. Raises AssertionError where there was none."""
        assert self.leanest is not None, "no program was made"
        pool, num_bytes = max(excess(self.leanest.pools, self.limits).items(), key=lambda pair: pair[1])
        return (
            f"the leanest program that was found needs {self.leanest.pools[pool]:,} bytes of the {pool}, {int(num_bytes):,} too many (at "
            f"{self.leanest.pool_at[pool]})"
        )
