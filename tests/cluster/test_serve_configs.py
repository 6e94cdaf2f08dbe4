"""The configs of `cluster/`: Ray's schema and our settings take them, and what they ask for fits where they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.serve_file import deploy_schema, read_serve_file
from tests.cluster.fake_gpus import build_on_fake_gpus
from tests.cluster.tools import CLUSTER
from tests.goldens import SA3_GOLDENS
from tests.object_storage import ObjectStorage

pytestmark = pytest.mark.cluster

GPU = CLUSTER / "serve_config.gpu.yaml"
MULTI_NODE = CLUSTER / "serve_config.multi-node.yaml"


def check(path: Path) -> Settings:
    """Both schemas, of which neither lets an unknown key pass."""
    file = read_serve_file(path)
    deploy_schema(file, host=file.host, port=file.port)
    return Settings.model_validate(file.args)


def with_tiny_weights(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same models under their names, with weights that are here."""
    weights = str(SA3_GOLDENS / "tiny-s")
    return {**args, "models": [{**model, "path": weights} for model in args["models"]]}


def resources(options: Mapping[str, Mapping[str, float]], kind: str, *, replicas: str) -> float:
    return sum(each.get(kind, 0) * each[replicas] for each in options.values())


@pytest.mark.parametrize("path", [GPU, MULTI_NODE], ids=lambda path: path.name)
def test_schemas_take_it(path: Path) -> None:
    assert check(path).drain_s == 60


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


def test_eight_gpus_are_enough_and_all_are_used(tmp_path: Path) -> None:
    args = with_tiny_weights(read_serve_file(GPU).args)
    options = build_on_fake_gpus(args, nodes=[{"num_cpus": 16, "num_gpus": 8}], folder=tmp_path, environ={})
    assert set(options) >= {"medium", "small-music", "small-sfx"}
    assert resources(options, "num_gpus", replicas="most") == 8
    assert resources(options, "num_gpus", replicas="least") <= 8


def test_several_nodes_need_no_cpu_of_those_with_gpus(
    tmp_path: Path, postgres_url: str, object_storage: ObjectStorage
) -> None:
    args = with_tiny_weights(read_serve_file(MULTI_NODE).args)
    environ = object_storage.environ(object_storage.make_bucket(), STABLE_AUDIO_DATABASE_URL=postgres_url)
    nodes = [{"num_cpus": 0}, {"num_cpus": 2}, {"num_cpus": 0, "num_gpus": 4}]
    options = build_on_fake_gpus(args, nodes=nodes, folder=tmp_path, environ=environ)
    assert resources(options, "num_cpus", replicas="most") == 2  # the ingress and nothing else
    assert resources(options, "num_gpus", replicas="least") == 2.5
    assert resources(options, "num_gpus", replicas="most") == 20
    assert list(tmp_path.iterdir()) == []  # a container's root is read-only
