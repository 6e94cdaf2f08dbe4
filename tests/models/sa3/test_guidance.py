"""The denoiser with classifier-free guidance matches reference values, for all kinds of guidance."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.plan import Guidance
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import assert_near, loaded

WITHIN = 2e-4
NAME = re.compile(r"dit/cfg(?P<cfg>\d+)_(?P<branch>neg|null)_apg(?P<apg>\d+)(?P<variant>.*)")
# Without the cases "vzero", in which the reference code ran a path for CPUs that has no counterpart in the package.
CASES = [
    (name, key)
    for name in SHARP
    for key in sorted(load_goldens(name).tensors)
    if NAME.fullmatch(key) and "vzero" not in key
]


def number(digits: str) -> float:
    """Convert digits in the name of a stored value to a number: "3" is 3, and "05" is 0.5."""
    return float(f"0.{digits[1:]}") if digits.startswith("0") and len(digits) > 1 else float(digits)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_guided_velocity_matches_the_reference(name: str, key: str) -> None:
    tensors, net = load_goldens(name).tensors, loaded(name).denoiser
    case = NAME.fullmatch(key)
    assert case is not None
    variant = case["variant"]
    guidance = Guidance(
        cfg_scale=number(case["cfg"]),
        apg_scale=number(case["apg"]),
        norm_threshold=2.0 if "norm2" in variant else 0.0,
        rescale=0.5 if "phi05" in variant else 0.0,
    )

    def g(part: str) -> Tensor:
        return tensors[f"dit/{part}"]

    valid = g("padding_mask").bool() if "keymask" in variant else torch.ones_like(g("padding_mask")).bool()
    with torch.inference_mode():
        row = net.condition(g("cross_attn_cond"), g("global_cond"), local=g("local_add_cond"))
        away = row.without_context()
        if case["branch"] == "neg":
            # The padding of a negative prompt is zero; the padding of a prompt is a learned vector.
            context = g("negative_cross_attn_cond") * g("negative_cross_attn_mask")[..., None]
            away = net.condition(context, g("global_cond"), local=g("local_add_cond"))
        out = guide(
            g("x"),
            g("t"),
            conditional=net(g("x"), g("t"), conditioning=row, valid=valid),
            unconditional=net(g("x"), g("t"), conditioning=away, valid=valid),
            valid=valid if "keymask" in variant else None,
            rows=GuidanceBatch.of([guidance, guidance]),
        )
    seen = valid[:, None].expand_as(out)
    assert_near(out[seen], tensors[key][seen], within=WITHIN)
