from __future__ import annotations

from typing import Any

from tests.goldens import SA3_GOLDENS

# Tiny checkpoints with random weights: everything is real but the sound.
TINY = str(SA3_GOLDENS / "tiny-s")
LAZY = str(SA3_GOLDENS / "tiny-l")


def model(name: str, path: str = TINY, **fields: Any) -> dict[str, Any]:
    """Settings of a model. Each start measures its speed for a fifth of a second, not for two: nobody here cares."""
    return {"name": name, "path": path, "engine": {"warmup_budget_s": 0.2}, **fields}
