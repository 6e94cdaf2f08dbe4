"""A stored run of a reference as requests: one per row of its batch, in our vocabulary.

Arguments are the reference's own. A run with an unknown argument is skipped, because ignoring the argument would
compare two different runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, ScheduleShift, SourceAudio
from stable_audio_serve.sampling.samplers import DATA_DEPENDENT
from stable_audio_serve.verification.goldens import Goldens

# What the references' generate() does when the goldens do not say: Stable Audio 3, then Stable Audio Open by objective.
DEFAULTS: Mapping[str, Any] = {
    "prompt": "",
    "duration": 120,
    "steps": 8,
    "cfg_scale": 1.0,
    "batch_size": 1,
    "sample_size": 5292032,
    "duration_padding_sec": 6.0,
    "apg_scale": 1.0,
}
_V_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "dpmpp-2m-sde", "sigma_min": 0.01, "sigma_max": 100.0}
_FLOW_DEFAULTS = {"cfg_scale": 6.0, "sampler_type": "euler"}

# Our field of an argument and its type; those that may be lists, one value per row; those of a row's conditioning.
_FIELDS: Mapping[str, tuple[str, type]] = {
    "steps": ("steps", int),
    "cfg_scale": ("cfg_scale", float),
    "cfg_interval": ("cfg_interval", tuple),
    "cfg_norm_threshold": ("cfg_norm_threshold", float),
    "scale_phi": ("cfg_rescale", float),
    "apg_scale": ("apg_scale", float),
    "sampler_type": ("sampler", str),
    "sigma_min": ("sigma_min", float),
    "sigma_max": ("sigma_max", float),
    "rho": ("rho", float),
    "init_noise_level": ("init_noise_level", float),
    "duration_padding_sec": ("duration_padding_s", float),
    "chunked_decode": ("chunked_decode", bool),  # each of the reference's windows draws its own noise
}
_LISTED = {"prompt": ("prompt", str), "negative_prompt": ("negative_prompt", str), "duration": ("duration_s", float)}
_ROW = {"prompt": ("prompt", str), "seconds_start": ("start_s", float), "seconds_total": ("conditioned_total_s", float)}
_NEGATIVE_ROW = {
    "prompt": ("negative_prompt", str),
    "seconds_start": ("negative_start_s", float),
    "seconds_total": ("negative_total_s", float),
}
# The reference takes an object as the shift; a stored case names its class or the type of a config.
_SHIFTS = {"dist_shift", "schedule_shift", "schedule", "sampling_dist_shift", "distribution_shift"}
_SHIFT_CLASSES = {
    "logsnrshift": "logsnr",
    "fluxdistributionshift": "flux",
    "distributionshift": "full",
    "identitydistributionshift": "none",
}
_REGIONS = ("inpaint_mask_start_seconds", "inpaint_mask_end_seconds")
_READ = {"batch_size", "sample_size", "seed", "conditioning", "negative_conditioning", "init_audio", "inpaint_audio"}
_WITHOUT_EFFECT = {"truncate_output_to_duration", "return_latents", "rescale_cfg", "disable_tqdm", "callback"}
_KNOWN = {*_FIELDS, *_LISTED, *_SHIFTS, *_REGIONS, *_READ, *_WITHOUT_EFFECT}


class Case(NamedTuple):
    """One run of a reference. The seeds of `requests` are their rows' numbers; `seed` is the run's.

    `sample_size` (audio samples) caps the run's latent length.
    """

    name: str
    requests: tuple[GenerationRequest, ...]
    seed: int
    sample_size: int


def skip_reason(args: Mapping[str, Any]) -> str | None:
    """Returns why a case cannot be repeated here, or None."""
    unknown = {name for name, value in args.items() if name not in _KNOWN and value is not None}
    for row in (*args.get("conditioning", ()), *(args.get("negative_conditioning") or ())):
        unknown |= row.keys() - _ROW
    if unknown:
        return f"arguments nothing is known about: {', '.join(sorted(unknown))}"
    if args.get("sampler_type") in DATA_DEPENDENT:
        return f"{args['sampler_type']} chooses its steps from the data"
    return "its seed is random" if int(args.get("seed", -1)) < 0 else None


def parse_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, chunked: bool) -> Case:
    """Returns the case `name` with the goldens' defaults filled in; `chunked` is the model's own default.

    Raises CheckpointError naming what is malformed.
    """
    args = {"chunked_decode": chunked, **DEFAULTS}
    for stated in (goldens.facts.get("generate_defaults") or {}, facts["args"]):
        args |= {key: value for key, value in stated.items() if value is not None}
    num_rows = int(args["batch_size"])
    starts, ends = (value if isinstance(value := args.get(edge, []), list) else [value] for edge in _REGIONS)
    requests = [
        GenerationRequest(
            **_fields(args, _FIELDS),
            **_fields({key: _of_row(args.get(key), row, num_rows=num_rows) for key in _LISTED}, _LISTED),
            seed=row,
            schedule_shift=_shift(args),
            edit_schedule="reference",
            init_audio=_source(args.get("init_audio"), goldens),
            inpaint_audio=_source(args.get("inpaint_audio"), goldens),
            inpaint_regions_s=tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True)),
            keep="model",
        )
        for row in range(num_rows)
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]))


def parse_open_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, card: ModelCard) -> Case:
    """Returns a case of the Stable Audio Open family. Raises CheckpointError without one condition per row."""
    is_v = card.objective == "v"
    args = {**(_V_DEFAULTS if is_v else _FLOW_DEFAULTS), **facts["args"]}
    rows, negatives = args["conditioning"], args.get("negative_conditioning") or [{}]
    negatives = negatives * len(rows) if len(negatives) == 1 else negatives
    if {len(rows), len(negatives)} != {int(args.get("batch_size", 1))}:
        raise CheckpointError(f"golden.json: {name} has another number of conditions than rows")
    inputs, ignored = facts.get("inputs"), () if is_v else ("sigma_min", "rho")  # flow samplers drop them
    source = SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"])) if inputs else None
    requests = [
        GenerationRequest(
            **_fields(args, {key: field for key, field in _FIELDS.items() if key not in ignored}),
            **_fields(row, _ROW),
            **_fields(negative, _NEGATIVE_ROW),
            duration_s=int(args["sample_size"]) / card.sample_rate_hz,
            seed=index,
            init_audio=source,
            edit_schedule=None if is_v else "reference",
        )
        for index, (row, negative) in enumerate(zip(rows, negatives, strict=True))
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]))


def _fields(args: Mapping[str, Any], fields: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """Returns the arguments that are there, by our names."""
    return {field: type_(args[name]) for name, (field, type_) in fields.items() if args.get(name) is not None}


def _of_row(value: Any, row: int, *, num_rows: int) -> Any:
    """Returns the row's element of a list as long as the batch; any other value applies to every row."""
    if not isinstance(value, list):
        return value
    if len(value) != num_rows:
        raise CheckpointError(f"golden.json: a list of {len(value)} values for a batch of {num_rows}")
    return value[row]


def _shift(args: Mapping[str, Any]) -> ScheduleShift | None:
    found = next((args[name] for name in _SHIFTS if name in args), None)
    if found is None:
        return None
    stated: dict[str, Any] = {"type": found} if isinstance(found, str) else dict(found)
    kind = str(stated.pop("type", "full")).lower()
    return ScheduleShift(_SHIFT_CLASSES.get(kind, kind), tuple(stated.items()))


def _source(found: Mapping[str, Any] | None, goldens: Goldens) -> SourceAudio | None:
    if found is None:
        return None
    samples = torch.atleast_2d(goldens[found["tensor"]].float())
    return SourceAudio(samples.numpy(), int(found["sample_rate"]))
