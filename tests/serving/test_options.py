"""What operators say of a server or of a fleet, and the files and commands of the pages that say it, without Ray."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hf_sparse_cache.cli.hosting import serve
from hf_sparse_cache.routing.router import Rules
from hf_sparse_cache.serving.options import Options, RayOptions, pairs


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
APPLICATION = "hf_sparse_cache.serving.ray_app:build"


def test_words_and_objects_may_come_as_texts() -> None:
    """As on the command line of `serve run`, where everything is a text."""
    said = RayOptions(
        model="m", cut_after="\n\n ###", api_keys="ann=1 bob=2", tenant_memory="ann=1GiB", replicas="3", gpus="0.5",
        chat_template_kwargs='{"enable_thinking": false}', most_replicas="4", disk_dir="/tmp/x",
    )  # type: ignore[arg-type]  # fmt: skip
    assert said.cut_after == ("###",) and said.api_keys == ("ann=1", "bob=2") and said.replicas == 3
    assert said.chat_template_kwargs == {"enable_thinking": False} and said.gpus == 0.5 and said.most_replicas == 4
    assert said.settings().api_keys == {"1": "ann", "2": "bob"}
    assert RayOptions(**said.model_dump()) == said


def test_keys_come_from_the_environment_where_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SPARSE_CACHE_API_KEYS", "ann=1 ann=2")
    monkeypatch.setenv("HF_SPARSE_CACHE_ADMIN_KEY", "operator")
    found = Options(model="m")
    assert found.settings().api_keys == {"1": "ann", "2": "ann"} and found.settings().admin_key == "operator"
    assert Options(model="m", api_keys=()).settings().api_keys == {}


def test_what_concerns_one_replica_does_not_change_with_the_fleet() -> None:
    """Ray starts every replica anew where this changes, and else scales."""
    small, large = RayOptions(model="m", replicas=2), RayOptions(model="m", replicas=9, most_ahead=1, drain=1)
    assert small.of_each() == large.of_each() == Options(model="m")
    assert RayOptions(model="m", max_memory="1GiB").of_each() != small.of_each()
    assert not {"replicas", "router", "cpus"} & Options.model_fields.keys()


def test_the_router_is_given_its_own_defaults() -> None:
    plain = RayOptions(model="m")
    assert Rules(most_ahead=plain.most_ahead, most_share=plain.most_share, least_tokens=plain.least_tokens) == Rules()


@pytest.mark.parametrize(
    ("field", "value"),
    [("replicas", 0), ("most_replicas", 0), ("cpus", -1), ("gpus", -1), ("fronts", 0), ("router", "best"),
     ("most_share", 0.5), ("least_tokens", 0), ("publish_seconds", 0), ("drain", -1), ("modle", "m"),
     ("tenant_memory", "carl=1GiB"), ("api_keys", "1234"), ("chat_template_kwargs", "[")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        RayOptions(**{"model": "m", field: value})


def test_names_and_values_in_pairs() -> None:
    assert pairs("x", ["a=1", "a=2=3"], several=True) == [("a", "1"), ("a", "2=3")]
    for given in ("a", "=1", "a="):
        with pytest.raises(ValueError, match="write NAME=VALUE"):
            pairs("x", [given])
    with pytest.raises(ValueError, match="names 'a' twice"):
        pairs("x", ["a=1", "a=2"])


# -- files and commands of the pages ----------------------------------------------------------------------------------


def fleets(config: dict[str, Any]) -> list[RayOptions]:
    """The fleets of a config file of Ray Serve, with its words in their places."""
    assert set(config) <= {"proxy_location", "http_options", "grpc_options", "logging_config", "applications"}
    found = []
    for one in config["applications"]:
        assert set(one) <= {"name", "route_prefix", "import_path", "args", "runtime_env", "deployments"}
        assert one["import_path"] == APPLICATION
        found.append(RayOptions(**one["args"]))
    return found


def test_the_config_file_of_ray_serve_says_what_there_is() -> None:
    text = (EXAMPLES / "ray-serve.yaml").read_text(encoding="utf-8")
    (fleet,) = fleets(yaml.safe_load(text))
    assert fleet.replicas >= 2 and fleet.shared and fleet.service  # to be built where its model and its bucket are
    for right, wrong in (
        ("max_memory:", "max_memroy:"),
        ("replicas: 4", "replicas: 0"),
        ("ray_app:build", "ray:build"),
    ):
        with pytest.raises((ValidationError, AssertionError)):
            fleets(yaml.safe_load(text.replace(right, wrong, 1)))


def test_there_is_such_an_application() -> None:
    module, name = APPLICATION.split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (build,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert len(build.args.args) == 1  # all that Ray gives one


def test_the_cluster_file_installs_and_starts_what_there_is() -> None:
    config = yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (install,) = [shlex.split(line)[-1] for line in config["setup_commands"]]
    name, extras = install.rstrip("]").split("[")
    assert name == project["name"] and set(extras.split(",")) <= set(project["optional-dependencies"])
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    port = re.search(r"--head --port=(\d+)", head)
    assert port is not None and worker.endswith(f"--address=$RAY_HEAD_IP:{port[1]}")


def commands(start: str) -> list[list[str]]:
    """Every command of the pages that begins so, in words."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    return [shlex.split(line.removesuffix(" &"), comments=True) for line in lines if line.startswith(start)]


def test_commands_of_the_pages_say_what_there_is() -> None:
    asked = commands("serve run ")
    assert len(asked) >= 2
    for words in asked:
        assert words[2] == APPLICATION
        assert RayOptions(**dict(word.split("=", 1) for word in words[3:])).model  # type: ignore[arg-type]
    deployed = commands("serve deploy ")
    assert all((ROOT / words[2]).is_file() for words in deployed)
    several = [words for words in commands("hf-sparse-cache serve ") if "--replicas" in words]
    assert several and "replicas" in serve.__annotations__
