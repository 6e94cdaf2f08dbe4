"""Helpers for folders of reference numbers: run `verify` on the stored ones, and make small copies to tamper with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from tests.goldens import SA3_GOLDENS

QUICK_CASES = ("gen/t2a_short_unchunked", "gen/t2a_partly_padded")


@dataclass(frozen=True, slots=True)
class Answer:
    """The output of `stable-audio-serve verify` for a folder."""

    exit_code: int
    lines: tuple[str, ...]
    report: dict[str, Any]

    def line(self, component: str, verdict: str) -> str:
        """Returns the line that has this component and this verdict. Fails the test if there is no such line."""
        found = [line for line in self.lines if line.startswith(f"{component:<23} {verdict:<8} ")]
        assert found, f"no line {component!r} {verdict!r} in\n" + "\n".join(self.lines)
        return found[0]


def run_verify(folder: Path) -> Answer:
    """Run `verify` in this process."""
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        result = CliRunner().invoke(app, ["verify", str(folder), "--json", str(report)], catch_exceptions=False)
        return Answer(result.exit_code, tuple(result.output.splitlines()), json.loads(report.read_text()))


@cache
def verify_stored(name: str) -> Answer:
    """Run `verify` on a stored folder, and cache the output of `verify`."""
    return run_verify(SA3_GOLDENS / name)


def make_quick_copy(target: Path, *, name: str = "sharp-s") -> Path:
    """Copy the folder `name` to `target`. The copy has only two cases, two guided calls, and no long audio."""
    shutil.copytree(SA3_GOLDENS / name, target)
    edit_facts(target, lambda facts: facts.update(cases={key: facts["cases"][key] for key in QUICK_CASES}))

    def thin(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            unused = ("gen/", "dit/cfg", "ae/decode_seed", "ae/decode_odd", "ae/odd")
            if "long" in key or (key.startswith(unused) and not key.startswith((*QUICK_CASES, "dit/cfg3_neg"))):
                del tensors[key]

    edit_tensors(target / "golden.safetensors", thin)
    return target


def edit_facts(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change golden.json."""
    facts = json.loads((folder / "golden.json").read_text())
    change(facts)
    (folder / "golden.json").write_text(json.dumps(facts))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def add_to_first(key: str, amount: float) -> Callable[[dict[str, Tensor]], None]:
    """Returns a function that adds `amount` to the first number of the tensor `key`."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[0] += amount

    return change
