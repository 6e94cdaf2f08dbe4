from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.generation import GenerationRequest, Lora, MadeOn, Section, SourceAudio
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.core.sound import AudioFormat, Encoding, Finishing, Loudness
from stable_audio_serve.jobs.job import FinishedSection, JobError, JobResult, JobSpec, JobUpload
from stable_audio_serve.jobs.store import codec

FILE = StoredFile("uploads/x", "audio/wav", "a b\u202e.wav", 12, "ab" * 32)

# Every field differs from its default, so that a test fails if a field is lost.
REQUEST = GenerationRequest(
    prompt='"quoted" ♪ \x00 \n \U0001f3b5 ' + "x" * 1000,
    duration_s=0.1 + 0.2,
    seed=2**63 - 1,
    start_s=1.5,
    negative_prompt="",
    batch_size=3,
    variation_prompts=("a", "b", "c"),
    variation_seeds=(1, 2, 3),
    steps=7,
    cfg_scale=2.5,
    sampler="rk4",
    apg_scale=0.3,
    edit_schedule="reference",
    sigma_min=0.2,
    sigma_max=80.0,
    rho=1.5,
    conditioned_total_s=12.0,
    negative_start_s=1.0,
    negative_total_s=9.0,
    cfg_rescale=0.7,
    cfg_norm_threshold=1e6,
    cfg_interval=(0.1, 0.9),
    duration_padding_s=0.0,
    init_noise_level=0.4,
    inpaint_regions_s=((0.0, 1.0), (2.0, 3.5)),
    keep="model",
    source_start_s=2.5,
    loop="bars",
    loras=(Lora("vinyl", -0.5, (0.2, 0.8), "s3://bucket/vinyl.safetensors", "d" * 64, has_conditioners=True),),
    lora_stacking="summed",
    chunked_decode=False,
    deadline_s=12.5,
    priority="batch",
    start_within_s=3.5,
    checkpoint="c" * 64,
    request_id="r",
    client="alice",
)
SPEC = JobSpec(
    id="1" * 32,
    contract="fal",
    model="small-sfx",
    mode="inpainting",
    request=REQUEST,
    encoding=Encoding(AudioFormat.WAV, 128, "float", 48_000),
    file_stem="stem",
    finishing=Finishing(Loudness(-14.0, -2.0), 0.5, 1.5),
    upload=JobUpload(FILE, "inpaint", 123.5),
    sections=(Section(20.5), Section(30.0, "thunder")),
    overlap_s=12.5,
    limits=KeyLimits(60.0, 4),
    start_within_s=0.5,
    webhook_url="https://example.com/?a=b",
    wire={"base_url": "http://x", "nested": {"list": [1, 2.5, None, True]}},
)


def test_examples_differ_from_every_default() -> None:
    defaults = GenerationRequest("", 0.0, 0)
    kept = {item.name for item in fields(GenerationRequest)} - {"init_audio", "inpaint_audio"}
    assert not [name for name in kept if getattr(REQUEST, name) == getattr(defaults, name)]


def test_specification_survives_exactly() -> None:
    assert codec.load_spec(codec.dump(SPEC)) == SPEC
    plain = replace(SPEC, request=GenerationRequest("x", 1.0, 0), upload=None, wire={})
    assert codec.load_spec(codec.dump(plain)) == plain


@pytest.mark.parametrize("error", [JobError("invalid", "steps: no", "steps"), JobError("storage", "full")])
def test_error_survives_exactly(error: JobError) -> None:
    assert codec.load(JobError, codec.dump(error)) == error


def test_result_survives_exactly() -> None:
    result = JobResult(FILE, "f" * 32, 44100, (5, 2**63 - 1), 0.123456789, ((2, MadeOn("cpu", "float32")),))
    assert codec.load(JobResult, codec.dump(result)) == result


def test_section_survives_exactly() -> None:
    section = FinishedSection(3, FILE, 44100, 22050, 0.123456789)
    assert codec.load(FinishedSection, codec.dump(section)) == section


def test_text_of_another_version_can_be_read() -> None:
    text = json.loads(codec.dump(SPEC))
    text["new_field"] = {"x": 1}
    text["request"]["new_control"] = 3
    del text["file_stem"], text["request"]["apg_scale"]
    spec = codec.load_spec(json.dumps(text))
    assert (spec.file_stem, spec.request.apg_scale) == ("audio", None)


def test_source_audio_is_never_written() -> None:
    source = SourceAudio(np.zeros((2, 10), dtype=np.float32), 44100)
    with pytest.raises(ValueError):
        codec.dump(replace(SPEC, request=replace(REQUEST, init_audio=source)))
