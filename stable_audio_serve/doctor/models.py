"""Checks of one configured model: its files, its adapters, the memory that it takes, its profile and its speed on this
machine.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from stable_audio_serve.core.errors import ConfigError, ModelUnavailableError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.settings import ModelSettings
from stable_audio_serve.doctor.findings import Finding, run_check
from stable_audio_serve.doctor.machine import memory_bytes
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.hardware.device import free_and_total
from stable_audio_serve.engine.hardware.share import DeviceMemory, allowed_bytes, plan_memory, require_share
from stable_audio_serve.engine.options import PLAIN, Features
from stable_audio_serve.models.config_reader import read_config
from stable_audio_serve.models.download import find_local
from stable_audio_serve.models.families import check_config
from stable_audio_serve.models.registry import BUILT_IN, config_folder
from stable_audio_serve.models.weight_sizes import official_weight_bytes, weight_bytes
from stable_audio_serve.models.weights import DTYPES
from stable_audio_serve.serving import engines
from stable_audio_serve.serving.adapters import Library
from stable_audio_serve.serving.placement import Plan, describe_models, model_entry
from stable_audio_serve.serving.preflight import require_weights
from stable_audio_serve.serving.reservations import reserved_gpus

_LENGTHS_S = (10.0, 30.0)
_TRIAL_STEPS = 2
_REPEAT_BELOW_S = 2.0  # the first clip may include one-time work, which matters for short times only
_CPU_SHARE = 0.8  # share of the machine's memory that weights may take; requests need the rest
_LEAST_ROWS_BYTES = 100e6  # enough for a short clip of any official model


class ModelChecks:
    """The checks of one model. `memory` and `speed` need the results of the checks before them."""

    def __init__(self, plan: Plan, model: ModelSettings, *, num_gpus: int) -> None:
        self.name = model.name
        self._plan = plan
        self._settings = plan.settings
        self._model = model
        self._num_gpus = num_gpus
        self._entry = model_entry(model)
        self._device = torch.device(model.device or plan.settings.device or engines.first_device())
        self._folders: tuple[Path, Path] | None = None  # the checkpoint and its text encoder, if both are here
        self._can_load = False  # the files are here or can be downloaded
        self._fits = False
        self.cpu_bytes = 0  # of the weights, if they are on the CPU and their size is known

    @property
    def _gpu_share(self) -> float:
        return reserved_gpus(self._settings, self._model, cluster_gpus=self._num_gpus)

    def files(self) -> Iterator[Finding]:
        """Check that the files are on this machine or can be downloaded. A starting server makes the same check."""
        warnings: list[str] = []
        require_weights(self._plan, [self._model], print_error=warnings.append)
        if warnings:  # a model that loads at its first request
            yield Finding(f"{self.name}: files", "warning", warnings[0].removeprefix("warning: "))
            return
        if (folder := config_folder(self._entry)) is not None:
            check_config(read_config(folder), backend=self._entry.backend)
        self._can_load = True
        self._folders = find_local(self._entry)
        where = f"complete in {self._folders[0]}" if self._folders else "not here yet; the first start downloads them"
        yield Finding(f"{self.name}: files", "ok", where)

    def adapters(self) -> Iterator[Finding]:
        """Check the configured adapters whose files are on this machine. A server starts without those that fail."""
        if not self._model.loras and self._model.lora_folder is None:
            return
        library = Library(
            self._settings.model_copy(update={"models": (self._model,)}), describe_models(self._plan).catalog
        )
        library.start()
        for warning in library.warnings:
            yield Finding(f"{self.name}: adapters", "warning", warning)
        if not library.warnings:
            names = ", ".join(card.name for card in library.cards()) or "the folder is empty"
            yield Finding(f"{self.name}: adapters", "ok", names)

    def memory(self) -> Iterator[Finding]:
        """Check that the weights and requests fit into the GPU's or the machine's memory. Loads no weights."""
        if self._device.type == "cuda" and not self._num_gpus:
            raise ConfigError(f"there is no GPU here that torch can use, but the model's device is {self._device}")
        weights = self._weights_bytes()
        if weights is None:
            if self._can_load:
                yield Finding(f"{self.name}: memory", "ok", "the size is unknown until the files are downloaded")
            return
        self.cpu_bytes = weights if self._device.type == "cpu" else 0
        message, self._fits = (self._fit_gpu if self._device.type == "cuda" else _fit_machine)(weights)
        advice = None if self._fits else "stop other programs, serve a smaller model, or use a device with more memory"
        message = f"weights take {weights / 1e9:.2f} GB of {message}"
        yield Finding(f"{self.name}: memory", "ok" if self._fits else "failure", message, advice)

    def profile(self) -> Iterator[Finding]:
        """Report the profile of the model's replicas, and the reason for it."""
        profile, reason = chosen_profile(self._model, self._device)
        yield Finding(f"{self.name}: profile", "ok", f"{profile} ({reason})")

    def speed(self) -> Iterator[Finding]:
        """Load the model, generate a short clip, and predict the times of longer ones."""
        if self._folders is None or not self._fits:
            return  # `doctor` downloads no weights; the lines above have the reason
        message, clip_s = asyncio.run(self._measure())
        limits = self._settings.api
        is_slow = clip_s > limits.default_deadline_s
        advice = f"requests end after {limits.default_deadline_s:g} s, jobs after {limits.max_deadline_s:g} s, unless "
        advice += "they set `deadline_s`; use fewer steps or a smaller model"
        yield Finding(f"{self.name}: speed", "warning" if is_slow else "ok", message, advice if is_slow else None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the next model

    def features(self) -> Iterator[Finding]:
        """Try each accelerated feature alone. A feature fails if its results differ from those of the plain path."""
        if self._device.type != "cuda":
            yield Finding(f"{self.name}: features", "ok", f"none to try on {self._device.type}")
            return
        for feature in fields(Features):
            name = f"{self.name}: {feature.name}"
            yield from run_check(name, partial(self._try_alone, name, feature.name))

    def _try_alone(self, name: str, feature: str) -> Iterator[Finding]:
        only = replace(PLAIN, **{feature: True})
        tried = self._model.engine.model_copy(update={"profile": "auto", "features": asdict(only)})
        engine = engines.load_engine(self._settings, self._model.model_copy(update={"engine": tried}))
        asyncio.run(_start(engine))
        if engine.profile.features != only:
            raise ValueError(engine.profile.reason)
        yield Finding(name, "ok", "agrees with the plain path")

    def _weights_bytes(self) -> int | None:
        """Return the size of the weights once they are loaded, or None if it is unknown.

        The size is read from the headers of the files. Without files, only the size of an official model is known.
        """
        dtype = DTYPES[engines.precisions(self._settings, self._model, device=self._device)["dtype"]]
        if self._folders is not None:
            folder, text_encoder = self._folders
            return weight_bytes(folder, text_encoder=text_encoder, dtype=dtype)
        official = BUILT_IN.get(self.name)
        if official is None or self._entry.repo_id != official.repo_id:
            return None
        return official_weight_bytes(self.name, dtype=dtype)

    def _fit_gpu(self, weights: int) -> tuple[str, bool]:
        """Return a description of the GPU's memory, and whether weights and requests fit into its free part."""
        share = engines.memory_share(self._model, gpu_share=self._gpu_share)
        free, total = free_and_total(self._device)
        memory = DeviceMemory(total, allowed_bytes(total, share=share), held=0, free=free)
        require_share(memory, name=self.name, weights_bytes=weights, share=share)
        loaded = replace(memory, held=weights, free=free - weights)
        plan = plan_memory(
            loaded,
            max_rows_bytes=self._model.max_memory_bytes,
            prompt_cache_bytes=EngineOptions().prompt_cache_bytes,
            lora_cache_bytes=self._model.lora_cache_bytes,
        )
        rows = max(0, min(plan.rows or 0, loaded.left - plan.prompts - plan.adapters))
        words = f"the GPU's {total / 1e9:.1f} GB ({free / 1e9:.1f} free), requests up to {rows / 1e9:.2f} GB"
        return words, rows >= _LEAST_ROWS_BYTES

    async def _measure(self) -> tuple[str, float]:
        """Return a description of the speed, and the predicted time of the longer clip in seconds."""
        began_at = time.monotonic()
        gpu_share, num_gpus = self._gpu_share, self._num_gpus
        engine = engines.load_engine(self._settings, self._model, gpu_share=gpu_share, cluster_gpus=num_gpus)
        try:
            await engine.start()
            ready_s = time.monotonic() - began_at
            longest_s = engine.spec.card.max_duration_s
            short, long = (GenerationRequest("a tone", min(length, longest_s), seed=0) for length in _LENGTHS_S)
            trial = replace(short, steps=_TRIAL_STEPS)
            took_s = await _time(engine, trial)
            if took_s < _REPEAT_BELOW_S:
                took_s = min(took_s, await _time(engine, trial))
            # A price is for a clip that shares its steps with others. The trial shows how much longer it takes alone.
            prices = engine.prices()
            alone = took_s * 1000.0 / (prices.of_request(trial) or 1.0)
            times_s = [alone * prices.of_request(clip) / 1000.0 for clip in (short, long)]
            per_minute = 60_000.0 / (min(alone, 1.0) * prices.of_request(long))
            message = (
                f"a clip of {short.duration_s:.3g} s takes about {_rounded(times_s[0])} s, of {long.duration_s:.3g} s "
                f"{_rounded(times_s[1])} s; about {_rounded(per_minute)} of the latter a minute "
                f"({engine.device.type}, {engine.dtype}, {engine.mode} mode, ready after {ready_s:.1f} s)"
            )
            return message, times_s[1]
        except ModelUnavailableError as error:
            raise error.__cause__ or error from None  # the cause, a failed warm-up, says more
        finally:
            await engine.close()


def check_shared_memory(checks: Sequence[ModelChecks]) -> Iterator[Finding]:
    """Check that the machine's memory has room for the weights of all models on the CPU together."""
    weights = [each.cpu_bytes for each in checks if each.cpu_bytes]
    if len(weights) < 2:
        return
    message, fits = _fit_machine(sum(weights))
    message = f"the weights of {len(weights)} models together take {sum(weights) / 1e9:.2f} GB of {message}"
    advice = None if fits else "serve fewer models on this machine"
    yield Finding("memory", "ok" if fits else "warning", message, advice)


def _rounded(number: float) -> str:
    """Return two significant digits, without an exponent."""
    return f"{float(f'{number:.2g}'):g}"


def _fit_machine(weights: int) -> tuple[str, bool]:
    total = memory_bytes()
    return f"the machine's {total / 1e9:.1f} GB", weights < _CPU_SHARE * total


async def _time(engine: Engine, request: GenerationRequest) -> float:
    began_at = time.monotonic()
    await engine.generate(request)
    return time.monotonic() - began_at


def chosen_profile(model: ModelSettings, device: torch.device) -> tuple[str, str]:
    """Return the profile that a replica of the model has on this device, and the reason for it."""
    if device.type != "cuda":
        return "plain", "no GPU"
    if model.engine.profile != "auto":
        return model.engine.profile, "the setting engine.profile"
    return "auto", "decided by the check when the replica starts; --features runs it now"


async def _start(engine: Engine) -> None:
    """Start an engine, which checks its profile, and close it."""
    async with engine:
        pass
