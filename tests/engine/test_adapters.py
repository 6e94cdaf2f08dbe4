"""Requests with different adapters share denoising steps. A model with the adapters merged in gives the same audio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from math import nextafter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError, ModelUnavailableError, OverloadedError, StorageError
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Lora, Progress, Stacking
from stable_audio_serve.engine import Engine, EngineOptions, adapters
from stable_audio_serve.engine.scheduling.batching import FixedSlots
from stable_audio_serve.models.adapters.adapter import read_adapter
from stable_audio_serve.models.adapters.base import Base
from stable_audio_serve.models.adapters.fold import fold
from stable_audio_serve.models.adapters.slot_table import SlotTable
from stable_audio_serve.models.protocol import ModelSpec, RowConditioning, StepBatch
from stable_audio_serve.models.sa3.model import Sa3Model
from tests.engine.capturing import MOST_ROUNDS, GraphCounts, RecordedDevice
from tests.engine.test_packed_step import packing
from tests.factories import ToyModel, make_audio, make_request
from tests.models.adapters.plain import TYPES, Change, dense_weight, make_change, write_adapter
from tests.models.forwarding import ForwardingModel
from tests.models.loaded import loaded
from tests.models.packing import attend_varlen
from tests.parameters import slow
from tests.patience import PATIENCE_S, until
from tests.recorded_metrics import RecordedMetrics

TOLERANCE = 2e-4  # relative to the clip's peak
STEPS = 4


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("singular")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SINGULAR_VECTORS", cache_folder)


@cache
def base() -> Base:
    return Base("tiny-s", loaded("tiny-s").adaptable)


@cache
def change(kind: str, *, seed: int = 0, strength: float = 1.0, conditioners: bool = False) -> Change:
    """Returns an adapter for all layers. Without `conditioners`, it does not change the conditioners' layers.

    Its magnitudes are near the norms of the weights, as in trained adapters.
    """
    layers = [layer for layer in base().layers if conditioners or not layer.startswith("conditioners.")]
    alpha = 5.0 if kind.endswith("-xs") else 0.1  # about the same effect
    made = make_change(base(), kind, alpha=alpha, strength=strength, seed=seed, layers=layers)
    for layer, parts in made.tensors.items():
        if "magnitude" in parts:
            norms = base().weight(layer).norm(dim=1)
            parts["magnitude"] = (norms * (1 + 0.1 * parts["magnitude"].float().clamp(-2, 2))).half()
    return made


def make_lora(folder: Path, made: Change, *, name: str = "vinyl", **fields: Any) -> Lora:
    config = {"rank": made.rank, "alpha": made.alpha, "adapter_type": made.type}
    file = write_adapter(folder / f"{name}.safetensors", made.tensors, config)
    return replace(Lora(name, made.strength, source=str(file)), **fields)


def make_changed_model(changes: Sequence[Change], *, stacking: Stacking = "chained") -> Sa3Model:
    """Returns a newly loaded model in which the changes are merged into the layers' weights."""
    model = loaded.__wrapped__("tiny-s")
    for name, layer in Base("changed", model.adaptable).layers.items():
        weight = dense_weight(base().weight(name), name, changes, stacking=stacking)
        layer.weight.data = weight.float().view_as(layer.weight)
    return model


def make_clip(**fields: Any) -> GenerationRequest:
    return make_request("a bell", seed=3, steps=STEPS, duration_padding_s=0.0, **fields)


REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"duration_s": 0.9},
    "guided": {"duration_s": 0.7, "cfg_scale": 3.0, "negative_prompt": "noise"},
    "variation": {"duration_s": 0.8, "init_audio": make_audio(0.8), "init_noise_level": 0.6},
    "inpaint": {"duration_s": 0.8, "inpaint_audio": make_audio(0.8), "inpaint_regions_s": ((0.2, 0.5),)},
    "several": {"duration_s": 0.6, "batch_size": 2},
}


@asynccontextmanager
async def running(model: object = None, mode: str = "strict", **fields: Any) -> AsyncIterator[Engine]:
    names = {"fetch_adapter", "device", "metrics", "policy"}
    given = {name: fields.pop(name) for name in names & set(fields)}
    if mode == "padded":
        fields["frame_grid"] = 256
    if mode == "slots":  # strict mode on a GPU
        given["policy"] = FixedSlots(slots=4, grid=64)
    options = EngineOptions(
        mode="strict" if mode in ("strict", "slots") else "fast",
        warmup_budget_s=0.0,
        torch_threads=1,
        fixed_share=0.001,
        **fields,
    )
    async with Engine(model or loaded("tiny-s"), options, **given) as engine:  # type: ignore[arg-type]
        yield engine


async def generate(request: GenerationRequest, model: object = None, **fields: Any) -> GenerationResult:
    async with running(model, **fields) as engine:
        return await engine.generate(request)


def assert_alike(found: GenerationResult, expected: GenerationResult, *, within: float = TOLERANCE) -> None:
    for one, other in zip(found.audio, expected.audio, strict=True):
        assert np.abs(one - other).max() <= within * np.abs(other).max()


def assert_same(found: GenerationResult, expected: GenerationResult) -> None:
    assert [audio.tobytes() for audio in found.audio] == [audio.tobytes() for audio in expected.audio]


@pytest.mark.parametrize("kind", TYPES)
async def test_an_adapter_works_like_changed_weights(tmp_path: Path, kind: str) -> None:
    made = change(kind, strength=0.8)
    request = make_clip(duration_s=0.9)
    plain, changed = await generate(request), await generate(request, make_changed_model([made]))
    for mode in ("strict", "fast"):
        found = await generate(replace(request, loras=(make_lora(tmp_path, made),)), mode=mode)
        assert_alike(found, changed)
        assert np.abs(found.audio[0] - plain.audio[0]).max() > 0.05 * np.abs(plain.audio[0]).max()


@cache
def chain() -> list[Change]:
    return [change("dora-rows", strength=0.5), change("lora", seed=1, strength=-0.7), change("dora-rows-xs", seed=2)]


@cache
def load_chained(stacking: Stacking) -> Sa3Model:
    return make_changed_model(chain(), stacking=stacking)


@pytest.mark.parametrize(
    ("kind", "stacking"),
    [*((kind, "chained") for kind in REQUESTS), ("guided", "summed"), slow("inpaint", "summed")],
)
async def test_a_chain_of_three_works_in_all_requests(tmp_path: Path, kind: str, stacking: Stacking) -> None:
    loras = tuple(make_lora(tmp_path, made, name=f"a{index}") for index, made in enumerate(chain()))
    request = make_clip(**REQUESTS[kind])
    found = await generate(replace(request, loras=loras, lora_stacking=stacking), mode="fast")
    assert_alike(found, await generate(request, load_chained(stacking)))


async def test_conditioners_change_only_if_the_request_says_so(tmp_path: Path) -> None:
    made, request = change("lora", conditioners=True), make_clip(duration_s=0.9)
    lora = make_lora(tmp_path, made)
    kept = {layer: parts for layer, parts in made.tensors.items() if not layer.startswith("conditioners.")}
    for has_conditioners, expected in ((True, made), (False, replace(made, tensors=kept))):
        asked = replace(request, loras=(replace(lora, has_conditioners=has_conditioners),))
        assert_alike(await generate(asked), await generate(request, make_changed_model([expected])))


def make_mixed(folder: Path) -> list[GenerationRequest]:
    """Returns ten requests that differ in adapters, strengths, chains, intervals and lengths; two have no adapter."""
    loras = [
        make_lora(folder, change(kind, seed=index), name=f"m{index}", interval=interval)
        for index, (kind, interval) in enumerate(zip(TYPES, [(0, 1), (0, 1), (0.5, 1), (0, 0.7)], strict=True))
    ]
    chains = [(), loras[:1], loras[1:2], loras[2:3], loras[3:], loras[:2], (replace(loras[0], strength=0.3),), ()]
    chains += [loras[2:], loras[1::-1]]
    shapes = [*REQUESTS.values(), *({"duration_s": seconds} for seconds in (0.9, 0.5, 0.4, 0.7))]
    shapes.insert(7, {"duration_s": 0.3, "cfg_scale": 2.0})
    return [make_clip(**shape, loras=tuple(chain)) for shape, chain in zip(shapes, chains, strict=True)]


async def test_requests_with_other_adapters_change_nothing(tmp_path: Path) -> None:
    requests = make_mixed(tmp_path)
    alone = [await generate(request) for request in requests]
    for mode in ("strict", "slots", "packed", "padded"):
        async with running(mode=mode) as engine:
            together = await asyncio.gather(*map(engine.generate, requests))
        own = [await generate(request, mode=mode) for request in requests] if mode == "slots" else alone
        for request, found, expected, plain in zip(requests, together, own, alone, strict=True):
            if mode in ("strict", "slots"):
                assert_same(found, expected)
            else:
                assert_alike(found, expected)
            if not request.loras:
                assert_alike(found, plain)


async def test_a_neighbour_with_the_same_adapter_changes_no_byte(tmp_path: Path) -> None:
    lora = make_lora(tmp_path, change("lora"))
    requests = [replace(make_clip(duration_s=0.9, loras=(lora,)), seed=seed) for seed in range(2)]
    async with running(mode="slots") as engine:
        together = await asyncio.gather(*map(engine.generate, requests))
    for request, found in zip(requests, together, strict=True):
        assert_same(found, await generate(request, mode="slots"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "guided", "inpaint"])
async def test_captured_steps_use_the_adapters_of_their_rows(tmp_path: Path, kind: str) -> None:
    """Graphs that were captured with two adapters are replayed with two other adapters in the same memory slots."""
    model, device, metrics = loaded("tiny-s"), RecordedDevice(), GraphCounts()
    layers = {name: layer for name, layer in base().layers.items() if model.runs_in_steps(name)}
    loras = [make_lora(tmp_path, change(each, seed=2), name=each) for each in TYPES]
    asked = [make_clip(**REQUESTS[kind], loras=(lora,)) for lora in loras]
    room = 4 * SlotTable.page_bytes(layers)  # two pages, and as much for the adapters themselves
    async with running(mode="fast", device=device, metrics=metrics, lora_cache_bytes=room, frame_grid=64) as engine:
        for _ in range(MOST_ROUNDS):
            before = device.num_replays
            for request in asked[:2]:
                await engine.generate(request)
            if device.num_replays >= before + 2 * STEPS:
                break
            await metrics.are_captured("denoise")
        before = device.num_replays
        found = [await engine.generate(request) for request in asked[2:]]
        assert device.num_replays >= before + 2 * STEPS
        plain = await engine.generate(make_clip(**REQUESTS[kind]))
    for one, own in zip([*found, plain], [*asked[2:], make_clip(**REQUESTS[kind])], strict=True):
        assert_alike(one, await generate(own))


async def test_captured_packed_steps_use_the_adapters_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stable_audio_serve.models.native.attend_packed", attend_varlen)
    model, device, metrics = loaded("tiny-s"), RecordedDevice(), GraphCounts()
    loras = [make_lora(tmp_path, change(each, seed=2), name=each) for each in TYPES]
    chains = [(), *((lora,) for lora in loras), tuple(loras[:2])]
    asked = [
        make_clip(**shape, loras=chain)
        for shape, chain in zip([*REQUESTS.values(), {"duration_s": 0.3}], chains, strict=True)
    ]
    alone = [await generate(request) for request in asked]
    async with running(mode="fast", device=device, metrics=metrics, policy=packing(model)) as engine:
        for _ in range(MOST_ROUNDS):
            together = await asyncio.gather(*map(engine.generate, asked))
            for found, expected in zip(together, alone, strict=True):
                assert_alike(found, expected)
            if await metrics.are_captured("denoise") and device.num_replays:
                break
    assert device.num_replays


class Compiled(ForwardingModel):
    """A model with the spec of a compiled one."""

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, is_compiled=True)


async def test_a_compiled_model_captures_no_steps_with_adapters(tmp_path: Path) -> None:
    """Compiled layers ignore the adapters of a captured step."""
    device, metrics = RecordedDevice(), GraphCounts()
    adapted = make_clip(duration_s=0.9, loras=(make_lora(tmp_path, change("lora")),))
    async with running(Compiled(loaded("tiny-s")), "fast", device=device, metrics=metrics, frame_grid=64) as engine:
        for _ in range(3):
            await engine.generate(adapted)
        await metrics.are_captured("denoise")
        assert metrics.graphs.get("denoise", 0) == 0
        for _ in range(20):
            await engine.generate(make_clip(duration_s=0.9))
            if await metrics.are_captured("denoise"):
                return
    pytest.fail("no step without adapters was captured")


class Switching(ForwardingModel):
    """Evaluates the model `late` at times below `until`, and the model `early` at other times.

    Supports only unguided requests that are not variations.
    """

    def __init__(self, early: Sa3Model, late: Sa3Model, *, until: float) -> None:
        super().__init__(early)
        self._models = early, late
        self._until = until

    def condition(self, *args: Any, **kwargs: Any) -> RowConditioning:
        self._conditioned = [model.condition(*args, **kwargs) for model in self._models]
        return self._conditioned[0]

    def denoise(self, batch: StepBatch) -> Tensor:
        late = float(batch.t[0]) < self._until
        branch = self._conditioned[late].conditional
        own = StepBatch.of(batch.x, t=batch.t, valid=batch.valid, branches=[branch])  # type: ignore[arg-type]
        return self._models[late].denoise(own)


@pytest.mark.parametrize("kind", ["text", "inpaint"])
async def test_an_adapter_applies_within_its_interval(tmp_path: Path, kind: str) -> None:
    made, request = change("dora-rows"), make_clip(**REQUESTS[kind])
    changed = make_changed_model([made])
    lora = make_lora(tmp_path, made)
    for interval, models in {
        (0.6, 1.0): (changed, loaded("tiny-s")),
        (0.0, 0.6): (loaded("tiny-s"), changed),
    }.items():
        found = await generate(replace(request, loras=(replace(lora, interval=interval),)), mode="fast")
        assert_alike(found, await generate(request, Switching(*models, until=0.6)))


async def test_failed_conditioning_at_an_interval_ends_only_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition, num_calls = Sa3Model.condition, 0

    def fail_second(*args: Any, **kwargs: Any) -> RowConditioning:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise InvalidRequestError("a bad adapter", field="loras")
        return condition(*args, **kwargs)

    monkeypatch.setattr(Sa3Model, "condition", fail_second)
    lora = make_lora(tmp_path, change("lora"), interval=(0.0, 0.6))
    async with running() as engine:
        with pytest.raises(InvalidRequestError, match="a bad adapter"):
            await engine.generate(make_clip(duration_s=0.9, loras=(lora,)))
        assert await engine.generate(make_clip(duration_s=0.9))


async def test_the_ends_of_an_interval_belong_to_it(tmp_path: Path) -> None:
    lora = make_lora(tmp_path, change("lora"))
    request = make_clip(duration_s=0.9)
    evaluations = loaded("tiny-s").plan(request)[0].sampler.evaluations
    times = [evaluation.t for evaluation in evaluations]
    whole = await generate(replace(request, loras=(lora,)))
    # Times are compared in float32, in which both ends are those of the plan.
    ends = replace(lora, interval=(nextafter(min(times), 1.0), nextafter(max(times), 0.0)))
    assert_same(await generate(replace(request, loras=(ends,))), whole)
    outside = replace(lora, interval=(0.0, min(times) / 2))
    assert_same(await generate(replace(request, loras=(outside,))), await generate(request))


async def test_strength_zero_is_the_plain_request(tmp_path: Path) -> None:
    request = make_clip(duration_s=0.9)
    lora = make_lora(tmp_path, change("dora-rows"), strength=0.0)
    assert_same(await generate(replace(request, loras=(lora,))), await generate(request))


async def test_an_adapter_is_loaded_once_and_while_others_run(tmp_path: Path) -> None:
    opened = threading.Event()

    def fetch(source: str) -> Path:
        assert opened.wait(PATIENCE_S)
        return Path(source)

    lora = make_lora(tmp_path, change("lora"))
    sha256 = read_adapter(Path(lora.source)).sha256
    lora, request = replace(lora, sha256=sha256), make_clip(duration_s=0.6)
    async with running(fetch_adapter=fetch) as engine:
        waiting = asyncio.create_task(engine.generate(replace(request, loras=(lora,))))
        plain = await asyncio.wait_for(engine.generate(request), PATIENCE_S)
        assert not waiting.done()
        opened.set()
        adapted = await waiting
        Path(lora.source).unlink()  # noqa: ASYNC240 - a small file
        again = await engine.generate(replace(request, loras=(replace(lora, sha256=sha256),)))
    assert_same(again, adapted)
    assert plain.audio[0].tobytes() != adapted.audio[0].tobytes()


async def test_one_client_cannot_take_all_places_to_wait_for_adapters(tmp_path: Path) -> None:
    """While one client's requests wait for a slow adapter, requests with loaded adapters run without waiting.

    Another client's request may also wait for the slow adapter.
    """
    opened = threading.Event()

    def fetch(source: str) -> Path:
        assert "slow" not in source or opened.wait(PATIENCE_S)
        return Path(source)

    known = make_lora(tmp_path, change("lora"), name="known")
    known = replace(known, sha256=read_adapter(Path(known.source)).sha256)
    slow, request = make_lora(tmp_path, change("lora"), name="slow"), make_clip(duration_s=0.3, client="greedy")
    async with running(fetch_adapter=fetch) as engine:
        before = await engine.generate(replace(request, loras=(known,)))
        tasks = [
            asyncio.create_task(engine.generate(replace(request, loras=(replace(slow, strength=number / 20),))))
            for number in range(1, 21)
        ]
        assert_same(await engine.generate(replace(request, loras=(known,))), before)
        other = asyncio.create_task(engine.generate(replace(request, loras=(slow,), client="other")))
        await until(lambda: sum(task.done() for task in tasks) == 12)
        opened.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await other
    assert [type(outcome) for outcome in outcomes] == [GenerationResult] * 8 + [OverloadedError] * 12


async def test_failed_downloads_of_adapters_may_be_retried(tmp_path: Path) -> None:
    is_away = True

    def fetch(source: str) -> Path:
        if is_away:
            raise InvalidRequestError("adapter source 's3://secret/a.safetensors': cannot be downloaded", field="loras")
        return Path(source)

    lora = make_lora(tmp_path, change("lora"), name="vinyl")
    async with running(fetch_adapter=fetch) as engine:
        for sha256 in ("", read_adapter(Path(lora.source)).sha256):
            request = make_clip(duration_s=0.3, loras=(replace(lora, sha256=sha256),))
            is_away = True
            with pytest.raises(StorageError, match="adapter 'vinyl' cannot be downloaded now") as caught:
                await engine.generate(request)
            assert "secret" not in caught.value.message
            is_away = False
            await engine.generate(request)


async def test_a_closing_engine_ends_requests_that_wait_for_adapters(tmp_path: Path) -> None:
    opened = threading.Event()

    def fetch(source: str) -> Path:
        assert opened.wait(PATIENCE_S)
        return Path(source)

    request = make_clip(duration_s=0.3, loras=(make_lora(tmp_path, change("lora")),))
    async with running(fetch_adapter=fetch) as engine:
        tasks = [asyncio.create_task(engine.generate(request)) for _ in range(3)]
        await engine.generate(make_clip(duration_s=0.3))
        closing = asyncio.create_task(engine.close())
        await until(lambda: not engine.is_alive)
        opened.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
    assert {type(outcome) for outcome in outcomes} == {ModelUnavailableError}


async def refused(engine: Engine, *loras: Lora) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        await engine.generate(make_clip(duration_s=0.5, loras=loras))
    assert caught.value.field == "loras"
    return caught.value


async def test_adapters_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    good = make_lora(tmp_path, change("dora-rows"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(good.source).read_bytes()[:-9])  # noqa: ASYNC240 - a small file
    other = make_lora(tmp_path, make_change(base(), "lora", layers=["model.preprocess_conv"]), name="other")
    tensors = {"model.missing": change("lora").tensors["model.preprocess_conv"]}
    foreign = write_adapter(tmp_path / "foreign.safetensors", tensors, {"alpha": 1})
    async with running(max_lora_rank=3) as engine:
        before = await engine.generate(make_clip(duration_s=0.5, loras=(good,)))
        for lora, reason in {
            replace(good, name="gone", source=str(tmp_path / "gone.safetensors")): "'gone' was not found",
            replace(good, name="damaged", source=str(damaged)): "'damaged' is corrupt",
            replace(good, name="foreign", source=str(foreign)): "'foreign' was made for another model",
            replace(good, strength=-1.0): "strength -1.0, allowed: 0 to 2",
            replace(good, sha256="0" * 64): "'vinyl' is another file",
        }.items():
            assert reason in str(await refused(engine, lora))
        assert "stacked rank of 4" in str(await refused(engine, good, other))
        after = await engine.generate(make_clip(duration_s=0.5, loras=(good,)))
    assert_same(after, before)


async def test_an_adapter_that_makes_no_audio_is_refused_by_name(tmp_path: Path) -> None:
    """The adapter's values are finite, but the network's output with this adapter is not."""
    made = change("lora")
    name = "model.transformer.project_out"
    parts = {part: tensor.float().fill_(1e18) for part, tensor in made.tensors[name].items()}
    huge = make_lora(tmp_path, replace(made, tensors={name: parts}), name="huge")
    async with running() as engine:
        plain = make_clip(duration_s=0.5)
        before = await engine.generate(plain)
        outcomes = await asyncio.gather(
            engine.generate(replace(plain, loras=(huge,))), engine.generate(plain), return_exceptions=True
        )
        assert "'huge' makes audio that is not a number" in str(outcomes[0])
        assert isinstance(outcomes[0], InvalidRequestError)
        assert isinstance(outcomes[1], GenerationResult)
        assert_same(outcomes[1], before)


async def test_models_without_adapters_refuse_them(tmp_path: Path) -> None:
    async with Engine(ToyModel(), EngineOptions(warmup_budget_s=0.0)) as engine:
        error = await refused(engine, Lora("vinyl", source=str(tmp_path)))
    assert "takes no adapters" in str(error)


def _notify(event: asyncio.Event, _: Progress) -> None:
    event.set()


async def test_the_least_recently_used_adapter_makes_room(tmp_path: Path) -> None:
    loras = [make_lora(tmp_path, change("lora", seed=seed), name=f"m{seed}") for seed in range(3)]
    request = make_clip(duration_s=0.5)
    whole = [await generate(replace(request, loras=(lora,))) for lora in loras]
    fitted = base().fit(read_adapter(Path(loras[0].source)))
    async with running(lora_cache_bytes=5 * fitted.nbytes // 2) as engine:  # room for one adapter and its slot
        for _ in range(2):
            for lora, expected in zip(loras, whole, strict=True):
                assert_same(await engine.generate(replace(request, loras=(lora,))), expected)
        clips: list[asyncio.Task[GenerationResult]] = []
        for lora in loras[:2]:
            has_begun = asyncio.Event()
            long = replace(request, duration_s=3.0, steps=1000, loras=(lora,))
            clips.append(asyncio.create_task(engine.generate(long, partial(_notify, has_begun))))
            await has_begun.wait()
        with pytest.raises(OverloadedError):
            await engine.generate(replace(request, loras=(loras[2],)))
        for clip in clips:
            clip.cancel()
        assert {type(outcome) for outcome in await asyncio.gather(*clips, return_exceptions=True)} == {
            asyncio.CancelledError
        }
        await until(lambda: not engine.backlog_ms)  # the engine gives the adapters back after the current step
        assert_same(await engine.generate(replace(request, loras=(loras[2],))), whole[2])
    async with running(lora_cache_bytes=1000) as engine:
        assert "lora_cache_bytes allows 1000" in str(await refused(engine, loras[0]))


async def test_the_adapter_used_last_stays_and_metrics_count_loads(tmp_path: Path) -> None:
    loras = [make_lora(tmp_path, change("lora", seed=seed), name=f"m{seed}") for seed in range(3)]
    fitted = base().fit(read_adapter(Path(loras[0].source)))
    used = fitted.nbytes + fold(base(), [(fitted, 1.0)], stacking="chained", max_rank=64).nbytes
    metrics = RecordedMetrics()
    async with running(lora_cache_bytes=2 * used, metrics=metrics) as engine:
        for number, num_loads in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3)):
            await engine.generate(make_clip(duration_s=0.3, loras=(loras[number],)))
            assert (
                metrics.counters["engine_adapter_loads"] == len(metrics.samples["engine_adapter_fold_ms"]) == num_loads
            )
            if number == 0 and num_loads == 1:
                assert metrics.gauges["engine_adapter_slots"] == 1
                assert metrics.gauges["engine_adapter_bytes"] == used
                assert engine.adapters_in_memory() == [fitted.sha256]  # replicas report them to the routers
    assert metrics.gauges["engine_adapter_bytes"] <= 2 * used
    assert min(metrics.samples["engine_adapter_fold_ms"]) > 0
