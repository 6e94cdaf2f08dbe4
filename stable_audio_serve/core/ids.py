"""Identifiers, each a type of its own, so that one is never passed where another is expected."""

from __future__ import annotations

from typing import NewType

# A job, unique within its client and contract. Made by the server, or chosen by the client (`JobSpec.id_is_chosen`).
JobId = NewType("JobId", str)

# The client that an API key belongs to: the owner of the jobs submitted with it. Empty where no keys are set.
ClientId = NewType("ClientId", str)
NO_CLIENT = ClientId("")

# The name that a file is stored under, made by `artifacts.keys`.
ArtifactKey = NewType("ArtifactKey", str)
