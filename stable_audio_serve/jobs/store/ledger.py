"""The accounts of limited clients, where all ingress processes and servers of one job database find them.

Blocking, for worker threads. Every method raises StorageError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from stable_audio_serve.jobs.store.account import Account, Charge, Full, Visit
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.tables import ACCOUNTS

_accounts = ACCOUNTS.c


@dataclass(frozen=True, slots=True)
class Settled:
    """The answers to a visit's asks, and the account afterwards with its time, Unix seconds."""

    outcomes: Sequence[Charge | Full]
    account: Account
    now: float


class Ledger:
    """The accounts of one database. Two holders that ask for the same rest of a limit: one of them gets it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def settle(self, holder: str, visits: Sequence[Visit], *, lease_s: float) -> list[Settled]:
        """Settle all visits, each of another client, in one transaction. See `Account.settle`."""
        names = sorted(visit.client for visit in visits)
        with self._database.writing() as connection:
            texts, now = self._lock(connection, names)
            settled = []
            changed = []
            for visit in visits:
                account = Account.load(texts[visit.client])
                outcomes = account.settle(visit, now, holder=holder, lease_s=lease_s)
                settled.append(Settled(outcomes, account, now))
                if (text := account.dump()) != texts[visit.client]:
                    changed.append({"name": visit.client, "new": text})
            if changed:
                connection.execute(_CHANGE, changed)
        return settled

    def _lock(self, connection: sa.Connection, names: Sequence[str]) -> tuple[Mapping[str, str], float]:
        """Returns each client's account, which nobody else changes until the transaction ends, and the time."""
        find = sa.select(_accounts.client, _accounts.state, self._database.now.label("now"))
        if not self._database.is_sqlite:
            # What an account loses with the database's last half second is little: nobody waits for a disk.
            find = find.add_columns(sa.func.set_config("synchronous_commit", "off", True))
        find = find.where(_accounts.client.in_(names)).order_by(_accounts.client).with_for_update()
        rows = connection.execute(find).all()
        if len(rows) < len(names):
            missing = set(names) - {row.client for row in rows}
            new = [{"client": name, "state": _EMPTY} for name in sorted(missing)]
            connection.execute(self._database.insert(ACCOUNTS).on_conflict_do_nothing(), new)
            rows = connection.execute(find).all()
        return {row.client: row.state for row in rows}, max(row.now for row in rows)


_EMPTY = Account().dump()
_CHANGE = sa.update(ACCOUNTS).where(_accounts.client == sa.bindparam("name")).values(state=sa.bindparam("new"))
