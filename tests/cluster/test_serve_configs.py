"""Ray's schema and the server's settings accept the configs in `cluster/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.serve_file import deploy_schema, read_serve_file
from tests.cluster.tools import CLUSTER

pytestmark = pytest.mark.cluster

GPU = CLUSTER / "serve_config.gpu.yaml"
MULTI_NODE = CLUSTER / "serve_config.multi-node.yaml"


def check(path: Path) -> Settings:
    """Validate a config with Ray's schema, and its arguments as the server's settings. Both refuse unknown keys."""
    file = read_serve_file(path)
    deploy_schema(file, host=file.host, port=file.port)
    return Settings.model_validate(file.args)


@pytest.mark.parametrize("path", [GPU, MULTI_NODE], ids=lambda path: path.name)
def test_schemas_accept_the_config(path: Path) -> None:
    assert check(path).ingress.replicas > 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("ingress:", "ingres:", "ingres"),
        ("http_options:", "http_option:", "http_option"),
        ("num_gpus: 1", "num_gpu: 1", "num_gpu"),
    ],
)
def test_schemas_refuse_a_misspelt_key(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(MULTI_NODE.read_text().replace(old, new))
    with pytest.raises((ConfigError, ValueError), match=named):
        check(path)
