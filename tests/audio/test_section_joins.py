"""The sections of a long piece keep the balance of frequencies of the first section with their prompt."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.audio.section_joins import describe_section, join_section
from stable_audio_serve.core.sound import ClipFacts

RATE_HZ = 44100
BEFORE_S, OWN_S = 6, 12
LOW_HZ, HIGH_HZ = 200, 4000
SETTLED = slice(4 * RATE_HZ, None)  # after this time, gain and shelf have their last values

Audio = npt.NDArray[np.float32]


def tones(seconds: float, *, high_db: float) -> Audio:
    """Return a low and a high tone (2, S). The level of the high tone is relative to the low one's."""
    times = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    high = 10 ** (high_db / 20) * np.sin(2 * np.pi * HIGH_HZ * times)
    mono = 0.1 * (np.sin(2 * np.pi * LOW_HZ * times) + high)
    return np.stack([mono, mono]).astype(np.float32)


def join(*, first_db: float, own_db: float) -> tuple[Audio, ClipFacts, Audio]:
    """Continue tones with other tones.

    Returns the new section, the measurements of the tones before it, and the section without corrections.
    """
    before = tones(BEFORE_S, high_db=first_db)
    like = describe_section(before, RATE_HZ, seed=0)
    whole = np.concatenate([before, tones(OWN_S, high_db=own_db)], axis=1)
    num_own = OWN_S * RATE_HZ
    own = join_section(whole, RATE_HZ, before=before, num_own=num_own, span=None, like=like, peaks="limit")
    return own, like, whole[:, -own.shape[1] :]


def level_db(audio: Audio, frequency_hz: float) -> float:
    """Return the level of one frequency in the left channel."""
    turns = np.exp(-2j * np.pi * frequency_hz * np.arange(audio.shape[1]) / RATE_HZ)
    return 20 * math.log10(abs((audio[0] * turns).mean()))


def balance_db(audio: Audio) -> float:
    """Return the level of the high tone relative to the low one's, after the shelf has faded in."""
    return level_db(audio[:, SETTLED], HIGH_HZ) - level_db(audio[:, SETTLED], LOW_HZ)


def octaves(audio: Audio, like: ClipFacts) -> float:
    """Return how far the spectral centroid is above that of `like`."""
    powers = np.abs(np.fft.rfft(audio[0])) ** 2
    centroid_hz = (powers * np.fft.rfftfreq(audio.shape[1], 1 / RATE_HZ)).sum() / powers.sum()
    assert like.centroid_hz is not None
    return math.log2(centroid_hz / like.centroid_hz)


@pytest.mark.parametrize(("first_db", "own_db"), [(-14, -11), (-12, -15)])
def test_a_brighter_or_darker_section_is_brought_near_the_first(first_db: float, own_db: float) -> None:
    own, like, plain = join(first_db=first_db, own_db=own_db)
    assert abs(octaves(plain, like)) > 1 / 3
    assert abs(octaves(own[:, SETTLED], like)) == pytest.approx(0.2, abs=0.02)
    assert level_db(own[:, SETTLED], LOW_HZ) == pytest.approx(level_db(plain[:, SETTLED], LOW_HZ), abs=0.5)


def test_a_section_with_a_similar_centroid_keeps_its_balance() -> None:
    own, _, plain = join(first_db=-13, own_db=-12.7)
    assert balance_db(own) == pytest.approx(balance_db(plain), abs=0.01)


def test_the_shelf_changes_the_balance_by_6_db_at_most() -> None:
    own, _, plain = join(first_db=-30, own_db=0)
    assert -6 <= balance_db(own) - balance_db(plain) <= -3


def test_the_shelf_fades_in() -> None:
    own, _, _ = join(first_db=-14, own_db=-11)
    steps = [level_db(own[:, at : at + RATE_HZ], HIGH_HZ) for at in range(RATE_HZ // 2, 4 * RATE_HZ, RATE_HZ)]
    assert all(before > after for before, after in pairwise(steps))
    assert np.abs(np.diff(own)).max() < 1.2 * np.abs(np.diff(tones(1, high_db=-11))).max()


def test_a_silent_section_is_left_as_it_is() -> None:
    before = tones(BEFORE_S, high_db=-12)
    whole = np.concatenate([before, np.zeros((2, OWN_S * RATE_HZ), np.float32)], axis=1)
    like = describe_section(before, RATE_HZ, seed=0)
    own = join_section(whole, RATE_HZ, before=before, num_own=OWN_S * RATE_HZ, span=None, like=like, peaks="limit")
    assert not own[:, RATE_HZ:].any()
    assert describe_section(own[:, RATE_HZ:], RATE_HZ, seed=0).centroid_hz is None
