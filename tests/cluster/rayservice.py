"""A JSON schema of KubeRay's RayService that refuses unknown keys, made from a list of fields in `tests/data/kuberay`.

The schema accepts anything in place of a pod or another Kubernetes object. Tests validate these objects with
Kubernetes' own schemas. `schema_of_crd` derives the same schema from an official definition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIELDS = Path(__file__).parents[1] / "data" / "kuberay" / "rayservice-fields.tsv"  # the fields of KubeRay 1.7.0
_ANY_KEY = "*"


def own_schema() -> dict[str, Any]:
    """Returns the schema of a RayService, made from the list of fields."""
    root: dict[str, Any] = _object()
    for line in FIELDS.read_text().splitlines()[1:]:
        path, kind, required = [*line.split("\t"), ""][:3]
        *parents, name = path.replace("[]", ".[]").split(".")
        parent = root
        for step in parents:
            parent = _child(parent, step)
        _put(parent, name, schema=_schema(kind))
        if required:
            parent.setdefault("required", []).append(name)
    _close(root)
    root["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": "RayService"}, "metadata": {}}
    return root


def schema_of_crd(definition: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of version v1 in a CustomResourceDefinition. Unlike the original, it refuses unknown keys."""
    (schema,) = (
        version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"] if version["name"] == "v1"
    )
    return _strict(schema)


def _object() -> dict[str, Any]:
    return {"type": "object", "properties": {}}


def _child(parent: dict[str, Any], step: str) -> dict[str, Any]:
    if step == "[]":
        return parent["items"]
    return parent["properties"][step]


def _put(parent: dict[str, Any], name: str, *, schema: dict[str, Any]) -> None:
    if name == "[]":
        parent["items"] = schema
    elif name == _ANY_KEY:
        parent["additionalProperties"] = schema
    else:
        parent["properties"][name] = schema


def _schema(kind: str) -> dict[str, Any]:
    name, _, choices = kind.partition(" one of ")
    if name == "object":
        return _object()
    schema: dict[str, Any] = {"type": name.split("|")}
    return schema | {"enum": choices.split(",")} if choices else schema


def _close(schema: dict[str, Any]) -> None:
    """Make the schema refuse unknown keys in every object that declares keys. Other objects belong to Kubernetes."""
    if schema.get("properties"):
        schema["additionalProperties"] = False
    for each in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        _close(each)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "properties" in schema:
        made["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = _strict(schema["items"])
    return made
