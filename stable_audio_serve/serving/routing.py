"""Routes each call to the replica of a model that is predicted to finish it first. Runs in every process that calls a
model. Does not import torch or settings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from stable_audio_serve.serving.model_states import record_stats
from stable_audio_serve.serving.work_ledger import OLD_S, WorkLedger


class LeastWorkRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses the replica with the least predicted work, the new call included, which a `WorkLedger` tracks.

    One replica is picked at random. If its last report is too old, the choice is Serve's own: the shorter queue of two
    random replicas. So replicas without reports get their proportional share of the calls.

    Serve sends calls in order, so a call may get the replica that was chosen for another call, which then gets another
    replica.
    """

    def initialize_state(self, *, model: str, old_after_s: float = OLD_S) -> None:
        """Set the router's fields. Called by Serve with `request_router_kwargs`."""
        self._model = model
        self._ledger = WorkLedger(old_after_s=old_after_s)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one replica per rank, least work first, or a single rank of two replicas for Serve to choose from."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        if not replicas:
            return []
        if self._ledger.is_old(_name(replicas[0].replica_id)):
            return [replicas[:2]]
        call = pending_request.args if pending_request else ()
        replicas.sort(key=lambda replica: self._rank(_name(replica.replica_id), call))
        first = _name(replicas[0].replica_id)
        self._ledger.choose(replica=first, ms=self._ledger.price_ms(first, call))
        return [[replica] for replica in replicas]

    def _rank(self, replica: str, call: Sequence[object]) -> tuple[bool, float]:
        """Return the sort key of a replica. It includes the call, which can take longer on one replica than another."""
        return self._ledger.is_old(replica), self._ledger.left_ms(replica) + self._ledger.price_ms(replica, call)

    def on_request_routed(  # noqa: PLR0917 - as Serve calls it
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Serve when a replica has accepted a request."""
        super().on_request_routed(pending_request, replica_id, result)
        replica = _name(replica_id)
        ms = self._ledger.price_ms(replica, pending_request.args)
        self._ledger.arrive(replica=replica, request_id=pending_request.metadata.internal_request_id, ms=ms)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve once for each request that was sent to a replica, however it ended."""
        self._ledger.end(internal_request_id, replica=_name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas start, stop or publish statistics."""
        stats = {_name(replica.replica_id): replica.routing_stats for replica in replicas}
        self._ledger.update(stats)
        record_stats(self._model, stats)
        super().update_replicas(replicas)


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
