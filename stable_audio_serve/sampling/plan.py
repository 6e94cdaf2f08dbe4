"""A sampler as data. A plan lists, for each evaluation, the network's input and the update of the row's registers. So
rows with different samplers and at different steps can share one fused update.

Independent of networks, devices and requests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blend:
    """Sets register `register` to `source z + noise eps'` in the kept frames (see `sampling/blend.py`)."""

    register: int
    source: float
    noise: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of the network and the update that follows it.

    With registers r_0..r_{R-1}, guided output v, unguided output v_u and fresh noise eps:
    `r'_i = sum_j a[i][j] r_j + b[i] v + b_uncond[i] v_u + c[i] eps`. A zero coefficient skips its term.
    `t` and `sigma` are float32 values in Python floats. With `draws_noise`, a noise tensor is drawn even if every c is
    0 (as the references do in ping-pong's last step). `blend` is applied after the update.
    """

    t: float
    sigma: float
    input_register: int
    input_scale: float
    guided: bool
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_uncond: tuple[float, ...]
    c: tuple[float, ...]
    draws_noise: bool
    blend: Blend | None = None


@dataclass(frozen=True, slots=True)
class SamplerPlan:
    """A sampler with the schedule of one row: at most 5 registers, all zero at the start except `start_register`.

    `start_register` starts with the initial latent, `source_scale * source + noise_scale * noise`. After the last
    evaluation, the result is in `result_register`. `step_ends` has, for each requested step, the number of evaluations
    after which it is complete. `start_blend` applies to the initial latent; it is set if and only if the evaluations
    have blends.
    """

    num_registers: int
    start_register: int
    result_register: int
    source_scale: float
    noise_scale: float
    evaluations: tuple[Evaluation, ...]
    step_ends: tuple[int, ...]
    start_blend: Blend | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """The guidance parameters of a row, as used in `sampling/guidance.py`. `apg_scale` 0 is plain CFG."""

    cfg_scale: float = 1.0
    apg_scale: float = 1.0
    norm_threshold: float = 0.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
