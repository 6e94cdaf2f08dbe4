"""A denoiser in bfloat16 against every stored number of both families, on any processor: one without bfloat16 of its
own computes the same, only slower, which is why the product refuses it there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.weights import cast_network
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sa3 import compare_sa3
from stable_audio_serve.verification.sao import compare_sao
from tests.goldens import FAMILIES
