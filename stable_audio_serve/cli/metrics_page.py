"""docs/metrics.md, made from the declarations in `core.metrics` (`make docs`)."""

from __future__ import annotations

from stable_audio_serve.core.metrics import GROUPS, Metric

_HEAD = """# Metrics

Ray exports the server's metrics in Prometheus' format, one page per node. `stable-audio-serve serve` prints its address
at the start. The port is a free one unless `--metrics-port`, `STABLE_AUDIO_METRICS_PORT` or `metrics.port` in the file
names one; it listens on loopback unless `STABLE_AUDIO_METRICS_HOST` (`metrics.host`) says otherwise. On a cluster both
are Ray's: `ray start --metrics-export-port=...`.

```yaml
scrape_configs:
  - job_name: stable-audio
    static_configs: [{targets: ["localhost:9464"]}] # of a server started with --metrics-port 9464
```

Samples show up within Ray's report interval, 10 s. Besides the labels below each has Ray's own, of which `WorkerId`
tells the processes apart: add counters and histograms up over it, `sum without (WorkerId) (...)`; of a gauge that every
runner says the same of take the maximum. A histogram `x` is exported as `x_bucket`, `x_count` and `x_sum`; times are in
milliseconds where the name ends in `_ms`. A metric appears with its first sample; one marked * may never appear on a
healthy server. Ray Serve's own metrics (`ray_serve_...`) are on the same page.

This page is made from `stable_audio_serve/core/metrics.py` by `make docs`.
"""


def exported_name(metric: Metric) -> str:
    """Returns its name in Prometheus."""
    return f"ray_stable_audio_{metric.name}{'_total' if metric.kind == 'counter' else ''}"


def draw_page() -> str:
    """Returns the page in Markdown."""
    return _HEAD + "".join(_draw_group(title, metrics) for title, metrics in GROUPS.items())


def _draw_group(title: str, metrics: tuple[Metric, ...]) -> str:
    rows = [
        f"| `{exported_name(metric)}`{' *' if metric.is_rare else ''} | {metric.kind} | "
        f"{', '.join(f'`{label}`' for label in metric.labels)} | {metric.description} |"
        for metric in metrics
    ]
    return "\n".join((f"\n## {title}\n", "| Metric | Type | Labels | Meaning |", "|---|---|---|---|", *rows, ""))
