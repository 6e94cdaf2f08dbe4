"""Which replica of a model gets the next request: the one with the fewest requests in progress from this process.

Serve compares two replicas by cached queue lengths, which lag behind a burst: of 80 requests at once the fuller of two
replicas got up to 1.3 times its share. Runs in every process that calls a model; imports neither torch nor settings.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict, deque
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

_SENT_WITHIN_S = 1.0  # a choice that is older was not used: its caller left, or the replica was full


class FewestInProgressRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Counts what it sent and what ended; equal counts are decided by chance. Requests keep their order."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Serve's hook for a router's own fields."""
        self._in_progress: Counter[ReplicaID] = Counter()
        # When a replica was chosen for requests that are not sent yet: of a burst, all are chosen before one is sent.
        self._chosen_at: defaultdict[ReplicaID, deque[float]] = defaultdict(deque)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the candidates, one per rank, the least busy first."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        replicas.sort(key=lambda replica: self._count(replica.replica_id))
        if replicas:
            self._chosen_at[replicas[0].replica_id].append(time.monotonic())
        return [[replica] for replica in replicas]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Serve calls this when a request leaves for a replica."""
        super().on_send_request(replica_id)
        waiting = [chosen_at for chosen_at in self._chosen_at.values() if chosen_at]
        if waiting:  # its own choice, or the oldest: that replica was full or too slow to tell its queue
            (self._chosen_at[replica_id] or min(waiting)).popleft()
        self._in_progress[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls this once for each request that left, however it ended."""
        self._in_progress[replica_id] = max(0, self._in_progress[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls this when replicas come or go."""
        super().update_replicas(replicas)
        here = {replica.replica_id for replica in replicas}
        for counts in (self._in_progress, self._chosen_at):
            for replica_id in [known for known in counts if known not in here]:
                del counts[replica_id]

    def _count(self, replica_id: ReplicaID) -> int:
        chosen_at = self._chosen_at[replica_id]
        while chosen_at and chosen_at[0] < time.monotonic() - _SENT_WITHIN_S:
            chosen_at.popleft()
        return self._in_progress[replica_id] + len(chosen_at)
