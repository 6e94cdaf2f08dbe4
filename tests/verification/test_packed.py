"""Verification passes in fast mode, in which rows share network calls without padding (packed rows)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.verification import runs
from tests.parameters import slow
from tests.verification.folders import make_quick_copy, run_verify


@pytest.mark.parametrize("name", ["sharp-s", slow("sharp-l")])
def test_packed_rows_pass_verification(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EngineOptions", partial(EngineOptions, mode="fast"))
    packed: list[bool] = []
    denoise = runs.ObservedModel.denoise

    def noted(self: runs.ObservedModel, batch: StepBatch) -> Tensor:
        packed.append(bool(batch.frames))
        return denoise(self, batch)

    monkeypatch.setattr(runs.ObservedModel, "denoise", noted)
    answer = run_verify(make_quick_copy(tmp_path / name, name=name))
    assert answer.exit_code == 0, "\n".join(answer.lines)
    assert packed
    assert all(packed)
