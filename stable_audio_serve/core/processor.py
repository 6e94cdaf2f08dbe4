"""Detects instructions of this machine's CPU from Linux's `/proc/cpuinfo`. Independent of networks and torch."""

from __future__ import annotations

from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_MATRIX_FLAG = "amx_bf16"


def has_native_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether the CPU has bfloat16 instructions (AVX512-bf16 or AMX). Without them torch is slower than in float32.

    False when the file does not exist.
    """
    return not _BFLOAT16_FLAGS.isdisjoint(_read_flags(facts))


def has_matrix_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether the CPU has AMX, many times as fast as float32. False when the file does not exist."""
    return _MATRIX_FLAG in _read_flags(facts)


def is_amd(facts: Path = CPU_FACTS) -> bool:
    """Whether AMD made the CPU. False when the file does not exist."""
    return _read(facts, "vendor_id") == ["AuthenticAMD"]


def _read_flags(facts: Path) -> list[str]:
    return _read(facts, "flags")


def _read(facts: Path, name: str) -> list[str]:
    """Returns the values of an entry, for the first CPU."""
    try:
        lines = facts.read_text().splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "").split()
