"""Turns rows and windows into calls of the model and hides how those run (eager today; compiled or captured graphs fit
behind `Executor.denoise`, because the batch policy fixes every shape).

A call that raises runs again item by item, so that only the item that causes the error fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from stable_audio_serve.engine.batching import BatchPolicy, Call
from stable_audio_serve.engine.packing import denoise_packed
from stable_audio_serve.engine.rows import Row
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.update import Kept, advance, network_input

Item = TypeVar("Item")
Result = TypeVar("Result")

# Errors after which the device itself is unusable: no row caused them and the process must be replaced.
DEVICE_LOST: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


class Executor:
    """Runs device work for the engine thread. Results are in the order of the inputs.

    Up to `together` windows or prompts of equal shape share a call; 1 (strict mode) gives each a separate call.
    """

    def __init__(self, model: DiffusionModel, policy: BatchPolicy, *, together: int) -> None:
        self._model = model
        self._policy = policy
        self._together = together

    def embed(self, prompts: Sequence[str]) -> list[TextEmbedding | Exception]:
        """Returns the prompts' embeddings."""
        outcomes: list[TextEmbedding | Exception] = []
        for start in range(0, len(prompts), self._together):
            outcomes += run_isolated(prompts[start : start + self._together], self._model.encode_text)
        return outcomes

    def encode(self, windows: Sequence[EncodeWindow]) -> list[Tensor | Exception]:
        """Returns the latents (D, F_window) float32 of source windows."""
        return self._by_length(windows, length=lambda window: window.samples.shape[-1], run=self._model.encode_audio)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor | Exception]:
        """Returns the audio (C, S_window) float32 of windows."""
        return self._by_length(windows, length=lambda window: window.latents.shape[-1], run=self._model.decode)

    def calls(self, rows: Sequence[Row]) -> list[Call]:
        """Returns the device calls in which these rows step now."""
        return self._policy.split([row.lane for row in rows])

    def denoise(self, rows: Sequence[Row], calls: Sequence[Call]) -> list[tuple[Row, Exception]]:
        """Run one evaluation of every row: network, guidance, update. Returns the rows that failed.

        A row's registers, draws and work all advance, or none of them does.
        """
        failures: list[tuple[Row, Exception]] = []
        for call in calls:
            members = [rows[i] for i in call.members]
            outcomes = run_isolated(members, partial(self._evaluate, call=call))
            for row, outcome in zip(members, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    failures.append((row, outcome))
                else:
                    _commit(row, outcome)
        return failures

    def synchronize(self) -> None:
        """Wait until the device has finished its queued work, so that measured times are right."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    @property
    def memory_bytes(self) -> int:
        """Device memory held by tensors; 0 on a CPU."""
        device = self._model.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

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
            for start in range(0, len(indices), self._together):
                some = indices[start : start + self._together]
                outcomes.update(zip(some, run_isolated([windows[i] for i in some], run), strict=True))
        return [outcomes[i] for i in range(len(windows))]

    def _evaluate(self, rows: Sequence[Row], *, call: Call) -> list[Tensor]:
        """Returns the new registers (R, D, F) of each row after one evaluation, from one call of the network."""
        device, frames = self._model.device, call.frames
        evaluations = [row.evaluation for row in rows]
        state, valid = _gather(rows, frames=frames, device=device)
        x = network_input(state, evaluations)
        times = torch.tensor([evaluation.t for evaluation in evaluations], dtype=torch.float32).to(device)
        lanes, branches = _lanes(rows, 0 if call.lengths else call.rows)
        picked = torch.tensor(lanes).to(device)
        batch = StepBatch(x=x[picked], t=times[picked], valid=valid[picked], branches=branches)
        if call.lengths:
            plans = [rows[i].plan for i in lanes]
            own, seen = [plan.frames for plan in plans], [plan.valid_frames for plan in plans]
            output = denoise_packed(self._model, batch, frames=own, valid_frames=seen)
        else:
            output = self._model.denoise(batch)

        first = [lanes.index(i) for i in range(len(rows))]
        velocity = output[torch.tensor(first).to(device)].float()
        unconditional: Tensor | None = None
        guided = [i for i, evaluation in enumerate(evaluations) if evaluation.guided]
        if guided:
            where = torch.tensor(guided).to(device)
            unconditional = torch.zeros_like(velocity)
            unconditional[where] = output[torch.tensor([first[i] + 1 for i in guided]).to(device)].float()
            velocity[where] = guide(
                x[where],
                times[where],
                conditional=velocity[where],
                unconditional=unconditional[where],
                valid=valid[where],
                rows=GuidanceBatch.of([rows[i].plan.guidance for i in guided], device=device),
            )
        moved = advance(
            state,
            evaluations,
            velocity=velocity,
            unconditional=unconditional,
            noise=_gather_noise(rows, frames=frames, device=device),
            kept=_gather_kept(rows, frames=frames, device=device),
        )
        return [moved[i, : row.plan.sampler.num_registers, :, : row.plan.frames].clone() for i, row in enumerate(rows)]


def run_isolated(items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result | Exception]:
    """Returns one result per item from `run(items)`; if that raises, each item runs alone and may yield its exception.

    `run` must have no effect when it raises. Errors in DEVICE_LOST are raised, since no item caused them.
    """
    try:
        return list(run(items))
    except DEVICE_LOST:
        raise
    except Exception as error:  # noqa: BLE001 - the engine's edge: an error that one row causes ends that row only
        if len(items) == 1:
            return [error]
    outcomes: list[Result | Exception] = []
    for item in items:
        outcomes += run_isolated([item], run)
    return outcomes


def _gather(rows: Sequence[Row], *, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns registers (B, R, D, F) float32 padded with zeros, and which frames are valid (B, F) bool."""
    states = [_present(row.state) for row in rows]
    num_registers = max(state.shape[0] for state in states)
    gathered = torch.zeros(len(rows), num_registers, states[0].shape[1], frames, dtype=torch.float32, device=device)
    for target, state in zip(gathered, states, strict=True):
        target[: state.shape[0], :, : state.shape[2]] = state
    lengths = torch.tensor([row.plan.valid_frames for row in rows])
    return gathered, (torch.arange(frames)[None] < lengths[:, None]).to(device)


def _lanes(rows: Sequence[Row], rows_in_call: int) -> tuple[list[int], list[BranchConditioning]]:
    """Returns each network row's source row and conditioning; spare slots repeat the first."""
    lanes: list[int] = []
    branches: list[BranchConditioning] = []
    for i, row in enumerate(rows):
        conditioning = _present(row.conditioning)
        lanes.append(i)
        branches.append(conditioning.conditional)
        if row.evaluation.guided:
            lanes.append(i)
            branches.append(_present(conditioning.unconditional))
    spare = rows_in_call - len(lanes)
    return lanes + [0] * spare, branches + [branches[0]] * spare


def _gather_noise(rows: Sequence[Row], *, frames: int, device: torch.device) -> Tensor | None:
    """Returns this evaluation's draws (B, D, F) float32, zero where a row has none; None if no row needs any."""
    draws = {i: _present(row.noise).current() for i, row in enumerate(rows) if any(row.evaluation.c)}
    if not draws:
        return None
    width = _present(rows[0].state).shape[1]
    gathered = torch.zeros(len(rows), width, frames, dtype=torch.float32)
    for i, draw in draws.items():
        gathered[i, :, : rows[i].plan.frames] = _present(draw)
    return gathered.to(device)


def _gather_kept(rows: Sequence[Row], *, frames: int, device: torch.device) -> Kept | None:
    """Returns what the rows keep, nothing where a row's evaluation has no blend; None if no row's has one."""
    keeping = {i: _present(row.kept) for i, row in enumerate(rows) if row.evaluation.blend}
    if not keeping:
        return None
    shape = (len(rows), _present(rows[0].state).shape[1], frames)
    gathered = Kept(
        mask=torch.zeros(len(rows), frames, dtype=torch.bool, device=device),
        source=torch.zeros(shape, dtype=torch.float32, device=device),
        noise=torch.zeros(shape, dtype=torch.float32, device=device),
    )
    for i, kept in keeping.items():
        own = rows[i].plan.frames
        gathered.mask[i, :own] = kept.mask
        gathered.source[i, :, :own] = kept.source
        gathered.noise[i, :, :own] = kept.noise
    return gathered


def _commit(row: Row, state: Tensor) -> None:
    if row.evaluation.draws_noise:
        _present(row.noise).advance()
    row.state = state
    row.work.finish_evaluation()


def _present(value: Item | None) -> Item:
    """Returns a field's value, which this phase of a row guarantees."""
    if value is None:
        raise RuntimeError("a row was stepped before it was ready")
    return value
