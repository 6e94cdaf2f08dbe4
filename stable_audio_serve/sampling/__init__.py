"""Schedules, samplers as plans, guidance and noise: row-independent tensor maths that can be checked against papers."""

from stable_audio_serve.sampling.brownian import ReplayPath
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.noise import NoiseSource, ReplayDraw, ReplayNoise, SeededNoise
from stable_audio_serve.sampling.plan import Evaluation, Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import SAMPLERS, build_plan, resolve_sampler
from stable_audio_serve.sampling.schedules import (
    DEFAULT_SHIFT,
    SHIFT_KINDS,
    TimestepShift,
    build_sigmas,
    shift_from_config,
    shift_from_override,
)
from stable_audio_serve.sampling.update import advance, network_input, start_state

__all__ = [
    "DEFAULT_SHIFT",
    "SAMPLERS",
    "SHIFT_KINDS",
    "Evaluation",
    "Guidance",
    "GuidanceBatch",
    "NoiseSource",
    "ReplayDraw",
    "ReplayNoise",
    "ReplayPath",
    "SamplerPlan",
    "SeededNoise",
    "TimestepShift",
    "advance",
    "build_plan",
    "build_sigmas",
    "guide",
    "network_input",
    "resolve_sampler",
    "shift_from_config",
    "shift_from_override",
    "start_state",
]
