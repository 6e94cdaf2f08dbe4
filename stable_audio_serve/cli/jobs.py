"""`stable-audio-serve jobs`: submit and manage a client's jobs on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stable_audio_serve.cli.messages import ExitCode, fail, plain_errors, print_json
from stable_audio_serve.cli.remote import JsonOption, KeyFileOption, UrlOption, open_client
from stable_audio_serve.cli.sound import Kind, build_request
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
    Sections,
    SoundOptions,
    with_options,
)
from stable_audio_serve.core.errors import ConflictError, NotFoundError

if TYPE_CHECKING:
    from stable_audio_serve.client import Job

app = typer.Typer(no_args_is_help=True, help="Submit, list, show, fetch and cancel jobs of a server.")

_EXIT_CODES = {"succeeded": ExitCode.DONE, "failed": ExitCode.FAILED, "cancelled": ExitCode.INTERRUPTED}

_Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, as `submit` prints it.")]
_Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of jobs, as `submit` prints them.")]


@app.command()
@with_options(without=["out", "local", "config", "quiet"])
def submit(
    prompt: Prompt,
    *,
    audio: Annotated[str | None, typer.Option(help="Source audio; - is standard input.")] = None,
    noise: Noise = None,
    regions: MoreRegions = None,
    before: Before = None,
    after: After = None,
    keep: Keep = None,
    loop: Loop = False,
    bpm: Bpm = None,
    bars: Bars = None,
    sections: Sections = None,
    overlap: Overlap = None,
    webhook: Annotated[str | None, typer.Option(help="URL called when the job ends.")] = None,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Submitting again with the same key returns the first job.")
    ] = None,
    options: SoundOptions,
) -> None:
    """Submit a job and print its id."""
    from stable_audio_serve.cli import makers
    from stable_audio_serve.cli.sound_files import parse_sections

    with plain_errors(), open_client(options.url, options.key_file) as client:
        is_edit = bool(regions or before or after)
        if audio is None and (is_edit or noise is not None):
            raise ValueError("--region, --before, --after and --noise need --audio")
        if keep and not is_edit:
            raise ValueError("--keep needs --region, --before or --after")
        if audio is not None and (loop or bpm is not None or bars is not None or sections):
            raise ValueError("--loop, --bpm, --bars and --section are for prompts without --audio")
        more = {"init_noise_level": noise, "keep": keep, "webhook_url": webhook}
        more |= {"loop": loop or None, "bpm": bpm, "bars": bars}
        more |= {"extend_before_s": before or None, "extend_after_s": after or None}
        more |= parse_sections(sections, overlap_s=overlap)
        kind: Kind = "generate" if audio is None else "inpaint" if is_edit else "vary"
        request = build_request(kind, prompt, audio=audio, regions=regions, more=more, options=options)
        job = makers.submit(request, client, key=key)
    if options.as_json:
        print_json(dict(job.sent))
    else:
        typer.echo(job.id)


@app.command("list")
def list_jobs(
    status: Annotated[
        Literal["queued", "running", "succeeded", "failed", "cancelled"] | None,
        typer.Option(help="Only jobs in this state."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number to list.")] = 20,
    *,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """List your jobs, newest first."""
    found: list[Job] = []
    cursor = None
    with plain_errors(), open_client(url, key_file) as client:
        while limit > len(found):
            page = client.jobs.list(status=status, limit=min(100, limit - len(found)), cursor=cursor)
            found += page.jobs
            cursor = page.next_cursor
            if cursor is None:
                break
    if as_json:
        print_json([dict(job.sent) for job in found])
    else:
        from stable_audio_serve.cli.tables import print_own_jobs

        print_own_jobs(found)


@app.command()
def show(
    job_id: _Id,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job ends.")] = False,
    *,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Show a job as JSON.

    Exit code with --watch: 0 if the job succeeded, 1 if it failed, 130 if it was cancelled.
    """
    from stable_audio_serve.cli.tables import progress_line

    with plain_errors(), open_client(url, key_file) as client:
        if watch:
            with progress_line(quiet=False) as show_progress:
                job = client.jobs.wait(job_id, on_progress=show_progress)
        else:
            job = client.jobs.get(job_id)
    print_json(dict(job.sent))
    if watch and job.status != "succeeded":
        raise fail(job.error or f"the job was {job.status}", _EXIT_CODES[job.status])


@app.command()
def fetch(
    job_id: _Id,
    out: Annotated[str, typer.Option("--out", "-o", help="File or folder to write, - for standard output.")] = ".",
    *,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Wait until a job ends and write its audio."""
    from stable_audio_serve.cli.sound_files import check_outputs, report, save
    from stable_audio_serve.cli.tables import progress_line

    with plain_errors(), open_client(url, key_file) as client:
        check_outputs(out, as_json=as_json)
        with progress_line(quiet=False) as show_progress:
            job = client.jobs.wait(job_id, on_progress=show_progress)
        result = client.jobs.fetch(job)
        recipe = result.clips[0].recipe or {}
        files = save(result, out, prompt=str(recipe.get("prompt") or job.id))
    report(result, files, as_json=as_json)


@app.command()
def cancel(job_ids: _Ids, *, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Cancel jobs.

    Waiting jobs end at once, running jobs within one denoising step.
    """
    with plain_errors(), open_client(url, key_file) as client:
        faults = []
        for job_id in job_ids:
            try:
                job = client.jobs.cancel(job_id)
            except (ConflictError, NotFoundError, ValueError) as error:
                faults.append(f"{job_id}: {error}")
            else:
                typer.echo(f"{job.id}: {'cancelled' if job.is_over else 'asked to stop'}")
        if faults:
            raise fail("; ".join(faults))
