"""The files of a cluster as Ray itself reads them, and the page's walk-through as it stands there: `make test-ray`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
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


def walk_through() -> str:
    """The commands of the page on scaling."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    return page.split("### A walk-through on one machine")[1].split("```bash\n")[1].split("```")[0]


@pytest.mark.parametrize("port", [8000, 8265])
def test_ports_of_the_walk_through_are_free(port: int) -> None:
    """They stand on the page, and Ray takes others by itself where the second is taken."""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), f"something listens on port {port} already"


def test_the_walk_through_goes_as_the_page_says(tmp_path: Path) -> None:
    commands = walk_through()
    assert "shared=/tmp/prefixes" in commands
    script = tmp_path / "page.sh"  # a file: what pkill looks for must not stand in the shell's own command line
    script.write_text(commands.replace("/tmp/prefixes", str(tmp_path / "prefixes")) + "wait\n", encoding="utf-8")
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            ["bash", str(script)], env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=900
        )
    text = (tmp_path / "said").read_text(encoding="utf-8")
    answers = [json.loads(found) for found in re.findall(r'\{"id":"cmpl-.*?\}\}\}', text)]
    assert len(answers) == 3, text
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for answer in answers[:2]] == [False, True]
    assert all(answer["usage"]["completion_tokens"] == 8 for answer in answers)
    assert re.search(r'tokens_total\{replica="\d",kind="cached"\} [1-9]', text), text
    assert re.findall(r"RUNNING: (\d)", text) == ["2", "1"], text
    assert done.returncode in (0, 143), text
    test_ports_of_the_walk_through_are_free(8000)
