"""A slow, simple implementation of the generation of one clip, to check runs that have no stored reference values.

It uses only the class of requests from the package. The autoencoder adds no noise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest
from tests.models.sa3 import plain_networks as nets


@dataclass(frozen=True)
class PlainModel:
    """A model for `PlainRun`. `prompts` maps a text to its encoded, padded tokens (tokens, width) and their mask."""

    config: dict[str, Any]
    weights: nets.Weights
    prompts: dict[str, tuple[Tensor, Tensor]]

    @property
    def diffusion(self) -> dict[str, Any]:
        return self.config["model"]["diffusion"]

    @property
    def autoencoder(self) -> dict[str, Any]:
        return self.config["model"]["pretransform"]["config"]

    def number(self, seconds: float) -> Tensor:
        stated = self.config["model"]["conditioning"]["configs"][1]["config"]
        low, high = stated["min_val"], stated["max_val"]
        value = (min(max(seconds, low), high) - low) / (high - low)
        prefix = "conditioner.conditioners.seconds_total.embedder.embedding.1"
        features = nets.fourier(torch.tensor([value]), self.weights[f"{prefix}.weight"].shape[1])
        return nets.linear(self.weights, prefix, features)


@dataclass(frozen=True)
class Lengths:
    frames: int
    valid: int
    effective: int
    samples: int


def measure(model: PlainModel, duration_s: float, padding_s: float) -> Lengths:
    rate, hop = model.config["sample_rate"], model.autoencoder["downsampling_ratio"]
    encoder = model.autoencoder["encoder"]["config"]
    unit = hop * (encoder.get("chunk_size", 32) // encoder["strides"][0])
    wanted = math.ceil(int((duration_s + padding_s) * rate) / unit) * unit
    frames = min(wanted, model.config["sample_size"]) // hop
    effective = math.ceil(int(duration_s * rate) / hop)
    valid = min(effective + int(padding_s * rate / hop), frames)
    return Lengths(frames, valid, effective, min(int(duration_s * rate), frames * hop))


def make_schedule(options: dict[str, Any] | None, steps: int, length: float, sigma_max: float) -> list[float]:
    """Returns the noise levels of the steps. Each level is computed separately in float64."""
    options = {"type": "logsnr", "rate": 0.0} if options is None else {"type": "full", **options}
    low, high = options.get("min_length", 256), options.get("max_length", 4096)
    clamped = min(max(length, low), high)

    def warp(u: float) -> float:
        match options["type"]:
            case "logsnr":
                rate = options.get("rate", 1.0)
                start = options.get("anchor_logsnr", -6.2) - rate * math.log2(
                    length / options.get("anchor_length", 2000)
                )
                end = options.get("logsnr_end", 2.0)
                return u if u in (0.0, 1.0) else 1 / (1 + math.exp(end - u * (end - start)))
            case "flux":
                share = (math.log(clamped) - math.log(low)) / (math.log(high) - math.log(low))
                edges = math.log(options["alpha_min"]), math.log(options["alpha_max"])
                alpha = math.exp(edges[0] + share * (edges[1] - edges[0]))
                return alpha * u / (1 + (alpha - 1) * u)
            case "full":
                base, most = options.get("base_shift", 0.5), options.get("max_shift", 1.15)
                mu = -(base + (most - base) * (clamped - low) / (high - low))
                t = 1.0 if u == 1 else 1 - math.exp(mu) / (math.exp(mu) + u / (1 - u))
                return math.sin(math.pi * t / 2) if options.get("use_sine") else t
            case _:
                return u

    return [sigma_max, *(warp(sigma_max * (1 - i / steps)) for i in range(1, steps + 1))]


def make_even_schedule(steps: int, level: float) -> list[float]:
    """Returns noise levels whose odds (x / (1 - x)) form a geometric series, from `level` down to `level` / (1 + e^2).

    The last level is 0.
    """
    odds, last = level / (1 - level), 1 / ((1 + math.exp(2)) / level - 1)
    row = [odds * (last / odds) ** (i / steps) for i in range(1, steps)]
    return [level, *(x / (1 + x) for x in row), 0.0]


class PlainRun:
    """Runs a request for one clip. The latent noise is drawn as in the reference code; the autoencoder adds none."""

    def __init__(self, model: PlainModel, request: GenerationRequest, *, padding_s: float) -> None:
        self.model, self.request = model, request
        self.length = measure(model, request.duration_s, padding_s)
        self.generator = torch.Generator().manual_seed(request.seed)
        self.channels = model.config["model"]["io_channels"]
        seconds = model.number(request.duration_s)
        tokens, _ = model.prompts[request.prompt]
        self.context = torch.cat([tokens, seconds])
        self.away = None
        if request.negative_prompt is not None:
            tokens, real = model.prompts[request.negative_prompt]
            self.away = torch.cat([tokens * real[:, None], seconds])
        self.glob = seconds[0]
        self.local = self._local()

    def _clip(self, samples: np.ndarray) -> Tensor:
        total = self.length.frames * self.model.autoencoder["downsampling_ratio"]
        padded = np.zeros((len(samples), total), np.float32)
        padded[:, : samples.shape[1]] = samples[:, :total]
        weights = nets.below(self.model.weights, "pretransform.model.")
        return nets.encode(weights, self.model.autoencoder, torch.from_numpy(padded))[:, : self.length.frames]

    def _local(self) -> Tensor:
        local = torch.zeros(1 + self.channels, self.length.frames)
        if self.request.inpaint_audio is not None:
            latents = self._clip(self.request.inpaint_audio.samples)
            rate, hop = self.model.config["sample_rate"], self.model.autoencoder["downsampling_ratio"]
            for frame in range(self.length.frames):
                inside = any(int(a * rate) <= frame * hop < int(b * rate) for a, b in self.request.inpaint_regions_s)
                if not inside and frame * hop < int(self.request.duration_s * rate):
                    local[:, frame] = torch.cat([torch.ones(1), latents[:, frame]])
        return local

    def draw(self) -> Tensor:
        return torch.randn(self.channels, self.length.frames, generator=self.generator)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Returns the network's velocity at every frame. Padding frames are not keys in attention."""
        request, valid = self.request, self.length.valid
        weights = nets.below(self.model.weights, "model.model.")

        def branch(context: Tensor | None) -> Tensor:
            return nets.denoise(
                weights, self.model.diffusion["config"], x, t,
                context=context, glob=self.glob, local=self.local, num_valid=valid,
            )  # fmt: skip

        cond = branch(self.context)
        cfg = request.cfg_scale
        if cfg == 1.0 or not request.cfg_interval[0] <= t <= request.cfg_interval[1]:
            return cond
        mask = (torch.arange(x.shape[1]) < valid).float()
        clean = x - t * cond
        delta = clean - (x - t * branch(self.away))
        if request.cfg_norm_threshold > 0:
            delta = delta * min(1.0, request.cfg_norm_threshold / float((delta * mask).norm()))
        unit = clean * mask / (clean * mask).norm()
        across = (delta - (delta * unit).sum() * unit) * mask
        apg_scale = 1.0 if request.apg_scale is None else request.apg_scale
        delta = apg_scale * across + (1 - apg_scale) * delta
        guided = (x - (clean + (cfg - 1) * delta)) / t
        if phi := request.cfg_rescale:
            guided = phi * guided * cond.std(0) / guided.std(0) + (1 - phi) * guided
        return guided

    def sample(self) -> Tensor:
        """Run the sampler. Returns the latents (channels, frames)."""
        request = self.request
        sigma_max = request.init_noise_level if request.init_audio is not None else 1.0
        options = self.model.diffusion.get("sampling_distribution_shift_options")
        own = self.length.effective
        steps = request.steps or 8
        if request.edit_schedule == "reference" or sigma_max == 1.0:
            times = make_schedule(options, steps, own, sigma_max)
        elif request.edit_schedule == "scaled":
            times = [time * sigma_max for time in make_schedule(options, steps, own, 1.0)]
        else:
            times = make_even_schedule(steps, sigma_max)
        x = self.draw()
        if request.init_audio is not None:
            x = (1 - sigma_max) * self._clip(request.init_audio.samples) + sigma_max * x
        objective = self.model.diffusion["diffusion_objective"]
        sampler = request.sampler or {"rf_denoiser": "pingpong", "rectified_flow": "euler"}[objective]
        return {"euler": self._euler, "pingpong": self._pingpong, "rk4": self._rk4, "dpmpp": self._dpmpp}[sampler](
            x, times
        )

    def _euler(self, x: Tensor, times: list[float]) -> Tensor:
        for t, s in itertools.pairwise(times):
            x = x + (s - t) * self.velocity(x, t)
        return x

    def _pingpong(self, x: Tensor, times: list[float]) -> Tensor:
        for t, s in itertools.pairwise(times):
            x = (1 - s) * (x - t * self.velocity(x, t)) + s * self.draw()
        return x

    def _rk4(self, x: Tensor, times: list[float]) -> Tensor:
        for t, s in itertools.pairwise(times):
            dt = s - t
            k1 = self.velocity(x, t)
            k2 = self.velocity(x + dt / 2 * k1, t + dt / 2)
            k3 = self.velocity(x + dt / 2 * k2, t + dt / 2)
            k4 = self.velocity(x + dt * k3, max(t + dt, 1e-5))
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def _dpmpp(self, x: Tensor, times: list[float]) -> Tensor:
        def snr(t: float) -> float:
            return math.log(max(1 - t, 1e-10) / max(t, 1e-10))

        last: tuple[float, Tensor] | None = None
        for t, s in itertools.pairwise(times):
            clean = estimate = x - t * self.velocity(x, t)
            if last is not None and s > 0:
                ratio = (snr(t) - snr(last[0])) / (snr(s) - snr(t))
                estimate = (1 + 1 / (2 * ratio)) * clean - 1 / (2 * ratio) * last[1]
            x = s / t * x - (1 - s) * (s - t) / (max(1 - s, 1e-10) * max(t, 1e-10)) * estimate
            last = (t, clean)
        return x

    def audio(self) -> np.ndarray:
        """Returns the audio (channels, samples) as float32 in -1..1, with the requested duration."""
        weights = nets.below(self.model.weights, "pretransform.model.")
        audio = nets.decode(weights, self.model.autoencoder, self.sample())
        valid = self.length.valid * self.model.autoencoder["downsampling_ratio"]
        audio[:, valid:] = 0
        return audio[:, : self.length.samples].clamp(-1, 1).numpy()
