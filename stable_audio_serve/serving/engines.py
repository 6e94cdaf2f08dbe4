"""Loads a model and its engine in this process. Imports torch, so only processes that run models import this module."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.errors import CheckpointError, ConfigError
from stable_audio_serve.core.generation import Loaded
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.processor import CPU_FACTS, has_native_bfloat16
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import Device, open_device
from stable_audio_serve.engine.hardware.share import WHOLE, require_share
from stable_audio_serve.engine.options import Features
from stable_audio_serve.models.families import find_files, load_model, resolve_device
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.registry import ModelEntry
from stable_audio_serve.models.weight_hash import hash_weights
from stable_audio_serve.models.weights import resolve_dtype
from stable_audio_serve.serving.adapters import adapter_fetcher
from stable_audio_serve.serving.cores import choose_threads
from stable_audio_serve.serving.placement import model_entry

logger = logging.getLogger(__name__)

# This file is written after the capture of a CUDA graph has ended the process, and turns off further captures. Torch's
# version is in the name, because another version may not have the error.
_CAPTURES_OFF = Path(f"~/.cache/stable-audio-serve/captures-off-torch-{torch.__version__}")

_NO_CODE = re.compile("no kernel image|invalid device function")  # torch has no code for this GPU (CUDA, ROCm)
_HUB_PAUSES_S = (2.0, 5.0, 10.0, 20.0, 30.0)


def load_engine(
    settings: Settings,
    model: ModelSettings,
    *,
    gpu_share: float = 1.0,
    cluster_gpus: float = 0.0,
    metrics: Metrics = NullMetrics(),
    open_device: Callable[..., Device] = open_device,
    entry: ModelEntry | None = None,
) -> Engine:
    """Load one configured model and return its engine, which is not started. Raises CheckpointError or ConfigError.

    `gpu_share` is the share of a GPU that Ray reserved for this process. Ray does not enforce the share, so this
    function limits the process's GPU memory: to the setting `memory_share` if it is set, otherwise to a `gpu_share`
    below 1. `entry` replaces the model's own registry entry, which says where the model's files are.
    """
    share = memory_share(model, gpu_share=gpu_share)
    device = open_device(
        resolve_device(model.device or settings.device or first_device()), clock=SystemClock(), share=share
    )
    loaded = load_model(
        entry or model_entry(model),
        device=device.torch_device,
        dtype=_configured_dtype(settings, model),
        decode_precision=model.decode_precision,
        compile=model.compile,
        token=settings.hub_token,
        check_size=partial(_require_room, model.name, device, share) if device.memory() else None,
    )
    threads = choose_threads(settings, model, device=loaded.device.type, cluster_gpus=cluster_gpus)
    decoding = resolve_decode_precision(loaded.device, model.decode_precision, dtype=loaded.spec.dtype)
    return Engine(
        loaded,
        engine_options(model, threads=threads),
        metrics=metrics,
        device=device,
        fetch_adapter=adapter_fetcher(settings),
        loaded=Loaded(decode_precision=decoding, networks=model.backend),
    )


def load_named_engine(settings: Settings, model: ModelSettings) -> Engine:
    """Load an engine outside Ray, and set the hash of its weights, which recipes contain. Blocking."""
    engine = load_engine(settings, model)
    engine.name_checkpoint(hash_weights(*find_files(model_entry(model), token=settings.hub_token)))
    return engine


def fetch_files(settings: Settings, model: ModelSettings, *, pauses_s: Iterable[float] = _HUB_PAUSES_S) -> None:
    """Download a model's files if they are missing. While the hub does not answer, try again after these pauses.

    Otherwise Ray Serve would give the model up after two attempts within seconds. Raises no error if a file cannot be
    downloaded, because loading the model then raises it. Blocking.
    """
    for pause_s in pauses_s:
        try:
            find_files(model_entry(model), token=settings.hub_token)
            return
        except CheckpointError as error:
            if error.retry_after_s is None:
                return
            logger.warning("download: model=%s %s; trying again in %g s", model.name, error.message, pause_s)
            time.sleep(pause_s)


def memory_share(model: ModelSettings, *, gpu_share: float) -> float:
    """Return the share (0..1) of a GPU's memory that a replica may use: the setting `memory_share`, or `gpu_share`."""
    if model.memory_share is not None:
        return model.memory_share
    return gpu_share if 0 < gpu_share < WHOLE else WHOLE


def _require_room(name: str, device: Device, share: float, weights_bytes: int) -> None:  # noqa: PLR0917 - partly bound
    memory = device.memory()
    if memory is not None:
        require_share(memory, name=name, weights_bytes=weights_bytes, share=share)


def engine_options(model: ModelSettings, *, threads: int | None) -> EngineOptions:
    """Return the engine options of a configured model. `threads` is the number of CPU threads for torch."""
    engine = model.engine
    return EngineOptions(
        mode=model.mode,
        max_memory_bytes=model.max_memory_bytes,
        max_queue_s=model.max_queue_s,
        torch_threads=threads,
        profile=engine.profile,
        features=Features(**engine.features),
        captures_off_file=_CAPTURES_OFF.expanduser(),
        warmup_budget_s=engine.warmup_budget_s,
        lora_cache_bytes=model.lora_cache_bytes,
        max_lora_rank=model.max_lora_rank,
    )


def precisions(settings: Settings, model: ModelSettings, *, device: torch.device) -> dict[str, str]:
    """Return the device type, the denoiser's dtype and the decoder's precision as text."""
    dtype = resolve_dtype(device, _configured_dtype(settings, model))
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "decode_precision": resolve_decode_precision(device, model.decode_precision, dtype=dtype),
    }


def speed_hint(
    settings: Settings, model: ModelSettings, *, device: torch.device, gpu_share: float, cpu_facts: Path = CPU_FACTS
) -> str | None:
    """Return a message if a model that runs on `device` could be faster on this machine, otherwise None.

    `gpu_share` is the share of a GPU that Ray reserved for this process. Demo models gain little from bfloat16, so the
    message about it leaves them out.
    """
    if device.type != "cpu":
        return None
    if gpu_share > 0:
        why = "`stable-audio-serve doctor` says why"
        return f"torch cannot use this machine's GPU, so {model.name} runs on the CPU; {why}"
    has_choice = _configured_dtype(settings, model) is None and not model_entry(model).card.is_demo
    if not has_choice or not has_native_bfloat16(cpu_facts):
        return None
    return (
        f"this CPU supports bfloat16, but float32 is used for {model.name}. Set `dtype: bfloat16` and "
        "`decode_precision: half` to generate in a third to two thirds of the time (docs/performance.md explains what "
        "changes)"
    )


def _configured_dtype(settings: Settings, model: ModelSettings) -> str | None:
    return model.dtype or (None if settings.model_half else "float32")


def first_device() -> str:
    """Return the fastest device type that this process may use. Replicas that reserved no GPU see none.

    A GPU for which this build of torch has no code counts as missing.
    """
    if torch.cuda.is_available() and not _lacks_code("cuda"):
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _lacks_code(device: str) -> bool:
    try:
        resolve_device(device)
    except ConfigError as error:  # for another reason, the GPU may be usable later
        return bool(_NO_CODE.search(error.message))
    return False
