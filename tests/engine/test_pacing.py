"""How many latent frames are decoded at once: many if no row waits for a step, else what fits a step's time."""

from __future__ import annotations

import pytest

from stable_audio_serve.engine.scheduling.cost import CostModel, Measurement
from stable_audio_serve.engine.scheduling.pacing import WindowPace


def make_pace(*, turn_frames: int = 512, is_fixed: bool = False) -> WindowPace:
    """Returns the `WindowPace` of a decoder whose calls take 2 ms plus 0.1 ms per latent frame."""
    cost = CostModel()
    cost.fit("decode", [Measurement(1, frames, 2.0 + frames / 10) for frames in (10, 100)])
    return WindowPace(cost, is_fixed=is_fixed, turn_frames=turn_frames)


def test_a_row_alone_decodes_a_whole_turn() -> None:
    assert make_pace().decode_frames(1, others_wait=False) == 512


@pytest.mark.parametrize(
    ("step_ms", "num_rows", "frames"),
    [
        (0.0, 1, 64),  # at least 10 ms are allowed, which is enough for 80 frames
        (12.0, 1, 96),  # 12 ms are enough for 100 frames
        (30.0, 1, 256),  # 30 ms are enough for 280 frames
        (30.0, 3, 64),  # 30 ms are enough for three rows of 93 frames
        (22.0, 3, 64),  # 22 ms are enough for three rows of 66 frames in one call
        (30.0, 100, 32),  # the smallest window, although it takes too long
        (1000.0, 1, 512),  # the largest window: `turn_frames`
    ],
)
def test_windows_take_at_most_a_step_while_other_rows_wait(step_ms: float, num_rows: int, frames: int) -> None:
    pace = make_pace()
    pace.record_step(step_ms)
    assert pace.decode_frames(num_rows, others_wait=True) == frames


def test_fixed_windows_do_not_depend_on_other_rows() -> None:
    pace = make_pace(is_fixed=True)
    pace.record_step(30.0)
    assert pace.decode_frames(1, others_wait=True) == pace.decode_frames(9, others_wait=False) == 1
