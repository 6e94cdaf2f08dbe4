"""Ingress, HTTPRoute and PodMonitor are valid Kubernetes documents and fit the server's settings and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from stable_audio_serve.core.settings import Settings
from tests.cluster.manifests import groups, of_kind, render, serve_config
from tests.cluster.test_monitoring import load, rules
from tests.cluster.tools import CLUSTER

pytestmark = pytest.mark.cluster

_MIB = 2**20
_FIELDS_MIB = 1  # the fields of a form, without its file, may have this size
_NGINX = "nginx.ingress.kubernetes.io/"
_SERVICE = "stable-audio-serve-svc"  # the Service that KubeRay creates for the RayService `stable-audio`
_JOB = re.compile(r'up\{job="([^"]+)"\}')

Documents = list[dict[str, Any]]


def documents() -> Documents:
    folder = CLUSTER / "kuberay"
    paths = [folder / "entry" / "ingress.yaml", folder / "entry" / "http-route.yaml", *folder.glob("monitoring/*.yaml")]
    return [each for path in paths for each in yaml.safe_load_all(path.read_text())]


def closed(required: str, **properties: Any) -> dict[str, Any]:
    """Returns the JSON schema of an object that may have only the keys in `properties`.

    `required` has the names of the mandatory keys, separated by spaces.
    """
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: dict[str, Any] = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
# Schemas of documents that are not part of Kubernetes itself, limited to the fields that our documents use.
SPECS = {
    "HTTPRoute": closed(
        "parentRefs rules",
        parentRefs=many(closed("name", name=TEXT, namespace=TEXT)),
        hostnames=many(TEXT),
        rules=many(
            closed(
                "backendRefs",
                matches=many(closed("path", path=closed("type value", type={"enum": ["PathPrefix"]}, value=TEXT))),
                timeouts=closed("", request=DURATION, backendRequest=DURATION),
                backendRefs=many(closed("name port", name=TEXT, port={"type": "integer"})),
            )
        ),
    ),
    "PodMonitor": closed(
        "selector podMetricsEndpoints",
        jobLabel=TEXT,
        selector=closed("matchLabels", matchLabels=TEXTS),
        podMetricsEndpoints=many(
            closed(
                "port",
                port=TEXT,
                interval=DURATION,
                metricRelabelings=many(closed("action", action={"enum": ["labeldrop"]}, regex=TEXT)),
            )
        ),
    ),
}


def validate(document: dict[str, Any]) -> None:
    if document["kind"] == "Ingress":
        kubernetes_validate.validate(document, "1.34", strict=True)
        return
    head = {"apiVersion": TEXT, "kind": TEXT, "metadata": closed("name", name=TEXT, labels=TEXTS)}
    jsonschema.validate(document, closed("spec", **head, spec=SPECS[document["kind"]]))


def problems(made: Documents) -> list[str]:
    (ingress,), (route,) = of_kind(made, "Ingress"), of_kind(made, "HTTPRoute")
    return [*_ingress_problems(ingress), *_route_problems(route), *_monitor_problems(of_kind(made, "PodMonitor"))]


def _ingress_problems(ingress: dict[str, Any]) -> Iterator[str]:
    api = Settings().api
    annotations = {key.removeprefix(_NGINX): value for key, value in ingress["metadata"]["annotations"].items()}
    if annotations.get("proxy-body-size") != f"{api.max_upload_bytes // _MIB + _FIELDS_MIB}m":
        yield "Ingress: refuses bodies that the server accepts, or passes larger ones"
    if float(annotations.get("proxy-read-timeout", 60)) < api.max_deadline_s:
        yield "Ingress: ends answers before api.max_deadline_s"
    if {annotations.get(key) for key in ("proxy-buffering", "proxy-request-buffering")} != {"off"}:
        yield "Ingress: buffers bodies or events"
    if annotations.get("proxy-next-upstream") != "off":
        yield "Ingress: sends a POST twice"
    for rule in ingress["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            if path["backend"]["service"] != {"name": _SERVICE, "port": {"number": 8000}}:
                yield "Ingress: routes to another service"


def _route_problems(route: dict[str, Any]) -> Iterator[str]:
    for rule in route["spec"]["rules"]:
        times = [rule.get("timeouts", {}).get(name, "0s") for name in ("request", "backendRequest")]
        if any(float(time.removesuffix("s")) < Settings().api.max_deadline_s for time in times):
            yield "HTTPRoute: ends answers before api.max_deadline_s"
        if rule["backendRefs"] != [{"name": _SERVICE, "port": 8000}]:
            yield "HTTPRoute: routes to another service"


def _monitor_problems(monitors: Documents) -> Iterator[str]:
    pods = groups(render("multi-gpu"))
    (job,) = set(_JOB.findall(" ".join(rules("alert").values())))
    monitored = set()
    for monitor in monitors:
        spec, name = monitor["spec"], monitor["metadata"]["name"]
        chosen = [pod for pod in pods if spec["selector"]["matchLabels"].items() <= pod.labels.items()]
        wanted = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
        if not chosen or any(wanted - {port["name"] for port in pod.container["ports"]} for pod in chosen):
            yield f"{name}: a pod has no such port"
        if {pod.labels.get(spec.get("jobLabel", "")) for pod in chosen} == {job}:
            monitored |= {pod.name for pod in chosen}
            (ours,) = load("prometheus.yaml")["scrape_configs"]
            if spec["podMetricsEndpoints"][0].get("metricRelabelings") != ours["metric_relabel_configs"]:
                yield f"{name}: other labels than prometheus.yaml"
        elif "haproxy-metrics" not in wanted:
            yield f"{name}: not the job of the alerts"
        elif any(pod.name != "ingress" for pod in chosen):
            yield f"{name}: pods that may have no HAProxy"
    if monitored != {pod.name for pod in pods}:
        yield "pods without a PodMonitor"


@pytest.mark.parametrize(
    "document", documents(), ids=lambda document: f"{document['kind']} {document['metadata']['name']}"
)
def test_schema_accepts_the_document(document: dict[str, Any]) -> None:
    validate(document)


def test_documents_match_overlays_alerts_and_settings() -> None:
    assert problems(documents()) == []


def test_haproxy_serves_metrics_on_the_named_port() -> None:
    made = render("multi-gpu")
    assert of_kind(made, "ConfigMap")[0]["data"]["STABLE_AUDIO_METRICS_HOST"] == "0.0.0.0"
    assert serve_config(made)["proxy_location"] == "EveryNode"
    (policy,) = [each for each in of_kind(made, "NetworkPolicy") if each["metadata"]["name"] == "stable-audio"]
    open_ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    named = {port["name"]: port["containerPort"] for port in groups(made)[1].container["ports"]}
    assert {named["metrics"], named["haproxy-metrics"]} <= open_ports


def _annotations(made: Documents) -> dict[str, Any]:
    return made[0]["metadata"]["annotations"]


def _rule(made: Documents) -> dict[str, Any]:
    return made[1]["spec"]["rules"][0]


Change = Callable[[Documents], Any]

UNKNOWN_KEYS: dict[str, Change] = {
    "of an Ingress": lambda d: d[0]["spec"].update(className="nginx"),
    "of an HTTPRoute": lambda d: _rule(d)["timeouts"].update(response="1s"),
    "no duration": lambda d: _rule(d)["timeouts"].update(request="1 hour"),
    "of a PodMonitor": lambda d: d[2]["spec"].update(namespaceSelectors={}),
}


@pytest.mark.parametrize("change", UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_schema_refuses_a_fault(change: Change) -> None:
    made = documents()
    change(made)
    with pytest.raises(jsonschema.ValidationError):
        list(map(validate, made))


PROBLEMS: dict[str, Change] = {
    "Ingress: refuses bodies": lambda d: _annotations(d).pop(f"{_NGINX}proxy-body-size"),
    "Ingress: ends answers": lambda d: _annotations(d).update({f"{_NGINX}proxy-read-timeout": "600"}),
    "Ingress: buffers bodies": lambda d: _annotations(d).pop(f"{_NGINX}proxy-buffering"),
    "Ingress: sends a POST twice": lambda d: _annotations(d).pop(f"{_NGINX}proxy-next-upstream"),
    "Ingress: routes to another service": lambda d: d[0]["spec"]["rules"][0]["http"]["paths"][0]["backend"].update(
        service={"name": "stable-audio-head-svc", "port": {"number": 8000}}
    ),
    "HTTPRoute: ends answers": lambda d: _rule(d)["timeouts"].update(backendRequest="60s"),
    "HTTPRoute: routes to another service": lambda d: _rule(d)["backendRefs"][0].update(port=8265),
    "a pod has no such port": lambda d: d[2]["spec"]["podMetricsEndpoints"][0].update(port="metric"),
    "not the job of the alerts": lambda d: d[2]["spec"].pop("jobLabel"),
    "other labels than": lambda d: d[2]["spec"]["podMetricsEndpoints"][0].pop("metricRelabelings"),
    "pods that may have no HAProxy": lambda d: d[3]["spec"]["selector"].update(
        matchLabels={"app.kubernetes.io/component": "gpu"}
    ),
    "pods without a PodMonitor": lambda d: d.pop(2),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_mismatch_is_detected(problem: str) -> None:
    made = documents()
    PROBLEMS[problem](made)
    assert problem in "\n".join(problems(made))
