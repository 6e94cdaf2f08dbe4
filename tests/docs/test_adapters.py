"""The examples of docs/adapters.md run, with a server that has the adapter that the page uses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stable_audio_serve.api.app import create_app
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.adapters import Library
from tests.adapter_files import write_file
from tests.backends import ToneBackend
from tests.docs.blocks import DOCS, blocks_of, run_program, text_of
from tests.sockets import listening

PAGE = DOCS / "adapters.md"


@pytest.mark.server
@pytest.mark.slow
async def test_examples_of_the_page_run(tmp_path: Path) -> None:
    write_file(tmp_path / "adapters" / "octave-down.safetensors")
    backend = ToneBackend()
    model = {"name": backend.catalog.default.name, "lora_folder": str(tmp_path / "adapters")}
    settings = Settings.model_validate({"models": [model], "output_dir": str(tmp_path / "out")})
    library = Library(settings, backend.catalog)
    library.start()
    (curl,) = (block.text for block in blocks_of(PAGE) if block.text.startswith("curl "))
    app = create_app(backend, settings, adapters=library)
    async with app.router.lifespan_context(app), listening(app, lifespan="off") as port:
        env = {"STABLE_AUDIO_URL": f"http://127.0.0.1:{port}"}
        await run_program("bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{port}"), folder=tmp_path, env=env)
        output = await run_program(sys.executable, "-c", text_of(PAGE, "python"), folder=tmp_path, env=env)
    assert output == f"[('octave-down', '{model['name']}', 'lora')]\n"
    assert (tmp_path / "low.wav").read_bytes()[:4] == b"RIFF"
    used = [[(lora.name, lora.strength, lora.interval) for lora in request.loras] for _, request in backend.requests]
    assert used == [
        [("octave-down", 1.0, (0.0, 1.0))],
        [("octave-down", 1.0, (0.0, 1.0))],
        [("octave-down", 1.0, (0.0, 0.5))],
    ]
