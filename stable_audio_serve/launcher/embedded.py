"""Start and stop a private Ray cluster on this machine, isolated from any other Ray.

Ray reads its environment variables at import, so each function imports it only when it runs.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from stable_audio_serve.core.errors import StableAudioError, StartError
from stable_audio_serve.launcher.guard import guarded
from stable_audio_serve.launcher.signals import StopSignals
from stable_audio_serve.launcher.start_timeouts import load_per_core, start_advice
from stable_audio_serve.serving.ray_internals import find_controller

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_REASON_CHARS = 300
# The longest clip has 134 MiB of float32 samples. The object store holds several such clips, but takes at most half of
# the free shared memory.
_OBJECT_STORE_BYTES = 1024 * _MIB
_OBJECT_STORE_FLOOR_BYTES = 128 * _MIB
_SERVE_TIMEOUT_S = 3.0  # time for Serve to stop its processes
_STOP_TIMEOUT_S = 6.5  # time for the whole stop; processes that still run afterwards are killed
# Variables that would connect this process to another Ray cluster.
_FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_TMPDIR")


@contextmanager
def private_directory() -> Iterator[Path]:
    """Create a folder that only this user can enter, and remove it when the context ends.

    The name is short, because Ray creates Unix sockets in the folder and their paths are limited to 107 bytes. If this
    process dies, the guard process kills all processes with an open file in the folder and removes the folder.
    """
    parent = "/tmp" if os.access("/tmp", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="sas-", dir=parent)).resolve()
    with guarded(directory):
        yield directory


def apply_environment(variables: Mapping[str, str], *, defaults: Mapping[str, str]) -> None:
    """Set Ray's environment variables and remove those that point to another Ray. Call this before importing Ray.

    `defaults` apply only where the operator has not set the variable.
    """
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({**defaults, **os.environ, **variables})


@contextmanager
def embedded_ray(
    directory: Path, signals: StopSignals, *, num_cpus: int, metrics_port: int | None = None
) -> Iterator[int]:
    """Run Ray with its files in `directory` until the context ends. Ray's internal ports require an access token.

    `num_cpus` is the number of cores that Ray schedules with. Yields the port of Ray's metrics: `metrics_port`, or a
    free port without it. Leaving the context stops Ray Serve and Ray within `_STOP_TIMEOUT_S` seconds.
    """
    late_exit_code = 2
    try:
        import ray

        with start_errors("Ray"):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                logging_level=logging.WARNING,
                _temp_dir=str(directory / "ray"),  # Ray makes this folder readable for all users
                _metrics_export_port=metrics_port,
            )
        signals.listen()  # ray.init installs its own SIGTERM handler
        (node,) = ray.nodes()
        yield int(node["MetricsExportPort"])
        late_exit_code = 0
    finally:
        signals.begin_stop(exit_code=late_exit_code)
        _stop(late_exit_code)


@contextmanager
def start_errors(what: str) -> Iterator[None]:
    """Turn any error of Ray into a StartError whose message gives the reason why `what` did not start, and advice."""
    try:
        yield
    except StableAudioError:
        raise
    except Exception as error:  # Ray raises many types, with texts of up to a hundred lines
        logger.debug("%s did not start", what, exc_info=True)
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__).rstrip(".")
        raise StartError(f"{what} did not start: {reason[:_REASON_CHARS]}; {start_advice(load_per_core())}") from error


def _stop(late_exit_code: int) -> None:
    """Stop Ray Serve, then Ray. After `_STOP_TIMEOUT_S`, exit; the guard then kills their processes."""
    watchdog = threading.Timer(_STOP_TIMEOUT_S, os._exit, args=(late_exit_code,))
    watchdog.daemon = True
    watchdog.start()
    import ray

    if ray.is_initialized():
        _stop_serve()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a thread of Serve may still call the stopped Ray
        ray.shutdown()
    watchdog.cancel()


def _stop_serve() -> None:
    """Ask Serve's controller to stop all its processes, and wait up to `_SERVE_TIMEOUT_S`."""
    import ray

    controller = find_controller()
    if controller is None:
        return  # stopped before Serve started
    with suppress(ray.exceptions.RayError, TimeoutError):
        # The controller exits when it has finished, so this call always fails. Without retries Ray prints no warning.
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SERVE_TIMEOUT_S)


def _object_store_bytes() -> int:
    shared = Path("/dev/shm")
    available = shutil.disk_usage(shared).free if shared.is_dir() else 2 * _OBJECT_STORE_BYTES
    return max(_OBJECT_STORE_FLOOR_BYTES, min(_OBJECT_STORE_BYTES, available // 2))
