"""The Compose files are valid. Addresses, files and settings in them match the monitoring files and the server."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stable_audio_serve import __version__
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.serving.serve_file import PACKAGED_FILE, read_serve_file
from tests.cluster.tools import CLUSTER, run_program

pytestmark = pytest.mark.cluster

FILE = CLUSTER / "compose.yaml"
GPU_FILE = CLUSTER / "compose.gpu.yaml"
_SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|HASHES|DATABASE_URL")
_NEEDED = re.compile(r"\$\{(\w+):\?[^}]*\}")
_FILLED_IN = re.compile(r"\$\{\w+:[?-][^}]*\}")


def compose() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(FILE.read_text()))


def compose_with_gpu() -> dict[str, Any]:
    return merged(compose(), yaml.safe_load(GPU_FILE.read_text()))


def merged(below: Any, above: Any) -> Any:
    """Merge two parsed Compose files. Mappings are merged by key. Other values of `above` replace values of `below`."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: merged(below.get(key), value) for key, value in above.items()}
    assert below is None or not isinstance(above, list)
    return above


def gpu_problems(tree: dict[str, Any]) -> Iterator[str]:
    yield from problems(tree)
    server = tree["services"]["server"]
    if server["image"] != f"stable-audio-serve:{__version__}-cuda" or server["build"]["target"] != "cuda":
        yield "not the image for CUDA"
    if server["build"]["args"]["TORCH_INDEX_URL"]:
        yield "torch for CPUs in the image for CUDA"
    devices = server.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if not any("gpu" in device["capabilities"] and device.get("count") for device in devices):
        yield "no GPU is reserved"


def settings_of(tree: dict[str, Any]) -> Settings:
    """Returns the settings of a server that runs with the environment variables in this Compose file."""
    environ = {key: _FILLED_IN.sub("x", value) for key, value in tree["services"]["server"]["environment"].items()}
    environ["STABLE_AUDIO_API_KEY_HASHES"] = ""
    return load_settings(read_serve_file(PACKAGED_FILE).args, environ=environ, directory=Path("/"))


def problems(tree: dict[str, Any]) -> list[str]:
    return [*_service_problems(tree), *_server_problems(tree), *_link_problems(tree)]


def _service_problems(tree: dict[str, Any]) -> Iterator[str]:
    for name, service in tree["services"].items():
        if not re.search(r":[\w.-]+$", service["image"]):
            yield f"{name}: an image without a version"
        for key, value in service.get("environment", {}).items():
            if _SECRET.search(key) and "${" not in value:
                yield f"{name}: {key} in clear"
        for port in service.get("ports", []):
            if not port.startswith("127.0.0.1:"):
                yield f"{name}: open to every network"
        for source in (volume.partition(":")[0] for volume in service.get("volumes", [])):
            if source.startswith(".") and not (CLUSTER / source).exists():
                yield f"{name}: {source} does not exist"
            elif not source.startswith(".") and source not in tree["volumes"]:
                yield f"{name}: no volume {source}"


def _server_problems(tree: dict[str, Any]) -> Iterator[str]:
    server = tree["services"]["server"]
    if server.get("stop_signal") != "SIGINT":
        yield "the server stops without draining"
    if int(server.get("stop_grace_period", "10s").removesuffix("s")) <= settings_of(tree).drain_s:
        yield "the server is killed before drain_s is over"
    if not server.get("read_only") or not any(each.startswith("/tmp:exec") for each in server.get("tmpfs", [])):
        yield "the root may be written, or /tmp not"
    if "shm_size" not in server:
        yield "Docker's 64 MB of shared memory"
    if not server.get("healthcheck", {}).get("test", [""])[-1].endswith(":8000/sa3/health"):
        yield "no healthcheck on /sa3/health"
    for store in ("postgres", "object-store"):
        if server["depends_on"].get(store) != {"condition": "service_healthy"}:
            yield f"the server does not wait for {store}"


def _link_problems(tree: dict[str, Any]) -> Iterator[str]:
    settings, services = settings_of(tree), tree["services"]
    if settings.storage.endpoint_url != "http://object-store:8333":
        yield "the files of jobs are not in the store"
    if settings.storage.links != "server" and "ports" not in services["object-store"]:
        yield "links lead to a store that clients do not reach"
    if settings.storage.bucket != services["object-store"]["environment"].get("S3_BUCKET"):
        yield "another bucket than the object store creates"
    database = services["postgres"]["environment"]
    user, name = database["POSTGRES_USER"], database["POSTGRES_DB"]
    if not re.fullmatch(rf"postgresql://{user}:\w+@postgres/{name}", settings.jobs.database_url or ""):
        yield "the jobs are not in PostgreSQL"
    scraped = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [target for job in scraped for each in job.get("static_configs", []) for target in each["targets"]]
    command = services["server"]["command"]
    if f"server:{command[command.index('--metrics-port') + 1]}" not in targets:
        yield "Prometheus has another server address"
    if set(services["prometheus"]["networks"]).isdisjoint(services["server"]["networks"]):
        yield "Prometheus does not reach the server"


def test_schema_accepts_both_files() -> None:
    result = run_program("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE, GPU_FILE)
    assert result.returncode == 0, result.stdout


def test_schema_refuses_unknown_keys(tmp_path: Path) -> None:
    paths = [tmp_path / "compose.yaml", tmp_path / "compose.gpu.yaml"]
    paths[0].write_text(FILE.read_text().replace("stop_signal:", "stop_sygnal:"))
    paths[1].write_text(GPU_FILE.read_text().replace("capabilities:", "capability:"))
    result = run_program("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *paths)
    assert result.returncode != 0
    assert "stop_sygnal" in result.stdout
    assert "capability" in result.stdout


def test_services_match_each_other() -> None:
    assert problems(compose()) == []
    assert list(gpu_problems(compose_with_gpu())) == []


def test_every_operator_variable_is_in_the_example() -> None:
    example = set(re.findall(r"(?m)^(\w+)=$", (CLUSTER / "compose.env.example").read_text()))
    assert set(_NEEDED.findall(FILE.read_text())) <= example
    assert set(re.findall(r"\$\{(\w+)", FILE.read_text())) == example


def _services(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["services"]


PROBLEMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an image without a version": lambda t: _services(t)["grafana"].update(image="grafana/grafana"),
    "POSTGRES_PASSWORD in clear": lambda t: _services(t)["postgres"]["environment"].update(POSTGRES_PASSWORD="x"),
    "open to every network": lambda t: _services(t)["server"].update(ports=["8000:8000"]),
    "does not exist": lambda t: _services(t)["prometheus"].update(volumes=["./monitoring/other.yaml:/other.yaml"]),
    "no volume other": lambda t: _services(t)["postgres"].update(volumes=["other:/data"]),
    "stops without draining": lambda t: _services(t)["server"].pop("stop_signal"),
    "killed before drain_s": lambda t: _services(t)["server"].update(stop_grace_period="20s"),
    "root may be written": lambda t: _services(t)["server"].pop("read_only"),
    "shared memory": lambda t: _services(t)["server"].pop("shm_size"),
    "no healthcheck on /sa3/health": lambda t: _services(t)["server"].pop("healthcheck"),
    "does not wait for postgres": lambda t: _services(t)["server"]["depends_on"].pop("postgres"),
    "not in the store": lambda t: _services(t)["server"]["environment"].pop("STABLE_AUDIO_STORAGE_ENDPOINT_URL"),
    "clients do not reach": lambda t: _services(t)["server"]["environment"].pop("STABLE_AUDIO_STORAGE_LINKS"),
    "another bucket": lambda t: _services(t)["object-store"]["environment"].update(S3_BUCKET="other"),
    "not in PostgreSQL": lambda t: _services(t)["postgres"]["environment"].update(POSTGRES_DB="other"),
    "has another server address": lambda t: _services(t)["server"]["command"].__setitem__(-1, "9000"),
    "does not reach the server": lambda t: _services(t)["prometheus"].update(networks=["stores_only"]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_mismatch_is_detected(problem: str) -> None:
    tree = compose()
    PROBLEMS[problem](tree)
    assert problem in "\n".join(problems(tree))


GPU_PROBLEMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not the image for CUDA": lambda t: _services(t)["server"].update(image=f"stable-audio-serve:{__version__}-cpu"),
    "torch for CPUs": lambda t: _services(t)["server"]["build"].update(
        args=compose()["services"]["server"]["build"]["args"]
    ),
    "no GPU is reserved": lambda t: _services(t)["server"].pop("deploy"),
}


@pytest.mark.parametrize("problem", GPU_PROBLEMS)
def test_gpu_problem_is_detected(problem: str) -> None:
    tree = compose_with_gpu()
    GPU_PROBLEMS[problem](tree)
    assert problem in "\n".join(gpu_problems(tree))
