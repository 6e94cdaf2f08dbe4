"""In strict mode, the audio does not depend on the number of threads. Tested with tiny and with full-width layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import official_config
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Loaded
from stable_audio_serve.engine import Engine, EngineOptions, provenance
from stable_audio_serve.engine.hardware.threads import steady_threads
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.registry import BUILT_IN, complete_card
from stable_audio_serve.models.sa3.build import build_components, build_spec
from stable_audio_serve.models.sa3.config import parse_config
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.weights import cast_network
from tests.factories import make_audio, make_request
from tests.goldens import SHARP, TINY
from tests.models.loaded import loaded
from tests.parameters import slow

THREADS = (1, 2, 4)
steady = pytest.mark.skipif(
    provenance.depends_on_threads(8), reason="large products depend on the threads here: recipes name their number"
)
PRECISIONS = (torch.float32, torch.bfloat16)


def make_requests(sample_rate_hz: int) -> dict[str, GenerationRequest]:
    """Returns requests by name: plain, with each kind of guidance, with a source file, and with inpainting."""
    source = make_audio(1.0, sample_rate_hz=sample_rate_hz)
    region = {"inpaint_audio": source, "inpaint_regions_s": ((0.2, 0.6),)}
    fields: dict[str, dict[str, Any]] = {
        "plain": {},
        "guided": {"cfg_scale": 4.0, "negative_prompt": "noise", "batch_size": 2},
        "plainly guided": {"cfg_scale": 3.0, "apg_scale": 0.0, "cfg_rescale": 0.5, "sampler": "euler"},
        "guided within a bound": {"cfg_scale": 6.0, "cfg_norm_threshold": 2.0, "sampler": "dpmpp", "duration_s": 2.3},
        "variation": {"init_audio": source, "init_noise_level": 0.6},
        "inpainting": {"cfg_scale": 2.0, **region},
    }
    common = {"duration_s": 1.0, "steps": 2}
    return {name: make_request(**(common | changed)) for name, changed in fields.items()}


async def generate(
    model: Sa3Model, requests: Mapping[str, GenerationRequest], *, num_threads: int
) -> dict[str, GenerationResult]:
    options = EngineOptions(mode="strict", torch_threads=num_threads, warmup_budget_s=0.0)
    async with Engine(model, options) as engine:
        return {name: await engine.generate(request) for name, request in requests.items()}


@cache
def make_wide_model() -> Sa3Model:
    """Returns a model with one layer of each kind, as wide as in small-music, and a tiny text encoder."""
    raw = official_config("small-music")
    networks = raw["model"]
    networks["diffusion"]["config"]["depth"] = 1
    for part in ("encoder", "decoder"):
        networks["pretransform"]["config"][part]["config"]["transformer_depths"] = [1]
    reader, entry = ConfigReader(raw), BUILT_IN["small-music"]
    config = parse_config(reader)
    torch.manual_seed(0)
    with torch.no_grad():
        components = build_components(config, loaded("tiny-s").text)
    for module in components.modules:
        module.eval().requires_grad_(False)
    spec = build_spec(complete_card(entry.card, reader, cap_s=entry.cap_s), config, components=components)
    return Sa3Model(components, config=config, spec=spec, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("wide", marks=steady),
        pytest.param("wide, other requests", marks=[steady, pytest.mark.slow]),
        *map(slow, (*SHARP, *TINY)),
    ],
)
@pytest.mark.server
async def test_the_number_of_threads_changes_no_byte(name: str) -> None:
    model = make_wide_model() if name.startswith("wide") else loaded(name)
    requests = make_requests(model.spec.card.sample_rate_hz)
    if name.startswith("wide"):  # the wide model is slow, so it gets fewer and smaller requests
        names = ("inpainting",) if name == "wide" else ("plain", "guided")
        requests = {kind: replace(requests[kind], duration_padding_s=1.0, batch_size=1) for kind in names}
    await _check_threads(model, requests)


@steady
@pytest.mark.slow
async def test_the_number_of_threads_changes_no_byte_in_bfloat16() -> None:
    model = make_wide_model.__wrapped__()
    cast_network(model.denoiser, torch.bfloat16)
    request = replace(make_requests(model.spec.card.sample_rate_hz)["guided"], duration_padding_s=1.0, batch_size=1)
    await _check_threads(model, {"guided": request})


async def _check_threads(model: Sa3Model, requests: Mapping[str, GenerationRequest]) -> None:
    alone = await generate(model, requests, num_threads=THREADS[0])
    for num_threads in THREADS[1:]:
        shared = await generate(model, requests, num_threads=num_threads)
        for kind, expected in alone.items():
            for audio, one in zip(shared[kind].audio, expected.audio, strict=True):
                assert np.abs(one).max() > 1e-4
                np.testing.assert_array_equal(audio, one, err_msg=f"{kind} on {num_threads} threads")


@pytest.mark.parametrize(
    ("is_made_by_amd", "capability", "num_threads", "named"),
    [
        *[(True, "AVX2", 3, None), (True, "AVX2", 26, 26), (True, "AVX512", 26, None)],
        *[(True, "DEFAULT", 3, 3), (False, "AVX2", 3, 3)],
    ],
)
def test_a_recipe_names_the_threads_if_bytes_depend_on_them(
    monkeypatch: pytest.MonkeyPatch, *, is_made_by_amd: bool, capability: str, num_threads: int, named: int | None
) -> None:
    monkeypatch.setattr(provenance, "is_amd", lambda: is_made_by_amd)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, options = loaded("tiny-s"), EngineOptions(mode="strict", torch_threads=num_threads)
    described = provenance.describe_engine(
        model.spec, options, device=model.device, mode="strict", loaded=Loaded(), profile="plain"
    )
    assert described.threads == named


def test_a_recipe_names_the_design_of_an_arm_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two designs may have the same instruction sets, but the matrix libraries choose other kernels for each."""
    names = []
    for design in ([], ["0xd0b"], ["0xd0c"]):
        monkeypatch.setattr(provenance, "arm_design", lambda design=design: design)
        names.append(provenance.name_processor(torch.device("cpu")))
    assert names == [names[0], f"{names[0]} 0xd0b", f"{names[0]} 0xd0c"]


def long_form(values: Iterable[tuple[Any, ...]], *, short: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Returns the test parameters `values`. Parameters that are not in `short` are marked slow."""
    return [value if value in short else slow(*value) for value in values]


ROWS = (1, 5, 63, 64, 65, 139, 257, 431)
WIDTHS = ((1024, 1024), (1024, 8192), (4096, 1024), (768, 6144), (72, 72), (16, 24))
FEW_PRODUCTS = [(1, (1024, 1024)), (65, (1024, 8192)), (431, (4096, 1024)), (139, (72, 72))]
QUERIES = (1, 3, 17, 31, 32, 33, 64, 139, 257)


@steady
@pytest.mark.parametrize(("rows", "widths"), long_form(product(ROWS, WIDTHS), short=FEW_PRODUCTS))
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_products_are_the_same_on_any_number_of_threads(rows: int, widths: tuple[int, int], dtype: torch.dtype) -> None:
    width, out = widths
    x, weight = torch.randn(1, rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    with torch.inference_mode():
        results = [_within(num_threads, lambda: F.linear(x, weight)) for num_threads in (1, 2, 3, 4, 8)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("queries", "is_masked"), long_form(product(QUERIES, (False, True)), short=[(1, False), (33, True), (257, False)])
)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_attention_is_the_same_on_any_number_of_threads(queries: int, is_masked: bool, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 12, queries, 64, dtype=dtype), torch.randn(2, 12, 271, 64, dtype=dtype)
    mask = torch.rand(2, 1, 1, 271) > 0.2 if is_masked else None
    with torch.inference_mode():
        results = [
            _within(num_threads, lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))
            for num_threads in (1, 2, 3, 4, 8)
        ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows", [87, 173])
@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, torch.sum, torch.mean, F.gelu, torch.tanh])
def test_thread_dependent_operations_run_on_one_thread(rows: int, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(rows, 4097)
    with torch.inference_mode():
        one, three = (_within(num_threads, lambda: function(x)) for num_threads in (1, 3))
    torch.testing.assert_close(three, one, rtol=0, atol=0)


async def test_large_products_run_on_several_threads() -> None:
    """Records torch's number of threads during each operation of a linear layer, an attention and an activation."""
    counts: dict[str, set[int]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            counts.setdefault(func.overloadpacket.__name__, set()).add(torch.get_num_threads())
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(128, 1024), torch.randn(1024, 1024)
    query, key, value = torch.randn(3, 1, 4, 64, 32)
    with torch.inference_mode(), steady_threads(3), Watch():
        F.scaled_dot_product_attention(query, key, value)
        F.silu(F.linear(x, weight))
    products = {name for name in counts if name in ("linear", "addmm", "mm")}
    assert products
    assert all(3 in counts[name] for name in products)
    assert counts["silu"] == {1}


def _within(num_threads: int, compute: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    try:
        with steady_threads(num_threads):
            return compute()
    finally:
        torch.set_num_threads(before)
