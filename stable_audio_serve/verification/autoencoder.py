"""Checks of the autoencoders: stored encodings and decodings, and outputs of modules.

Stored runs are with or without noise, in one piece or in windows. A further check compares long audio coded in windows
with the same audio coded in one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, WindowSpan
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.windows import WINDOW_FRAMES, chunked_windows, cut_windows, whole_window
from stable_audio_serve.sampling import SeededNoise
from stable_audio_serve.verification.checks import Check, Finding, Subject
from stable_audio_serve.verification.denoiser import watch
from stable_audio_serve.verification.runs import RowNoise

_Code = Callable[[Tensor, int], Tensor]  # encode or decode: part of the input, index of its first frame -> output
_RUN = (
    r"ae/(?P<way>encode|decode)(?:_(?P<input>[a-z0-9]+))??(?:_full|_c(?P<size>\d+)_o(?P<overlap>\d+))?"
    r"_(?:quiet|seed(?P<seed>\d+))"
)


class CallOrderNoise(SeededNoise):
    """Noise whose draws for windows follow the order of the calls, as in the reference."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[Tensor] = []

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        self.drawn.append(self.step(shape))
        return self.drawn[-1].to(device)


def join_windows(spans: Sequence[WindowSpan], run: Callable[[WindowSpan], Tensor], *, unit: int) -> Tensor:
    """Returns the kept parts of the windows' results, joined. `unit` is the number of values per frame, last axis."""
    kept = [slice((span.keep_start - span.start) * unit, (span.keep_stop - span.start) * unit) for span in spans]
    return torch.cat([run(span)[..., part] for span, part in zip(spans, kept, strict=True)], dim=-1)


def _run(it: Subject, match: re.Match[str]) -> tuple[Tensor, list[Tensor]]:
    """Encode or decode a stored input as its key describes. Returns the output and the random draws."""
    net, decodes = it.model.autoencoder, match["way"] == "decode"
    value = it.goldens["_".join(("ae/latents" if decodes else "ae/audio", *filter(None, [match["input"]])))]
    noise = CallOrderNoise(int(match["seed"] or 0))
    if match["seed"] and len(value) > 1:
        raise ValueError("seeded noise is only known for a batch of one")
    unit_in, unit_out = (1, net.hop) if decodes else (net.hop, 1)

    def run(span: WindowSpan) -> Tensor:
        cut = _cut(value, span, unit=unit_in)
        drawn = [WindowNoise(noise, match["way"], span.start)] if match["seed"] else None
        return net.decode(cut, drawn) if decodes else net.encode(cut, drawn)

    frames = -(-value.shape[-1] // unit_in)
    if match["size"] is None:
        return run(whole_window(frames)[0]), noise.drawn
    spans = chunked_windows(frames, size=int(match["size"]), overlap=int(match["overlap"]))
    return join_windows(spans, run, unit=unit_out), noise.drawn


def _draw(it: Subject, match: re.Match[str]) -> Tensor:
    return _run(it, match)[1][int(match["draw"])].reshape(it.goldens[match[0]].shape)


def _clip(it: Subject, match: re.Match[str]) -> Tensor:
    """Returns a clip (1, C, S) with the model's channels, zero-padded at the end to whole latents.

    Returns the clip's encoding unless "preprocessed" was asked for.
    """
    net, samples = it.model.autoencoder, torch.atleast_2d(it.goldens[f"ae/{match[1]}_audio"])
    rate_hz, num_samples = it.model.spec.card.sample_rate_hz, -(-samples.shape[-1] // net.hop) * net.hop
    source = SourceAudio(samples.numpy(), rate_hz)
    clip = prepare_source(source, sample_rate_hz=rate_hz, channels=net.channels, num_samples=num_samples)[None]
    return clip if match[2] == "preprocessed" else net.encode(clip)


def _inside(it: Subject, path: str) -> tuple[Tensor, Tensor]:
    """Returns the input and the output of a module of the autoencoder in a run without noise."""
    net, wave = it.model.autoencoder, it.goldens.find("ae/wave")
    if wave is not None:
        run = partial(net.encoder, wave)
    elif path.startswith("decoder"):
        run = partial(net.decode, it.goldens["ae/latents"])
    else:
        run = partial(net.encode, it.goldens["ae/audio"])
    return watch([net.get_submodule(path)], run)[0][0]


def _open_decode(it: Subject, match: re.Match[str]) -> Tensor:
    net, latents = it.model.autoencoder, it.goldens[f"ae/{match[1] or ''}z"]
    spans = whole_window(latents.shape[-1])
    if match[2]:
        spans = chunked_windows(latents.shape[-1], size=int(match[2]), overlap=int(match[3]))
    return join_windows(spans, lambda span: net.decode(_cut(latents, span, unit=1)), unit=net.config.hop)


def _open_encode(it: Subject, match: re.Match[str]) -> Tensor:
    net, wave = it.model.autoencoder, it.goldens["ae/wave"]
    shape = (len(wave), net.config.latent_channels, wave.shape[-1] // net.config.hop)
    return net.encode(wave, torch.randn(shape, generator=torch.Generator().manual_seed(int(match[1]))))


def _kernel(it: Subject, match: re.Match[str]) -> Tensor:
    path = "encoder.layers.0" if match[1] == "conv" else it.goldens.facts["ae"]["first_upsample_module"]
    return it.model.autoencoder.get_submodule(path).kernel()


def _windows(it: Subject, _: object) -> Iterator[Finding]:
    """Compare long audio coded in windows with the same audio coded in one piece.

    The windows are the ones that the engine uses while other requests wait. Encoding is compared only for Stable Audio
    Open, where windows are exact. Each window takes its part of one noise draw over all frames.
    """
    model, hop, rate_hz = it.model, it.model.spec.hop, it.model.spec.card.sample_rate_hz
    generator, frames = torch.Generator().manual_seed(0), 3 * WINDOW_FRAMES
    latents = torch.randn(model.spec.card.latent_channels, frames, generator=generator)
    audio = 0.3 * torch.randn(model.spec.card.channels, frames * hop, generator=generator)
    source = SourceAudio(audio.numpy(), rate_hz)
    request = GenerationRequest(prompt="", duration_s=frames * hop / rate_hz, seed=0, init_audio=source)
    plan, is_exact = model.plan(request, frames=frames)[0], isinstance(model, SaoModel)
    noise = RowNoise(SeededNoise(0), torch.randn(latents.shape, generator=generator) if is_exact else None)

    def decode(cut: Tensor, start: int) -> Tensor:
        return model.decode([DecodeWindow(cut, start, noise)])[0]

    def encode(cut: Tensor, start: int) -> Tensor:
        return model.encode_audio([EncodeWindow(cut, start, "init", noise)])[0]

    if plan.decode_rule is not None or is_exact:  # a config may ask for decoding in one piece
        spans = cut_windows(0, frames=frames, rule=plan.decode_rule, longest=WINDOW_FRAMES)
        yield _in_windows(decode, latents, spans=spans, units=(1, hop))
    if is_exact:
        yield _beyond_windows(decode, latents, spans=spans, units=(1, hop))
        yield _in_windows(encode, audio, spans=plan.init_source.windows, units=(hop, 1))
        yield _beyond_windows(encode, audio, spans=plan.init_source.windows, units=(hop, 1))


def _in_windows(code: _Code, value: Tensor, *, spans: Sequence[WindowSpan], units: tuple[int, int]) -> Finding:
    """Compare joined windows with one piece. `units` are the values per frame of input and output."""
    if len(spans) < 2:
        raise ValueError("long audio is one window")
    made = join_windows(spans, lambda span: code(_cut(value, span, unit=units[0]), span.start), unit=units[1])
    return Finding(f"{code.__name__} in {len(spans)} windows", made, code(value, 0))


def _beyond_windows(code: _Code, value: Tensor, *, spans: Sequence[WindowSpan], units: tuple[int, int]) -> Finding:
    """Check that kept frames depend only on their window: fill everything outside it with NaN, expect finite values."""

    def run(span: WindowSpan) -> Tensor:
        spoilt = torch.full_like(value, math.nan)
        _cut(spoilt, span, unit=units[0])[:] = _cut(value, span, unit=units[0])
        return _cut(code(spoilt, 0), span, unit=units[1])

    finite = join_windows(spans, run, unit=units[1]).isfinite().all()
    return Finding(f"{code.__name__} beyond {len(spans)} windows", finite, torch.tensor(True))


def _cut(value: Tensor, span: WindowSpan, *, unit: int) -> Tensor:
    return value[..., span.start * unit : span.stop * unit]


SA3_AUTOENCODER = (
    Check("inputs", "ae/((audio|latents)(_[a-z0-9]+)?|[a-z0-9]+_audio)", lambda *_: ()),
    Check("autoencoder", "ae/patched", lambda it, _: it.model.autoencoder.pretransform.encode(it.goldens["ae/audio"])),
    Check(
        "autoencoder", "ae/encoder_block_out_quiet", lambda it, _: _inside(it, "encoder.layers.2")[0].transpose(1, 2)
    ),
    Check("autoencoder", "ae/(encoder|decoder)_out_quiet", lambda it, match: _inside(it, match[1])[1]),
    Check("autoencoder", _RUN, lambda it, match: _run(it, match)[0]),
    Check("draws", _RUN + r"_draw_(?P<draw>\d+)", _draw),
    Check("autoencoder", "ae/([a-z0-9]+)_(encode_quiet|preprocessed)", _clip),
    Check("decoder halo", "windows", _windows, over="once"),
)
OPEN_AUTOENCODER = (
    Check("inputs", "ae/(wave|z|long_z)", lambda *_: ()),
    Check("autoencoder", "ae/encoder_out", lambda it, _: _inside(it, "encoder")[1]),
    Check("autoencoder", r"ae/encoder_stage(\d+)", lambda it, match: _inside(it, f"encoder.layers.{match[1]}")[1]),
    Check("autoencoder", r"ae/(long_)?decode(?:_chunked_(\d+)_(\d+))?", _open_decode),
    Check("autoencoder", r"ae/encode_seed(\d+)", _open_encode),
    Check("autoencoder", "ae/resolved_first_(conv|upsample)", _kernel),
    Check("decoder halo", "windows", _windows, over="once"),
)
