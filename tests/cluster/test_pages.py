"""NGINX accepts the configurations in the docs, and Prometheus accepts the queries in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
import yaml

from tests.cluster.tools import run_program
from tests.docs.blocks import DOCS, blocks_of, text_of

pytestmark = pytest.mark.cluster


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    (server,) = (block.text for block in blocks_of(DOCS / "deploy.md") if block.language == "nginx")
    pair = trustme.CA().issue_cert("audio.example.com")
    pair.private_key_pem.write_to_path(str(tmp_path / "audio.example.com.key"))
    pair.cert_chain_pems[0].write_to_path(str(tmp_path / "audio.example.com.pem"))
    http = server.replace("/etc/ssl", str(tmp_path))
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/nginx.pid; error_log stderr; events {{}}\nhttp {{\naccess_log off;\n"
        f"{http.replace('listen 443', f'listen unix:{tmp_path}/socket')}\n}}\n"
    )
    checked = run_program("nginx", "-t", "-c", config)
    assert checked.returncode == 0, checked.stderr


def test_prometheus_accepts_queries_and_scrape_config(tmp_path: Path) -> None:
    queries = text_of(DOCS / "operations.md", "promql").replace("\n  ", " ").splitlines()
    rules = [{"record": f"example:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    assert len(rules) == 2
    (tmp_path / "prometheus.yaml").write_text(text_of(DOCS / "metrics.md", "yaml"))
    for kind, file in (("rules", "rules.yaml"), ("config", "prometheus.yaml")):
        checked = run_program("promtool", "check", kind, tmp_path / file)
        assert checked.returncode == 0, checked.stderr + checked.stdout
