"""Send each call of a model to the replica that is predicted to finish the call first.

The router runs in every process that calls models. This module imports neither torch nor the settings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from stable_audio_serve.serving.model_states import record_stats
from stable_audio_serve.serving.work_ledger import OLD_S, WorkLedger


class LeastWorkRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses the replica with the least predicted work, including the new call. A `WorkLedger` tracks the work.

    First, one replica is picked at random. If that replica's last report is too old, Ray Serve's default rule chooses
    the replica: of two random replicas, it takes the one with the shorter queue. Thus replicas without recent reports
    get calls, too.

    Ray Serve sends waiting calls in their order of arrival. Therefore, a call may go to a replica that was chosen for a
    later call. The later call then goes to the replica that was chosen for the earlier one.
    """

    def initialize_state(self, *, model: str, old_after_s: float = OLD_S) -> None:
        """Initialize the router. Called by Ray Serve with the deployment's `request_router_kwargs`."""
        self._model = model
        self._ledger = WorkLedger(old_after_s=old_after_s)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in ranks. Ray Serve tries a rank only when all replicas in the ranks before it are full.

        Each rank has one replica, and the replica with the least work comes first. To leave the choice to Ray Serve,
        the method returns a single rank of two replicas.
        """
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
        """Return the sort key of a replica: its remaining work plus the call, in milliseconds.

        The call is included because it can take longer on one replica than on another, for example because a replica
        must load an adapter. Replicas with old reports come last.
        """
        ledger = self._ledger
        return ledger.is_old(replica), (
            ledger.left_ms(replica) + ledger.price_ms(replica, call) + ledger.load_ms(replica, call)
        )

    def on_request_routed(  # noqa: PLR0917 - as Serve calls it
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray Serve when a replica has accepted a request."""
        super().on_request_routed(pending_request, replica_id, result)
        replica = _name(replica_id)
        ms = self._ledger.price_ms(replica, pending_request.args)
        self._ledger.arrive(replica=replica, request_id=pending_request.metadata.internal_request_id, ms=ms)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray Serve when a request that was sent to a replica ends, with a result or an error."""
        self._ledger.end(internal_request_id, replica=_name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve when replicas start, stop or publish statistics."""
        stats = {_name(replica.replica_id): replica.routing_stats for replica in replicas}
        self._ledger.update(stats)
        record_stats(self._model, stats)
        super().update_replicas(replicas)


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)
