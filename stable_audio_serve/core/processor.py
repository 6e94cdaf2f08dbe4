"""Detect features of this machine's CPU from Linux's `/proc/cpuinfo`. On other systems the functions find none."""

from __future__ import annotations

from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_MATRIX_FLAG = "amx_bf16"


def has_native_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether the CPU has bfloat16 instructions (AVX512-bf16 or AMX). Without them, bfloat16 is slower than float32."""
    return not _BFLOAT16_FLAGS.isdisjoint(_read(facts, "flags"))


def has_matrix_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether the CPU has AMX instructions. With them, bfloat16 matrix products are many times as fast as float32."""
    return _MATRIX_FLAG in _read(facts, "flags")


def is_amd(facts: Path = CPU_FACTS) -> bool:
    """Whether AMD made the CPU."""
    return _read(facts, "vendor_id") == ["AuthenticAMD"]


def arm_design(facts: Path = CPU_FACTS) -> list[str]:
    """Return the number of an ARM core's design, such as `0xd0c` for Neoverse N1. Empty for other CPUs."""
    return _read(facts, "CPU part")


def _read(facts: Path, name: str) -> list[str]:
    """Return the words of the entry `name` for the first CPU, or an empty list if the file or the entry is missing."""
    try:
        lines = facts.read_text().splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "").split()
