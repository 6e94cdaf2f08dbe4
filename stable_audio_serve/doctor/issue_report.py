"""Writes what an issue report needs, as JSON: findings, settings and versions.

Secrets are hidden, and so are the folders of paths that are not in the settings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

from pydantic import SecretStr
from torch.utils import collect_env

from stable_audio_serve import __version__
from stable_audio_serve.doctor.examine import Examination
from stable_audio_serve.doctor.findings import Finding, run_check

_HIDDEN = "**********"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # in JSON
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 4  # characters; a shorter value, such as 1, is not hidden, because it also occurs in other words
_PASSWORD = re.compile(r"\w://[^\s:/@]*:([^\s\"]+)@")  # of a URL
_PATTERNS = (
    (re.compile(r"(\w://)[^\s\"]*@"), rf"\1{_HIDDEN}@"),  # user and password of a URL
    (re.compile(r"(\w://[^\s\"?]+\?)[^\s\"]+"), rf"\1{_HIDDEN}"),  # query of a URL
    (re.compile(r"\bhf_\w{8,}"), _HIDDEN),
)
_PATH = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s\"'/,;:()<>\\]+/)+[^\s\"'/,;:()<>\\]*")

_PREFIXES = ("STABLE_AUDIO_", "HF_", "AWS_", "R2_", "RAY_", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH_", "OMP_", "MKL_")


def write_report(path: Path, examination: Examination, *, found: Sequence[Finding]) -> None:
    """Write the report to `path`."""
    settings = examination.settings
    report = {
        "version": __version__,
        "findings": [asdict(finding) for finding in found],
        "configuration": str(examination.path),
        "settings": settings and settings.model_dump(mode="json"),
        "variables": sorted(name for name in os.environ if name.startswith(_PREFIXES)),
        "machine": [line for part in run_check("machine", _describe) for line in part.message.splitlines()],
    }
    values = [] if settings is None else list(_leaves(settings.model_dump()))
    texts = [str(examination.path), *(value for value in values if isinstance(value, str))]
    kept = [text for text in texts if text.startswith(("/", "~"))]
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    secrets += [word for text in texts for found in _PASSWORD.findall(text) for word in (found, unquote(found))]

    def hide(found: re.Match[str]) -> str:
        return json.dumps(redact(json.loads(found[0]), kept=kept, secrets=secrets), ensure_ascii=False)

    text = _STRING.sub(hide, json.dumps(report, indent=1, ensure_ascii=False))
    path.write_text(text + "\n", encoding="utf-8")


def redact(text: str, *, kept: Iterable[str], secrets: Iterable[str], environ: Mapping[str, str] = os.environ) -> str:
    """Return `text` without secrets, the home folder, and the folders of paths that are not in or below `kept`.

    `secrets` are hidden wherever they occur, as are the values of variables named like secrets, such as HF_TOKEN.
    """
    variables = (value for name, value in environ.items() if _SECRET_NAME.search(name))
    for secret in (*secrets, *variables):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    home = str(Path(environ.get("HOME") or "/"))
    hide_home = re.compile(rf"{re.escape(home)}(?=/|\b)") if home != "/" else re.compile(r"(?!)")
    allowed = tuple(hide_home.sub("~", path) for path in kept)

    def shorten(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith(allowed) else f".../{found[0].rpartition('/')[2]}"

    return _PATH.sub(shorten, hide_home.sub("~", text))


def _describe() -> Iterator[Finding]:
    yield Finding("machine", "ok", collect_env.get_pretty_env_info())  # takes seconds, because it runs programs
    needed = [line for line in metadata.requires("stable-audio-serve") or () if "extra ==" not in line]
    names = [re.split(r"[^\w.-]", line)[0] for line in needed]
    yield Finding("packages", "ok", "\n".join(f"{name} {metadata.version(name)}" for name in names))


def _leaves(value: object) -> Iterator[object]:
    """Yield the values within nested mappings and lists."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield value
