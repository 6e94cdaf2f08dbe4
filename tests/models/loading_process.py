"""A program that loads a checkpoint folder and prints, as JSON, the memory that loading needs."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.models.sa3 import build
from stable_audio_serve.models.sa3.model import Sa3Model

CPU = torch.device("cpu")


def measure(folder: Path, small: Path, *, dtype: torch.dtype) -> dict[str, int | bool]:
    """Load the checkpoint `small`, then `folder` with the text encoder of `small`. Returns the memory in bytes that
    `folder` added.

    `loaded` is the memory after loading, and `peak` the most memory until all weights are read once. `has_compiler` is
    true if torch's compiler was imported. Loading `small` first imports the libraries, so that their memory does not
    count.
    """
    load(small, text_encoder=small / "t5gemma", dtype=dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
    before = read_status("VmRSS")
    model = load(folder, text_encoder=small / "t5gemma", dtype=dtype)
    loaded = read_status("VmRSS") - before
    for network in (model.denoiser, model.autoencoder):  # memory-mapped weights use memory once they are read
        sum(float(tensor.sum()) for tensor in network.state_dict().values())
    return {
        "loaded": loaded,
        "peak": read_status("VmHWM") - before,
        "has_compiler": "torch._dynamo" in sys.modules,
    }


def load(folder: Path, *, text_encoder: Path, dtype: torch.dtype) -> Sa3Model:
    """Load a model with the denoiser in `dtype`, even if a server would refuse this dtype on this CPU."""
    card = ModelCard("measured", "stable-audio-3")
    model = build.load_sa3(card, folder, text_encoder=text_encoder, device=CPU, dtype=dtype, decode_precision="float32")
    assert model.denoiser.dtype == dtype
    return model


def read_status(name: str) -> int:
    """Returns in bytes the field `name` of /proc/self/status, which states a memory size of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))))
