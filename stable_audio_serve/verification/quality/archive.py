"""Stores quality reports, and records of the weights that last passed, in the artifact store.

Every call has a timeout. Methods raise StorageError if the store does not answer, and QualityReportError for a file
that cannot be used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from stable_audio_serve.artifacts.keys import QUALITY_FOLDER, quality_key
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.core.errors import DamagedFileError, QualityReportError, StorageError
from stable_audio_serve.core.ids import ArtifactKey
from stable_audio_serve.verification.quality.report import (
    MAX_BYTES,
    LastGood,
    Report,
    dump,
    find_kind,
    last_good_id,
    parse,
)

T = TypeVar("T")


class ReportArchive:
    """Reports and records of last good weights in an artifact store. A write replaces the whole file."""

    def __init__(self, store: ArtifactStore, *, wait_s: float = 10.0) -> None:
        """`wait_s` is the timeout of each call to the store."""
        self._store = store
        self._wait_s = wait_s

    async def report(self, report_id: str) -> Report | None:
        """Return the report with this id, or None. Raises StorageError, QualityReportError."""
        text = await self._fetch(report_id)
        return None if text is None else self._parse_report(report_id, text)

    async def entry(self, name: str) -> Report | LastGood | None:
        """Return the report or record with this name (`names`), or None. Raises StorageError, QualityReportError."""
        text = await self._fetch(name)
        if text is None:
            return None
        if find_kind(text) is Report:
            return self._parse_report(name, text)
        return parse(LastGood, text, name=f"quality record {name}")

    async def last_good(self, model: str) -> LastGood | None:
        """Return the record of the weights with which a model last passed, or None.

        Raises StorageError, QualityReportError.
        """
        name = last_good_id(model)
        text = await self._fetch(name)
        if text is None:
            return None
        good = parse(LastGood, text, name=f"quality record {name}, the last good weights of {model}")
        if good.model != model:
            raise QualityReportError(f"quality record {name} is of another model than {model}")
        return good

    async def save(self, report: Report) -> None:
        """Write a report. Raises StorageError."""
        await self._put(report.setup.report_id, dump(report))

    async def save_last_good(self, good: LastGood) -> None:
        """Record the weights with which a model passed. Raises StorageError."""
        await self._put(last_good_id(good.model), dump(good))

    async def delete(self, report_id: str) -> None:
        """Delete a report or a record of last good weights, if it exists. Raises StorageError."""
        await self._bounded(self._store.delete(_key(report_id)))

    async def names(self) -> list[str]:
        """Return the names of all reports and records. Raises StorageError."""
        names: list[str] = []
        cursor = None
        while True:
            page = await self._call(partial(self._store.list_folder, QUALITY_FOLDER, cursor=cursor))
            names += [item.key.partition("/")[2] for item in page.objects]
            if (cursor := page.next_cursor) is None:
                return names

    def _parse_report(self, report_id: str, text: bytes) -> Report:
        name = f"quality report {report_id}"
        report = parse(Report, text, name=name)
        if report.setup.report_id != report_id:
            raise QualityReportError(f"{name} is of another model or setup than its name says")
        return report

    async def _fetch(self, name: str) -> bytes | None:
        try:
            return await self._call(partial(self._store.fetch, _key(name), max_bytes=MAX_BYTES))
        except DamagedFileError as error:
            raise QualityReportError(f"quality report {name} cannot be used: {error.message}") from error

    async def _put(self, name: str, data: bytes) -> None:
        put = self._store.put(_key(name), lambda: [data], media_type="application/json", file_name=f"{name}.json")
        await self._bounded(put)

    async def _call(self, work: Callable[[], T]) -> T:
        return await self._bounded(asyncio.to_thread(work))

    async def _bounded(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._wait_s):
                return await work
        except TimeoutError as error:
            raise StorageError(f"the store of quality reports did not answer within {self._wait_s:g} s") from error


def _key(name: str) -> ArtifactKey:
    try:
        return quality_key(name)
    except ValueError as error:
        raise QualityReportError(
            f"the name of a quality report has 32 hexadecimal digits, not {name[:40]!r}"
        ) from error
