"""Call a server with the unmodified Python client of fal and print the results as JSON.

Usage: fal_python.py environment|formats <base URL> <audio file>. `environment` configures the client with FAL_RUN_HOST,
FAL_QUEUE_RUN_HOST and SSL_CERT_FILE only. `formats` replaces the client's URL formats, which also allows plain HTTP.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import fal_client
import fal_client.client as internals
import httpx

APP = "fal-ai/stable-audio"
CLIP = {"prompt": "quick", "seconds_total": 1}


def run() -> Any:
    return fal_client.run(APP, CLIP)


def submit() -> Any:
    handle = fal_client.submit(APP, {**CLIP, "prompt": "steady"}, priority="low", hint="any")
    first = handle.status()
    events = [type(event).__name__ for event in handle.iter_events(with_logs=True)]
    last = fal_client.status(APP, handle.request_id, with_logs=True)
    return {
        "first": type(first).__name__,
        "events": list(dict.fromkeys(events)),
        "num_logs": len(last.logs),
        "inference_time": last.metrics["inference_time"],
        "error": last.error,
        "result": handle.get(),
        "again": fal_client.result(APP, handle.request_id),
    }


def subscribe() -> Any:
    seen: list[str] = []
    ids: list[str] = []
    result = fal_client.subscribe(
        f"{APP}/some/endpoint",
        CLIP,
        with_logs=True,
        on_enqueue=ids.append,
        on_queue_update=lambda status: seen.append(type(status).__name__),
        start_timeout=300,
    )
    return {"result": result, "num_ids": len(ids), "last": seen[-1]}


def subscribe_async() -> Any:
    async def call() -> Any:
        client = fal_client.AsyncClient(key="none")
        handle = await client.submit(APP, CLIP)
        events = [type(event).__name__ async for event in handle.iter_events(with_logs=True)]
        return {"last": events[-1], "result": await handle.get(), "run": await client.run(APP, CLIP)}

    return asyncio.run(call())


def cancel() -> Any:
    handle = fal_client.submit(APP, {"prompt": "slow"})
    handle.cancel()
    *_, last = handle.iter_events()
    return {"error": last.error, "error_type": last.error_type, "result": failure(handle.get)}


def client_timeout() -> Any:
    try:
        fal_client.subscribe(APP, {"prompt": "slow"}, client_timeout=1.5)
    except fal_client.FalClientTimeoutError as error:
        *_, last = fal_client.SyncClient(key="none").get_handle(APP, error.request_id).iter_events()
        return {"error_type": last.error_type}


def start_timeout() -> Any:
    # The server's test runs at most two jobs at once.
    ahead = [fal_client.submit(APP, {"prompt": "slow"}) for _ in range(2)]
    late = failure(lambda: fal_client.subscribe(APP, CLIP, start_timeout=1.1))
    for handle in ahead:
        handle.cancel()
    return late


def upload() -> Any:
    client = fal_client.SyncClient(key="none")
    data = bytes(range(256)) * 100
    whole = client.upload(data, "audio/wav", "take 1.wav")
    fallback = client.upload(data, "audio/wav", repository="fal")
    return {url.rpartition("/")[2]: httpx.get(url).content == data for url in (whole, fallback)}


def stable_audio_3(source: str) -> Any:
    """Make a clip, upload `source`, a file, and edit it with several endpoints."""
    given = {"prompt": "quick", "duration": 1, "output_format": "wav"}
    url = fal_client.upload_file(source)
    edit = {"prompt": "quick", "audio_url": url}
    return {
        "text": fal_client.run("fal-ai/stable-audio-3/small/sfx/text-to-audio", {**given, "seed": 5}),
        "variation": fal_client.subscribe("fal-ai/stable-audio-3/small/sfx/audio-to-audio", {**given, **edit}),
        "longer": fal_client.subscribe(
            "fal-ai/stable-audio-3/medium/audio-outpainting", {**edit, "extend_seconds_after": 1}
        ),
        "inline": fal_client.run(
            "fal-ai/stable-audio-25/audio-to-audio",
            {"prompt": "quick", "audio_url": fal_client.encode_file(source), "sync_mode": True},
        ),
        "invalid": failure(lambda: fal_client.submit("fal-ai/stable-audio-3/medium/audio-inpainting", edit)),
        "unserved": failure(lambda: fal_client.submit("fal-ai/stable-audio-3/medium/base/text-to-audio", given)),
    }


def failure(call: Callable[[], Any]) -> Any:
    try:
        call()
    except fal_client.FalClientHTTPError as error:
        return {
            "status": error.status_code,
            "detail": error.message,
            "error_type": error.error_type,
            "text": str(error),
        }


def errors() -> Any:
    return {
        "invalid run": failure(lambda: fal_client.run(APP, {"prompt": "x", "steps": 1})),
        "invalid submit": failure(lambda: fal_client.submit(APP, {})),
        "invalid subscribe": failure(lambda: fal_client.subscribe(APP, {"prompt": "x", "seconds_total": 48})),
        "failed": failure(lambda: fal_client.subscribe(APP, {"prompt": "fail"})),
        "unknown app": failure(lambda: fal_client.run("fal-ai/fast-sdxl", CLIP)),
        "unknown request": failure(lambda: fal_client.status(APP, "7875a82d-0991-47c8-99fa-bdd57f4f0303")),
        "too late to cancel": failure(lambda: fal_client.cancel(APP, done_request())),
        "stream": stream_status(),
    }


def done_request() -> str:
    handle = fal_client.submit(APP, CLIP)
    handle.get()
    return handle.request_id


def stream_status() -> Any:
    try:
        return list(fal_client.stream(APP, CLIP))
    except Exception as error:  # noqa: BLE001  the client may raise any error
        return type(error).__name__


def main(way: str, base: str, source: str) -> None:
    internals.REST_URL = internals.CDN_URL = base  # no environment variable sets these URLs
    if way == "formats":
        internals.RUN_URL_FORMAT = f"{base}/"
        internals.QUEUE_URL_FORMAT = f"{base}/queue/"
    calls = (run, submit, subscribe, subscribe_async, cancel, client_timeout, start_timeout, upload, errors)
    print(json.dumps({call.__name__: call() for call in calls} | {"stable_audio_3": stable_audio_3(source)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
