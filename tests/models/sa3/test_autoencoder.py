"""The autoencoder of Stable Audio 3 (SAME) matches reference values, with and without noise, whole and in windows."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, WindowRule, WindowSpan
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.same import SameLayer, WeightNormConv
from stable_audio_serve.models.windows import audible_windows, chunked_windows
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise, SeededNoise
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import FAMILY, assert_near, loaded

SEEDED = 2e-5


def quiet(name: str) -> float:
    return 1e-4 if name in SHARP else 2e-5


def g(name: str, key: str) -> Tensor:
    return load_goldens(name).tensors[f"ae/{key}"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def decode_in_windows(name: str, latents: Tensor, spans: tuple[WindowSpan, ...]) -> Tensor:
    hop, ae = loaded(name).spec.hop, loaded(name).autoencoder
    out = torch.full((ae.channels, latents.shape[-1] * hop), torch.nan)
    for span in spans:
        audio = ae.decode(latents[..., span.start : span.stop])[0]
        offset = span.start * hop
        out[:, span.keep_start * hop : span.keep_stop * hop] = audio[
            :, span.keep_start * hop - offset : span.keep_stop * hop - offset
        ]
    return out


@pytest.mark.parametrize("name", FAMILY)
def test_encoding_stage_by_stage(name: str) -> None:
    ae = loaded(name).autoencoder
    assert torch.equal(ae.pretransform.encode(g(name, "audio")), g(name, "patched"))
    assert_near(ae.encoder(g(name, "patched"), None), g(name, "encoder_out_quiet"), within=quiet(name))
    assert_near(ae.encode(g(name, "audio")), g(name, "encode_quiet"), within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
def test_decoding_stage_by_stage(name: str) -> None:
    ae = loaded(name).autoencoder
    frames = ae.decoder(ae.bottleneck.decode(g(name, "latents"), None), None)
    assert_near(frames, g(name, "decoder_out_quiet"), within=quiet(name))
    assert_near(ae.decode(g(name, "latents")), g(name, "decode_quiet"), within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
def test_batched_and_odd_lengths(name: str) -> None:
    ae = loaded(name).autoencoder
    assert_near(ae.decode(g(name, "latents_b2")), g(name, "decode_b2_quiet"), within=quiet(name))
    assert_near(ae.decode(g(name, "latents_odd")), g(name, "decode_odd_quiet"), within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("clip", ["odd", "mono"])
def test_clips_of_any_shape(name: str, clip: str) -> None:
    spec = loaded(name).spec
    samples = np.atleast_2d(g(name, f"{clip}_audio").numpy())
    whole = -(-samples.shape[-1] // spec.hop) * spec.hop
    prepared = prepare_source(
        SourceAudio(samples, spec.card.sample_rate_hz),
        sample_rate_hz=spec.card.sample_rate_hz,
        channels=spec.card.channels,
        num_samples=whole,
    )
    if clip == "odd":
        assert torch.equal(prepared[None], g(name, "odd_preprocessed"))
    expected = g(name, f"{clip}_encode_quiet")
    assert_near(loaded(name).autoencoder.encode(prepared[None]), expected, within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
def test_windows_decode_as_in_the_reference(name: str) -> None:
    latents = g(name, "latents_long")
    frames = latents.shape[-1]
    assert_near(loaded(name).autoencoder.decode(latents), g(name, "decode_long_full_quiet"), within=quiet(name))
    for spans, key in (
        (chunked_windows(frames), "decode_long_c128_o32_quiet"),
        (chunked_windows(frames, size=32, overlap=8), "decode_long_c32_o8_quiet"),
    ):
        assert_near(decode_in_windows(name, latents, spans)[None], g(name, key), within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
def test_windows_encode_as_in_the_reference(name: str) -> None:
    audio, hop, ae = g(name, "audio_long"), loaded(name).spec.hop, loaded(name).autoencoder
    frames = audio.shape[-1] // hop
    assert_near(ae.encode(audio), g(name, "encode_long_full_quiet"), within=quiet(name))
    for spans, key in (
        (chunked_windows(frames), "encode_long_c128_o32_quiet"),
        (chunked_windows(frames, size=32, overlap=8), "encode_long_c32_o8_quiet"),
    ):
        parts = []
        for span in spans:
            latents = ae.encode(audio[..., span.start * hop : span.stop * hop])
            parts.append(latents[..., span.keep_start - span.start : span.keep_stop - span.start])
        assert_near(torch.cat(parts, dim=-1), g(name, key), within=quiet(name))


@pytest.mark.parametrize("name", FAMILY)
def test_noise_of_a_seeded_reference_run(name: str) -> None:
    model, latents = loaded(name), g(name, "latents_long")
    width = model.autoencoder.decoder.layers["3"].config.width
    stride = model.autoencoder.decoder.frames_per_latent
    spans = chunked_windows(latents.shape[-1])
    script = [
        ReplayDraw(f"decode/{draw}", span.start, shape)
        for span in spans
        for draw, shape in (
            ("bottleneck", (1, model.spec.card.latent_channels, 128)),
            ("tokens", (128, stride, width)),
        )
    ]
    noise = ReplayNoise(21, script, num_rows=1).row(0)
    windows = [DecodeWindow(latents[0, :, s.start : s.stop], s.start, noise) for s in spans]
    parts = [
        audio[:, (span.keep_start - span.start) * model.spec.hop : (span.keep_stop - span.start) * model.spec.hop]
        for span, audio in zip(spans, model.decode(windows), strict=True)
    ]
    assert_near(torch.cat(parts, dim=-1)[None], g(name, "decode_long_c128_o32_seed21"), within=SEEDED)


@pytest.mark.parametrize("name", FAMILY)
def test_noise_of_a_single_call(name: str) -> None:
    model, latents = loaded(name), g(name, "latents")
    draws = [g(name, f"decode_seed9_draw_{i}") for i in range(2)]
    script = [
        ReplayDraw(f"decode/{n}", 0, tuple(d.shape)) for n, d in zip(("bottleneck", "tokens"), draws, strict=True)
    ]
    noise = ReplayNoise(9, script, num_rows=1)
    (audio,) = model.decode([DecodeWindow(latents[0], 0, noise.row(0))])
    assert torch.equal(noise.draw("decode/tokens", 0), draws[1])
    assert_near(audio[None], g(name, "decode_seed9"), within=SEEDED)


@pytest.mark.parametrize("name", SHARP)
def test_encoding_draws_noise_only_if_configured(name: str) -> None:
    model, audio = loaded(name), g(name, "audio")
    width = model.autoencoder.encoder.layers["0"].config.width
    frames = audio.shape[-1] // model.spec.hop
    noise = ReplayNoise(9, [ReplayDraw("init/tokens", 0, (frames, 1, width))], num_rows=1).row(0)
    (latents,) = model.encode_audio([EncodeWindow(audio[0], 0, "init", noise)])
    assert_near(latents[None], g(name, "encode_seed9"), within=quiet(name))


@pytest.mark.parametrize("name", SHARP)
def test_windows_of_different_rows_are_independent(name: str) -> None:
    model, latents = loaded(name), g(name, "latents_long")[0]
    cuts = ((0, 32), (64, 96), (10, 42), (96, 128), (32, 64))
    windows = [DecodeWindow(latents[:, a:b], a, SeededNoise(seed)) for seed, (a, b) in enumerate(cuts)]
    together = model.decode(windows)
    for seed, (window, (a, _)) in enumerate(zip(windows, cuts, strict=True)):
        (alone,) = model.decode([DecodeWindow(window.latents, a, SeededNoise(seed))])
        assert_near(together[seed], alone, within=1e-5)
        assert alone.shape == (model.spec.card.channels, window.latents.shape[-1] * model.spec.hop)


@pytest.mark.parametrize("name", FAMILY)
def test_halo_covers_the_receptive_field(name: str) -> None:
    model, latents = loaded(name), g(name, "latents_long")
    halo, multiple = model.autoencoder.decoder_halo_latents, model.autoencoder.latent_multiple
    start, stop = 40 // multiple * multiple, 80 // multiple * multiple
    changed = latents.clone()
    changed[..., : start - halo] += 1.0
    changed[..., stop + halo :] -= 1.0
    hop = model.spec.hop
    before, after = (model.autoencoder.decode(z)[..., start * hop : stop * hop] for z in (latents, changed))
    assert_near(after, before, within=1e-6)


@pytest.mark.parametrize(("encoder_chunk", "decoder_chunk"), [(3, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_any_chunks_join_to_the_whole(encoder_chunk: int, decoder_chunk: int, shifted: bool) -> None:
    values = json.loads((load_goldens("sharp-s").folder / "model_config.json").read_text())["model"]["pretransform"]
    for part, chunk in (("encoder", encoder_chunk), ("decoder", decoder_chunk)):
        config = values["config"][part]["config"]
        config |= {"strides": [3], "chunk_size": 3 * chunk, "chunk_midpoint_shift": shifted, "conv_mapping": False}
    values["config"]["downsampling_ratio"] = 3 * values["config"]["pretransform"]["config"]["patch_size"]
    torch.manual_seed(1)
    net = AudioAutoencoder(ConfigReader(values["config"]))
    latents = torch.randn(1, net.latent_channels, 360)
    whole = net.decode(latents)[0]
    for num_audible in (7, 16, 31, 200, 350):
        rule = WindowRule(net.decoder_halo_latents, net.latent_multiple)
        for span in audible_windows(latents.shape[-1], num_audible=num_audible, rule=rule):
            audio, offset = net.decode(latents[..., span.start : span.stop])[0], span.start * net.hop
            start, stop = span.keep_start * net.hop, min(span.keep_stop, num_audible) * net.hop
            assert_near(audio[:, start - offset : stop - offset], whole[:, start:stop], within=2e-6)


def make_net(**values: Any) -> AudioAutoencoder:
    """Returns an autoencoder like the one of `sharp-s`, with random weights and `values` in both coders' configs."""
    config = json.loads((load_goldens("sharp-s").folder / "model_config.json").read_text())["model"]["pretransform"]
    for part in ("encoder", "decoder"):
        config["config"][part]["config"] |= values
    torch.manual_seed(1)
    return AudioAutoencoder(ConfigReader(config["config"]))


def test_frames_of_the_transformers_width_are_not_mapped() -> None:
    width = loaded("sharp-s").autoencoder.encoder.layers["0"].mapping.weight_v.shape[1]
    net = make_net(channels=width, c_mults=[1], dim_heads=width)
    net.resolve()
    assert not [key for key in net.state_dict() if "mapping" in key]
    audio, latents = torch.randn(1, net.channels, 8 * net.hop), torch.randn(1, net.latent_channels, 8)
    results = net.encode(audio), net.decode(latents)
    kernel = {"weight_v": torch.eye(width)[..., None], "weight_g": torch.ones(width, 1, 1), "bias": torch.zeros(width)}
    for block in (net.encoder.layers["0"], net.decoder.layers["3"]):
        block.mapping = WeightNormConv(width, width, kernel=1)
        block.mapping.load_state_dict(kernel)
    assert_near(net.encode(audio), results[0], within=1e-6)
    assert_near(net.decode(latents), results[1], within=1e-6)


def test_heads_are_not_wider_than_the_transformer() -> None:
    expected, net = make_net(channels=24, c_mults=[1], dim_heads=24), make_net(channels=24, c_mults=[1], dim_heads=128)
    latents = torch.randn(1, net.latent_channels, 4)
    assert torch.equal(net.decode(latents), expected.decode(latents))


@pytest.mark.parametrize("name", FAMILY)
def test_folding_norms_into_linear_layers_changes_nothing(name: str) -> None:
    net = copy.deepcopy(loaded(name).autoencoder)
    layers = [module for module in net.modules() if isinstance(module, SameLayer)]
    for layer in layers:
        layer.fold_norms()
        layer.fold_norms()  # a second call changes nothing
    assert layers
    assert_near(net.decode(g(name, "latents")), g(name, "decode_quiet"), within=quiet(name))
    assert_near(net.encode(g(name, "audio")), g(name, "encode_quiet"), within=quiet(name))


@pytest.mark.parametrize("name", SHARP)
def test_every_layer_uses_its_stored_frequencies(name: str) -> None:
    net = copy.deepcopy(loaded(name).autoencoder)
    latents = g(name, "latents")
    before = net.decode(latents)
    layer = net.decoder.layers["3"].transformers[-1]
    layer.rope.inv_freq.mul_(1.5)
    net.resolve()
    assert (net.decode(latents) - before).abs().max() > 1e-4
