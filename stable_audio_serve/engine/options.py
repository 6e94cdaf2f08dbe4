"""The options of one engine. They are immutable. `core.settings_models` checks the values that operators set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stable_audio_serve.core.generation import Mode

ProfileChoice = Literal["auto", "plain", "accelerated"]


@dataclass(frozen=True, slots=True)
class Features:
    """The speed features of an engine on a GPU. Each of them can be switched off on its own."""

    captures: bool = True  # CUDA graphs
    second_queue: bool = True  # encode text and sources, and decode, in a second CUDA stream
    packing: bool = True  # calls without padding, also for clips of different lengths, in fast mode
    fast_decoding: bool = True  # decode in the configured `decode_precision`, not always in float32
    fused_kernels: bool = True  # kernels that combine several of torch's operations


PLAIN = Features(captures=False, second_queue=False, packing=False, fast_decoding=False, fused_kernels=False)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All options of one engine. For most options, None means that the value is chosen for the model's device.

    In `mode` strict, the default on a CPU, the audio of a request has the same bits whatever other requests run. In
    `mode` fast, the default on CUDA, requests of different lengths share device calls. This changes the audio slightly:
    with the reference checkpoints by at most 1.2e-5, which is less than one unit of 16-bit audio (3e-5).
    """

    mode: Mode | None = None
    # On a GPU: plain uses none of `features`, accelerated uses all of them, auto checks them at start and uses them if
    # they give the right audio.
    profile: ProfileChoice = "auto"
    features: Features = Features()
    max_rows: int = 64  # clips in progress at the same time; at most three quarters of them have batch priority
    max_queue_s: float = 120.0  # accepted work in seconds of predicted device time; further requests are refused
    batch_share: float = 0.125  # device time for batch requests, relative to the time for interactive ones
    fixed_share: float = 0.25  # clips are added to a step until its fixed cost is at most this share of its time
    max_step_tokens: int = 16_384  # the most latent frames of one step, all clips together
    slots: int = 8  # the fixed batch size of a strict call on CUDA; dummy rows fill it up
    # Clips are padded to a multiple of this many latent frames, unless they are packed. None: 64 on CUDA, 1 on a CPU.
    frame_grid: int | None = None
    # Device memory for clips in progress. None: most of the free memory on CUDA, no limit on a CPU.
    max_memory_bytes: int | None = None
    prompt_cache_bytes: int = 256 * 2**20
    lora_cache_bytes: int = 512 * 2**20  # memory for adapters, as loaded and as folded for requests
    max_lora_rank: int = 64  # limit of the sum of the ranks of a request's adapters
    max_planning: int = 1024  # for each priority, the most requests that may wait for planning or be planned
    torch_threads: int | None = None  # how many CPU threads an operation uses; None: torch's default
    # The engine writes this file when a failed capture ends the process. While it exists, no CUDA graphs are captured.
    captures_off_file: Path | None = None
    # How long the timed calls of the warm-up may take. The first call of each kind is not timed. 0: no warm-up.
    warmup_budget_s: float = 2.0
