from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_serve.core.processor import arm_design, has_matrix_bfloat16, has_native_bfloat16, is_amd


@pytest.mark.parametrize(
    ("flags", "is_native", "by_matrices"),
    [
        ("fpu avx2 avx512f avx512_bf16 avx512_fp16", True, False),
        ("fpu avx2 amx_bf16 amx_tile", True, True),
        ("fpu avx2 avx512f avx512bw", False, False),
        ("avx512_bf16_not", False, False),
        ("", False, False),
    ],
)
def test_cpu_flags_determine_bfloat16_support(tmp_path: Path, flags: str, is_native: bool, by_matrices: bool) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(
        f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: avx512_bf16\n"
    )
    assert has_native_bfloat16(facts) is is_native
    assert has_matrix_bfloat16(facts) is by_matrices


def test_bfloat16_is_unsupported_without_cpu_flags(tmp_path: Path) -> None:
    assert not has_native_bfloat16(tmp_path / "missing")
    assert not has_matrix_bfloat16(tmp_path / "missing")


def test_the_vendor_of_a_processor_is_read(tmp_path: Path) -> None:
    facts = tmp_path / "facts"
    assert not is_amd(facts)
    for vendor, expected in (("AuthenticAMD", True), ("GenuineIntel", False)):
        facts.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 26\n")
        assert is_amd(facts) is expected


def test_the_design_of_an_arm_core_is_read(tmp_path: Path) -> None:
    facts = tmp_path / "facts"
    assert arm_design(facts) == []
    facts.write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert arm_design(facts) == ["0xd0c"]
    assert not has_native_bfloat16(facts)
