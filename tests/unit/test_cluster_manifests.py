"""The KubeRay manifests: what they hold of ours is what the commands print and take today.

Against KubeRay's own schemas (its CRDs, of which no copy is kept here) they are checked by hand:
    git clone --depth 1 https://github.com/ray-project/kuberay && KUBERAY=kuberay pytest
    tests/unit/test_cluster_manifests.py
"""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_dflash.cluster import command
from vllm_dflash.cluster.serve import as_yaml, serving_of
from vllm_dflash.supported import is_supported

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "kuberay"
FILES = ("rayservice.yaml", "rayjob.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def test_the_services_config_is_what_up_prints() -> None:
    text = (FOLDER / "rayservice.yaml").read_text().replace("\\\n#", "")
    line = next(line for line in text.splitlines() if "--print-config" in line)
    parser = argparse.ArgumentParser()
    command.add_up_flags(parser)
    printed = as_yaml(
        serving_of(parser.parse_args(shlex.split(line.partition("vllm-dflash up")[2])))
    )
    assert documents("rayservice.yaml")[0]["spec"]["serveConfigV2"] == printed


@pytest.mark.slow
def test_the_services_config_is_one_for_ray() -> None:
    schema = pytest.importorskip(
        "ray.serve.schema", reason="needs Ray: pip install 'vllm-dflash[ray]'"
    )
    config = yaml.safe_load(documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])
    assert (
        schema.ServeDeploySchema(**config).applications[0].import_path
        == "ray.serve.llm:build_openai_app"
    )


def test_the_image_has_a_supported_vllm() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert is_supported(text.partition("FROM vllm/vllm-openai:v")[2].split()[0])


def test_the_jobs_entrypoint_parses() -> None:
    entrypoint = shlex.split(documents("rayjob.yaml")[0]["spec"]["entrypoint"])
    assert entrypoint[:2] == ["vllm-dflash", "batch"]
    parser = argparse.ArgumentParser()
    command.add_batch_flags(parser)
    args = parser.parse_args(entrypoint[2:])
    assert command.settings_of(args).draft == "z-lab/Qwen3-8B-DFlash-b16"
    assert (
        args.replicas
        == documents("rayjob.yaml")[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    )


@pytest.mark.parametrize("name", FILES)
def test_against_kuberays_schemas(name: str) -> None:
    folder = os.environ.get("KUBERAY")
    if not folder:
        pytest.skip("KUBERAY names no checkout of KubeRay")
    jsonschema = pytest.importorskip(
        "jsonschema", reason="needs jsonschema, which comes with ray[default]"
    )
    for document in documents(name):
        if document["apiVersion"] != "ray.io/v1":
            continue
        crd = Path(
            folder, "ray-operator/config/crd/bases", f"ray.io_{document['kind'].lower()}s.yaml"
        )
        versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
        schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
        jsonschema.Draft202012Validator(_strict(schema)).validate(document)


def _strict(schema: Any) -> Any:
    """As the API server checks with ``--validate=strict``: a field that the schema does not have is
    an error."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if (
        schema.get("type") == "object"
        and isinstance(schema.get("properties"), dict)
        and not free
        and "apiVersion" not in schema["properties"]
    ):
        strict["additionalProperties"] = False
    return strict
