"""Identifiers. Each has its own type, so that a type checker finds one used in place of another."""

from __future__ import annotations

from typing import NewType

# The id of a job, unique within its client and contract. The server creates it, or the client chooses it
# (`JobSpec.id_is_chosen`).
JobId = NewType("JobId", str)

# The client that an API key belongs to. It owns the jobs submitted with the key. Empty when no keys are configured.
ClientId = NewType("ClientId", str)
NO_CLIENT = ClientId("")

# The name that a file is stored under, created by `artifacts.keys`.
ArtifactKey = NewType("ArtifactKey", str)
