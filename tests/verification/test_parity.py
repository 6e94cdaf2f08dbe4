"""`verify` compares every stored output of a component."""

from __future__ import annotations

import re

import pytest

from stable_audio_serve.verification.verify import BOUNDS, REQUIRED_WITHOUT_MODEL
from tests.goldens import SHARP, TINY, load_goldens
from tests.parameters import slow
from tests.verification.folders import verify_stored

pytestmark = pytest.mark.server

ELSEWHERE = {"lengths", "schedules", "adapters", "text in float16", "end-to-end steps", *REQUIRED_WITHOUT_MODEL} - {
    "draws"
}
# Outputs inside a component. `verify` does not compare them, but `tests/models` does.
INTERMEDIATE = re.compile(r"text/last_hidden_state|ae/(patched|.*_out_quiet|.*_draw_\d)")
COMPONENTS = [component for component in BOUNDS if component not in ELSEWHERE]
FOLDERS = [SHARP[0], *map(slow, (*SHARP[1:], *TINY))]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_command_accepts_the_folder(name: str) -> None:
    answer = verify_stored(name)
    assert answer.exit_code == 0, "\n".join(answer.lines)
    assert answer.lines[-1] == "verification passed"
    for component in COMPONENTS:
        assert "largest difference" in answer.line(component, "ok")


@pytest.mark.parametrize("name", FOLDERS[:2])
def test_every_case_is_compared_end_to_end(name: str) -> None:
    keys = [entry["key"] for entry in verify_stored(name).report["comparisons"]]
    failures = []
    for case, facts in load_goldens(name).facts["cases"].items():
        for output in ("latents_keymask", "audio_keymask"):
            num_rows = sum(key.startswith(f"{case}/{output}[") for key in keys)
            if num_rows != facts["args"].get("batch_size", 1):
                failures.append((case, output, num_rows))
    assert not failures


@pytest.mark.parametrize("name", FOLDERS[:2])
def test_every_stored_output_is_compared_or_reported_as_skipped(name: str) -> None:
    answer = verify_stored(name)
    compared = {entry["key"].split("[")[0] for entry in answer.report["comparisons"]}
    inputs = {"x", "t", "cross_attn_cond", "cross_attn_mask", "global_cond", "local_add_cond", "padding_mask"}
    for key in load_goldens(name).tensors:
        group, rest = key.split("/", 1)
        is_input = rest.startswith(("latents", "audio", "negative_")) or rest.endswith("_audio") or rest in inputs
        has_twin = "gen/" in key and "keymask" not in key and "/draw" not in key and "local_add" not in key
        is_left_out = rest.endswith("_pad_vzero") or INTERMEDIATE.fullmatch(key)
        if not (group in ("dit", "ae") and is_input) and not has_twin and not is_left_out:
            assert key in compared
    assert "value-zeroed" in answer.line("denoiser padding", "skipped")
    assert "value-zeroed" in answer.line("end-to-end", "skipped")
