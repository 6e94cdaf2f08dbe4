"""Checks of the conditioners, the denoiser, adapters, and the autoencoder (in one piece and in windows)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from stable_audio_serve.audio.prepare import prepare_source
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.models.adapters.adapter import Adapter, read_adapter
from stable_audio_serve.models.adapters.apply import RowSlots, adapting
from stable_audio_serve.models.adapters.base import Base
from stable_audio_serve.models.adapters.fold import fold
from stable_audio_serve.models.adapters.header import AdapterType
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, WindowSpan
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.windows import WINDOW_FRAMES, chunked_windows, cut_windows
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.verification.checks import ADAPTERS, Check, Finding, Subject, calls_of, same
from stable_audio_serve.verification.runs import CallOrderNoise, RowNoise

_OPEN_PHI = "07"  # for keys with `_phi` and no digits, as in the Stable Audio Open family
_Code = Callable[[Tensor, int], Tensor]  # encode or decode: part of the input, index of its first frame -> output
_Spans = Sequence[WindowSpan]
_Units = tuple[int, int]  # number of values per frame on the last axis: of the input, of the output


def _prompts(it: Subject) -> Any:
    return (it.goldens.section("components", "text") or it.goldens.section("cond_t5"))["prompts"]


def _ids_and_mask(it: Subject) -> list[Tensor]:
    """Returns the token ids and the attention mask (B, T) of the stored prompts."""
    return list(it.model.text.tokenize(_prompts(it)).ids_and_mask.unbind(1))


def _text(it: Subject, _: object) -> Tensor:
    return torch.stack([embedding.tokens for embedding in it.model.encode_text(_prompts(it))])


def _exact_text(it: Subject, _: object) -> Tensor:
    """Encode the prompts with a text encoder in float32. The text encoder of the served model computes in float16."""
    text, (ids, mask) = it.model.text, _ids_and_mask(it)
    exact = load_text_encoder(text.folder, max_length=text.max_length, device=it.model.device, dtype=torch.float32)
    return it.model.prompt(exact.encode(ids, mask), mask.bool())


def _numbers(it: Subject, match: re.Match[str]) -> Tensor:
    """Returns the embeddings of the numbers in the facts. Some numbers are outside the conditioner's range."""
    facts = it.goldens.section("components", "number")
    values = torch.tensor(facts["values"] if facts else it.goldens.facts["cond_number_values"], dtype=torch.float32)
    return it.model.numbers[match[1] or "seconds_total"](values)[:, None]


def _condition(it: Subject, context: Tensor | None = None, *, local: Tensor | None) -> Any:
    """Returns the denoiser's conditioning for `context` (B, T, width), by default the stored one."""
    group, frames = ("dit/", {"local": local}) if isinstance(it.model, Sa3Model) else ("cond/inputs_", {})
    context = it.goldens[f"{group}cross_attn_cond"] if context is None else context
    return it.model.denoiser.condition(context, it.goldens[f"{group}global_cond"], **frames)


def _denoise(it: Subject, *, conditioning: Any = None, **changes: Any) -> Tensor:
    """Returns the output (B, D, F) of one pass without guidance. `changes` replaces stored inputs or adds others."""
    inputs = {"x": it.goldens["dit/x"], "t": it.goldens["dit/t"], **changes}
    conditioning = conditioning or _condition(it, local=it.goldens.find("dit/local_add_cond"))
    return it.model.denoiser(**inputs, conditioning=conditioning)


def _output_of(it: Subject, match: re.Match[str], *, path: str) -> Tensor:
    """Returns the output of a submodule for the stored inputs. `path` is a template for the submodule's path."""
    with calls_of(it.model.denoiser.get_submodule(match.expand(path))) as calls:
        _denoise(it)
    return calls[-1][1]


def _output(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Compare an output of the denoiser. The output's key states the settings, and `_OUTPUT` parses them.

    The reference applies guidance to all rows if t of row 0 is inside the guidance interval. For a key with
    `_interval_off`, t of row 0 is outside. For a key with `_interval_swapped`, the reference swapped the two rows, and
    t of the new row 0 is inside.
    """
    component = "denoiser padding" if match["padding"] else "denoiser"
    valid = it.goldens["dit/padding_mask"].bool() if match["padding"] else None
    local = it.goldens.find("dit/local_add_cond")
    if match["local"]:
        local = torch.zeros_like(it.goldens["dit/local_add_cond"]) if match["local"] == "zero" else None
    wanted = _condition(it, local=local)
    found = _denoise(it, conditioning=wanted, valid=valid)
    if match["cfg"]:
        component = "denoiser guidance"
        amounts = [match["cfg"], match["apg"], match["norm"], match["phi"] if match["phi"] != "" else _OPEN_PHI]
        cfg, apg, norm, phi = (float(re.sub("^0", "0.", digits or "0")) for digits in amounts)  # "05" is 0.5
        if cfg != 1.0 and match["interval"] != "off":
            away = wanted.without_context()
            if match["negative"]:  # padded tokens are zeros, not the learned padding
                mask = it.goldens["dit/negative_cross_attn_mask"].bool()[..., None]
                away = _condition(it, torch.where(mask, it.goldens["dit/negative_cross_attn_cond"], 0.0), local=local)
            other, x, t = _denoise(it, conditioning=away, valid=valid), it.goldens["dit/x"], it.goldens["dit/t"]
            rows = GuidanceBatch.of([Guidance(cfg, apg_scale=apg, norm_threshold=norm, rescale=phi)] * len(x))
            found = guide(x, t, conditional=found, unconditional=other, valid=valid, rows=rows)
    found = found.flip(0) if match["interval"] == "swapped" else found
    yield Finding(match[0], found, it.goldens[match[0]], None if valid is None else valid[:, None], component)


def _beside_padding(it: Subject, _: object) -> Iterator[Finding]:
    """Check that padded frames after the valid frames do not change the output for the valid frames."""
    x, frames = it.goldens["dit/x"], it.goldens["dit/x"].shape[-1]
    valid = (torch.arange(2 * frames) < frames).expand(len(x), -1)
    padded = _denoise(it, x=torch.cat([x, torch.full_like(x, 5.0)], dim=-1), valid=valid)
    yield Finding("dit/out padded", padded[..., :frames], _denoise(it))


def _hidden(it: Subject, match: re.Match[str]) -> Tensor:
    layers = range(len(it.model.denoiser.transformer.layers))
    return torch.stack([_output_of(it, match, path=f"transformer.layers.{layer}") for layer in layers])


def _adapted(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Apply the adapter or the chain of adapters that the key names, and compare the result.

    The result is the denoiser's output, or if the key has a number, the embedding of the number.

    An adapter of an unsupported type must be refused with a message that has its name and type. The reference's loader
    has a bug: an adapter in a chain changes only layers that all adapters before it also change. If the facts state
    this bug, it is repeated here, because the stored outputs have it.
    """
    facts, chain = it.goldens.section(ADAPTERS), list[tuple[Adapter, float]]()
    for text in [match["one"]] if match["one"] else match["chain"].split("+"):
        name, _, strength = (text, "", match["strength"] or 1) if text in facts["files"] else text.rpartition("_")
        kind, path = facts["files"][name].get("adapter_type"), it.goldens.folder / ADAPTERS / f"{name}.safetensors"
        try:
            adapter = read_adapter(path, with_conditioners=True)
        except InvalidRequestError as error:
            if kind in get_args(AdapterType):
                raise
            named = f"{name!r} has type {kind}" in error.message
            yield same(f"{match[0]}: {error.message}", True, found=named)
            return
        if "stack_index_quirk" in facts:
            kept = [layer for layer in adapter.layers if all(layer in before.layers for before, _ in chain)]
            adapter = replace(adapter, layers={layer: adapter.layers[layer] for layer in kept})
        chain.append((adapter, float(strength)))
    base = Base("the checkpoint", it.model.adaptable)
    slot = fold(base, [(base.fit(adapter), strength) for adapter, strength in chain])
    with adapting(base.layers, RowSlots([(slice(None), slot)])):
        value = torch.tensor([float(match["number"] or 0)])
        made = it.model.numbers["seconds_total"](value)[:, None] if match["number"] else _denoise(it)
    yield Finding(match[0], made, it.goldens[match[0]])


def _code_windows(code: _Code, value: Tensor, *, spans: _Spans, units: _Units) -> Tensor:
    """Encode or decode the windows `spans` of `value`. Returns the kept parts of the results, joined."""
    parts = []
    for span in spans:
        made = code(value[..., span.start * units[0] : span.stop * units[0]], span.start)
        parts.append(made[..., (span.keep_start - span.start) * units[1] : (span.keep_stop - span.start) * units[1]])
    return torch.cat(parts, dim=-1)


def _coded(it: Subject, match: re.Match[str], *, given: str) -> Tensor:
    """Encode or decode a stored input with the windows and the noise that the output's key states.

    `given` is a template for the key of the input.
    """
    net, hop, is_open = it.model.autoencoder, it.model.spec.hop, isinstance(it.model, SaoModel)
    value, stated, decodes = it.goldens[match.expand(given)], match.groupdict(), "decode" in match[0]
    noise, units = CallOrderNoise(int(stated.get("seed") or 0)), (1, hop) if decodes else (hop, 1)

    def code(part: Tensor, start: int) -> Tensor:
        if is_open and decodes:
            return net.decode(part)
        if is_open:
            return net.encode(part, noise.step((len(part), net.config.latent_channels, part.shape[-1] // hop)))
        drawn = [WindowNoise(noise, "", start)] if stated["seed"] else None
        return (net.decode if decodes else net.encode)(part, drawn)

    if stated.get("size") is None:
        return code(value, 0)  # the result may be longer than the input
    frames = -(-value.shape[-1] // units[0])
    spans = chunked_windows(frames, size=int(stated["size"]), overlap=int(stated["overlap"]))
    return _code_windows(code, value, spans=spans, units=units)


def _clip(it: Subject, match: re.Match[str]) -> Tensor:
    """Convert a stored clip to the model's channels and pad it at the end with zeros to whole latents.

    Returns the converted clip or its encoding, as the key states.
    """
    net, samples = it.model.autoencoder, torch.atleast_2d(it.goldens[f"ae/{match[1]}_audio"])
    rate_hz, num_samples = it.model.spec.card.sample_rate_hz, -(-samples.shape[-1] // net.hop) * net.hop
    source = SourceAudio(samples.numpy(), rate_hz)
    clip = prepare_source(source, sample_rate_hz=rate_hz, channels=net.channels, num_samples=num_samples)[None]
    return clip if match[2] == "preprocessed" else net.encode(clip)


def _windows(it: Subject, _: object) -> Iterator[Finding]:
    """Compare long audio that is encoded and decoded in windows with the same audio in one piece.

    The windows are the ones that the engine uses while other requests wait. Encoding is compared only for Stable Audio
    Open, where windows are exact: values outside a window do not affect the part of its result that is kept. Each
    window uses its part of one noise draw over all frames.
    """
    model, hop, is_exact = it.model, it.model.spec.hop, isinstance(it.model, SaoModel)
    generator, frames = torch.Generator().manual_seed(0), 3 * WINDOW_FRAMES
    latents = torch.randn(model.spec.card.latent_channels, frames, generator=generator)
    audio = 0.3 * torch.randn(model.spec.card.channels, frames * hop, generator=generator)
    plan = model.plan(it.request(audio), frames=frames)[0]
    noise = RowNoise(SeededNoise(0), torch.randn(latents.shape, generator=generator) if is_exact else None)

    def decode(cut: Tensor, start: int) -> Tensor:
        return model.decode([DecodeWindow(cut, start, noise)])[0]

    def encode(cut: Tensor, start: int) -> Tensor:
        return model.encode_audio([EncodeWindow(cut, start, "init", noise)])[0]

    if plan.decode_rule is not None or is_exact:  # a config may ask for decoding in one piece
        spans = cut_windows(frames, rule=plan.decode_rule, longest=WINDOW_FRAMES)
        yield from _compare_windows(decode, latents, spans=spans, units=(1, hop), is_exact=is_exact)
    if is_exact:
        yield from _compare_windows(encode, audio, spans=plan.init_source.windows, units=(hop, 1), is_exact=True)


def _compare_windows(code: _Code, value: Tensor, *, spans: _Spans, units: _Units, is_exact: bool) -> Iterator[Finding]:
    """Compare the joined results of windows with the result of `value` in one piece.

    If the windows are exact, also check that the kept part of each result is finite when all values outside the window
    are NaN.
    """
    if len(spans) < 2:
        raise ValueError("long audio is one window")

    def code_among_nan(part: Tensor, start: int) -> Tensor:
        spoilt = torch.full_like(value, math.nan)
        spoilt[..., start * units[0] :][..., : part.shape[-1]] = part
        return code(spoilt, 0)[..., start * units[1] :]

    made = _code_windows(code, value, spans=spans, units=units)
    yield Finding(f"{code.__name__} in {len(spans)} windows", made, code(value, 0))
    if is_exact:
        finite = _code_windows(code_among_nan, value, spans=spans, units=units).isfinite().all()
        yield Finding(f"{code.__name__} beyond {len(spans)} windows", finite, torch.tensor(True))


_OUTPUT = (
    r"dit/(?:out_?)?(?:(?P<local>zero|no)_local)?(?:cfg(?P<cfg>\d+))?(?:_null|(?P<negative>_neg(?:ative)?))?"
    r"(?:_apg(?P<apg>\d+))?(?:_norm(?P<norm>\d+))?(?:_phi(?P<phi>\d*))?(?:_interval_(?P<interval>\w+))?"
    r"(?P<padding>_?pad_keymask)?"
)
# Key of an output with one adapter at a strength, or with a chain such as `stack_first+second_0.5`.
_ADAPTED = (
    rf"{ADAPTERS}/(?:(?P<one>[^/]+)/strength_(?P<strength>[^/]+)|stack_(?P<chain>[^/]+))"
    r"/(?:dit_out|number_(?P<number>[\d.]+))"
)
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
# Key of an encoded or decoded value -> key of its input. The first key states the windows and the seed of the noise.
_STATED = r"(?:_full|_c(?P<size>\d+)_o(?P<overlap>\d+))?_(?:quiet|seed(?P<seed>\d+))"
_CODED = {f"ae/decode(_[a-z0-9]+)??{_STATED}": r"ae/latents\1", f"ae/encode(_[a-z0-9]+)??{_STATED}": r"ae/audio\1"}
_OPEN_CODED = {
    r"ae/(long_)?decode(?:_chunked_(?P<size>\d+)_(?P<overlap>\d+))?": r"ae/\1z",
    r"ae/encode_seed(?P<seed>\d+)": "ae/wave",
}
# Stored inputs, and outputs inside a network. They need no comparison: if one is wrong, the network's output is wrong.
_NOT_COMPARED = (
    "(cond/inputs_|init/).*",
    "dit/(x|t|(negative_)?cross_attn_(cond|mask)|global_cond|local_add_cond|padding_mask)",
    "ae/((audio|latents)(_[a-z0-9]+)?|[a-z0-9]+_audio|wave|z|long_z)",
    "text/last_hidden_state",
    "ae/(patched|(en|de)coder_(block_)?out(_quiet)?|encoder_stage.*|resolved_.*|.*_draw_.*)",
)

NETWORKS = (
    Check("inputs", "|".join(_NOT_COMPARED), lambda *_: ()),
    Check("text tokens", "(text|cond)/input_ids", lambda it, _: _ids_and_mask(it)[0]),
    Check("text tokens", "(text/attention|cond/attention|cond/t5)_mask", lambda it, _: _ids_and_mask(it)[1]),
    Check("text", "text/embeddings", _text),
    Check("text", "cond/t5_fp32", _exact_text),
    Check("text in float16", "cond/t5", _text),
    Check("number", r"number/embeddings|cond/(seconds_\w+)", _numbers),
    Check("denoiser time features", "dit/(mid/)?timestep_features", partial(_output_of, path="timestep_features")),
    *(Check("denoiser", key, partial(_output_of, path=path)) for key, path in _MODULES.items()),
    Check("denoiser", "dit/hidden", _hidden),
    Check("denoiser", _OUTPUT, _output),
    Check("denoiser padding", "dit/out padded", _beside_padding, over="once", family=SaoModel),
    Check("denoiser padding", "dit/.*_pad_vzero", lambda *_: ["value-zeroed outputs: padding is key-masked here"]),
    Check("adapters", _ADAPTED, _adapted, family=Sa3Model),
    Check("autoencoder", "ae/([a-z0-9]+)_(encode_quiet|preprocessed)", _clip),
    *(Check("autoencoder", key, partial(_coded, given=given), family=Sa3Model) for key, given in _CODED.items()),
    *(Check("autoencoder", key, partial(_coded, given=given), family=SaoModel) for key, given in _OPEN_CODED.items()),
    Check("decoder halo", "windows", _windows, over="once", family=Sa3Model | SaoModel),
)
