"""Makes a file of each row of a CSV, a few at a time. Started again, it goes on where it stopped.

    python batch_from_csv.py prompts.csv --out sounds/

The CSV has a column `prompt`, and may have `duration` and `seed`. A row's file is named after what the row asks for,
and so is its job: a file that exists is not made again, and a job that the server still has is not submitted again.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stable_audio_serve.client import AsyncClient, JobControls
from stable_audio_serve.core.errors import CancelledRequestError, GenerationError, InvalidRequestError, StableAudioError


@dataclass(frozen=True)
class Row:
    """A line of the CSV; `name` is its file's, and its job's."""

    name: str
    prompt: str
    controls: JobControls


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows. Raises ValueError for a table that is none of prompts."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, line in enumerate(csv.DictReader(file), start=1):
            prompt = line.get("prompt")
            if not prompt:
                raise ValueError(f"{path}: row {number} has no prompt")
            controls = JobControls(priority="batch", seed=int(line.get("seed") or -1))
            if line.get("duration"):
                controls["duration"] = float(line["duration"])
            words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
            digest = hashlib.sha256(repr((prompt, sorted(controls.items()))).encode()).hexdigest()[:8]
            yield Row(f"{number:04}-{words}-{digest}", prompt, controls)


class Batch:
    """The rows that are left, and what became of the others."""

    def __init__(self, client: AsyncClient, rows: list[Row], *, folder: Path, attempt: int) -> None:
        self.client, self.folder, self.attempt = client, folder, attempt
        self.num_rows = len(rows)
        self.left = iter([row for row in rows if not self.file(row).exists()])
        self.num_done = sum(self.file(row).exists() for row in rows)
        self.num_failed = 0

    def file(self, row: Row) -> Path:
        return self.folder / f"{row.name}.wav"

    async def work(self) -> None:
        """Make one row after another; several of these share the rows."""
        for row in self.left:
            try:
                await self.make(row)
            except (InvalidRequestError, GenerationError, CancelledRequestError) as error:  # this row's own fault
                self.num_failed += 1
                print(f"row {row.name}: {error.message}", file=sys.stderr)

    async def make(self, row: Row) -> None:
        jobs = self.client.jobs
        job = await jobs.submit(row.prompt, idempotency_key=f"{row.name}-{self.attempt}", **row.controls)
        await jobs.download(await jobs.wait(job.id), self.file(row))
        self.num_done += 1
        print(f"[{self.num_done}/{self.num_rows}] {self.file(row)}", flush=True)


async def make_all(rows: list[Row], arguments: argparse.Namespace) -> Batch:
    """Make what is missing. Returns what became of it."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    async with AsyncClient() as client:
        batch = Batch(client, rows, folder=arguments.out, attempt=arguments.attempt)
        await asyncio.gather(*(batch.work() for _ in range(arguments.at_once)))
    return batch


def main() -> None:
    """Exit code 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sounds"), help="folder of the files")
    parser.add_argument("--at-once", type=int, default=8, help="how many jobs to have in progress")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--attempt", type=int, default=1, help="another number makes anew what failed")
    arguments = parser.parse_args()
    if arguments.at_once < 1:
        parser.error("--at-once must be at least 1")
    batch = asyncio.run(make_all(list(islice(read_rows(arguments.csv), arguments.limit)), arguments))
    print(f"{batch.num_done} of {batch.num_rows} are there, {batch.num_failed} failed")
    sys.exit(1 if batch.num_failed else 0)


if __name__ == "__main__":
    try:
        main()
    except (StableAudioError, OSError, ValueError, csv.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        sys.exit(130)
