"""What every section of the settings is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: frozen, refuses unknown keys, checks values by type and range."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
