"""The autoscaling policy, called without Ray, with the arguments that Ray Serve's controller would give it."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from stable_audio_serve.serving.autoscaling import WorkPolicy, autoscaling_stats


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


@dataclass
class Context:
    """Replaces Ray Serve's `AutoscalingContext`. It has only the fields that the policy reads."""

    target_num_replicas: int = 1
    total_num_requests: float = 0.0
    current_time: float = 0.0
    deployment_name: str = "tiny"
    app_name: str = "audio"
    running_replicas: list[str] = field(default_factory=list)
    raw_metrics: Any = field(default_factory=dict)
    policy_state: dict[str, Any] = field(default_factory=dict)


def stats(
    work_s: float = 0.0, *, busy_share: float = 0.0, waiting_s: float = 0.0, is_kept: bool = False
) -> dict[str, float]:
    return autoscaling_stats(work_s=work_s, busy_share=busy_share, waiting_s=waiting_s, is_kept=is_kept)


def publish(*replicas: list[dict[str, float]]) -> Context:
    """Return a context with the statistics that each replica has published. Each list has the latest item last."""
    names = [f"replica-{number}" for number in range(len(replicas))]
    metrics = {
        name: {
            replica: [Point(float(at), figures[name]) for at, figures in enumerate(series)]
            for replica, series in zip(names, replicas, strict=True)
        }
        for name in stats()
    }
    return Context(len(replicas), running_replicas=names, raw_metrics=metrics)


def decide(context: Context, *, target_wait_s: float = 1.0) -> int:
    return WorkPolicy(target_wait_s=target_wait_s)(context)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("target_wait_s", "replicas"), [(1.0, 4), (2.0, 2), (10.0, 1)])
def test_replicas_can_finish_all_work_within_the_target_wait(target_wait_s: float, replicas: int) -> None:
    context = publish([stats(9.0), stats(1.2)], [stats(1.9)])  # the 9.0 is outdated
    assert decide(context, target_wait_s=target_wait_s) == replicas


def test_busy_devices_keep_replicas_without_a_backlog() -> None:
    used = [stats(busy_share=0.4), stats(busy_share=0.8), stats(busy_share=0.6)]
    assert decide(publish(used, used)) == 2
    assert decide(publish(used, [stats(busy_share=0.3)])) == 2
    assert decide(publish(used, [stats(busy_share=0.1)])) == 1


def test_one_client_at_a_time_needs_one_replica_however_many_there_are() -> None:
    a_request_in_ten_seconds = [stats()] * 4 + [stats(busy_share=1.0)] * 2 + [stats()] * 4
    assert decide(publish(*[a_request_in_ten_seconds] * 4)) == 1


def test_waiting_jobs_count_once_however_many_replicas_report_them() -> None:
    assert decide(publish([stats(0.5, waiting_s=2.2)], [stats(0.5, waiting_s=2.1)])) == 4


def test_idle_model_has_no_replica_and_a_request_starts_one() -> None:
    assert decide(publish([stats()])) == 0
    assert decide(Context(target_num_replicas=0, total_num_requests=7.0)) == 1


def test_replica_that_has_not_published_yet_stops_downscaling() -> None:
    context = publish([stats(0.1)])
    context.running_replicas.append("replica-new")
    context.target_num_replicas = 3
    assert decide(context) == 3
    context.raw_metrics["work_s"]["replica-0"] = [Point(0.0, 5.0)]
    assert decide(context) == 5


def test_kept_model_has_at_least_one_replica() -> None:
    assert decide(publish([stats(is_kept=True)])) == 1
    assert decide(publish([stats(9.0, is_kept=True)])) == 9
    assert decide(publish([stats(is_kept=True), stats(is_kept=False)])) == 0  # is_kept=True is outdated


@pytest.mark.parametrize("broken", [{"work_s": {"a": ["no point"]}}, {"work_s": None}])
def test_faulty_statistics_leave_the_replicas_as_they_are(broken: Any, caplog: pytest.LogCaptureFixture) -> None:
    policy = WorkPolicy(target_wait_s=1.0)
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for _ in range(3):
            context = Context(2, raw_metrics=broken, policy_state={"theirs": 1})
            assert policy(context) == (2, {"theirs": 1})  # type: ignore[arg-type]
    assert len(caplog.records) == 1  # logged once, although the policy was called several times


@pytest.mark.server
def test_the_policy_and_the_router_import_nothing_heavy() -> None:
    """The HTTP processes and Ray Serve's controller import them, so they must load fast."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import ray, ray.serve; theirs = set(sys.modules)\n"
        "import stable_audio_serve.serving.autoscaling\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - theirs} - {'stable_audio_serve'}))\n"
        "import stable_audio_serve.serving.routing; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == ["[]", "False"]
