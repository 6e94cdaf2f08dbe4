"""Adapters (LoRA and its relatives): reading files, fitting them to a network, folding chains, and applying them."""

from __future__ import annotations

from stable_audio_serve.models.adapters.adapter import Adapter, AdapterType, read_adapter
from stable_audio_serve.models.adapters.apply import RowSlots, SlotBuffers, adapt, adapting
from stable_audio_serve.models.adapters.base import Base, FittedAdapter
from stable_audio_serve.models.adapters.fold import LayerSlot, Slot, check_strength, fold

__all__ = [
    "Adapter",
    "AdapterType",
    "Base",
    "FittedAdapter",
    "LayerSlot",
    "RowSlots",
    "Slot",
    "SlotBuffers",
    "adapt",
    "adapting",
    "check_strength",
    "fold",
    "read_adapter",
]
