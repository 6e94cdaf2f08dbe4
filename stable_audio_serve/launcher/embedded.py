"""Start and stop a private Ray cluster on this machine, isolated from any other Ray.

Ray reads environment variables when it is imported. Therefore this module does not import Ray at the top: the functions
import it when they run, after the variables were set.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
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
# Size of Ray's object store, through which replicas send audio. The store should hold several of the longest clips,
# which have 134 MiB of float32 samples. It takes at most half of the free shared memory.
_OBJECT_STORE_BYTES = 1024 * _MIB
_OBJECT_STORE_FLOOR_BYTES = 128 * _MIB
_LEAST_FREE_BYTES = _MIB  # with a full disk under its folder, Ray would give up after a minute without the reason
_SERVE_TIMEOUT_S = 3.0  # how long Ray Serve may take to stop its processes
_STOP_TIMEOUT_S = 6.5  # how long the stop of Ray Serve and Ray may take; processes that still run then are killed
# Variables that would connect this process to another Ray cluster.
_FOREIGN_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_TMPDIR")


@contextmanager
def private_directory() -> Iterator[Path]:
    """Create a folder that only this user can enter, and remove it when the context ends.

    The folder's name is short, because Ray creates Unix sockets in the folder, and the path of a socket has at most 107
    bytes. If this process dies, a second process (`guard`) kills all processes that have a file open in the folder.
    Then this second process removes the folder. Raises StartError if the folder's disk is full.
    """
    parent = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    if shutil.disk_usage(parent).free < _LEAST_FREE_BYTES:
        raise StartError(f"the disk of {parent} is full: make room there for the server's temporary files")
    directory = Path(tempfile.mkdtemp(prefix="sas-", dir=parent)).resolve()
    with guarded(directory):
        yield directory


def apply_environment(variables: Mapping[str, str], *, defaults: Mapping[str, str]) -> None:
    """Set `variables` in the environment, and remove Ray's variables that point to another cluster.

    A variable of `defaults` is set only if it is not set yet. Call this before importing Ray.
    """
    for name in _FOREIGN_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({**defaults, **os.environ, **variables})


@contextmanager
def embedded_ray(
    directory: Path, signals: StopSignals, *, num_cpus: int, metrics_port: int | None = None
) -> Iterator[int]:
    """Run Ray with its files in `directory` until the context ends. Ray's internal ports require an access token.

    `num_cpus` is the number of CPU cores that Ray may give to its processes. Yields the port of Ray's metrics page. It
    is `metrics_port`, or a free port if `metrics_port` is None. At the end of the context, Ray Serve and Ray are
    stopped within `_STOP_TIMEOUT_S` seconds.
    """
    late_exit_code = 2
    try:
        import ray

        with start_errors("Ray"), _stopping_at_once(), hangups_blocked():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_object_store_bytes(),
                logging_level=logging.WARNING,
                runtime_env=_runtime_env(),
                # Not `directory` itself: Ray makes this folder readable for all users.
                _temp_dir=str(directory / "ray"),
                _metrics_export_port=metrics_port,
            )
        signals.listen()  # again, because ray.init has replaced the handler of SIGTERM
        signals.wait(0)
        (node,) = ray.nodes()
        yield int(node["MetricsExportPort"])
        late_exit_code = 0
    finally:
        signals.begin_stop(exit_code=late_exit_code)
        _stop(late_exit_code)


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Treat SIGTERM as SIGINT: `ray.init` replaces its handler by one that exits with the signal's number."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error


@contextmanager
def hangups_blocked() -> Iterator[None]:
    """Block SIGHUP, also in processes that start meanwhile: a closed terminal sends it to Ray's processes too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def start_errors(what: str) -> Iterator[None]:
    """Raise StartError in place of any error from Ray. The message says why `what` did not start, and gives advice."""
    try:
        yield
    except StableAudioError:
        raise
    except Exception as error:  # Ray raises many types of error, with messages of up to a hundred lines
        logger.debug("%s did not start", what, exc_info=True)
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__).rstrip(".")
        raise StartError(f"{what} did not start: {reason[:_REASON_CHARS]}; {start_advice(load_per_core())}") from error


@contextmanager
def exiting_after(timeout_s: float, *, exit_code: int, report: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call `report` and exit this process with `exit_code` if the context takes longer than `timeout_s`.

    The guard process (`guard`) then kills the processes of Ray.
    """

    def exit_now() -> None:
        report()
        os._exit(exit_code)

    watchdog = threading.Timer(timeout_s, exit_now)
    watchdog.daemon = True
    watchdog.start()
    yield
    watchdog.cancel()  # not cancelled after an error, because the interpreter's own exit may hang, too


def _stop(late_exit_code: int) -> None:
    """Stop Ray Serve, then Ray, or exit this process after `_STOP_TIMEOUT_S`."""
    import ray

    with exiting_after(_STOP_TIMEOUT_S, exit_code=late_exit_code):
        if not ray.is_initialized():
            return
        if (controller := find_controller()) is not None:  # Ray Serve was started
            with suppress(ray.exceptions.RayError, TimeoutError):
                # The controller process exits at the end of this call, so the call always fails with an error. Without
                # the option, Ray would retry the call and print a warning.
                ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_SERVE_TIMEOUT_S)
        # After Ray has stopped, a thread of Ray Serve may still call Ray, which would log an error.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        ray.shutdown()


def _runtime_env() -> dict[str, str]:
    """Return the path of Python in quotes if it has spaces, because Ray passes it to a shell."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _object_store_bytes() -> int:
    shared = Path("/dev/shm")
    available = shutil.disk_usage(shared).free if shared.is_dir() else 2 * _OBJECT_STORE_BYTES
    return max(_OBJECT_STORE_FLOOR_BYTES, min(_OBJECT_STORE_BYTES, available // 2))
