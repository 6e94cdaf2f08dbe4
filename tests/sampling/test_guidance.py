from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.plan import Guidance

GUIDANCES = (
    Guidance(cfg_scale=3.0, apg_scale=0.0),
    Guidance(cfg_scale=3.0, apg_scale=1.0),
    Guidance(cfg_scale=0.5, apg_scale=0.5),
    Guidance(cfg_scale=7.0, apg_scale=1.0, norm_threshold=2.0),
    Guidance(cfg_scale=4.0, apg_scale=0.3, norm_threshold=8.0, rescale=0.4),
    Guidance(cfg_scale=-1.0, apg_scale=0.0, rescale=1.0),
)


def make_inputs(rows: int, *, channels: int = 5, frames: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, conditional, unconditional = torch.randn(3, rows, channels, frames, generator=generator)
    times = torch.rand(rows, generator=generator) * 0.9 + 0.05
    return {"x": x, "times": times, "conditional": conditional, "unconditional": unconditional}


def numpy_guide(x: np.ndarray, t: float, v_c: np.ndarray, v_u: np.ndarray, row: Guidance) -> np.ndarray:
    """Returns the guided output for one row x (channels, frames), computed from the definitions in float64."""
    clean = x - t * v_c
    delta = clean - (x - t * v_u)
    if row.norm_threshold > 0:
        delta = delta * min(1.0, row.norm_threshold / np.linalg.norm(delta))
    unit = clean.ravel() / np.linalg.norm(clean)
    orthogonal = delta - (np.outer(unit, unit) @ delta.ravel()).reshape(delta.shape)
    delta = row.apg_scale * orthogonal + (1 - row.apg_scale) * delta
    v = (x - clean - (row.cfg_scale - 1) * delta) / t
    if row.rescale:
        ratio = v_c.std(axis=0, ddof=1) / v.std(axis=0, ddof=1)
        v = row.rescale * v * ratio + (1 - row.rescale) * v
    return v


@pytest.mark.parametrize("valid_frames", [9, 4, 1])
def test_matches_an_independent_formulation(valid_frames: int) -> None:
    inputs = make_inputs(len(GUIDANCES))
    valid = (torch.arange(9) < valid_frames).expand(len(GUIDANCES), -1)
    result = guide(**inputs, valid=valid, rows=GuidanceBatch.of(GUIDANCES))
    for index, row in enumerate(GUIDANCES):
        x, v_c, v_u = (
            inputs[name][index, :, :valid_frames].double().numpy() for name in ("x", "conditional", "unconditional")
        )
        expected = numpy_guide(x, float(inputs["times"][index]), v_c, v_u, row)
        np.testing.assert_allclose(result[index, :, :valid_frames].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("time", [0.0, 1e-5, 1e-3])
def test_guidance_is_exact_down_to_time_zero(time: float) -> None:
    inputs = make_inputs(len(GUIDANCES)) | {"times": torch.full((len(GUIDANCES),), time)}
    result = guide(**inputs, valid=None, rows=GuidanceBatch.of(GUIDANCES))
    for index, row in enumerate(GUIDANCES):
        x, v_c, v_u = (inputs[name][index].double().numpy() for name in ("x", "conditional", "unconditional"))
        expected = numpy_guide(x, max(float(inputs["times"][index]), 1e-9), v_c, v_u, row)
        np.testing.assert_allclose(result[index].numpy(), expected, rtol=0, atol=2e-5 if time else 1e-4)


def test_plain_cfg_is_the_textbook_extrapolation() -> None:
    inputs = make_inputs(1)
    rows = GuidanceBatch.of([Guidance(cfg_scale=3.0, apg_scale=0.0)])
    expected = inputs["unconditional"] + 3.0 * (inputs["conditional"] - inputs["unconditional"])
    torch.testing.assert_close(guide(**inputs, valid=None, rows=rows), expected, rtol=0, atol=1e-5)


def test_unmasked_equals_all_frames_valid() -> None:
    inputs, rows = make_inputs(2), GuidanceBatch.of(GUIDANCES[3:5])
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(guide(**inputs, valid=None, rows=rows), guide(**inputs, valid=everything, rows=rows))


@given(
    order=st.lists(st.sampled_from(range(len(GUIDANCES))), min_size=1, max_size=5),
    channels=st.integers(2, 17),
    frames=st.integers(1, 40),
    padding=st.integers(0, 30),
    seed=st.integers(0, 2**20),
)
def test_a_rows_bits_depend_only_on_the_row(
    order: list[int], channels: int, frames: int, padding: int, seed: int
) -> None:
    rows = [GUIDANCES[index] for index in order]
    wide = make_inputs(len(rows), channels=channels, frames=frames + padding, seed=seed)
    wide["conditional"][..., frames:] = float("nan")
    valid = torch.arange(frames + padding) < frames
    together = guide(**wide, valid=valid.expand(len(rows), -1), rows=GuidanceBatch.of(rows))
    for index, row in enumerate(rows):
        alone = {
            name: value[index : index + 1, :, :frames] if value.dim() == 3 else value[index : index + 1]
            for name, value in wide.items()
        }
        lone = guide(**alone, valid=valid[None, :frames], rows=GuidanceBatch.of([row]))
        assert lone.isfinite().all()
        assert torch.equal(together[index, :, :frames], lone[0])


def test_a_frame_with_equal_channels_is_not_rescaled() -> None:
    inputs = make_inputs(len(GUIDANCES))
    inputs["conditional"][..., 2] = inputs["unconditional"][..., 2] = 0.0
    assert guide(**inputs, valid=None, rows=GuidanceBatch.of(GUIDANCES)).isfinite().all()


def test_a_zero_difference_stays_finite() -> None:
    inputs = make_inputs(len(GUIDANCES))
    inputs["unconditional"] = inputs["conditional"].clone()
    assert guide(**inputs, valid=None, rows=GuidanceBatch.of(GUIDANCES)).isfinite().all()
