"""How many kernels a denoiser call and a decoder window start, their arithmetic and their memory, at the real shapes of
the official models: on the meta device, where tensors have shapes but no values, in the precision of CUDA.

Fused kernels count once, as on CUDA: attention and the RMS norm. Knows no engine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from benchmarks.counting import operations
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.branches import from_batch, to_branch
from stable_audio_serve.models.sa3.config import Sa3Config, parse_config
from stable_audio_serve.models.sa3.denoiser import Denoiser, DenoiserConditioning
from stable_audio_serve.models.sa3.random_weights import official_config
from stable_audio_serve.models.weights import cast_network

Shape = tuple[int, int]  # rows, latent frames
META = torch.device("meta")
# Of one step: a lone short clip, eight of them, eight of 30 s, and the longest clip alone.
DENOISER_SHAPES: dict[str, tuple[Shape, ...]] = {
    "small-music": ((1, 64), (8, 64), (8, 384), (1, 1344)),
    "medium": ((1, 64), (8, 64), (8, 384), (1, 4160)),
}
DECODER_SHAPES: tuple[Shape, ...] = ((1, 64), (1, 128), (8, 128))
_TERA = 1e12
_MIB = 2.0**20


@dataclass(slots=True)
class DeviceWork:
    """What a section of a program asks of the device. `peak_bytes` are of tensors made within and alive at once."""

    launches: Counter[str] = field(default_factory=Counter)  # by operation
    flops: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0

    @property
    def num_launches(self) -> int:
        """All operations together."""
        return self.launches.total()

    def figures(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return {
            "launches": self.num_launches,
            "tflop": self.flops / _TERA,
            "peak_temporaries_mib": self.peak_bytes / _MIB,
        }


class _Counting(TorchDispatchMode):
    """Counts the operations on one device. Must be used in inference mode, in which fused operations arrive whole."""

    def __init__(self, device: torch.device, work: DeviceWork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._work = work

    def __torch_dispatch__(  # noqa: PLR0917 - torch passes them by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operations.is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in operations.leaves((args, *kwargs.values())) if isinstance(leaf, Tensor)]
        result = _attend(args) if operations.name_of(func) == "scaled_dot_product_attention" else func(*args, **kwargs)
        results = [leaf for leaf in operations.leaves([result]) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in results if tensor.device == self._device]
        if made:
            count = operations.count_launches(func, args)
            self._work.launches[operations.name_of(func)] += count
            self._work.flops += _flops(func, args, kwargs=kwargs, result=result)
            if not func.is_view:
                self._hold(made, given=given)
        return result

    def _hold(self, made: Sequence[Tensor], *, given: Sequence[Tensor]) -> None:
        """Count new memory until it is freed."""
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._work.live_bytes += storage.nbytes()
                self._work.peak_bytes = max(self._work.peak_bytes, self._work.live_bytes)
                weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._work.live_bytes -= num_bytes


@contextmanager
def counting(device: torch.device = META) -> Iterator[DeviceWork]:
    """Count what this thread does on `device` within the context, in inference mode."""
    work = DeviceWork()
    with torch.inference_mode(), _Counting(device, work):
        yield work


def count_model(
    name: str, *, calls: Sequence[Shape] | None = None, windows: Sequence[Shape] = DECODER_SHAPES
) -> dict[str, Any]:
    """Returns the figures of an official model: of a layer, of calls of the denoiser and of windows of the decoder.

    `calls` None: DENOISER_SHAPES of this model.
    """
    config, denoiser = build_denoiser(name)
    with META:
        autoencoder = AudioAutoencoder(config.autoencoder)
    with torch.inference_mode():
        autoencoder.resolve()  # as after loading
    shapes = DENOISER_SHAPES[name] if calls is None else calls
    of_calls = [count_denoiser_call(denoiser, config, rows=rows, frames=frames) for rows, frames in shapes]
    of_windows = [count_decoder_window(autoencoder, rows=rows, frames=frames) for rows, frames in windows]
    return {
        "layers": len(denoiser.transformer.layers),
        "launches_per_layer": max(call["launches_per_layer"] for call in of_calls),
        "launches_per_call": max(call["launches"] for call in of_calls),
        "launches_per_decoder_window": max(window["launches"] for window in of_windows),
        "graph_breaks_per_layer": count_graph_breaks(denoiser, config),
        "calls": of_calls,
        "decoder_windows": of_windows,
    }


def build_denoiser(name: str) -> tuple[Sa3Config, Denoiser]:
    """Returns an official model's config and denoiser, in float16 on the meta device."""
    config = parse_config(ConfigReader(official_config(name)))
    with META:
        denoiser = Denoiser(config.denoiser)
    cast_network(denoiser, torch.float16)
    return config, denoiser


def count_denoiser_call(denoiser: Denoiser, config: Sa3Config, *, rows: int, frames: int) -> dict[str, Any]:
    """Returns the figures of one call as the engine makes it, putting its rows' conditioning together included."""
    run, collate = prepare_call(denoiser, config, rows=rows, frames=frames)
    with torch.inference_mode():
        run()  # fills the tables that every later call finds
    with counting() as work, _watching(list(denoiser.transformer.layers), work=work) as layers:
        run()
    with counting() as collating:
        collate()
    largest = max(layers, key=Counter.total)
    return {
        "rows": rows,
        "frames": frames,
        **work.figures(),
        "launches_of_collate": collating.num_launches,
        "launches_per_layer": largest.total(),
        "launches_per_layer_by_operation": {name: count for name, count in largest.most_common() if count},
    }


def prepare_call(
    denoiser: Denoiser, config: Sa3Config, *, rows: int, frames: int
) -> tuple[Callable[[], Tensor], Callable[[], StepBatch]]:
    """Returns a function that makes one call as the engine does, and the part of it that puts its rows together."""
    branch = to_branch(make_conditioning(denoiser, config))
    x, times = torch.empty(rows, config.latent_channels, frames, device=META), torch.empty(rows, device=META)
    valid = torch.empty(rows, frames, dtype=torch.bool, device=META)

    def collate() -> StepBatch:
        return StepBatch.of(x, t=times, valid=valid, branches=[branch] * rows)

    def run() -> Tensor:
        result: Tensor = denoiser(x, times, conditioning=from_batch(collate()), valid=valid)
        return result.float()

    return run, collate


def count_graph_breaks(denoiser: Denoiser, config: Sa3Config) -> int:
    """Returns how often tracing a layer for `torch.compile` has to stop and begin anew; needs no compiler."""
    layer = denoiser.transformer.layers[0]
    run, _ = prepare_call(denoiser, config, rows=2, frames=64)
    given: list[tuple[Any, Any]] = []
    hook = layer.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True)
    with torch.inference_mode():
        run()
        hook.remove()
        args, kwargs = given[0]
        explained = torch._dynamo.explain(layer)(*args, **kwargs)
    return int(explained.graph_break_count)


def make_conditioning(denoiser: Denoiser, config: Sa3Config, *, rows: int = 1) -> DenoiserConditioning:
    """Returns the conditioning of rows without a source, on the meta device."""
    width = config.prompt.width
    context = torch.empty(rows, config.prompt.max_length + 1, width, device=META)  # the prompt and the duration
    local = torch.empty(rows, config.denoiser.local_width, 1, device=META)
    with torch.inference_mode():
        return denoiser.condition(context, torch.empty(rows, width, device=META), local=local)


def count_decoder_window(autoencoder: AudioAutoencoder, *, rows: int, frames: int) -> dict[str, Any]:
    """Returns the figures of windows decoded together; drawing their noise is not counted, adding it is."""
    latents = torch.empty(rows, autoencoder.latent_channels, frames, device=META)
    with counting() as work:
        autoencoder.decode(latents, [WindowNoise(_Drawn(), "decode", 0)] * rows)
    return {"rows": rows, "frames": frames, **work.figures()}


class _Drawn:
    """Noise that is there already."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=META)

    step = initial

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return torch.empty(shape, device=device)


@contextmanager
def _watching(modules: Sequence[nn.Module], *, work: DeviceWork) -> Iterator[list[Counter[str]]]:
    """Yields the launches of each run of a module, filled as they end."""
    done: list[Counter[str]] = []
    before: dict[nn.Module, Counter[str]] = {}

    def begin(module: nn.Module, _: Any) -> None:
        before[module] = work.launches.copy()

    def end(module: nn.Module, _: Any, __: Any) -> None:
        done.append(work.launches - before[module])

    hooks: list[Callable[[], None]] = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(begin).remove, module.register_forward_hook(end).remove]
    try:
        yield done
    finally:
        for remove in hooks:
            remove()


def _attend(args: Sequence[Any]) -> Tensor:
    """Returns what a fused kernel returns: heads next to each other in memory, so that merging them copies nothing."""
    q, v = args[0], args[2]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _flops(operation: Any, args: Sequence[Any], *, kwargs: dict[str, Any], result: Any) -> int:
    """Returns the multiplications and additions of matrix products and convolutions; others count as nothing."""
    if operations.name_of(operation) == "scaled_dot_product_attention":
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    formula = flop_registry.get(operation._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0
