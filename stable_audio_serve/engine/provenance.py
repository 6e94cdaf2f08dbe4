"""Describes the provenance of an engine's audio for a clip's recipe: all that its bytes depend on but the request."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import torch

from stable_audio_serve import __version__
from stable_audio_serve.core.catalog import SA3_FAMILY
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, Loaded, Mode, Provenance
from stable_audio_serve.core.processor import has_matrix_bfloat16, is_amd
from stable_audio_serve.engine.calls.request_state import Prompts
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.models.protocol import ModelSpec
from stable_audio_serve.models.sa3.planning import DEFAULT_APG_SCALE


def name_processor(device: torch.device) -> str:
    """Return a CPU's instruction sets, such as `AVX512 AMX`, or a GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    more = [" AMX"] if has_matrix_bfloat16() else []
    more += [" AMD"] if is_amd() else []
    return torch.backends.cpu.get_cpu_capability() + "".join(more)


def describe_engine(
    spec: ModelSpec, options: EngineOptions, *, device: torch.device, mode: Mode, loaded: Loaded
) -> Provenance:
    """Return the provenance that is common to all requests of an engine."""
    is_cpu, is_fast = device.type == "cpu", mode == "fast"
    # Without oneDNN, torch uses MKL. MKL and AMX split large matrix products by the thread count.
    depends_on_threads = is_cpu and (is_fast or not is_amd())
    return Provenance(
        version=__version__,
        torch=str(torch.__version__),  # a str subclass; unpickling it would import torch
        mode=mode,
        processor=name_processor(device),
        loaded=loaded,
        threads=(options.torch_threads or torch.get_num_threads()) if depends_on_threads else None,
        slots=None if is_cpu or is_fast else options.slots,
        is_compiled=spec.is_compiled,
        transformers=version("transformers"),
    )


def complete_provenance(
    provenance: Provenance, request: GenerationRequest, *, spec: ModelSpec, prompts: Prompts | None
) -> Provenance:
    """Add one request's parameters, defaults filled in, and the number of prompt characters that the model reads."""
    card = spec.card
    edits_by_time = request.init_audio is not None and card.objective != "v"
    is_sa3 = card.family == SA3_FAMILY
    padding_s = card.default_duration_padding_s if is_sa3 else None
    apg_scale = DEFAULT_APG_SCALE if is_sa3 else None
    return replace(
        provenance,
        steps=card.default_steps if request.steps is None else request.steps,
        cfg_scale=card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
        sampler=request.sampler or spec.default_sampler,
        apg_scale=apg_scale if request.apg_scale is None else request.apg_scale,
        duration_padding_s=padding_s if request.duration_padding_s is None else request.duration_padding_s,
        edit_schedule=request.edit_schedule or (card.default_edit_schedule if edits_by_time else None),
        prompt_chars=prompts.prompt.chars_read if prompts else None,
        negative_prompt_chars=prompts.negative.chars_read if prompts and prompts.negative else None,
    )


def require_checkpoint(request: GenerationRequest, *, spec: ModelSpec, loaded: Loaded) -> None:
    """Raise InvalidRequestError if a request names other weights than the loaded ones."""
    if request.checkpoint is None or loaded.checkpoint in (None, request.checkpoint):
        return
    message = f"checkpoint: the model {spec.card.name} has the weights {loaded.checkpoint}, not {request.checkpoint}"
    raise InvalidRequestError(message, field="checkpoint", allowed=loaded.checkpoint)
