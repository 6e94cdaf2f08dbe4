"""Describes the provenance of an engine's audio: everything on which its bytes depend, besides the request itself. The
recipe of each clip contains the provenance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from importlib.metadata import version

import torch

from stable_audio_serve import __version__
from stable_audio_serve.core.catalog import SA3_FAMILY
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, Loaded, Mode, Provenance
from stable_audio_serve.core.processor import arm_design, has_matrix_bfloat16, is_amd
from stable_audio_serve.engine.calls.requests import Prompts
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.profile import Profile
from stable_audio_serve.models.protocol import ModelSpec, TextEmbedding
from stable_audio_serve.models.sa3.planning import DEFAULT_APG_SCALE

# With MKL on an AMD EPYC with AVX2, products of 64 or more rows are the same on up to 25 threads, but not on 26.
_STEADY_THREADS = 16


def name_processor(device: torch.device) -> str:
    """Return the CPU features that torch uses, such as `AVX512 AMX`, or the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    more = [" AMX"] if has_matrix_bfloat16() else []
    more += [" AMD"] if is_amd() else []
    more += [f" {number}" for number in arm_design()]  # other designs add in another order
    return torch.backends.cpu.get_cpu_capability() + "".join(more)


def depends_on_threads(num_threads: int) -> bool:
    """Whether large matrix multiplications on `num_threads` threads have other results than on one, in strict mode.

    Torch uses oneDNN on AMD processors with AVX-512, MKL on other x86-64 processors, and AMX instructions if possible.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    is_steady = capability == "AVX512" or (capability == "AVX2" and num_threads <= _STEADY_THREADS)
    return not (is_amd() and is_steady)


def describe_engine(
    spec: ModelSpec, options: EngineOptions, *, device: torch.device, mode: Mode, loaded: Loaded, profile: Profile
) -> Provenance:
    """Return the provenance that is common to all requests of an engine."""
    is_cpu, is_fast = device.type == "cpu", mode == "fast"
    num_threads = options.torch_threads or torch.get_num_threads()
    names_threads = is_cpu and (is_fast or depends_on_threads(num_threads))
    return Provenance(
        version=__version__,
        torch=str(torch.__version__),  # without `str`, unpickling the value would import torch
        mode=mode,
        processor=name_processor(device),
        loaded=loaded,
        threads=num_threads if names_threads else None,
        slots=None if is_cpu or is_fast else options.slots,
        is_compiled=spec.is_compiled,
        profile=None if is_cpu else profile.name,
        attention=spec.attention or None,
        transformers=version("transformers"),
    )


def complete_provenance(
    provenance: Provenance, request: GenerationRequest, *, spec: ModelSpec, prompts: Collection[Prompts]
) -> Provenance:
    """Return `provenance` with the parameters of one request. Parameters that the request does not set have the model's
    defaults.

    If the model reads only the first characters of a prompt, the number of these characters is added. If the number
    differs between variations, the smallest is added.
    """
    card = spec.card
    edits_by_time = request.init_audio is not None and card.objective != "v"
    is_sa3 = card.family == SA3_FAMILY
    padding_s = card.default_duration_padding_s if is_sa3 else None
    apg_scale = DEFAULT_APG_SCALE if is_sa3 else None
    return replace(
        provenance,
        has_fused_kernels=None if provenance.profile is None else spec.has_fused_kernels,  # known once it has started
        steps=card.default_steps if request.steps is None else request.steps,
        cfg_scale=card.default_cfg_scale if request.cfg_scale is None else request.cfg_scale,
        sampler=request.sampler or spec.default_sampler,
        apg_scale=apg_scale if request.apg_scale is None else request.apg_scale,
        duration_padding_s=padding_s if request.duration_padding_s is None else request.duration_padding_s,
        edit_schedule=request.edit_schedule or (card.default_edit_schedule if edits_by_time else None),
        prompt_chars=_fewest(own.prompt for own in prompts),
        negative_prompt_chars=_fewest(own.negative for own in prompts),
        loras=tuple(replace(lora, source="") for lora in request.loras),
        lora_stacking=(request.lora_stacking or "chained") if request.loras else None,
    )


def _fewest(embeddings: Iterable[TextEmbedding | None]) -> int | None:
    """Return the least `chars_read` of these texts; None if the model reads all of them to the end."""
    read = (embedding.chars_read for embedding in embeddings if embedding is not None)
    return min((chars for chars in read if chars is not None), default=None)


def require_checkpoint(request: GenerationRequest, *, spec: ModelSpec, loaded: Loaded) -> None:
    """Raise InvalidRequestError if a request asks for a checkpoint other than the loaded one."""
    if request.checkpoint is None or loaded.checkpoint in (None, request.checkpoint):
        return
    message = f"checkpoint: the model {spec.card.name} has the weights {loaded.checkpoint}, not {request.checkpoint}"
    raise InvalidRequestError(message, field="checkpoint", allowed=loaded.checkpoint)
