"""The configs in `cluster/` request no more CPUs and GPUs than their nodes have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.serving.serve_file import read_serve_file
from tests.cluster.fake_gpus import Builder
from tests.cluster.manifests import render, serve_config
from tests.cluster.test_serve_configs import GPU, MULTI_NODE
from tests.goldens import SA3_GOLDENS
from tests.object_storage import ObjectStorage

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    with Builder(tmp_path_factory.mktemp("builder") / "log") as started:
        yield started


@pytest.fixture
def stores(postgres_url: str, object_storage: ObjectStorage) -> dict[str, str]:
    """Returns environment variables with a job database and a bucket, which servers on several nodes must share."""
    return object_storage.environ(object_storage.make_bucket(), STABLE_AUDIO_DATABASE_URL=postgres_url)


def with_tiny_weights(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the application's arguments with the path of tiny local weights in place of every model's weights."""
    weights = str(SA3_GOLDENS / "tiny-s")
    return {**args, "models": [{**model, "path": weights} for model in args["models"]]}


def resources(options: Mapping[str, Mapping[str, float]], kind: str, *, replicas: str) -> float:
    return sum(each.get(kind, 0) * each[replicas] for each in options.values())


def test_config_for_eight_gpus_uses_all_of_them(builder: Builder, tmp_path: Path) -> None:
    args = with_tiny_weights(read_serve_file(GPU).args)
    options = builder.build(args, nodes=[{"num_cpus": 16, "num_gpus": 8}], folder=tmp_path, environ={})
    assert set(options) >= {"medium", "small-music", "small-sfx"}
    assert resources(options, "num_gpus", replicas="most") == 8
    assert resources(options, "num_gpus", replicas="least") <= 8


def test_config_for_several_nodes_uses_no_cpu_of_gpu_nodes(
    builder: Builder, tmp_path: Path, stores: Mapping[str, str]
) -> None:
    args = with_tiny_weights(read_serve_file(MULTI_NODE).args)
    nodes = [{"num_cpus": 0}, {"num_cpus": 2}, {"num_cpus": 0, "num_gpus": 4}]
    options = builder.build(args, nodes=nodes, folder=tmp_path, environ=stores)
    assert resources(options, "num_cpus", replicas="most") == 1.8  # only the ingress uses CPUs
    assert resources(options, "num_gpus", replicas="least") == 2.5
    assert resources(options, "num_gpus", replicas="most") == 20
    # A build must write no files, because containers have a read-only file system.
    assert list(tmp_path.iterdir()) == []


def test_small_overlays_fit_their_nodes(builder: Builder, tmp_path: Path, stores: Mapping[str, str]) -> None:
    demo, one_gpu = (serve_config(render(each))["applications"][0]["args"] for each in ("demo", "one-gpu"))
    both = {**one_gpu, "models": [*demo["models"], *with_tiny_weights(one_gpu)["models"]]}
    nodes = [{"num_cpus": 0}, {"num_cpus": 4, "num_gpus": 1}]
    options = builder.build(both, nodes=nodes, folder=tmp_path, environ=stores)
    assert options["medium"]["num_gpus"] == 1
    assert options["demo"]["most"] == 1
    assert sum(each["num_cpus"] * each["most"] for each in options.values()) <= 4
