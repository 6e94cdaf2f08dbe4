"""Identifiers. Each is a distinct type, so that a type checker finds mix-ups."""

from __future__ import annotations

from typing import NewType

# A job, unique within its client and contract. Made by the server, or chosen by the client (`JobSpec.id_is_chosen`).
JobId = NewType("JobId", str)

# The client that an API key belongs to. It owns the jobs submitted with the key. Empty when no keys are configured.
ClientId = NewType("ClientId", str)
NO_CLIENT = ClientId("")

# The name that a file is stored under, created by `artifacts.keys`.
ArtifactKey = NewType("ArtifactKey", str)
