"""Python clients of a running server, for programs and for the command line: `Client` and `AsyncClient`.

They use the HTTP API. They depend only on httpx and httpx-sse, and import only the error classes from this project.
"""

from __future__ import annotations

from stable_audio_serve.client.answers import Adapter, Clip, Job, JobPage, JobProgress, Model, Result
from stable_audio_serve.client.calls import Audio, Recipe
from stable_audio_serve.client.clients import AsyncClient, Client
from stable_audio_serve.client.controls import (
    Controls,
    EditControls,
    GenerateControls,
    InpaintControls,
    JobControls,
    JobEditControls,
    JobInpaintControls,
    LoopControls,
    Lora,
    Loudness,
    Section,
)
from stable_audio_serve.client.failures import Retries

__all__ = [
    "Adapter",
    "AsyncClient",
    "Audio",
    "Client",
    "Clip",
    "Controls",
    "EditControls",
    "GenerateControls",
    "InpaintControls",
    "Job",
    "JobControls",
    "JobEditControls",
    "JobInpaintControls",
    "JobPage",
    "JobProgress",
    "LoopControls",
    "Lora",
    "Loudness",
    "Model",
    "Recipe",
    "Result",
    "Retries",
    "Section",
]
