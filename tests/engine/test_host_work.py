"""A step of the engine starts one copy and never waits for the device. The work is counted on a simulated device.

The bounds on kernel launches are the current counts. Lower a bound when a change needs fewer launches.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.host_work import Setting, count, run_apart

pytestmark = pytest.mark.server

# Kind of request -> the most kernel launches of a step. The sampler is pingpong unless the kind names another.
DENOISE = {
    "plain": 197,
    "guided": 245,
    "variation": 197,
    "inpaint": 198,
    "mixed": 265,
    "sampler euler": 195,
    "sampler dpmpp": 203,
}
OPEN = {"guided": 136, "inpaint": 153}  # the same for models of the family Stable Audio Open
OTHERS = {"text": 159, "begin": 77, "encode": 192, "finish": 7, "decode": 251}
STRICT = {**OTHERS, "text": 302, "denoise": 262, "decode": 1230}
STEPS = {Setting(kind): most for kind, most in DENOISE.items()} | {
    Setting("plain", "fast", "float32"): 154,
    **{Setting(kind, "fast", "float32", "open"): most for kind, most in OPEN.items()},
}
FAST, IN_STRICT = Setting("mixed"), Setting("mixed", "strict")
Counted = dict[Setting, dict[str, Any]]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def counted(request: pytest.FixtureRequest) -> Counted:
    """Returns for each setting the largest counts of each kind of call. The calls run in a separate process."""
    settings = [FAST, IN_STRICT] if request.param == "few" else [*STEPS, IN_STRICT]
    return dict(zip(settings, run_apart(count, settings), strict=True))


def test_a_step_makes_one_copy_and_never_waits(counted: Counted) -> None:
    failures = []
    for setting in STEPS.keys() & counted:
        work, most_launches = counted[setting]["denoise"], STEPS[setting]
        if not work["calls"] or work["waits"] or work["launches"] > most_launches or work["asynchronous_copies"] != 1:
            failures.append((setting, work))
    assert not failures


def test_other_calls_never_wait(counted: Counted) -> None:
    failures = []
    for setting, bounds in ((FAST, OTHERS), (IN_STRICT, STRICT)):
        for call, most_launches in bounds.items():
            work = counted[setting][call]
            if not work["calls"] or work["waits"] or work["launches"] > most_launches:
                failures.append((setting, call, work))
    assert not failures


def test_no_call_mixes_devices_or_copies_synchronously(counted: Counted) -> None:
    assert not [
        (setting, call, work["origins"])
        for setting, calls in counted.items()
        for call, work in calls.items()
        if work["mix_ups"] or work["blocking_copies"]
    ]
