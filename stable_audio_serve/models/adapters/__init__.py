"""Adapters (LoRA and its relatives): reading files."""

from __future__ import annotations

from stable_audio_serve.models.adapters.adapter import Adapter, AdapterType, read_adapter

__all__ = ["Adapter", "AdapterType", "read_adapter"]
