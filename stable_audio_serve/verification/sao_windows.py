"""Compares the Oobleck autoencoder in windows, cut as for a model's plans, with doing long audio in one piece."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, WindowSpan
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.receptive_field import decoder_halo, encoder_halo
from stable_audio_serve.models.windows import WINDOW_FRAMES, cut_windows
from stable_audio_serve.sampling import ReplayDraw, ReplayNoise
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sao_requests import SOURCE_DRAW, ReplayedRow


def compare_windows(report: Report, *, model: SaoModel) -> None:
    """Compare long audio, encoded and decoded in windows, with doing it in one piece.

    A long source's noise is one draw over all frames, of which each window takes its part. What lies beyond the halo
    must not matter at all: a frame is finite even where everything there is not a number.
    """
    net, spec, generator = model.autoencoder, model.spec, torch.Generator().manual_seed(0)
    halo = max(decoder_halo(net.config), encoder_halo(net.config))
    frames = 2 * (WINDOW_FRAMES + halo)
    shape = (1, spec.card.latent_channels, frames)
    latents = torch.randn(shape, generator=generator)
    audio = 0.3 * torch.randn(1, spec.card.channels, frames * spec.hop, generator=generator)
    request = GenerationRequest(
        prompt="",
        duration_s=frames * spec.hop / spec.card.sample_rate_hz,
        seed=0,
        init_audio=SourceAudio(audio[0].numpy(), spec.card.sample_rate_hz),
    )
    plan = model.plan(request, frames=frames)[0]
    if plan.init_source is None or plan.decode_rule is None:
        raise ValueError("no source or no windows were planned")
    # As the engine cuts while others wait; alone, so few frames are one window.
    short = cut_windows(0, frames=frames, rule=plan.decode_rule, longest=WINDOW_FRAMES)
    noise = ReplayedRow(ReplayNoise(0, [ReplayDraw(SOURCE_DRAW, 0, shape)], num_rows=1), 0)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    source = plan.init_source
    encoded, decoded = net.encode(source.samples[None], drawn)[0], net.decode(latents)[0]

    def encode(span: WindowSpan) -> Tensor:
        window = EncodeWindow(source.cut(span, hop=spec.hop), start=span.start, stage="init", noise=noise)
        return model.encode_audio([window])[0]

    def decode(span: WindowSpan) -> Tensor:
        window = DecodeWindow(latents=latents[0, :, span.start : span.stop], start=span.start, noise=noise)
        return model.decode([window])[0]

    ways: dict[str, _Way] = {  # by the name of the network
        "encoder": _Way(net.encoder, audio, spec.hop, 1, source.windows, encode, encoded),
        "decoder": _Way(net.decode, latents, 1, spec.hop, short, decode, decoded),
    }
    for name, way in ways.items():
        _compare_reach(report, name=name, way=way)
        for span in way.spans:
            unit, made = way.unit_out, way.run_window(span)
            kept = made[..., (span.keep_start - span.start) * unit : (span.keep_stop - span.start) * unit]
            whole = way.whole[..., span.keep_start * unit : span.keep_stop * unit]
            report.compare("decoder halo", f"{name}, window at {span.start}", actual=kept, expected=whole)


@dataclass(frozen=True, slots=True)
class _Way:
    """One direction of the autoencoder: the network, an input of it, input and output values per latent frame.

    `spans` are the windows that a model plans, `run_window` runs it on one, `whole` is the result in one piece.
    """

    run: Callable[[Tensor], Tensor]
    value: Tensor
    unit_in: int
    unit_out: int
    spans: Sequence[WindowSpan]
    run_window: Callable[[WindowSpan], Tensor]
    whole: Tensor


def _compare_reach(report: Report, *, name: str, way: _Way) -> None:
    """Compare how far the network sees with what the planned windows have beside the frames that are kept."""
    joints = list(itertools.pairwise(way.spans))
    if not joints:
        raise ValueError(f"{name}: audio of {way.value.shape[-1] // way.unit_in} frames is one window")
    halo = min(min(left.stop - left.keep_stop, right.keep_start - right.start) for left, right in joints)
    middle = way.value.shape[-1] // way.unit_in // 2
    spoilt = torch.full_like(way.value, math.nan)
    near = slice((middle - halo) * way.unit_in, (middle + halo + 1) * way.unit_in)
    spoilt[..., near] = way.value[..., near]
    frame = way.run(spoilt)[..., middle * way.unit_out : (middle + 1) * way.unit_out]
    difference = 0.0 if bool(frame.isfinite().all()) else math.inf
    report.note("decoder halo", f"{name} sees {halo} frames", difference=difference)
