"""Call a server with the unmodified Python client of ElevenLabs and print the results as JSON.

Usage: elevenlabs_python.py <base URL> <key>
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

from elevenlabs.client import AsyncElevenLabs, ElevenLabs
from elevenlabs.core.api_error import ApiError
from elevenlabs.types import MusicPrompt, SongSection

URL, KEY = sys.argv[1:]
client = ElevenLabs(base_url=URL, api_key=KEY)


def describe(pieces: list[bytes]) -> dict[str, Any]:
    content = b"".join(pieces)
    return {"size": len(content), "pieces": len(pieces), "sha256": hashlib.sha256(content).hexdigest()}


def sound() -> Any:
    plain = client.text_to_sound_effects.convert(text="a dog barks", duration_seconds=1)
    full = client.text_to_sound_effects.convert(
        text="a motor",
        duration_seconds=1.5,
        loop=True,
        prompt_influence=0.7,
        model_id="eleven_text_to_sound_v2",
        output_format="pcm_16000",
        enable_logging=True,
    )
    return {"plain": describe(list(plain)), "full": describe(list(full))}


def music() -> Any:
    whole = list(client.music.compose(prompt="slow piano", music_length_ms=3000, seed=7, output_format="wav_24000"))
    streamed = list(client.music.stream(prompt="slow piano", music_length_ms=3000, seed=7, output_format="wav_24000"))
    section = {"negative_local_styles": [], "duration_ms": 3000, "lines": []}
    plan = MusicPrompt(
        positive_global_styles=["jazz"],
        negative_global_styles=["metal"],
        sections=[
            SongSection(section_name=name, positive_local_styles=[style], **section)
            for name, style in (("Intro", "piano"), ("Solo", "saxophone"))
        ],
    )
    planned = list(client.music.compose(composition_plan=plan, output_format="ulaw_8000", force_instrumental=True))
    return {"whole": describe(whole), "streamed": describe(streamed), "planned": describe(planned)}


async def _asynchronous() -> Any:
    other = AsyncElevenLabs(base_url=URL, api_key=KEY)
    pieces = other.text_to_sound_effects.convert(text="wind", duration_seconds=1, output_format="opus_48000_64")
    return describe([piece async for piece in pieces])


def account() -> Any:
    user = client.user.get()
    return {
        "user": user.user_id,
        "tier": user.subscription.tier,
        "limit": user.subscription.character_limit,
        "models": [model.model_id for model in client.models.list()],
    }


def _refused(call: Callable[[], Any]) -> Any:
    try:
        call()
    except ApiError as error:
        return {"name": type(error).__name__, "status": error.status_code, "body": error.body}
    return None


def errors() -> Any:
    convert = client.text_to_sound_effects.convert
    stranger = ElevenLabs(base_url=URL, api_key="wrong")
    return {
        "long": _refused(lambda: list(convert(text="x", duration_seconds=31))),
        "format": _refused(lambda: list(convert(text="x", output_format="mp3_1_1"))),
        "finetune": _refused(lambda: list(client.music.compose(prompt="x", finetune_id="f"))),
        "key": _refused(stranger.user.get),
        "sound key": _refused(lambda: list(stranger.text_to_sound_effects.convert(text="x"))),
    }


print(
    json.dumps(
        {
            "sound": sound(),
            "music": music(),
            "asynchronous": asyncio.run(_asynchronous()),
            "account": account(),
            "errors": errors(),
        }
    )
)
