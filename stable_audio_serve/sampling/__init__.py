"""Noise schedules, samplers, guidance and random noise. A clip's result does not depend on the rest of its batch."""

from stable_audio_serve.sampling.blend import angle_path, blend_plan, flow_path, sigma_path
from stable_audio_serve.sampling.brownian import ReplayPath
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.karras import SigmaRange
from stable_audio_serve.sampling.noise import NoiseSource, ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.sampling.open_flow import build_open_flow_plan, open_flow_times
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan
from stable_audio_serve.sampling.schedules import (
    DEFAULT_SHIFT,
    build_sigmas,
    edit_times,
    shift_from_config,
)
from stable_audio_serve.sampling.update import Kept, StepTerms, advance, network_input, start_state
from stable_audio_serve.sampling.v_samplers import V_SAMPLERS, build_v_plan, v_path

__all__ = [
    "DEFAULT_SHIFT",
    "SAMPLERS",
    "V_SAMPLERS",
    "Guidance",
    "GuidanceBatch",
    "Kept",
    "NoiseSource",
    "ReplayDraw",
    "ReplayNoise",
    "ReplayPath",
    "SamplerPlan",
    "SeededNoise",
    "SigmaRange",
    "StepTerms",
    "advance",
    "angle_path",
    "blend_plan",
    "build_open_flow_plan",
    "build_plan",
    "build_sigmas",
    "build_v_plan",
    "edit_times",
    "flow_path",
    "guide",
    "network_input",
    "open_flow_times",
    "shift_from_config",
    "sigma_path",
    "start_state",
    "v_path",
]
