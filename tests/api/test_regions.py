"""Inpaint times in text form. The result is either regions inside the clip, or an error that names the field."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stable_audio_serve.api.native.edits import parse_regions
from stable_audio_serve.core.errors import InvalidRequestError

START, END = "inpaint_start_seconds", "inpaint_end_seconds"
ALIASES = {START: "inpaint_mask_start_seconds", END: "inpaint_mask_end_seconds"}
Regions = list[tuple[float, float]]


def parse(start: str | None, end: str | None, *, duration_s: float = 1e4, alias: bool = False) -> Regions:
    values: dict[str, str | None] = dict.fromkeys((*ALIASES, *ALIASES.values()))
    for name, text in ((START, start), (END, end)):
        values[ALIASES[name] if alias else name] = text
    return list(parse_regions(values, duration_s=duration_s))


seconds = st.floats(0, 1000, allow_subnormal=False) | st.integers(0, 1000).map(float)
region_lists = st.lists(
    st.tuples(seconds, seconds).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: (min(pair), max(pair))),
    min_size=1,
    max_size=100,
)


@given(regions=region_lists, spelling=st.sampled_from("jcs"), alias=st.booleans(), pad=st.sampled_from(["", " ", "\n"]))
def test_every_spelling_gives_the_same_numbers(regions: Regions, spelling: str, alias: bool, pad: str) -> None:
    def spell(numbers: list[float]) -> str:
        if spelling == "s" and len(numbers) == 1:
            return pad + repr(numbers[0])
        if spelling == "j":
            return pad + json.dumps(numbers) + pad
        return "".join(f"{pad}{number!r}{pad}," for number in numbers)

    starts, ends = [start for start, _ in regions], [end for _, end in regions]
    assert parse(spell(starts), spell(ends), duration_s=max(ends), alias=alias) == regions


texts = st.text(max_size=20) | st.text('0123456789.,-+eE[]" \tinfatynrul_', max_size=30) | st.none()


@given(start=texts, end=texts, duration_s=st.floats(0.001, 400))
@example(start="[" * 5000, end="1", duration_s=1)
@example(start="1" + "0" * 5000, end="[1" + "0" * 5000 + "]", duration_s=1)
@example(start="1e-400", end="1e400", duration_s=1)
@example(start="\ud800", end='["\ud800"]', duration_s=1)
@example(start='["a"]', end="[{}]", duration_s=1)
@example(start="[[1]]", end="[[2]]", duration_s=3)
def test_any_text_is_parsed_or_refused_by_name(start: str | None, end: str | None, duration_s: float) -> None:
    caught: InvalidRequestError | None = None
    regions: Regions = []
    try:
        regions = parse(start, end, duration_s=duration_s)
    except InvalidRequestError as error:
        caught = error
    if caught is None:
        assert regions
    else:
        assert caught.field in (START, END)
        assert caught.field in caught.message
        assert len(caught.message) < 300
    for begin, stop in regions:
        assert math.isfinite(begin)
        assert 0 <= begin < stop <= duration_s


@pytest.mark.parametrize("count", [101, 50_000])
def test_too_many_regions_are_refused_by_name(count: int) -> None:
    for text in (json.dumps(list(range(count))), ",".join(map(str, range(count)))):
        with pytest.raises(InvalidRequestError, match=f"{START} must not have more than 100 entries"):
            parse(text, text)
