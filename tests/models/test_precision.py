"""The precisions of a decoder's matrix products: which ones a device allows, and how close each is to float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models import precision
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.onednn import linear
from stable_audio_serve.models.precision import resolve_decode_precision
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, StepBatch
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Components, Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.oobleck import NormedConv
from stable_audio_serve.models.switches import float32_products, tf32_products
from stable_audio_serve.sampling.noise import SeededNoise
from tests.goldens import load_goldens, load_open_goldens
from tests.models.loaded import loaded
from tests.models.precisions import LEAST_DB, noise_ratio_db
from tests.parameters import slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Around = Callable[[], AbstractContextManager[Any]]


resolve = partial(resolve_decode_precision, dtype=torch.float32)


def test_each_device_has_a_default_and_refuses_other_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(CPU, None) == "float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert resolve(CUDA, None) == "tf32"
    assert resolve_decode_precision(CUDA, None, dtype=torch.float16) == "half"
    assert resolve_decode_precision(CPU, None, dtype=torch.bfloat16) == "float32"
    assert resolve(CUDA, "half") == "half"
    with pytest.raises(ConfigError, match="decode_precision 'tf32' cannot be used on this processor"):
        resolve(CPU, "tf32")
    with pytest.raises(ConfigError, match=r"'float8' is unknown; on cuda:0; allowed: float32, tf32, half"):
        resolve(CUDA, "float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert resolve(CUDA, None) == "float32"
    with pytest.raises(ConfigError, match="allowed: float32, half"):
        resolve(CUDA, "tf32")


@pytest.mark.parametrize(
    ("is_native", "expected"),
    [(False, "which has no bfloat16; allowed: float32"), (True, "this processor; allowed: float32, half")],
)
def test_a_processor_offers_precisions_that_its_bfloat16_speeds_up(
    is_native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: is_native)
    with pytest.raises(ConfigError, match=f"{expected}$"):
        resolve(CPU, "tf32")
    for choice in expected.split("allowed: ")[1].split(", "):
        assert resolve(CPU, choice) == choice


def test_the_loader_uses_the_setting() -> None:
    entry = resolve_entry("mine", path=str(load_goldens("tiny-s").folder))
    with pytest.raises(ConfigError, match="decode_precision 'tf32'"):
        load_model(entry, decode_precision="tf32")


def model_in(choice: Any, name: str = "tiny-s") -> Sa3Model:
    """Returns the checkpoint `name` as a model whose decoder uses the precision `choice`."""
    model = loaded(name)
    parts = Sa3Components(
        text=model.text,
        prompt=model.prompt,
        numbers=model.numbers,
        denoiser=model.denoiser,
        autoencoder=deepcopy(model.autoencoder),  # a model in half precision stores the decoder in it
    )
    return Sa3Model(parts, config=model.config, spec=model.spec, device=model.device, decode_precision=choice)


def switches() -> list[object]:
    """Returns whether torch may use TF32, by its older settings and, if they exist, the settings added in torch 2.9."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    values: list[object] = [matmul.allow_tf32, cudnn.allow_tf32]
    if hasattr(cudnn, "conv"):
        values += [chosen == "tf32" for chosen in (matmul.fp32_precision, cudnn.conv.fp32_precision)]
    return values


@contextmanager
def watching(modules: dict[str, nn.Module], seen: dict[str, list[object]]) -> Iterator[None]:
    """Within this context, each call of a module stores torch's TF32 settings in `seen` under the module's name."""

    def note(name: str, *_: object) -> None:
        seen[name] = switches()

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_every_network(model: Sa3Model) -> None:
    """Call each of the model's networks once."""
    goldens = load_goldens("tiny-s").tensors
    prompt = model.encode_text(["a bell"])[0]
    noise = SeededNoise(0)
    samples = torch.zeros(model.spec.card.channels, 2 * model.spec.hop)
    model.encode_audio([EncodeWindow(samples, 0, "init", noise)])
    plan = model.plan(request())[0]
    branch = model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None).conditional
    x = torch.zeros(1, model.spec.card.latent_channels, plan.frames)
    valid = torch.ones(1, plan.frames, dtype=torch.bool)
    model.denoise(StepBatch.of(x, t=torch.ones(1), valid=valid, branches=[branch]))
    model.decode([DecodeWindow(goldens["ae/latents"][0], 0, noise)])


def request() -> GenerationRequest:
    return GenerationRequest(prompt="a bell", duration_s=1.0, seed=0)


def test_only_the_decoder_uses_tf32() -> None:
    model, seen = model_in("tf32"), dict[str, list[object]]()
    parts: dict[str, Any] = {
        "decoder": model.autoencoder.decoder,
        "encoder": model.autoencoder.encoder,
        "denoiser": model.denoiser,
        "text": model.text.encoder,
        "prompt": model.prompt,
    }
    before = switches()
    with watching(parts, seen):
        run_every_network(model)
    assert all(seen.pop("decoder"))
    assert len(seen) == len(parts) - 1
    assert not any(any(values) for values in seen.values())
    assert switches() == before


def test_products_are_exact_after_a_failed_decode() -> None:
    model, before = model_in("tf32"), switches()
    with suppress(RuntimeError):
        model.decode([DecodeWindow(torch.zeros(3, 4), 0, SeededNoise(0))])
    assert switches() == before


def test_exact_calls_of_other_threads_never_see_a_changed_switch() -> None:
    before = switches()
    met: list[list[object]] = []
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            with float32_products(CUDA):
                met.append(switches())

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with tf32_products():
            assert switches() != before
    done.set()
    for thread in threads:
        thread.join()
    assert met
    assert all(values == before for values in met)


NUM_FACTORS = {F.linear: 2, F.conv1d: 2, F.conv_transpose1d: 2, F.scaled_dot_product_attention: 3}


class RoundedFactors(TorchFunctionMode):
    """Emulates TF32: the inputs of matrix products, convolutions and attention are rounded to 10 mantissa bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = NUM_FACTORS.get(F.linear if func is linear else func, 0)
        return func(*map(round_to_tf32, args[:count]), *args[count:], **(kwargs or {}))


def round_to_tf32(x: Tensor) -> Tensor:
    """Round each value to 10 mantissa bits (float32 has 23), to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


AROUND: dict[str, Around] = {
    "tf32": RoundedFactors,
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


@torch.inference_mode()
def decoded_db(name: str, around: Around) -> float:
    """Decode stored latents within the context `around`. Returns the signal-to-error ratio (dB) against float32."""
    net, latents = loaded(name).autoencoder, load_goldens(name).tensors["ae/latents"]
    audio = net.decode(latents, products=around)
    assert audio.dtype == torch.float32
    assert bool(audio.isfinite().all())
    return noise_ratio_db(audio, net.decode(latents))


@pytest.mark.parametrize("name", [slow("sharp-s"), "sharp-l"])
@pytest.mark.parametrize("kind", AROUND)
def test_decoded_audio_is_close_to_float32(name: str, kind: str) -> None:
    assert decoded_db(name, AROUND[kind]) >= LEAST_DB[kind][name]


@torch.inference_mode()
def test_half_stores_only_the_decoders_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    entry = resolve_entry("mine", path=str(load_goldens("sharp-s").folder))
    model = load_model(entry, decode_precision="half")
    assert isinstance(model, Sa3Model)
    parts: dict[str, Any] = dict(model.autoencoder.named_children())
    stored = {part.weight.dtype for part in parts["decoder"].modules() if isinstance(part, nn.Linear)}
    assert stored == {torch.bfloat16}
    for kept in (parts["encoder"], model.denoiser, model.prompt):
        assert {parameter.dtype for parameter in kept.parameters()} == {torch.float32}
    window = DecodeWindow(load_goldens("sharp-s").tensors["ae/latents"][0], 0, SeededNoise(0))
    assert torch.equal(model.decode([window])[0], model_in("half", "sharp-s").decode([window])[0])


@torch.inference_mode()
def test_half_stores_the_convolutions_of_an_open_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: True)
    entry = resolve_entry("mine", path=str(load_open_goldens("tiny-1.0").folder))
    model, exact = (load_model(entry, decode_precision=choice) for choice in ("half", "float32"))
    assert isinstance(model, SaoModel)
    assert isinstance(exact, SaoModel)
    kernels = [part.weight for part in model.autoencoder.decoder.modules() if isinstance(part, NormedConv)]
    assert {kernel.dtype for kernel in kernels if kernel is not None} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.autoencoder.encoder.parameters()} == {torch.float32}
    latents = torch.randn(8, 9, generator=torch.Generator().manual_seed(1))
    (audio,) = model.decode([DecodeWindow(latents, 0, SeededNoise(0))])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # without autocast's cache of weights
        assert torch.equal(audio, exact.autoencoder.decode(latents[None])[0].float())
