"""Runs the model for the engine thread: batches prompts, audio windows and clips (rows) into model calls.

A denoising call is padded or packed (rows of different lengths are concatenated). It runs eagerly or as a captured CUDA
graph. Callers need not know which.

If a call raises an exception, its items run again one by one, so that only the faulty item fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.engine.calls.coding_calls import DecodeCalls
from stable_audio_serve.engine.calls.conditioning import ConditioningArena
from stable_audio_serve.engine.calls.packed_step import PackedShape, denoise_joined, run_packed_step
from stable_audio_serve.engine.calls.requests import Row, Stepping
from stable_audio_serve.engine.calls.step import Memories, StepRow, StepShape, run_step
from stable_audio_serve.engine.hardware.arena import FrameArena, HeldFrames, read, write_pages
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.graphs import Captured, Graphs
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, Call
from stable_audio_serve.engine.scheduling.memory import FixedMemory
from stable_audio_serve.models.adapters.apply import RowSlots, adapting
from stable_audio_serve.models.adapters.base import adaptable_layers
from stable_audio_serve.models.adapters.fold import Slot
from stable_audio_serve.models.adapters.slot_table import SlotTable, TableRows
from stable_audio_serve.models.protocol import (
    AdaptableModel,
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    RowConditioning,
    StepBatch,
    TextEmbedding,
)

Item = TypeVar("Item")
Result = TypeVar("Result")


_TABLE_SLOTS = 17  # slots in the table that captured steps read; slot 0 is for rows without adapters
_MOST_SLOT_PAGES = 32


class Executor:
    """Runs the model for the engine thread. Results are in the order of the inputs.

    Up to `max_per_call` prompts or audio windows of equal length share a model call. In strict mode, `max_per_call` is
    1.
    """

    def __init__(
        self,
        model: DiffusionModel,
        policy: BatchPolicy,
        *,
        device: Device,
        max_per_call: int,
        is_strict: bool = False,
        clock: Clock = SystemClock(),
        metrics: Metrics = NullMetrics(),
        max_graph_bytes: int | None = None,
        captures_off_file: Path | None = None,
        slot_table_bytes: int = 0,
    ) -> None:
        """`slot_table_bytes` is the size in bytes of the memory from which captured steps read their adapters."""
        self._model = model
        self._device = device
        self._policy = policy
        self._max_per_call = max_per_call
        self._is_strict = is_strict
        self.conditioning = ConditioningArena(device)
        self.graphs = Graphs(
            device,
            clock=clock,
            metrics=metrics,
            max_bytes=max_graph_bytes,
            off_file=captures_off_file,
            is_exact=is_strict,
        )
        self._decoder = DecodeCalls(model, device=device, graphs=self.graphs)
        self._fixed: FixedMemory | None = None
        self._slot_table_bytes = slot_table_bytes

    def fix_memory(self, fixed: FixedMemory) -> None:
        """Allocate all arenas with fixed sizes. Must be called on the engine thread before the first row.

        If it is not called, arenas are moved when they grow. This works only on a device without CUDA graphs.
        """
        self._fixed = fixed
        self.graphs.room.expect("denoise", call_bytes=fixed.step_frame)
        self.graphs.room.expect("decode", call_bytes=fixed.decode_frame)
        self.conditioning = ConditioningArena(self._device, fixed)
        _ = self.arena

    @cached_property
    def arena(self) -> FrameArena:
        """The device memory of all rows' registers (latents between two steps).

        The memory is allocated when the property is first read. That must happen on the engine thread.
        """
        num_pages = self._fixed.pages if self._fixed else None
        return FrameArena(self._model.spec.card.latent_channels, device=self._model.device, num_pages=num_pages)

    def embed(self, prompts: Sequence[str]) -> list[TextEmbedding | Exception]:
        outcomes: list[TextEmbedding | Exception] = []
        for start in range(0, len(prompts), self._max_per_call):
            outcomes += self._isolated(prompts[start : start + self._max_per_call], self._model.encode_text)
        return outcomes

    def encode(self, windows: Sequence[EncodeWindow]) -> list[Tensor | Exception]:
        """Encode windows of source audio.

        Returns, for each window, its latents (channels, frames) float32, or the exception that encoding it raised.
        """
        return self._by_length(windows, length=lambda window: window.samples.shape[-1], run=self._model.encode_audio)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor | Exception]:
        """Decode windows of latents.

        Returns, for each window, its audio (channels, samples) float32, or the exception that decoding it raised.
        """
        return self._by_length(windows, length=lambda window: window.latents.shape[-1], run=self._decoder.decode)

    def condition(self, row: Row, inpaint: Tensor | None) -> RowConditioning:
        """Return the conditioning of a row, computed with the adapters of the row's next evaluation.

        `inpaint` has the latents (channels, frames) of the source audio that the row edits. It is None if the network
        does not read them.
        """
        prompts = row.request.shared.prompts[row.plan.prompt]
        with self._adapted([] if row.slot is None else [(slice(None), row.slot)]):
            return self._model.condition(
                row.plan, prompt=prompts.prompt, negative=prompts.negative, inpaint_latents=inpaint
            )

    def calls(self, rows: Sequence[Row]) -> list[Call]:
        """Split the next evaluation of these rows into device calls."""
        return self._policy.split([row.work.lane for row in rows])

    def hold(self, parts: Tensor) -> HeldFrames:
        """Store one row's tensors on the device.

        `parts` (N, D, F) contains the row's registers, followed by the mask, source and noise of kept frames, if any.
        """
        num_parts, _, frames = parts.shape
        held = HeldFrames.take(self.arena, frames=frames, num_parts=num_parts)
        try:
            table = torch.tensor(held.parts, dtype=torch.int64)
            write_pages(self.arena.memory, self._device.upload(table), values=parts)
        except BaseException:
            held.free()
            raise
        return held

    def release(self, held: HeldFrames, *, part: int) -> Tensor:
        """Free a row's memory. Returns a copy of the tensor (D, F) that was stored at index `part`."""
        table = self._device.upload(torch.tensor(held.parts[part], dtype=torch.int32))
        latents = read(self.arena.memory, table, frames=held.frames)
        held.free()
        return latents

    def denoise(self, rows: Sequence[Row], calls: Sequence[Call]) -> list[tuple[Row, Exception]]:
        """Run one evaluation of every row: network, guidance, sampler update. `calls` is the result of `self.calls`.

        Returns the rows that failed, with their exceptions. The registers, noise and `work` of a failed row are
        unchanged.
        """
        failures: list[tuple[Row, Exception]] = []
        for call in calls:
            members = [rows[i] for i in call.members]
            outcomes = self._isolated(members, partial(self._evaluate, call=call))
            for row, outcome in zip(members, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failures.append((row, outcome))
                else:
                    _commit(row)
        return failures

    def _by_length(
        self,
        windows: Sequence[Item],
        *,
        length: Callable[[Item], int],
        run: Callable[[Sequence[Item]], Sequence[Tensor]],
    ) -> list[Tensor | Exception]:
        order = sorted(range(len(windows)), key=lambda i: length(windows[i]))
        outcomes: dict[int, Tensor | Exception] = {}
        for _, group in groupby(order, key=lambda i: length(windows[i])):
            indices = list(group)
            for start in range(0, len(indices), self._max_per_call):
                some = indices[start : start + self._max_per_call]
                outcomes.update(zip(some, self._isolated([windows[i] for i in some], run), strict=True))
        return [outcomes[i] for i in range(len(windows))]

    def _isolated(
        self, items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result | Exception]:
        """Return the results of `run(items)`. If `run` raises, call it for each item alone, and return the result or
        the exception of each.

        `run` must have no effect when it raises. Raises DeviceLostError if the device is lost.
        """
        try:
            return list(run(items))
        except Exception as error:  # noqa: BLE001 - an error that one row causes must end that row only
            self._device.require_usable(error)
            if len(items) == 1:
                return [error]
        outcomes: list[Result | Exception] = []
        for item in items:
            outcomes += self._isolated([item], run)
        return outcomes

    def _evaluate(self, rows: Sequence[Row], *, call: Call) -> Sequence[Row]:
        """Run one evaluation of these rows in one network call and store their new latents. Returns `rows`."""
        step_rows = [_step_row(row) for row in rows]
        slots = self._slots_of(rows, step_rows)
        captured_rows = self._place_slots(rows, step_rows)
        is_packed_by_host = bool(call.lengths) and not call.tokens
        shape = StepShape.of(
            step_rows,
            network_rows=sum(len(row.branches) for row in step_rows) if is_packed_by_host else call.rows,
            frames=call.frames,
            latent_channels=self._model.spec.card.latent_channels,
        )
        if call.tokens:
            shape = PackedShape.packing(shape, tokens=call.tokens, num_prefix=self._model.spec.num_prefix)
        frames = [step_row.held.frames for step_row in step_rows for _ in step_row.branches] if call.lengths else []
        if is_packed_by_host:
            seen = [step_row.valid_frames for step_row in step_rows for _ in step_row.branches]
            buffer = self._device.upload(shape.write(step_rows, self._device))
            denoise = partial(denoise_joined, self._model.denoise, frames=frames, valid_frames=seen)
            with self._adapted(slots, frames=frames):
                run_step(denoise, buffer, memories=self._memories(), shape=shape)
        elif captured_rows is None or not self._replay(
            (shape.with_adapters(captured_rows) if slots else shape).general(), captured_rows
        ):
            with self._adapted(slots, frames=frames):
                self._run(shape, self._device.upload(shape.write(step_rows, self._device)))
        return rows

    def _place_slots(self, rows: Sequence[Row], step_rows: Sequence[StepRow]) -> Sequence[StepRow] | None:
        """Write the rows' adapters to the slot table. Returns `step_rows` with the location of each row's adapters.

        Returns None if the call must run without a CUDA graph: the device has none, or the adapters do not fit into the
        table. In strict mode, any call with adapters runs without one, because the number of pages that a captured call
        reads depends on the other rows. So does any call of a compiled model, whose layers would ignore the adapters.
        """
        if not self._device.can_capture:
            return None
        slots = [row.slot for row in rows if row.slot is not None]
        if not slots:
            return step_rows
        table = None if self._is_strict or self._model.spec.is_compiled else self._slot_table
        placed = None if table is None else table.place(slots)
        if placed is None:
            return None
        places = iter(placed)
        return [
            step_row if row.slot is None else replace(step_row, adapter=next(places))
            for row, step_row in zip(rows, step_rows, strict=True)
        ]

    @cached_property
    def _slot_table(self) -> SlotTable | None:
        """The table from which captured steps read adapters. None if the model takes no adapters, or if
        `slot_table_bytes` is too small for two pages.
        """
        model = self._model
        if not isinstance(model, AdaptableModel):
            return None
        layers = {name: layer for name, layer in self._adaptable_layers.items() if model.runs_in_steps(name)}
        num_pages = min(self._slot_table_bytes // max(SlotTable.page_bytes(layers), 1), _MOST_SLOT_PAGES)
        if num_pages < 2:
            return None
        # A power of two, because calls read the first 1, 2, 4, ... pages.
        return SlotTable(layers, num_slots=_TABLE_SLOTS, num_pages=1 << (num_pages.bit_length() - 1))

    def _slots_of(self, rows: Sequence[Row], step_rows: Sequence[StepRow]) -> list[tuple[slice, Slot]]:
        """Return the network rows that have adapters, as pairs (adjacent network rows, slot of the adapters).

        In fast mode, adjacent rows with the same slot are joined to one pair. In strict mode they are not, because the
        operations for a row must not depend on its neighbours.
        """
        slots: list[tuple[slice, Slot]] = []
        start = 0
        for row, step_row in zip(rows, step_rows, strict=True):
            stop = start + len(step_row.branches)
            if row.slot is not None:
                is_joined = not self._is_strict and slots and slots[-1][0].stop == start and slots[-1][1] is row.slot
                slots.append((slice(slots.pop()[0].start if is_joined else start, stop), row.slot))
            start = stop
        return slots

    @contextmanager
    def _adapted(self, slots: Sequence[tuple[slice, Slot]], *, frames: Sequence[int] = ()) -> Iterator[None]:
        """Apply adapters to the network within this context.

        `slots` has pairs (network rows, slot of their adapters). In a packed call, `frames` has the length of every
        network row.
        """
        with ExitStack() as stack:
            if slots:
                spec = self._model.spec
                if spec.is_compiled:
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                own = RowSlots(slots, frames=frames, num_prefix=spec.num_prefix)
                stack.enter_context(adapting(self._adaptable_layers, own))
            yield

    @cached_property
    def _adaptable_layers(self) -> Mapping[str, nn.Linear | nn.Conv1d]:
        return adaptable_layers(self._model.adaptable) if isinstance(self._model, AdaptableModel) else {}

    def _replay(self, shape: StepShape, rows: Sequence[StepRow]) -> bool:
        """Replay the CUDA graph of this shape with the inputs of `rows`.

        Returns False if there is no such graph or the replay failed. The call must then run eagerly.
        """
        # The step writes to the registers, so `memory.outputs` is not used.
        captured = self.graphs.find(shape, lambda shape, memory: self._run(shape, memory.inputs))
        if captured is None:
            return False
        captured.memory.inputs.copy_(shape.write(rows, self._device), non_blocking=True)
        if captured.is_confirmed:
            return self.graphs.replay(captured)
        self._confirm(captured, shape=shape, rows=rows)
        return True

    def _confirm(self, captured: Captured, *, shape: StepShape, rows: Sequence[StepRow]) -> None:
        """Compare a captured step with an eager one before its first use: replay it, restore the registers, run it
        eagerly, and compare both results. The registers then contain the eager result.
        """
        pages = [page for row in rows for part in row.held.parts[: row.num_registers] for page in part]
        places = self._device.upload(torch.tensor(pages, dtype=torch.int32))
        registers = self.arena.memory
        before = registers.index_select(0, places).double()  # float64, so that the differences below are not rounded
        is_replayed = self.graphs.replay(captured)
        replayed = registers.index_select(0, places)
        registers.index_copy_(0, places.long(), before.float())
        self._run(shape, captured.memory.inputs)
        if is_replayed:  # compare the change of the state, because early steps change little
            expected = registers.index_select(0, places)
            self.graphs.confirm(captured, replayed - before, expected=expected - before)

    def _run(self, shape: StepShape, inputs: Tensor) -> None:
        denoise, memories = self._model.denoise, self._memories()
        if shape.adapter_pages:
            denoise = partial(self._denoise_from_table, inputs=shape.sections.read(inputs))
        if isinstance(shape, PackedShape):
            run_packed_step(denoise, inputs, memories=memories, shape=shape)
        else:
            run_step(denoise, inputs, memories=memories, shape=shape)

    def _denoise_from_table(self, batch: StepBatch, *, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the network on a batch whose rows have adapters in the slot table. `inputs` has their slots and pages."""
        assert self._slot_table is not None
        rows = TableRows(
            self._slot_table,
            slots=inputs["adapter_slots"],
            pages=inputs["adapter_pages"],
            token_rows=batch.segments.rows if batch.segments else None,
        )
        with adapting(self._adaptable_layers, rows):
            return self._model.denoise(batch)

    def _memories(self) -> Memories:
        return Memories(
            self.arena.memory,
            constants={name: arena.memory for name, arena in self.conditioning.slots.items()},
            by_frame={name: arena.memory for name, arena in self.conditioning.frames.items()},
        )


def _step_row(row: Row) -> StepRow:
    stepping, evaluation = row.in_phase(Stepping), row.evaluation
    noise = stepping.noise.current() if any(evaluation.c) else None
    numbers = stepping.numbers[row.work.num_done]
    branches = [stepping.conditioning.conditional]
    if evaluation.guided:
        if stepping.conditioning.unconditional is None:
            raise RuntimeError("a guided row has one branch only")
        branches.append(stepping.conditioning.unconditional)
    return StepRow(
        numbers,
        row.plan.guidance,
        guided=evaluation.guided,
        valid_frames=row.plan.valid_frames,
        num_registers=row.plan.sampler.num_registers,
        held=stepping.held,
        branches=branches,
        noise=noise,
        draws=any(each.draws_noise for each in row.plan.sampler.evaluations),
    )


def _commit(row: Row) -> None:
    if row.evaluation.draws_noise:
        row.in_phase(Stepping).noise.advance()
    row.work.finish_evaluation()
