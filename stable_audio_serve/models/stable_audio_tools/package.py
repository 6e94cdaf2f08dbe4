"""Finds and imports stable-audio-tools, but not the packages for training that it and k-diffusion usually import.

Only `import_package` imports torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from stable_audio_serve.core.catalog import OPEN_FAMILY
from stable_audio_serve.core.errors import CheckpointError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")

_NEEDED = (
    "stable_audio_tools",
    "alias_free_torch",
    "einops",
    "einops_exts",
    "k_diffusion",
    "PIL",
    "scipy",
    "torchdiffeq",
    "torchsde",
    "trampoline",
)
_K_DIFFUSION = "k_diffusion"
_USED_OF_K_DIFFUSION = ("utils", "sampling", "external")


def missing_packages() -> tuple[str, ...]:
    """Returns the required modules that are not installed; empty if the backend can be used. Imports nothing."""
    return tuple(name for name in _NEEDED if find_spec(name) is None)


def require_open_family(family: str) -> None:
    """Raise CheckpointError if the package does not support the model family."""
    if family != OPEN_FAMILY:
        raise CheckpointError(f"backend stable_audio_tools runs models of the family {OPEN_FAMILY}, this is {family}")


def require_package() -> None:
    """Raise CheckpointError with the installation command if a required package is missing."""
    missing = missing_packages()
    if missing:
        raise CheckpointError(
            f"backend stable_audio_tools needs {', '.join(missing)}, not installed here: run make "
            f"install-stable-audio-tools, or pip install --no-deps -r {REQUIREMENTS}"
        )


@cache
def import_package() -> ModuleType:
    """Returns the module `stable_audio_tools.models` with `factory` and `conditioners` imported.

    Takes seconds. Raises CheckpointError if the package is missing or cannot be imported.
    """
    require_package()
    try:
        with _replaced_modules(), redirect_stdout(StringIO()):
            _import_k_diffusion()
            for name in ("factory", "conditioners", "diffusion", "autoencoders"):
                importlib.import_module(f"stable_audio_tools.models.{name}")
    except (ImportError, OSError, AttributeError) as error:
        raise CheckpointError(
            f"stable-audio-tools cannot be imported ({error}): run pip install --no-deps -r {REQUIREMENTS}"
        ) from error
    return importlib.import_module("stable_audio_tools.models")


def _import_k_diffusion() -> None:
    """Import the sampling modules of k-diffusion without its `__init__`, which imports training packages."""
    if _K_DIFFUSION in sys.modules:
        return
    spec = find_spec(_K_DIFFUSION)
    if spec is None:
        raise ImportError(f"no module named {_K_DIFFUSION}")
    package = ModuleType(_K_DIFFUSION)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
    sys.modules[_K_DIFFUSION] = package
    try:
        for name in _USED_OF_K_DIFFUSION:
            setattr(package, name, importlib.import_module(f"{_K_DIFFUSION}.{name}"))
    except BaseException:
        for name in [name for name in sys.modules if name.partition(".")[0] == _K_DIFFUSION]:
            del sys.modules[name]
        raise


class _Resample:
    """Stands in for torchaudio's class, which is never used: sources are resampled before they reach a model."""

    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("torchaudio is not used here")


# What the imports get instead of each of these modules, if it is not imported yet: None makes an import fail, and a
# mapping has the names that stable-audio-tools imports from a stub. With flash_attn, it would compute all attention in
# float16, but torch's own attention is also fast. It uses torchaudio and torchvision only for training, or for work
# that this server does itself. The real torchaudio often does not match the installed torch.
_REPLACED: Mapping[str, Mapping[str, Any] | None] = {
    "flash_attn": None,
    "torchaudio": {},
    "torchaudio.transforms": {"Resample": _Resample},
    "torchvision": {},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {},
}


@contextmanager
def _replaced_modules() -> Iterator[None]:
    """Within this context, imports find what `_REPLACED` says. Afterwards, other libraries find the real modules."""
    stubs: dict[str, Any] = {}
    for name, attributes in _REPLACED.items():
        if name in sys.modules:
            continue
        stubs[name] = None if attributes is None else ModuleType(name)
        if attributes is not None:
            stubs[name].__spec__ = ModuleSpec(name, loader=None, is_package=True)
            stubs[name].__dict__.update(attributes)
            parent, _, child = name.rpartition(".")
            if parent in stubs:
                setattr(stubs[parent], child, stubs[name])
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
