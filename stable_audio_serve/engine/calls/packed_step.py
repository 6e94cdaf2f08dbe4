"""One denoising evaluation of rows of different lengths, packed: the network gets the rows' frames one after another,
without padding. The latents between steps (registers) are stored in memory pages of 64 frames.

As in `step`, the host writes all inputs to one buffer and sends it to the device in one copy. The lengths of the rows
are among these inputs, so one CUDA graph serves any lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.engine.calls.step import Memories, StepRow, StepShape, join_sections
from stable_audio_serve.engine.hardware.arena import PAGE_FRAMES, ZERO_PAGE, Pages, page_table, pages_of, read, write
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.graphs import Kind
from stable_audio_serve.engine.scheduling.call_shapes import PackedRoom
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.sampling.guidance import NUM_GUIDANCE, GuidanceBatch, PagedRows, guidance_values, guide
from stable_audio_serve.sampling.update import KEPT_PARTS, NUM_VALUES, Kept, StepTerms, advance, network_input

_NUM_FLOAT_SECTIONS = 2  # sections of floats at the start of the buffer; sections of integers follow


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Everything that is fixed in the CUDA graph of a call of packed rows.

    `own` is the shape of the same rows in a padded call; all of `own` applies here except its buffer layout. The
    network adds `num_prefix` tokens to each row. Three sizes are capacities, of which a call may use less: N rows, B
    network rows (a guided row takes two), and G memory pages of 64 frames.
    """

    own: StepShape
    room: PackedRoom
    num_prefix: int

    def general(self) -> PackedShape:
        """Return the shape to capture as a CUDA graph. The graph also serves rows with other samplers or guidance."""
        return replace(self, own=self.own.general())

    @property
    def kind(self) -> Kind:
        return "denoise"

    @property
    def size(self) -> int:
        return self.room.tokens

    @property
    def inputs(self) -> tuple[int, torch.dtype]:
        """The number of values in the input buffer, and the dtype. A buffer of zeros describes a call without rows."""
        return sum(self.sizes), torch.float32

    @property
    def num_outputs(self) -> int:
        return 0

    @property
    def num_pages(self) -> int:
        """The largest number of memory pages that the rows of one call can have in total (per register)."""
        return self.room.tokens // PAGE_FRAMES + self.own.rows

    @property
    def sizes(self) -> list[int]:
        """The number of 4-byte values in each section of the buffer, in the order of `PackedInputs.read`."""
        own, pages, network_rows = self.own, self.num_pages, self.room.rows
        return [
            own.rows * NUM_VALUES,
            own.rows * NUM_GUIDANCE,
            *[own.rows] * 5,
            *[network_rows] * 3,
            pages,
            pages,
            pages * own.num_registers,
            pages * KEPT_PARTS * own.use.blends,
            network_rows * len(own.constants),
            network_rows * pages_of(self.room.longest) * len(own.by_frame),
            pages * own.latent_channels * PAGE_FRAMES * own.draws,
        ]

    def write(self, rows: Sequence[StepRow], device: Device) -> Tensor:
        """Return a host buffer that contains all inputs of these rows, in the layout that `PackedInputs.read` reads."""
        sizes = self.sizes
        buffer = device.host_buffer(sum(sizes), dtype=torch.float32)
        branches = [len(row.branches) for row in rows]
        first_branch = list(accumulate(branches, initial=0))
        counts = [pages_of(row.held.frames) for row in rows]
        first_page = list(accumulate(counts, initial=0))
        of_branch = [index for index, count in enumerate(branches) for _ in range(count)]
        own = [branch for row in rows for branch in row.branches]
        longest, num_missing = self.room.longest, self.room.rows - len(own)
        tables = [[branch.pages.get(name, ()) for branch in own] for name in self.own.by_frame]
        values = join_sections(
            [
                [value for row in rows for value in row.numbers.values],
                [value for row in rows for value in guidance_values(row.guidance)],
            ],
            sizes=sizes[:_NUM_FLOAT_SECTIONS],
        )
        sections = [
            [row.held.frames for row in rows],
            [row.valid_frames for row in rows],
            first_page[:-1],
            first_branch[:-1],
            [place + count - 1 for place, count in zip(first_branch, branches, strict=False)],
            of_branch,
            [rows[index].held.frames for index in of_branch],
            [rows[index].valid_frames for index in of_branch],
            [index for index, count in enumerate(counts) for _ in range(count)],
            [PAGE_FRAMES * page for count in counts for page in range(count)],
            _by_page([row.held.parts[: row.num_registers] for row in rows], counts, num_parts=self.own.num_registers),
            _by_page(
                [row.held.parts[row.num_registers :] for row in rows],
                counts,
                num_parts=KEPT_PARTS * self.own.use.blends,
            ),
            [
                slot
                for name in self.own.constants
                for slot in [branch.slots.get(name, ZERO_PAGE) for branch in own] + [ZERO_PAGE] * num_missing
            ],
            page_table(tables, frames=longest, num_parts=self.room.rows),
        ]
        numbers = join_sections(sections, sizes=sizes[_NUM_FLOAT_SECTIONS:-1])
        end = len(values) + len(numbers)
        buffer[: len(values)] = torch.tensor(values, dtype=torch.float32)
        buffer[len(values) : end].view(torch.int32)[:] = torch.tensor(numbers, dtype=torch.int32)
        if self.own.draws:
            noise = buffer[end:].view(-1, self.own.latent_channels, PAGE_FRAMES)
            for row, start, count in zip(rows, first_page, counts, strict=False):
                if row.noise is not None:
                    whole = F.pad(row.noise, (0, count * PAGE_FRAMES - row.noise.shape[1]))
                    noise[start : start + count] = whole.unflatten(1, (count, PAGE_FRAMES)).transpose(0, 1)
        return buffer


def _by_page(rows: Sequence[Sequence[Pages]], counts: Sequence[int], *, num_parts: int) -> list[int]:
    """Return the numbers of the memory pages of all rows. `rows[i]` has the pages of each tensor (part) of row i.

    The order is by row, then by page within the row, then by part. Each part of row i has `counts[i]` pages. A row with
    fewer than `num_parts` parts is filled up with `ZERO_PAGE`.
    """
    return [
        parts[part][page] if part < len(parts) else ZERO_PAGE
        for parts, count in zip(rows, counts, strict=True)
        for page in range(count)
        for part in range(num_parts)
    ]


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """The inputs of a packed step on the device. Integers are int32.

    Shapes: N rows, B network rows (two for a guided row), G memory pages of 64 frames, R registers, P pages of one row,
    D latent channels. Unused entries are 0. An unused row therefore has 0 frames, and an unused page is `ZERO_PAGE`,
    which contains zeros and is never written.
    """

    values: Tensor  # (N, NUM_VALUES)
    guidance: Tensor  # (N, NUM_GUIDANCE)
    frames: Tensor  # (N,)
    valid_frames: Tensor  # (N,)
    first_page: Tensor  # (N,) the index, among the G pages, of the first page of each row
    conditional: Tensor  # (N,) the index of each row's conditional network row
    unconditional: Tensor  # (N,) the same for the unconditional one; equal to `conditional` if the row is not guided
    lanes: Tensor  # (B,) the index of the row to which each network row belongs
    lane_frames: Tensor  # (B,)
    lane_valid_frames: Tensor  # (B,)
    page_rows: Tensor  # (G,) the index of the row to which each page belongs
    page_starts: Tensor  # (G,) which frame of the row is the first of the page
    registers: Tensor  # (G, R, 1) numbers of the memory pages where the registers are stored
    kept: Tensor  # (G, 3, 1) numbers of the memory pages of the mask, source and noise of kept frames; or empty
    slots: Tensor  # (number of constants, B) where the conditioning constant is stored
    by_frame: Tensor  # (number of names, B, P) numbers of the memory pages where the conditioning is stored
    noise: Tensor  # (G, D, 64) float32, arbitrary for rows that use no noise; empty if no row uses noise

    @classmethod
    def read(cls, buffer: Tensor, shape: PackedShape) -> PackedInputs:
        """Return views of a buffer written by `shape.write`."""
        own = shape.own
        values, guidance, *whole, noise = buffer.split(shape.sizes)
        (
            frames,
            valid,
            first_page,
            conditional,
            unconditional,
            lanes,
            lane_frames,
            lane_valid,
            page_rows,
            page_starts,
        ) = (section.view(torch.int32) for section in whole[:10])
        registers, kept, slots, by_frame = (section.view(torch.int32) for section in whole[10:])
        return cls(
            values=values.view(own.rows, NUM_VALUES),
            guidance=guidance.view(own.rows, NUM_GUIDANCE),
            frames=frames,
            valid_frames=valid,
            first_page=first_page,
            conditional=conditional,
            unconditional=unconditional,
            lanes=lanes,
            lane_frames=lane_frames,
            lane_valid_frames=lane_valid,
            page_rows=page_rows,
            page_starts=page_starts,
            registers=registers.view(shape.num_pages, own.num_registers, 1),
            kept=kept.view(-1, KEPT_PARTS, 1),
            slots=slots.view(len(own.constants), shape.room.rows),
            by_frame=by_frame.view(len(own.by_frame), shape.room.rows, pages_of(shape.room.longest)),
            noise=noise.view(-1, own.latent_channels, PAGE_FRAMES),
        )


def run_packed_step(
    denoise: Callable[[StepBatch], Tensor], inputs: PackedInputs, *, memories: Memories, shape: PackedShape
) -> None:
    """Run one evaluation of the packed rows and write their new registers. If the network fails, nothing is written."""
    memory, own, rows = memories.registers, shape.own, inputs.page_rows
    frame = inputs.page_starts[:, None] + torch.arange(PAGE_FRAMES, device=memory.device, dtype=torch.int32)
    state = read(memory, inputs.registers, frames=PAGE_FRAMES)
    terms = StepTerms(inputs.values.index_select(0, rows), own.use)
    x = network_input(state, terms)
    tokens = _Tokens(inputs, shape)
    output = denoise(tokens.batch(x, times=StepTerms(inputs.values, own.use).t, memories=memories)).float()[0]
    velocity, unconditional = tokens.pages(output, inputs.conditional, frame=frame), None
    if own.guides is not None:
        unconditional = tokens.pages(output, inputs.unconditional, frame=frame)
        guided = guide(
            x,
            terms.t,
            conditional=velocity,
            unconditional=unconditional,
            valid=frame < inputs.valid_frames.index_select(0, rows)[:, None],
            rows=GuidanceBatch(inputs.guidance.index_select(0, rows), own.guides),
            add_up=_paged_rows(inputs, shape).sum,
        )
        velocity = torch.where(terms.guided, guided, velocity)
    kept = None
    if own.use.blends:
        mask, source, noise = read(memory, inputs.kept, frames=PAGE_FRAMES).unbind(1)
        kept = Kept(mask=mask[:, 0] != 0.0, source=source, noise=noise)
    drawn = inputs.noise if own.draws else None
    moved = advance(state, terms, velocity=velocity, unconditional=unconditional, noise=drawn, kept=kept)
    # After the last frame of a row, write zeros. A padded call reads the whole page and multiplies these values by 0,
    # which would keep a NaN.
    is_own = frame < inputs.frames.index_select(0, rows)[:, None]
    write(memory, inputs.registers, values=torch.where(is_own[:, None, None], moved, 0.0))


def _paged_rows(inputs: PackedInputs, shape: PackedShape) -> PagedRows:
    """Return which of the G pages belong to which row."""
    place = torch.arange(pages_of(shape.room.longest), device=inputs.frames.device, dtype=torch.int32)
    counts = (inputs.frames + PAGE_FRAMES - 1) // PAGE_FRAMES
    pages = torch.where(place < counts[:, None], inputs.first_page[:, None] + place, shape.num_pages)
    return PagedRows(pages, inputs.page_rows)


class _Tokens:
    """The network's token sequence, in which all network rows follow one another. Converts between this sequence and
    pages of 64 frames.
    """

    def __init__(self, inputs: PackedInputs, shape: PackedShape) -> None:
        self._inputs = inputs
        self._shape = shape
        self.segments = Segments.of(
            inputs.lane_frames,
            inputs.lane_valid_frames,
            num_prefix=shape.num_prefix,
            num_tokens=shape.room.tokens,
            longest_frames=shape.room.longest,
        )
        segments = self.segments
        # Shape (tokens,): the number of each token's frame within its row; 0 for prefix tokens, which have no frame.
        self._frames = torch.where(segments.is_frame, segments.positions - shape.num_prefix, 0)

    def batch(self, x: Tensor, *, times: Tensor, memories: Memories) -> StepBatch:
        """Return the network's inputs, given the latents x of all pages (G, D, 64) and the time of each row (N,)."""
        inputs, own, segments = self._inputs, self._shape.own, self.segments
        first = PAGE_FRAMES * inputs.first_page.index_select(0, inputs.lanes)
        places = first.index_select(0, segments.rows) + self._frames
        latents = x.transpose(0, 1).flatten(1).index_select(1, places)
        return StepBatch(
            x=torch.where(segments.is_frame, latents, 0.0)[None],
            t=times.index_select(0, inputs.lanes),
            valid=None,
            constants={name: memories.constants[name] for name in own.constants},
            by_frame={
                name: self._read(memories.by_frame[name], table)
                for name, table in zip(own.by_frame, inputs.by_frame, strict=True)
            },
            segments=segments,
            slots=dict(zip(own.constants, inputs.slots, strict=True)),
        )

    def _read(self, memory: Tensor, table: Tensor) -> Tensor:
        """Return the values of each token (1, channels, tokens). `table` (B, P) has the page numbers of each network
        row in `memory`.
        """
        rows, frames = self.segments.rows, self._frames
        pages = table.flatten().index_select(0, rows * table.shape[1] + frames // PAGE_FRAMES)
        values = memory[pages, :, frames % PAGE_FRAMES]
        return torch.where(self.segments.is_frame[:, None], values, 0.0).T[None]

    def pages(self, output: Tensor, branches: Tensor, *, frame: Tensor) -> Tensor:
        """Convert network output (D, tokens) to pages (G, D, 64). `branches` (N,) selects one network row per row."""
        first = self.segments.offsets.index_select(0, branches) + self._shape.num_prefix
        places = first.index_select(0, self._inputs.page_rows)[:, None] + frame
        taken = output.index_select(1, places.clamp(max=output.shape[1] - 1).flatten())
        return taken.unflatten(1, frame.shape).transpose(0, 1)
