"""However processes are killed, no accepted job is lost or done twice."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.ledger import Ledger
from tests.chaos.run import ChaosPlan, run_chaos
from tests.chaos.scene import Scene, running_scene
from tests.chaos.verdict import Verdict
from tests.databases import PostgresServer

_LOG_LINES = 100
_ROUTINE = re.compile(r"event=request .* status=[234]\d\d ")

_SMALL = ChaosPlan(num_orders=30, rounds=1, every_s=1.0, late_after_s=60, give_up_s=120, num_compared=6)
_LARGE = ChaosPlan(
    num_orders=300, rounds=12, every_s=4.0, late_after_s=180, give_up_s=420, num_compared=40, is_swept=True
)


@pytest.mark.server
@pytest.mark.slow
def test_thirty_jobs_survive_one_kill_of_every_process(tmp_path: Path, postgres: PostgresServer) -> None:
    run(_SMALL, tmp_path, postgres)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_three_hundred_jobs_survive_kills_in_turn(tmp_path: Path, postgres: PostgresServer) -> None:
    run(replace(_LARGE, seed=int(os.environ.get("CHAOS_SEED", "0"))), tmp_path, postgres)


def run(plan: ChaosPlan, folder: Path, postgres: PostgresServer) -> None:
    ledger = Ledger(folder / "ledger.jsonl")
    with running_scene(folder, postgres) as scene:
        try:
            verdict = asyncio.run(run_chaos(scene, plan, ledger))
        finally:
            (folder / "server.log").write_text(scene.server.output)
        print(f"chaos: {verdict}", flush=True)
        if not verdict.is_clean:
            pytest.fail(describe(verdict, ledger, scene), pytrace=False)


def describe(verdict: Verdict, ledger: Ledger, scene: Scene) -> str:
    """Return details of a failed run: verdict, client's ledger, the server's last output, and the jobs in the store."""
    book = (str(dict(entry)) for entry in ledger.entries() if not verdict.orders or entry["order"] in verdict.orders)
    output = [line for line in scene.server.output.splitlines() if not _ROUTINE.search(line)]
    parts = {
        "verdict": [str(verdict)],
        "ledger": book,
        "server": output[-_LOG_LINES:],
        "jobs": map(str, scene.rows()),
        f"all of it is in {ledger.path.parent}": (),
    }
    return "\n".join(line for name, lines in parts.items() for line in (f"--- {name}", *lines))
