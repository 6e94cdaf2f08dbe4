"""Reads serve_config.yaml: Ray Serve's own format, except that a key Serve does not know is an error, not silence."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from stable_audio_serve.core.errors import ConfigError

if typing.TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

# Our own lines say what an operator needs; Serve's access log would repeat them.
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_DEFAULT_PORT = 8000
_DEFAULT_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A config file with one application; `tree` is the whole of it, `args` that application's arguments."""

    path: Path
    tree: dict[str, Any]
    args: dict[str, Any]

    @property
    def host(self) -> str:
        """Where to listen: the file's choice, else this machine only."""
        return str(self._http_options.get("host") or _DEFAULT_HOST)

    @property
    def port(self) -> int:
        """The file's port, else 8000. Raises ConfigError."""
        port = self._http_options.get("port", _DEFAULT_PORT)
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ConfigError(f"{self.path}: http_options.port: not a port number: {port!r}", field="http_options.port")
        return port

    @property
    def application(self) -> str:
        """The application's name."""
        return str(self.tree["applications"][0].get("name", "default"))

    @property
    def route_prefix(self) -> str:
        """The path below which it is served, without a slash at the end."""
        return str(self.tree["applications"][0].get("route_prefix") or "/").rstrip("/")

    @property
    def _http_options(self) -> dict[str, Any]:
        options = self.tree.get("http_options") or {}
        if not isinstance(options, dict):
            raise ConfigError(f"{self.path}: http_options: must be a mapping", field="http_options")
        return options


def read_serve_file(path: Path) -> ServeFile:
    """Parse the file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}", field=str(path)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with an `applications` list", field="applications")
    applications = tree.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: applications: must be a list of exactly one application", field="applications")
    args = applications[0].get("args") or {}
    if not isinstance(args, dict):
        raise ConfigError(f"{path}: applications.0.args: must be a mapping", field="args")
    return ServeFile(path, tree, args)


def deploy_schema(file: ServeFile, *, host: str, port: int) -> ServeDeploySchema:
    """What Ray Serve deploys, listening on `host` and `port`. Imports Ray. Raises ConfigError naming the key."""
    from ray.serve.schema import ServeDeploySchema

    unknown = list(_unknown_keys(file.tree, ServeDeploySchema))
    if unknown:
        raise ConfigError(f"{file.path}: unknown key {', '.join(unknown)}", field=unknown[0])
    http_options = (file.tree.get("http_options") or {}) | {"host": host, "port": port}
    tree = {"logging_config": _QUIET} | file.tree | {"http_options": http_options}
    try:
        return ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        faults = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise ConfigError(
            f"{file.path}: " + "; ".join(f"{key}: {message}" for key, message in faults), field=faults[0][0]
        ) from error


def _unknown_keys(value: object, annotation: object, where: str = "") -> Iterator[str]:
    """Dotted names of the mapping keys in `value` that the Pydantic model(s) in `annotation` do not declare."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, annotation, f"{where}{index}.")
        return
    models = list(_models(annotation))
    if not isinstance(value, dict) or not models:
        return
    known = {name: field.annotation for model in models for name, field in model.model_fields.items()}
    for key, item in value.items():
        if key not in known:
            yield f"{where}{key}"
        else:
            yield from _unknown_keys(item, known[key], f"{where}{key}.")


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
