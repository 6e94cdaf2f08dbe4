"""Life of the embedded Ray: started apart from every other Ray on the machine, ended with every process it made.

Knows nothing of models or settings. Ray is imported only once the environment it reads is in place.
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
from stable_audio_serve.launcher.patience import advice, crowding
from stable_audio_serve.launcher.signals import StopSignals
from stable_audio_serve.serving.ray_internals import find_controller

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_REASON_CHARS = 300
# One result of the longest clip is 134 MiB of float32; a handful of them, but never most of the shared memory.
_OBJECT_STORE_BYTES = 1024 * _MIB
_OBJECT_STORE_FLOOR_BYTES = 128 * _MIB
_SERVE_TIMEOUT_S = 3.0  # for Serve to end its processes in order
_STOP_TIMEOUT_S = 6.5  # for everything; what still runs then is killed
# Another Ray's address or credentials, meant for programs that want to join it.
_FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_TMPDIR")


@contextmanager
def private_directory() -> Iterator[Path]:
    """A folder nobody else may enter, short-named because Ray's sockets are in it (a socket path has 107 bytes).

    However this process ends, the folder and every process with a file open in it go too.
    """
    parent = "/tmp" if os.access("/tmp", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="sas-", dir=parent)).resolve()
    with guarded(directory):
        yield directory


def apply_environment(variables: Mapping[str, str], *, defaults: Mapping[str, str]) -> None:
    """Set what Ray reads when it is imported, so before that; forget how to reach any other Ray.

    `defaults` count where the operator has not set these variables.
    """
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({**defaults, **os.environ, **variables})


@contextmanager
def embedded_ray(
    directory: Path, signals: StopSignals, *, num_cpus: int, metrics_port: int | None = None
) -> Iterator[int]:
    """Run a Ray of our own in `directory` for the life of the context; its internal ports want its token.

    `num_cpus` is bookkeeping for placement. Gives the port of Ray's metrics, `metrics_port` or a free one. Leaving the
    context stops Ray Serve and Ray within `_STOP_TIMEOUT_S` seconds.
    """
    late_exit_code = 2
    try:
        import ray

        with explained("Ray"):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                logging_level=logging.WARNING,
                _temp_dir=str(directory / "ray"),  # which Ray opens to everybody
                _metrics_export_port=metrics_port,
            )
        signals.listen()  # ray.init installs a SIGTERM handler of its own
        (node,) = ray.nodes()
        yield int(node["MetricsExportPort"])
        late_exit_code = 0
    finally:
        signals.begin_stop(exit_code=late_exit_code)
        _stop(late_exit_code)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of Ray into a StartError that says in one sentence that `what` did not start, and what to do."""
    try:
        yield
    except StableAudioError:
        raise
    except Exception as error:  # of any type, bare ones included; its text may be a hundred lines long
        logger.debug("%s did not start", what, exc_info=True)
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__).rstrip(".")
        raise StartError(f"{what} did not start: {reason[:_REASON_CHARS]}; {advice(crowding())}") from error


def _stop(late_exit_code: int) -> None:
    """Stop Ray Serve, then Ray. When that takes too long, give up: the guard kills what is left."""
    watchdog = threading.Timer(_STOP_TIMEOUT_S, os._exit, args=(late_exit_code,))
    watchdog.daemon = True
    watchdog.start()
    import ray

    if ray.is_initialized():
        _stop_serve()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Serve's own thread may ask a Ray that is gone
        ray.shutdown()
    watchdog.cancel()


def _stop_serve() -> None:
    """Ask Serve's controller to end everything it started; wait up to `_SERVE_TIMEOUT_S`."""
    import ray

    controller = find_controller()
    if controller is None:
        return  # stopped before Serve was up
    with suppress(ray.exceptions.RayError, TimeoutError):
        # The controller ends itself when it is done, which fails this call: retrying it would only print a warning.
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SERVE_TIMEOUT_S)


def _object_store_bytes() -> int:
    shared = Path("/dev/shm")
    available = shutil.disk_usage(shared).free if shared.is_dir() else 2 * _OBJECT_STORE_BYTES
    return max(_OBJECT_STORE_FLOOR_BYTES, min(_OBJECT_STORE_BYTES, available // 2))
