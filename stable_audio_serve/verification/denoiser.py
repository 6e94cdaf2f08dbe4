"""Checks of the conditioners and the denoiser: stored embeddings, forward passes, guided outputs, outputs of modules.

Some rows of the tables apply to one family only, because only its folders have these numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.denoiser import Denoiser as OpenDenoiser
from stable_audio_serve.sampling import Guidance, GuidanceBatch, guide
from stable_audio_serve.verification.checks import Check, Finding, Subject

_PHI = 0.7  # for keys with `_phi` and no digits, as in the Stable Audio Open family


def watch(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[list[tuple[Tensor, Tensor]]]:
    """Call `run` and return, per module, the first input and the output of each of its calls."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _, given, made, calls=calls: calls.append((given[0].clone(), made.clone())))
        for module, calls in zip(modules, seen, strict=True)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _prompts(it: Subject) -> Any:
    return (it.goldens.section("components", "text") or it.goldens.section("cond_t5"))["prompts"]


def _ids_and_mask(it: Subject) -> list[Tensor]:
    """Returns ids and mask (B, T) of the stored prompts."""
    return list(it.model.text.tokenize(_prompts(it)).ids_and_mask.unbind(1))


def _text(it: Subject, _: object) -> Tensor:
    return torch.stack([embedding.tokens for embedding in it.model.encode_text(_prompts(it))])


def _last_hidden_state(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    ids, mask = _ids_and_mask(it)
    yield Finding(match[0], it.model.text.encode(ids, mask), it.goldens[match[0]], mask.bool()[..., None])


def _exact_text(it: Subject, _: object) -> Tensor:
    """Encode the prompts with the encoder loaded in float32; the served model computes in float16."""
    text, (ids, mask) = it.model.text, _ids_and_mask(it)
    place = Path(str(text.encoder.config._name_or_path))
    exact = load_text_encoder(place, max_length=text.max_length, device=it.model.device, dtype=torch.float32)
    return it.model.prompt(exact.encode(ids, mask), mask.bool())


def _negative_text(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Compare the prompt's tokens in the negative context. The other tokens come from numbers."""
    config = it.model.config
    before = config.context_ids.index(config.prompt.id)
    tokens = it.model.encode_text([it.goldens.facts["dit"]["negative_prompt"]])[0].tokens
    stored = it.goldens[match[0]][:, before : before + len(tokens)]
    yield Finding(match[0], tokens.expand_as(stored), stored)


def _numbers(it: Subject, match: re.Match[str]) -> Tensor:
    """Embed the values in the facts. Some are outside the conditioner's range."""
    facts = it.goldens.section("components", "number")
    values = torch.tensor(facts["values"] if facts else it.goldens.facts["cond_number_values"], dtype=torch.float32)
    return it.model.numbers[match[1] or facts.get("id", "seconds_total")](values)[:, None]


class _Pass:
    """The stored inputs of one forward pass of all rows: x (B, D, F), t (B,), local conditioning, valid frames."""

    def __init__(self, it: Subject) -> None:
        self.net, self._goldens = it.model.denoiser, it.goldens
        self.x, self.t = it.goldens["dit/x"], it.goldens["dit/t"]
        self.local, valid = it.goldens.find("dit/local_add_cond"), it.goldens.find("dit/padding_mask")
        self.valid = None if valid is None else valid.bool()

    def condition(self, context: Tensor | None = None) -> Any:
        """Returns the conditioning of the stored context or of another (B, T, width)."""
        if isinstance(self.net, OpenDenoiser):
            stored, vector = self._goldens["cond/inputs_cross_attn_cond"], self._goldens["cond/inputs_global_cond"]
            return self.net.condition(stored if context is None else context, vector)
        stored, vector = self._goldens["dit/cross_attn_cond"], self._goldens["dit/global_cond"]
        return self.net.condition(stored if context is None else context, vector, local=self.local)

    def run(self, conditioning: Any = None, *, valid: Tensor | None = None) -> Tensor:
        """Returns the output (B, D, F) for the stored conditioning or another."""
        return self.net(self.x, self.t, conditioning=conditioning or self.condition(), valid=valid)

    def negative(self) -> Any:
        """Returns the conditioning of the negative branch: padded tokens are zeros, not the learned padding."""
        mask = self._goldens["dit/negative_cross_attn_mask"].bool()[..., None]
        return self.condition(torch.where(mask, self._goldens["dit/negative_cross_attn_cond"], 0.0))

    def output_of(self, path: str) -> Tensor:
        """Returns the output of the submodule `path` in a pass without guidance."""
        return watch([self.net.get_submodule(path)], self.run)[0][-1][1]


def _output(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Compare an output of the denoiser. `_OUTPUT` parses its settings from its key.

    The reference applies guidance to all rows if t of row 0 is inside the guidance interval. In runs with
    `_interval_off` it is outside. In runs with `_interval_swapped` it is inside, after the two rows were swapped.
    """
    inputs, component = _Pass(it), "denoiser padding" if match["padding"] else "denoiser"
    valid = inputs.valid if match["padding"] else None
    if match["local"]:
        inputs.local = torch.zeros_like(inputs.local) if match["local"] == "zero" and inputs.local is not None else None
    wanted = inputs.condition()
    found = inputs.run(wanted, valid=valid)
    if match["cfg"]:
        component = "denoiser guidance"
        cfg, apg, norm, phi = (_number(match[part] or "0") for part in ("cfg", "apg", "norm", "phi"))
        guidance = Guidance(cfg, apg_scale=apg, norm_threshold=norm, rescale=_PHI if match["phi"] == "" else phi)
        if guidance.cfg_scale != 1.0 and match["interval"] != "off":
            other = inputs.run(inputs.negative() if match["negative"] else wanted.without_context(), valid=valid)
            rows = GuidanceBatch.of([guidance] * len(inputs.x))
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
    layers = len(it.model.denoiser.transformer.layers)
    return torch.stack([_Pass(it).output_of(f"transformer.layers.{layer}") for layer in range(layers)])


_OUTPUT = (
    r"dit/(?:out_?)?(?:(?P<local>zero|no)_local)?(?:cfg(?P<cfg>\d+))?(?:_null|(?P<negative>_neg(?:ative)?))?"
    r"(?:_apg(?P<apg>\d+))?(?:_norm(?P<norm>\d+))?(?:_phi(?P<phi>\d*))?(?:_interval_(?P<interval>\w+))?"
    r"(?P<padding>_?pad_keymask)?"
)
# Key of a stored value -> the denoiser's module whose output it is.
_MODULES = {
    "dit/(?:mid/)?timestep_features": "timestep_features",
    "dit/(?:mid/)?timestep_embed": "to_timestep_embed",
    "dit/(?:mid/)?global_embed": "to_global_embed",
    "dit/(?:mid/context|cond_embed)": "to_cond_embed",
    "dit/mid/adaln_modulation": "transformer.global_cond_embedder",
    "dit/mid/project_in": "transformer.project_in",
    r"dit/mid/hidden_after_layer_(\d+)": r"transformer.layers.\1",
    r"dit/mid/layer(\d+)_(self_attn|cross_attn|ff)_out": r"transformer.layers.\1.\2",
    r"dit/mid/layer(\d+)_local_embed": r"transformer.layers.\1.to_local_embed",
}


def _module_check(pattern: str, path: str) -> Check:
    component = "denoiser time features" if path == "timestep_features" else "denoiser"
    return Check(component, pattern, lambda it, match: _Pass(it).output_of(match.expand(path)))


CONDITIONERS = (
    Check("inputs", "cond/inputs_cross_attn_mask", lambda *_: ()),
    Check("text tokens", "(text|cond)/input_ids", lambda it, _: _ids_and_mask(it)[0]),
    Check("text tokens", "(text/attention|cond/attention|cond/t5)_mask", lambda it, _: _ids_and_mask(it)[1]),
    Check("text", "text/last_hidden_state", _last_hidden_state),
    Check("text", "text/embeddings", _text),
    Check("text", "cond/t5_fp32", _exact_text),
    Check("text in float16", "cond/t5", _text),
    Check("number", r"number/embeddings|cond/(seconds_\w+)", _numbers),
)
SA3_DENOISER = (
    Check(
        "inputs", "dit/(x|t|(negative_)?cross_attn_(cond|mask)|global_cond|local_add_cond|padding_mask)", lambda *_: ()
    ),
    Check("denoiser", _OUTPUT, _output),
    *(_module_check(pattern, path) for pattern, path in _MODULES.items()),
    Check("denoiser padding", "dit/.*_pad_vzero", lambda *_: ["value-zeroed outputs: padding is key-masked here"]),
)
OPEN_DENOISER = (
    *SA3_DENOISER,
    Check("denoiser", "dit/hidden", _hidden),
    Check("denoiser padding", "dit/out padded", _beside_padding, over="once"),
    Check("text in float16", "dit/negative_cross_attn_cond", _negative_text),
)
