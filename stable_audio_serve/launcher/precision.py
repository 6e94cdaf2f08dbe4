"""Recommend bfloat16 after the start of a server whose CPU supports bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stable_audio_serve.core.processor import CPU_FACTS, has_native_bfloat16
from stable_audio_serve.serving.placement import Plan


def bfloat16_hint(plan: Plan, devices: Mapping[str, str | None], *, cpu_facts: Path = CPU_FACTS) -> str | None:
    """Return a message that names the loaded models that would run faster in bfloat16, or None if there are none.

    `devices` has the device of each loaded model by the model's name. Demo models gain little and are left out.
    """
    configured = {model.name: model.dtype for model in plan.settings.models}
    names = [
        card.name
        for card in plan.catalog
        if devices.get(card.name) == "cpu" and configured[card.name] is None and not card.is_demo
    ]
    if not names or not plan.settings.model_half or not has_native_bfloat16(cpu_facts):
        return None
    return (
        f"hint: this CPU supports bfloat16, but float32 is used for {', '.join(names)}. Set `dtype: bfloat16` and "
        "`decode_precision: half` to generate in a third to two thirds of the time (docs/performance.md explains what "
        "changes)"
    )
