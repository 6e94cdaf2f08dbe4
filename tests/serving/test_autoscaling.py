"""The policies that Serve's controller calls, on contexts as it makes them: no Ray runs."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from stable_audio_serve.core.pricing import Prices, WorkSize
from stable_audio_serve.serving import autoscaling, waiting_board
from stable_audio_serve.serving.autoscaling import RunnerPolicy, WorkPolicy, replica_stats
from stable_audio_serve.serving.waiting_board import WaitingJobs, to_stats

PRICES = Prices(row_ms=10.0, evaluation_ms=2.0, evaluated_second_ms=0.5, audio_second_ms=3.0)
FOUR_SECONDS = WorkSize(rows=40.0, evaluations=320.0, evaluated_s=1280.0, audio_s=160.0)
FOUR_SECONDS_S = (400 + 640 + 640 + 480) / 1000


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


@dataclass
class Context:
    """What the policies read of Serve's `AutoscalingContext`."""

    current_time: float
    target_num_replicas: int = 1
    total_num_requests: float = 0.0
    deployment_name: str = "tiny"
    app_name: str = "audio"
    raw_metrics: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    policy_state: dict[str, Any] = field(default_factory=dict)


def publish(*replicas: dict[str, float], at: float) -> dict[str, dict[str, list[Point]]]:
    names = {name for stats in replicas for name in stats}
    return {
        name: {f"replica-{i}": [Point(at, stats[name])] for i, stats in enumerate(replicas) if name in stats}
        for name in names
    }


def stats(backlog_s: float, *, load_s: float = 0.0) -> dict[str, float]:
    return replica_stats(backlog_ms=backlog_s * 1000, accepted_ms=0.0, load_s=load_s, prices=PRICES)


def waiting(num_jobs: float, size: WorkSize = FOUR_SECONDS, *, model: str = "tiny") -> dict[str, float]:
    return to_stats({model: WaitingJobs(num_jobs, size)})


class Controller:
    """Calls the policies of a model and of the runners as Serve's controller does, and keeps the model's state."""

    def __init__(self, *, target: int = 1) -> None:
        self.target = target
        self._model = WorkPolicy(target_wait_s=1.0, grow_after_s=0.0, shrink_after_s=10.0)
        self._runner = RunnerPolicy()
        self._state: dict[str, Any] = {}

    def tick(
        self, now: float, *, replicas: tuple[dict[str, float], ...] = (), runners: dict[str, list[Point]] | Any = None
    ) -> int:
        if runners is not None:
            self._runner(Context(now, raw_metrics=runners, deployment_name="job-runner"))  # type: ignore[arg-type]
        context = Context(now, self.target, raw_metrics=publish(*replicas, at=now), policy_state=self._state)
        self.target, self._state = self._model(context)  # type: ignore[arg-type]
        return self.target


@pytest.fixture(autouse=True)
def nothing_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_board, "_heard", {})
    monkeypatch.setattr(autoscaling, "kept", lambda application: frozenset())


def test_the_backlogs_of_all_replicas_add_up() -> None:
    assert Controller().tick(0.0, replicas=(stats(1.2), stats(1.9))) == 4


def test_what_replicas_accepted_lately_keeps_as_many_as_do_it() -> None:
    grown = [Point(0.0, 500.0), Point(4.0, 900.0), Point(10.0, 12_500.0)]  # 1.2 s of work a second, of each of two
    accepted = {"accepted_ms": {"a": grown, "b": grown}}
    policy, state = WorkPolicy(target_wait_s=1.0, grow_after_s=0.0, shrink_after_s=10.0), {}
    for now in range(12):
        context = Context(float(now), 5, total_num_requests=9.0, raw_metrics=accepted, policy_state=state)
        replicas, state = policy(context)  # type: ignore[arg-type]
    assert replicas == 3  # at four fifths of their time


def test_jobs_that_wait_count_at_the_prices_of_the_replicas() -> None:
    controller = Controller()
    assert controller.tick(0.0, replicas=(stats(0.5),), runners=publish(waiting(40), at=7.0)) == 3  # 0.5 + 2.16 s
    assert FOUR_SECONDS_S == 2.16


def test_a_model_without_replicas_keeps_its_prices() -> None:
    controller = Controller(target=0)
    controller.tick(0.0, replicas=(stats(0.0),))
    assert controller.tick(1.0, runners=publish(waiting(40), at=7.0)) == 3


def test_jobs_wake_a_model_that_was_never_loaded() -> None:
    assert Controller(target=0).tick(0.0, runners=publish(waiting(500), at=7.0)) == 1


def test_jobs_of_another_version_without_a_size_keep_one_replica() -> None:
    controller = Controller(target=0)
    assert controller.tick(0.0, replicas=(stats(0.0),), runners=publish(waiting(500, WorkSize()), at=7.0)) == 1


def test_jobs_of_other_models_do_not_count() -> None:
    assert Controller().tick(0.0, replicas=(stats(0.5),), runners=publish(waiting(40, model="other"), at=7.0)) == 1


def test_runners_that_say_the_same_are_counted_once() -> None:
    words = publish(waiting(40), waiting(40), at=7.0)
    assert Controller().tick(0.0, replicas=(stats(0.5),), runners=words) == 3


def test_a_runner_that_fell_silent_is_forgotten_and_the_engines_still_count() -> None:
    controller = Controller()
    old = publish(waiting(40), at=7.0)
    seen = [controller.tick(float(now), replicas=(stats(1.5),), runners=old) for now in range(60)]
    assert seen[:31] == [4] * 31
    assert seen[-1] == 2


def test_a_silent_runner_does_not_hide_one_that_speaks() -> None:
    controller = Controller()
    for now in range(60):
        ahead = [Point(1e9, value) for value in waiting(0, WorkSize()).values()]  # by a clock of its own
        words = publish(waiting(40), at=float(now))
        for point, series in zip(ahead, words.values(), strict=True):
            series["replica-silent"] = [point]
        controller.tick(float(now), replicas=(stats(0.5),), runners=words)
    assert controller.target == 3


def test_a_runner_that_is_gone_is_not_believed() -> None:
    controller = Controller()
    controller.tick(0.0, replicas=(stats(0.5),), runners=publish(waiting(40), at=7.0))
    for now in range(1, 13):
        controller.tick(float(now), replicas=(stats(0.5),), runners={})
    assert controller.target == 1


def test_runners_stay_as_many_as_they_are() -> None:
    context = Context(0.0, target_num_replicas=3, raw_metrics=publish(waiting(40), at=7.0))
    assert RunnerPolicy()(context)[0] == 3  # type: ignore[arg-type]


def test_a_model_that_an_operator_keeps_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling, "kept", lambda application: frozenset({"tiny"} if application == "audio" else ()))
    controller = Controller(target=0)
    assert controller.tick(0.0) == 1


@pytest.mark.parametrize("broken", [{"backlog_ms": {"a": ["no point"]}}, {"backlog_ms": None}, None])
def test_whatever_is_published_the_policies_leave_things_as_they_are(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy, runner = WorkPolicy(target_wait_s=1.0, grow_after_s=0.0, shrink_after_s=10.0), RunnerPolicy()
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for _ in range(3):
            context = Context(0.0, target_num_replicas=2, raw_metrics=broken, policy_state={"theirs": 1})
            assert policy(context) == runner(context) == (2, {"theirs": 1})  # type: ignore[arg-type]
    assert len(caplog.records) == 2  # once each, not ten times a second


@pytest.mark.server
def test_the_policies_import_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import ray, ray.serve; theirs = set(sys.modules)\n"
        "import stable_audio_serve.serving.autoscaling\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - theirs} - {'stable_audio_serve'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
