"""One packed denoising evaluation of rows of different lengths. The network gets the frames of all rows concatenated,
without padding. The latents between steps (registers) are stored in memory pages of 64 frames.

As in `step`, the host writes all inputs to one buffer and sends it to the device in one copy. The lengths of the rows
are among these inputs, so one CUDA graph serves any lengths. A CPU uses `denoise_joined` instead, which gets a padded
batch and removes the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.engine.calls.step import Memories, Section, Sections, StepRow, StepShape, evaluate
from stable_audio_serve.engine.hardware.arena import PAGE_FRAMES, ZERO_PAGE, Pages, pages_of
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.sampling.guidance import PagedRows, row_sum
from stable_audio_serve.sampling.update import KEPT_PARTS, StepTerms


@dataclass(frozen=True, slots=True)
class PackedShape(StepShape):
    """The shape of a packed call: everything that is fixed in its CUDA graph.

    `tokens`, `rows`, `network_rows` and `frames` are capacities, of which a call may use less. The network adds
    `num_prefix` tokens to the frames of each network row.
    """

    _: KW_ONLY
    tokens: int
    num_prefix: int

    @classmethod
    def packing(cls, own: StepShape, *, tokens: int, num_prefix: int) -> PackedShape:
        """Return the shape of a packed call of the same rows as the padded call `own`."""
        return cls(
            **{field.name: getattr(own, field.name) for field in fields(own)}, tokens=tokens, num_prefix=num_prefix
        )

    @property
    def size(self) -> int:
        return self.tokens

    @property
    def num_pages(self) -> int:
        """The number of memory pages per register that all rows of a call together can have at most."""
        return self.tokens // PAGE_FRAMES + self.rows

    @property
    def sections(self) -> Sections:
        """The inputs of a packed call. All unused entries are 0.

        An unused row therefore has 0 frames, and the number of an unused page is `ZERO_PAGE`, a page of zeros that is
        never written.
        """
        pages = self.num_pages
        return Sections(
            [
                *self.shared_sections,
                Section("lane_frames", (self.network_rows,)),
                Section("lane_valid_frames", (self.network_rows,)),
                Section("first_page", (self.rows,)),  # the index, among all pages, of the first page of each row
                Section("page_rows", (pages,)),  # the index of the row to which each page belongs
                Section("page_starts", (pages,)),  # which frame of the row is the first of the page
                Section("registers", (pages, self.num_registers, 1)),  # numbers of memory pages, as in `kept`
                Section("kept", (pages * self.use.blends, KEPT_PARTS, 1)),
                Section("noise", (pages * self.draws, self.latent_channels, PAGE_FRAMES), torch.float32),
            ]
        )

    def write(self, rows: Sequence[StepRow], device: Device) -> Tensor:
        """Return a host buffer that contains all inputs of these rows."""
        sections = self.sections
        counts = [pages_of(row.held.frames) for row in rows]
        first_page = list(accumulate(counts, initial=0))[:-1]
        registers = [row.held.parts[: row.num_registers] for row in rows]
        kept = [row.held.parts[row.num_registers :] for row in rows if self.use.blends]
        values = {
            **self.shared_values(rows),
            "lane_frames": [row.held.frames for row in rows for _ in row.branches],
            "lane_valid_frames": [row.valid_frames for row in rows for _ in row.branches],
            "first_page": first_page,
            "page_rows": [index for index, count in enumerate(counts) for _ in range(count)],
            "page_starts": [PAGE_FRAMES * page for count in counts for page in range(count)],
            "registers": _by_page(registers, counts, num_parts=self.num_registers),
            "kept": _by_page(kept, counts, num_parts=KEPT_PARTS),
        }
        buffer = sections.write(values, device=device)
        if self.draws:
            noise = sections.read(buffer)["noise"]
            for row, start, count in zip(rows, first_page, counts, strict=True):
                if row.noise is not None:
                    whole = F.pad(row.noise, (0, count * PAGE_FRAMES - row.noise.shape[1]))
                    noise[start : start + count] = whole.unflatten(1, (count, PAGE_FRAMES)).transpose(0, 1)
        return buffer


def _by_page(rows: Sequence[Sequence[Pages]], counts: Sequence[int], *, num_parts: int) -> list[int]:
    """Return the numbers of the memory pages of all rows: by row, then by page within the row, then by tensor (part).

    `rows[i]` has the pages of each part of row i, `counts[i]` pages per part. `ZERO_PAGE` stands for each part that a
    row with fewer than `num_parts` parts lacks.
    """
    return [
        parts[part][page] if part < len(parts) else ZERO_PAGE
        for parts, count in zip(rows, counts, strict=False)
        for page in range(count)
        for part in range(num_parts)
    ]


def run_packed_step(
    denoise: Callable[[StepBatch], Tensor], buffer: Tensor, *, memories: Memories, shape: PackedShape
) -> None:
    """Run one evaluation of packed rows, and write their new registers to `memories`. If the network raises, nothing
    is written.

    `buffer` is the host buffer that `shape.write` returned, copied to the device.
    """
    inputs = shape.sections.read(buffer)
    rows = inputs["page_rows"]
    frame = inputs["page_starts"][:, None] + torch.arange(PAGE_FRAMES, device=buffer.device, dtype=torch.int32)

    def network(x: Tensor) -> Callable[[Tensor], Tensor]:
        tokens = _Tokens(inputs, shape)
        output = denoise(tokens.batch(x, memories=memories)).float()[0]
        return lambda network_rows: tokens.pages(output, network_rows, frame=frame)

    of_rows = ("values", "frames", *(("valid_frames", "guidance") if shape.guides else ()))
    by_page = {name: inputs[name].index_select(0, rows) for name in of_rows}
    add_up = _paged_rows(inputs, shape).sum if shape.guides else row_sum
    evaluate(network, {**inputs, **by_page}, memory=memories.registers, shape=shape, frame=frame, add_up=add_up)


def _paged_rows(inputs: Mapping[str, Tensor], shape: PackedShape) -> PagedRows:
    """Return which pages belong to which row."""
    place = torch.arange(pages_of(shape.frames), device=inputs["frames"].device, dtype=torch.int32)
    counts = (inputs["frames"] + PAGE_FRAMES - 1) // PAGE_FRAMES
    pages = torch.where(place < counts[:, None], inputs["first_page"][:, None] + place, shape.num_pages)
    return PagedRows(pages, inputs["page_rows"])


class _Tokens:
    """Converts between pages of 64 frames and the network's token sequence, in which all network rows are
    concatenated.
    """

    def __init__(self, inputs: Mapping[str, Tensor], shape: PackedShape) -> None:
        self._inputs = inputs
        self._shape = shape
        self.segments = Segments.of(
            inputs["lane_frames"],
            inputs["lane_valid_frames"],
            num_prefix=shape.num_prefix,
            num_tokens=shape.tokens,
            longest_frames=shape.frames,
        )
        segments = self.segments
        # Shape (tokens,): the number of each token's frame within its row; 0 for prefix tokens, which have no frame.
        self._frames = torch.where(segments.is_frame, segments.positions - shape.num_prefix, 0)

    def batch(self, x: Tensor, *, memories: Memories) -> StepBatch:
        """Return the network's inputs. `x` (G, D, 64) are the latents of all G pages."""
        inputs, shape, segments = self._inputs, self._shape, self.segments
        first = PAGE_FRAMES * inputs["first_page"].index_select(0, inputs["lanes"])
        places = first.index_select(0, segments.rows) + self._frames
        latents = x.transpose(0, 1).flatten(1).index_select(1, places)
        return StepBatch(
            x=torch.where(segments.is_frame, latents, 0.0)[None],
            t=StepTerms(inputs["values"], shape.use).t.index_select(0, inputs["lanes"]),
            valid=None,
            constants={name: memories.constants[name] for name in shape.constants},
            by_frame={
                name: self._read(memories.by_frame[name], table)
                for name, table in zip(shape.by_frame, inputs["by_frame"], strict=True)
            },
            segments=segments,
            slots=dict(zip(shape.constants, inputs["constants"], strict=True)),
        )

    def _read(self, memory: Tensor, table: Tensor) -> Tensor:
        """Return one value per token (1, channels, tokens); 0 for tokens without a frame.

        `table` (B, P) has the numbers of the P pages in `memory` that hold the values of each network row.
        """
        rows, frames = self.segments.rows, self._frames
        pages = table.flatten().index_select(0, rows * table.shape[1] + frames // PAGE_FRAMES)
        values = memory[pages, :, frames % PAGE_FRAMES]
        return torch.where(self.segments.is_frame[:, None], values, 0.0).T[None]

    def pages(self, output: Tensor, network_rows: Tensor, *, frame: Tensor) -> Tensor:
        """Convert network output (D, tokens) to pages (G, D, 64). Row i gets the output of network row
        `network_rows[i]`.
        """
        first = self.segments.offsets.index_select(0, network_rows) + self._shape.num_prefix
        places = first.index_select(0, self._inputs["page_rows"])[:, None] + frame
        taken = output.index_select(1, places.clamp(max=output.shape[1] - 1).flatten())
        return taken.unflatten(1, frame.shape).transpose(0, 1)


def denoise_joined(
    denoise: Callable[[StepBatch], Tensor], batch: StepBatch, *, frames: Sequence[int], valid_frames: Sequence[int]
) -> Tensor:
    """Remove the padding of a batch (B, D, F), concatenate its rows, and run the network once on all of them.

    `frames` has the length of each row. Returns the output as a padded batch (B, D, F) float32, with zeros as padding.
    The spec of the model must set `packs_rows`. Cannot be captured as a CUDA graph, because the lengths would be fixed.
    """
    joined = torch.cat([row[:, :count] for row, count in zip(batch.x, frames, strict=True)], dim=1)[None]
    output = denoise(replace(batch, x=joined, valid=None, frames=tuple(frames), valid_frames=tuple(valid_frames)))
    padded = output.new_zeros(len(frames), output.shape[1], batch.x.shape[-1])
    for target, row in zip(padded, output[0].split(list(frames), dim=1), strict=True):
        target[:, : row.shape[1]] = row
    return padded
