"""Identifiers. Each has its own type, so that a type checker finds one used in place of another.

Also the client of the current request.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NewType

# The id of a job. It is unique only among the jobs of one client in one contract (the API that the job was submitted
# with). The server creates the id, or the client chooses it (`JobSpec.id_is_chosen`).
JobId = NewType("JobId", str)

# The name of the client that an API key belongs to. Jobs belong to the client whose key they were submitted with. The
# name is empty (NO_CLIENT) if no keys are configured.
ClientId = NewType("ClientId", str)
NO_CLIENT = ClientId("")

# The name of the client whose request the current task handles: that of its API key, or without keys its address. Set
# when the request is admitted.
current_client: ContextVar[str] = ContextVar("current_client", default="")

# The name that a file is stored under, created by `artifacts.keys`.
ArtifactKey = NewType("ArtifactKey", str)
