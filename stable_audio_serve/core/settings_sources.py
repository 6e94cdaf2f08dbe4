"""Build the settings from the defaults, the config file, `.env` and the environment.

A value in a later source of this list overrides the value in an earlier one. Every failure is a ConfigError that names
the key or the environment variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import ValidationError

from stable_audio_serve.core import failpoints
from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.errors import ConfigError, UnknownModelError
from stable_audio_serve.core.keys import hash_key, parse_key_hash
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_errors import faults, nearest, unknown_keys

# The environment variables of each setting. If several variables of the same setting are set, the first one is used.
VARIABLES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("default_model",): ("STABLE_AUDIO_DEFAULT_MODEL", "STABLE_AUDIO_MODEL"),
    ("preload_models",): ("STABLE_AUDIO_PRELOAD_MODELS",),
    ("device",): ("STABLE_AUDIO_DEVICE",),
    ("model_half",): ("STABLE_AUDIO_MODEL_HALF",),
    ("output_dir",): ("STABLE_AUDIO_OUTPUT_DIR",),
    ("hf_token",): ("HF_TOKEN",),
    ("proxy", "kind"): ("STABLE_AUDIO_PROXY",),
    ("jobs", "database_url"): ("STABLE_AUDIO_DATABASE_URL",),
    ("jobs", "webhook_secret"): ("STABLE_AUDIO_WEBHOOK_SECRET",),
    ("api", "key_hashes"): ("STABLE_AUDIO_API_KEY_HASHES",),
    ("api", "key_file"): ("STABLE_AUDIO_API_KEY_FILE",),
    ("api", "public_url"): ("STABLE_AUDIO_PUBLIC_URL",),
    ("api", "cors_origins"): ("STABLE_AUDIO_CORS_ORIGINS",),
    ("api", "allowed_hosts"): ("STABLE_AUDIO_ALLOWED_HOSTS",),
    ("api", "max_duration_s"): ("STABLE_AUDIO_MAX_DURATION",),
    ("api", "max_steps"): ("STABLE_AUDIO_MAX_STEPS",),
    ("api", "max_batch_size"): ("STABLE_AUDIO_MAX_BATCH_SIZE",),
    ("api", "max_upload_bytes"): ("STABLE_AUDIO_MAX_UPLOAD_BYTES",),
    ("proxy", "header_timeout_s"): ("STABLE_AUDIO_PROXY_HEADER_TIMEOUT_S",),
    ("proxy", "idle_timeout_s"): ("STABLE_AUDIO_PROXY_IDLE_TIMEOUT_S",),
    ("metrics", "host"): ("STABLE_AUDIO_METRICS_HOST",),
    ("metrics", "port"): ("STABLE_AUDIO_METRICS_PORT",),
    ("storage", "bucket"): ("STABLE_AUDIO_STORAGE_BUCKET", "AWS_S3_BUCKET", "R2_BUCKET", "R2_BUCKET_NAME"),
    ("storage", "prefix"): ("STABLE_AUDIO_STORAGE_PREFIX",),
    ("storage", "endpoint_url"): (
        "STABLE_AUDIO_STORAGE_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "R2_ENDPOINT_URL",
        "AWS_ENDPOINT_URL",
    ),
    ("storage", "region"): ("STABLE_AUDIO_STORAGE_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    ("storage", "links"): ("STABLE_AUDIO_STORAGE_LINKS",),
    ("storage", "public_base_url"): ("STABLE_AUDIO_STORAGE_PUBLIC_BASE_URL",),
    ("storage", "presigned_url_expires_s"): ("STABLE_AUDIO_PRESIGNED_URL_EXPIRES",),
}

# Pairs of variables for the S3 access key and its secret. The first pair with both variables set is used. The session
# token is used only with the AWS pair.
_ACCESS_KEYS = (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"))
_SESSION_TOKEN = "AWS_SESSION_TOKEN"

# vLLM's variable for an API key in plain text, accepted here too. The settings keep only the key's hash.
_PLAIN_KEY = "VLLM_API_KEY"

_SECRET = (
    ("hf_token",),
    ("api", "key_hashes"),
    ("jobs", "webhook_secret"),
    ("jobs", "database_url"),
    ("storage", "access_key_id"),
    ("storage", "secret_access_key"),
    ("storage", "session_token"),
    ("storage", "endpoint_url"),
)

# Variables with our prefix that are not settings, but that other code of this project reads. Any further variable with
# the prefix is an error, except the variables that Docker and Kubernetes set for a service called
# "stable-audio" (`_SERVICE_LINK`).
_PREFIX = "STABLE_AUDIO_"
_OTHER_VARIABLES = (
    "STABLE_AUDIO_URL",
    "STABLE_AUDIO_API_KEY",
    "STABLE_AUDIO_PROXY_HOST",
    "STABLE_AUDIO_PROXY_BINARY",
    failpoints.VARIABLE,
)
_SERVICE_LINK = re.compile(r"_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")

# For these variables, empty text is a value. Any other variable counts as unset if it is empty.
_EMPTY_MEANS_SOMETHING = frozenset({"STABLE_AUDIO_PRELOAD_MODELS", "STABLE_AUDIO_STORAGE_PREFIX"})


def load_settings(
    args: Settings | Mapping[str, Any] | None = None,
    *,
    environ: MutableMapping[str, str] = os.environ,
    directory: Path | None = None,
) -> Settings:
    """Return the effective settings. Raises ConfigError.

    `args` are the application's `args` in the config file. This function looks for the file `.env` in `directory`
    (default: the working directory) and the folders above it. It adds the variables of `.env` to `environ`, because
    libraries read them there.
    """
    load_environment(environ, directory=directory)
    _refuse_unknown_variables(environ)
    tree = args.model_dump(exclude_unset=True) if isinstance(args, Settings) else deepcopy(dict(args or {}))
    origins: dict[tuple[str, ...], str] = {}
    for path, names in VARIABLES.items():
        name = next((name for name in names if _is_set(environ, name)), None)
        if name is not None:
            _set(tree, path, value=environ[name])
            origins[path] = name
    _set_access_key(tree, environ)
    try:
        return _with_plain_key(Settings.model_validate(tree), environ.get(_PLAIN_KEY, "").strip())
    except ValidationError as error:
        raise _config_error(error, tree, origins=origins) from error


def load_environment(environ: MutableMapping[str, str], *, directory: Path | None = None) -> None:
    """Add the variables of the nearest `.env` file, in `directory` or above, to `environ`. Existing variables stay.

    Also copies HUGGING_FACE_HUB_TOKEN to HF_TOKEN if HF_TOKEN is not set. Raises ConfigError if `.env` is unreadable.
    """
    start = (directory or Path.cwd()).absolute()
    # Not `Path.is_file`, which raises PermissionError in the working directory of another user, as after `sudo -u`.
    path = next((folder / ".env" for folder in (start, *start.parents) if os.path.isfile(folder / ".env")), None)
    if path is not None:
        try:
            values = dotenv_values(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}", field=".env") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: it is not UTF-8 text", field=".env") from error
        for name, value in values.items():
            if value is not None:
                environ.setdefault(name, value)
    if not environ.get("HF_TOKEN") and environ.get("HUGGING_FACE_HUB_TOKEN"):
        environ["HF_TOKEN"] = environ["HUGGING_FACE_HUB_TOKEN"]


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {name for names in VARIABLES.values() for name in names if name.startswith(_PREFIX)} | {*_OTHER_VARIABLES}
    found = []
    for name in sorted(name for name in environ if name.startswith(_PREFIX) and name not in known):
        if _SERVICE_LINK.search(name) or environ[name].startswith(("tcp://", "udp://", "sctp://")):
            continue
        near = nearest(name.removeprefix(_PREFIX), [each.removeprefix(_PREFIX) for each in known])
        found.append(f"{name}: unknown" + (f"; did you mean {_PREFIX}{near}?" if near else " variable"))
    if found:
        raise ConfigError("; ".join(found), field=found[0].partition(":")[0])


def check_model_names(settings: Settings, catalog: ModelCatalog) -> None:
    """Raise ConfigError if the settings name a model that `catalog` does not have, or preload one without replicas.

    The message names the setting.
    """
    named: list[tuple[tuple[str, ...], str | None]] = [(("default_model",), settings.default_model)]
    named += [(("preload_models",), name) for name in settings.preload_models or ()]
    dialects = settings.dialects
    named += [(("dialects", key), getattr(dialects, key)) for key in ("model", "stability_model", "elevenlabs_model")]
    named += [(("dialects", "fal_models", key), name) for key, name in dialects.fal_models.items()]
    for path, name in named:
        try:
            if name:
                catalog.find(name)
        except UnknownModelError as error:
            key = ".".join(path)
            variables = f" ({' or '.join(VARIABLES[path])})" if path in VARIABLES else ""
            raise ConfigError(f"{key}{variables}: {error.message}", field=key) from error
    idle = {model.name for model in settings.models if model.replicas.min_replicas == 0}
    for name in settings.preload_models or ():
        if catalog.find(name).name in idle:
            raise ConfigError(
                f"preload_models keeps {name} loaded, but its replicas.min_replicas is 0: remove one of them",
                field="preload_models",
            )


def preloaded_names(settings: Settings, catalog: ModelCatalog) -> tuple[str, ...]:
    """Return the canonical names of the models to keep loaded: `preload_models`.

    If it is unset, this is the default model, unless its `min_replicas` is 0.
    """
    if settings.preload_models is not None:
        return tuple(dict.fromkeys(catalog.find(name).name for name in settings.preload_models))
    default = catalog.default.name
    is_idle = any(model.name == default and model.replicas.min_replicas == 0 for model in settings.models)
    return () if is_idle else (default,)


def least_replicas(name: str, settings: Settings, *, catalog: ModelCatalog) -> int:
    """Return a model's minimum number of replicas: `min_replicas`; if unset, 1 if the model is preloaded, else 0."""
    configured = next((model.replicas.min_replicas for model in settings.models if model.name == name), None)
    return int(name in preloaded_names(settings, catalog)) if configured is None else configured


def _with_plain_key(settings: Settings, key: str) -> Settings:
    hashes = settings.api.key_hashes
    if not key or hash_key(key) in {parse_key_hash(text).digest for text in hashes}:
        return settings
    return settings.model_copy(update={"api": settings.api.model_copy(update={"key_hashes": (*hashes, hash_key(key))})})


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    return name in environ and (bool(environ[name].strip()) or name in _EMPTY_MEANS_SOMETHING)


def _set(tree: dict[str, Any], path: tuple[str, ...], *, value: str) -> None:
    node: Any = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            return  # the section is not a mapping, which the validation of the settings will report
    node[path[-1]] = value.strip()


def _set_access_key(tree: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Set the S3 access key, its secret and its session token in `tree` from environment variables.

    The AWS_* variables are used if they set both the access key and its secret. Otherwise the R2_* variables are used,
    which have no session token. The two groups are not mixed, because the parts of different access keys do not
    work together.
    """
    pair = next((pair for pair in _ACCESS_KEYS if all(_is_set(environ, name) for name in pair)), None)
    if pair is None:
        return
    has_token = pair is _ACCESS_KEYS[0] and _is_set(environ, _SESSION_TOKEN)
    names = {"access_key_id": pair[0], "secret_access_key": pair[1], "session_token": has_token and _SESSION_TOKEN}
    if isinstance(tree.get("storage"), dict):
        tree["storage"].pop("session_token", None)
    for key, name in names.items():
        if name:
            _set(tree, ("storage", key), value=environ[name])


def _config_error(
    error: ValidationError, tree: dict[str, Any], *, origins: Mapping[tuple[str, ...], str]
) -> ConfigError:
    def name(path: tuple[str, ...]) -> str:
        return next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), ".".join(path))

    def is_secret(path: tuple[str, ...]) -> bool:
        return any(path[: len(secret)] == secret[: len(path)] for secret in _SECRET)

    found = {**faults(error, is_secret=is_secret), **dict(unknown_keys(tree, Settings))}
    return ConfigError(
        "; ".join(f"{name(path)}: {message}" for path, message in found.items()), field=name(next(iter(found)))
    )
