"""One denoising evaluation of a padded batch. The host writes all inputs to one buffer and sends it to the device in
one copy.

Each row of the batch has its own sampler, step number, guidance and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_audio_serve.engine.calls.conditioning import HeldBranch
from stable_audio_serve.engine.hardware.arena import ZERO_PAGE, HeldFrames, page_table, pages_of, read, write
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.graphs import Kind
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.sampling.guidance import NUM_GUIDANCE, GuidanceBatch, GuidanceUse, guidance_values, guide
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

_NUM_FLOAT_SECTIONS = 2  # sections of floats at the start of the buffer; sections of integers follow


@dataclass(frozen=True, slots=True)
class StepRow:
    """The inputs of one row's evaluation, on the host. `noise` is (channels, frames of this row) float32, or None if
    the evaluation uses no noise.
    """

    numbers: StepNumbers
    guidance: Guidance
    guided: bool
    valid_frames: int
    num_registers: int
    held: HeldFrames  # where the registers, then the mask, source and noise of kept frames, are stored
    branches: Sequence[HeldBranch]  # the conditioning: conditional, then unconditional if the row is guided
    noise: Tensor | None
    draws: bool  # whether any evaluation of this row uses noise, so that all of them have one shape


@dataclass(frozen=True, slots=True)
class StepShape:
    """The shape of a padded call: everything that is fixed in its CUDA graph.

    A guided row takes two of the network's `network_rows`. `guides` is None if no row is guided. A call may have fewer
    rows than `rows`; unused rows have no effect.
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

    def general(self) -> StepShape:
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
    def inputs(self) -> tuple[int, torch.dtype]:
        """The number of values in the input buffer, and the dtype. A buffer of zeros describes a call without rows."""
        return sum(self._sizes), torch.float32

    @property
    def num_outputs(self) -> int:
        return 0

    @property
    def _sizes(self) -> list[int]:
        """The number of 4-byte values in each section of the buffer, in the order of `StepInputs.read`."""
        num, pages = self.rows, self.rows * pages_of(self.frames)
        return [
            num * NUM_VALUES,
            num * NUM_GUIDANCE,
            num,
            num,
            self.network_rows,
            num,
            num,
            pages * self.num_registers,
            pages * KEPT_PARTS * self.use.blends,
            self.network_rows * len(self.constants),
            self.network_rows * pages_of(self.frames) * len(self.by_frame),
            num * self.latent_channels * self.frames * self.draws,
        ]

    def write(self, rows: Sequence[StepRow], device: Device) -> Tensor:
        """Return a host buffer that contains all inputs of these rows, in the layout that `StepInputs.read` reads."""
        buffer = device.host_buffer(sum(self._sizes), dtype=torch.float32)
        branches = [2 if row.guided else 1 for row in rows]
        first = [sum(branches[:index]) for index in range(len(rows))]
        registers = [row.held.parts[: row.num_registers] for row in rows]
        kept = [row.held.parts[row.num_registers :] if self.use.blends else () for row in rows]
        own = [branch for row in rows for branch in row.branches]
        spare = own[:1] or [HeldBranch({}, {})]  # unused network rows get the conditioning of the first network row
        held = own + spare * (self.network_rows - len(own))
        pages = [[branch.pages.get(name, ()) for branch in held] for name in self.by_frame]
        sizes = self._sizes
        values = join_sections(
            [
                [value for row in rows for value in row.numbers.values],
                [value for row in rows for value in guidance_values(row.guidance)],
            ],
            sizes=sizes[:_NUM_FLOAT_SECTIONS],
        )
        sections = [
            [row.valid_frames for row in rows],
            [row.held.frames for row in rows],
            [index for index, count in enumerate(branches) for _ in range(count)],
            first,
            [place + count - 1 for place, count in zip(first, branches, strict=True)],
            page_table(registers, frames=self.frames, num_parts=self.num_registers),
            page_table(kept, frames=self.frames, num_parts=KEPT_PARTS * self.use.blends),
            [branch.slots.get(name, ZERO_PAGE) for name in self.constants for branch in held],
            page_table(pages, frames=self.frames, num_parts=self.network_rows),
        ]
        numbers = join_sections(sections, sizes=sizes[_NUM_FLOAT_SECTIONS:-1])
        end = len(values) + len(numbers)
        buffer[: len(values)] = torch.tensor(values, dtype=torch.float32)
        buffer[len(values) : end].view(torch.int32)[:] = torch.tensor(numbers, dtype=torch.int32)
        if self.draws:
            noise = buffer[end:].view(-1, self.latent_channels, self.frames)
            for target, row in zip(noise, rows, strict=False):
                length = 0 if row.noise is None else row.noise.shape[1]
                if row.noise is not None:
                    target[:, :length] = row.noise
                target[:, length:] = 0.0  # uninitialised memory may hold NaN
            noise[len(rows) :] = 0.0
        return buffer


def join_sections(sections: Sequence[Sequence[float]], *, sizes: Sequence[int]) -> list[float]:
    """Concatenate the sections, each padded with zeros to its size."""
    joined: list[float] = []
    for section, size in zip(sections, sizes, strict=True):
        joined += section
        joined += [0] * (size - len(section))
    return joined


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of a padded step on the device. Integers are int32.

    Shapes: N rows, B network rows (two for a guided row), F frames, R registers, P memory pages of 64 frames, D latent
    channels. `lanes` (B,) is the index of the row to which each network row belongs; unused network rows repeat row 0.
    `conditional` and `unconditional` (N,) are the indices of each row's network rows, equal if the row is not guided.
    """

    terms: StepTerms
    guidance: GuidanceBatch | None
    valid_frames: Tensor  # (N, 1)
    own_frames: Tensor  # (N, 1, 1, 1) the length of each row without the call's padding
    lanes: Tensor
    conditional: Tensor
    unconditional: Tensor
    registers: Tensor  # (N, R, P) numbers of the memory pages where the registers are stored
    kept: Tensor | None  # (N, 3, P) numbers of the memory pages of the mask, source and noise of kept frames
    constants: Mapping[str, Tensor]  # (B,) where each conditioning constant is stored
    by_frame: Mapping[str, Tensor]  # (B, P) numbers of the memory pages where the conditioning is stored
    noise: Tensor | None  # (N, D, F) float32, arbitrary for rows that use no noise

    @classmethod
    def read(cls, buffer: Tensor, shape: StepShape) -> StepInputs:
        """Return views of a buffer written by `shape.write`."""
        num = shape.rows
        values, guidance, *others, noise = buffer.split(shape._sizes)
        valid, own, lanes, conditional, unconditional, registers, kept, constants, by_frame = (
            section.view(torch.int32) for section in others
        )
        return cls(
            terms=StepTerms(values.view(num, NUM_VALUES), shape.use),
            guidance=GuidanceBatch(guidance.view(num, NUM_GUIDANCE), shape.guides) if shape.guides else None,
            valid_frames=valid.view(num, 1),
            own_frames=own.view(num, 1, 1, 1),
            lanes=lanes,
            conditional=conditional,
            unconditional=unconditional,
            registers=registers.view(num, shape.num_registers, -1),
            kept=kept.view(num, KEPT_PARTS, -1) if shape.use.blends else None,
            constants=dict(zip(shape.constants, constants.view(-1, shape.network_rows), strict=True)),
            by_frame={
                name: pages.view(shape.network_rows, -1)
                for name, pages in zip(shape.by_frame, by_frame.chunk(len(shape.by_frame) or 1), strict=False)
            },
            noise=noise.view(num, shape.latent_channels, shape.frames) if shape.draws else None,
        )


@dataclass(frozen=True, slots=True)
class Memories:
    """The device memory that steps read and write: registers (latents between steps), and conditioning by name."""

    registers: Tensor
    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor]


def run_step(
    denoise: Callable[[StepBatch], Tensor],
    inputs: StepInputs,
    *,
    memories: Memories,
    frames: int,
) -> None:
    """Run one evaluation of every row and write the new registers. If the network fails, nothing is written."""
    memory = memories.registers
    frame = torch.arange(frames, device=memory.device)
    valid = frame < inputs.valid_frames
    state = read(memory, inputs.registers, frames=frames)
    x, times = network_input(state, inputs.terms), inputs.terms.t
    batch = StepBatch(
        x=x.index_select(0, inputs.lanes),
        t=times.index_select(0, inputs.lanes),
        valid=valid.index_select(0, inputs.lanes),
        constants={name: memories.constants[name].index_select(0, slots) for name, slots in inputs.constants.items()},
        by_frame={name: read(memories.by_frame[name], pages, frames=frames) for name, pages in inputs.by_frame.items()},
    )
    output = denoise(batch).float()
    velocity, unconditional = output.index_select(0, inputs.conditional), None
    if inputs.guidance is not None:
        unconditional = output.index_select(0, inputs.unconditional)
        guided = guide(x, times, conditional=velocity, unconditional=unconditional, valid=valid, rows=inputs.guidance)
        velocity = torch.where(inputs.terms.guided, guided, velocity)
    kept = None
    if inputs.kept is not None:
        mask, source, noise = read(memory, inputs.kept, frames=frames).unbind(1)
        kept = Kept(mask=mask[:, 0] != 0.0, source=source, noise=noise)
    moved = advance(state, inputs.terms, velocity=velocity, unconditional=unconditional, noise=inputs.noise, kept=kept)
    # After the last frame of a row, write zeros. A call padded to more frames reads these values and multiplies them by
    # 0, which would keep a NaN.
    write(memory, inputs.registers, values=torch.where(frame < inputs.own_frames, moved, 0.0))
