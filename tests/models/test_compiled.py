"""Models with layers compiled by `torch.compile`: equal results, few compilations, and errors if it cannot be used."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import GenerationRequest, Lora
from stable_audio_serve.core.settings import ModelSettings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models import native
from stable_audio_serve.models.adapters.base import Base
from stable_audio_serve.models.blocks.fused import FusedModule
from stable_audio_serve.models.compiled import compile_layers
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.native import NativeModel
from stable_audio_serve.models.protocol import BranchConditioning, DiffusionModel, StepBatch
from stable_audio_serve.models.registry import resolve_entry
from tests.adapter_files import LAYER, write_file
from tests.goldens import load_goldens, load_open_goldens
from tests.models.forwarding import ForwardingModel

FOLDERS = {"sharp-s": load_goldens, "tiny-1.0": load_open_goldens}
TRACED = "eager"  # a backend of torch.compile that traces the layers but compiles nothing


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # set before deleting, so that monkeypatch restores the variable in any case
        monkeypatch.delenv(name)
    yield
    torch._dynamo.reset()


def load(name: str) -> DiffusionModel:
    return load_model(resolve_entry("mine", path=str(FOLDERS[name](name).folder)))


def branches(model: DiffusionModel, *, seconds: float) -> tuple[int, list[BranchConditioning]]:
    """Returns a clip's number of frames and three conditionings: with a prompt, without one, and for inpainting."""
    request = GenerationRequest(prompt="a bell", duration_s=seconds, seed=0, cfg_scale=2.0, steps=2)
    plan = model.plan(request)[0]
    prompt = model.encode_text(["a bell"])[0]
    row = model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None)
    assert row.unconditional is not None
    source = torch.ones(model.spec.card.latent_channels, plan.frames)
    masked = replace(plan, keep_mask=torch.ones(plan.frames))
    kept = model.condition(masked, prompt=prompt, negative=None, inpaint_latents=source)
    return plan.frames, [row.conditional, row.unconditional, kept.conditional]


def run(model: DiffusionModel, own: list[BranchConditioning], *, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(own))
    x = torch.randn(len(own), model.spec.card.latent_channels, frames, generator=generator)
    valid = torch.arange(frames).expand(len(own), frames) < frames - 1
    return model.denoise(StepBatch.of(x, t=torch.full((len(own),), 0.6), valid=valid, branches=own))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_compiled_calls_equal_plain_ones(name: str, tmp_path: Path) -> None:
    plain, model = load(name), compile_layers(load(name), folder=tmp_path / "kernels", backend=TRACED)
    assert model.spec.is_compiled
    for seconds in (0.5, 0.9):
        frames, (with_prompt, without, inpainting) = branches(plain, seconds=seconds)
        for own in ([with_prompt], [inpainting], [with_prompt] * 2, [with_prompt, without, inpainting]):
            expected, actual = run(plain, own, frames=frames), run(model, own, frames=frames)
            torch.testing.assert_close(actual[..., :-1], expected[..., :-1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_layers_and_lengths_share_a_compilation(tmp_path: Path) -> None:
    counted: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        counted.append(graph)
        return graph.forward

    model = compile_layers(load("sharp-s"), folder=tmp_path, backend=count)  # type: ignore[arg-type]
    counted.clear()
    for seconds in (0.5, 0.7, 0.9):
        frames, (with_prompt, *_) = branches(model, seconds=seconds)
        for num_rows in (1, 2, 3):
            run(model, [with_prompt] * num_rows, frames=frames)
    # One compilation for a single row and one for any number of rows, each for the first layer, which gets no update of
    # a layer before, and for all other layers.
    assert len(counted) == 4


@pytest.mark.server
def test_a_compiled_model_is_refused_in_strict_mode(tmp_path: Path) -> None:
    model = compile_layers(load("tiny-1.0"), folder=tmp_path, backend=TRACED)
    with pytest.raises(ConfigError, match="compile cannot be used in strict mode"):
        Engine(model)


@pytest.mark.slow
def test_an_engine_serves_a_compiled_model_in_fast_mode(tmp_path: Path) -> None:
    model = compile_layers(load("sharp-s"), folder=tmp_path, backend=TRACED)

    layer = next(layer for name, layer in Base("sharp-s", model.adaptable).layers.items() if name == LAYER)
    write_file(tmp_path / "vinyl.safetensors", shape=tuple(layer.weight.shape))
    adapted = (Lora("vinyl", source=str(tmp_path / "vinyl.safetensors")),)

    async def generate(served: DiffusionModel) -> list[Tensor]:
        # With a memory limit, as on a GPU, the engine first measures how much memory the model's calls need.
        options = EngineOptions(mode="fast", warmup_budget_s=0.1, max_memory_bytes=2 * 10**9)
        async with Engine(served, options) as engine:
            request = GenerationRequest(prompt="a bell", duration_s=0.5, seed=3, batch_size=2)
            asked = [request, replace(request, loras=adapted), request]
            return [torch.from_numpy((await engine.generate(each)).audio[1]) for each in asked]

    found, expected = asyncio.run(generate(model)), asyncio.run(generate(load("sharp-s")))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_compiled_model_uses_no_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_kernels", lambda *_: object())
    model = load("sharp-s")
    assert isinstance(model, NativeModel)
    for is_compiled in (False, True):
        if is_compiled:
            compile_layers(model, folder=tmp_path, backend=TRACED)
        model.use_features(fast_decoding=False, fused_kernels=True)
        fused = [part for part in model.denoiser.modules() if isinstance(part, FusedModule)]
        assert all((part.kernels is None) == is_compiled for part in fused)
        assert model.spec.has_fused_kernels != is_compiled


def test_compiled_kernels_are_stored_in_a_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "kernels"
    compile_layers(load("sharp-s"), folder=folder, backend=TRACED)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"compile: .* belongs to or can be changed"):
        compile_layers(load("sharp-s"), folder=folder, backend=TRACED)
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="every user can write to"):
        compile_layers(load("sharp-s"), folder=folder, backend=TRACED)


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    without = {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    with (
        torch._inductor.config.patch(without),
        pytest.raises(ConfigError, match=r"compile cannot be used on cpu: .*no-such-compiler"),
    ):
        compile_layers(load("sharp-s"), folder=tmp_path)


def test_a_failing_compiler_is_named(tmp_path: Path) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("no such compiler")

    with pytest.raises(ConfigError, match=r"compile cannot be used on cpu: .*no such compiler"):
        compile_layers(load("tiny-1.0"), folder=tmp_path, backend=fail)  # type: ignore[arg-type]


def test_a_model_of_another_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backend: native"):
        compile_layers(ForwardingModel(load("sharp-s")), folder=tmp_path)


@pytest.mark.parametrize("other", [{"mode": "strict"}, {"backend": "stable_audio_tools"}])
def test_settings_that_exclude_each_other_are_refused(other: dict[str, Any]) -> None:
    assert not ModelSettings(name="demo").compile
    with pytest.raises(ValueError, match="compile"):
        ModelSettings(name="demo", compile=True, **other)


@pytest.mark.slow
@pytest.mark.server
def test_compiled_kernels_are_stored_on_this_machine(tmp_path: Path) -> None:
    try:
        compile_layers(load("sharp-s"), folder=tmp_path)  # without `backend`, to use the real compiler
    except ConfigError as error:
        pytest.skip(str(error))
    assert any(tmp_path.rglob("*.so"))
