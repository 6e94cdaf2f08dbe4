"""Compares the transformer and the Oobleck autoencoder with stored forward passes."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stable_audio_serve.models.sao.denoiser import DenoiserConditioning
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.oobleck import NormedConv, OobleckAutoencoder
from stable_audio_serve.models.windows import chunked_windows
from stable_audio_serve.sampling import Guidance, GuidanceBatch, guide
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report

_GUIDED = re.compile(r"dit/out_cfg(?P<cfg>\d+)(?:_(?P<kind>negative|phi|interval_off|interval_swapped))?")
_PHI = 0.7
_INPUTS = ("x", "t", "negative_cross_attn_cond", "negative_cross_attn_mask")
_SEED = re.compile(r"ae/encode_seed(?P<seed>\d+)")
_CHUNKED = re.compile(r"ae/long_decode_chunked_(?P<size>\d+)_(?P<overlap>\d+)")
_STAGE = re.compile(r"ae/encoder_stage(?P<index>\d+)")
_AE_INPUTS = ("wave", "z", "long_z")


class _Pass:
    """The stored inputs of one forward pass of all rows."""

    def __init__(self, goldens: Goldens, model: SaoModel) -> None:
        self._net = model.denoiser
        self.x, self.t = goldens["dit/x"], goldens["dit/t"]
        self.context, self.global_cond = goldens["cond/inputs_cross_attn_cond"], goldens["cond/inputs_global_cond"]
        self.wanted = self._net.condition(self.context, self.global_cond)
        self._negative = goldens.find("dit/negative_cross_attn_cond")

    @property
    def negative(self) -> DenoiserConditioning:
        """The negative prompt's branch: its own context, the row's global vector."""
        if self._negative is None:
            raise ValueError("no negative context is stored")
        return self._net.condition(self._negative, self.global_cond)

    def run(self, conditioning: DenoiserConditioning) -> Tensor:
        return self._net(self.x, self.t, conditioning=conditioning)

    def guided(self, cfg_scale: float, *, other: DenoiserConditioning, phi: float = 0.0) -> Tensor:
        rows = GuidanceBatch.of([Guidance(cfg_scale=cfg_scale, apg_scale=0.0, rescale=phi)] * len(self.x))
        return guide(
            self.x, self.t, conditional=self.run(self.wanted), unconditional=self.run(other), valid=None, rows=rows
        )


def compare_denoiser(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare every tensor below dit/ that is an output."""
    inputs, net = _Pass(goldens, model), model.denoiser
    for name in _INPUTS:
        goldens.mark(f"dit/{name}")
    hidden: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: hidden.append(call[2])) for layer in net.transformer.layers]
    plain = inputs.run(inputs.wanted)
    for handle in handles:
        handle.remove()
    found: dict[str, tuple[Component, Callable[[], Tensor]]] = {
        "dit/out": ("denoiser", lambda: plain),
        "dit/hidden": ("denoiser", lambda: torch.stack(hidden)),
        "dit/timestep_features": ("denoiser time features", lambda: net.timestep_features(inputs.t)),
        "dit/timestep_embed": ("denoiser", lambda: net.embed_time(inputs.t)),
        "dit/global_embed": ("denoiser", lambda: inputs.wanted.global_embed),
        "dit/cond_embed": ("denoiser", lambda: net.to_cond_embed(inputs.context)),
    }
    for key, (component, make) in found.items():
        with report.guard("denoiser", key):
            if (stored := goldens.find(key)) is not None:
                report.compare(component, key, actual=make(), expected=stored)
    report.compare("denoiser padding", "dit/out padded", actual=_padded(inputs, model), expected=plain)
    for name in goldens.names("dit/"):
        key = f"dit/{name}"
        if match := _GUIDED.fullmatch(key):
            with report.guard("denoiser guidance", key):
                _compare_guided(report, goldens, key=key, match=match, inputs=inputs, model=model)


def _padded(inputs: _Pass, model: SaoModel) -> Tensor:
    """Returns the plain output, computed beside frames that are not valid."""
    frames = inputs.x.shape[-1]
    x = torch.cat([inputs.x, torch.full_like(inputs.x, 5.0)], dim=-1)
    valid = (torch.arange(2 * frames) < frames).expand(len(x), -1)
    return model.denoiser(x, inputs.t, conditioning=inputs.wanted, valid=valid)[..., :frames]


def _compare_guided(
    report: Report, goldens: Goldens, *, key: str, match: re.Match[str], inputs: _Pass, model: SaoModel
) -> None:
    """Compare a guided output, whose name says scale, branch, rescale and interval."""
    cfg_scale, kind = float(match["cfg"]), match["kind"] or ""
    stored, other = goldens[key], inputs.wanted.without_context()
    if kind == "negative":
        other = inputs.negative
    if cfg_scale == 1.0:
        report.compare("denoiser guidance", key, actual=inputs.run(inputs.wanted), expected=stored)
        return
    guided = inputs.guided(cfg_scale, other=other, phi=_PHI if kind == "phi" else 0.0)
    if not kind.startswith("interval"):
        report.compare("denoiser guidance", key, actual=guided, expected=stored)
        return
    # Row 0 decides for all rows of the reference: outside the interval in one run, inside in the other.
    found = inputs.run(inputs.wanted) if kind == "interval_off" else guided.flip(0)
    report.compare("denoiser guidance", key, actual=found, expected=stored)


def compare_autoencoder(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare every tensor below ae/ that is an output."""
    net = model.autoencoder
    for name in _AE_INPUTS:
        goldens.mark(f"ae/{name}")
    stages: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: stages.append(call[2])) for layer in net.encoder.layers]
    encoded = net.encoder(goldens["ae/wave"])
    for handle in handles:
        handle.remove()
    upsample = goldens.section("ae").get("first_upsample_module", "decoder.layers.1.layers.1")
    found: dict[str, Callable[[], Tensor]] = {
        "ae/encoder_out": lambda: encoded,
        "ae/decode": lambda: net.decode(goldens["ae/z"]),
        "ae/long_decode": lambda: net.decode(goldens["ae/long_z"]),
        "ae/resolved_first_conv": lambda: _kernel(net.encoder.layers[0]),
        "ae/resolved_first_upsample": lambda: _kernel(net.get_submodule(upsample)),
    }
    for name in goldens.names("ae/"):
        key = f"ae/{name}"
        if match := _STAGE.fullmatch(key):
            found[key] = lambda match=match: stages[int(match["index"])]  # type: ignore[misc]
        elif match := _SEED.fullmatch(key):
            found[key] = lambda match=match: _encode_seeded(net, goldens, seed=int(match["seed"]))  # type: ignore[misc]
        elif match := _CHUNKED.fullmatch(key):
            found[key] = lambda match=match: _decode_chunked(  # type: ignore[misc]
                net, goldens["ae/long_z"], size=int(match["size"]), overlap=int(match["overlap"])
            )
    for key, make in found.items():
        with report.guard("autoencoder", key):
            if (stored := goldens.find(key)) is not None:
                report.compare("autoencoder", key, actual=make(), expected=stored)


def _kernel(module: nn.Module) -> Tensor:
    if not isinstance(module, NormedConv):
        raise TypeError("is no convolution of the reference's kind")
    return module.kernel()


def _encode_seeded(net: OobleckAutoencoder, goldens: Goldens, *, seed: int) -> Tensor:
    shape = (len(goldens["ae/wave"]), net.config.latent_channels, goldens["ae/wave"].shape[-1] // net.config.hop)
    return net.encode(goldens["ae/wave"], torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def _decode_chunked(net: OobleckAutoencoder, latents: Tensor, *, size: int, overlap: int) -> Tensor:
    hop, parts = net.config.hop, []
    for span in chunked_windows(latents.shape[-1], size=size, overlap=overlap):
        audio = net.decode(latents[..., span.start : span.stop])
        parts.append(audio[..., (span.keep_start - span.start) * hop : (span.keep_stop - span.start) * hop])
    return torch.cat(parts, dim=-1)
