"""Damage a checkpoint's weights, and write several revisions of a checkpoint to a cache of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.hub import checkpoint_files

GOOD, BAD = "a" * 40, "b" * 40

Spoil = Callable[[dict[str, Tensor]], None]
_LAST = "pretransform.model.decoder.layers.3.mapping."


def scale(weights: dict[str, Tensor], *, factor: float) -> None:
    """Change the weights so that the decoded audio is multiplied by `factor`."""
    for name in ("weight_g", "bias"):
        weights[_LAST + name] = weights[_LAST + name] * factor


def not_numbers(weights: dict[str, Tensor]) -> None:
    """Set one weight in the middle of the denoiser to NaN."""
    name = next(name for name in weights if name.startswith("model.") and name.endswith("to_out.weight"))
    weights[name].view(-1)[0] = torch.nan


def of_another_model(weights: dict[str, Tensor]) -> None:
    """Shuffle the values of each weight, so that shapes and standard deviations are those of a plausible model."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.ndim > 1 and "denoiser" not in name and "rope" not in name:
            order = torch.randperm(tensor.numel(), generator=generator)
            weights[name] = tensor.reshape(-1)[order].reshape(tensor.shape).contiguous()


def spoil(folder: Path, change: Spoil) -> None:
    """Apply `change` to the weights in a checkpoint's folder, and write the file again."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def copy_checkpoint(source: str | Path, folder: Path) -> Path:
    """Copy the checkpoint in `source`, but not the reference values next to it, to `folder`. Returns `folder`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("golden*"))
    return folder


def fill_revisions(cache: Path, repo_id: str, folders: Mapping[str, Path], *, main: str) -> None:
    """Write a cache of the hub for the repository `repo_id`.

    It has a snapshot of each folder in `folders`, under the commit that is the folder's key. The branch `main` points
    to the commit `main`.
    """
    place = cache / f"models--{repo_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs" / "main").write_text(main)
    for commit, folder in folders.items():
        for name, content in checkpoint_files(folder).items():
            blob = place / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = place / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
