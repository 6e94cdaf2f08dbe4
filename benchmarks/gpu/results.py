"""The results of one part of the benchmark, which are stored while it runs, and the comparison of clips."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import difference
from benchmarks.load import Audio
from benchmarks.report import write_json


class Results:
    """The figures of one part. The file is written after each figure, so that a stopped part leaves some figures."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started_at = time.monotonic()
        self.values: dict[str, Any] = {"differences": []}
        self._write()

    def record(self, name: str, value: Any) -> None:
        """Store a figure. `name` has the keys of nested dicts that lead to the figure, separated by dots."""
        *outer, last = name.split(".")
        at = self.values
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = value
        self._write()

    def compare(
        self, name: str, plays: Sequence[Sequence[Audio]], *, plain: Sequence[Audio], least_db: float | None
    ) -> None:
        """Compare the clips in `plays` with the plain engine's clips, and store the result under `name`.

        Each item of `plays` has one clip for each clip in `plain`. If `least_db` is None, the bytes must be equal.
        """
        by_play = [[clip_db(*pair) for pair in zip(clips, plain, strict=True)] for clips in plays]
        every = [db for play in by_play for db in play]
        far = [db for db in every if not is_close(db, least_db)]
        worst_db = min((db for db in every if db is not None), default=None)
        figures = {"clips": len(every), "identical": every.count(None), "worst_db": worst_db, "least_db": least_db}
        self.record(f"features.{name}", self.values.get("features", {}).get(name, {}) | figures | {"by_play": by_play})
        if far:
            wanted = "equal bytes" if least_db is None else f"at least {least_db:g} dB"
            self.differ(
                f"{name}: {len(far)} of {len(every)} clips are not close, {worst_db:.1f} dB instead of {wanted}"
            )

    def differ(self, what: str) -> None:
        self.values["differences"].append(what)
        self._write()

    def _write(self) -> None:
        self.values["seconds"] = round(time.monotonic() - self._started_at, 1)
        write_json(self._path, self.values)


def clip_db(clip: Audio, plain: Audio) -> float | None:
    """Returns signal over error in decibels: None if the clips are identical, -999 if the clip has another shape or is
    not finite.
    """
    share = difference(clip, plain)
    return None if share == 0 else -20 * math.log10(share) if math.isfinite(share) else -999.0


def is_close(db: float | None, least_db: float | None) -> bool:
    """Whether a result of `clip_db` meets the bound. If `least_db` is None, the clips must be identical."""
    return db is None or (least_db is not None and db >= least_db)
