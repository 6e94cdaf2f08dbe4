"""Declarations of all metrics, and the interface of metric sinks, the objects that receive the metrics' values.

The sink in `serving` exports the values as Ray metrics. Sinks raise an error for a name that is not declared here.
docs/metrics.md is generated from the declarations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels` are the names of its labels. `is_rare` means that a healthy server may never export it.

    Code in the engine does not set the label `model`, because the engine's sink adds that label.
    """

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    is_rare: bool = False


def exported_name(metric: Metric) -> str:
    """Return the metric's name in Prometheus."""
    return f"ray_stable_audio_{metric.name}{'_total' if metric.kind == 'counter' else ''}"


_HTTP = (
    Metric(
        "http_requests", "counter", "Answered requests; status 499 = the client left.", ("route", "method", "status")
    ),
    Metric("http_request_ms", "histogram", "Duration of a whole request, milliseconds.", ("route",)),
    Metric("http_requests_in_progress", "gauge", "Requests in progress, streams included."),
    Metric("refusals", "counter", "Refused requests, by kind of error or HTTP status.", ("reason",)),
    Metric(
        "event_streams_open",
        "gauge",
        "Open streams of job events, of sections and growing audio, and requests that wait for a long piece.",
    ),
    Metric(
        "key_file_broken",
        "gauge",
        "1 while `api.key_file` cannot be used; the keys of its last valid version apply.",
        is_rare=True,
    ),
    Metric(
        "key_requests",
        "counter",
        "Generations and jobs of each named key, admitted or refused.",
        ("key", "outcome"),
        is_rare=True,
    ),
    Metric("key_audio_seconds", "counter", "Audio charged to each named key, seconds.", ("key",), is_rare=True),
    Metric(
        "key_limits_alone",
        "gauge",
        "1 while the job database is unreachable and each process applies the keys' limits to its own requests.",
        is_rare=True,
    ),
    Metric("upload_decode_ms", "histogram", "Time to decode an uploaded file, waiting included, milliseconds."),
    Metric(
        "file_encode_ms",
        "histogram",
        "Time to encode the file of a synchronous response, waiting included, milliseconds.",
    ),
)
_ENGINE = (
    Metric(
        "engine_requests",
        "counter",
        "Requests that left an engine: finished, refused, failed, cancelled or expired.",
        ("outcome", "model"),
    ),
    Metric("engine_audio_seconds", "counter", "Generated audio, seconds.", ("model",)),
    Metric("engine_queue_ms", "histogram", "From a request's arrival to its first work, milliseconds.", ("model",)),
    Metric("engine_request_ms", "histogram", "From a request's arrival to its audio, milliseconds.", ("model",)),
    Metric("engine_backlog_ms", "gauge", "Predicted time of accepted, unfinished work, milliseconds.", ("model",)),
    Metric("engine_text_ms", "histogram", "One text encoder call for several prompts, milliseconds.", ("model",)),
    Metric("engine_encode_ms", "histogram", "One audio encoder call for source audio, milliseconds.", ("model",)),
    Metric("engine_denoise_ms", "histogram", "One denoising step of all its rows, milliseconds.", ("model",)),
    Metric("engine_decode_ms", "histogram", "One audio decoder call for several windows, milliseconds.", ("model",)),
    Metric("engine_profile", "gauge", "1 for the engine's profile: plain or accelerated.", ("profile", "model")),
    Metric(
        "engine_captures_off",
        "counter",
        "Failed captures of CUDA graphs; after the first, the process captures no more calls.",
        ("model",),
        is_rare=True,
    ),
    Metric(
        "engine_graphs",
        "gauge",
        "Captured CUDA graphs by kind of call: denoise or decode.",
        ("kind", "model"),
        is_rare=True,
    ),
    Metric(
        "engine_graph_misses",
        "counter",
        "GPU calls that ran without a captured CUDA graph: denoise or decode.",
        ("kind", "model"),
        is_rare=True,
    ),
    Metric("engine_rows_per_step", "histogram", "Variations that share a denoising step.", ("model",)),
    Metric("engine_pad_share", "gauge", "Share of the last step that was padding, 0 to 1.", ("model",)),
    Metric("engine_prompt_cache_hits", "counter", "Prompts whose embedding was cached.", ("model",)),
    Metric("engine_prompt_cache_misses", "counter", "Prompts whose embedding was not cached.", ("model",)),
    Metric("engine_adapter_loads", "counter", "Adapter files that were loaded.", ("model",), is_rare=True),
    Metric(
        "engine_adapter_fold_ms",
        "histogram",
        "Time to combine a request's adapters into a slot, milliseconds.",
        ("model",),
        is_rare=True,
    ),
    Metric(
        "engine_adapter_slots",
        "gauge",
        "Slots (chains of adapters with strengths) in memory.",
        ("model",),
        is_rare=True,
    ),
    Metric("engine_adapter_bytes", "gauge", "Memory of adapters and slots.", ("model",), is_rare=True),
    Metric(
        "quality_gates",
        "counter",
        "New replicas at the quality gate: passed, unchecked (no quality report could be read) or failed. And "
        "adapter_failed: adapters that failed there.",
        ("outcome", "model"),
    ),
    Metric(
        "model_update_refused",
        "gauge",
        "1 while the last deployment's replicas do not start and older ones serve; the same from every ingress.",
        ("model",),
    ),
    Metric(
        "quality_fallback",
        "gauge",
        "1 while a replica serves the last good weights because the configured ones failed.",
        ("model",),
    ),
    Metric("engine_device_memory_bytes", "gauge", "GPU memory in use by the engine; 0 on a CPU.", ("model",)),
)
_JOBS = (
    Metric("jobs", "counter", "Ended jobs.", ("state", "contract")),
    Metric("job_wait_ms", "histogram", "From a job's submission to its start, milliseconds.", ("model",)),
    Metric("jobs_by_state", "gauge", "Jobs in the database; the same from every runner.", ("state",)),
    Metric("job_queue_age_s", "gauge", "Time since the next job became due, seconds; the same from every runner."),
    Metric(
        "job_files_refused",
        "gauge",
        "1 while a runner starts no jobs because their files cannot be stored.",
        is_rare=True,
    ),
    Metric("job_retries", "counter", "Failed attempts that are retried.", ("reason",), is_rare=True),
    Metric("job_dead_letters", "counter", "Jobs that failed their last attempt.", ("reason",), is_rare=True),
    Metric(
        "job_leases_lost",
        "counter",
        "Jobs that this runner lost to another one because its lease expired.",
        is_rare=True,
    ),
    Metric("webhooks", "counter", "Webhook deliveries: delivered, failed or given_up.", ("outcome",), is_rare=True),
    Metric("damaged_files", "counter", "Stored files whose content no longer matches their digest.", is_rare=True),
)

_SCALING = (
    Metric("waiting_work_ms", "gauge", "Predicted time of jobs that no runner has started, milliseconds.", ("model",)),
)

GROUPS = {"HTTP": _HTTP, "Engines": _ENGINE, "Jobs and files": _JOBS, "Autoscaling": _SCALING}
METRICS = {metric.name: metric for group in GROUPS.values() for metric in group}


def declared(name: str, kind: Kind, *, labels: Iterable[str]) -> Metric:
    """Return the declaration of the metric `name`.

    Raises ValueError if there is none, or if the declaration has another kind or lacks one of `labels`.
    """
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"the metric {name} is not declared")
    if metric.kind != kind:
        raise ValueError(f"the metric {name} is a {metric.kind}, not a {kind}")
    if unknown := set(labels) - set(metric.labels):
        raise ValueError(f"the metric {name} has no label {', '.join(sorted(unknown))}")
    return metric


class Metrics(Protocol):
    """A sink: receives the values of the counters, gauges and histograms that this module declares."""

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add `value` (>= 0) to the counter `name`."""
        ...

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name` to `value`."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one sample to the histogram `name`."""
        ...


class NullMetrics:
    """The default sink. It checks names, kinds and labels, and drops the values."""

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        declared(name, "counter", labels=labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        declared(name, "gauge", labels=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        declared(name, "histogram", labels=labels)


class Level:
    """A gauge that counts up and down from zero, such as the number of open streams. Not thread-safe."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self.value = 0
        self.change(0)

    def change(self, by: int) -> None:
        self.value += by
        self._metrics.gauge(self._name, self.value)
