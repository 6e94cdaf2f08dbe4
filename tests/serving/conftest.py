from __future__ import annotations

from typing import Any

from tests.goldens import SA3_GOLDENS

# Tiny checkpoints with random weights: everything but the sound is real.
TINY = str(SA3_GOLDENS / "tiny-s")
LAZY = str(SA3_GOLDENS / "tiny-l")


def model(name: str, path: str = TINY, **fields: Any) -> dict[str, Any]:
    """Return the settings of a model. Startup calibration takes 0.2 s instead of 2 s, because no test depends on it."""
    return {"name": name, "path": path, "engine": {"warmup_budget_s": 0.2}, **fields}
