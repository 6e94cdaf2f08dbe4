"""What this machine's processor computes by itself, by Linux's `/proc/cpuinfo`. Knows neither networks nor torch."""

from __future__ import annotations

from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_MATRIX_FLAG = "amx_bf16"


def has_native_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512-bf16 or AMX); without, torch is slower than in float32.

    False where there is no such file.
    """
    return not _BFLOAT16_FLAGS.isdisjoint(_read_flags(facts))


def has_matrix_bfloat16(facts: Path = CPU_FACTS) -> bool:
    """Whether it does so by whole matrices (AMX), many times as fast as float32. False where there is no such file."""
    return _MATRIX_FLAG in _read_flags(facts)


def is_amd(facts: Path = CPU_FACTS) -> bool:
    """Whether AMD made the processor. False where there is no such file."""
    return _read(facts, "vendor_id") == ["AuthenticAMD"]


def _read_flags(facts: Path) -> list[str]:
    return _read(facts, "flags")


def _read(facts: Path, name: str) -> list[str]:
    """Returns the words behind a name, of the first processor."""
    try:
        lines = facts.read_text().splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "").split()
