"""Which mode an engine runs in and how it batches, from its options and the kind of its device. Knows no model."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine.batching import (
    BatchPolicy,
    EqualLengths,
    FixedSlots,
    MergedGrid,
    OneRowPerCall,
    Packed,
    PackedOrGrid,
)
from stable_audio_serve.engine.call_shapes import GRAPH_ROWS_BESIDE_PACKED, AnyRows, GraphShapes, PackedShapes
from stable_audio_serve.engine.cost import CostModel
from stable_audio_serve.engine.options import EngineOptions


class DeviceKind(Protocol):
    """What suits a device, as in `engine.device.Device`."""

    @property
    def default_mode(self) -> Mode: ...

    @property
    def frame_grid(self) -> int: ...

    @property
    def prefers_packed(self) -> bool: ...

    @property
    def shares_calls(self) -> bool: ...


def resolve_mode(options: EngineOptions, device: DeviceKind) -> Mode:
    """Returns the mode of `options`, else the device's own."""
    return options.mode or device.default_mode


def resolve_policy(
    options: EngineOptions,
    device: DeviceKind,
    *,
    cost: CostModel,
    pads_rows: bool = True,
    packs_rows: bool = False,
    packed: PackedShapes | None = None,
) -> BatchPolicy:
    """Returns how steps are split into device calls in this mode on this device; `pads_rows`, `packs_rows` as in
    ModelSpec, `packed` the shapes of packed calls that graphs can be captured of, if there are any.

    A grid that the options name is kept. Where calls are not shared, no graph needs a number of rows.
    """
    grid = (options.frame_grid or device.frame_grid) if pads_rows else 1
    if resolve_mode(options, device) == "strict":
        return FixedSlots(options.slots, grid) if device.shares_calls else OneRowPerCall(grid)
    knee_tokens = partial(cost.knee_tokens, fixed_share=options.fixed_share)
    if pads_rows and packs_rows and device.prefers_packed and options.frame_grid is None:
        return Packed(knee_tokens)
    shapes = (GraphShapes if device.shares_calls else AnyRows)(grid, options.max_step_tokens)

    def call_ms(rows: int, frames: int) -> float:
        return cost.call_ms("denoise", rows=rows, frames=frames)

    if not pads_rows:
        return EqualLengths(call_ms, knee_tokens, shapes)
    if packed is None or options.frame_grid is not None:
        return MergedGrid(call_ms, knee_tokens, shapes)
    beside = GraphShapes(grid, options.max_step_tokens, GRAPH_ROWS_BESIDE_PACKED)
    return PackedOrGrid(MergedGrid(call_ms, knee_tokens, beside), packed, partial(cost.groups_ms, "denoise"))
