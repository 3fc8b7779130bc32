"""The files of a cluster as Ray itself reads them: `make test-ray`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


ray = pytest.importorskip("ray")

import jsonschema  # noqa: E402  # which Ray brings
from ray.serve import Application  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from hf_sparse_cache.serving.ray_app import build  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own making

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def test_ray_serve_takes_the_config_file() -> None:
    found = ServeDeploySchema.model_validate(read("ray-serve.yaml"))
    for one in found.applications:  # Ray gives the words of the file, or of its command line
        assert isinstance(build(one.args), Application)
        with pytest.raises(ValueError, match="modle"):
            build({**one.args, "modle": "m"})
    assert isinstance(build({"model": "m", "replicas": "2", "cpus": "0.5"}), Application)
    wrong = read("ray-serve.yaml")
    wrong["applications"][0]["import_pth"] = wrong["applications"][0].pop("import_path")
    with pytest.raises(ValueError, match="import_pat?h"):
        ServeDeploySchema.model_validate(wrong)


def test_ray_takes_the_cluster_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(read("ray-cluster.yaml"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**read("ray-cluster.yaml"), "setup_command": []}, schema)
