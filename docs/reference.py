"""Generates openapi.json, openapi.md and metrics.md in docs/ from the code (`make docs`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.metrics import GROUPS, Metric, exported_name
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.local import LocalBackend

_DOCS = Path(__file__).parent
_ROUTES_HEAD = """# All routes

{description}

A running server has the full OpenAPI description at `/openapi.json`: every field with its type, range and default,
every answer and every error. `/docs` shows it as a page to try, `/redoc` as a page to read. `make docs` generates this
page and `docs/openapi.json`.
"""
_METRICS_HEAD = """# Metrics

Ray exports the server's metrics in Prometheus' format, one page per node. `stable-audio-serve serve` prints its address
at the start. `--metrics-port`, `STABLE_AUDIO_METRICS_PORT` or `metrics.port` in the file sets the port (default: a free
one), `STABLE_AUDIO_METRICS_HOST` (`metrics.host`) the address (default: loopback). On a cluster Ray sets both:
`ray start --metrics-export-port=...`.

```yaml
scrape_configs:
  - job_name: stable-audio
    static_configs: [{targets: ["localhost:9464"]}] # of a server started with --metrics-port 9464
```

Samples appear within 10 s. Each metric also has Ray's labels. `WorkerId` is the process: sum counters and histograms
over it, `sum without (WorkerId) (...)`, and use the maximum of a gauge that every runner reports. A histogram `x` is
exported as `x_bucket`, `x_count` and `x_sum`. A metric appears with its first sample; one marked * may never appear on
a healthy server. Ray Serve's own metrics (`ray_serve_...`) are on the same page. `make docs` generates this page.

Ray keeps the counters and histograms of ended processes until it stops, so each start of a replica adds about 0.1 MB to
the page. A scrape of 10 MB takes over a second. If replicas start often, use a longer `downscale_delay_s`.
"""


def describe_api() -> dict[str, Any]:
    """Return the OpenAPI description of the application with its default settings."""
    backend = LocalBackend(ModelCatalog([ModelCard("none", "none")]), {})
    return create_app(backend, Settings()).openapi()


def draw_routes(document: dict[str, Any]) -> str:
    """Returns the Markdown text of openapi.md for an OpenAPI document."""
    head = _ROUTES_HEAD.format(description=document["info"]["description"])
    return head + "".join(_draw_routes_group(tag, document["paths"]) for tag in document["tags"])


def _draw_routes_group(tag: dict[str, str], paths: dict[str, dict[str, Any]]) -> str:
    rows = [f"| `{methods} {path}` | {does} |" for path in paths for methods, does in _rows(paths[path], tag["name"])]
    head = (f"\n## {tag['name']}\n", f"{tag['description']}\n", "| Route | Does |", "|---|---|")
    return "\n".join((*head, *rows, ""))


def _rows(operations: dict[str, Any], tag: str) -> list[tuple[str, str]]:
    """Returns (methods, description) for each row of a route's table. Methods with the same description share a row."""
    methods: dict[str, list[str]] = {}
    for method, operation in operations.items():
        if tag in operation["tags"]:
            methods.setdefault(_first_sentence(operation), []).append(method.upper())
    return [(", ".join(names), does) for does, names in methods.items()]


def _first_sentence(operation: dict[str, Any]) -> str:
    text = " ".join(operation.get("description", "").split("\n\n")[0].split())
    sentence, _, _ = text.partition(". ")
    return (sentence.rstrip(".") or operation["summary"]).replace("|", "\\|") + "."


def draw_metrics() -> str:
    """Returns the Markdown text of metrics.md."""
    return _METRICS_HEAD + "".join(_draw_metrics_group(title, metrics) for title, metrics in GROUPS.items())


def _draw_metrics_group(title: str, metrics: tuple[Metric, ...]) -> str:
    rows = [
        f"| `{exported_name(metric)}`{' *' if metric.is_rare else ''} | {metric.kind} | "
        f"{', '.join(f'`{label}`' for label in metric.labels)} | {metric.description} |"
        for metric in metrics
    ]
    return "\n".join((f"\n## {title}\n", "| Metric | Type | Labels | Meaning |", "|---|---|---|---|", *rows, ""))


if __name__ == "__main__":
    _api = describe_api()
    (_DOCS / "openapi.json").write_text(json.dumps(_api, indent=2) + "\n")
    (_DOCS / "openapi.md").write_text(draw_routes(_api))
    (_DOCS / "metrics.md").write_text(draw_metrics())
