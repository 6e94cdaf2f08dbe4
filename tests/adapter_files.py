"""Writes small adapter files for tests that need no network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYER = "model.transformer.layers.0.self_attn.to_qkv"


def write_file(
    path: Path, *, kind: str = "lora", rank: int = 2, seed: int = 1, shape: tuple[int, int] = (24, 16)
) -> str:
    """Write an adapter with random tensors for one layer, whose weight has this shape. Returns the file's SHA-256."""
    random = np.random.default_rng(seed)
    out, width = shape
    parts = {"lora_A": random.normal(size=(rank, width)), "lora_B": random.normal(size=(out, rank))}
    if kind != "lora":
        parts["magnitude"] = random.normal(size=out)
    tensors = {f"{LAYER}.parametrizations.weight.0.{part}": x.astype(np.float16) for part, x in parts.items()}
    config = {"rank": rank, "alpha": rank, "adapter_type": kind}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"lora_config": json.dumps(config)})
    return hashlib.sha256(path.read_bytes()).hexdigest()
