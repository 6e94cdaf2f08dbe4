"""Builds sampler plans for models that predict v, from the name of the sampler, the noise levels and the number of
steps.

The samplers have the same names as in stable-audio-tools. Their formulas are in `multistep`, `singlestep` and `ddim`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stable_audio_serve.sampling import ddim, multistep, singlestep
from stable_audio_serve.sampling.blend import NoisePath, angle_path, sigma_path
from stable_audio_serve.sampling.karras import SigmaRange, polyexponential_sigmas
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import refused_sampler
from stable_audio_serve.sampling.terms import PlanWriter
from stable_audio_serve.sampling.v_network import VNetwork

# For each sampler over sigma: its number of registers and the function that adds its steps to a plan.
_OVER_SIGMA: dict[str, tuple[int, Callable[[VNetwork, Sequence[float]], None]]] = {
    "dpmpp-3m-sde": (3, multistep.dpmpp_3m_sde),
    "dpmpp-2m-sde": (2, multistep.dpmpp_2m_sde),
    "dpmpp-2m": (2, multistep.dpmpp_2m),
    "k-heun": (2, singlestep.heun),
    "k-lms": (multistep.LMS_ORDER, multistep.lms),
    "k-dpmpp-2s-ancestral": (2, singlestep.dpmpp_2s_ancestral),
    "k-dpm-2": (2, singlestep.dpm_2),
}
OVER_TIME = {"v-ddim": ddim.ddim, "v-ddim-cfgpp": ddim.ddim_cfgpp}
_FAST = "k-dpm-fast"
V_SAMPLERS = (*_OVER_SIGMA, _FAST, *OVER_TIME)


def v_path(sampler: str) -> NoisePath:
    """Return the function that `blend_plan` needs for plans of this sampler: the weights of source and noise."""
    return angle_path if sampler in OVER_TIME else sigma_path


def build_v_plan(sampler: str, steps: int, *, span: SigmaRange, guidance: Guidance, has_source: bool) -> SamplerPlan:
    """Return the plan of `sampler` with `steps` steps over the noise levels of `span`.

    A plan starts from noise times `sigma_max`. With a source, that noise is added to the source, so `sigma_max` says
    how far the result may differ from the source. The exceptions are `v-ddim` and `v-ddim-cfgpp`: they use `sigma_max`
    as a time (at most 1) and ignore the rest of `span`.
    Raises InvalidRequestError if the sampler is unknown, or if `steps` or `rho` is invalid.
    """
    if sampler in OVER_TIME:
        return OVER_TIME[sampler](steps, span.sigma_max, guidance=guidance, has_source=has_source)
    if sampler == _FAST:
        writer = PlanWriter(3)
        singlestep.dpm_fast(VNetwork(writer, guidance), steps, span=span)
        level = float(polyexponential_sigmas(1, span)[0])
    elif sampler in _OVER_SIGMA:
        num_registers, write = _OVER_SIGMA[sampler]
        sigmas: list[float] = polyexponential_sigmas(steps, span).tolist()
        writer = PlanWriter(num_registers)
        write(VNetwork(writer, guidance), sigmas)
        level = sigmas[0]
    else:
        raise refused_sampler(sampler, V_SAMPLERS)
    return writer.plan(source_scale=1.0 if has_source else 0.0, noise_scale=level)
