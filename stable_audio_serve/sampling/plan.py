"""A sampler as data. A sampler keeps several latents per clip, its registers. A plan lists, for each network call,
which register is the input and how the registers are updated afterwards. All updates have the same form, so clips with
different samplers and at different steps can be updated in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

LATENTS = 0  # the register with the initial latents before the first evaluation, and with the result after the last


@dataclass(frozen=True, slots=True)
class Blend:
    """Sets the frames of register `register` that an edit keeps to `source` * z + `noise` * eps', where z are the
    source's latents and eps' is noise (see `sampling/blend.py`).
    """

    register: int
    source: float
    noise: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One call of the network and the update that follows it.

    With registers r_0..r_{R-1}, guided output v, unguided output v_u and fresh noise eps, register i is set to
    `sum_j a[i][j] r_j + b[i] v + b_uncond[i] v_u + c[i] eps`. A term whose coefficient is 0 is left out, even if its
    tensor has NaN. Then `blend` is applied. `t` and `sigma` are float32 values in Python floats. With `draws_noise`,
    eps is drawn even if every c is 0, as the reference implementations do in the last step of ping-pong.
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
    """A sampler with the schedule of one clip. It has at most 4 registers, which start with zeros, except `LATENTS`.

    The initial latents are `source_scale * source + noise_scale * noise`. `step_ends[i]` is the number of evaluations
    after which the requested step i is complete. `start_blend` is applied to the initial latents. Either `start_blend`
    and the `blend` of every evaluation are set, or all of them are None.
    """

    num_registers: int
    source_scale: float
    noise_scale: float
    evaluations: tuple[Evaluation, ...]
    step_ends: tuple[int, ...]
    start_blend: Blend | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """The guidance parameters of a clip, as used in `sampling/guidance.py`. With `apg_scale` 0, guidance is plain CFG.
    Steps are guided only while the noise level is within `interval`.
    """

    cfg_scale: float = 1.0
    apg_scale: float = 1.0
    norm_threshold: float = 0.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
