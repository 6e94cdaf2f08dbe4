"""Tempo, bars and lengths of loops, compared with a second, simpler implementation: fractions and string methods."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stable_audio_serve.audio.loops import Loop, plan_loop, read_tempo

WINDOW_S = 524_288 / 44_100


@pytest.mark.parametrize(
    ("prompt", "tempo"),
    [
        ("aggressive techno drums 140bpm", 140),
        ("90 BPM house", 90),
        ("128  bpm", 128),
        ("128\t\nbpm", 128),
        ("172BpM amen", 172),
        ("techno120bpm", 120),
        ("120bpmish", 120),
        ("007 bpm", 7),
        ("bpm 120", None),
        ("127.5bpm", 5),
        ("120-bpm", None),
        ("120 b p m", None),
        ("90bpm then 120bpm", 90),
        ("take 5, 120bpm", 120),
        ("0bpm", None),
        ("000 bpm", None),
        ("0bpm 120bpm", None),
        ("", None),
        ("bpm", None),
        ("99999bpm", 99999),
        ("9" * 19 + "bpm", None),
        ("x" * 1000 + "100bpm", 100),
        ("\u0661\u0662\u0660bpm", 120),  # Arabic digits
        ("100\u00a0bpm", 100),
    ],
)
def test_tempo_of_a_prompt(prompt: str, tempo: int | None) -> None:
    assert read_tempo(prompt) == tempo


@pytest.mark.parametrize("prompt", ["1" * 100_000, "1 " * 50_000, "1" + " " * 100_000, ("1" * 17 + " ") * 5_000 + "b"])
def test_hostile_prompts_are_scanned_quickly(prompt: str) -> None:
    started_at = time.thread_time()
    assert read_tempo(prompt) is None
    assert time.thread_time() - started_at < 2  # CPU seconds; a quadratic search would take far longer


def scan_tempo(prompt: str) -> int | None:
    """Returns the number before the first "bpm" that follows a number, or None. Spaces may stand between the two."""
    lowered = prompt.lower()
    at = lowered.find("bpm")
    while at >= 0:
        before = lowered[:at].rstrip()
        digits = before[len(before.rstrip("0123456789")) :]
        if digits and len(digits) <= 18:
            return int(digits) or None
        at = lowered.find("bpm", at + 1)
    return None


@given(
    st.lists(st.sampled_from(["bpm", "BPM", "Bpm", " ", "  ", "\n", "0", "1", "98", "120", ".", "b", "pm", "x", "-"]))
)
def test_tempo_agrees_with_a_plain_scan(parts: list[str]) -> None:
    prompt = "".join(parts)
    assert read_tempo(prompt) == scan_tempo(prompt)


def plan_exactly(tempo: int, bars: int | None, window_s: float) -> tuple[int, Fraction]:
    """Returns the loop's number of bars and its exact length in seconds."""
    window = Fraction(window_s)
    if bars is None:
        bars = max((count for count in (1, 2, 4, 8) if Fraction(240 * count, tempo) <= window), default=1)
    elif Fraction(240 * bars, tempo) - window > 1:
        bars = max(1, bars // 2)
    return bars, Fraction(240 * bars, tempo)


@given(
    tempo=st.integers(1, 400) | st.integers(1, 10**7),
    bars=st.sampled_from([None, 1, 2, 4, 8]),
    window_s=st.just(WINDOW_S) | st.floats(0.5, 60),
    rate_hz=st.sampled_from([44_100, 48_000, 16_000]),
)
@example(tempo=170, bars=None, window_s=WINDOW_S, rate_hz=44_100)
@example(tempo=140, bars=4, window_s=WINDOW_S, rate_hz=44_100)
def test_bars_and_lengths_are_exact(tempo: int, bars: int | None, window_s: float, rate_hz: int) -> None:
    loop = plan_loop(tempo, bars=bars, window_s=window_s)
    expected_bars, seconds = plan_exactly(tempo, bars, window_s)
    assert loop == Loop(tempo, expected_bars)
    assert loop.num_samples(rate_hz) == int(seconds * rate_hz)
    assert loop.duration_s == pytest.approx(float(seconds), rel=1e-12)
    assert loop.bar_s * loop.bars == pytest.approx(loop.duration_s, rel=1e-12)


def test_usual_tempos_match_the_original_float_arithmetic() -> None:
    for tempo in range(1, 401):
        for bars in (1, 2, 4, 8):
            assert Loop(tempo, bars).num_samples(44_100) == int(60.0 / tempo * 4 * bars * 44_100)


@pytest.mark.parametrize(
    ("tempo", "bars", "samples"),
    [(74, 2, 286_054), (90, 4, 470_400), (128, 4, 330_750), (140, 4, 302_400), (170, 8, 498_070)],
)
def test_the_usual_tempos(tempo: int, bars: int, samples: int) -> None:
    loop = plan_loop(tempo, bars=None, window_s=WINDOW_S)
    assert (loop.bars, loop.num_samples(44_100)) == (bars, samples)


@pytest.mark.parametrize(
    ("tempo", "bars", "expected"),
    [
        (170, 8, 8),  # fits
        (150, 8, 8),  # 12.8 s: less than 1 s longer than the window
        (148, 8, 4),  # 12.97 s: more than 1 s longer than the window
        (60, 8, 4),  # 32 s: halved only once, although 16 s are still too long
        (60, 4, 2),
        (20, 2, 1),
        (10, 1, 1),  # 24 s: too long, but one bar cannot be halved
    ],
)
def test_explicit_bars_are_halved_once(tempo: int, bars: int, expected: int) -> None:
    assert plan_loop(tempo, bars=bars, window_s=WINDOW_S).bars == expected
