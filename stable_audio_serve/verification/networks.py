"""Checks of the conditioners, the denoiser and the autoencoder: stored outputs of the networks.

Stored runs of the autoencoder are with or without noise, in one piece or in windows. A further check compares long
audio coded in windows with the same audio coded in one piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, WindowSpan
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.windows import WINDOW_FRAMES, chunked_windows, cut_windows, whole_window
from stable_audio_serve.sampling import Guidance, GuidanceBatch, SeededNoise, guide
from stable_audio_serve.verification.checks import Check, Finding, Subject
from stable_audio_serve.verification.runs import CallOrderNoise, RowNoise

_Code = Callable[[Tensor, int], Tensor]  # encode or decode: part of the input, index of its first frame -> output
_OPEN_PHI = 0.7  # for keys with `_phi` and no digits, as in the Stable Audio Open family


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that receives the first input and the output of each call of `module` inside the block."""
    calls: list[tuple[Tensor, Tensor]] = []
    with module.register_forward_hook(lambda _, given, made: calls.append((given[0].clone(), made.clone()))):
        yield calls


def _prompts(it: Subject) -> Any:
    return (it.goldens.section("components", "text") or it.goldens.section("cond_t5"))["prompts"]


def _ids_and_mask(it: Subject) -> list[Tensor]:
    """Returns ids and mask (B, T) of the stored prompts."""
    return list(it.model.text.tokenize(_prompts(it)).ids_and_mask.unbind(1))


def _text(it: Subject, _: object) -> Tensor:
    return torch.stack([embedding.tokens for embedding in it.model.encode_text(_prompts(it))])


def _exact_text(it: Subject, _: object) -> Tensor:
    """Encode the prompts with the encoder loaded in float32; the served model computes in float16."""
    text, (ids, mask) = it.model.text, _ids_and_mask(it)
    place = Path(str(text.encoder.config._name_or_path))
    exact = load_text_encoder(place, max_length=text.max_length, device=it.model.device, dtype=torch.float32)
    return it.model.prompt(exact.encode(ids, mask), mask.bool())


def _numbers(it: Subject, match: re.Match[str]) -> Tensor:
    """Embed the values in the facts. Some are outside the conditioner's range."""
    facts = it.goldens.section("components", "number")
    values = torch.tensor(facts["values"] if facts else it.goldens.facts["cond_number_values"], dtype=torch.float32)
    return it.model.numbers[match[1] or "seconds_total"](values)[:, None]


class _Pass:
    """One forward pass of all rows on the stored inputs x (B, D, F), t (B,) and local conditioning, None if absent."""

    def __init__(self, it: Subject) -> None:
        self.net, self._goldens = it.model.denoiser, it.goldens
        self._group = "dit/" if isinstance(it.model, Sa3Model) else "cond/inputs_"
        self.x, self.t = it.goldens["dit/x"], it.goldens["dit/t"]
        self.local = it.goldens.find("dit/local_add_cond")

    def condition(self, context: Tensor | None = None) -> Any:
        """Returns the conditioning of the stored context or of another (B, T, width)."""
        context = self._goldens[f"{self._group}cross_attn_cond"] if context is None else context
        local = {"local": self.local} if self._group == "dit/" else {}
        return self.net.condition(context, self._goldens[f"{self._group}global_cond"], **local)

    def run(self, conditioning: Any = None, *, valid: Tensor | None = None) -> Tensor:
        """Returns the output (B, D, F) for the stored conditioning or another."""
        return self.net(self.x, self.t, conditioning=conditioning or self.condition(), valid=valid)

    def output_of(self, path: str) -> Tensor:
        """Returns the output of the submodule `path` in a pass without guidance."""
        with calls_of(self.net.get_submodule(path)) as calls:
            self.run()
        return calls[-1][1]


def _output(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Compare an output of the denoiser. `_OUTPUT` parses its settings from its key.

    The reference applies guidance to all rows if t of row 0 is inside the guidance interval. In runs with
    `_interval_off` it is outside. In runs with `_interval_swapped` it is inside, after the two rows were swapped.
    """
    inputs, component = _Pass(it), "denoiser padding" if match["padding"] else "denoiser"
    valid = it.goldens["dit/padding_mask"].bool() if match["padding"] else None
    if match["local"]:
        inputs.local = torch.zeros_like(it.goldens["dit/local_add_cond"]) if match["local"] == "zero" else None
    wanted = inputs.condition()
    found = inputs.run(wanted, valid=valid)
    if match["cfg"]:
        component = "denoiser guidance"
        cfg, apg, norm, phi = (_number(match[part] or "0") for part in ("cfg", "apg", "norm", "phi"))
        phi = _OPEN_PHI if match["phi"] == "" else phi
        if cfg != 1.0 and match["interval"] != "off":
            away = wanted.without_context()
            if match["negative"]:  # padded tokens are zeros, not the learned padding
                mask = it.goldens["dit/negative_cross_attn_mask"].bool()[..., None]
                away = inputs.condition(torch.where(mask, it.goldens["dit/negative_cross_attn_cond"], 0.0))
            other = inputs.run(away, valid=valid)
            rows = GuidanceBatch.of([Guidance(cfg, apg_scale=apg, norm_threshold=norm, rescale=phi)] * len(inputs.x))
            found = guide(inputs.x, inputs.t, conditional=found, unconditional=other, valid=valid, rows=rows)
    found = found.flip(0) if match["interval"] == "swapped" else found
    yield Finding(match[0], found, it.goldens[match[0]], None if valid is None else valid[:, None], component)


def _number(digits: str) -> float:
    """Parse the digits of a number in a key: "7" is 7; a leading 0 means decimals, so that "05" is 0.5."""
    return float(f"0.{digits[1:]}") if digits.startswith("0") and len(digits) > 1 else float(digits)


def _beside_padding(it: Subject, _: object) -> Iterator[Finding]:
    """Compare the output for valid frames with and without padded frames after them."""
    inputs = _Pass(it)
    plain, frames = inputs.run(), inputs.x.shape[-1]
    inputs.x = torch.cat([inputs.x, torch.full_like(inputs.x, 5.0)], dim=-1)
    valid = (torch.arange(2 * frames) < frames).expand(len(inputs.x), -1)
    yield Finding("dit/out padded", inputs.run(valid=valid)[..., :frames], plain)


def _hidden(it: Subject, _: object) -> Tensor:
    layers = range(len(it.model.denoiser.transformer.layers))
    return torch.stack([_Pass(it).output_of(f"transformer.layers.{layer}") for layer in layers])


def join_windows(spans: Sequence[WindowSpan], run: Callable[[WindowSpan], Tensor], *, unit: int) -> Tensor:
    """Returns the kept parts of the windows' results, joined. `unit` is the number of values per frame, last axis."""
    kept = [slice((span.keep_start - span.start) * unit, (span.keep_stop - span.start) * unit) for span in spans]
    return torch.cat([run(span)[..., part] for span, part in zip(spans, kept, strict=True)], dim=-1)


def _cut(value: Tensor, span: WindowSpan, *, unit: int) -> Tensor:
    return value[..., span.start * unit : span.stop * unit]


def _windows_of(frames: int, match: re.Match[str]) -> Sequence[WindowSpan]:
    """Returns the windows that a key states by size and overlap, or one window over all frames."""
    return chunked_windows(frames, size=int(match["size"] or frames), overlap=int(match["overlap"] or 0))


def _code(it: Subject, match: re.Match[str]) -> Tensor:
    """Encode or decode a stored input as its key describes."""
    net, decodes = it.model.autoencoder, match["way"] == "decode"
    value = it.goldens["_".join(("ae/latents" if decodes else "ae/audio", *filter(None, [match["input"]])))]
    noise, (unit_in, unit_out) = CallOrderNoise(int(match["seed"] or 0)), (1, net.hop) if decodes else (net.hop, 1)

    def run(span: WindowSpan) -> Tensor:
        drawn = [WindowNoise(noise, match["way"], span.start)] if match["seed"] else None
        return (net.decode if decodes else net.encode)(_cut(value, span, unit=unit_in), drawn)

    frames = -(-value.shape[-1] // unit_in)
    if match["size"] is None:
        return run(whole_window(frames)[0])  # may be longer than the input
    return join_windows(_windows_of(frames, match), run, unit=unit_out)


def _clip(it: Subject, match: re.Match[str]) -> Tensor:
    """Prepare a clip: the model's channels, zero-padded at the end to whole latents. Returns it or its encoding."""
    net, samples = it.model.autoencoder, torch.atleast_2d(it.goldens[f"ae/{match[1]}_audio"])
    rate_hz, num_samples = it.model.spec.card.sample_rate_hz, -(-samples.shape[-1] // net.hop) * net.hop
    source = SourceAudio(samples.numpy(), rate_hz)
    clip = prepare_source(source, sample_rate_hz=rate_hz, channels=net.channels, num_samples=num_samples)[None]
    return clip if match[2] == "preprocessed" else net.encode(clip)


def _open_decode(it: Subject, match: re.Match[str]) -> Tensor:
    net, latents = it.model.autoencoder, it.goldens[f"ae/{match[1] or ''}z"]
    spans = _windows_of(latents.shape[-1], match)
    return join_windows(spans, lambda span: net.decode(_cut(latents, span, unit=1)), unit=net.config.hop)


def _open_encode(it: Subject, match: re.Match[str]) -> Tensor:
    net, wave = it.model.autoencoder, it.goldens["ae/wave"]
    shape = (len(wave), net.config.latent_channels, wave.shape[-1] // net.config.hop)
    return net.encode(wave, torch.randn(shape, generator=torch.Generator().manual_seed(int(match[1]))))


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
        spans = cut_windows(frames, rule=plan.decode_rule, longest=WINDOW_FRAMES)
        yield from _compare_windows(decode, latents, spans=spans, units=(1, hop), is_exact=is_exact)
    if is_exact:
        spans = plan.init_source.windows
        yield from _compare_windows(encode, audio, spans=spans, units=(hop, 1), is_exact=is_exact)


def _compare_windows(
    code: _Code, value: Tensor, *, spans: Sequence[WindowSpan], units: tuple[int, int], is_exact: bool
) -> Iterator[Finding]:
    """Compare joined windows with one piece. `units` are the values per frame of input and output.

    Exact windows need no value outside them: their kept part stays finite if everything outside is NaN.
    """
    if len(spans) < 2:
        raise ValueError("long audio is one window")
    unit_in, unit_out = units

    def run_among_nan(span: WindowSpan) -> Tensor:
        spoilt = torch.full_like(value, math.nan)
        _cut(spoilt, span, unit=unit_in)[:] = _cut(value, span, unit=unit_in)
        return _cut(code(spoilt, 0), span, unit=unit_out)

    made = join_windows(spans, lambda span: code(_cut(value, span, unit=unit_in), span.start), unit=unit_out)
    yield Finding(f"{code.__name__} in {len(spans)} windows", made, code(value, 0))
    if is_exact:
        finite = join_windows(spans, run_among_nan, unit=unit_out).isfinite().all()
        yield Finding(f"{code.__name__} beyond {len(spans)} windows", finite, torch.tensor(True))


_OUTPUT = (
    r"dit/(?:out_?)?(?:(?P<local>zero|no)_local)?(?:cfg(?P<cfg>\d+))?(?:_null|(?P<negative>_neg(?:ative)?))?"
    r"(?:_apg(?P<apg>\d+))?(?:_norm(?P<norm>\d+))?(?:_phi(?P<phi>\d*))?(?:_interval_(?P<interval>\w+))?"
    r"(?P<padding>_?pad_keymask)?"
)
_CODED = (
    r"ae/(?P<way>encode|decode)(?:_(?P<input>[a-z0-9]+))??(?:_full|_c(?P<size>\d+)_o(?P<overlap>\d+))?"
    r"_(?:quiet|seed(?P<seed>\d+))"
)
_OPEN_DECODED = r"ae/(long_)?decode(?:_chunked_(?P<size>\d+)_(?P<overlap>\d+))?"
# Key of a stored value -> the denoiser's module whose output it is.
_MODULES = {
    "dit/(?:mid/)?timestep_embed": "to_timestep_embed",
    "dit/(?:mid/)?global_embed": "to_global_embed",
    "dit/(?:mid/context|cond_embed)": "to_cond_embed",
    "dit/mid/adaln_modulation": "transformer.global_cond_embedder",
    "dit/mid/project_in": "transformer.project_in",
    r"dit/mid/hidden_after_layer_(\d+)": r"transformer.layers.\1",
    r"dit/mid/layer(\d+)_(self_attn|cross_attn|ff)_out": r"transformer.layers.\1.\2",
    r"dit/mid/layer(\d+)_local_embed": r"transformer.layers.\1.to_local_embed",
}
_INPUTS = (
    "cond/inputs_.*",
    "dit/(x|t|(negative_)?cross_attn_(cond|mask)|global_cond|local_add_cond|padding_mask)",
    "ae/((audio|latents)(_[a-z0-9]+)?|[a-z0-9]+_audio|wave|z|long_z)",
    "init/.*",
)
# Outputs inside a network. If one is wrong, the network's output is wrong too.
_INTERMEDIATE = (
    "text/last_hidden_state",
    "ae/(patched|(en|de)coder_(block_)?out(_quiet)?|encoder_stage.*|resolved_.*|.*_draw_.*)",
)


def _module_check(pattern: str, path: str, *, component: str = "denoiser") -> Check:
    return Check(component, pattern, lambda it, match: _Pass(it).output_of(match.expand(path)))


NETWORKS = (
    Check("inputs", "|".join((*_INPUTS, *_INTERMEDIATE)), lambda *_: ()),
    Check("text tokens", "(text|cond)/input_ids", lambda it, _: _ids_and_mask(it)[0]),
    Check("text tokens", "(text/attention|cond/attention|cond/t5)_mask", lambda it, _: _ids_and_mask(it)[1]),
    Check("text", "text/embeddings", _text),
    Check("text", "cond/t5_fp32", _exact_text),
    Check("text in float16", "cond/t5", _text),
    Check("number", r"number/embeddings|cond/(seconds_\w+)", _numbers),
    _module_check("dit/(mid/)?timestep_features", "timestep_features", component="denoiser time features"),
    *(_module_check(key, path) for key, path in _MODULES.items()),
    Check("denoiser", "dit/hidden", _hidden),
    Check("denoiser", _OUTPUT, _output),
    Check("denoiser padding", "dit/out padded", _beside_padding, over="once", family=SaoModel),
    Check("denoiser padding", "dit/.*_pad_vzero", lambda *_: ["value-zeroed outputs: padding is key-masked here"]),
    Check("autoencoder", "ae/([a-z0-9]+)_(encode_quiet|preprocessed)", _clip),
    Check("autoencoder", _CODED, _code, family=Sa3Model),
    Check("autoencoder", _OPEN_DECODED, _open_decode),
    Check("autoencoder", r"ae/encode_seed(\d+)", _open_encode, family=SaoModel),
    Check("decoder halo", "windows", _windows, over="once", family=Sa3Model | SaoModel),
)
