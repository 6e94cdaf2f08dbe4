"""A tiny model with real tensor operations, for engine tests that need no checkpoint, and functions to make requests.

The model has masked attention over frames, its decoder reads adjacent frames, and its encoder and decoder can draw
noise. Therefore its output changes if the engine lets values leak from other rows, from padding or over window edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    SourcePlan,
    StepBatch,
    TextEmbedding,
    WindowRule,
    WindowSpan,
)
from stable_audio_serve.sampling.blend import blend_plan, flow_path
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.samplers import build_plan
from stable_audio_serve.sampling.schedules import DEFAULT_SHIFT, build_sigmas

_WINDOW, _OVERLAP, _HALO = 32, 8, 2


class ToyModel:
    """A `DiffusionModel`. `on_call(name, items)` is called before each method that runs on the device, and may raise.

    For inpainting, the network gets a mask of the frames that stay unchanged. If `blends` is true, the network gets no
    mask, and the engine restores these frames.
    """

    def __init__(
        self,
        *,
        width: int = 16,
        latent_channels: int = 4,
        hop: int = 8,
        noisy_source_encoder: bool = False,
        blends: bool = False,
        packs_rows: bool = False,
        device: str = "cpu",
        on_call: Callable[[str, Sequence[object]], None] = lambda name, items: None,
    ) -> None:
        self.device = torch.device(device)
        self.on_call = on_call
        self._blends = blends
        self.spec = ModelSpec(
            card=ModelCard(
                "toy",
                "toy",
                sample_rate_hz=800,
                channels=2,
                latent_channels=latent_channels,
                max_duration_s=256 * hop / 800,
                default_steps=4,
                default_duration_padding_s=0.1,
            ),
            hop=hop,
            max_frames=256,
            default_sampler="pingpong",
            noisy_source_encoder=noisy_source_encoder,
            packs_rows=packs_rows,
        )
        generator = torch.Generator().manual_seed(7)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(self.device)

        channels = self.spec.card.channels
        self._text = weight(256, width)
        self._into = weight(width, latent_channels)
        self._qkv = weight(3 * width, width)
        self._out = weight(latent_channels, width)
        self._time = weight(width, 1)
        self._local = weight(width, latent_channels + 1)
        self._encoder = weight(latent_channels, channels * hop)
        self._decoder = weight(channels * hop, latent_channels, 2 * _HALO + 1)

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        spec = self.spec
        if request.duration_s > spec.card.max_duration_s:
            raise InvalidRequestError("too long", field="duration", allowed=f"0..{spec.card.max_duration_s}")
        padding_s = (
            spec.card.default_duration_padding_s if request.duration_padding_s is None else request.duration_padding_s
        )
        own = max(1, math.ceil((request.duration_s + padding_s) * spec.card.sample_rate_hz / spec.hop))
        valid = min(own, spec.max_frames)
        length = frames or min(valid + valid % 2, spec.max_frames)
        guidance = Guidance(
            cfg_scale=spec.card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
            apg_scale=1.0 if request.apg_scale is None else request.apg_scale,
            norm_threshold=request.cfg_norm_threshold,
            rescale=request.cfg_rescale,
            interval=request.cfg_interval,
        )
        level = request.init_noise_level if request.init_audio else 1.0
        sigmas = build_sigmas(request.steps or spec.card.default_steps, DEFAULT_SHIFT, length=valid, sigma_max=level)
        sampler = build_plan(
            request.sampler or spec.default_sampler,
            sigmas,
            guidance=guidance,
            has_source=request.init_audio is not None,
        )
        if self._blends and request.inpaint_audio is not None:
            sampler = blend_plan(sampler, flow_path)
        guided = any(evaluation.guided for evaluation in sampler.evaluations)
        mask = None
        if request.inpaint_audio is not None:
            mask = torch.ones(length)
            for start_s, end_s in request.inpaint_regions_s:
                mask[
                    int(start_s * spec.card.sample_rate_hz / spec.hop) : int(
                        end_s * spec.card.sample_rate_hz / spec.hop
                    )
                ] = 0
        return tuple(
            RowPlan(
                seed=seed,
                frames=length,
                valid_frames=valid,
                output_samples=int(request.duration_s * spec.card.sample_rate_hz),
                prompt=prompt,
                negative_prompt=request.negative_prompt if guided else None,
                numbers={"seconds_total": request.duration_s},
                sampler=sampler,
                guidance=guidance,
                init_source=self._source(request.init_audio, length),
                inpaint_source=self._source(request.inpaint_audio, length),
                keep_mask=mask,
                decode_windows=make_windows(length),
                decode_rule=WindowRule(_HALO),
            )
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        )

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        self.on_call("encode_text", prompts)
        longest = max(len(prompt.encode()) for prompt in prompts) + 1
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor([0, *prompt.encode()])
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        mixed = self._attend(self._text[ids.to(self.device)], mask.to(self.device))
        return [
            TextEmbedding(prompt, mixed[row, : int(mask[row].sum())].clone(), mask[row][mask[row]].to(self.device))
            for row, prompt in enumerate(prompts)
        ]

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        self.on_call("encode_audio", windows)
        spec = self.spec
        latents = []
        for window in windows:
            patches = (
                window.samples.reshape(spec.card.channels, -1, spec.hop).permute(1, 0, 2).flatten(1).to(self.device)
            )
            encoded = torch.tanh(patches @ self._encoder.T).T
            if spec.noisy_source_encoder:
                stage = f"{window.stage}/tokens"
                noise = window.noise.window(
                    stage, window.start, shape=tuple(encoded.shape), frame_axis=1, device=self.device
                )
                encoded = encoded + 0.1 * noise
            latents.append(encoded)
        return latents

    def condition(
        self, plan: RowPlan, *, prompt: TextEmbedding, negative: TextEmbedding | None, inpaint_latents: Tensor | None
    ) -> RowConditioning:
        self.on_call("condition", [plan])
        local_in = torch.zeros(plan.frames, self.spec.card.latent_channels + 1, device=self.device)
        if inpaint_latents is not None and plan.keep_mask is not None:
            keep = plan.keep_mask.to(self.device)
            local_in = torch.cat((keep[:, None], (inpaint_latents * keep).T), dim=1)
        by_frame = {"local": (local_in @ self._local.T).T}
        seconds = 0.1 * plan.numbers["seconds_total"]
        unconditional = None
        if any(evaluation.guided for evaluation in plan.sampler.evaluations):
            context = torch.zeros_like(self._text[0]) if negative is None else negative.tokens.mean(0)
            unconditional = BranchConditioning({"context": context + seconds}, by_frame)
        context = {"context": prompt.tokens.mean(0) + seconds}
        return RowConditioning(BranchConditioning(context, by_frame), unconditional)

    def denoise(self, batch: StepBatch) -> Tensor:
        self.on_call("denoise", batch.t.unbind())
        if not batch.frames:
            return self._velocity(batch)
        rows = batch.x[0].split(list(batch.frames), dim=1)
        alone = []
        for i, (row, valid) in enumerate(zip(rows, batch.valid_frames, strict=True)):
            one, own = slice(i, i + 1), row.shape[1]
            constants = {name: value[one] for name, value in batch.constants.items()}
            by_frame = {name: value[one, :, :own] for name, value in batch.by_frame.items()}
            alone.append(StepBatch(row[None], batch.t[one], torch.arange(own)[None] < valid, constants, by_frame))
        return torch.cat([self._velocity(row) for row in alone], dim=2)

    def _velocity(self, batch: StepBatch) -> Tensor:
        hidden = batch.x.transpose(1, 2) @ self._into.T + (batch.t[:, None] * self._time[:, 0])[:, None]
        extra = batch.by_frame["local"].transpose(1, 2) + batch.constants["context"][:, None]
        mixed = self._attend(hidden + extra, batch.valid)
        velocity = (torch.tanh(hidden + mixed) @ self._out.T).transpose(1, 2) + 0.5 * batch.x
        # Padding frames get a large value, so that a test fails if code reads them.
        return torch.where(batch.valid[:, None], velocity, torch.full_like(velocity, 1e4))

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self.on_call("decode", windows)
        latents = torch.stack([window.latents for window in windows])
        audio = 0.2 * F.conv1d(latents, self._decoder, padding=_HALO)
        pieces = []
        for window, patches in zip(windows, audio, strict=True):
            noise = window.noise.window(
                "decode/tokens", window.start, shape=tuple(patches.shape), frame_axis=1, device=self.device
            )
            noisy = (patches + 0.01 * noise).T.reshape(-1, self.spec.card.channels, self.spec.hop)
            pieces.append(noisy.permute(1, 0, 2).reshape(self.spec.card.channels, -1))
        return pieces

    def _attend(self, hidden: Tensor, valid: Tensor) -> Tensor:
        query, key, value = (hidden @ self._qkv.T).chunk(3, dim=-1)
        # Padding frames are masked as keys. As queries they need no mask, because their results are overwritten.
        mask = valid[:, None, :].expand(-1, hidden.shape[1], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def _source(self, audio: SourceAudio | None, frames: int) -> SourcePlan | None:
        if audio is None:
            return None
        samples = torch.zeros(self.spec.card.channels, frames * self.spec.hop)
        given = torch.from_numpy(audio.samples)[:, : samples.shape[1]]
        samples[:, : given.shape[1]] = given
        return SourcePlan(samples, frames, make_windows(frames))


def make_windows(frames: int, *, window: int = _WINDOW, overlap: int = _OVERLAP) -> tuple[WindowSpan, ...]:
    """Returns overlapping windows over `frames` frames. Each of two neighbours provides half of their overlap."""
    if frames <= window:
        return (WindowSpan(0, frames, 0, frames),)
    starts = list(range(0, frames - window + 1, window - overlap))
    if starts[-1] != frames - window:
        starts.append(frames - window)
    half = overlap // 2
    return tuple(
        WindowSpan(
            start,
            start + window,
            start if start == 0 else start + half,
            start + window if start == starts[-1] else start + window - half,
        )
        for start in starts
    )


def make_audio(duration_s: float = 0.3, *, sample_rate_hz: int = 800, channels: int = 2, seed: int = 1) -> SourceAudio:
    """Returns a source clip of random noise at half of full scale."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, int(duration_s * sample_rate_hz)))
    return SourceAudio(samples.astype(np.float32), sample_rate_hz)


def make_request(
    prompt: str = "a bell", *, duration_s: float = 0.4, seed: int = 1, **fields: object
) -> GenerationRequest:
    """Returns a request. `keep` is "model" by default, because with "source", copied source samples hide faults."""
    request = GenerationRequest(prompt=prompt, duration_s=duration_s, seed=seed, keep="model")
    return replace(request, **fields)  # type: ignore[arg-type]


def make_varied_requests() -> list[GenerationRequest]:
    """Returns seven requests that differ in length, steps, guidance, sampler, sources and masks."""
    return [
        make_request("rain", duration_s=0.15, seed=11, steps=2),
        make_request("a long low drone", duration_s=1.9, seed=12, steps=7, sampler="euler"),
        make_request("drums", duration_s=0.8, seed=13, cfg_scale=3.0, steps=5, negative_prompt="voice"),
        make_request("piano", duration_s=0.55, seed=14, sampler="dpmpp", cfg_scale=2.0, apg_scale=0.5, steps=6),
        make_request("wind", duration_s=1.2, seed=15, init_audio=make_audio(1.0), init_noise_level=0.6),
        make_request(
            "a dog", duration_s=1.0, seed=16, inpaint_audio=make_audio(1.0, seed=2), inpaint_regions_s=((0.2, 0.6),)
        ),
        make_request("", duration_s=0.7, seed=17, sampler="rk4", steps=3, batch_size=2, cfg_scale=1.5, cfg_rescale=0.4),
    ]


class FakeClock:
    """A clock that stands still until a test changes `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.started_at = 1_790_000_000.0  # Unix time at which `now` is 0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.started_at + self.now
