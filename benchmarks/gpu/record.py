"""A part's file: every finished measurement is written at once and skipped on the next start. A run ends cleanly when
its time is up and says what is left. Knows no device and no model.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Done = Mapping[str, dict[str, Any]]

# Figures of another commit, device or torch do not belong into one file.
_SAME = (("commit",), ("gpu",), ("cpu",), ("versions", "torch"), ("settings",))


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something to measure; `about_s` is how long it is expected to take."""

    name: str
    run: Callable[[], dict[str, Any]]
    about_s: float = 10.0


class Record:
    """The measurements of one part in one file."""

    def __init__(self, path: Path, *, environment: Mapping[str, Any]) -> None:
        """Reads the file if there is one. Raises ValueError if it comes from another commit, device or torch."""
        self._path = path
        self._environment = dict(environment)
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        if path.exists():
            earlier = json.loads(path.read_text())
            for keys in _SAME:
                if _look_up(earlier["environment"], keys) != _look_up(self._environment, keys):
                    name = " ".join(keys)
                    raise ValueError(f"{path} was measured with other {name}: choose another folder or remove it")
            self.done = earlier["results"]["measurements"]

    def run(
        self,
        measurements: Sequence[Measurement],
        *,
        summarize: Callable[[Done], Mapping[str, Any]],
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], object] = print,
    ) -> list[str]:
        """Run what is missing, the first of them in any case, others while they are expected to end in `budget_s`
        seconds. Returns the names that are left. A measurement that raises is noted and the next one runs."""
        ends_at = clock() + budget_s
        missing = [measurement for measurement in measurements if measurement.name not in self.done]
        left: list[str] = []
        for index, measurement in enumerate(missing):
            now = clock()
            if index and now + measurement.about_s > ends_at:
                left.append(measurement.name)
                continue
            say(f"{measurement.name} ...")
            try:
                result = measurement.run()
            except Exception as error:  # noqa: BLE001 - the others can still be measured
                traceback.print_exc()
                self.failed[measurement.name] = f"{type(error).__name__}: {error}"[:500]
                say(f"{measurement.name}: failed")
            else:
                self.done[measurement.name] = {**result, "took_s": round(clock() - now, 3)}
                say(f"{measurement.name}: {clock() - now:.1f} s")
            self._write(summarize, left=[other.name for other in missing[index + 1 :]])
        self._write(summarize, left=left)
        return left

    def _write(self, summarize: Callable[[Done], Mapping[str, Any]], *, left: Sequence[str]) -> None:
        results = {**summarize(self.done), "left": [*left], "failed": self.failed, "measurements": self.done}
        report = {"case": self._path.stem, "environment": self._environment, "results": results}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(report, indent=2, default=str) + "\n")
        os.replace(draft, self._path)  # an interrupted run leaves the earlier file whole


def _look_up(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        values = values.get(key, {})
    return values
