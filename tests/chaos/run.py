"""A chaos run: a client submits jobs while processes of the server are killed. Then all results are checked."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from tests.chaos.customer import Customer, WrongError
from tests.chaos.killer import Kill, PlannedKill, carry_out, plan_kills
from tests.chaos.ledger import Ledger
from tests.chaos.orders import Order, arrival_times, make_orders
from tests.chaos.scene import ORPHAN_AFTER_S, WEBHOOK_SECRET, Scene
from tests.chaos.verdict import Verdict, judge
from tests.chaos.webhooks import Inbox, receiving

_REPORT_EVERY_S = 10.0
_NOTICES_S = 60.0  # all webhooks must arrive within this time after the last job ends
_SWEEP_S = 30.0  # the server must delete a file without a job at most this long after it has reached `ORPHAN_AFTER_S`
_AGAIN_AT_ONCE = 8
_ANSWER_S = 15.0


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """The jobs that a chaos run submits, and the processes that it kills. The `seed` determines both."""

    num_orders: int
    rounds: int  # each round kills one process of every kind
    every_s: float  # mean time between kills
    late_after_s: float  # a job is late if it ends this long after its acceptance and after the last kill
    give_up_s: float  # the client stops waiting for a job after this time
    num_compared: int  # number of jobs whose audio is compared with the synchronous route's; the bits must be equal
    is_swept: bool = False  # at the end, wait until the server has deleted files without a job
    seed: int = 0

    @property
    def orders(self) -> list[Order]:
        return make_orders(self.num_orders, seed=self.seed)

    @property
    def planned_kills(self) -> list[PlannedKill]:
        return plan_kills(rounds=self.rounds, every_s=self.every_s, seed=self.seed)


async def run_chaos(scene: Scene, plan: ChaosPlan, ledger: Ledger) -> Verdict:
    """Carry out `plan`, print its progress, and check the results. Returns the verdict."""
    orders, planned_kills = plan.orders, plan.planned_kills
    limits = httpx.Limits(max_connections=None)  # in a limited pool, httpx never frees some connections after timeouts
    with receiving(WEBHOOK_SECRET) as inbox:
        async with httpx.AsyncClient(
            base_url=scene.server.url, timeout=_ANSWER_S, limits=limits, follow_redirects=True
        ) as http:
            customer = Customer(http, ledger, inbox.url)
            progress = asyncio.create_task(_print_progress(ledger, inbox))
            try:
                kills = await _attack(scene, plan, customer, orders=orders, planned_kills=planned_kills)
                await _check_results(customer, orders, plan)
                await _wait_for_notices(inbox, orders)
            finally:
                progress.cancel()
    verdict = judge(
        orders,
        ledger.entries(),
        notices=inbox.notices,
        rows=scene.rows(),
        visible=scene.visible(),
        kills=kills,
        late_after_s=plan.late_after_s,
    )
    for key in set(scene.visible()) - scene.stored():
        verdict.add("lost", f"artifact {key} is visible and not there")
    if plan.is_swept:
        for key in sorted(await _orphans(scene)):
            verdict.add("orphaned", f"file {key} belongs to nothing")
    return verdict


async def _attack(
    scene: Scene, plan: ChaosPlan, customer: Customer, *, orders: Sequence[Order], planned_kills: Sequence[PlannedKill]
) -> list[Kill]:
    """Submit the planned jobs while the kills are carried out. Returns the kills."""
    arrivals = arrival_times(len(orders), span_s=planned_kills[-1].at_s, seed=plan.seed)

    async def arrive(order: Order, at_s: float) -> None:
        await asyncio.sleep(at_s)
        await customer.run(order, give_up_s=plan.give_up_s)

    kills, *_ = await asyncio.gather(
        carry_out(
            scene.server,
            planned_kills,
            crash_database=scene.crash_database,
            seed=plan.seed,
            report=lambda kill: print(f"chaos: killed {kill.target}", flush=True),
        ),
        *(arrive(order, at_s) for order, at_s in zip(orders, arrivals, strict=True)),
    )
    return kills


async def _check_results(customer: Customer, orders: Sequence[Order], plan: ChaosPlan) -> None:
    """Download the audio of all finished jobs again, and compare some of it with audio of the synchronous route."""
    numbered = {order.number: order for order in orders}
    jobs = {(entry["order"], entry["job"]) for entry in customer.ledger.entries() if entry["what"] == "fetched"}
    # Only the native API takes a seed.
    comparable = sorted(pair for pair in jobs if numbered[pair[0]].contract == "sa3")
    compared = set(random.Random(plan.seed).sample(comparable, min(plan.num_compared, len(comparable))))
    gate = asyncio.Semaphore(_AGAIN_AT_ONCE)

    async def look(order: Order, job: str, *, compare: bool) -> None:
        async with gate:
            try:
                async with asyncio.timeout(plan.give_up_s):
                    audio = await customer.fetch(order, job)
                    if compare and audio != await customer.expected_audio(order):
                        customer.ledger.write("wrong", order.number, why=f"job {job} has other audio than expected")
            except (TimeoutError, WrongError) as error:
                customer.ledger.write("wrong", order.number, why=f"afterwards: {error!r}")

    await asyncio.gather(*(look(numbered[n], job, compare=(n, job) in compared) for n, job in sorted(jobs)))


async def _wait_for_notices(inbox: Inbox, orders: Sequence[Order]) -> None:
    due = {order.number for order in orders if order.has_webhook}
    deadline = time.monotonic() + _NOTICES_S
    while due - inbox.notified() and time.monotonic() < deadline:  # noqa: ASYNC110  # another thread fills the inbox
        await asyncio.sleep(0.2)


async def _orphans(scene: Scene) -> set[str]:
    """Wait until the server has deleted all files without a job. Returns the files that remain after a time limit."""
    deadline = time.monotonic() + ORPHAN_AFTER_S + _SWEEP_S
    while True:
        orphans = scene.stored() - set(scene.visible())
        if not orphans or time.monotonic() > deadline:
            return orphans
        await asyncio.sleep(1.0)


async def _print_progress(ledger: Ledger, inbox: Inbox) -> None:
    started_at = time.monotonic()
    while True:
        await asyncio.sleep(_REPORT_EVERY_S)
        counts = Counter(entry["what"] for entry in ledger.entries())
        summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        print(f"chaos: {time.monotonic() - started_at:.0f} s: {summary}; {len(inbox.notices)} notices", flush=True)
