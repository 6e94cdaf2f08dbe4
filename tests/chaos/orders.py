"""Orders, which are the planned jobs of a chaos run. A seed determines the APIs (dialects) and options of the jobs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.audio_files import make_audio_file

# The native API has four kinds: plain has no key, keyed has an Idempotency-Key, chosen has an id that the client
# chooses, and variation has an upload.
Kind = Literal["plain", "keyed", "chosen", "variation", "aiml", "fal"]

_WEIGHTS: Mapping[Kind, int] = {"plain": 2, "keyed": 3, "chosen": 2, "variation": 3, "aiml": 1, "fal": 2}
_NOTIFYING = ("plain", "keyed", "chosen", "variation", "fal")  # kinds of jobs that can have a webhook
# (steps, weight in the random choice). 400 steps take about a second, so kills can interrupt them.
_STEPS = ((4, 5), (60, 3), (400, 2))
_RATE_HZ = 8_000


@dataclass(frozen=True, slots=True)
class Order:
    """One planned job. `key` is its idempotency key or the id that the client chose.

    With a `key`, submitting the order again makes no new job.
    If `is_repeated`, the client submits the order again after it was accepted.
    """

    number: int
    kind: Kind
    duration_s: int
    steps: int
    seed: int
    key: str | None
    has_webhook: bool
    is_repeated: bool

    @property
    def contract(self) -> str:
        """The API of the job, as the job store names it."""
        return self.kind if self.kind in ("aiml", "fal") else "sa3"

    @property
    def controls(self) -> dict[str, Any]:
        """The request fields that the native API takes for this job."""
        return {
            "prompt": f"order {self.number}",
            "duration": self.duration_s,
            "steps": self.steps,
            "seed": self.seed,
        }

    @property
    def clip(self) -> bytes:
        """The audio file that is uploaded if the order is a variation."""
        return make_audio_file(duration_s=0.5, rate_hz=_RATE_HZ, hz=200.0 + self.number)


def make_orders(count: int, *, seed: int) -> list[Order]:
    """Return `count` orders in random order: one of every kind, and more of kinds that are drawn at random by weight.

    `seed` determines the kinds and their order.
    """
    rng = random.Random(f"orders/{seed}")
    kinds = [*_WEIGHTS, *rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=max(0, count - len(_WEIGHTS)))]
    rng.shuffle(kinds)
    return [_make_order(number, kind, rng) for number, kind in enumerate(kinds[:count])]


def _make_order(number: int, kind: Kind, rng: random.Random) -> Order:
    has_key = kind in ("keyed", "chosen") or (kind == "variation" and rng.random() < 0.5)
    return Order(
        number=number,
        kind=kind,
        duration_s=rng.randint(1, 3),
        steps=rng.choices([steps for steps, _ in _STEPS], [weight for _, weight in _STEPS])[0],
        seed=1000 + number,
        key=rng.randbytes(16).hex() if has_key else None,
        has_webhook=kind in _NOTIFYING and rng.random() < 0.5,
        is_repeated=has_key and rng.random() < 0.5,
    )


def arrival_times(count: int, *, span_s: float, seed: int) -> Sequence[float]:
    """Return `count` sorted random times between 0 and `span_s` seconds, when the orders are submitted."""
    rng = random.Random(f"arrivals/{seed}")
    return sorted(rng.uniform(0.0, span_s) for _ in range(count))
