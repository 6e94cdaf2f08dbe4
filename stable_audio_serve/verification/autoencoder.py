"""Compares an audio autoencoder with stored encodings and decodings: quiet or seeded, whole or in windows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.models.parts import Noises, WindowNoise
from stable_audio_serve.models.protocol import WindowSpan
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.same import SameEncoder
from stable_audio_serve.models.windows import chunked_windows, whole_window
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report

PREFIX = "ae/"
_INPUT = re.compile(r"(?:audio|latents)(?:_[a-z0-9]+)?|[a-z0-9]+_audio")
_RUN = re.compile(
    r"(?P<way>encode|decode)(?:_(?P<input>(?!seed)[a-z0-9]+?))??(?:_(?P<window>full|c\d+_o\d+))?_(?P<noise>quiet|seed\d+)"
)
_CLIP = re.compile(r"(?P<input>[a-z0-9]+)_(?:encode_quiet|preprocessed)")
_DRAW = re.compile(r"(?P<run>\w+_seed(?P<seed>\d+))_draw_(?P<index>\d+)")


class CallOrderNoise:
    """Draws from one seeded generator in the order of the calls: one window after another, as the reference does."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn: list[Tensor] = []

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        self.drawn.append(torch.randn(shape, generator=self._generator))
        return self.drawn[-1]

    step = initial

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self.initial(shape).to(device)


def compare_autoencoder(report: Report, goldens: Goldens, *, net: AudioAutoencoder, sample_rate_hz: int) -> None:
    """Compare every tensor below ae/ that is an output, and windows with the whole."""
    with report.guard("decoder halo"):
        _compare_halo(report, net=net)
    for name in goldens.names(PREFIX):
        key = PREFIX + name
        with report.guard("autoencoder", key):
            if _INPUT.fullmatch(name):
                goldens.mark(key)
            elif name in _STAGES:
                report.compare("autoencoder", key, actual=_STAGES[name](net, goldens), expected=goldens[key])
            elif match := _DRAW.fullmatch(name):
                _compare_draw(report, goldens, net=net, match=match)
            elif match := _RUN.fullmatch(name):
                output, _ = _run(net, goldens, match=match)
                report.compare("autoencoder", key, actual=output, expected=goldens[key])
            elif match := _CLIP.fullmatch(name):
                clip = _prepare(net, goldens[f"{PREFIX}{match['input']}_audio"], sample_rate_hz=sample_rate_hz)
                output = clip if name.endswith("preprocessed") else net.encode(clip)
                report.compare("autoencoder", key, actual=output, expected=goldens[key])


def _compare_halo(report: Report, *, net: AudioAutoencoder) -> None:
    """Compare decoding in windows that have the decoder's halo beside them with decoding as a whole, without noise."""
    halo, multiple = net.decoder_halo_latents, net.latent_multiple
    kept = 3 * multiple
    frames = 2 * halo + 4 * kept
    latents = torch.randn(1, net.latent_channels, frames, generator=torch.Generator().manual_seed(0))
    whole = net.decode(latents)[..., : frames * net.hop]
    for first in range(0, frames, kept):
        start, stop, last = max(first - halo, 0), min(first + kept + halo, frames), min(first + kept, frames)
        window = net.decode(latents[..., start:stop])[..., (first - start) * net.hop : (last - start) * net.hop]
        expected = whole[..., first * net.hop : last * net.hop]
        report.compare("decoder halo", f"{halo} latents, window at {first}", actual=window, expected=expected)


def _encoder_block(net: AudioAutoencoder, goldens: Goldens) -> Tensor:
    """Returns the input of the encoder's last projection, (B, E, F)."""
    encoder = net.encoder
    if not isinstance(encoder, SameEncoder):
        raise TypeError("this encoder has no resampling block")
    seen: list[Tensor] = []
    handle = encoder.layers["2"].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    try:
        net.encode(goldens[PREFIX + "audio"])
    finally:
        handle.remove()
    return seen[0].transpose(1, 2)


_STAGES: dict[str, Callable[[AudioAutoencoder, Goldens], Tensor]] = {
    "patched": lambda net, goldens: net.pretransform.encode(goldens[PREFIX + "audio"]),
    "encoder_block_out_quiet": _encoder_block,
    "encoder_out_quiet": lambda net, goldens: net.encoder(net.pretransform.encode(goldens[PREFIX + "audio"]), None),
    "decoder_out_quiet": lambda net, goldens: net.decoder(
        net.bottleneck.decode(goldens[PREFIX + "latents"], None), None
    ),
}


def _run(net: AudioAutoencoder, goldens: Goldens, *, match: re.Match[str]) -> tuple[Tensor, CallOrderNoise | None]:
    """Encode or decode a stored input as the result's name says. Returns the noise that was used, too."""
    decoding = match["way"] == "decode"
    base = PREFIX + ("latents" if decoding else "audio")
    value = goldens[f"{base}_{match['input']}" if match["input"] else base]
    source = None if match["noise"] == "quiet" else CallOrderNoise(int(match["noise"].removeprefix("seed")))
    if source is not None and len(value) > 1:
        raise ValueError("seeded noise is only known for a batch of one")
    hop = net.hop
    num_frames = value.shape[-1] if decoding else -(-value.shape[-1] // hop)
    spans = _windows(match["window"], num_frames)
    if len(spans) == 1:
        return _window(net, value, source=source, start=0, decoding=decoding), source
    parts = []
    for span in spans:
        cut = value[..., span.start : span.stop] if decoding else value[..., span.start * hop : span.stop * hop]
        output = _window(net, cut, source=source, start=span.start, decoding=decoding)
        scale = hop if decoding else 1
        parts.append(output[..., (span.keep_start - span.start) * scale : (span.keep_stop - span.start) * scale])
    return torch.cat(parts, dim=-1), source


def _window(
    net: AudioAutoencoder, value: Tensor, *, source: CallOrderNoise | None, start: int, decoding: bool
) -> Tensor:
    stage = "decode" if decoding else "init"
    noise: Noises = None if source is None else [WindowNoise(source, stage, start)]
    return net.decode(value, noise) if decoding else net.encode(value, noise)


def _windows(name: str | None, num_frames: int) -> Sequence[WindowSpan]:
    """Returns the windows of a name like c128_o32 (latents, overlap), or one over everything."""
    if name is None or name == "full":
        return whole_window(num_frames)
    size, overlap = (int(part[1:]) for part in name.split("_"))
    return chunked_windows(num_frames, size=size, overlap=overlap)


def _compare_draw(report: Report, goldens: Goldens, *, net: AudioAutoencoder, match: re.Match[str]) -> None:
    """Compare a stored draw of a seeded run with what that run drew here."""
    key = PREFIX + match[0]
    run = _RUN.fullmatch(match["run"])
    if run is None:
        raise ValueError("belongs to no known run")
    _, source = _run(net, goldens, match=run)
    drawn = source.drawn if source is not None else []
    report.compare("draws", key, actual=drawn[int(match["index"])].reshape(goldens[key].shape), expected=goldens[key])


def _prepare(net: AudioAutoencoder, clip: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Returns the clip as (1, C, S): with the model's channels, right-padded to whole latents."""
    samples = torch.atleast_2d(clip)
    source = SourceAudio(samples.numpy(), sample_rate_hz)
    num_samples = -(-samples.shape[-1] // net.hop) * net.hop
    prepared = prepare_source(source, sample_rate_hz=sample_rate_hz, channels=net.channels, num_samples=num_samples)
    return prepared[None]
