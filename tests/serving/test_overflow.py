"""Which requests go to replicas on CPUs, and which settings give a model some: without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest

from stable_audio_serve.core.catalog import ModelStatus
from stable_audio_serve.core.errors import (
    ConfigError,
    DeadlineExceededError,
    ModelUnavailableError,
    OverloadedError,
    QuotaError,
    StableAudioError,
)
from stable_audio_serve.core.generation import DeviceUse, GenerationRequest, GenerationResult, ProgressCallback
from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.serving.cores import choose_threads, share_cores, usable_cores
from stable_audio_serve.serving.overflow import OverflowBackend, overflow_catalog, overflow_name, overflow_settings
from stable_audio_serve.serving.placement import overflow_options, overflowing_models, plan_deployments
from tests.backends import ToneBackend, make_catalog
from tests.factories import FakeClock, make_request

SFX = "small-sfx"


class Counts(NullMetrics):
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        super().increment(name, value, **labels)
        self.outcomes.append(labels["outcome"])


class Promising(ToneBackend):
    """Remembers whom it expects."""

    def __init__(self) -> None:
        super().__init__(device=DeviceUse("cuda", dtype="float16"))
        self.expected: list[tuple[str, str, float]] = []

    def withdraw(self, model: str, request: GenerationRequest) -> None:
        self.expected.remove(next(one for one in self.expected if one[:2] == (model, request.prompt)))

    def promise(self, model: str, request: GenerationRequest, *, in_s: float) -> None:
        self.expected.append((model, request.prompt, in_s))

    async def generate(
        self, model: str, request: GenerationRequest, *, on_progress: ProgressCallback | None = None
    ) -> GenerationResult:
        try:
            return await super().generate(model, request, on_progress=on_progress)
        except OverloadedError as error:
            self.promise(model, request, in_s=error.retry_after_s or 0.0)
            raise


@dataclass
class Pair:
    """A model on a GPU and its replicas on CPUs."""

    gpu: Promising = field(default_factory=Promising)
    cpus: ToneBackend = field(
        default_factory=lambda: ToneBackend(
            catalog=overflow_catalog(make_catalog(), {SFX: None}),
            statuses={overflow_name(SFX): ModelStatus("ready", 1, "cpu")},
        )
    )
    counts: Counts = field(default_factory=Counts)
    clock: FakeClock = field(default_factory=FakeClock)

    @cached_property
    def backend(self) -> OverflowBackend:
        return OverflowBackend(self.gpu, self.cpus, metrics=self.counts, clock=self.clock)


FULL = OverloadedError("the model's queue is full", retry_after_s=7.0)


async def test_a_model_that_is_not_full_answers_itself() -> None:
    pair = Pair()
    assert (await pair.backend.generate(SFX, make_request())).made_on.device == "cuda"
    assert (pair.cpus.requests, pair.counts.outcomes) == ([], [])


async def test_what_a_full_model_refuses_is_made_on_a_cpu_if_it_ends_in_time() -> None:
    pair = Pair()
    pair.gpu.error = FULL
    result = await pair.backend.generate(SFX, make_request(seed=5))
    assert (result.made_on.device, result.made_on.dtype, result.seeds) == ("cpu", "float32", (5,))
    ((name, request),) = pair.cpus.requests
    assert (name, request.in_time, pair.gpu.last.in_time) == (overflow_name(SFX), True, False)
    assert pair.counts.outcomes == ["answered"]
    assert pair.gpu.expected == []  # nobody keeps a time free for it


@pytest.mark.parametrize(
    ("refusal", "asked"),
    [(FULL, {"exact": True}), (QuotaError("too much of one caller", retry_after_s=7.0), {})],
    ids=["exact", "a caller over its share"],
)
async def test_what_must_not_overflow_is_refused(refusal: OverloadedError, asked: dict[str, Any]) -> None:
    pair = Pair()
    pair.gpu.error = refusal
    with pytest.raises(OverloadedError) as caught:
        await pair.backend.generate(SFX, make_request(**asked))
    assert caught.value is refusal
    assert (pair.cpus.requests, pair.counts.outcomes) == ([], [])


@pytest.mark.parametrize("stage", ["loading", "failed", "idle"])
async def test_no_request_waits_for_a_replica_that_is_not_there(stage: str) -> None:
    pair = Pair()
    pair.gpu.error = FULL
    pair.cpus.statuses = {overflow_name(SFX): ModelStatus(stage)}
    with pytest.raises(OverloadedError):
        await pair.backend.generate(SFX, make_request())
    assert pair.cpus.requests == []


async def test_other_models_and_other_errors_do_not_overflow() -> None:
    pair = Pair()
    pair.gpu.error = FULL
    with pytest.raises(OverloadedError):
        await pair.backend.generate("medium", make_request())
    pair.gpu.error = ModelUnavailableError("no replica")
    with pytest.raises(ModelUnavailableError):
        await pair.backend.generate(SFX, make_request())
    assert pair.cpus.requests == []


@pytest.mark.parametrize(
    ("error", "seen", "outcome"),
    [
        (OverloadedError("full too", retry_after_s=99.0), OverloadedError, "refused"),
        (ModelUnavailableError("its replica died"), OverloadedError, "refused"),
        (DeadlineExceededError("too late after all"), DeadlineExceededError, "failed"),
    ],
)
async def test_where_cpus_cannot_help_the_model_s_own_refusal_says_when_to_come_again(
    error: StableAudioError, seen: type[StableAudioError], outcome: str
) -> None:
    pair = Pair()
    pair.gpu.error, pair.cpus.error = FULL, error
    with pytest.raises(seen) as caught:
        await pair.backend.generate(SFX, make_request())
    assert pair.counts.outcomes == [outcome]
    if seen is OverloadedError:
        assert caught.value is FULL
    assert [in_s for _, _, in_s in pair.gpu.expected] == ([7.0] if seen is OverloadedError else [])


async def test_a_flood_does_not_reach_cpus_that_have_just_refused() -> None:
    pair = Pair()
    pair.gpu.error, pair.cpus.error = FULL, OverloadedError("full too", retry_after_s=99.0)

    async def ask(deadline_s: float) -> int:
        with pytest.raises(OverloadedError):
            await pair.backend.generate(SFX, make_request(deadline_s=deadline_s))
        return len(pair.cpus.requests)

    assert [await ask(20.0) for _ in range(1000)][-1] == 1
    assert await ask(19.0) == 1
    assert await ask(30.0) == 2  # who has more time may still fit
    pair.clock.now += 1.1
    assert await ask(20.0) == 3


async def test_the_status_of_a_model_tells_of_its_cpus_and_lists_no_model_more() -> None:
    pair = Pair()
    pair.gpu.statuses["medium"] = ModelStatus("ready", 1, "cuda")
    status = await pair.backend.status()
    assert {name: one.overflow for name, one in status.items()} == {SFX: "ready", "medium": None}
    assert [card.name for card in pair.backend.catalog] == [card.name for card in make_catalog()]


def test_replicas_on_cpus_have_nothing_of_what_was_chosen_for_the_gpu() -> None:
    model = ModelSettings(
        name=SFX,
        device="cuda",
        dtype="bfloat16",
        decode_precision="half",
        compile=True,
        mode="fast",
        num_gpus=0.5,
        num_cpus=2,
        memory_share=0.4,
        max_memory_bytes=10**9,
        threads=3,
        max_queue_s=60.0,
        overflow="cpu",
        overflow_replicas=2,
    )
    on_cpu = overflow_settings(model)
    ModelSettings.model_validate(on_cpu.model_dump(exclude={"overflow_replicas"}))
    assert on_cpu.model_dump(exclude_defaults=True) == {
        "name": SFX,
        "device": "cpu",
        "num_gpus": 0.0,
        "threads": 3,
        "max_queue_s": 60.0,
        "overflow_replicas": 2,
        "replicas": {"min_replicas": 2, "max_replicas": 2},
    }


def plan_of(*models: dict[str, Any], **settings: Any) -> Any:
    return plan_deployments(Settings.model_validate({"models": models, **settings}))


def test_their_number_and_cores_are_the_operator_s() -> None:
    plan = plan_of({"name": SFX, "overflow": "cpu", "overflow_replicas": 3, "threads": 4}, {"name": "medium"})
    (model,) = overflowing_models(plan, cluster_gpus=2)
    options = overflow_options(plan, model)
    assert (options["name"], options["num_replicas"]) == ("small-sfx-cpu-overflow", 3)
    assert options["ray_actor_options"] == {"num_cpus": 4.0, "num_gpus": 0}
    assert "autoscaling_config" not in options
    assert plan.num_cpus >= 12


def test_they_share_the_cores_with_the_models_that_are_on_cpus_anyway() -> None:
    settings = Settings.model_validate(
        {"models": [{"name": SFX, "overflow": "cpu", "overflow_replicas": 2}, {"name": "medium", "device": "cpu"}]}
    )
    threads = choose_threads(settings, overflow_settings(settings.models[0]), device="cpu", cluster_gpus=1.0)
    assert threads == share_cores(usable_cores(), num_replicas=3)


def test_the_same_settings_serve_a_machine_without_a_gpu() -> None:
    assert overflowing_models(plan_of({"name": SFX, "overflow": "cpu"}), cluster_gpus=0) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"overflow": "gpu"}, r"models\.0\.overflow: must be "),
        ({"overflow": "cpu", "device": "cpu"}, "overflow: cpu is for a model on a GPU"),
        ({"overflow": "cpu", "num_gpus": 0}, "overflow: cpu is for a model on a GPU"),
        ({"overflow": "cpu", "mode": "strict"}, "overflow and mode: strict exclude each other"),
        ({"overflow_replicas": 2}, "overflow_replicas needs overflow: cpu"),
        ({"overflow": "cpu", "overflow_replicas": 0}, r"models\.0\.overflow_replicas: must be "),
    ],
)
def test_what_cannot_overflow_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings({"models": [{"name": SFX, **keys}]}, environ={})


def test_a_server_on_cpus_and_a_model_of_that_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"models\.small-sfx: overflow: cpu .* device is cpu"):
        overflowing_models(plan_of({"name": SFX, "overflow": "cpu"}, device="cpu"), cluster_gpus=1)
    other = {"name": overflow_name(SFX), "path": "/nowhere"}
    with pytest.raises(ConfigError, match="small-sfx-cpu-overflow is the name of what"):
        overflowing_models(plan_of({"name": SFX, "overflow": "cpu"}, other), cluster_gpus=1)
