"""A program that loads a checkpoint folder and prints how many bytes of memory this takes at its peak.

It does not load the text encoder, because importing its library takes longer than everything else.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from torch import nn

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.models import weight_files
from stable_audio_serve.models.sa3 import build
from stable_audio_serve.models.text_encoder import TextEncoder

CPU = torch.device("cpu")


def measure(folder: Path, small: Path, *, dtype: torch.dtype) -> int:
    """Load the checkpoint `small`, then `folder`. Returns the peak of the memory that `folder` added, in bytes.

    Loading `small` first imports the libraries, so their memory does not count.
    """
    weight_files.MAPPED_BYTES = 16 * 2**20
    build.load_text_encoder = lambda *_, **__: TextEncoder(None, nn.Identity(), width=768, max_length=8)
    load(small, dtype=dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
    before = read_status("VmRSS")
    load(folder, dtype=dtype)
    return read_status("VmHWM") - before


def load(folder: Path, *, dtype: torch.dtype) -> None:
    """Load a model with its denoiser in `dtype`, even a dtype that a server refuses on this CPU. Reads every weight."""
    card = ModelCard("measured", "stable-audio-3")
    model = build.load_sa3(card, folder, text_encoder=folder, device=CPU, dtype=dtype, decode_precision="float32")
    assert model.denoiser.dtype == dtype
    for network in (model.denoiser, model.autoencoder):  # memory-mapped weights count only after they are read
        sum(float(tensor.sum()) for tensor in network.state_dict().values())


def read_status(name: str) -> int:
    """Returns the field `name` of /proc/self/status, a size of this process's memory, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(measure(Path(sys.argv[1]), Path(sys.argv[2]), dtype=torch.bfloat16))
