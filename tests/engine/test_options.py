"""Invalid engine options are refused at construction."""

from __future__ import annotations

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.engine.options import EngineOptions


@pytest.mark.parametrize(
    "fields", [{"mode": "exact"}, {"slots": 0}, {"slots": 1}, {"fixed_share": 0}, {"max_queue_s": -1}]
)
def test_bad_options_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineOptions(**fields)  # type: ignore[arg-type]
    assert refusal.value.field == next(iter(fields))
