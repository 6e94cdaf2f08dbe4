"""Compares a diffusion transformer with stored forward passes: plain, guided, padded, and values in between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stable_audio_serve.models.sa3.denoiser import Denoiser, DenoiserConditioning
from stable_audio_serve.sampling import Guidance, GuidanceBatch, guide
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.goldens import Goldens, as_bool
from stable_audio_serve.verification.report import Report

PREFIX = "dit/"
_INPUTS = ("x", "t", "cross_attn_cond", "global_cond", "local_add_cond", "padding_mask")
_NOT_NEEDED = ("cross_attn_mask",)  # cross-attention takes no mask
_GUIDED = re.compile(
    r"cfg(?P<cfg>\d+)_(?P<branch>neg|null)_apg(?P<apg>\d+)(?:_norm(?P<norm>\d+))?(?:_phi(?P<phi>\d+))?"
    r"(?P<padding>_pad_(?:vzero|keymask))?"
)
_INTERVAL = re.compile(r"cfg(?P<cfg>\d+)_interval_\w+")
_LAYER_VALUE = re.compile(
    r"layer(?P<at>\d+)_(?P<part>self_attn|cross_attn|ff)_out"
    r"|layer(?P<local>\d+)_local_embed"
    r"|hidden_after_layer_(?P<after>\d+)"
)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Inputs of the wrapped network: x (B, D, F), t (B,), context, global, local, valid (B, F) or None."""

    x: Tensor
    t: Tensor
    context: Tensor
    global_cond: Tensor
    local: Tensor | None
    valid: Tensor | None

    @classmethod
    def read(cls, goldens: Goldens) -> _Inputs:
        mask = goldens.find(PREFIX + "padding_mask")
        return cls(
            x=goldens[PREFIX + "x"],
            t=goldens[PREFIX + "t"],
            context=goldens[PREFIX + "cross_attn_cond"],
            global_cond=goldens[PREFIX + "global_cond"],
            local=goldens.find(PREFIX + "local_add_cond"),
            valid=None if mask is None else as_bool(mask),
        )

    def condition(self, net: Denoiser) -> DenoiserConditioning:
        return net.condition(self.context, self.global_cond, local=self.local)


def compare_denoiser(report: Report, goldens: Goldens, *, net: Denoiser) -> None:
    """Compare every tensor below dit/ that is an output."""
    inputs = _Inputs.read(goldens)
    for name in _INPUTS + _NOT_NEEDED:
        goldens.mark(PREFIX + name)
    value_zeroed = 0
    for name in goldens.names(PREFIX):
        with report.guard("denoiser", PREFIX + name):
            if name in _PLAIN:
                output = net(inputs.x, inputs.t, conditioning=_PLAIN[name](net, inputs))
                report.compare("denoiser", PREFIX + name, actual=output, expected=goldens[PREFIX + name])
            elif name == "out_pad_keymask":
                output = net(inputs.x, inputs.t, conditioning=inputs.condition(net), valid=inputs.valid)
                _compare_padded(report, goldens, name=name, output=output, valid=inputs.valid)
            elif _INTERVAL.fullmatch(name):
                _compare_interval(report, goldens, net=net, inputs=inputs, name=name)
            elif name.endswith("_pad_vzero"):
                goldens.mark(PREFIX + name)
                value_zeroed += 1
            elif match := _GUIDED.fullmatch(name):
                _compare_guided(report, goldens, net=net, inputs=inputs, match=match)
    _compare_values_between(report, goldens, net=net, inputs=inputs)
    if value_zeroed:
        report.skip("denoiser padding", f"{value_zeroed} value-zeroed outputs: padding is key-masked here")


def _zero_local(net: Denoiser, inputs: _Inputs) -> DenoiserConditioning:
    local = None if inputs.local is None else torch.zeros_like(inputs.local)
    return net.condition(inputs.context, inputs.global_cond, local=local)


def _no_local(net: Denoiser, inputs: _Inputs) -> DenoiserConditioning:
    return net.condition(inputs.context, inputs.global_cond, local=None)


_PLAIN = {
    "out": lambda net, inputs: inputs.condition(net),
    "out_zero_local": _zero_local,
    "out_no_local": _no_local,
}


def _compare_padded(report: Report, goldens: Goldens, *, name: str, output: Tensor, valid: Tensor | None) -> None:
    only = None if valid is None else valid[:, None]
    report.compare("denoiser padding", PREFIX + name, actual=output, expected=goldens[PREFIX + name], only=only)


def _compare_guided(report: Report, goldens: Goldens, *, net: Denoiser, inputs: _Inputs, match: re.Match[str]) -> None:
    """Compare a guided output, whose name says scale, branch, projection, norm threshold, rescale and padding."""
    name = match[0]
    valid = inputs.valid if match["padding"] else None
    guidance = Guidance(
        cfg_scale=_number(match["cfg"]),
        apg_scale=_number(match["apg"]),
        norm_threshold=_number(match["norm"] or "0"),
        rescale=_number(match["phi"] or "0"),
    )
    conditional = inputs.condition(net)
    unconditional = (
        _negative(goldens, net, inputs=inputs) if match["branch"] == "neg" else conditional.without_context()
    )
    output = guide(
        inputs.x,
        inputs.t,
        conditional=net(inputs.x, inputs.t, conditioning=conditional, valid=valid),
        unconditional=net(inputs.x, inputs.t, conditioning=unconditional, valid=valid),
        valid=valid,
        rows=GuidanceBatch.of([guidance] * len(inputs.x)),
    )
    only = None if valid is None else valid[:, None]
    report.compare("denoiser guidance", PREFIX + name, actual=output, expected=goldens[PREFIX + name], only=only)


def _negative(goldens: Goldens, net: Denoiser, *, inputs: _Inputs) -> DenoiserConditioning:
    """Returns the negative branch, whose padded tokens are zeros, unlike the positive side's learned padding."""
    tokens, mask = goldens[PREFIX + "negative_cross_attn_cond"], goldens.find(PREFIX + "negative_cross_attn_mask")
    if mask is not None:
        tokens = torch.where(as_bool(mask)[..., None], tokens, 0.0)
    return net.condition(tokens, inputs.global_cond, local=inputs.local)


def _compare_interval(report: Report, goldens: Goldens, *, net: Denoiser, inputs: _Inputs, name: str) -> None:
    """Compare an output whose guidance is switched off by its interval.

    The reference decides by row 0 for all rows, so rows whose own time says otherwise are left out.
    """
    inside = torch.arange(len(inputs.t)) > 0  # where the facts do not say, only row 0 is known to lie outside
    if interval := goldens.component("dit").get(name):
        low, high = (float(edge) for edge in interval)
        inside = (inputs.t >= low) & (inputs.t <= high)
    output = net(inputs.x, inputs.t, conditioning=inputs.condition(net))
    same = ~inside[:, None, None]
    report.compare("denoiser guidance", PREFIX + name, actual=output, expected=goldens[PREFIX + name], only=same)


def _compare_values_between(report: Report, goldens: Goldens, *, net: Denoiser, inputs: _Inputs) -> None:
    """Compare the outputs of modules inside the plain forward pass."""
    prefix = PREFIX + "mid/"
    modules = {name: module for name in goldens.names(prefix) if (module := _module(net, name)) is not None}
    with report.guard("denoiser", prefix), _recorded(modules) as seen:
        net(inputs.x, inputs.t, conditioning=inputs.condition(net))
    for name, value in seen.items():
        component: Component = "denoiser time features" if name == "timestep_features" else "denoiser"
        with report.guard(component, prefix + name):
            report.compare(component, prefix + name, actual=value, expected=goldens[prefix + name])


def _module(net: Denoiser, name: str) -> nn.Module | None:
    """Returns the module that made a stored value, or None when the name is unknown."""
    known: dict[str, nn.Module] = {
        "timestep_features": net.timestep_features,
        "timestep_embed": net.to_timestep_embed,
        "context": net.to_cond_embed,
        "global_embed": net.to_global_embed,
        "adaln_modulation": net.transformer.global_cond_embedder,
        "project_in": net.transformer.project_in,
    }
    match = _LAYER_VALUE.fullmatch(name)
    if match is None:
        return known.get(name)
    index = int(next(found for found in (match["at"], match["local"], match["after"]) if found is not None))
    if index >= len(net.transformer.layers):
        return None
    layer = net.transformer.layers[index]
    if match["after"]:
        return layer
    return layer.get_submodule("to_local_embed" if match["local"] else match["part"])


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record what the modules return while the block runs, by name."""
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: object, output: Tensor, *, name: str) -> None:
        seen[name] = output.clone()

    handles = [module.register_forward_hook(partial(keep, name=name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _number(digits: str) -> float:
    """Returns the number that the digits of a name mean: with a leading 0 they are decimals, 05 = 0.5."""
    return float(f"0.{digits[1:]}") if digits.startswith("0") and len(digits) > 1 else float(digits)
