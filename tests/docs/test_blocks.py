"""Runs the code blocks of the docs that have no test of their own. Blocks that cannot be run are only parsed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
import yaml
from kubernetes_validate import validate

from stable_audio_serve.api.middleware.limits import MAX_FIELDS_BYTES
from stable_audio_serve.audio.recipe import Recipe
from stable_audio_serve.core.metrics import METRICS, exported_name
from stable_audio_serve.core.settings import Settings
from tests.api.compat.serving import serve_app
from tests.docs.blocks import DOCS, ROOT, Block, all_blocks, pages, run_program, text_of

# Language of a code block -> the pages that may have such blocks, because a test covers these blocks. `bash` and `sh`
# blocks may be anywhere: `test_commands` runs `bash` blocks, and the tests below check `sh` blocks but do not run them.
PAGES = {
    "js": {"docs/dialects/fal.md", "docs/jobs.md"},  # tests/api/compat/test_fal_node_client.py, test_event_reader.py
    "json": {"docs/api.md", "docs/jobs.md"},
    "nginx": {"docs/deploy.md"},  # tests/cluster/test_pages.py
    "caddy": {"docs/deploy.md"},
    "promql": {"docs/operations.md"},  # tests/cluster/test_pages.py
    "python": {
        *("docs/adapters.md", "docs/architecture.md", "docs/clients.md", "docs/dialects/fal.md", "docs/jobs.md"),
        "docs/tutorial.md",
        "packaging/client/README.md",  # tests/packaging/test_client_wheel.py
    },
    "shell": {"docs/operations.md"},  # tests/jobs/test_backup.py
    "yaml": {
        *("docs/adapters.md", "docs/deploy.md", "docs/metrics.md", "docs/models.md", "docs/performance.md"),
        "docs/security.md",
    },
}
NOT_RUN = {"text", "{toctree}", "{image}", "{figure}"}
PROGRAMS = {"cp", "docker", "export", "kubectl", "make", "pip", "stable-audio-serve"}


def test_every_block_is_tested() -> None:
    found: dict[str, set[str]] = {}
    for block in all_blocks():
        language = block.language.split()[0] if block.language else ""
        if language not in NOT_RUN | {"bash", "sh"}:
            found.setdefault(language, set()).add(block.page)
    assert found == PAGES


def commands_in(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(re.sub(r"<[\w ]+>", "x", line), comments=True))]


@pytest.mark.parametrize("block", [block for block in all_blocks() if block.language == "sh"], ids=lambda b: b.page)
def test_commands_that_are_not_run_exist(block: Block) -> None:
    """The names of programs and modules are checked, but no options. `test_operations` checks our commands' options."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in commands_in(block):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[0] == ".venv/bin/python":
            assert (ROOT / words[1]).is_file(), words
            continue
        assert words[0] in PROGRAMS | {"curl"}, words
        if words[0] == "make":
            assert words[1] in targets


def can_be_started(module: str) -> bool:
    """Returns whether `python -m` finds the module."""
    spec = find_spec(module)
    return spec is not None and (spec.submodule_search_locations is None or find_spec(f"{module}.__main__") is not None)


def test_make_targets_and_modules_exist() -> None:
    texts = [(ROOT / page).read_text() for page in ["Makefile", "benchmarks/README.md", *pages()]]
    started = {module for text in texts for module in re.findall(r"(?:python3?|\$\(PY\)) -m (\w+(?:\.\w+)*)", text)}
    assert {"benchmarks", "benchmarks.gpu", "examples.demo_model.evaluate", "examples.demo_model.train"} <= started
    assert {module for module in started if not can_be_started(module)} == set()


def yaml_of(page: str) -> Any:
    return yaml.safe_load(text_of(DOCS / page, "yaml"))


@pytest.mark.parametrize("page", ["adapters.md", "models.md", "performance.md"])
def test_settings_are_valid(page: str) -> None:
    assert Settings.model_validate(yaml_of(page)).models


@pytest.mark.parametrize("page", ["deploy.md", "security.md"])
def test_parts_of_pods_are_valid(page: str) -> None:
    parts: dict[str, Any] = yaml_of(page)
    parts.pop("http", None)  # configures Traefik, not a pod
    volumes = parts.pop("volumes", [])
    container = {"name": "server", "image": "example", **parts}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "server"}}
    validate(pod | {"spec": {"containers": [container], "volumes": volumes}}, "1.30", strict=True)
    assert {mount["name"] for mount in parts.get("volumeMounts", [])} == {volume["name"] for volume in volumes}


def test_traefik_router_leads_to_the_server() -> None:
    http = yaml_of("deploy.md")["http"]
    assert http.keys() == {"routers", "services"}
    for router in http["routers"].values():
        service = http["services"][router["service"]]["loadBalancer"]
        assert service["servers"] == [{"url": "http://127.0.0.1:8000"}]
        assert service["healthCheck"]["path"] == "/ready"


def test_caddy_blocks_are_closed() -> None:
    """Only the braces are counted, because Caddy is not installed."""
    text = text_of(DOCS / "deploy.md", "caddy")
    depths = [text[: i + 1].count("{") - text[: i + 1].count("}") for i in range(len(text))]
    assert min(depths) == depths[-1] == 0
    assert "reverse_proxy 127.0.0.1:8000 {" in text


def test_caddy_accepts_the_largest_upload() -> None:
    """In Caddy, 1 MB is 10^6 bytes and 1 MiB is 2^20."""
    largest = Settings().api.max_upload_bytes + MAX_FIELDS_BYTES
    assert f"max_size {largest // 2**20}MiB\n" in text_of(DOCS / "deploy.md", "caddy")


def test_metrics_are_scraped_at_the_documented_port() -> None:
    (job,) = yaml_of("metrics.md")["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets == {"targets": ["localhost:9464"]}


def test_queries_use_existing_metrics() -> None:
    names = {exported_name(metric) for metric in METRICS.values()}
    parts = {f"{name}_{part}" for name in names for part in ("sum", "count", "bucket")}
    queries = text_of(DOCS / "operations.md", "promql")
    named = set(re.findall(r"\bray_stable_audio_\w+", re.sub(r"\{__name__[^}]*\}", "", queries)))
    assert named
    assert named <= names | parts


def test_documented_webhook_is_accepted_by_its_receiver() -> None:
    shown = json.loads(text_of(DOCS / "jobs.md", "json"))
    secret = "whsec_" + "c2VjcmV0" * 4
    scope: dict[str, Any] = {}
    exec(text_of(DOCS / "jobs.md", "python").replace("whsec_...", secret), scope)
    body, now = json.dumps(shown), datetime.now(UTC)
    signature = standardwebhooks.Webhook(secret).sign("some-job", now, body)
    headers = {"webhook-id": "some-job", "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        scope["receive"](body.encode(), headers)
    assert printed.getvalue() == "job.succeeded ...\n"
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        scope["receive"](body.replace("succeeded", "failed").encode(), headers)


def test_documented_recipe_is_valid() -> None:
    shown = json.loads(text_of(DOCS / "api.md", "json"))
    assert json.loads(Recipe.model_validate(shown).to_json()) == shown


async def run_python(page: Path, folder: Path) -> str:
    """Run the Python blocks of a page as one program, with a test server. Returns the program's output."""
    async with serve_app() as (port, _):
        program = text_of(page, "python").replace("localhost:8000", f"127.0.0.1:{port}")
        env = {"FAL_KEY": "any", "STABLE_AUDIO_URL": f"http://127.0.0.1:{port}"}
        return await run_program(sys.executable, "-c", program, folder=folder, env=env)


@pytest.mark.server
@pytest.mark.slow
async def test_programs_of_the_tutorial(tmp_path: Path) -> None:
    output = await run_python(DOCS / "tutorial.md", tmp_path)
    assert output.startswith("7 ")
    assert "done 100%" in output
    assert all((tmp_path / name).read_bytes()[:4] == b"RIFF" for name in ("bell.wav", "siren.wav"))


@pytest.mark.server
@pytest.mark.slow
async def test_program_with_fals_client(tmp_path: Path) -> None:
    await run_python(DOCS / "dialects" / "fal.md", tmp_path)


@pytest.mark.server
def test_engine_example(capsys: pytest.CaptureFixture[str]) -> None:
    exec(text_of(DOCS / "architecture.md", "python"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "(2, 132300) 44100\n"
