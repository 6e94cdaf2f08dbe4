"""`stable-audio-serve generate` and the other commands that make sound: against a server, or with --local here.

Imports what a command needs only when it runs.
"""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stable_audio_serve.cli.endings import said_plainly
from stable_audio_serve.cli.remote import KeyFileOption, UrlOption, open_client
from stable_audio_serve.cli.sound_options import Keep, Prompt, SoundOptions, Source, with_options

if TYPE_CHECKING:
    from stable_audio_serve.cli.makers import Order
    from stable_audio_serve.client import Take

app = typer.Typer()

STDIN = "-"  # and standard output

_Regions = Annotated[
    list[str], typer.Option("--region", "-r", metavar="START:END", help="Part to regenerate, seconds; may be repeated.")
]
_REPLAY_HAS_NOT = (
    *("model", "duration", "steps", "seed", "cfg_scale", "sampler", "negative_prompt", "variations", "format"),
    "priority",
)
_UNTIL = {"duration": "--until", "inpaint_end_seconds": "--until", "inpaint_start_seconds": "--from"}
_LOOP_HAS_NOT = ("model", "duration", "sampler", "negative_prompt", "variations", "format", "priority")


@app.command()
@with_options()
def generate(prompt: Prompt, *, options: SoundOptions) -> None:
    """Make audio from a text prompt."""
    _make("generate", prompt, options=options)


@app.command()
@with_options()
def variation(
    audio: Source,
    prompt: Prompt,
    *,
    noise: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Low keeps more of the source.")] = None,
    options: SoundOptions,
) -> None:
    """Make a variation of audio."""
    _make("vary", prompt, audio=audio, more={"init_noise_level": noise}, options=options)


@app.command()
@with_options()
def inpaint(audio: Source, prompt: Prompt, *, regions: _Regions, keep: Keep = None, options: SoundOptions) -> None:
    """Regenerate parts of a clip.

    The rest keeps its samples. A crossfade of 30 ms inside each region joins the two.
    """
    with said_plainly():
        spans = [parse_region(region) for region in regions]
    _make("inpaint", prompt, audio=audio, regions=spans, more={"keep": keep}, options=options)


@app.command("continue")
@with_options(without=["duration"])
def continue_audio(
    audio: Source,
    prompt: Prompt,
    *,
    until: Annotated[float, typer.Option("--until", "-u", help="Length of the result, seconds.")],
    start: Annotated[
        float | None, typer.Option("--from", help="Seconds of the source to keep; default: all of it.")
    ] = None,
    keep: Keep = None,
    options: SoundOptions,
) -> None:
    """Extend audio past its end.

    The source keeps its samples, but for a crossfade over its last 30 ms.
    """
    with said_plainly():
        check_inputs(prompt, audio)
        content = read_audio(audio)
        kept_s = _length_s(content) if start is None else start
        if until <= kept_s:
            what = "the source" if start is None else "--from"
            raise ValueError(f"--until {until:g} is not longer than {what} ({kept_s:g} s)")
    more = {"duration": until, "keep": keep}
    _make("inpaint", prompt, audio=content, regions=[(kept_s, until)], more=more, options=options, names=_UNTIL)


@app.command()
@with_options(without=_LOOP_HAS_NOT)
def loop(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to hear, with a tempo such as 120bpm.")],
    *,
    bars: Annotated[Literal["1", "2", "4", "8"] | None, typer.Option(help="Default: as many as fit.")] = None,
    kind: Annotated[Literal["auto", "drums", "instruments"], typer.Option(help="What the loop is of.")] = "auto",
    audio: Annotated[
        str | None, typer.Option(help="Make it in the prompt's style from this; - is standard input.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="With --audio: low keeps more of it.")] = None,
    options: SoundOptions,
) -> None:
    """Make a loop of whole bars.

    A model for loops makes it: see `dialects.saos_model` of the server.
    """
    more = {"bars": None if bars is None else int(bars), "loop_type": kind, "style_strength": strength}
    _make("loop", prompt, audio=audio, more=more, options=options)


@app.command()
@with_options(without=_REPLAY_HAS_NOT)
def replay(
    take: Annotated[
        str, typer.Argument(metavar="FILE", help="An audio file with a recipe, or a recipe; - is standard input.")
    ],
    *,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="AUDIO", help="Source file that the recipe names; may be repeated."),
    ] = None,
    options: SoundOptions,
) -> None:
    """Recreate a clip from its recipe."""
    from stable_audio_serve.cli.makers import Order

    with said_plainly():
        if [take, *(source or ())].count(STDIN) > 1:
            raise ValueError("only one file can be standard input")
        recipe = read_recipe(read_audio(take))
        order = Order("replay", recipe=recipe, sources=[read_audio(each) for each in source or ()])
    _carry_out(order, options=options)


@app.command()
def models(
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that a server serves."""
    from stable_audio_serve.cli.job_report import new_table, print_wide

    with said_plainly(), open_client(url, key_file) as client:
        found = client.models()
    if as_json:
        typer.echo(json.dumps([dict(model.sent) for model in found], indent=2))
        return
    table = new_table("Model", "Longest", "Rate", "Channels", "Steps", "Guidance", "Aliases")
    for model in found:
        name = f"{model.name} (default)" if model.is_default else model.name
        rate, longest = f"{model.sample_rate_hz:,} Hz", f"{model.max_duration_s:g} s"
        guidance, aliases = f"{model.default_cfg_scale:g}", ", ".join(model.aliases)
        table.add_row(name, longest, rate, str(model.channels), str(model.default_steps), guidance, aliases)
    print_wide(table)


def _make(
    kind: Literal["generate", "vary", "inpaint", "loop"],
    prompt: str,
    *,
    options: SoundOptions,
    audio: str | bytes | None = None,
    regions: list[tuple[float, float]] | None = None,
    more: dict[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    from stable_audio_serve.cli.makers import Order

    with said_plainly():
        check_inputs(prompt, audio)
        check_outputs(options.out, as_json=options.as_json)
        prompt = sys.stdin.read().strip() if prompt == STDIN else prompt
        source = read_audio(audio) if isinstance(audio, str) else audio
        fields = {**options.controls, **(more or {})}
        controls = {name: value for name, value in fields.items() if value is not None}
    _carry_out(
        Order(kind, prompt, audio=source, regions=regions or (), controls=controls), options=options, names=names
    )


def _carry_out(order: Order, *, options: SoundOptions, names: Mapping[str, str] | None = None) -> None:
    """Make what is ordered, write it and say so; `names` are for messages, see `said_plainly`."""
    from stable_audio_serve.cli.makers import make_by_server, make_here
    from stable_audio_serve.cli.progress import shown
    from stable_audio_serve.cli.saving import save

    with said_plainly(names):
        check_outputs(options.out, as_json=options.as_json)
        with shown(quiet=options.quiet) as show:
            if options.local:
                take = make_here(order, config=options.config, on_progress=show)
            else:
                with open_client(options.url, options.key_file, quiet=options.quiet) as client:
                    take = make_by_server(order, client, on_progress=show)
        files = save(take, options.out, prompt=order.prompt or str(order.recipe.get("prompt", "")))
    report(take, files, as_json=options.as_json)


def check_inputs(prompt: str, audio: str | bytes | None) -> None:
    """Raises ValueError if two are standard input."""
    if prompt == STDIN == audio:
        raise ValueError("either the prompt or the audio can be standard input")


def check_outputs(out: str, *, as_json: bool) -> None:
    """Raises ValueError if two are standard output."""
    if as_json and out == STDIN:
        raise ValueError("--json and --out - would both write to standard output")


def report(take: Take, files: list[Path], *, as_json: bool) -> None:
    """Say what was written, on standard output, and on standard error what of the request had no effect."""
    for warning in take.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if not as_json:
        for file in files:
            typer.echo(str(file))
        if take.replay == "close":
            typer.echo(
                "close: made on another device or version than the first time, the last bits may differ", err=True
            )
        return
    clips = [
        {
            "file": str(file),
            "seed": clip.seed,
            "peak": clip.peak,
            "loudness": clip.loudness_lufs,
            "silent": clip.is_silent,
        }
        for file, clip in zip(files, take.clips, strict=True)
    ]
    told = {} if take.replay is None else {"replay": take.replay}
    typer.echo(json.dumps({"model": take.model, "sample_rate": take.sample_rate_hz, **told, "clips": clips}, indent=2))


def read_audio(audio: str) -> bytes:
    """Returns the content of source audio. Raises OSError."""
    return sys.stdin.buffer.read() if audio == "-" else Path(audio).read_bytes()


def read_recipe(content: bytes) -> dict[str, Any]:
    """Returns the recipe that a file is, or that an audio file carries. Raises ValueError."""
    text: str | bytes | None = content
    if not content:
        raise ValueError("the file is empty")
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
        from stable_audio_serve.audio.embedded_text import extract

        text = extract(io.BytesIO(content))
    if text is None:
        raise ValueError("the file carries no recipe")
    try:
        recipe = json.loads(text)
    except RecursionError as error:
        raise ValueError("the recipe is nested too deeply") from error
    if not isinstance(recipe, dict):
        raise ValueError("the recipe is no JSON object")
    return recipe


def _length_s(content: bytes) -> float:
    """Returns the length of an audio file. Raises ValueError."""
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(content)).duration)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the audio cannot be read: {error}; --from says how much of it to keep") from error


def parse_region(text: str) -> tuple[float, float]:
    """Returns [start, end) in seconds. Raises ValueError."""
    start, _, end = text.partition(":")
    try:
        start_s, end_s = float(start), float(end)
    except ValueError as error:
        raise ValueError(f"--region: {text!r} is not START:END in seconds, such as 2:4.5") from error
    if not start_s < end_s:
        raise ValueError(f"--region {text}: the start must be before the end")
    return start_s, end_s
