"""The killer waits for its victims to be replaced, and names one that is not."""

from __future__ import annotations

import pytest

from tests.chaos.killer import NotBackError, wait_until_back


async def test_a_victim_that_is_not_replaced_is_named() -> None:
    with pytest.raises(NotBackError, match=r"^runner: process 4711 was not replaced within 0\.3 s of its end$"):
        await wait_until_back("runner", killed=4711, is_back=lambda: False, within_s=0.3)


async def test_the_next_strike_waits_until_the_victim_is_back() -> None:
    looks = iter([False, False, True])
    await wait_until_back("engine", killed=1, is_back=lambda: next(looks))
    assert next(looks, "none left") == "none left"
