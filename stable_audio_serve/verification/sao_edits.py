"""Compares what a masked edit of the Stable Audio Open family keeps with the stored encoding of its source.

The reference has no masked editing of these models. What such an edit keeps needs no run of it: in the end, frames
outside the regions are the source's latents.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.sampling import SeededNoise
from stable_audio_serve.verification.cases import Case
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.observed import RowResult, Runner
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sao_runs import window_frames

_ENCODED = re.compile(r"encode_seed(?P<seed>\d+)")
_STEPS = 3


class _StoredEncoding(SeededNoise):
    """A row's noise, with a stored draw (D, F) where its sources are encoded."""

    def __init__(self, seed: int, encoding: Tensor) -> None:
        super().__init__(seed)
        self._encoding = encoding

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self._encoding.narrow(frame_axis, start, shape[frame_axis]).to(device)


def compare_edits(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Edit the middle of every source whose encoding is stored, with and without a start from the source."""
    asyncio.run(_compare_edits(report, goldens, model=model))


async def _compare_edits(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    runner = Runner(model, num_frames=partial(window_frames, hop=model.spec.hop))
    try:
        for name in goldens.names("ae/"):
            if match := _ENCODED.fullmatch(name):
                with report.guard("end-to-end", f"ae/{name}"):
                    await _compare_edit(report, goldens, name=name, seed=int(match["seed"]), model=model, runner=runner)
    finally:
        await runner.close()


async def _compare_edit(
    report: Report, goldens: Goldens, *, name: str, seed: int, model: SaoModel, runner: Runner
) -> None:
    stored = goldens[f"ae/{name}"]
    draws = torch.randn(stored.shape, generator=torch.Generator().manual_seed(seed))
    for starts in (False, True):
        case = _case(name, goldens["ae/wave"], starts=starts, model=model)
        results = await runner.run_with(case, [_StoredEncoding(row, draw) for row, draw in enumerate(draws)])
        key = f"ae/{name} kept by {'a variation' if starts else 'an edit'}"
        _compare_kept(report, key, results=results, stored=stored)


def _case(name: str, waves: Tensor, *, starts: bool, model: SaoModel) -> Case:
    """Returns edits of the middle fifth of the sources (B, C, S); `starts`: they start from the source, too."""
    rate_hz, hop = model.spec.card.sample_rate_hz, model.spec.hop
    fifth_s = waves.shape[-1] // hop // 5 * hop / rate_hz
    sources = [SourceAudio(wave.numpy(), rate_hz) for wave in waves]
    requests = tuple(
        GenerationRequest(
            prompt="",
            duration_s=waves.shape[-1] / rate_hz,
            seed=row,
            steps=_STEPS,
            init_audio=source if starts else None,
            init_noise_level=model.spec.card.noise_level(0.5, sampler=None),
            inpaint_audio=source,
            inpaint_regions_s=((2 * fifth_s, 3 * fifth_s),),
        )
        for row, source in enumerate(sources)
    )
    return Case(name, requests, 0, waves.shape[-1], ())


def _compare_kept(report: Report, key: str, *, results: Sequence[RowResult], stored: Tensor) -> None:
    for row, result in enumerate(results):
        if result.plan.keep_mask is None:
            raise ValueError("no mask was planned")
        kept = result.plan.keep_mask.bool()
        report.compare("end-to-end latents", f"{key}[{row}]", actual=result.latents, expected=stored[row], only=kept)
