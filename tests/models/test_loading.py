"""Checkpoint folders that cannot be used are refused. The message is one sentence that names the file or key."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import CheckpointError, ConfigError, InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models import families
from stable_audio_serve.models.families import load_model, resolve_device
from stable_audio_serve.models.registry import ModelEntry, describe_entry, resolve_entry
from stable_audio_serve.models.sa3 import build
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.weight_sizes import weight_bytes
from stable_audio_serve.models.weights import cast_network, load_weights, resolve_dtype
from tests.goldens import load_goldens
from tests.models.loaded import assert_near, loaded

GAMMA = "model.model.transformer.layers.0.pre_norm.gamma"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Yields a copy of a checkpoint's folder, which the test may damage."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    source = load_goldens("sharp-s").folder
    for part in ("model_config.json", "model.safetensors"):
        shutil.copy(source / part, copy / part)
    shutil.copytree(source / "t5gemma", copy / "t5gemma")
    return copy


@pytest.fixture
def _text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a text encoder that is loaded already, in tests of other parts."""
    text = loaded("sharp-s").text
    monkeypatch.setattr(build, "load_text_encoder", lambda *args, **kwargs: text)


with_loaded_text_encoder = pytest.mark.usefixtures("_text_encoder")


def load(folder: Path) -> Sa3Model:
    model = load_model(ModelEntry(ModelCard("spoilt", "stable-audio-3"), folder=str(folder)))
    assert isinstance(model, Sa3Model)
    return model


def failure(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def configure(folder: Path, path: str, value: Any) -> None:
    """Set the value at the dotted `path` in model_config.json. The value `...` (Ellipsis) removes the key."""
    file = folder / "model_config.json"
    config = json.loads(file.read_text())
    *parents, key = path.split(".")
    place = config
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    file.write_text(json.dumps(config))


@with_loaded_text_encoder
def test_missing_key(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(GAMMA))
    assert f"{GAMMA} is missing" in failure(folder)


@with_loaded_text_encoder
def test_unknown_keys_are_counted(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update(a_stranger=torch.zeros(1), b_stranger=torch.zeros(1)))
    assert "a_stranger (and 1 more) does not belong" in failure(folder)


@with_loaded_text_encoder
def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({GAMMA: torch.zeros(71)}))
    assert f"{GAMMA} has shape [71], the network needs [72]" in failure(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e8m0fnu])
@with_loaded_text_encoder
def test_weights_that_are_no_plain_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: weights.update({GAMMA: torch.ones(72, dtype=torch.float32).to(dtype)}))
    assert f"{GAMMA} holds {dtype}" in failure(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@with_loaded_text_encoder
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    rewrite(folder, lambda weights: weights[GAMMA][-1:].fill_(value))
    assert f"{GAMMA} holds values that are not finite" in failure(folder)


@pytest.mark.parametrize("size", [0, 4, 1000, 200_000])
@with_loaded_text_encoder
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "corrupt or incomplete" in failure(folder)


@with_loaded_text_encoder
def test_garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    assert "corrupt or incomplete" in failure(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "expected model.safetensors" in failure(folder)


def test_weights_in_shards_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "holds weights in shards, which are not read: join them into one file" in failure(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@with_loaded_text_encoder
def test_weights_of_any_precision_load_as_float32(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: weights.update({key: value.to(dtype) for key, value in weights.items()}))
    weight = load(folder).autoencoder.bottleneck.scaling_factor
    assert weight.dtype == torch.float32
    expected = loaded("sharp-s").autoencoder.bottleneck.scaling_factor.to(dtype).float()
    assert torch.equal(weight, expected)


@with_loaded_text_encoder
def test_pickles_of_tensors_load(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save({"state_dict": load_file(path), "epoch": 3}, folder / "model.ckpt")
    path.unlink()
    model = load(folder)
    assert torch.equal(model.denoiser.transformer.memory_tokens, loaded("sharp-s").denoiser.transformer.memory_tokens)


def as_pickle(folder: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None) -> Path:
    """Replace the weights by a pickle of them, changed. Return its path."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    change(weights)
    torch.save({"state_dict": weights}, folder / "model.ckpt")
    return folder / "model.ckpt"


@with_loaded_text_encoder
def test_expanded_tensors_in_a_pickle_load(folder: Path) -> None:
    """Their values take less memory than their shape suggests, and pages of other memory must not be released."""
    key = "model.model.transformer.layers.0.ff.ff.0.proj.weight"

    def expand(weights: dict[str, torch.Tensor]) -> None:
        weights[key] = torch.full((1,), 0.01, dtype=weights[key].dtype).expand(weights[key].shape)

    as_pickle(folder, expand)
    for _ in range(3):
        assert load(folder).denoiser.state_dict()[key.removeprefix("model.model.")].eq(0.01).all()


@with_loaded_text_encoder
def test_compressed_pickles_are_refused(folder: Path) -> None:
    """Torch would map the compressed bytes as numbers."""
    path = as_pickle(folder)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, content) in enumerate(members.items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if number == 5 else zipfile.ZIP_STORED)
    assert "model.ckpt is a compressed archive" in failure(folder)


@pytest.mark.parametrize(
    "state",
    [
        [torch.zeros(2)],
        {1: torch.zeros(2)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
    ],
)
@with_loaded_text_encoder
def test_pickles_of_other_things_than_dense_tensors_are_refused(folder: Path, state: object) -> None:
    torch.save(state, as_pickle(folder))
    assert "does not hold a state_dict of tensors" in failure(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            load_weights({"": torch.nn.Linear(8, 8)}, path, device=torch.device("cpu"))
        assert "\n" not in caught.value.message


class _Trap:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


@with_loaded_text_encoder
def test_pickles_with_code_are_refused_without_running_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": _Trap()}, folder / "model.ckpt")
    assert "convert it to safetensors" in failure(folder)
    (folder / "model.ckpt").write_bytes(pickle.dumps(_Trap(), protocol=2))
    assert "model.ckpt" in failure(folder)
    assert not (tmp_path / "trap-was-sprung").exists()


@with_loaded_text_encoder
def test_raw_training_checkpoints_are_refused(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"diffusion.model.model.x": torch.zeros(1)}))
    assert "raw training checkpoint" in failure(folder)


def test_no_folder(tmp_path: Path) -> None:
    assert "model_config.json" in failure(tmp_path / "nowhere")


def test_a_snapshot_that_was_copied_without_its_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_config.json").symlink_to("../../blobs/0123")
    assert "is a link to a file that does not exist" in failure(tmp_path)


def test_text_encoder_next_to_the_weights_is_found_by_its_name(folder: Path) -> None:
    configure(folder, "model.conditioning.configs.0.config.model_path", ...)
    (folder / "t5gemma").rename(folder / "t5gemma-b-b-ul2")
    assert load(folder).text.width == 768


def test_missing_text_encoder_names_the_places(folder: Path) -> None:
    shutil.rmtree(folder / "t5gemma")
    message = failure(folder)
    assert str(folder / "t5gemma") in message
    assert str(folder / "t5gemma-b-b-ul2") in message


def test_text_encoder_with_a_missing_weight_is_refused(folder: Path) -> None:
    path = folder / "t5gemma" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "encoder.norm.weight" in failure(folder)


NORM = "encoder.norm.weight"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (NORM, torch.full((768,), math.nan), "holds values that are not finite"),
        (NORM, torch.ones(5), "has shape [5], the network needs [768]"),
        (NORM, torch.ones(768, dtype=torch.int8), "holds torch.int8, not floating-point numbers"),
        (f"{NORM}_scale", torch.ones(1), "; use weights that are not quantized"),
    ],
)
def test_a_wrong_weight_of_a_text_encoder_is_refused_by_name(
    folder: Path, key: str, value: torch.Tensor, said: str
) -> None:
    path = folder / "t5gemma" / "model.safetensors"
    save_file(load_file(path) | {key: value}, path, metadata={"format": "pt"})
    message = failure(folder)
    assert key in message
    assert said in message


def test_indices_beside_the_weights_of_a_text_encoder_are_ignored(folder: Path) -> None:
    path = folder / "t5gemma" / "model.safetensors"
    save_file(load_file(path) | {"encoder.position_ids": torch.arange(8)}, path, metadata={"format": "pt"})
    assert load(folder).text.width == 768


@pytest.mark.parametrize("stated", ["float32", "float8_e4m3fn", None])
def test_a_text_encoder_in_float8_is_loaded(folder: Path, stated: str | None) -> None:
    path, config_path = folder / "t5gemma" / "model.safetensors", folder / "t5gemma" / "config.json"
    weights = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(path).items()}
    predicted = partial(weight_bytes, folder, text_encoder=path.parent, dtype=torch.float32)
    in_float32 = predicted()
    save_file(weights, path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"dtype": stated}))
    encoder = load(folder).text.encoder
    norm = encoder.norm.weight
    assert norm.dtype == torch.bfloat16
    assert torch.equal(norm.float(), weights[NORM].float())
    assert in_float32 - predicted() == sum(parameter.nbytes for parameter in encoder.parameters())


def test_a_text_encoder_without_weights_is_refused_before_its_size_is_read(folder: Path) -> None:
    (folder / "t5gemma" / "model.safetensors").unlink()
    entry = ModelEntry(ModelCard("spoilt", "stable-audio-3"), folder=str(folder))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(entry, check_size=lambda num_bytes: None)


def test_a_text_encoder_with_fewer_layers_than_weights_is_refused(folder: Path) -> None:
    path = folder / "t5gemma" / "config.json"
    config = json.loads(path.read_text())
    config["encoder"] |= {"num_hidden_layers": 1, "layer_types": config["encoder"]["layer_types"][:1]}
    path.write_text(json.dumps(config))
    assert "has weights that its config.json does not: " in failure(folder)


def test_a_tokenizer_that_does_not_fit_the_text_encoder_is_refused(folder: Path) -> None:
    path = folder / "t5gemma" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        tokenizer["model"]["vocab"] = {text: number + 10_000 for text, number in vocabulary.items()}
    else:
        tokenizer["model"]["vocab"] = [["filler", -99.0]] * 10_000 + vocabulary
    path.write_text(json.dumps(tokenizer))
    assert "t5gemma" in failure(folder)


@pytest.mark.parametrize("spoilt", ["tokenizer.json", "model.safetensors", "config.json"])
def test_corrupt_text_encoder_files(folder: Path, spoilt: str) -> None:
    (folder / "t5gemma" / spoilt).write_text("{}")
    assert "text encoder" in failure(folder)


@pytest.mark.parametrize(
    "content", ["null", "{}", "<html>", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "absent"}}']
)
def test_a_damaged_index_of_text_encoder_weights_is_named(folder: Path, content: str) -> None:
    (folder / "t5gemma" / "model.safetensors").unlink()
    (folder / "t5gemma" / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in failure(folder)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_text_encoder_weights_are_named(folder: Path, size: int) -> None:
    path = folder / "t5gemma" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is corrupt or incomplete" in failure(folder)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"version"', "<html>", "[" * 10_000])
def test_a_damaged_tokenizer_is_named(folder: Path, content: str) -> None:
    (folder / "t5gemma" / "tokenizer.json").write_text(content)
    message = failure(folder)
    assert f"{folder / 't5gemma' / 'tokenizer.json'}" in message
    assert message.endswith("; fetch it again")


def test_a_tokenizer_whose_package_panics_is_named(folder: Path) -> None:
    path = folder / "t5gemma" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "longer than the tokens"
    path.write_text(json.dumps(tokenizer))
    assert f"{path} is corrupt or incomplete" in failure(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"a"', "\ufeff{}"])
def test_a_damaged_file_beside_the_tokenizer_is_named(folder: Path, file: str, content: str) -> None:
    (folder / "t5gemma" / file).write_text(content)
    assert f"{folder / 't5gemma' / file} is corrupt or incomplete" in failure(folder)


@pytest.mark.parametrize("content", ["null", "[]", '{"model_type"', "<html>", "[" * 10_000])
def test_a_damaged_text_encoder_config_is_named(folder: Path, content: str) -> None:
    (folder / "t5gemma" / "config.json").write_text(content)
    message = failure(folder)
    assert f"{folder / 't5gemma' / 'config.json'} is corrupt or incomplete" in message
    assert message.endswith("; fetch it again")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 2**40, "num_hidden_layers must be at most 1024, found 1099511627776"),
        ("attn_logit_softcapping", math.nan, "encoder.attn_logit_softcapping must be a number, found NaN"),
        ("rms_norm_eps", -1.0, "makes values that are not finite"),
        ("rms_norm_eps", 0, "; check its config.json, tokenizer.json and"),  # transformers reads it, and wants 0.0
        ("head_dim", 7, "encoder.head_dim must be even, found 7"),
        ("head_dim", "wide", 'encoder.head_dim must be a number, found "wide"'),
        ("num_key_value_heads", 3, "encoder.num_key_value_heads must be a divisor of num_attention_heads (2), found 3"),
        ("hidden_activation", "mish", "encoder.hidden_activation must be one of relu, "),
        ("rope_parameters", {"rope_type": "yarn"}, 'encoder.rope_parameters.rope_type = "yarn" is not supported'),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config is not supported"),
    ],
)
def test_text_encoder_configs_that_cannot_be_run_are_refused(folder: Path, key: str, value: Any, said: str) -> None:
    path = folder / "t5gemma" / "config.json"
    config = json.loads(path.read_text())
    (config if key == "quantization_config" else config["encoder"])[key] = value
    path.write_text(json.dumps(config))
    assert said in failure(folder)


def test_a_padding_token_that_the_text_encoder_lacks_is_refused(folder: Path) -> None:
    path = folder / "t5gemma" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<unknown padding>"}))
    assert "makes token 96, but the text encoder knows 96" in failure(folder)


def test_a_prompt_with_a_token_that_the_text_encoder_lacks_is_refused(folder: Path) -> None:
    path = folder / "t5gemma" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<end of text>"}))
    model = load(folder)
    assert model.encode_text(["a tone"])
    with pytest.raises(InvalidRequestError, match=r"token 96 .*knows 96") as caught:
        model.encode_text(["a tone <end of text>"])
    assert caught.value.field == "prompt"


def test_text_encoder_inside_a_whole_encoder_decoder_model(folder: Path) -> None:
    """The folder of the official text encoder contains a whole encoder-decoder model. Only the encoder is loaded."""
    from transformers import AutoConfig, T5GemmaForConditionalGeneration

    target = folder / "t5gemma"
    config = AutoConfig.from_pretrained(target)
    config.is_encoder_decoder = True
    whole = T5GemmaForConditionalGeneration(config)
    whole.model.encoder.load_state_dict(loaded("sharp-s").text.encoder.state_dict())
    tokenizer = (target / "tokenizer.json").read_bytes(), (target / "tokenizer_config.json").read_bytes()
    whole.save_pretrained(target)
    (target / "tokenizer.json").write_bytes(tokenizer[0])
    (target / "tokenizer_config.json").write_bytes(tokenizer[1])
    prompts = ["dog barking", ""]
    for ours, expected in zip(load(folder).encode_text(prompts), loaded("sharp-s").encode_text(prompts), strict=True):
        assert_near(ours.tokens, expected.tokens, within=1e-6)


DIT = "model.diffusion.config"
DECODER = "model.pretransform.config.decoder.config"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "autoencoder"),
        ("model_type", ...),
        ("sample_rate", 0),
        ("sample_rate", "44100"),
        ("sample_rate", True),
        ("sample_size", ...),
        ("model.io_channels", 17),
        ("model.diffusion.diffusion_objective", "v"),
        ("model.diffusion.cross_attention_cond_ids", ["prompt", "bpm"]),
        ("model.diffusion.global_cond_ids", []),
        ("model.diffusion.local_add_cond_ids", ["no_such_input"]),
        ("model.diffusion.sampling_distribution_shift_options", {"type": "no-such"}),
        (f"{DIT}.embed_dim", 73),
        (f"{DIT}.num_heads", 4),
        (f"{DIT}.depth", -1),
        (f"{DIT}.depth", 2.5),
        (f"{DIT}.cond_token_dim", ...),
        (f"{DIT}.global_cond_type", "prepend"),
        (f"{DIT}.timestep_features_type", "learned"),
        (f"{DIT}.norm_type", ...),
        (f"{DIT}.patch_size", 2),
        (f"{DIT}.attn_kwargs.qk_norm", "l1"),
        (f"{DECODER}.strides", [4, 4]),
        (f"{DECODER}.strides", []),
        ("model.pretransform.config.encoder.config.strides", []),
        (f"{DECODER}.dim_heads", 7),
        (f"{DECODER}.dyt", False),
        (f"{DECODER}.chunk_size", 24),
        (f"{DECODER}.sliding_window", [1, 2]),
        (f"{DECODER}.sliding_window", [1, 1, 5]),
        (f"{DECODER}.sinusoidal_blocks", [1, 2]),
        ("model.pretransform.config.downsampling_ratio", 128),
        ("model.pretransform.config.io_channels", 1),
        ("model.pretransform.config.bottleneck.type", "vae"),
        ("model.pretransform.config.bottleneck.config.auto_scale", False),  # but noise_regularize is true
        ("model.pretransform.config.pretransform.type", "wavelet"),
        ("model.conditioning.configs.0.type", "clap"),
        ("model.conditioning.configs.0.config.padding_mode", "zero"),
        ("model.conditioning.configs.0.config.padding_mode", ...),  # "zero" in the reference implementation
        ("model.conditioning.configs.1.config.fourier_features_type", ...),
        ("model.conditioning.configs.1.config.max_val", 0),
        ("model.conditioning.configs.1.id", "bpm"),
        (f"{DIT}.depth", 10**9),
        (f"{DIT}.num_memory_tokens", 10**9),
        (f"{DECODER}.transformer_depths", [10**9]),
    ],
)
@with_loaded_text_encoder
def test_unusable_config_names_the_key(folder: Path, path: str, value: Any) -> None:
    configure(folder, path, value)
    message = failure(folder)
    assert path.rsplit(".", 1)[-1] in message


@with_loaded_text_encoder
def test_parts_that_do_not_fit_are_refused_when_loading(folder: Path) -> None:
    configure(folder, "model.pretransform.config.pretransform.config.channels", 4)
    assert "model.pretransform.config describes parts that do not fit each other" in failure(folder)


@with_loaded_text_encoder
def test_loading_disables_inexact_algorithms_and_cudnn_attention(folder: Path) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_config_that_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "model_config.json").write_text(text)
    assert "model_config.json" in failure(folder)


CPU_WITH_BFLOAT16 = "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 avx2\n"
CPU_WITHOUT = "processor\t: 0\nflags\t\t: fpu avx512f avx2\n"


def test_the_default_precision_depends_on_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_dtype(cpu, None) is torch.float32
    assert resolve_dtype(cuda, None) is torch.float16
    assert resolve_dtype(cuda, "bfloat16") is torch.bfloat16
    assert resolve_dtype(cpu, torch.float32) is torch.float32


def test_bfloat16_on_a_cpu_needs_a_processor_with_native_support(tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(CPU_WITH_BFLOAT16)
    assert resolve_dtype(torch.device("cpu"), "bfloat16", cpu_facts=facts) is torch.bfloat16
    facts.write_text(CPU_WITHOUT)
    with pytest.raises(ConfigError, match="bfloat16 cannot be used on this processor"):
        resolve_dtype(torch.device("cpu"), "bfloat16", cpu_facts=facts)


@pytest.mark.parametrize(
    ("device", "dtype", "named"),
    [
        ("cuda", "float8", "float8"),
        ("cpu", "float16", "float16 cannot be used on cpu: only float32 or bfloat16 can"),
        ("cpu", torch.float16, "float16 cannot be used on cpu"),
        ("mps", "bfloat16", "bfloat16 cannot be used on mps: only float32 can"),
    ],
)
def test_a_precision_that_a_device_lacks_is_refused_by_name(device: str, dtype: str | torch.dtype, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve_dtype(torch.device(device), dtype)


def test_a_missing_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tpu"):
        resolve_device("tpu")


@with_loaded_text_encoder
def test_a_norm_without_weights_is_not_expected_in_the_checkpoint(folder: Path) -> None:
    configure(folder, f"{DIT}.attn_kwargs.qk_norm", "l2")
    unused = re.compile(r"model\.model\..*\.[qk]_norm\.gamma")
    rewrite(folder, lambda weights: [weights.pop(key) for key in list(weights) if unused.fullmatch(key)])
    attention = load(folder).denoiser.transformer.layers[0].self_attn
    heads = torch.randn(5, attention.head_width, generator=torch.Generator().manual_seed(1))
    assert_near(attention.q_norm(heads), torch.nn.functional.normalize(heads, dim=-1), within=1e-6)


@with_loaded_text_encoder
def test_half_precision_denoiser_stays_near_the_float32_one(folder: Path) -> None:
    g, net = load_goldens("sharp-s").tensors, load(folder).denoiser
    cast_network(net, torch.bfloat16)
    assert net.transformer.rotary_pos_emb.inv_freq.dtype == torch.float32
    conditioning = net.condition(g["dit/cross_attn_cond"], g["dit/global_cond"], local=g["dit/local_add_cond"])
    out = net(g["dit/x"], g["dit/t"], conditioning=conditioning)
    assert out.dtype == torch.bfloat16
    relative = (out.float() - g["dit/out"]).norm() / g["dit/out"].norm()
    assert relative < 0.03


def test_the_spec_contains_the_entrys_facts(folder: Path) -> None:
    entry = resolve_entry("mine", path=str(folder), max_duration_s=5.0, duration_padding_s=0.5)
    spec = load_model(entry).spec
    assert (spec.card.name, spec.card.max_duration_s, spec.card.default_duration_padding_s) == ("mine", 5.0, 0.5)


def test_the_longest_clip_has_whole_latent_frames(folder: Path) -> None:
    configure(folder, "sample_size", 1000)
    entry = describe_entry(resolve_entry("mine", path=str(folder)))
    spec = load_model(entry).spec
    assert (spec.hop, spec.max_frames) == (64, 15)
    assert entry.card.max_duration_s == spec.card.max_duration_s == 15 * 64 / spec.card.sample_rate_hz


def test_a_downloaded_model_has_its_objectives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_goldens("sharp-l").folder  # its training objective is rectified flow
    monkeypatch.setattr(families, "download_entry", lambda entry, **options: base)
    card = load_model(resolve_entry("mine", repo_id="lab/base")).spec.card
    assert card == load_model(resolve_entry("mine", path=str(base))).spec.card
    assert (card.default_steps, card.default_cfg_scale) == (50, 7.0)


@pytest.mark.parametrize("value", [False, ...])
@with_loaded_text_encoder
def test_padding_is_masked_whatever_the_config_says(folder: Path, value: Any) -> None:
    for key in ("mask_padding_attention", "use_effective_length_for_schedule"):
        configure(folder, f"model.diffusion.{key}", value)
    request = GenerationRequest(prompt="rain", duration_s=0.5, seed=1, duration_padding_s=0.1)
    plan, usual = load(folder).plan(request)[0], loaded("sharp-s").plan(request)[0]
    assert (plan.frames, plan.valid_frames, plan.sampler) == (usual.frames, usual.valid_frames, usual.sampler)
    assert plan.valid_frames < plan.frames


def test_a_text_encoder_without_a_length_reads_128_tokens(folder: Path) -> None:
    configure(folder, "model.conditioning.configs.0.config.max_length", ...)
    assert load(folder).text.max_length == 128


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.diffusion.config.ff_kwargs.sinusoidal", True),
        ("model.diffusion.config.attn_kwargs.qk_norm_eps", 1e-5),
        ("model.pretransform.config.soft_clip", True),
        ("model.pretransform.config.decoder.config.soft_clip", True),
        ("model.pretransform.config.pretransform.config.oversampling", 2),
        ("sample_sizes", 5),
        ("model.invented", {"a": 1}),
        ("model.pretransform.latent_rate", 3),
        ("model.pretransform.config.encoder.config.resampler", "linear"),
        ("model.pretransform.config.bottleneck.config.temperature", 0.5),
        ("model.conditioning.configs.0.config.suffix", "!"),
        ("model.conditioning.configs.1.config.log_scale", True),
        ("model.diffusion.config.norm_kwargs.bias", True),
        ("model.diffusion.config.attn_kwargs.softcap", 50.0),
        ("model.conditioning.default_keys", {"seconds_total": "seconds_start"}),
        ("model.diffusion.input_concat_ids", ["seconds_total"]),
        ("model.diffusion.config.final_cross_attn_ix", 1),
        ("model.diffusion.config.attn_kwargs.feat_scale", True),
        ("model.pretransform.config.in_channels", 1),
        ("model.pretransform.config.decoder.soft_clip", True),
        ("model.pretransform.config.pretransform.config.postfilter_channels", 8),
    ],
)
@with_loaded_text_encoder
def test_keys_of_unsupported_models_are_refused_by_name(folder: Path, path: str, value: Any) -> None:
    (folder / "model_config.json").write_text(json.dumps(with_sections(folder, path)))
    configure(folder, path, value)
    named = path.replace("configs.0", "configs[0]").replace("configs.1", "configs[1]")
    assert f"model_config.json: {named} " in failure(folder)


def with_sections(folder: Path, path: str) -> Any:
    """Returns the folder's config. Adds empty objects where `path` leads to objects that do not exist."""
    config = json.loads((folder / "model_config.json").read_text())
    place = config
    for part in path.split(".")[:-1]:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sample_rate", 10**400),
        ("sample_size", 10**9),
        ("model.diffusion.config.ff_kwargs.mult", 1e308),
        ("model.diffusion.config.ff_kwargs.mult", 10**30),
        ("model.pretransform.config.encoder.config.chunk_size", 65_536),
        ("model.conditioning.configs.0.config.max_length", 65_536),
        ("model.conditioning.configs.0.config.model_path", "x" * 5000),
    ],
)
def test_sizes_that_no_model_has_are_refused_by_name(folder: Path, path: str, value: Any) -> None:
    (folder / "model_config.json").write_text(json.dumps(with_sections(folder, path)))
    configure(folder, path, value)
    name = path.replace(".0.", "[0].")
    assert f"{name} must be" in failure(folder)


@pytest.mark.parametrize("text", ['{"sample_rate": ' + "1" * 5000 + "}", '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_json_that_python_cannot_read_is_refused(folder: Path, text: str) -> None:
    (folder / "model_config.json").write_text(text)
    assert "model_config.json cannot be read as JSON" in failure(folder)


WITHOUT_EFFECT = [
    ("training", {"learning_rate": 1e-4, "demo": {"every": 1000}}),
    ("dataset", {"type": "dirs"}),
    ("model.pretransform.config.encoder.config.use_snake", True),
    ("model.pretransform.config.decoder.config.enable_inner_layer_dropout", True),
    ("model.pretransform.scale", 2.0),
    ("model.pretransform.config.encoder.config.extra", None),
    ("model.diffusion.config.attn_kwargs.dropout", 0.1),
    ("model.conditioning.default_keys", {"seconds_start": "seconds_total"}),
    ("model.conditioning.configs.0.config.repo_id", "lab/other"),
    ("model.diffusion.input_concat_ids", []),
    ("model.diffusion.prepend_cond_ids", []),
    ("model.diffusion.modular_local_cond_configs", []),
    ("model.diffusion.config.final_cross_attn_ix", -1),
    ("model.diffusion.config.cross_attn_rotary_pos_emb", False),
    ("model.diffusion.config.add_rope", False),
    ("model.diffusion.config.attn_kwargs.feat_scale", False),
    ("model.diffusion.config.ff_kwargs.conv_kernel_size", 3),
    ("model.diffusion.config.norm_kwargs.fix_scale", False),
    ("model.pretransform.config.in_channels", 2),
    ("model.pretransform.config.out_channels", 2),
    ("model.pretransform.config.decoder.soft_clip", False),
    ("model.pretransform.config.encoder.config.causal", True),  # the reference implementation ignores it
    ("model.pretransform.config.encoder.config.feat_scale", False),
    ("model.pretransform.config.decoder.config.mapping_bias", True),
    ("model.pretransform.config.decoder.config.cross_attn", False),
    ("model.pretransform.config.pretransform.config.postfilter_channels", 0),
]


def test_keys_without_effect_are_accepted(folder: Path) -> None:
    for path, value in WITHOUT_EFFECT:
        (folder / "model_config.json").write_text(json.dumps(with_sections(folder, path)))
        configure(folder, path, value)
    load(folder)
