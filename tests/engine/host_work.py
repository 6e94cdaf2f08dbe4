"""Count the host's work (copies, waits, kernel launches) in each kind of engine call, for each kind of request.

The real engine runs small checkpoints on the simulated device of `stand_in_device`. The tests and the benchmark goals
state the limits for these counts. Counting must run in a separate process (`run_apart`), because the simulated device
cannot be removed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from stable_audio_serve.core.generation import DeviceUse, GenerationRequest, Mode, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions, build
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.engine.calls.stages import Stages
from stable_audio_serve.engine.hardware.device import CudaDevice, Device, Moment
from stable_audio_serve.engine.hardware.share import DeviceMemory
from stable_audio_serve.engine.options import Features
from stable_audio_serve.engine.scheduling.cost import Measurement
from stable_audio_serve.engine.scheduling.scheduler import RowId, Scheduler
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.weights import DTYPES, cast_network
from stable_audio_serve.sampling.samplers import SAMPLERS
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS
from tests.engine.stand_in_device import DEVICE, HostWork, StandInDevice, move

Item = TypeVar("Item")
Result = TypeVar("Result")

Family = Literal["sa3", "open"]
_GOLDENS = Path(__file__).parents[1] / "data/goldens"
CHECKPOINTS: dict[Family, Path] = {"sa3": _GOLDENS / "sa3/sharp-s", "open": _GOLDENS / "sao/tiny-1.0"}
REQUESTS = ("plain", "guided", "variation", "inpaint", "mixed")
_FAMILY_SAMPLERS: dict[Family, tuple[str, ...]] = {"sa3": tuple(SAMPLERS), "open": V_SAMPLERS}
KINDS: dict[Family, tuple[str, ...]] = {
    family: (*REQUESTS, *(f"sampler {name}" for name in samplers)) for family, samplers in _FAMILY_SAMPLERS.items()
}
# Kinds of engine calls, and the method that makes each. Work in an inner call does not count for the outer call.
_CALLS = (
    ("text", Stages, "start"),
    ("begin", Stages, "_set_registers"),
    ("encode", Stages, "encode"),
    ("denoise", Executor, "_evaluate"),
    ("finish", Stages, "_take_latents"),
    ("decode", Stages, "decode"),
)
_COUNTED = ("copies_to_device", "copies_to_host", "asynchronous_copies", "waits", "mix_ups", "launches")
_STEPS = 3
_DURATIONS_S: dict[Family, float] = {"sa3": 2.0, "open": 0.4}  # short for `open`, whose tiny model has a high rate
_ROWS = 2  # rows per request, so that no step has a single row


@dataclass(frozen=True, slots=True)
class Setting:
    """What to run and count: a kind of request from KINDS, and the engine's mode, dtype and model family."""

    kind: str
    mode: Mode = "fast"
    dtype: Literal["float16", "float32"] = "float16"
    family: Family = "sa3"


def run_apart(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Start one separate process and call the function there for each item. Returns the results."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return list(process.map(function, items))


def count(setting: Setting) -> dict[str, Any]:
    """Count the work of a setting's requests.

    Returns, by kind of engine call, the number of calls and the highest count of each kind of work in a single call.

    All requests run once before counting starts, so work that happens only once in a process does not count.
    """
    torch.set_num_threads(1)
    device = StandInDevice()
    sections = asyncio.run(_run(make_model(setting.family, dtype=setting.dtype), setting, device=device))
    return {name: _worst([work for section, work in sections if section == name]) for name, _, _ in _CALLS}


def make_model(family: Family, *, dtype: str) -> Sa3Model | SaoModel:
    """Returns a small model on the stand-in device, with the denoiser converted to `dtype`."""
    folder = CHECKPOINTS[family]
    model = load_model(resolve_entry(folder.name, path=str(folder)))
    assert isinstance(model, Sa3Model | SaoModel)
    cast_network(model.denoiser, DTYPES[dtype])
    for module in (model.text.encoder, model.prompt, *model.numbers.values(), model.denoiser, model.autoencoder):
        move(module)
    model._device = DEVICE
    with torch.inference_mode(), StandInDevice():  # `resolve` makes tensors from the weights, on the weights' device
        model.autoencoder.resolve()
    return model


def make_requests(setting: Setting, *, sample_rate_hz: int, seed: int) -> list[GenerationRequest]:
    """Returns requests of the setting's kind that can share sampling steps. Raises ValueError for an unknown kind."""

    duration_s = _DURATIONS_S[setting.family]

    def request(**fields: Any) -> GenerationRequest:
        return GenerationRequest(
            prompt=f"rain on a roof, take {seed}",
            duration_s=duration_s,
            seed=seed,
            steps=_STEPS,
            batch_size=_ROWS,
            duration_padding_s=0.0 if setting.family == "sa3" else None,
            **{"cfg_scale": 1.0, **fields},
        )

    noise = np.random.default_rng(0).normal(0.0, 0.1, (2, int(duration_s * sample_rate_hz))).astype(np.float32)
    source = SourceAudio(noise, sample_rate_hz)
    guided = {"cfg_scale": 4.0, "negative_prompt": f"hiss, take {seed}"}
    inpaint = {"inpaint_audio": source, "inpaint_regions_s": ((duration_s / 4, duration_s / 2),)}
    if setting.kind.startswith("sampler "):
        return [request(sampler=setting.kind.removeprefix("sampler "))]
    match setting.kind:
        case "plain":
            return [request()]
        case "guided":
            return [request(**guided)]
        case "variation":
            return [request(init_audio=source, init_noise_level=0.5)]
        case "inpaint":
            return [request(**inpaint)]
        case "mixed":
            other_sampler = _FAMILY_SAMPLERS[setting.family][-2]  # a sampler that is not the family's default
            return [request(), request(**guided), request(**inpaint), request(sampler=other_sampler)]
    raise ValueError(f"unknown kind of request {setting.kind!r}")


async def _run(model: DiffusionModel, setting: Setting, *, device: StandInDevice) -> list[tuple[str, HostWork]]:
    """Run the requests twice, with different seeds. Returns the counted engine calls of the second run."""
    # Without a warm-up, the engine has no measured times by which it would split the rows into several steps.
    options = EngineOptions(mode=setting.mode, profile="accelerated", warmup_budget_s=0.0, fixed_share=0.001)
    num_before = 0
    with _sections(device):
        requests = [make_requests(setting, sample_rate_hz=model.spec.card.sample_rate_hz, seed=seed) for seed in (0, 1)]
        num_rows = sum(request.batch_size for request in requests[0])
        async with _StandInEngine(model, options, device=device, num_rows=num_rows) as engine:
            for some in requests:
                num_before = len(device.sections)
                await asyncio.gather(*(engine.generate(request) for request in some))
    return device.sections[num_before:]


class _StandInEngine(Engine):
    """An engine on a stand-in device. It starts sampling when `num_rows` rows are waiting."""

    def __init__(self, model: DiffusionModel, options: EngineOptions, *, device: StandInDevice, num_rows: int) -> None:
        with patch.object(build, "Scheduler", partial(_Together, num_rows=num_rows)):
            super().__init__(model, options, device=_QueueingDevice(device))
        # With these measurements, one call for all rows is predicted to be much faster than two, even with dummy rows.
        self._predictor._cost.fit("denoise", [Measurement(rows, 64, 1000.0) for rows in (1, 32)])
        self._thread._sharing = device


class _QueueingDevice(CudaDevice):
    """A CUDA device of the engine whose work runs on a stand-in device.

    A call counts as finished only after the next call has begun. This simulates the queue of work on a GPU.
    """

    def __init__(self, stand_in: StandInDevice) -> None:
        super().__init__(DEVICE, features=Features(captures=False))  # a replayed graph would hide the work of the call
        self._stand_in = stand_in

    def host_buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype).pin_memory()

    def mark(self) -> Moment:
        return _Point(self._stand_in)

    @contextmanager
    def on_second_queue(self, *reads: Tensor) -> Iterator[None]:
        yield

    def follow(self, moment: Moment) -> None:
        """Do nothing, because the stand-in device does all work immediately."""

    def restricted(self, features: Features) -> Device:
        return self

    def use(self) -> DeviceUse:
        return DeviceUse(DEVICE.type)

    def memory(self) -> DeviceMemory | None:
        return None


class _Point:
    def __init__(self, stand_in: StandInDevice) -> None:
        self._stand_in = stand_in
        self._num_sections = len(stand_in.sections)

    def is_reached(self) -> bool:
        return len(self._stand_in.sections) > self._num_sections

    def wait(self) -> None:
        self._stand_in.wait("moment")
        self._num_sections = -1

    def ms_since(self, earlier: Moment) -> float:
        return 1.0


class _Together(Scheduler):
    """Picks no rows until `num_rows` rows are waiting, so that all rows share every step."""

    def __init__(self, *args: Any, num_rows: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_rows = num_rows
        self._has_begun = False

    def pick(self, *, use_second_queue: bool = True) -> list[RowId]:
        num_waiting = len(self._entries)
        self._has_begun = num_waiting >= self._num_rows or (self._has_begun and num_waiting > 0)
        return super().pick(use_second_queue=use_second_queue) if self._has_begun else []


@contextmanager
def _sections(device: StandInDevice) -> Iterator[None]:
    """Within this context, count the work of every engine call in its own section of the device."""

    def within(name: str, method: Any) -> Any:
        @wraps(method)
        def run(owner: Stages | Executor, rows: Any, **options: Any) -> Any:
            if not rows:  # the engine calls some methods in each loop, even without rows
                return method(owner, rows, **options)
            with device.section(name):
                return method(owner, rows, **options)

        return run

    with ExitStack() as stack:
        for name, owner, method in _CALLS:
            stack.enter_context(patch.object(owner, method, within(name, getattr(owner, method))))
        yield


def _worst(works: Sequence[HostWork]) -> dict[str, Any]:
    origins: Counter[str] = Counter()
    for work in works:
        origins |= work.origins
    return {
        "calls": len(works),
        **{name: max((getattr(work, name) for work in works), default=0) for name in _COUNTED},
        "blocking_copies": max((work.blocking_copies for work in works), default=0),
        "origins": dict(origins.most_common()),
    }
