"""Prometheus accepts the files in `cluster/monitoring/`.

Each alert is tested with data for which it must fire, and with data for which it must not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.reference import describe_api
from stable_audio_serve.core.metrics import METRICS, exported_name
from stable_audio_serve.serving.placement import INGRESS_NAME
from tests.cluster.tools import CLUSTER, run_program

pytestmark = pytest.mark.cluster

MONITORING = CLUSTER / "monitoring"
_SUFFIXES = ("_bucket", "_count", "_sum")  # Prometheus appends these to a histogram's name
_OURS = re.compile(r"\bray_stable_audio_\w+")


def load(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())


def rules(kind: str) -> dict[str, str]:
    """Returns the expressions of all rules of a kind, which is `alert` or `record`, by the rule's name."""
    return {
        rule[kind]: rule["expr"] for group in load("rules.yaml")["groups"] for rule in group["rules"] if kind in rule
    }


def test_prometheus_accepts_its_configuration() -> None:
    checked = run_program("promtool", "check", "config", MONITORING / "prometheus.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_in_their_cases() -> None:
    tested = run_program("promtool", "test", "rules", "rules_test.yaml", cwd=MONITORING)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_firing_and_a_quiet_case() -> None:
    cases = defaultdict(set)
    for test in load("rules_test.yaml")["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case["exp_alerts"]))
    assert cases == {alert: {True, False} for alert in rules("alert")}


@pytest.mark.parametrize("expression", ["vector(1) > 1", "vector(1)"])
def test_cases_detect_an_alert_that_never_or_always_fires(expression: str, tmp_path: Path) -> None:
    changed = load("rules.yaml")
    for group in changed["groups"]:
        group["rules"] = [{**rule, "expr": expression} if "alert" in rule else rule for rule in group["rules"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed))
    (tmp_path / "rules_test.yaml").write_text((MONITORING / "rules_test.yaml").read_text())
    tested = run_program("promtool", "test", "rules", "rules_test.yaml", cwd=tmp_path)
    failed = set(re.findall(r"alertname: ?(\w+)", tested.stdout + tested.stderr))
    assert failed == set(rules("alert"))


def expressions() -> Iterator[str]:
    yield from rules("alert").values()
    yield from rules("record").values()


def test_slow_answers_of_every_synchronous_route_count() -> None:
    (pattern,) = set(re.findall(r'route=~"([^"]+)"', rules("record")["stable_audio:generation_ms:p95"]))
    answers = {
        path: methods["post"]["responses"].get("200", {})
        for path, methods in describe_api()["paths"].items()
        if "post" in methods
    }
    synchronous = {path for path, answer in answers.items() if "audio/" in str(answer.get("content"))}
    assert {"/generate", "/v1/music", "/v2beta/audio/stable-audio-2/inpaint"} <= synchronous
    assert [path for path in synchronous if not re.fullmatch(pattern, path)] == []
    assert re.fullmatch(pattern, "/run/fal-ai/stable-audio")  # its answer is JSON with the URL of the audio
    assert not re.fullmatch(pattern, "/jobs")


def test_rules_use_exported_and_recorded_names() -> None:
    exported = {exported_name(metric): metric.kind for metric in METRICS.values()}
    exported |= {name + suffix: kind for name, kind in exported.items() if kind == "histogram" for suffix in _SUFFIXES}
    used = {name for expression in expressions() for name in _OURS.findall(expression)}
    assert used <= set(exported)
    recorded = {name for expression in expressions() for name in re.findall(r"\bstable_audio:[\w:]+", expression)}
    assert recorded <= set(rules("record"))
    assert f'deployment="{INGRESS_NAME}"' in rules("alert")["StableAudioNobodyAnswers"]
