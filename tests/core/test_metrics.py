"""The code measures exactly the metrics that are declared in METRICS, and the docs list the same metrics.

`tests/served/test_jobs.py` checks the metrics that a running server exports.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import stable_audio_serve
from docs.reference import draw_metrics
from stable_audio_serve.core.metrics import METRICS, NullMetrics, exported_name

PACKAGE = Path(stable_audio_serve.__file__).parent
PAGE = PACKAGE.parent / "docs" / "metrics.md"
KINDS = {"increment": "counter", "gauge": "gauge", "observe": "histogram"}


@functools.cache
def trees() -> list[ast.Module]:
    """Returns the syntax trees of the modules that may name or measure a metric."""
    texts = (path.read_text() for path in PACKAGE.rglob("*.py") if path != PACKAGE / "core" / "metrics.py")
    return [ast.parse(text) for text in texts if any(word in text for word in (*KINDS, *METRICS))]


def test_every_sample_is_declared_with_its_kind_and_labels() -> None:
    found = 0
    for tree in trees():
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS
            if is_call and len(node.args) in (1, 2) and isinstance(name := node.args[0], ast.Constant):
                metric = METRICS[name.value]
                labels = {keyword.arg for keyword in node.keywords} - {"value"}
                assert metric.kind == KINDS[node.func.attr], metric.name
                assert set(metric.labels) - {"model"} <= labels <= set(metric.labels), metric.name
                found += 1
    assert found > 20


def test_every_declared_metric_is_measured_somewhere() -> None:
    texts = {node.value for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    # These names are not in `texts`, because the code builds them with f-strings.
    stages = {f"engine_{stage}_ms" for stage in ("text", "encode", "denoise", "decode")}
    assert set(METRICS) - texts - stages == set()
    assert stages <= set(METRICS)


def test_the_docs_page_lists_all_metrics() -> None:
    page = PAGE.read_text()
    assert page == draw_metrics(), "make docs writes it"
    for metric in METRICS.values():
        assert f"| `{exported_name(metric)}`" in page


def test_other_pages_use_the_exported_metric_names() -> None:
    pages = [PAGE.parent.parent / "README.md", *PAGE.parent.rglob("*.md"), *PACKAGE.parent.glob("cluster/*.md")]
    named = {name for page in pages for name in re.findall(r"ray_stable_audio_\w*[a-z0-9]\b", page.read_text())}
    assert len(named) >= len(METRICS)
    exported = {exported_name(metric) for metric in METRICS.values()}
    histograms = {exported_name(metric) for metric in METRICS.values() if metric.kind == "histogram"}
    parts = {f"{name}_{part}" for name in histograms for part in ("sum", "count", "bucket")}
    assert named <= exported | parts


def test_names_are_unique_and_contain_their_unit() -> None:
    for name, metric in METRICS.items():
        assert metric.description.endswith(".")
        assert metric.kind != "histogram" or name.endswith(("_ms", "_per_step"))


@pytest.mark.parametrize(
    "sample",
    [
        lambda metrics: metrics.increment("nope"),
        lambda metrics: metrics.gauge("http_requests", 1.0),
        lambda metrics: metrics.observe("http_request_ms", 1.0, colour="red"),
    ],
)
def test_undeclared_metrics_raise_even_without_a_collector(sample: object) -> None:
    with pytest.raises(ValueError, match="metric"):
        sample(NullMetrics())  # type: ignore[operator]
