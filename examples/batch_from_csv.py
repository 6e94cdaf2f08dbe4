"""Generate one audio file per row of a CSV, several rows at a time. Run it again to resume.

    python batch_from_csv.py prompts.csv --out sounds/

The CSV has a column `prompt` and optional columns `duration` and `seed`. The name of a row's file and the key of its
job are derived from the row's content. A second run therefore skips existing files and reuses jobs that the server
still has.
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
    """A row of the CSV. `name` identifies its content, and is used for the file name and the job's idempotency key."""

    name: str
    prompt: str
    controls: JobControls


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a CSV file. Raises ValueError for a row without a prompt."""
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
    """Generates the rows whose file does not exist, and counts rows that are done and rows that failed."""

    def __init__(self, client: AsyncClient, rows: list[Row], *, folder: Path, attempt: int) -> None:
        self.client, self.folder, self.attempt = client, folder, attempt
        self.num_rows = len(rows)
        self.pending = iter([row for row in rows if not self.file(row).exists()])
        self.num_done = sum(self.file(row).exists() for row in rows)
        self.num_failed = 0

    def file(self, row: Row) -> Path:
        return self.folder / f"{row.name}.wav"

    async def work(self) -> None:
        """Generate pending rows one by one. Several workers run this method at the same time and share the rows."""
        for row in self.pending:
            try:
                await self.make(row)
            except (InvalidRequestError, GenerationError, CancelledRequestError) as error:  # the next rows may succeed
                self.num_failed += 1
                print(f"row {row.name}: {error.message}", file=sys.stderr)

    async def make(self, row: Row) -> None:
        jobs = self.client.jobs
        job = await jobs.submit(row.prompt, idempotency_key=f"{row.name}-{self.attempt}", **row.controls)
        await jobs.download(await jobs.wait(job.id), self.file(row))
        self.num_done += 1
        print(f"[{self.num_done}/{self.num_rows}] {self.file(row)}", flush=True)


async def make_all(rows: list[Row], arguments: argparse.Namespace) -> Batch:
    """Generate the missing files. Returns the finished batch, which has the counts."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    async with AsyncClient() as client:
        batch = Batch(client, rows, folder=arguments.out, attempt=arguments.attempt)
        await asyncio.gather(*(batch.work() for _ in range(arguments.at_once)))
    return batch


def main() -> None:
    """Run the program. The exit code is 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sounds"), help="output folder")
    parser.add_argument("--at-once", type=int, default=8, help="number of jobs in progress at a time")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--attempt", type=int, default=1, help="change this number to retry failed rows")
    arguments = parser.parse_args()
    if arguments.at_once < 1:
        parser.error("--at-once must be at least 1")
    batch = asyncio.run(make_all(list(islice(read_rows(arguments.csv), arguments.limit)), arguments))
    print(f"{batch.num_done} of {batch.num_rows} done, {batch.num_failed} failed")
    sys.exit(1 if batch.num_failed else 0)


if __name__ == "__main__":
    try:
        main()
    except (StableAudioError, OSError, ValueError, csv.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; start it again to go on", file=sys.stderr)
        sys.exit(130)
