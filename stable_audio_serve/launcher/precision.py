"""What an operator is told of precision after a start. Knows settings and the processor, never weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stable_audio_serve.core.processor import CPU_FACTS, has_native_bfloat16
from stable_audio_serve.serving.placement import Plan


def faster_precision(plan: Plan, devices: Mapping[str, str | None], *, cpu_facts: Path = CPU_FACTS) -> str | None:
    """Returns one line naming the loaded models that bfloat16 would make faster; None where there are none.

    `devices` are those of the models that are loaded. The demo is left out: it gains little.
    """
    wanted = {model.name: model.dtype for model in plan.settings.models}
    names = [
        card.name
        for card in plan.catalog
        if devices.get(card.name) == "cpu" and wanted[card.name] is None and not card.is_demo
    ]
    if not names or not plan.settings.model_half or not has_native_bfloat16(cpu_facts):
        return None
    return (
        f"faster here: this processor computes in bfloat16 by itself, and {', '.join(names)} in float32; "
        "`dtype: bfloat16` with `decode_precision: half` takes a third to two thirds of the time (docs/performance.md "
        "says what changes)"
    )
