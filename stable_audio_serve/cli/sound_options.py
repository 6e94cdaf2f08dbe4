"""The options shared by all commands that generate audio. Imports no code that generates audio."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from stable_audio_serve.cli.remote import KeyFileOption, UrlOption

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="Description of the sound; - for standard input.")]
Source = Annotated[str, typer.Argument(metavar="AUDIO", help="Source audio; - reads it from standard input.")]

_Format = Literal["wav", "flac", "mp3", "ogg", "opus", "pcm", "ulaw", "alaw", "m4a", "aac"]
Keep = Annotated[
    Literal["source", "model"] | None,
    typer.Option(
        help="Samples outside the regions: those of the source (default) or of the model.",
        show_default=False,
    ),
]

Loop = Annotated[bool, typer.Option("--loop", help="Make a clip that repeats without a seam.")]
Bpm = Annotated[float | None, typer.Option(help="With --loop: tempo, beats per minute; name it in the prompt too.")]
Bars = Annotated[int | None, typer.Option(help="With --loop and --bpm: bars of four beats, in place of --duration.")]

Sections = Annotated[
    list[str] | None,
    typer.Option(
        "--section",
        metavar="SECONDS[:PROMPT]",
        help="Section of a piece longer than the model's maximum; may be repeated.",
    ),
]
Overlap = Annotated[
    float | None, typer.Option("--overlap", min=0.0, help="With --section: audio that each section continues, seconds.")
]

Noise = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Strength, 0 to 1; low keeps more of the source.")]
_REGION = typer.Option("--region", "-r", metavar="START:END", help="Part to regenerate, seconds; may be repeated.")
Regions = Annotated[list[str], _REGION]
MoreRegions = Annotated[list[str] | None, _REGION]
Before = Annotated[float | None, typer.Option(min=0.0, help="New audio before the source, seconds.")]
After = Annotated[float | None, typer.Option(min=0.0, help="New audio after the source, seconds.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundOptions:
    """The shared options. If an option is None, the default of the server or the model applies."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="Name of a served model.")] = None
    duration: Annotated[float | None, typer.Option("--duration", "-d", help="Length, seconds; default: 7.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", "-s", help="The same seed gives the same audio; repeated: one for each variation."),
    ] = None
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="PROMPT", help="Prompt of one more variation; may be repeated."),
    ] = None
    cfg_scale: Annotated[
        float | None, typer.Option("--cfg-scale", help="Guidance: how closely the audio follows the prompt.")
    ] = None
    sampler: Annotated[str | None, typer.Option(help="Name of one of the model's samplers.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid, with guidance above 1.")] = None
    variations: Annotated[
        int, typer.Option("--variations", "-n", min=1, help="Number of variations; seeds count up from --seed.")
    ] = 1
    format: Annotated[
        _Format | None,
        typer.Option(help="File format; default: as --out ends, else wav. m4a and aac need the extra `aac`."),
    ] = None
    bitrate: Annotated[int | None, typer.Option(min=8, max=320, help="Of lossy formats, kbit/s.")] = None
    bit_depth: Annotated[
        Literal["16", "24", "float"] | None, typer.Option(help="Bits of a sample; of wav, of flac without float.")
    ] = None
    sample_rate: Annotated[int | None, typer.Option(help="Of the file, hertz; default: the model's.")] = None
    loudness: Annotated[float | None, typer.Option(help="Target loudness, LUFS, such as -14.")] = None
    true_peak: Annotated[
        float | None, typer.Option(help="With --loudness: highest true peak, dBTP.", show_default="-1")
    ] = None
    fade_in: Annotated[float | None, typer.Option(min=0.0, help="Fade at the start, seconds.")] = None
    fade_out: Annotated[float | None, typer.Option(min=0.0, help="Fade at the end, seconds.")] = None
    priority: Annotated[
        Literal["interactive", "batch"], typer.Option(help="Interactive requests run before batch requests.")
    ] = "interactive"
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="NAME[:STRENGTH]", help="Adapter, strength 1 by default; may be repeated."),
    ] = None
    lora_stacking: Annotated[
        Literal["chained", "summed"] | None,
        typer.Option(help="Several adapters: each changes what those before it leave, or their changes are added."),
    ] = None
    out: Annotated[
        str, typer.Option("--out", "-o", help="File or folder to write, - for standard output; default: here.")
    ] = "."
    as_json: Annotated[bool, typer.Option("--json", help="Describe the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False
    url: UrlOption = None
    key_file: KeyFileOption = None
    local: Annotated[bool, typer.Option("--local", help="Run the model in this process, without a server.")] = False
    config: Annotated[Path | None, typer.Option("--config", help="With --local: the config file, as for `serve`.")] = (
        None
    )

    @property
    def controls(self) -> dict[str, Any]:
        """The optional fields of the request, by their names in the HTTP API. Raises ValueError."""
        return {
            "model": self.model,
            "duration": self.duration,
            "steps": self.steps,
            "seed": self.seed[0] if self.seed and len(self.seed) == 1 else None,
            "seeds": self.seed if self.seed and len(self.seed) > 1 else None,
            "cfg_scale": self.cfg_scale,
            "sampler_kwargs": {"sampler_type": self.sampler} if self.sampler else None,
            "negative_prompt": self.negative_prompt,
            "batch_size": self.variations if self.variations > 1 else None,
            "response_format": self.format,
            "bitrate": self.bitrate,
            "bit_depth": int(self.bit_depth) if self.bit_depth in {"16", "24"} else self.bit_depth,
            "sample_rate": self.sample_rate,
            "loudness": self._loudness,
            "fade_in_s": self.fade_in,
            "fade_out_s": self.fade_out,
            "priority": self.priority if self.priority != "interactive" else None,
            "loras": [_parse_lora(text) for text in self.loras] if self.loras else None,
            "lora_stacking": self.lora_stacking,
        }

    @property
    def format_of_file(self) -> str | None:
        """The format of --format, else the one that the ending of --out names."""
        ending = Path(self.out).suffix.lower().removeprefix(".")
        return self.format or (ending if ending in get_args(_Format) else None)

    @property
    def _loudness(self) -> dict[str, float] | None:
        if self.loudness is None:
            if self.true_peak is not None:
                raise ValueError("--true-peak needs --loudness")
            return None
        true_peak = {} if self.true_peak is None else {"true_peak_dbtp": self.true_peak}
        return {"target_lufs": self.loudness, **true_peak}


def _parse_lora(text: str) -> dict[str, Any]:
    """Parse NAME or NAME:STRENGTH. Returns an item of the HTTP API's field `loras`. Raises ValueError."""
    name, colon, strength = text.rpartition(":")
    if not colon:
        return {"name": text}
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise ValueError(f"--lora: {text!r} is not NAME or NAME:STRENGTH, such as vinyl:0.8")
    return {"name": name, "strength": value}


def with_options(*, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the shared options to a command, except the options named in `without`.

    The command receives the options as its argument `options`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = [field for field in fields(SoundOptions) if field.name not in without]
        hints = get_type_hints(SoundOptions, include_extras=True)
        own = inspect.signature(command, eval_str=True)

        @wraps(command)
        def run(**arguments: Any) -> None:
            chosen = {field.name: arguments.pop(field.name) for field in shared}
            command(**arguments, options=SoundOptions(**chosen))

        parameters = [parameter for parameter in own.parameters.values() if parameter.name != "options"]
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in shared
        ]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
