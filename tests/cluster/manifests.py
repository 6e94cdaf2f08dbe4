"""Render one of the Kubernetes overlays, find its pods, and report breaches of this project's operational rules.

`problems` checks these rules only. The tests validate the schemas of Kubernetes and KubeRay separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import yaml
from ray.scripts.scripts import drain_node

from tests.cluster.tools import CLUSTER, run_program

OVERLAYS = ("demo", "one-gpu", "multi-gpu", "multi-gpu-spot")
_SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|HASHES|DATABASE_URL", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"\w+://[^\s/@:]+:[^\s/@]+@")
_UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30}
_RAYLET = "http://127.0.0.1:52365/api/local_raylet_healthz "
_SLOW_ANSWERS_S = 10  # a server that answers health checks this slowly must still receive requests


@dataclass(frozen=True, slots=True)
class Group:
    """The head group or a worker group of a RayService. `spec` is the group's object in the document."""

    name: str
    spec: dict[str, Any]

    @property
    def template(self) -> dict[str, Any]:
        return self.spec["template"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def container(self) -> dict[str, Any]:
        return self.pod["containers"][0]


def render(overlay: str) -> list[dict[str, Any]]:
    """Returns the documents that `kubectl kustomize` renders. Fails if kubectl prints a warning."""
    result = run_program("kubectl", "kustomize", CLUSTER / "kuberay" / "overlays" / overlay)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return list(yaml.safe_load_all(result.stdout))


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in documents if each["kind"] == kind]


def groups(documents: list[dict[str, Any]]) -> list[Group]:
    """Returns the head and the worker groups of the only RayService."""
    (service,) = of_kind(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    workers = [Group(each["groupName"], each) for each in cluster["workerGroupSpecs"]]
    return [Group("head", cluster["headGroupSpec"]), *workers]


def serve_config(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the configuration of Ray Serve in the only RayService, parsed."""
    (service,) = of_kind(documents, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def problems(documents: list[dict[str, Any]]) -> list[str]:
    """Returns a description of each breach of our rules.

    If the breach concerns a single group, the description begins with the group's name.
    """
    found = [*_clear_secrets(documents, place=""), *_cluster_problems(documents)]
    for group in groups(documents):
        found += [f"{group.name}: {each}" for each in _group_problems(group, documents)]
    return found


def _clear_secrets(value: Any, *, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        if value.get("kind") == "Secret":
            yield f"{place}: a Secret among the manifests"
        if "value" in value and _SECRET.search(str(value.get("name", ""))):
            yield f"{place}: {value['name']} in clear"
        for key, each in value.items():
            if isinstance(each, str) and _SECRET.search(key) and key.isupper():
                yield f"{place}: {key} in clear"
            if key == "redisPassword" and "value" in each:
                yield f"{place}: redisPassword in clear"
            yield from _clear_secrets(each, place=f"{place}.{key}")
    elif isinstance(value, list):
        for each in value:
            yield from _clear_secrets(each, place=place)
    elif isinstance(value, str) and _PASSWORD_IN_URL.search(value):
        yield f"{place}: a password in a URL in clear"


def _cluster_problems(documents: list[dict[str, Any]]) -> Iterator[str]:
    (service,) = of_kind(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "Ray without token authentication"
    if not service["spec"].get("excludeHeadPodFromServeSvc"):
        yield "requests go to the head"
    (policy,) = [each for each in of_kind(documents, "NetworkPolicy") if each["metadata"]["name"] == "stable-audio"]
    for rule in policy["spec"]["ingress"]:
        if not rule.get("from") or any(not any(peer.values()) for peer in rule["from"]):
            yield "a NetworkPolicy that allows all sources"
    for budget in of_kind(documents, "PodDisruptionBudget"):
        if not isinstance(budget["spec"].get("minAvailable"), int):
            yield f"{budget['metadata']['name']}: not a number of pods, as a custom resource needs"


def _group_problems(group: Group, documents: list[dict[str, Any]]) -> Iterator[str]:
    yield from _probe_problems(group)
    yield from _stop_problems(group)
    yield from _memory_problems(group)
    yield from _confinement_problems(group)
    policies = [each["spec"]["podSelector"] for each in of_kind(documents, "NetworkPolicy")]
    if not any(_selects(each, group.labels) for each in policies):
        yield "no NetworkPolicy"
    budgets = [each["spec"] for each in of_kind(documents, "PodDisruptionBudget")]
    mine = [each for each in budgets if _selects(each["selector"], group.labels)]
    if group.name != "head" and not mine:
        yield "no PodDisruptionBudget"
    if any(each.get("minAvailable", 0) > group.spec["minReplicas"] for each in mine):
        yield "a PodDisruptionBudget above its least pods"
    if not any(mount["mountPath"] == "/weights" for mount in group.container["volumeMounts"]):
        yield "no volume for weights"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def _probe_problems(group: Group) -> Iterator[str]:
    if group.name == "head":
        if "readinessProbe" in group.container:
            yield "a readinessProbe, for which KubeRay would wait before it deploys"
        return
    ready = group.container.get("readinessProbe", {})
    if ready.get("httpGet", {}).get("path") != "/ready":
        yield "no readinessProbe on /ready"
    unready_s = ready.get("periodSeconds", 10) * ready.get("failureThreshold", 3)
    if unready_s < _SLOW_ANSWERS_S:
        yield f"readinessProbe removes a slow server after {unready_s} s"
    if unready_s + ready.get("timeoutSeconds", 1) > _drain_s(group):
        yield "readinessProbe keeps a server that drains in the Service until it stops"
    if "livenessProbe" not in group.container:
        yield "no livenessProbe"
    # If these probes fail, Kubernetes restarts the pod, so they must not depend on the application.
    for name in ("livenessProbe", "startupProbe"):
        probe = group.container.get(name)
        if probe and _RAYLET not in " ".join(probe.get("exec", {}).get("command", [])):
            yield f"{name} checks the application instead of Ray in its pod"


def _stop_problems(group: Group) -> Iterator[str]:
    if group.name != "head":
        grace = group.pod.get("terminationGracePeriodSeconds", 30)
        words = _stop_command(group)
        limit = re.search(r"timeout (\d+) ray", words)
        if not 0 < _drain_s(group) < grace - (int(limit[1]) if limit else 0):
            yield f"preStop does not wait for requests within the grace period of {grace} s"
        if not _drains_own_node(words):
            yield "preStop does not drain its node"
        if not limit:
            yield "preStop may wait for a head that is away"


def _stop_command(group: Group) -> str:
    return " ".join(group.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))


def _drain_s(group: Group) -> int:
    """How long a deleted pod waits for its requests, seconds; 0 if it does not wait."""
    found = re.search(r"sleep (\d+); ray stop", _stop_command(group))
    return int(found[1]) if found else 0


def _drains_own_node(words: str) -> bool:
    """Whether the command makes Ray drain the node that it runs on."""
    found = re.search(r"ray drain-node ([^;]*);", words)
    try:
        options = drain_node.make_context("drain-node", found[1].split() if found else []).params
    except click.UsageError:
        return False
    return options["node_id"] is None and options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def _memory_problems(group: Group) -> Iterator[str]:
    mounted = [mount["name"] for mount in group.container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    volumes = [each.get("emptyDir", {}) for each in group.pod["volumes"] if each["name"] in mounted]
    if [each.get("medium") for each in volumes] != ["Memory"]:
        yield "/dev/shm is not in memory"
        return
    room, store = parse_bytes(volumes[0]["sizeLimit"]), int(group.spec["rayStartParams"]["object-store-memory"])
    if room <= store:
        yield f"/dev/shm of {room} bytes is not above object-store-memory of {store}"
    if room >= parse_bytes(group.container["resources"]["limits"]["memory"]):
        yield "/dev/shm could take all memory"


def _confinement_problems(group: Group) -> Iterator[str]:
    pod, container = group.pod["securityContext"], group.container["securityContext"]
    if not pod.get("runAsNonRoot") or not pod.get("runAsUser"):
        yield "may run as root"
    if not container.get("readOnlyRootFilesystem") or container.get("allowPrivilegeEscalation") is not False:
        yield "may change its root or gain privileges"
    if "/tmp" not in [mount["mountPath"] for mount in group.container["volumeMounts"]]:
        yield "no writable /tmp"


def parse_bytes(text: str) -> int:
    """Returns the number of bytes that a Kubernetes quantity such as 512Mi or 2Gi means."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]
