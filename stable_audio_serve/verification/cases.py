"""An end-to-end case of the goldens as requests: one per row of the reference's batch, in our vocabulary.

Arguments are the reference's own. A case with an unknown argument is skipped, because ignoring the argument would
compare two different runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest, ScheduleShift, SourceAudio
from stable_audio_serve.verification.goldens import Goldens

# What the reference's generate() does when the goldens do not say.
DEFAULTS: Mapping[str, Any] = {
    "duration": 120,
    "steps": 8,
    "cfg_scale": 1.0,
    "batch_size": 1,
    "sample_size": 5292032,
    "seed": -1,
    "init_noise_level": 1.0,
    "duration_padding_sec": 6.0,
    "apg_scale": 1.0,
}
# The reference takes an object; a stored case names its class or the type of a config.
_SHIFT_NAMES = ("dist_shift", "schedule_shift", "schedule", "sampling_dist_shift", "distribution_shift")
_SHIFT_CLASSES = {
    "logsnrshift": "logsnr",
    "fluxdistributionshift": "flux",
    "distributionshift": "full",
    "identitydistributionshift": "none",
}
_WITHOUT_EFFECT = {"truncate_output_to_duration", "return_latents", "rescale_cfg", "disable_tqdm", "callback"}
_KNOWN = {
    *DEFAULTS,
    *_SHIFT_NAMES,
    *_WITHOUT_EFFECT,
    "prompt",
    "negative_prompt",
    "sampler_type",
    "scale_phi",
    "cfg_norm_threshold",
    "cfg_interval",
    "chunked_decode",
    "init_audio",
    "inpaint_audio",
    "inpaint_mask_start_seconds",
    "inpaint_mask_end_seconds",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the reference. The seeds of `requests` are their rows' numbers; `seed` is the run's.

    `sample_size` (audio samples) caps the run's latent length; `draws` are the shapes of its random draws in order, if
    they are known.
    """

    name: str
    requests: tuple[GenerationRequest, ...]
    seed: int
    sample_size: int
    draws: tuple[tuple[int, ...], ...]


def skip_reason(args: Mapping[str, Any]) -> str | None:
    """Returns why a case cannot be repeated here, or None."""
    unknown = sorted(name for name, value in args.items() if name not in _KNOWN and value is not None)
    if unknown:
        return f"arguments nothing is known about: {', '.join(unknown)}"
    return "its seed is random" if int(args.get("seed", -1)) < 0 else None


def parse_case(name: str, facts: Mapping[str, Any], *, goldens: Goldens, chunked: bool) -> Case:
    """Returns the case `name` with the goldens' defaults filled in; `chunked` is the model's own default.

    Raises CheckpointError naming what is malformed.
    """
    stated = goldens.facts.get("generate_defaults") or {}
    given = {key: value for key, value in facts["args"].items() if value is not None}
    args = {**DEFAULTS, **{key: value for key, value in stated.items() if value is not None}, **given}
    args.setdefault("chunked_decode", chunked)
    num_rows = int(args["batch_size"])
    if num_rows < 1:
        raise CheckpointError(f"golden.json: {name}: batch_size must be at least 1")
    return Case(
        name=name,
        requests=tuple(_request(args, row, num_rows=num_rows, goldens=goldens) for row in range(num_rows)),
        seed=int(args["seed"]),
        sample_size=int(args["sample_size"]),
        draws=tuple(tuple(int(size) for size in draw["shape"]) for draw in facts.get("draws", ())),
    )


def _request(args: Mapping[str, Any], row: int, *, num_rows: int, goldens: Goldens) -> GenerationRequest:
    low, high = args.get("cfg_interval", (0.0, 1.0))
    return GenerationRequest(
        prompt=str(_of_row(args.get("prompt", ""), row, num_rows=num_rows)),
        duration_s=float(_of_row(args["duration"], row, num_rows=num_rows)),
        seed=row,
        negative_prompt=_of_row(args.get("negative_prompt"), row, num_rows=num_rows),
        steps=int(args["steps"]),
        cfg_scale=float(args["cfg_scale"]),
        sampler=args.get("sampler_type"),
        schedule_shift=_shift(args),
        apg_scale=float(args["apg_scale"]),
        edit_schedule="reference",
        cfg_rescale=float(args.get("scale_phi", 0.0)),
        cfg_norm_threshold=float(args.get("cfg_norm_threshold", 0.0)),
        cfg_interval=(float(low), float(high)),
        duration_padding_s=float(args["duration_padding_sec"]),
        init_audio=_source(args.get("init_audio"), goldens),
        init_noise_level=float(args["init_noise_level"]),
        inpaint_audio=_source(args.get("inpaint_audio"), goldens),
        inpaint_regions_s=_regions(args),
        keep="model",
        chunked_decode=bool(args["chunked_decode"]),  # each of the reference's windows draws its own noise
    )


def _of_row(value: Any, row: int, *, num_rows: int) -> Any:
    """Returns the row's element of a list as long as the batch; any other value applies to every row."""
    if not isinstance(value, list):
        return value
    if len(value) != num_rows:
        raise CheckpointError(f"golden.json: a list of {len(value)} values for a batch of {num_rows}")
    return value[row]


def _shift(args: Mapping[str, Any]) -> ScheduleShift | None:
    found = next((args[name] for name in _SHIFT_NAMES if name in args), None)
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


def _regions(args: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    """Returns (start, end) pairs in seconds, from scalars or from lists of one length."""
    edges: list[Sequence[float]] = []
    for name in ("inpaint_mask_start_seconds", "inpaint_mask_end_seconds"):
        value = args.get(name, [])
        edges.append(value if isinstance(value, list) else [value])
    starts, ends = edges
    return tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True))
