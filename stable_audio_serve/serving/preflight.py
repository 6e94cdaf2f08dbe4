"""Checks before the start of the server.

They check whether the models' files are present or can be downloaded, whether the packages that the models need are
installed, and whether a time limit of HAProxy is long enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.models.checkpoint_files import check_folder, find_text_encoder
from stable_audio_serve.models.registry import BUILT_IN, ModelEntry, describe_entry
from stable_audio_serve.models.stable_audio_tools.package import require_open_family, require_package
from stable_audio_serve.serving.placement import Plan, model_entry

# Is called with a model's registry entry and the Hugging Face token. Raises CheckpointError.
_Check = Callable[[ModelEntry, str | None], None]

_HARD_STOP, _RAYS_HARD_STOP_S = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", 120.0
# Time limit for the checks of all models together. HTTP timeouts do not suffice: they do not limit the lookup of a host
# name.
_LONGEST_S = 10.0


def require_weights(plan: Plan, models: Iterable[ModelSettings], *, print_error: Callable[[str], None]) -> None:
    """Check that the files of `models` are present or can be downloaded, and that the packages they need are installed.

    Raises CheckpointError if the check fails for a model that loads at the start. For other models, passes a warning to
    `print_error`. Takes at most about ten seconds.
    """
    started_first = sorted(models, key=lambda model: model.name not in plan.started)
    for entry, error in _failures(plan.settings, started_first, check=_check_all):
        name = entry.card.name
        if name in plan.started:
            raise CheckpointError(f"model {name}: {error.message}") from error
        print_error(f"warning: model {name} cannot be loaded: {error.message}")


def entries_to_download(models: Iterable[ModelSettings]) -> dict[str, ModelEntry]:
    """Return the registry entries, by name, of those `models` of which some files are not on this machine yet."""
    entries = {model.name: model_entry(model) for model in models}
    return {name: entry for name, entry in entries.items() if not _is_local(entry)}


def describe_downloads(entries: Mapping[str, ModelEntry]) -> str:
    """Return text on how much of each entry's repository was downloaded so far, as "medium: 2.10 GB"."""
    from stable_audio_serve.models.download import downloaded_bytes  # here, because huggingface_hub is slow to import

    sizes = {name: downloaded_bytes(entry) for name, entry in entries.items() if entry.folder is None}
    return ", ".join(f"{name}: {size / 1e9:.2f} GB" for name, size in sizes.items())


def fetch_configs(plan: Plan, models: Iterable[ModelSettings], *, print_error: Callable[[str], None]) -> None:
    """Download the configs of `models`, so that this node can describe the models to clients.

    The models may load on other nodes only. For each config that cannot be downloaded, passes a warning to
    `print_error`. Takes at most about ten seconds.
    """
    others = [model for model in models if model.name not in BUILT_IN]
    for entry, error in _failures(plan.settings, others, check=_check_files):
        if not _is_described(entry):
            print_error(
                f"warning: model {entry.card.name}: {error.message}; until its config is in the cache here, the "
                f"API describes it as a distilled Stable Audio 3 model of {entry.card.max_duration_s:g} s"
            )


def check_proxy(settings: Settings, environ: Mapping[str, str], *, print_error: Callable[[str], None]) -> None:
    """Warn if HAProxy's hard stop is shorter than the longest possible request, because HAProxy may then cut it off.

    When replicas change, a new HAProxy process replaces the old one. The hard stop limits how long the old process
    still runs. A variable in the environment of `ray start` sets the hard stop.
    """
    if environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return
    hard_stop_s = float(environ.get(_HARD_STOP, _RAYS_HARD_STOP_S))
    if hard_stop_s < settings.api.max_deadline_s:
        print_error(
            f"warning: at a change of ingress replicas HAProxy ends requests after {hard_stop_s:g} s, and requests may "
            f"take {settings.api.max_deadline_s:g} s (api.max_deadline_s): set {_HARD_STOP} for every Ray process"
        )


def _is_described(entry: ModelEntry) -> bool:
    try:
        return describe_entry(entry) != entry
    except CheckpointError:
        return False


def _failures(
    settings: Settings, models: Iterable[ModelSettings], *, check: _Check
) -> Iterator[tuple[ModelEntry, CheckpointError]]:
    """Check all `models` at once. Yield the registry entry and the error of each model that fails, in order."""
    deadline = time.monotonic() + _LONGEST_S
    for entry, done in [_begin(settings, model, check=check) for model in models]:
        try:
            done.result(timeout=max(0.0, deadline - time.monotonic()))
        except CheckpointError as error:
            yield entry, error
        except TimeoutError:
            from stable_audio_serve.models.download import describe_incomplete_cache

            yield entry, CheckpointError(describe_incomplete_cache(entry))


def _begin(settings: Settings, model: ModelSettings, *, check: _Check) -> tuple[ModelEntry, Future[None]]:
    """Start `check` for one model in a daemon thread. Returns the model's registry entry and the check's future.

    A daemon thread does not keep the process from ending if the check hangs.
    """
    entry, done = model_entry(model), Future[None]()

    def run() -> None:
        try:
            check(entry, settings.hub_token)
        except Exception as error:  # noqa: BLE001  # `_failures` yields or raises it
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True, name=f"weights-{model.name}").start()
    return entry, done


def _check_all(entry: ModelEntry, token: str | None) -> None:
    """Check the files of a model. If the model needs the package stable-audio-tools, check the package, too."""
    if entry.backend == "stable_audio_tools":
        require_package()
        if entry.folder is not None or entry.card.name in BUILT_IN:
            require_open_family(describe_entry(entry).card.family)
    _check_files(entry, token)
    # The config says the model's family. By now, the config has been downloaded.
    if entry.backend == "stable_audio_tools":
        require_open_family(describe_entry(entry).card.family)


def _is_local(entry: ModelEntry) -> bool:
    if entry.folder is not None and find_text_encoder(Path(entry.folder)) is not None:
        return True
    from stable_audio_serve.models.download import find_local  # here, because huggingface_hub is slow to import

    return find_local(entry) is not None


def _check_files(entry: ModelEntry, token: str | None) -> None:
    if entry.folder is not None:
        folder = Path(entry.folder)
        check_folder(folder)
        if find_text_encoder(folder) is not None:
            return
    from stable_audio_serve.models.download import check_access  # here, because huggingface_hub is slow to import

    check_access(entry, token=token)
