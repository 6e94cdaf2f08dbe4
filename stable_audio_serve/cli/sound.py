"""Commands that generate audio, such as `generate` and `variation`: on a server, or with --local in this process."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stable_audio_serve.cli.messages import plain_errors, print_json
from stable_audio_serve.cli.remote import JsonOption, KeyFileOption, UrlOption, open_client
from stable_audio_serve.cli.sound_options import (
    After,
    Bars,
    Before,
    Bpm,
    Keep,
    Loop,
    MoreRegions,
    Noise,
    Overlap,
    Prompt,
    Regions,
    Sections,
    SoundOptions,
    Source,
    with_options,
)

if TYPE_CHECKING:
    from stable_audio_serve.cli.makers import SoundRequest

app = typer.Typer()

Kind = Literal["generate", "vary", "inpaint", "loop"]

_LOOP_HAS_NOT = (
    *("model", "prompts", "duration", "sampler", "negative_prompt", "variations", "format", "priority"),
    *("bitrate", "bit_depth", "sample_rate", "loudness", "true_peak", "fade_in", "fade_out"),
    *("loras", "lora_stacking"),
)
_REPLAY_HAS_NOT = (*_LOOP_HAS_NOT, "steps", "seed", "cfg_scale")


@app.command()
@with_options()
def generate(
    prompt: Prompt,
    *,
    loop: Loop = False,
    bpm: Bpm = None,
    bars: Bars = None,
    sections: Sections = None,
    overlap: Overlap = None,
    options: SoundOptions,
) -> None:
    """Generate audio from a text prompt."""
    from stable_audio_serve.cli.sound_files import parse_sections

    with plain_errors():
        more = {"loop": loop or None, "bpm": bpm, "bars": bars, **parse_sections(sections, overlap_s=overlap)}
    _make("generate", prompt, more=more, options=options)


@app.command()
@with_options()
def variation(
    audio: Source,
    prompt: Prompt,
    *,
    noise: Noise = None,
    options: SoundOptions,
) -> None:
    """Make a variation of audio."""
    _make("vary", prompt, audio=audio, more={"init_noise_level": noise}, options=options)


@app.command()
@with_options()
def inpaint(
    audio: Source,
    prompt: Prompt,
    *,
    regions: Regions,
    noise: Noise = None,
    keep: Keep = None,
    options: SoundOptions,
) -> None:
    """Regenerate parts of a clip.

    Samples outside the regions stay unchanged. Crossfades of 30 ms inside each region join the new audio to
    the source.
    """
    _make(
        "inpaint", prompt, audio=audio, regions=regions, more={"init_noise_level": noise, "keep": keep}, options=options
    )


@app.command()
@with_options(without=["duration"])
def extend(
    audio: Source,
    prompt: Prompt,
    *,
    before: Before = None,
    after: After = None,
    regions: MoreRegions = None,
    noise: Noise = None,
    keep: Keep = None,
    options: SoundOptions,
) -> None:
    """Extend audio before its start, after its end, or both.

    The source's samples stay unchanged, except for crossfades in 30 ms at each extended end.
    """
    with plain_errors():
        if not (before or after):
            raise ValueError("set --before or --after to the seconds of new audio")
    more = {"extend_before_s": before, "extend_after_s": after, "init_noise_level": noise, "keep": keep}
    _make("inpaint", prompt, audio=audio, regions=regions, more=more, options=options)


@app.command()
@with_options(without=_LOOP_HAS_NOT)
def loop(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Description with a tempo such as 120bpm.")],
    *,
    bars: Annotated[Literal["1", "2", "4", "8"] | None, typer.Option(help="Default: as many as fit.")] = None,
    kind: Annotated[Literal["auto", "drums", "instruments"], typer.Option(help="Kind of loop.")] = "auto",
    audio: Annotated[str | None, typer.Option(help="Source audio of a variation; - is standard input.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --audio: strength, 0.1 to 1; low keeps more of the source.")
    ] = None,
    options: SoundOptions,
) -> None:
    """Make a loop of whole bars.

    Uses the server's model for loops (setting `dialects.model`).
    """
    if options.seed and len(options.seed) > 1:
        raise typer.BadParameter("a loop has one seed", param_hint="--seed")
    more = {"bars": None if bars is None else int(bars), "loop_type": kind, "style_strength": strength}
    _make("loop", prompt, audio=audio, more=more, options=options)


@app.command()
@with_options(without=_REPLAY_HAS_NOT)
def replay(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Audio file that contains a recipe, or a recipe; - is standard input.")
    ],
    *,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="AUDIO", help="Source file that the recipe names; may be repeated."),
    ] = None,
    options: SoundOptions,
) -> None:
    """Recreate a clip from its recipe."""
    from stable_audio_serve.cli.makers import SoundRequest
    from stable_audio_serve.cli.sound_files import STDIN, read_audio, read_recipe

    with plain_errors():
        if [file, *(source or ())].count(STDIN) > 1:
            raise ValueError("only one of FILE and --source can be standard input")
        recipe = read_recipe(read_audio(file))
        request = SoundRequest("replay", recipe=recipe, sources=[read_audio(each) for each in source or ()])
    _carry_out(request, options=options)


@app.command()
def models(
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """List the models that a server serves."""
    with plain_errors(), open_client(url, key_file) as client:
        found = client.models()
    if as_json:
        print_json([dict(model.sent) for model in found])
        return
    from stable_audio_serve.cli.tables import print_models

    print_models(found)


def _make(kind: Kind, prompt: str, *, options: SoundOptions, **asked: Any) -> None:
    with plain_errors():
        request = build_request(kind, prompt, options=options, **asked)
    _carry_out(request, options=options)


def build_request(
    kind: Kind,
    prompt: str,
    *,
    options: SoundOptions,
    audio: str | None = None,
    regions: list[str] | None = None,
    more: dict[str, Any] | None = None,
) -> SoundRequest:
    """Return the request for audio, and read its files. `more` has fields that are not shared options.

    Raises ValueError, OSError.
    """
    from stable_audio_serve.cli.makers import SoundRequest
    from stable_audio_serve.cli.sound_files import STDIN, parse_region, read_audio, read_prompt

    spans = [parse_region(region) for region in regions or ()]
    if prompt == STDIN == audio:
        raise ValueError("only one of the prompt and the audio can be standard input")
    prompt = read_prompt(prompt)
    source = None if audio is None else read_audio(audio)
    fields = {**options.controls, **(more or {}), "prompts": [prompt, *options.prompts] if options.prompts else None}
    if kind != "loop":  # which is always WAV
        fields["response_format"] = options.format_of_file
    controls = {name: value for name, value in fields.items() if value is not None}
    return SoundRequest(kind, prompt, audio=source, regions=spans, controls=controls)


def _carry_out(request: SoundRequest, *, options: SoundOptions) -> None:
    """Generate the audio of a request and write its files."""
    from stable_audio_serve.cli.makers import make_by_server, make_here
    from stable_audio_serve.cli.sound_files import check_outputs, report, save
    from stable_audio_serve.cli.tables import progress_line

    with plain_errors():
        check_outputs(options.out, as_json=options.as_json, num_clips=request.num_clips)
        with progress_line(quiet=options.quiet) as show:
            if options.local:
                result = make_here(request, config=options.config, quiet=options.quiet, on_progress=show)
            else:
                connect = partial(open_client, options.url, options.key_file)
                with connect(quiet=options.quiet) as client:
                    result = make_by_server(request, client, connect=connect, on_progress=show)
        try:
            files = save(result, options.out, prompt=request.prompt or str(request.recipe.get("prompt", "")))
        except OSError as error:
            if result.job_id:
                hint = f"`stable-audio-serve jobs fetch {result.job_id}` gets the audio"
                error.strerror = f"{error.strerror or error}; {hint}"
            raise
    report(result, files, as_json=options.as_json)
