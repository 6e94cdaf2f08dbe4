"""Rewrites messages of the API and of the system for the command line: options instead of fields."""

from __future__ import annotations

import re
from collections.abc import Mapping

OPTIONS: Mapping[str, str] = {
    "model": "--model",
    "duration": "--duration",
    "steps": "--steps",
    "seed": "--seed",
    "cfg_scale": "--cfg-scale",
    "sampler_kwargs.sampler_type": "--sampler",
    "sampler_kwargs": "--sampler",
    "negative_prompt": "--negative-prompt",
    "batch_size": "--variations",
    "response_format": "--format",
    "priority": "--priority",
    "init_noise_level": "--noise",
    "inpaint_start_seconds": "the start of --region",
    "inpaint_end_seconds": "the end of --region",
    "keep": "--keep",
    "webhook_url": "--webhook",
    "bars": "--bars",
    "loop_type": "--kind",
    "style_strength": "--strength",
    "audio_file": "--audio",
    "prompt": "PROMPT",
    "audio": "AUDIO",
}
_PHRASES = (
    ("Input should be", "must be"),
    ("String should have at least 1 character", "must not be empty"),
    ("String should have", "must have"),
)
# A name of a field: the first word of a sentence, or a word with an underscore.
_NAME = re.compile(
    r"(?:(?<=^)|(?<=; )|(?<=: ))[a-z_.]+(?=:| must | is )|(?<![\w.])[a-z]+(?:_[a-z]+)+(?:\.[a-z_]+)?(?!\w)"
)


def in_options(message: str, names: Mapping[str, str] | None = None) -> str:
    """Returns a message of the API with options in place of fields; `names` override `OPTIONS` for one command."""
    for said, plain in _PHRASES:
        message = message.replace(said, plain)
    known = {**OPTIONS, **(names or {})}
    message = _NAME.sub(lambda found: known.get(found[0], found[0]), message)
    return re.sub(r"(^|; )([^:;]+): (?:\2 )?must\b", r"\1\2 must", message)  # the name may stand there twice


def describe_os_error(error: OSError) -> str:
    """Returns what went wrong with a file: its name and the system's reason in words."""
    reason = "file not found" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
    return reason if error.filename is None else f"{error.filename}: {reason}"
