"""Every document against a schema: Kubernetes' own kinds by kubernetes-validate, others by the files of schemas/."""

import json
from pathlib import Path
from typing import Iterator

import jsonschema
import kubernetes_validate

VERSION = "1.37"
FOLDER = Path(__file__).resolve().parent / "schemas"


def parts(document: dict) -> Iterator[dict]:
    """What of another project's kind is one of Kubernetes' own, as a document of that."""
    name = {"name": document["metadata"]["name"]}
    if document["kind"] == "LeaderWorkerSet":
        template = document["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": name, "template": template}
    if document["kind"] == "ScaledObject":
        behavior = document["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
        target = {"apiVersion": "apps/v1", **document["spec"]["scaleTargetRef"]}
        yield {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": name,
               "spec": {"scaleTargetRef": target, "maxReplicas": 1, "behavior": behavior}}


def schema(document: dict) -> Iterator[str]:
    who = f"schema: {document['kind']}/{document['metadata']['name']}"
    file = FOLDER / f"{document['kind']}.json"
    if file.exists():
        errors = jsonschema.Draft202012Validator(json.loads(file.read_text())).iter_errors(document)
        found = [f"{who}: {error.json_path}: {error.message}" for error in errors]
        yield from found
        if not found:
            for part in parts(document):
                yield from schema(part)
        return
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{who}: {'.'.join(map(str, error.path))}: {error.message}"
    except (kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError) as error:
        yield f"{who}: no schema of {document['apiVersion']} {document['kind']}: {error}"
