"""The base class of all settings sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: frozen, refuses unknown keys, checks types and ranges."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
