"""Loads and runs the text encoder of a checkpoint: a tokenizer and a pretrained network, in one folder.

Each model family chooses the network and interprets its output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.models.checkpoint_files import damaged, encoder_weights
from stable_audio_serve.models.config_reader import MAX_DEPTH
from stable_audio_serve.models.protocol import PromptTokens
from stable_audio_serve.models.weight_files import read_weights, require_floats

# Called with a folder and the argument `dtype` of `from_pretrained`. Returns the network and the loading report of
# transformers (`output_loading_info`).
NetworkLoader = Callable[[Path, torch.dtype | Literal["auto"]], tuple[nn.Module, Mapping[str, Any]]]


# Prompts that are tokenized at load. The first one is padding. The second one is a character that no vocabulary has.
_TRIAL, _TRIAL_TOKENS = ("", "\ue000", "a bright tone, 440 Hz"), 16
_TRIAL_ENCODED = 2  # first tokens of the last prompt that are encoded at load: few, because a CPU can be slow
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# While a prompt is tokenized, the engine's clips wait, with some tokenizers for 5 s at 100,000 characters. A token of
# usual text has about 5 characters, but a tokenizer may leave out words, as the demo model's does.
_MIN_CHARS, _CHARS_PER_TOKEN = 8192, 32
_DEPTH_KEYS = ("num_layers", "num_hidden_layers")  # of a T5 and of a T5Gemma


class TextEncoder:
    """A tokenizer and an encoder with hidden states of size `width`. Not in the checkpoint's own weight file."""

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, width: int, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.width = width
        self.max_length = max_length

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Returns `max_length` tokens for each prompt, truncated or padded on the side that the tokenizer's files name.
        Characters after the first 8192 are ignored, or after `32 * max_length` if this is more.

        With T5Gemma, an empty prompt has no real token. With T5, it has one: the end of the text. Raises
        InvalidRequestError if a prompt has a token that the network lacks: tokenizers can have more tokens, which only
        unusual texts contain.
        """
        tokens = _tokenize(self.tokenizer, prompts, max_length=self.max_length)
        require_known(int(tokens.ids_and_mask[:, 0].max()), self.encoder)
        return tokens

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the encoder's hidden states (prompts, tokens, width) float32.

        Attention ignores padding tokens, and their hidden states are arbitrary. The host does not wait for the device.
        """
        dtype = next(self.encoder.parameters()).dtype
        # The mask has 4 axes. With a mask of 2 axes, transformers would check on the host whether there is padding, and
        # wait for the device. Padding gets the smallest finite number instead of minus infinity: for a prompt without
        # real tokens, minus infinity would give NaN.
        added = torch.zeros(len(mask), 1, 1, mask.shape[1], device=mask.device, dtype=dtype)
        added.masked_fill_(mask[:, None, None, :] == 0, torch.finfo(dtype).min)
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=added).last_hidden_state
        return hidden.float()


def _tokenize(tokenizer: Any, prompts: Sequence[str], *, max_length: int) -> PromptTokens:
    encoded = tokenizer(
        beginnings(prompts, max_length=max_length),
        truncation=True,
        max_length=max_length,
        padding="max_length",
        return_tensors="pt",
    )
    ids_and_mask = torch.stack((encoded["input_ids"], encoded["attention_mask"]), dim=1)
    return PromptTokens(ids_and_mask, chars_read(encoded, prompts, max_length=max_length))


def beginnings(prompts: Sequence[str], *, max_length: int) -> list[str]:
    """Returns the part of each prompt that is tokenized, if at most `max_length` tokens are used."""
    return [prompt[: _most_chars(max_length)] for prompt in prompts]


def _most_chars(max_length: int) -> int:
    return max(_MIN_CHARS, _CHARS_PER_TOKEN * max_length)


def _num_tokens(encoder: nn.Module) -> int:
    """Returns how many tokens the network knows. Token ids must be below this number."""
    num_tokens: int = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return num_tokens


def require_known(token: int, encoder: nn.Module) -> None:
    """Raise InvalidRequestError if `token`, the highest one of a prompt, is not one of the network's."""
    if token >= (known := _num_tokens(encoder)):
        message = f"the text has token {token} of the tokenizer, but the text encoder knows {known}"
        raise InvalidRequestError(message, field="prompt")


@contextmanager
def stating_width(text: TextEncoder, folder: Path) -> Iterator[None]:
    """Within this context, a CheckpointError about the projection of prompts also states the text encoder's width."""
    try:
        yield
    except CheckpointError as error:
        if ".proj_out." not in error.message:
            raise
        raise CheckpointError(f"{error.message}; the text encoder in {folder} has width {text.width}") from error


def chars_read(encoded: Any, prompts: Sequence[str], *, max_length: int) -> tuple[int | None, ...]:
    """Returns how many characters at the beginning of each prompt the tokens cover; None: all, or unknown.

    `encoded` is a tokenizer's result for the `beginnings`. Only tokenizers of the package `tokenizers` report the
    number.
    """
    most = _most_chars(max_length)
    cut = [most if len(prompt) > most else None for prompt in prompts]
    if not encoded.is_fast:
        return tuple(cut)
    return tuple(
        max(end for _, end in one.offsets) if one.overflowing else chars
        for one, chars in zip(encoded.encodings, cut, strict=True)
    )


def load_tokenizer_and_network(folder: Path, load_network: NetworkLoader) -> tuple[Any, nn.Module]:
    """Returns the tokenizer and the network in a folder, ready for inference.

    Raises CheckpointError if a file is missing or damaged, if a weight is missing, quantized or not finite or has a
    wrong shape, if the network has fewer layers than the weights or cannot encode a prompt, or if the tokenizer does
    not fit the network. Without this check, transformers would replace missing weights with random numbers, cast
    quantized ones without their scale, and ignore weights of further layers.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _check_config(folder)
    stored = _stored_dtypes(folder)
    try:
        # No network can be built in float8, whose values are exact in bfloat16.
        has_float8 = any(dtype.itemsize == 1 for dtype in stored)
        encoder, report = load_network(folder, torch.bfloat16 if has_float8 else "auto")
    except Exception as error:
        raise _refuse_network(folder, _reason(error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids, mask = _tokenize(tokenizer, _TRIAL, max_length=_TRIAL_TOKENS).ids_and_mask.unbind(1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the package tokenizers is not an Exception
        raise _refuse_tokenizer(folder, error) from error
    for key, found, needed in sorted(report["mismatched_keys"]):
        shapes = f"has shape {list(found)}, its config.json needs {list(needed)}"
        raise CheckpointError(f"the text encoder in {folder}: {key} {shapes}")
    if absent := sorted(report["missing_keys"]):
        raise CheckpointError(f"the text encoder in {folder} lacks {len(absent)} weights, the first is {absent[0]}")
    if unused := sorted(filter(_is_of_encoder, report["unexpected_keys"])):
        hint = "; use weights that are not quantized" if "scale" in unused[0] else ""
        reason = f"has weights that its config.json does not: {unused[0]}{hint}"
        raise CheckpointError(f"the text encoder in {folder} {reason}")
    if ids.max() >= (known := _num_tokens(encoder)):
        raise CheckpointError(f"the tokenizer in {folder} makes token {ids.max()}, but the text encoder knows {known}")
    for key, parameter in encoder.named_parameters():
        if not all(bound.isfinite() for bound in parameter.aminmax()):
            raise CheckpointError(f"the text encoder in {folder}: {key} holds values that are not finite")
    encoder.eval().requires_grad_(False)
    trial = TextEncoder(tokenizer, encoder, width=0, max_length=_TRIAL_TOKENS)
    try:
        hidden = trial.encode(ids[-1:, :_TRIAL_ENCODED], mask[-1:, :_TRIAL_ENCODED])
    except Exception as error:  # a value in config.json that is used only here can raise any error
        raise CheckpointError(
            f"the text encoder in {folder} cannot be run with its config.json: {_reason(error)}"
        ) from error
    if not hidden.isfinite().all():
        raise CheckpointError(f"the text encoder in {folder} makes values that are not finite; check its config.json")
    return tokenizer, encoder


def from_pretrained(
    kind: Any, folder: Path, *, dtype: torch.dtype | Literal["auto"], **options: Any
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Load a network of the class `kind` of transformers from local safetensors files, with the loading report."""
    loaded: tuple[nn.Module, Mapping[str, Any]] = kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        **options,
    )
    return loaded


def _check_config(folder: Path) -> None:
    """Raise CheckpointError if a text encoder's config.json is damaged, or states quantized weights or too many layers
    to build.
    """
    path = folder / "config.json"
    if not path.is_file():
        return  # transformers names the missing file
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sections = [config, config.get("encoder")]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from error
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config is not supported; use weights that are not quantized")
    for section in sections:
        for key in _DEPTH_KEYS:
            depth = section.get(key) if isinstance(section, dict) else None
            if isinstance(depth, int | float) and depth > MAX_DEPTH:
                raise CheckpointError(f"{path}: {key} must be at most {MAX_DEPTH}, found {depth}")


def _stored_dtypes(folder: Path) -> set[torch.dtype]:
    """Returns the dtypes of a text encoder's weights. Raises CheckpointError if a weight file is missing or damaged, or
    if weights are not floating-point numbers.
    """
    stored: set[torch.dtype] = set()
    try:
        for path in encoder_weights(folder):
            for key, weight in read_weights(path).items():
                if key.endswith(".weight") and "decoder" not in key:  # not indices, which some files contain
                    require_floats(path, key, weight=weight)
                    stored.add(weight.dtype)
    except CheckpointError as error:
        raise _refuse_network(folder, error.message) from error
    return stored


def _refuse_network(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the text encoder in {folder} cannot be loaded: {reason}")


def _refuse_tokenizer(folder: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a tokenizer that raised `error`. It names the damaged file, if there is one."""
    from tokenizers import Tokenizer

    reason = f"{_reason(error)}; check its tokenizer.json and tokenizer_config.json"
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            try:
                if name == _TOKENIZER_FILES[0]:
                    Tokenizer.from_file(str(path))
                elif not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                    raise TypeError("it is not a JSON object")
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as cause:  # noqa: BLE001  # the package raises only the class Exception, or panics
                reason = damaged(path, cause).message
    return CheckpointError(f"the tokenizer of the text encoder in {folder} cannot be loaded: {reason}")


def _reason(error: BaseException) -> str:
    """Returns an error's first line; also the second line if the first one only introduces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines or isinstance(error, LookupError):  # the text of a KeyError is only the key
        return " ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


def _is_of_encoder(key: str) -> bool:
    """Whether a key that a T5 or T5Gemma does not know belongs to its encoder: to a numbered layer, or a scale."""
    return "decoder" not in key and re.search(r"\b(block|layers)\.\d+\.|scale", key) is not None
