"""The KubeRay overlays match all schemas and our operational rules.

For each rule, another test checks that a breach of the rule is found.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from stable_audio_serve import __version__
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.serving.placement import RUNNER_NAME
from stable_audio_serve.serving.serve_file import deploy_schema, read_serve_file
from tests.cluster import manifests
from tests.cluster.manifests import OVERLAYS, Group, groups, of_kind, problems, render, serve_config
from tests.cluster.rayservice import own_schema, schema_of_crd
from tests.cluster.tools import CLUSTER, ROOT

pytestmark = pytest.mark.cluster

_KUBERNETES = "1.34"
Documents = list[dict[str, Any]]


@functools.cache
def _rendered(overlay: str) -> Documents:
    return render(overlay)


def rendered(overlay: str) -> Documents:
    """Returns the documents of an overlay. Each call returns a new copy, which a test may change."""
    return copy.deepcopy(_rendered(overlay))


def validate(documents: Documents) -> None:
    """Validate documents with Kubernetes' schemas and our RayService schema.

    If the environment variable KUBERAY_CRD names a file with KubeRay's own definition, use this definition, too.
    """
    schemas = [own_schema()]
    if path := os.environ.get("KUBERAY_CRD"):
        schemas.append(schema_of_crd(yaml.safe_load(Path(path).read_text())))
    for document in documents:
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, _KUBERNETES, strict=True)
            continue
        for schema in schemas:
            jsonschema.validate(document, schema)
        for group in groups(documents):
            kubernetes_validate.validate(pod_of(group), _KUBERNETES, strict=True)


def pod_of(group: Group) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group.name} | group.template["metadata"]} | {
        "spec": group.pod
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_schema_accepts_the_overlay(overlay: str) -> None:
    validate(rendered(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_can_be_operated(overlay: str) -> None:
    assert problems(rendered(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_config_and_settings_are_valid(overlay: str, tmp_path: Path) -> None:
    check_serve_config(rendered(overlay), tmp_path)


def check_serve_config(documents: Documents, folder: Path) -> None:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(serve_config(documents)))
    file = read_serve_file(path)
    schema = deploy_schema(file, host=file.host, port=file.port)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8000)
    Settings.model_validate(file.args)


def test_gpu_counts_match_the_config_file() -> None:
    assert serve_config(rendered("multi-gpu")) == yaml.safe_load((CLUSTER / "serve_config.multi-node.yaml").read_text())


def test_overlay_replaces_the_placeholder_images() -> None:
    for overlay, tag in (("demo", "cpu"), ("one-gpu", "cuda"), ("multi-gpu", "cuda"), ("multi-gpu-spot", "cuda")):
        images = {group.container["image"] for group in groups(rendered(overlay))}
        assert images == {f"registry.example.com/stable-audio-serve:{__version__}-{tag}"}


def test_groups_have_room_for_every_replica() -> None:
    _, ingress, gpu = groups(rendered("multi-gpu"))
    application = serve_config(rendered("multi-gpu"))["applications"][0]
    args = application["args"]
    for replicas in ("min", "max"):
        wanted = sum(model["num_gpus"] * model["replicas"][f"{replicas}_replicas"] for model in args["models"])
        assert gpu.spec[f"{replicas}Replicas"] * int(gpu.spec["rayStartParams"]["num-gpus"]) >= wanted
    places = ingress.spec["minReplicas"] * int(ingress.spec["rayStartParams"]["num-cpus"])
    (runner,) = application["deployments"]
    cpus = args["ingress"]["replicas"] * args["ingress"]["num_cpus"]
    cpus += args["jobs"]["runners"] * runner["ray_actor_options"]["num_cpus"]
    assert places == cpus
    assert int(gpu.spec["rayStartParams"]["num-cpus"]) == 0  # a runner would keep a GPU node alive


def test_no_job_runner_is_placed_on_the_head() -> None:
    for overlay in OVERLAYS:
        head, *_ = groups(rendered(overlay))
        (runner,) = serve_config(rendered(overlay))["applications"][0]["deployments"]
        assert runner["name"] == RUNNER_NAME
        assert int(head.spec["rayStartParams"]["num-cpus"]) == 0 < runner["ray_actor_options"]["num_cpus"]


def test_redis_stores_the_heads_state_if_workers_outlive_it() -> None:
    (service,) = of_kind(rendered("multi-gpu"), "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert cluster["enableInTreeAutoscaling"] is True


def test_only_gpu_pods_run_on_spot_nodes() -> None:
    """Spot nodes are cheaper but may disappear, so the head and the ingress must not run there."""
    plain, spot = groups(rendered("multi-gpu")), groups(rendered("multi-gpu-spot"))
    assert [_choice_of_nodes(group) for group in spot] == ["NotIn", "NotIn", "In"]
    (taint,) = [each for each in spot[2].pod["tolerations"] if each not in plain[2].pod["tolerations"]]
    assert (taint["value"], taint["effect"]) == ("spot", "NoSchedule")
    assert spot[1].pod["affinity"]["podAntiAffinity"] == plain[1].pod["affinity"]["podAntiAffinity"]


def _choice_of_nodes(group: Group) -> str:
    required = group.pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    ((choice,),) = (term["matchExpressions"] for term in required["nodeSelectorTerms"])
    assert choice["values"] == ["spot"]
    return choice["operator"]


def test_deprecated_kustomize_fields_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = shutil.copytree(CLUSTER / "kuberay", tmp_path / "kuberay")
    file = copied / "overlays" / "demo" / "kustomization.yaml"
    file.write_text(file.read_text().replace("resources:", "bases:"))
    monkeypatch.setattr(manifests, "CLUSTER", tmp_path)
    with pytest.raises(AssertionError, match="'bases' is deprecated"):
        render("demo")


def _service(documents: Documents) -> dict[str, Any]:
    return of_kind(documents, "RayService")[0]["spec"]


def _worker(documents: Documents) -> Group:
    return groups(documents)[1]


def _change_stop(group: Group, old: str, new: str) -> None:
    command = group.container["lifecycle"]["preStop"]["exec"]["command"]
    assert old in command[-1]
    command[-1] = command[-1].replace(old, new)


Change = Callable[[Documents], Any]

UNKNOWN_KEYS: dict[str, Change] = {
    "of RayService": lambda d: _service(d).update(serveConfigV3=""),
    "of the cluster": lambda d: _service(d)["rayClusterConfig"].update(enableAutoscaling=True),
    "of a group": lambda d: _worker(d).spec.update(minReplica=1),
    "of the autoscaler": lambda d: _service(d)["rayClusterConfig"]["autoscalerOptions"].update(idleTimeout=1),
    "of a pod": lambda d: _worker(d).pod.update(terminationGraceSeconds=1),
    "of a container": lambda d: _worker(d).container.update(readynessProbe={}),
    "of a PodDisruptionBudget": lambda d: of_kind(d, "PodDisruptionBudget")[0]["spec"].update(minAvailible=1),
    "of a NetworkPolicy": lambda d: of_kind(d, "NetworkPolicy")[0]["spec"].update(ingres=[]),
}
BAD_VALUES: dict[str, Change] = {
    "a mode": lambda d: _service(d)["rayClusterConfig"].update(authOptions={"mode": "tokens"}),
    "a parameter that is no text": lambda d: _worker(d).spec["rayStartParams"].update({"num-cpus": 1}),
    "a missing name": lambda d: _worker(d).spec.pop("groupName"),
}


@pytest.mark.parametrize("change", [*UNKNOWN_KEYS.values(), *BAD_VALUES.values()], ids=[*UNKNOWN_KEYS, *BAD_VALUES])
def test_schemas_refuse_a_fault(change: Change) -> None:
    documents = rendered("multi-gpu")
    change(documents)
    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate(documents)


_ON_HEALTH = {"httpGet": {"path": "/health", "port": "serve"}, "failureThreshold": 6}

PROBLEMS: dict[str, Change] = {
    "no readinessProbe on /ready": lambda d: _worker(d).container.pop("readinessProbe"),
    "ingress: no livenessProbe": lambda d: _worker(d).container.pop("livenessProbe"),
    "ingress: livenessProbe checks the application": lambda d: _worker(d).container.update(livenessProbe=_ON_HEALTH),
    "ingress: startupProbe checks the application": lambda d: _worker(d).container.update(startupProbe=_ON_HEALTH),
    "gpu: livenessProbe checks the application": lambda d: groups(d)[2].container.update(livenessProbe=_ON_HEALTH),
    "ingress: readinessProbe removes a slow server after 4 s": lambda d: (
        _worker(d).container["readinessProbe"].update(periodSeconds=2, failureThreshold=2)
    ),
    "gpu: readinessProbe keeps a server that drains": lambda d: (
        groups(d)[2].container["readinessProbe"].update(periodSeconds=20)
    ),
    "gpu: no livenessProbe": lambda d: groups(d)[2].container.pop("livenessProbe"),
    "KubeRay would wait": lambda d: groups(d)[0].container.update(readinessProbe={"httpGet": {"path": "/ready"}}),
    "grace period of 60 s": lambda d: _worker(d).pod.update(terminationGracePeriodSeconds=60),
    "preStop does not wait": lambda d: _worker(d).container.pop("lifecycle"),
    "gpu: preStop does not wait": lambda d: _change_stop(groups(d)[2], "timeout 15", "timeout 60"),
    "ingress: preStop does not drain": lambda d: _change_stop(_worker(d), "drain-node", "status"),
    "gpu: preStop does not drain": lambda d: _change_stop(groups(d)[2], "PREEMPTION", "PREEMTION"),
    "ingress: preStop may wait": lambda d: _change_stop(_worker(d), "timeout 15 ", ""),
    "is not above object-store-memory": lambda d: (
        _worker(d).spec["rayStartParams"].update({"object-store-memory": "9000000000"})
    ),
    "/dev/shm is not in memory": lambda d: _worker(d).pod["volumes"][1].update(emptyDir={}),
    "HF_TOKEN in clear": lambda d: _worker(d).container.update(env=[{"name": "HF_TOKEN", "value": "hf_x"}]),
    "STABLE_AUDIO_DATABASE_URL in clear": lambda d: of_kind(d, "ConfigMap")[0]["data"].update(
        STABLE_AUDIO_DATABASE_URL="postgresql://host/jobs"
    ),
    "a password in a URL": lambda d: of_kind(d, "ConfigMap")[0]["data"].update(
        ANY="postgresql://user:secret@host/jobs"
    ),
    "redisPassword in clear": lambda d: _service(d)["rayClusterConfig"]["gcsFaultToleranceOptions"].update(
        redisPassword={"value": "secret"}
    ),
    "a Secret among": lambda d: d.append({"kind": "Secret", "data": {}}),
    "without token authentication": lambda d: _service(d)["rayClusterConfig"].pop("authOptions"),
    "requests go to the head": lambda d: _service(d).pop("excludeHeadPodFromServeSvc"),
    "allows all sources": lambda d: of_kind(d, "NetworkPolicy")[0]["spec"]["ingress"].append(
        {"ports": [{"port": 8265}]}
    ),
    "no NetworkPolicy": lambda d: _worker(d).labels.pop("app.kubernetes.io/part-of"),
    "no PodDisruptionBudget": lambda d: _worker(d).labels.update({"app.kubernetes.io/component": "other"}),
    "above its least pods": lambda d: _worker(d).spec.update(minReplicas=0),
    "not a number of pods": lambda d: of_kind(d, "PodDisruptionBudget")[0].update(
        spec={"maxUnavailable": 1, "selector": of_kind(d, "PodDisruptionBudget")[0]["spec"]["selector"]}
    ),
    "may run as root": lambda d: _worker(d).pod["securityContext"].pop("runAsNonRoot"),
    "may change its root": lambda d: _worker(d).container["securityContext"].pop("readOnlyRootFilesystem"),
    "no volume for weights": lambda d: _worker(d).container["volumeMounts"].pop(2),
    "no writable /tmp": lambda d: _worker(d).container["volumeMounts"].pop(0),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_operational_fault_is_detected(problem: str) -> None:
    documents = rendered("multi-gpu")
    PROBLEMS[problem](documents)
    assert problem in "\n".join(problems(documents))


def test_unknown_setting_in_the_config_is_refused(tmp_path: Path) -> None:
    documents = rendered("demo")
    service = _service(documents)
    service["serveConfigV2"] = service["serveConfigV2"].replace("ingress:", "ingres:")
    with pytest.raises((ConfigError, ValueError), match="ingres"):
        check_serve_config(documents, tmp_path)


def test_official_definition_refuses_unknown_keys() -> None:
    """The test uses a small CustomResourceDefinition in the same format as KubeRay's."""
    spec = {
        "type": "object",
        "properties": {"serveConfigV2": {"type": "string"}, "size": {"x-kubernetes-int-or-string": True}},
    }
    definition = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": spec}}]}}
    schema = schema_of_crd(definition)
    jsonschema.validate({"serveConfigV2": "", "size": "1Gi"}, schema)
    with pytest.raises(jsonschema.ValidationError, match="other"):
        jsonschema.validate({"other": 1}, schema)


def test_manifests_name_no_private_registry() -> None:
    for path in (ROOT / "cluster").rglob("*"):
        if path.suffix in {".yaml", ""} and path.is_file():
            assert "registry." not in path.read_text().replace("registry.example.com", "")
