"""The singular vectors of a network's weights, for adapters that need them and do not store them (types with -xs).

The vectors depend only on the weights. For a large network, computing them takes minutes. They are therefore stored in
a folder, in one file for each network and rank.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.private_files import make_private_folder, require_own_folder

SINGULAR_VECTORS = Path("~/.cache/stable-audio-serve/singular-vectors")  # folder of stored singular vectors
_REPORT_INTERVAL_S = 5.0
_CLOSE_VALUES = 1e-4  # relative difference of singular values below which their vectors are ambiguous

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SingularBasis:
    """The first singular vectors of a weight: `u` (out, rank) and `v` (in, rank), float32 on the CPU.

    The signs are chosen so that the largest entry of each column of `u` is positive. `is_ambiguous` is true if singular
    value number `rank` is almost equal to the next one, so that its vector is not unique.
    """

    u: Tensor
    v: Tensor
    is_ambiguous: bool


class SingularBases:
    """The singular bases of a network's layers. Not for several threads at a time."""

    def __init__(
        self, layers: Mapping[str, nn.Module], *, folder: Path | None = None, clock: Clock = SystemClock()
    ) -> None:
        """`layers` has all layers that adapters can change, by name. Without `folder`, bases are cached in memory."""
        self._layers = layers
        self._folder = folder and folder.expanduser().absolute()
        self._clock = clock
        self._kept: dict[int, dict[str, SingularBasis]] = {}  # by rank and layer, if no file can be stored

    def compute(self, names: Iterable[str], rank: int) -> dict[str, SingularBasis]:
        """Returns the bases of the layers `names`, by name.

        Reads them from the file for this rank. Computes missing bases and adds them to the file.
        """
        names = list(names)
        if not names:
            return {}
        path = self._path(rank)
        bases = self._kept.get(rank) or (_read(path, rank) if path else {})
        missing = [name for name in names if name not in bases]
        began_s = reported_s = self._clock.monotonic()
        for number, name in enumerate(missing, 1):
            bases[name] = singular_basis(matrix(self._layers[name]), rank)
            now_s = self._clock.monotonic()
            if now_s - reported_s >= _REPORT_INTERVAL_S:
                reported_s = now_s
                work = f"singular vectors of rank {rank}"
                log.info("%s: %d of %d layers after %.0f s", work, number, len(missing), now_s - began_s)
        if missing and not (path and _write(path, bases)):
            self._kept[rank] = bases
        return {name: bases[name] for name in names}

    def _path(self, rank: int) -> Path | None:
        """Returns the file's path. Returns None without a folder, or if other users can change the folder."""
        if self._folder is None:
            return None
        try:
            make_private_folder(self._folder)
            require_own_folder(self._folder)
        except OSError as error:
            log.warning("singular vectors are not stored: the folder %s cannot be used: %s", self._folder, error)
            return None
        return self._folder / f"{self._sha256}-rank-{rank}.safetensors"

    @cached_property
    def _sha256(self) -> str:
        """The hash of all weights."""
        return _hash({name: matrix(layer) for name, layer in self._layers.items()})


def _read(path: Path, rank: int) -> dict[str, SingularBasis]:
    """Returns all bases in a file. A damaged file is ignored."""
    try:
        with safe_open(path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
            stated = (file.metadata() or {}).get("sha256")
        if stated != _hash(stored):
            raise ValueError("its hash is wrong")
        names = {key.rpartition(".")[0] for key in stored}
        return {
            name: SingularBasis(stored[f"{name}.u"], stored[f"{name}.v"], bool(stored[f"{name}.is_ambiguous"]))
            for name in names
        }
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        log.warning("%s is damaged (%s); its singular vectors of rank %d are computed again", path, error, rank)
        return {}


def _write(path: Path, bases: Mapping[str, SingularBasis]) -> bool:
    """Write a file and then move it to `path`, so that other processes never read an incomplete file.

    Returns whether the file is stored.
    """
    tensors: dict[str, Tensor] = {}
    for name, basis in bases.items():
        parts = {"u": basis.u, "v": basis.v, "is_ambiguous": torch.tensor(basis.is_ambiguous)}
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        save_file(tensors, partial, metadata={"sha256": _hash(tensors)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        log.warning("singular vectors are not stored: %s", error)
        return False
    return True


def matrix(layer: nn.Module) -> Tensor:
    """Returns the weight of a linear layer or a 1x1 convolution as a matrix (out, in)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns 64 hexadecimal digits: the SHA-256 of the tensors' names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def singular_basis(weight: Tensor, rank: int) -> SingularBasis:
    """Returns the first `rank` singular vectors of `weight` (out, in).

    The vectors of the shorter axis are eigenvectors of the weight's product with its transpose. In float64 this is more
    exact than a singular value decomposition in float32, and takes a quarter of the time.
    """
    exact = weight.cpu().double()
    is_wide = exact.shape[1] > exact.shape[0]
    wide = exact if is_wide else exact.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values, near = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    # If a singular value is zero, its vector in `far` is not unique. It becomes zero, so that the pair has no effect.
    far = (wide.T @ near) / values[:rank].clamp(min=max(1e-12 * float(values[0]), 1e-30))
    u, v = (near, far) if is_wide else (far, near)
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    cut = values[rank - 1 : rank + 1].tolist()
    is_ambiguous = len(cut) == 2 and cut[0] - cut[1] <= _CLOSE_VALUES * cut[0]
    return SingularBasis((u * signs).float(), (v * signs).float(), is_ambiguous)
