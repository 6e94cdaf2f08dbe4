"""How a model plans requests: lengths, random draws, masks, default values and refused values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import SourceAudio
from stable_audio_serve.models.planning import check_request
from stable_audio_serve.models.protocol import RowPlan
from stable_audio_serve.models.windows import chunked_windows
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import loaded
from tests.models.sa3.requests import make_clip, make_request

CASES = [(name, case) for name in SHARP for case in load_goldens(name).facts["cases"]]


def one(name: str = "sharp-s", **fields: Any) -> RowPlan:
    (plan,) = loaded(name).plan(make_request(**fields))
    return plan


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_plan_makes_the_references_draws(name: str, case: str) -> None:
    """The random draws that the plan needs have the shapes and the order of the draws in the reference code."""
    model, facts = loaded(name), load_goldens(name).facts["cases"][case]
    args, tensors = facts["args"], load_goldens(name).tensors

    def clip(key: str) -> SourceAudio | None:
        given = args.get(key)
        return given and SourceAudio(np.atleast_2d(tensors[given["tensor"]].numpy()), given["sample_rate"])

    starts, ends = (np.atleast_1d(args.get(f"inpaint_mask_{end}_seconds", [])).tolist() for end in ("start", "end"))
    rows, duration = args.get("batch_size", 1), args["duration"]
    request = make_request(
        duration_s=max(duration) if isinstance(duration, list) else duration,
        seed=args["seed"],
        steps=args.get("steps"),
        sampler=args.get("sampler_type"),
        init_audio=clip("init_audio"),
        init_noise_level=args.get("init_noise_level", 1.0),
        edit_schedule="reference",
        inpaint_audio=clip("inpaint_audio"),
        inpaint_regions_s=tuple(zip(starts, ends, strict=True)),
        chunked_decode=args.get("chunked_decode", True),
    )
    frames = facts["latent_shape"][-1]
    (plan,) = model.plan(request, frames=frames if "clamped" in case else None)
    latents, encoder, decoder = (
        (rows, model.spec.card.latent_channels),
        model.autoencoder.encoder,
        model.autoencoder.decoder,
    )
    expected = [(*latents, plan.frames)]
    for source in (plan.init_source, plan.inpaint_source):
        if source and model.spec.noisy_source_encoder:
            width = encoder.layers["0"].config.width
            # The reference code also encodes windows of silence that the denoiser does not use.
            expected += [(span.stop - span.start, 1, width) for span in chunked_windows(plan.frames)]
    expected += [(*latents, plan.frames) for evaluation in plan.sampler.evaluations if evaluation.draws_noise]
    for span in plan.decode_windows:
        size, width = span.stop - span.start, decoder.layers["3"].config.width
        expected += [(*latents, size), (rows * size, decoder.frames_per_latent, width)]
    assert expected == [tuple(draw["shape"]) for draw in facts["draws"]]
    if rows == 1:
        assert plan.valid_frames == np.atleast_1d(facts["valid_latents"])[0]
        sigmas = [*(evaluation.sigma for evaluation in plan.sampler.evaluations), 0.0]
        np.testing.assert_allclose(sigmas, np.ravel(facts["sigmas"]), atol=1e-6)


def test_variations_differ_only_in_their_seed() -> None:
    plans = loaded("sharp-s").plan(make_request(batch_size=3, inpaint_audio=make_clip(), inpaint_regions_s=((1, 2),)))
    assert [plan.seed for plan in plans] == [7, 8, 9]
    assert all(plan.inpaint_source is plans[0].inpaint_source for plan in plans)
    assert all(torch.equal(plan.keep_mask, plans[0].keep_mask) for plan in plans)


def test_only_windows_with_kept_frames_are_encoded() -> None:
    """A continuation of one second encodes the first window only. With a region inside the clip, all are encoded."""
    model = loaded("sharp-s")
    longest_s = model.spec.card.max_duration_s
    everything = one(duration_s=longest_s, init_audio=make_clip()).init_source
    assert everything is not None
    assert len(everything.windows) > 2
    for region, expected in (
        ((1.0, longest_s), everything.windows[:1]),
        ((0.5, 1.0), everything.windows),
        ((0.0, longest_s), everything.windows[:1]),
    ):
        plan = one(duration_s=longest_s, inpaint_audio=make_clip(), inpaint_regions_s=(region,))
        assert plan.inpaint_source is not None
        assert plan.inpaint_source.windows == expected


def test_defaults_follow_the_objective() -> None:
    distilled, base = one("sharp-s"), one("sharp-l")
    assert len(distilled.sampler.step_ends) == 8
    assert not any(evaluation.guided for evaluation in distilled.sampler.evaluations)
    assert all(evaluation.draws_noise for evaluation in distilled.sampler.evaluations)
    assert len(base.sampler.step_ends) == 50
    assert base.guidance.cfg_scale == 7.0
    assert all(evaluation.guided for evaluation in base.sampler.evaluations)


def test_the_shortest_clip_is_one_sample() -> None:
    (plan,) = loaded("sharp-s").plan(make_request(duration_s=1e-9))
    assert plan.output_samples == 1


def test_output_length_is_exact() -> None:
    assert one(duration_s=1.2345).output_samples == 1234


@pytest.mark.parametrize(("level", "taken"), [(0.0, 0.01), (0.004, 0.01), (0.01, 0.01), (0.5, 0.5), (1.0, 1.0)])
def test_low_noise_levels_are_raised_to_the_minimum(level: float, taken: float) -> None:
    plan = one(init_audio=make_clip(), init_noise_level=level)
    assert plan.sampler.noise_scale == pytest.approx(taken)
    assert plan.sampler.source_scale == pytest.approx(1 - taken)
    assert all(evaluation.t > 0 for evaluation in plan.sampler.evaluations)


def test_noise_level_without_a_source_is_ignored() -> None:
    assert one(init_noise_level=0.3).sampler.noise_scale == 1.0


def test_a_negative_prompt_counts_only_with_guidance() -> None:
    assert one(negative_prompt="noise", cfg_scale=3.0).negative_prompt == "noise"
    assert one(negative_prompt="noise", cfg_scale=1.0).negative_prompt is None
    assert one(negative_prompt="noise", cfg_scale=3.0, cfg_interval=(2.0, 3.0)).negative_prompt is None
    assert one(negative_prompt="  ", cfg_scale=3.0).negative_prompt is None


def test_a_frame_is_kept_if_its_first_sample_is() -> None:
    hop = loaded("sharp-s").spec.hop  # 64 samples at 1000 Hz
    plan = one(duration_s=1.0, inpaint_audio=make_clip(), inpaint_regions_s=((0.1, 0.2), (0.5, 0.513)))
    keep = [bool(value) for value in plan.keep_mask]
    for frame, kept in enumerate(keep):
        first = frame * hop
        assert kept == (first < 1000 and not 100 <= first < 200 and not 500 <= first < 513)
    assert plan.inpaint_source.samples.shape == (2, plan.frames * hop)


@pytest.mark.parametrize("start_s", [0.61, 0.65, 0.655])
def test_the_last_partial_frame_of_a_continued_source_is_generated(start_s: float) -> None:
    source = SourceAudio(make_clip().samples[:, :650], 1000)  # the last 10 samples begin a new latent frame
    fields = {"duration_s": 1.0, "inpaint_audio": source, "inpaint_regions_s": ((start_s, 1.0),)}
    kept, alone = (one(keep=keep, **fields).keep_mask for keep in ("source", "model"))
    assert [int(mask[:16].sum()) for mask in (kept, alone)] == [10, 10 if start_s == 0.61 else 11]
    inside = one(keep="source", **fields | {"inpaint_regions_s": ((0.1, 0.2), (0.645, 0.65))}).keep_mask
    assert inside[10] == 1


def test_the_request_sets_padding_and_windows() -> None:
    long, short = one(duration_padding_s=6.0), one(duration_padding_s=0.0)
    assert long.frames > short.frames
    assert short.frames * 64 >= short.output_samples
    assert len(one(chunked_decode=True).decode_windows) == 2
    assert len(one(chunked_decode=False).decode_windows) == 1


def test_windows_of_the_reference_that_are_not_exact_are_used_as_they_are() -> None:
    """The reference's last window of 129 frames starts at frame 1, within a chunk of the decoder (2 frames)."""
    (even,), (odd,) = (loaded("sharp-s").plan(make_request(), frames=frames) for frames in (130, 129))
    assert even.decode_rule is not None
    assert odd.decode_rule is None
    assert odd.decode_windows == chunked_windows(129)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "a lone \ud800 surrogate"}, "prompt"),
        ({"negative_prompt": "x" * 100_001}, "negative_prompt"),
        ({"negative_prompt": "\udfff"}, "negative_prompt"),
        ({"duration_s": 0.0}, "duration"),
        ({"duration_s": -1.0}, "duration"),
        ({"duration_s": math.nan}, "duration"),
        ({"duration_s": math.inf}, "duration"),
        ({"duration_s": 16.4}, "duration"),
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"cfg_scale": math.nan}, "cfg_scale"),
        ({"apg_scale": math.inf}, "apg_scale"),
        ({"cfg_rescale": math.nan}, "scale_phi"),
        ({"cfg_norm_threshold": math.nan}, "cfg_norm_threshold"),
        ({"duration_padding_s": -0.1}, "duration_padding_sec"),
        ({"sigma_min": 0.3}, "sigma_min"),
        ({"sigma_max": 500.0}, "sigma_max"),
        ({"rho": 1.0}, "rho"),
        ({"duration_padding_s": math.nan}, "duration_padding_sec"),
        ({"init_audio": make_clip(), "init_noise_level": 1.1}, "init_noise_level"),
        ({"init_audio": make_clip(), "init_noise_level": -0.1}, "init_noise_level"),
        ({"init_audio": make_clip(), "init_noise_level": math.nan}, "init_noise_level"),
        ({"sampler": "no-such-sampler"}, "sampler_type"),
        ({"inpaint_regions_s": ((0.0, 1.0),)}, "audio"),
        ({"inpaint_audio": make_clip(), "inpaint_regions_s": ((1.0, 1.0),)}, "inpaint_start_seconds"),
        ({"inpaint_audio": make_clip(), "inpaint_regions_s": ((-1.0, 1.0),)}, "inpaint_start_seconds"),
        ({"inpaint_audio": make_clip(), "inpaint_regions_s": ((0.0, math.nan),)}, "inpaint_start_seconds"),
    ],
)
def test_unsupported_values_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        loaded("sharp-s").plan(make_request(**fields))
    assert caught.value.field == field


def test_rescaling_needs_several_latent_channels() -> None:
    card = replace(loaded("sharp-s").spec.card, latent_channels=1)
    with pytest.raises(InvalidRequestError, match="scale_phi needs several latent channels, sharp-s has one") as caught:
        check_request(make_request(cfg_rescale=0.5), card)
    assert caught.value.field == "scale_phi"


def test_a_source_without_a_region_keeps_nothing() -> None:
    keep = one(inpaint_audio=make_clip()).keep_mask
    assert keep is not None
    assert not keep.any()
