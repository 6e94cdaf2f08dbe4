from __future__ import annotations

from typing import Any

from tests.goldens import SA3_GOLDENS

# Tiny checkpoints with random weights. They work like real models but sound like noise.
TINY = str(SA3_GOLDENS / "tiny-s")
LAZY = str(SA3_GOLDENS / "tiny-l")


def model(name: str, path: str | None = TINY, **fields: Any) -> dict[str, Any]:
    """Return the settings of a model. To start quickly, its warm-up lasts 0.2 s instead of 2 s."""
    return {"name": name, "path": path, "engine": {"warmup_budget_s": 0.2}, **fields}
