"""Every stored number of the reference, through the command that operators run."""

from __future__ import annotations

import pytest

from stable_audio_serve.verification.bounds import BOUNDS, REQUIRED_WITHOUT_MODEL
from tests.goldens import SHARP, TINY, load_goldens
from tests.verification.folders import verify_stored

ELSEWHERE = {"lengths", "schedules", "text in float16", "end-to-end steps", *REQUIRED_WITHOUT_MODEL} - {"draws"}
COMPONENTS = [component for component in BOUNDS if component not in ELSEWHERE]
CASES = [(name, case) for name in SHARP for case in load_goldens(name).facts["cases"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARP, *TINY])
def test_the_command_accepts_the_folder(name: str) -> None:
    answer = verify_stored(name)
    assert answer.exit_code == 0, "\n".join(answer.lines)
    assert answer.lines[-1] == "verification passed"
    for component in COMPONENTS:
        assert "largest difference" in answer.line(component, "ok")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", [*SHARP, *TINY])
def test_component_within_its_bound(name: str, component: str) -> None:
    found = [entry for entry in verify_stored(name).report["comparisons"] if entry["component"] == component]
    assert found
    for entry in found:
        assert entry["difference"] <= entry["bound"], entry


@pytest.mark.parametrize(("name", "case"), CASES)
def test_case_end_to_end(name: str, case: str) -> None:
    found = [entry for entry in verify_stored(name).report["comparisons"] if entry["key"].startswith(f"{case}/")]
    num_rows = load_goldens(name).facts["cases"][case]["args"].get("batch_size", 1)
    for output in ("latents_keymask", "audio_keymask"):
        rows = [entry for entry in found if entry["key"].startswith(f"{case}/{output}[")]
        assert len(rows) == num_rows
    for entry in found:
        assert entry["difference"] <= entry["bound"], entry


@pytest.mark.parametrize("name", SHARP)
def test_every_stored_output_is_compared_or_said_to_be_skipped(name: str) -> None:
    answer = verify_stored(name)
    compared = {entry["key"].split("[")[0] for entry in answer.report["comparisons"]}
    inputs = {"x", "t", "cross_attn_cond", "cross_attn_mask", "global_cond", "local_add_cond", "padding_mask"}
    for key in load_goldens(name).tensors:
        group, rest = key.split("/", 1)
        is_input = rest.startswith(("latents", "audio", "negative_")) or rest.endswith("_audio") or rest in inputs
        has_twin = "gen/" in key and "keymask" not in key and "/draw" not in key and "local_add" not in key
        if not (group in ("dit", "ae") and is_input) and not has_twin and not rest.endswith("_pad_vzero"):
            assert key in compared
    assert "value-zeroed" in answer.line("denoiser padding", "skipped")
    assert "value-zeroed" in answer.line("end-to-end", "skipped")
