"""The known models: the official models, the packaged demo model, and models that an operator adds.

Describes models and their files; loads no weights. Importing this module does not import torch, so that processes
without models can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from stable_audio_serve.core.catalog import (
    FLOW_SAMPLERS,
    OPEN_FAMILY,
    SA3_FAMILY,
    V_SAMPLERS,
    ModelCard,
    NetworkBackend,
)
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import EditSchedule, Stacking
from stable_audio_serve.models.checkpoint_files import is_open_family
from stable_audio_serve.models.config_reader import CONFIG_FILE, MAX_SAMPLES, ConfigReader, read_config

# Training objective -> default (steps, guidance scale). Distilled models (rf_denoiser) need few steps and no guidance.
OBJECTIVE_DEFAULTS: Mapping[str, tuple[int, float]] = {
    "rf_denoiser": (8, 1.0),
    "rectified_flow": (50, 7.0),
    "v": (100, 7.0),
}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model that can be loaded, and its public description (`card`).

    The model's files are in `folder` if it is set, else in the repository `repo_id` of the Hugging Face hub at
    `revision`. `cap_s` limits the duration in seconds, in addition to the checkpoint's own limit; None: no additional
    limit. `backend` selects the network implementation.
    """

    card: ModelCard
    repo_id: str | None = None
    revision: str | None = None
    folder: str | None = None
    cap_s: float | None = None
    backend: NetworkBackend = "native"


def _official(name: str, *, cap_s: float, description: str) -> ModelEntry:
    repo_id = f"stabilityai/stable-audio-3-{name}"
    objective = "rectified_flow" if name.endswith("-base") else "rf_denoiser"
    steps, cfg_scale = OBJECTIVE_DEFAULTS[objective]
    card = ModelCard(
        name=name,
        family=SA3_FAMILY,
        aliases=(f"stable-audio-3-{name}", repo_id),
        max_duration_s=cap_s,
        objective=objective,
        default_steps=steps,
        default_cfg_scale=cfg_scale,
        description=description,
    )
    return ModelEntry(card, repo_id=repo_id, cap_s=cap_s)


def _open(name: str, *, objective: str, cap_s: float, description: str) -> ModelEntry:
    repo_id = f"stabilityai/stable-audio-open-{name}"
    steps, cfg_scale = OBJECTIVE_DEFAULTS[objective]
    card = ModelCard(
        name=f"stable-audio-open-{name}",
        family=OPEN_FAMILY,
        aliases=(repo_id,),
        max_duration_s=cap_s,
        latent_channels=64,
        objective=objective,
        default_steps=steps,
        default_cfg_scale=cfg_scale,
        default_duration_padding_s=0.0,
        samplers=V_SAMPLERS if objective == "v" else FLOW_SAMPLERS,
        conditions_on_start=objective == "v",
        description=description,
    )
    return ModelEntry(card, repo_id=repo_id)


DEMO = "demo"
TEXT_ENCODER = "text-encoder"  # the family of a text encoder that has a repository of its own
_DEMO_FOLDER = Path(str(resources.files("stable_audio_serve"))) / "demo"

# The packaged adapters of the demo model, by name.
DEMO_ADAPTERS: Mapping[str, Path] = {"octave-down": _DEMO_FOLDER / "adapters" / "octave-down.safetensors"}

_DEMO = ModelEntry(
    ModelCard(
        name=DEMO,
        family=SA3_FAMILY,
        aliases=("stable-audio-serve-demo",),
        default_duration_padding_s=0.4,
        is_demo=True,
        description="A small demo model trained on generated sounds only; shows that everything works.",
    ),
    folder=str(_DEMO_FOLDER / "checkpoint"),
)

BUILT_IN: Mapping[str, ModelEntry] = {
    entry.card.name: entry
    for entry in (
        _official("small-sfx", cap_s=120.0, description="Sound effects, up to 2 minutes."),
        _official("small-music", cap_s=120.0, description="Music, up to 2 minutes."),
        _official("medium", cap_s=380.0, description="Music and sound effects, up to 6 minutes 20 seconds."),
        _official("small-sfx-base", cap_s=120.0, description="Base model behind small-sfx."),
        _official("small-music-base", cap_s=120.0, description="Base model behind small-music."),
        _official("medium-base", cap_s=380.0, description="Base model behind medium."),
        _open("1.0", objective="v", cap_s=2_097_152 / 44_100, description="Sound effects and loops, up to 47 seconds."),
        _open(
            "small", objective="rf_denoiser", cap_s=524_288 / 44_100, description="Short loops and sounds in 8 steps."
        ),
        _DEMO,
    )
}


def text_encoder_entry(repo_id: str) -> ModelEntry:
    """Returns the entry for downloading a text encoder from its own repository."""
    return ModelEntry(ModelCard(repo_id, TEXT_ENCODER), repo_id=repo_id)


def resolve_entry(
    name: str,
    *,
    path: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    aliases: tuple[str, ...] = (),
    max_duration_s: float | None = None,
    duration_padding_s: float | None = None,
    edit_schedule: EditSchedule | None = None,
    lora_stacking: Stacking = "chained",
    backend: NetworkBackend = "native",
) -> ModelEntry:
    """Returns the entry that an operator configured: a built-in name, a local folder (`path`) or a repository
    (`repo_id`).

    A built-in name with a folder or repository gives an entry with these files and the built-in description. Reads no
    file (`describe_entry` does). Raises ConfigError for an unknown name without a folder or repository.
    """
    base = BUILT_IN.get(name)
    if base is None and path is None and repo_id is None:
        known = ", ".join(BUILT_IN)
        message = f"models: {name!r} is not built in ({known}); give it a path or a repo_id"
        raise ConfigError(message, field="models")
    entry = base or ModelEntry(ModelCard(name, SA3_FAMILY))
    if path is not None:
        entry = replace(entry, folder=str(Path(path).expanduser()), repo_id=None)
    elif repo_id is not None:
        entry = replace(entry, folder=None, repo_id=repo_id)
    card = replace(
        entry.card,
        aliases=tuple(dict.fromkeys((*entry.card.aliases, *aliases))),
        max_duration_s=max_duration_s or entry.card.max_duration_s,
        edit_schedule=edit_schedule,
        lora_stacking=lora_stacking,
        default_duration_padding_s=(
            entry.card.default_duration_padding_s if duration_padding_s is None else duration_padding_s
        ),
    )
    return replace(
        entry,
        card=card,
        revision=revision or entry.revision,
        cap_s=max_duration_s or entry.cap_s,
        backend=backend,
    )


def describe_entry(entry: ModelEntry) -> ModelEntry:
    """Returns the entry with family, sample rate, channels, longest duration and objective from the config.

    The config is read from the entry's folder. Without a folder, it is read from the local cache of the hub; if the
    cache does not contain it, returns the entry unchanged. A built-in entry keeps its own default steps and guidance.
    The longest duration is at most `cap_s`. Raises CheckpointError if the config is missing in the folder or unusable.
    """
    folder = config_folder(entry)
    if folder is None:
        return entry
    config = read_config(folder)
    card = complete_card(entry.card, config, cap_s=entry.cap_s)
    if entry.card.name not in BUILT_IN:
        steps, cfg_scale = OBJECTIVE_DEFAULTS[card.objective]
        card = replace(card, default_steps=steps, default_cfg_scale=cfg_scale)
    return replace(entry, card=card)


def config_folder(entry: ModelEntry) -> Path | None:
    """Returns the folder with an entry's config: its own, or one in the cache of the hub. None if it is not cached."""
    if entry.folder is not None:
        return Path(entry.folder)
    if entry.repo_id is None:
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import

    try:
        found = try_to_load_from_cache(entry.repo_id, CONFIG_FILE, revision=entry.revision)
    except (OSError, ValueError):  # an invalid repository name: the later download raises the error for it
        return None
    return Path(found).parent if isinstance(found, str) else None


def complete_card(card: ModelCard, config: ConfigReader, *, cap_s: float | None) -> ModelCard:
    """Returns the card, completed from a checkpoint's config.

    `cap_s` is an upper limit of the duration. Raises CheckpointError naming the key that cannot be used.
    """
    model = config.section("model")
    diffusion = model.section("diffusion")
    rate = config.integer("sample_rate", at_most=MAX_SAMPLES)
    hop = model.section("pretransform").section("config").integer("downsampling_ratio")
    longest_s = config.integer("sample_size", at_most=MAX_SAMPLES) // hop * hop / rate  # no partial last latent frame
    completed = replace(
        card,
        sample_rate_hz=rate,
        channels=config.integer("audio_channels", default=card.channels),
        latent_channels=model.integer("io_channels"),
        max_duration_s=min(cap_s or longest_s, longest_s),
    )
    if not is_open_family(config):
        objective = diffusion.choice("diffusion_objective", ("rf_denoiser", "rectified_flow"))
        return replace(completed, family=SA3_FAMILY, objective=objective)
    objective = diffusion.choice("diffusion_objective", tuple(OBJECTIVE_DEFAULTS), default="v")
    ids = [item.text("id") for item in model.section("conditioning").sections("configs")]
    return replace(
        completed,
        family=OPEN_FAMILY,
        objective=objective,
        default_duration_padding_s=0.0,  # not needed: these models always generate the whole window
        samplers=V_SAMPLERS if objective == "v" else FLOW_SAMPLERS,
        conditions_on_start="seconds_start" in ids,
    )
