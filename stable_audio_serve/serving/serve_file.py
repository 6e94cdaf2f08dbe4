"""Read serve_config.yaml. It has the format of Ray Serve's config files, except that unknown keys are errors."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings_errors import faults, unknown_keys

if typing.TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

# Default of the file's `logging_config`. Ray Serve's access log is off, because this package logs each request itself.
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_DEFAULT_PORT = 8000
_DEFAULT_HOST = "127.0.0.1"
_FILE_NAME = "serve_config.yaml"


def _packaged_file() -> Path:
    package = Path(__file__).parents[1]
    installed = package / _FILE_NAME
    # An installed package contains the file. In a checkout of the repository, the file is next to the package.
    return installed if installed.is_file() else package.parent / _FILE_NAME


PACKAGED_FILE = _packaged_file()


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A parsed config file with one application. `tree` is the whole file, `args` the settings of the application."""

    path: Path
    tree: dict[str, Any]
    args: dict[str, Any]

    @property
    def host(self) -> str:
        """The host in the file, or 127.0.0.1 if the file has none."""
        return str(self.http_options.get("host") or _DEFAULT_HOST)

    @property
    def port(self) -> int:
        """The port in the file, or 8000 if the file has none. Raises ConfigError if it is not a port number."""
        port = self.http_options.get("port", _DEFAULT_PORT)
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ConfigError(f"{self.path}: http_options.port: not a port number: {port!r}", field="http_options.port")
        return port

    @property
    def application(self) -> str:
        return str(self.tree["applications"][0].get("name", "default"))

    @property
    def route_prefix(self) -> str:
        """The path prefix of the application's routes, without a trailing slash."""
        return str(self.tree["applications"][0].get("route_prefix") or "/").rstrip("/")

    @property
    def http_options(self) -> dict[str, Any]:
        options = self.tree.get("http_options") or {}
        if not isinstance(options, dict):
            raise ConfigError(f"{self.path}: http_options: must be a mapping", field="http_options")
        return options


def find_serve_file(chosen: Path | None) -> Path:
    """Return the path of the config file: `chosen` if it is given.

    Otherwise it is serve_config.yaml in the working directory, or if there is none, the packaged file.
    """
    here = Path(_FILE_NAME)
    return chosen or (here if os.path.isfile(here) else PACKAGED_FILE)  # `Path.is_file` may raise PermissionError


def official_models() -> ServeFile:
    """Return the packaged config file without its `args`, so that the default models are served and not the demo."""
    packaged = read_serve_file(PACKAGED_FILE)
    application = {key: value for key, value in packaged.tree["applications"][0].items() if key != "args"}
    return ServeFile(packaged.path, packaged.tree | {"applications": [application]}, {})


def read_serve_file(path: Path) -> ServeFile:
    """Parse a config file. Raises ConfigError that names the file and the fault."""
    tree = _read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with an `applications` list", field="applications")
    applications = tree.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: applications: must be a list of exactly one application", field="applications")
    prefix = str(applications[0].get("route_prefix") or "/")
    if prefix != "/" and (not prefix.startswith("/") or prefix.endswith("/")):
        message = f"{path}: applications.0.route_prefix: must start with a slash and not end with one (got {prefix!r})"
        raise ConfigError(message, field="route_prefix")
    args = applications[0].get("args") or {}
    if not isinstance(args, dict):
        raise ConfigError(f"{path}: applications.0.args: must be a mapping", field="args")
    return ServeFile(path, tree, args)


class _Loader(yaml.SafeLoader):
    """Raises an error if a key appears twice in a mapping. PyYAML's own loader would ignore the first of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} appears twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # safe: derived from SafeLoader
    except FileNotFoundError as error:
        message = f"{path} does not exist; `stable-audio-serve init` writes a configuration to start from"
        raise ConfigError(message, field=str(path)) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", field=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is not UTF-8 text", field=str(path)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem or error.context}", field=str(path)) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML raises the other errors for values like the date 2026-13-45, and for deep nesting.
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}", field=str(path)) from error


def require_known_keys(file: ServeFile) -> None:
    """Raise ConfigError if the file has keys outside `args` that Ray Serve does not know. Imports Ray."""
    from ray.serve.schema import ServeDeploySchema

    if found := dict(unknown_keys(file.tree, ServeDeploySchema)):
        raise _refusal(file, found)


def deploy_schema(file: ServeFile, *, host: str, port: int) -> ServeDeploySchema:
    """Return the config file as Ray Serve's schema object, with this `host` and `port`. Imports Ray.

    Raises ConfigError that names each unknown key and each invalid value outside `args`.
    """
    from ray.serve.schema import ServeDeploySchema

    require_known_keys(file)
    http_options = file.http_options | {"host": host, "port": port}
    tree = {"logging_config": _QUIET} | file.tree | {"http_options": http_options}
    try:
        return ServeDeploySchema.model_validate(tree)
    except ValidationError as error:
        raise _refusal(file, faults(error)) from error


def _refusal(file: ServeFile, found: dict[tuple[str, ...], str]) -> ConfigError:
    complaints = "; ".join(f"{'.'.join(key)}: {complaint}" for key, complaint in found.items())
    return ConfigError(f"{file.path}: {complaints}", field=".".join(next(iter(found))))
