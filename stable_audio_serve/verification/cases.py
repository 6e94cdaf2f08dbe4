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

# Our names of the arguments of a run, of those that may be lists with a value per row, and of a row's conditioning.
_FIELDS = {
    "steps": "steps",
    "cfg_scale": "cfg_scale",
    "cfg_interval": "cfg_interval",
    "cfg_norm_threshold": "cfg_norm_threshold",
    "scale_phi": "cfg_rescale",
    "apg_scale": "apg_scale",
    "sampler_type": "sampler",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "rho": "rho",
    "init_noise_level": "init_noise_level",
    "duration_padding_sec": "duration_padding_s",
    "chunked_decode": "chunked_decode",  # each of the reference's windows draws its own noise
}
_LISTED = {"prompt": "prompt", "negative_prompt": "negative_prompt", "duration": "duration_s"}
_ROW = {"prompt": "prompt", "seconds_start": "start_s", "seconds_total": "conditioned_total_s"}
_NEGATIVE = {"prompt": "negative_prompt", "seconds_start": "negative_start_s", "seconds_total": "negative_total_s"}
# The reference takes an object as the shift; a stored case names its class or the type of a config.
_SHIFTS = ("dist_shift", "schedule_shift", "schedule", "sampling_dist_shift", "distribution_shift")
_SHIFT_CLASSES = {
    "logsnrshift": "logsnr",
    "fluxdistributionshift": "flux",
    "distributionshift": "full",
    "identitydistributionshift": "none",
}
_REGIONS = ("inpaint_mask_start_seconds", "inpaint_mask_end_seconds")
_READ = ("batch_size", "sample_size", "seed", "conditioning", "negative_conditioning", "init_audio", "inpaint_audio")
_WITHOUT_EFFECT = ("truncate_output_to_duration", "return_latents", "rescale_cfg", "disable_tqdm", "callback")
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
    for stated in (goldens.section("generate_defaults"), facts["args"]):
        args |= {key: value for key, value in stated.items() if value is not None}
    starts, ends = (value if isinstance(value := args.get(edge, []), list) else [value] for edge in _REGIONS)
    requests = [
        GenerationRequest(
            **_renamed(args, _FIELDS),
            **_renamed({key: _of_row(args, key, row=row) for key in _LISTED}, _LISTED),
            seed=row,
            schedule_shift=_shift(args),
            edit_schedule="reference",
            init_audio=_source(args.get("init_audio"), goldens),
            inpaint_audio=_source(args.get("inpaint_audio"), goldens),
            inpaint_regions_s=tuple(zip(starts, ends, strict=True)),
            keep="model",
        )
        for row in range(int(args["batch_size"]))
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]))


def parse_open_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, card: ModelCard) -> Case:
    """Returns a case of the Stable Audio Open family. Raises ValueError without one condition per row."""
    is_v, source = card.objective == "v", None
    args = {**(_V_DEFAULTS if is_v else _FLOW_DEFAULTS), **facts["args"]}
    if not is_v:
        args |= {"sigma_min": None, "rho": None}  # flow samplers drop them
    if inputs := facts.get("inputs"):
        source = SourceAudio(goldens[inputs["init_audio"]].numpy(), int(inputs["init_rate"]))
    rows, negatives = args["conditioning"], args.get("negative_conditioning") or [{}]
    negatives = negatives * len(rows) if len(negatives) == 1 else negatives
    requests = [
        GenerationRequest(
            **_renamed(args, _FIELDS),
            **_renamed(row, _ROW),
            **_renamed(negative, _NEGATIVE),
            duration_s=int(args["sample_size"]) / card.sample_rate_hz,
            seed=index,
            init_audio=source,
            edit_schedule=None if is_v else "reference",
        )
        for index, row, negative in zip(range(int(args.get("batch_size", 1))), rows, negatives, strict=True)
    ]
    return Case(name, tuple(requests), int(args["seed"]), int(args["sample_size"]))


def _renamed(args: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments that are there, by our names."""
    found = {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _of_row(args: Mapping[str, Any], key: str, *, row: int) -> Any:
    """Returns the row's element of a list as long as the batch; any other value applies to every row."""
    value, num_rows = args.get(key), int(args["batch_size"])
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
    return found and SourceAudio(torch.atleast_2d(goldens[found["tensor"]]).numpy(), int(found["sample_rate"]))
