"""Starts and stops the embedded Ray, isolated from every other Ray on the machine.

Independent of models and settings. Ray is imported only after its environment variables are set.
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
# One result of the longest clip is 134 MiB of float32. Room for several, but at most half of the free shared memory.
_OBJECT_STORE_BYTES = 1024 * _MIB
_OBJECT_STORE_FLOOR_BYTES = 128 * _MIB
_SERVE_TIMEOUT_S = 3.0  # for Serve to stop its processes
_STOP_TIMEOUT_S = 6.5  # for the whole stop; processes that still run after it are killed
# Variables that make a program join another Ray.
_FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_TMPDIR")


@contextmanager
def private_directory() -> Iterator[Path]:
    """Create a folder that only this user can enter; it is removed when the context ends.

    Its name is short, because a path of Ray's sockets in it has at most 107 bytes. When this process ends in any way,
    all processes with an open file in the folder are killed and the folder is removed.
    """
    parent = "/tmp" if os.access("/tmp", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="sas-", dir=parent)).resolve()
    with guarded(directory):
        yield directory


def apply_environment(variables: Mapping[str, str], *, defaults: Mapping[str, str]) -> None:
    """Set Ray's environment variables and remove those that lead to another Ray. Call it before importing Ray.

    `defaults` apply only where the operator has not set the variable.
    """
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({**defaults, **os.environ, **variables})


@contextmanager
def embedded_ray(
    directory: Path, signals: StopSignals, *, num_cpus: int, metrics_port: int | None = None
) -> Iterator[int]:
    """Run an embedded Ray in `directory` for the life of the context. Its internal ports require its token.

    `num_cpus` is the number of cores that Ray schedules with. Yields the port of Ray's metrics: `metrics_port` or a
    free one. Leaving the context stops Ray Serve and Ray within `_STOP_TIMEOUT_S` seconds.
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
    """Turn any error of Ray into a StartError: one sentence with the reason that `what` did not start, and advice."""
    try:
        yield
    except StableAudioError:
        raise
    except Exception as error:  # Ray raises many types, with texts of up to a hundred lines
        logger.debug("%s did not start", what, exc_info=True)
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__).rstrip(".")
        raise StartError(f"{what} did not start: {reason[:_REASON_CHARS]}; {start_advice(load_per_core())}") from error


def _stop(late_exit_code: int) -> None:
    """Stop Ray Serve, then Ray. After `_STOP_TIMEOUT_S` seconds exit instead; the guard then kills their processes."""
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
    """Let Serve's controller stop all its processes. Wait up to `_SERVE_TIMEOUT_S`."""
    import ray

    controller = find_controller()
    if controller is None:
        return  # stopped before Serve started
    with suppress(ray.exceptions.RayError, TimeoutError):
        # The controller exits when it is done, so this call fails. A retry would only print a warning.
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SERVE_TIMEOUT_S)


def _object_store_bytes() -> int:
    shared = Path("/dev/shm")
    available = shutil.disk_usage(shared).free if shared.is_dir() else 2 * _OBJECT_STORE_BYTES
    return max(_OBJECT_STORE_FLOOR_BYTES, min(_OBJECT_STORE_BYTES, available // 2))
