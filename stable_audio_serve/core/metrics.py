"""What the code measures about itself: every metric by name, and the sink that collectors implement (`serving`
exports to Ray's metrics).

Every metric is declared here: docs/metrics.md is made from this list, and an undeclared name is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `labels` are the names of its labels; `is_rare`: it may never occur on a healthy server.

    The label `model` of an engine's metrics is added by that engine's sink.
    """

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    is_rare: bool = False


def exported_name(metric: Metric) -> str:
    """Returns its name in Prometheus."""
    return f"ray_stable_audio_{metric.name}{'_total' if metric.kind == 'counter' else ''}"


_HTTP = (
    Metric(
        "http_requests", "counter", "Answered requests; status 499 = the client left.", ("route", "method", "status")
    ),
    Metric("http_request_ms", "histogram", "Time of a whole request, milliseconds.", ("route",)),
    Metric("http_requests_in_progress", "gauge", "Requests that are being answered now, streams included."),
    Metric("refusals", "counter", "Requests that were refused: the kind of error, or the HTTP status.", ("reason",)),
    Metric("event_streams_open", "gauge", "Streams of job events that are open."),
    Metric("key_file_broken", "gauge", "1 while `api.key_file` cannot be used: former keys count.", is_rare=True),
    Metric(
        "key_requests",
        "counter",
        "Generations and jobs of each named key: admitted, or refused by its limits or later.",
        ("key", "outcome"),
        is_rare=True,
    ),
    Metric("key_audio_seconds", "counter", "Audio that each named key was charged, seconds.", ("key",), is_rare=True),
    Metric(
        "key_limits_alone",
        "gauge",
        "1 while the job database is away and each process applies the limits of keys to its own requests.",
        is_rare=True,
    ),
    Metric("upload_decode_ms", "histogram", "Time to decode an uploaded file, waiting for its turn included."),
    Metric(
        "file_encode_ms", "histogram", "Time to make the file of a synchronous answer, waiting for its turn included."
    ),
)
_ENGINE = (
    Metric(
        "engine_requests",
        "counter",
        "Requests that have left an engine: finished, refused, failed, cancelled or expired.",
        ("outcome", "model"),
    ),
    Metric("engine_audio_seconds", "counter", "Audio made, seconds.", ("model",)),
    Metric("engine_queue_ms", "histogram", "From a request's arrival to its first work.", ("model",)),
    Metric("engine_request_ms", "histogram", "From a request's arrival to its audio.", ("model",)),
    Metric("engine_backlog_ms", "gauge", "Predicted work that is accepted and not yet done.", ("model",)),
    Metric("engine_text_ms", "histogram", "One call of the text encoder, for several prompts.", ("model",)),
    Metric("engine_encode_ms", "histogram", "One call of the audio encoder, for uploaded audio.", ("model",)),
    Metric("engine_denoise_ms", "histogram", "One denoising step of all rows in it.", ("model",)),
    Metric("engine_decode_ms", "histogram", "One call of the audio decoder, for several windows.", ("model",)),
    Metric(
        "engine_graphs",
        "gauge",
        "Shapes of calls captured on a GPU, which start in one launch: denoise, text or decode.",
        ("kind", "model"),
        is_rare=True,
    ),
    Metric(
        "engine_graph_misses",
        "counter",
        "Calls on a GPU that ran without a captured graph: denoise, text or decode.",
        ("kind", "model"),
        is_rare=True,
    ),
    Metric("engine_rows_per_step", "histogram", "Variations that share a denoising step.", ("model",)),
    Metric("engine_pad_share", "gauge", "Part of the last step that was padding, 0 to 1.", ("model",)),
    Metric("engine_prompt_cache_hits", "counter", "Prompts whose embedding was there already.", ("model",)),
    Metric("engine_prompt_cache_misses", "counter", "Prompts that had to be embedded.", ("model",)),
    Metric(
        "quality_gates",
        "counter",
        "New replicas at the quality gate: passed, unchecked (nothing to compare with could be read) or failed.",
        ("outcome", "model"),
    ),
    Metric(
        "model_update_refused",
        "gauge",
        "1 while the replicas of the last deployment do not start and older ones answer; every ingress says the same.",
        ("model",),
    ),
    Metric(
        "quality_fallback",
        "gauge",
        "1 while a replica serves the last good weights, because the configured ones failed.",
        ("model",),
    ),
    Metric("engine_device_memory_bytes", "gauge", "GPU memory in use by the engine; 0 on a CPU.", ("model",)),
)
_JOBS = (
    Metric("jobs", "counter", "Jobs that have ended.", ("state", "contract")),
    Metric("job_wait_ms", "histogram", "From a job's submission to its start.", ("model",)),
    Metric("jobs_by_state", "gauge", "Jobs that are kept; every runner says the same.", ("state",)),
    Metric("jobs_running", "gauge", "Jobs at work in this runner."),
    Metric("job_queue_age_s", "gauge", "How long the next job has been due, seconds; every runner says the same."),
    Metric("job_files_refused", "gauge", "1 while a runner starts no jobs: their files cannot be kept.", is_rare=True),
    Metric("job_retries", "counter", "Starts that failed and are tried again.", ("reason",), is_rare=True),
    Metric("job_dead_letters", "counter", "Jobs given up after their last attempt.", ("reason",), is_rare=True),
    Metric("job_leases_lost", "counter", "Jobs that this runner had to leave to another.", is_rare=True),
    Metric("webhooks", "counter", "Tries of webhooks: delivered, failed or given_up.", ("outcome",), is_rare=True),
    Metric("damaged_files", "counter", "Stored files that are not what was stored.", is_rare=True),
)

_SCALING = (
    Metric("waiting_work_ms", "gauge", "Predicted work of jobs that no runner has started.", ("model",)),
    Metric("replicas_wanted", "gauge", "Replicas that the work of the moment asks for, without bounds.", ("model",)),
)

GROUPS = {"HTTP": _HTTP, "Engines": _ENGINE, "Jobs and files": _JOBS, "Autoscaling": _SCALING}
METRICS = {metric.name: metric for group in GROUPS.values() for metric in group}


def declared(name: str, kind: Kind, *, labels: Iterable[str]) -> Metric:
    """Returns the declaration of `name`. Raises ValueError when it has another kind or lacks one of these labels."""
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"the metric {name} is not declared")
    if metric.kind != kind:
        raise ValueError(f"the metric {name} is a {metric.kind}, not a {kind}")
    if unknown := set(labels) - set(metric.labels):
        raise ValueError(f"the metric {name} has no label {', '.join(sorted(unknown))}")
    return metric


class Metrics(Protocol):
    """A sink for counters, gauges and distributions, all of them declared above."""

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add `value` (>= 0) to the counter `name`."""
        ...

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name`."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one sample to the distribution `name`."""
        ...


class NullMetrics:
    """The default sink: drops declared samples, raises ValueError for others."""

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        declared(name, "counter", labels=labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        declared(name, "gauge", labels=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        declared(name, "histogram", labels=labels)


class QuietMetrics:
    """A sink that drops counts and distributions until `open`: work of our own is nobody's request."""

    def __init__(self, sink: Metrics) -> None:
        self._sink = sink
        self._is_open = False

    def open(self) -> None:
        """Pass everything on from now on."""
        self._is_open = True

    def increment(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add `value` to the counter `name`, if open."""
        if self._is_open:
            self._sink.increment(name, value, **labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name`."""
        self._sink.gauge(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one sample to the distribution `name`, if open."""
        if self._is_open:
            self._sink.observe(name, value, **labels)


class Level:
    """A gauge that counts what exists now, starting at zero. For one thread."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self.value = 0
        self.change(0)

    def change(self, by: int) -> None:
        """Add `by`, which may be negative."""
        self.value += by
        self._metrics.gauge(self._name, self.value)
