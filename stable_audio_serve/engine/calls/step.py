"""One denoising evaluation of a padded batch. The host writes all inputs to one buffer and sends it to the device in
one copy.

Each row of the batch has its own sampler, step number, guidance and noise.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from stable_audio_serve.engine.calls.conditioning import HeldBranch
from stable_audio_serve.engine.hardware.arena import ZERO_PAGE, HeldFrames, page_table, pages_of, read, write
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.graphs import Kind
from stable_audio_serve.models.adapters.slot_table import PlacedSlot
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.sampling.guidance import (
    NUM_GUIDANCE,
    GuidanceBatch,
    GuidanceUse,
    RowSum,
    guidance_values,
    guide,
    row_sum,
)
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.sampling.update import (
    KEPT_PARTS,
    NUM_VALUES,
    Kept,
    StepNumbers,
    StepTerms,
    TermUse,
    advance,
    network_input,
)


class Section(NamedTuple):
    """One tensor in a buffer: its name, shape and dtype (int32 or float32)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int32

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


class Sections(tuple[Section, ...]):
    """The sections of a float32 buffer, in the order in which they follow one another."""

    @property
    def size(self) -> int:
        """The number of values in all sections."""
        return sum(section.size for section in self)

    def write(self, values: Mapping[str, Sequence[float]], *, device: Device) -> Tensor:
        """Return a host buffer with these values. Zeros fill up a section that has fewer values than its size.

        `values` may lack the last sections. These are left uninitialised.
        """
        written = bytearray()
        for section in self[: len(values)]:
            code = "f" if section.dtype == torch.float32 else "i"
            written += array(code, values[section.name]).tobytes().ljust(4 * section.size, b"\0")
        buffer = device.host_buffer(self.size, dtype=torch.float32)
        num_values = sum(section.size for section in self[: len(values)])
        buffer[:num_values] = torch.frombuffer(written, dtype=torch.float32)
        return buffer

    def read(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return a view of each section of the buffer."""
        parts = buffer.split([section.size for section in self])
        return {own.name: part.view(own.dtype).view(own.shape) for own, part in zip(self, parts, strict=True)}


@dataclass(frozen=True, slots=True)
class StepRow:
    """The inputs of one row's evaluation, on the host.

    `noise` is (channels, frames) float32, with the row's own number of frames. It is None if the evaluation uses none.
    """

    numbers: StepNumbers
    guidance: Guidance
    guided: bool
    valid_frames: int
    num_registers: int
    held: HeldFrames  # where the registers, then the mask, source and noise of kept frames, are stored
    branches: Sequence[HeldBranch]  # the conditioning: conditional, then unconditional if the row is guided
    noise: Tensor | None
    draws: bool  # whether any evaluation of the row uses noise; not only this one, so that the shape stays the same
    adapter: PlacedSlot | None = None  # where a captured call finds the row's adapters


@dataclass(frozen=True, slots=True)
class StepShape:
    """The shape of a padded call: everything that is fixed in its CUDA graph.

    `network_rows` is the network's batch size, in which a guided row takes two rows. `guides` is None if no row is
    guided. A call may have fewer rows than `rows`; unused rows have no effect.
    """

    rows: int
    network_rows: int
    frames: int
    latent_channels: int
    num_registers: int
    use: TermUse
    guides: GuidanceUse | None
    draws: bool  # whether some row uses noise
    constants: tuple[str, ...]  # the names of the conditioning constants that at least one row has
    by_frame: tuple[str, ...]
    adapter_pages: int = 0  # the call reads adapters from this many first pages of the slot table

    @classmethod
    def of(cls, rows: Sequence[StepRow], *, network_rows: int, frames: int, latent_channels: int) -> StepShape:
        """Return the shape that fits exactly these rows."""
        guided = [row.guidance for row in rows if row.guided]
        branches = [branch for row in rows for branch in row.branches]
        return cls(
            rows=len(rows),
            network_rows=network_rows,
            frames=frames,
            latent_channels=latent_channels,
            num_registers=max(row.num_registers for row in rows),
            use=TermUse.of([row.numbers for row in rows]),
            guides=GuidanceUse.of(guided) if guided else None,
            draws=any(row.draws for row in rows),
            constants=tuple(sorted({name for branch in branches for name in branch.slots})),
            by_frame=tuple(sorted({name for branch in branches for name in branch.pages})),
        )

    def with_adapters(self, rows: Sequence[StepRow]) -> Self:
        """Return the shape of the same call when it reads the adapters of `rows` from the slot table."""
        return replace(
            self, adapter_pages=_bucket(page + 1 for row in rows if row.adapter for page in row.adapter.pages)
        )

    def general(self) -> Self:
        """Return the shape to capture as a CUDA graph. The graph also serves rows with other samplers or guidance."""
        return replace(
            self,
            rows=self.network_rows,
            use=TermUse.of_any(
                self.num_registers, guides=self.guides is not None, blends=self.use.blends, draws=self.draws
            ),
            guides=GuidanceUse() if self.guides else None,
        )

    @property
    def kind(self) -> Kind:
        return "denoise"

    @property
    def size(self) -> int:
        return self.network_rows * self.frames

    @property
    def num_inputs(self) -> int:
        """The number of values in the input buffer. A buffer of zeros describes a call without rows."""
        return self.sections.size

    @property
    def num_outputs(self) -> int:
        return 0

    @property
    def sections(self) -> Sections:
        """The inputs of a padded call."""
        rows, pages = self.rows, pages_of(self.frames)
        return Sections(
            [
                *self.shared_sections,
                Section("registers", (rows, self.num_registers, pages)),  # numbers of memory pages, as in `kept`
                Section("kept", (rows * self.use.blends, KEPT_PARTS, pages)),
                Section("noise", (rows * self.draws, self.latent_channels, self.frames), torch.float32),
            ]
        )

    @property
    def shared_sections(self) -> list[Section]:
        """The inputs that padded and packed calls share. Unused network rows belong to row 0."""
        rows, network_rows, pages = self.rows, self.network_rows, pages_of(self.frames)
        return [
            Section("values", (rows, NUM_VALUES), torch.float32),  # in the order of `StepNumbers.values`
            Section("guidance", (rows, NUM_GUIDANCE), torch.float32),
            Section("frames", (rows,)),  # the length of each row without the call's padding
            Section("valid_frames", (rows,)),
            Section("conditional", (rows,)),  # the index of each row's conditional network row
            Section("unconditional", (rows,)),  # each row's unconditional network row; `conditional` if not guided
            Section("lanes", (network_rows,)),  # the index of the row to which each network row belongs
            Section("constants", (len(self.constants), network_rows)),  # numbers of memory slots
            Section("by_frame", (len(self.by_frame), network_rows, pages)),  # numbers of memory pages
            Section("adapter_slots", (network_rows * bool(self.adapter_pages),)),  # indices in the table of slots
            Section("adapter_pages", (network_rows, self.adapter_pages)),  # 1 where a row uses a page of the table
        ]

    def write(self, rows: Sequence[StepRow], device: Device) -> Tensor:
        """Return a host buffer that contains all inputs of these rows."""
        registers = [row.held.parts[: row.num_registers] for row in rows]
        kept = [row.held.parts[row.num_registers :] for row in rows if self.use.blends]
        values = {
            **self.shared_values(rows),
            "registers": page_table(registers, frames=self.frames, num_parts=self.num_registers),
            "kept": page_table(kept, frames=self.frames, num_parts=KEPT_PARTS),
        }
        sections = self.sections
        buffer = sections.write(values, device=device)
        if self.draws:
            noise = sections.read(buffer)["noise"]
            for target, row in zip(noise, rows, strict=False):
                length = 0 if row.noise is None else row.noise.shape[1]
                if row.noise is not None:
                    target[:, :length] = row.noise
                target[:, length:] = 0.0  # uninitialised memory may hold NaN
            noise[len(rows) :] = 0.0
        return buffer

    def shared_values(self, rows: Sequence[StepRow]) -> dict[str, Sequence[float]]:
        """Return the values of `shared_sections`."""
        first = list(accumulate((len(row.branches) for row in rows), initial=0))
        own = [branch for row in rows for branch in row.branches]
        spare = own[:1] or [HeldBranch({}, {})]  # unused network rows get the conditioning of the first network row
        held = own + spare * (self.network_rows - len(own))
        return {
            "values": [value for row in rows for value in row.numbers.values],
            "guidance": [value for row in rows for value in guidance_values(row.guidance)],
            "frames": [row.held.frames for row in rows],
            "valid_frames": [row.valid_frames for row in rows],
            "conditional": first[:-1],
            "unconditional": [stop - 1 for stop in first[1:]],
            "lanes": [index for index, row in enumerate(rows) for _ in row.branches],
            "constants": [branch.slots.get(name, ZERO_PAGE) for name in self.constants for branch in held],
            "by_frame": page_table(
                [[branch.pages.get(name, ()) for branch in held] for name in self.by_frame],
                frames=self.frames,
                num_parts=self.network_rows,
            ),
            **self._adapter_values(rows),
        }

    def _adapter_values(self, rows: Sequence[StepRow]) -> dict[str, Sequence[int]]:
        if not self.adapter_pages:
            return {"adapter_slots": (), "adapter_pages": ()}
        placed = [row.adapter or PlacedSlot(0, ()) for row in rows for _ in row.branches]
        return {
            "adapter_slots": [slot.index for slot in placed],
            "adapter_pages": [int(page in slot.pages) for slot in placed for page in range(self.adapter_pages)],
        }


def _bucket(counts: Iterable[int]) -> int:
    """Return the largest of `counts`, rounded up to a power of two so that there are few call shapes.

    Returns 0 if `counts` is empty.
    """
    most = max(counts, default=0)
    return 1 << (most - 1).bit_length() if most else 0


@dataclass(frozen=True, slots=True)
class Memories:
    """The device memory that steps read and write: registers (latents between steps), and conditioning by name."""

    registers: Tensor
    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor]


# Runs the network on latents (B, D, F), and returns a function that reads its output. This function gets the index of
# one network row for each of the B rows, and returns the outputs (B, D, F) float32 of these network rows.
Network = Callable[[Tensor], Callable[[Tensor], Tensor]]


def run_step(denoise: Callable[[StepBatch], Tensor], buffer: Tensor, *, memories: Memories, shape: StepShape) -> None:
    """Run one evaluation of every row, and write the new registers to `memories`. If the network raises, nothing is
    written.

    `buffer` is the host buffer that `shape.write` returned, copied to the device.
    """
    inputs = shape.sections.read(buffer)
    frame = torch.arange(shape.frames, device=buffer.device)

    def network(x: Tensor) -> Callable[[Tensor], Tensor]:
        lanes = inputs["lanes"]
        valid = frame < inputs["valid_frames"][:, None]
        batch = StepBatch(
            x=x.index_select(0, lanes),
            t=StepTerms(inputs["values"], shape.use).t.index_select(0, lanes),
            valid=valid.index_select(0, lanes),
            constants={
                name: memories.constants[name].index_select(0, slots)
                for name, slots in zip(shape.constants, inputs["constants"], strict=True)
            },
            by_frame={
                name: read(memories.by_frame[name], pages, frames=shape.frames)
                for name, pages in zip(shape.by_frame, inputs["by_frame"], strict=True)
            },
        )
        output = denoise(batch).float()
        return lambda network_rows: output.index_select(0, network_rows)

    evaluate(network, inputs, memory=memories.registers, shape=shape, frame=frame)


def evaluate(
    network: Network,
    inputs: Mapping[str, Tensor],
    *,
    memory: Tensor,
    shape: StepShape,
    frame: Tensor,
    add_up: RowSum = row_sum,
) -> None:
    """Run the network, guidance and the sampler's update on the registers in `memory`, and write the new registers.

    `inputs` has B rows of F frames, or B pages of 64 frames in a packed call. `frame` (F,) or (B, F) is the index of
    each frame in its row. `add_up` sums the values of each row.
    """
    state, terms = read(memory, inputs["registers"], frames=frame.shape[-1]), StepTerms(inputs["values"], shape.use)
    x = network_input(state, terms)
    output = network(x)
    velocity, unconditional, kept = output(inputs["conditional"]), None, None
    if shape.guides is not None:
        unconditional = output(inputs["unconditional"])
        guided = guide(
            x,
            terms.t,
            conditional=velocity,
            unconditional=unconditional,
            valid=frame < inputs["valid_frames"][:, None],
            rows=GuidanceBatch(inputs["guidance"], shape.guides),
            add_up=add_up,
        )
        velocity = torch.where(terms.guided, guided, velocity)
    if shape.use.blends:
        mask, source, noise = read(memory, inputs["kept"], frames=frame.shape[-1]).unbind(1)
        kept = Kept(mask=mask[:, 0] != 0.0, source=source, noise=noise)
    drawn = inputs["noise"] if shape.draws else None
    moved = advance(state, terms, velocity=velocity, unconditional=unconditional, noise=drawn, kept=kept)
    # After the last frame of a row, write zeros. A later call with more padding multiplies the values there by 0, and a
    # NaN would remain NaN.
    is_own = (frame < inputs["frames"][:, None])[:, None, None]
    write(memory, inputs["registers"], values=torch.where(is_own, moved, 0.0))
