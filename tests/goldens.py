"""Load the stored reference values that tests compare with. Each folder is loaded at most once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SA3_GOLDENS = Path(__file__).parent / "data" / "goldens" / "sa3"
OPEN_GOLDENS = SA3_GOLDENS.with_name("sao")
SHARP = ("sharp-s", "sharp-l")
TINY = ("tiny-s", "tiny-l")


@dataclass(frozen=True, slots=True)
class Goldens:
    """The reference values in a folder: `facts` from its JSON file, and `tensors` with names `<component>/<name>`."""

    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@cache
def load_goldens(name: str) -> Goldens:
    """Returns reference values of Stable Audio 3 from the folder common, sharp-s, sharp-l, tiny-s or tiny-l."""
    return _load(SA3_GOLDENS / name, stem="common" if name == "common" else "golden")


@cache
def load_open_goldens(name: str) -> Goldens:
    """Returns reference values of Stable Audio Open from the folder `name`."""
    return _load(OPEN_GOLDENS / name, stem="golden")


def _load(folder: Path, *, stem: str) -> Goldens:
    from safetensors.torch import load_file  # imported here: it imports torch, which takes seconds

    facts = json.loads((folder / f"{stem}.json").read_text())
    return Goldens(folder=folder, facts=facts, tensors=load_file(folder / f"{stem}.safetensors"))
