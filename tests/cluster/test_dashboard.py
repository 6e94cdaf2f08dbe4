"""With a real Prometheus and a server under load, every query of the dashboard and of the rules has a result."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.audio_files import make_audio_file
from tests.cluster.test_monitoring import MONITORING, rules
from tests.cluster.tools import find_program
from tests.serving.conftest import model
from tests.serving.launched import LaunchedServer, free_port, write_config

pytestmark = pytest.mark.cluster

_PATIENCE_S = 90.0
_GRAFANA = MONITORING / "grafana"
DASHBOARD = json.loads((_GRAFANA / "dashboards" / "stable-audio.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
_VARIABLES = {"$__rate_interval": "30s", "$model": ".*"}


def queries() -> Iterator[tuple[str, str]]:
    """Yield the panel's title and the expression of every query, with values in place of the dashboard's variables."""
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in _VARIABLES.items():
                expression = expression.replace(variable, value)
            yield panel["title"], expression


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LaunchedServer, int]]:
    """Yield a server and the port of its metrics."""
    config = write_config(tmp_path_factory.mktemp("server"), {"models": [model("tiny")]})
    port = free_port()
    # Ray stops exporting a gauge that is not set for two report intervals. Some gauges are set only every few seconds.
    launched = LaunchedServer(
        config, "--metrics-port", str(port), environment={"RAY_metrics_report_interval_ms": "5000"}
    )
    try:
        yield launched.wait_until_ready(), port
    finally:
        launched.stop()


class Prometheus:
    """A running Prometheus with the configuration in `cluster/`, but another server address and shorter intervals."""

    def __init__(self, folder: Path, *, target_port: int) -> None:
        text = (MONITORING / "prometheus.yaml").read_text()
        text = text.replace("server:9464", f"127.0.0.1:{target_port}").replace("interval: 15s", "interval: 1s")
        (folder / "prometheus.yaml").write_text(text)
        rules_text = (MONITORING / "rules.yaml").read_text()
        (folder / "rules.yaml").write_text(rules_text.replace("[5m]", "[30s]"))
        port = free_port()
        command = [find_program("prometheus"), f"--config.file={folder}/prometheus.yaml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, path: str, **parameters: str) -> Any:
        return self._client.get(path, params=parameters).raise_for_status().json()["data"]

    def values(self, expression: str) -> list[float]:
        """Returns the current values of an expression, leaving out NaN."""
        values = [float(sample["value"][1]) for sample in self.ask("/query", query=expression)["result"]]
        return [value for value in values if not math.isnan(value)]

    def is_ready(self) -> bool:
        try:
            return bool(self.values("up"))
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def prometheus(server: tuple[LaunchedServer, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), target_port=server[1])
    try:
        wait_until(started.is_ready)
        yield started
    finally:
        started.stop()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def load(server: LaunchedServer, *, number: int) -> None:
    """Send one request of each kind: generation, edit, refused request and job."""
    body = {"prompt": f"rain {number}", "duration": 2, "steps": 2}
    assert server.client.post("/generate", json=body).status_code == 200
    form = {"prompt": "an old door", "duration": "2", "steps": "2"}
    files = {"audio": ("take.wav", make_audio_file(duration_s=1.0))}
    assert server.client.post("/v1/audio/variations", data=form, files=files).status_code == 200
    assert server.client.post("/generate", json=body | {"duration": -1}).status_code == 422
    assert server.client.post("/jobs", json=body).status_code == 202


def test_every_panel_and_recording_rule_has_a_series(
    server: tuple[LaunchedServer, int], prometheus: Prometheus
) -> None:
    wanted = list(queries()) + list(rules("record").items())
    deadline = time.monotonic() + _PATIENCE_S
    for number in itertools.count():
        load(server[0], number=number)
        wanted = [(title, query) for title, query in wanted if not prometheus.values(query)]
        if not wanted:
            break
        assert time.monotonic() < deadline, wanted
        time.sleep(1)


def test_ray_metrics_in_the_rules_are_exported(prometheus: Prometheus) -> None:
    expressions = [*rules("alert").values(), *rules("record").values(), *(query for _, query in queries())]
    names = {name for expression in expressions for name in re.findall(r"\bray_(?!stable_audio_)\w+", expression)}
    assert names
    for name in names:
        wait_until(lambda name=name: prometheus.values(name))


def test_healthy_server_fires_no_alert(prometheus: Prometheus) -> None:
    groups = prometheus.ask("/rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    wait_until(lambda: prometheus.ask("/alerts")["alerts"] == [])  # at first, missing gauges make alerts pending
    assert "level=warn" not in prometheus.log  # for example of duplicate samples


def test_panels_have_a_place_a_unit_and_a_description() -> None:
    places = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + row)
        for panel in DASHBOARD["panels"]
        for column in range(panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(column for column, _ in places) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_grafana_finds_dashboard_and_data_source() -> None:
    (source,) = yaml.safe_load((_GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    scrape = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["isDefault"], source["jsonData"]["timeInterval"]) == ("prometheus", True, scrape)
    (provider,) = yaml.safe_load((_GRAFANA / "provisioning/dashboards/stable-audio.yaml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
