"""Loads and runs the text encoder of a checkpoint: a tokenizer and a pretrained network, in one folder.

Each model family has its own network, and interprets the network's output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.models.checkpoint_files import damaged, encoder_weights
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.protocol import PromptTokens
from stable_audio_serve.models.weight_files import read_weights, release_pages
from stable_audio_serve.models.weights import DTYPES, SkipRandomWeights, load_tensors

# Prompts that are tokenized at load. The first one is padding. The second one is a character that no vocabulary has.
_TRIAL, _TRIAL_TOKENS = ("", "\ue000", "a bright tone, 440 Hz"), 16
_TRIAL_ENCODED = 2  # first tokens of the last prompt that are encoded at load: few, because a CPU can be slow
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# While a prompt is tokenized, the engine's clips wait, with some tokenizers for 5 s at 100,000 characters. A token of
# usual text has about 5 characters, but a tokenizer may leave out words, as the demo model's does.
_MIN_CHARS, _CHARS_PER_TOKEN = 8192, 32
_ENCODER = "encoder."  # precedes the keys of an encoder's weights in the files


class EncoderNetwork(nn.Module):
    """The network of a text encoder. Its parameters have the names in weight files, without what precedes them."""

    embed_tokens: nn.Embedding

    @property
    def num_tokens(self) -> int:
        """Returns how many tokens the network knows. Token ids must be below this number."""
        return self.embed_tokens.num_embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the hidden states (prompts, tokens, width) of the token ids (prompts, tokens).

        `mask` (prompts, 1, 1, tokens) is added to the attention's scores, and has the dtype of the parameters.
        """
        raise NotImplementedError


class TextEncoder:
    """A tokenizer and an encoder with hidden states of size `width`, which were loaded from `folder`."""

    def __init__(
        self, tokenizer: Any, encoder: EncoderNetwork, *, width: int, max_length: int, folder: Path = Path()
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.width = width
        self.max_length = max_length
        self.folder = folder

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
        dtype = self.encoder.embed_tokens.weight.dtype
        # Padding gets the smallest finite number instead of minus infinity: for a prompt without real tokens, minus
        # infinity would give NaN.
        added = torch.zeros(len(mask), 1, 1, mask.shape[1], device=mask.device, dtype=dtype)
        added.masked_fill_(mask[:, None, None, :] == 0, torch.finfo(dtype).min)
        hidden: Tensor = self.encoder(ids, added)
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


def require_known(token: int, encoder: EncoderNetwork) -> None:
    """Raise InvalidRequestError if `token`, the highest one of a prompt, is not one of the network's."""
    if token >= (known := encoder.num_tokens):
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


def load_encoder(
    folder: Path,
    build: Callable[[ConfigReader], EncoderNetwork],
    *,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """Load the tokenizer and the network in a folder. `build` makes the network that a config.json describes.

    By default, the network has the dtype that its config.json states, or else the dtype of its weights, or bfloat16 for
    weights in float8. Raises CheckpointError if a file is missing or damaged, if a weight is missing, quantized or not
    finite or has a wrong shape, if the network has fewer layers than the weights or makes values that are not finite,
    or if the tokenizer does not fit the network.
    """
    try:
        config, weights = _read_config(folder), _read_encoder(folder)
        with torch.device("meta"), SkipRandomWeights():  # `load_tensors` below allocates and fills the weights
            encoder = build(config)
        needed = {_ENCODER + key for key in encoder.state_dict()}
        if unused := sorted(key for key in weights.keys() - needed if _is_of_layer(key)):
            hint = "; use weights that are not quantized" if "scale" in unused[0] else ""
            raise CheckpointError(f"it has weights that its config.json does not: {unused[0]}{hint}")
        weights = {key: weight for key, weight in weights.items() if key in needed}
        dtypes = {_ENCODER: dtype or _choose_dtype(config, weights)}
        mapped = load_tensors({_ENCODER: encoder}, weights, source=folder, device=device, dtypes=dtypes)
    except CheckpointError as error:
        raise CheckpointError(f"the text encoder in {folder} cannot be loaded: {error.message}") from error
    tokenizer, ids, mask = _load_tokenizer(folder)
    if ids.max() >= (known := encoder.num_tokens):
        raise CheckpointError(f"the tokenizer in {folder} makes token {ids.max()}, but the text encoder knows {known}")
    width = encoder.embed_tokens.embedding_dim
    text = TextEncoder(tokenizer, encoder, width=width, max_length=max_length, folder=folder)
    hidden = text.encode(*(part[-1:, :_TRIAL_ENCODED].to(device) for part in (ids, mask)))
    if not hidden.isfinite().all():
        raise CheckpointError(f"the text encoder in {folder} makes values that are not finite; check its config.json")
    release_pages(mapped)  # prompts use few rows of the embedding, which is most of a T5Gemma
    return text


def _read_config(folder: Path) -> ConfigReader:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, error) from error
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config is not supported; use weights that are not quantized")
    return ConfigReader(values, file=str(path))


def _read_encoder(folder: Path) -> dict[str, Tensor]:
    """Returns the weights in a folder without those of a decoder. The keys of the encoder's begin with `encoder.`.

    Raises CheckpointError if a file is missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for path in encoder_weights(folder):
        for key, weight in read_weights(path).items():
            if "decoder" in key:
                continue
            before, found, name = key.partition(_ENCODER)
            weights[found + name if found else before] = weight
    shared = [weights.pop(key) for key in tuple(weights) if re.search(r"(^|\.)shared\.weight$", key)]
    return weights | {f"{_ENCODER}embed_tokens.weight": embedding for embedding in shared}  # as T5s name it


def _choose_dtype(config: ConfigReader, weights: Mapping[str, Tensor]) -> torch.dtype:
    stored = [weight.dtype for weight in weights.values()] or [torch.float32]
    if any(dtype.itemsize == 1 for dtype in stored):
        return torch.bfloat16  # the values of float8 are exact in bfloat16
    key = "dtype" if "dtype" in config else "torch_dtype"
    return DTYPES.get(config.text(key, default=str(stored[0]).removeprefix("torch.")), torch.float32)


def _load_tokenizer(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """Returns the tokenizer in a folder, and the token ids and the mask of the trial prompts."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids, mask = _tokenize(tokenizer, _TRIAL, max_length=_TRIAL_TOKENS).ids_and_mask.unbind(1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the package tokenizers is not an Exception
        raise _refuse_tokenizer(folder, error) from error
    return tokenizer, ids, mask


def _refuse_tokenizer(folder: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a tokenizer that raised `error`. It names the damaged file, if there is one."""
    from tokenizers import Tokenizer

    reason = f"{_reason(error)}; check its config.json, tokenizer.json and tokenizer_config.json"
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


def _is_of_layer(key: str) -> bool:
    """Whether a key that the network lacks belongs to a numbered layer, or is a scale of quantized weights."""
    return re.search(r"\b(block|layers)\.\d+\.|scale", key) is not None
