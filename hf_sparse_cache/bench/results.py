"""One folder a run: what was asked for, every request, and what came out; a run that was interrupted goes on from it.

`config.json` (settings, command, machine), `units/` (a trial each: one model on one workload, once, which a run that
was interrupted need not do again; stores are in memory, so an unfinished trial begins anew), `requests.parquet`,
`metrics.json`, `plots/`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import jsontext
from ..hub import replace_whole
from ..tools.machine import describe_machine


if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a run measures.

    Attributes:
        models, datasets: names; every model serves every dataset.
        columns, config, split: of datasets that are not workload folders, see `load_workload`.
        policies: of the cache; the first one is what the verdict is about.
        rivals: some of `RIVALS`.
        requests, per_group: how much of a dataset; None for all.
        max_prompt_tokens: longer prompts are shortened; None leaves them.
        exactness: the mode of the cache.
        checked: requests whose logits are compared.
    """

    models: tuple[str, ...]
    datasets: tuple[str, ...]
    columns: tuple[str, ...] = ()
    config: str | None = None
    split: str = "train"
    policies: tuple[str, ...] = ("learned",)
    rivals: tuple[str, ...] = ("stock", "chunked", "deepcopy", "dense", "limit")
    max_memory: str = "2GiB"
    grid: int | None = None
    exactness: str = "replayable"
    max_new_tokens: int = 8
    requests: int | None = 15
    per_group: int | None = 5
    max_prompt_tokens: int | None = None
    repeats: int = 1
    checked: int = 3
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 42


@dataclass
class Trial:
    """What one model made of one workload, once.

    Attributes:
        rows: one per request and contender.
        summary: what is known only at the end: bytes, exactness, rivals left out and why.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


class RunFolder:
    """The results of one run.

    Args:
        path: made when the first trial is saved, so that a run that cannot begin leaves nothing.
        settings: of the run; those of a run that is already there must be the same.
        command: that made it.

    Raises:
        ValueError: the folder holds a run with other settings, and the message names what differs; or other files.
    """

    def __init__(self, path: Path, settings: RunSettings, command: str) -> None:
        self.path, self.settings = path, settings
        content = json.loads(
            json.dumps({"settings": asdict(settings), "command": command, "machine": describe_machine()})
        )
        known = path / "config.json"
        if known.is_file():
            before = jsontext.read_json(known)
            if not _is_run(before):
                raise ValueError(f"--out {path}: its config.json is not that of a run; give another folder.")
            _refuse_links(path)
            known_settings = {"exactness": "bitwise", **before["settings"]}  # which older runs do not say
            differ = sorted(
                key for key, value in content["settings"].items() if known_settings.get(key, value) != value
            )
            if differ:
                raise ValueError(
                    f"--out {path} holds a run with other settings ({', '.join(differ)}); give another folder."
                )
            content = {**content, **before}
        elif path.is_dir() and any(path.iterdir()):
            raise ValueError(f"--out {path} holds files of something else; give another folder, or an empty one.")
        self.config: dict[str, Any] = content

    def holds(self, model: str, dataset: str, repeat: int) -> bool:
        """Whether this trial is finished."""
        return self._file(model, dataset, repeat).with_suffix(".json").is_file()

    def save(self, trial: Trial) -> None:
        """Keeps a finished trial: its requests first, so that its summary says that all is there."""
        import pandas

        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").is_file():  # first, so that a run that is killed here is known by it
            self.write("config.json", self.config)
        (self.path / "units").mkdir(exist_ok=True)
        name = self._file(trial.summary["model"], trial.summary["dataset"], trial.summary["repeat"])
        rows = pandas.DataFrame(trial.rows)
        rows.insert(0, "model", trial.summary["model"])
        rows.insert(1, "dataset", trial.summary["dataset"])
        replace_whole(name.with_suffix(".parquet"), rows.to_parquet(None, index=False))
        _write(name.with_suffix(".json"), trial.summary)

    def finish(self) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
        """Every request and every summary so far; writes `requests.parquet`."""
        import pandas

        files = sorted((self.path / "units").glob("*.json"))
        summaries = [jsontext.read_json(file) for file in files]
        rows = pandas.concat([pandas.read_parquet(file.with_suffix(".parquet")) for file in files], ignore_index=True)
        replace_whole(self.path / "requests.parquet", rows.to_parquet(None, index=False))
        return rows, summaries

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON file."""
        _write(self.path / name, content)

    def _file(self, model: str, dataset: str, repeat: int) -> Path:
        words = [re.sub(r"[^\w.-]+", "-", word).strip("-").replace(".", "_") for word in (model, dataset)]
        return self.path / "units" / f"{'--'.join(words)}--{repeat}"


def _is_run(content: Any) -> bool:
    """Whether this is the `config.json` of a run; other programs have files of that name, with settings, too."""
    if not isinstance(content, dict) or not {"settings", "command", "machine"} <= content.keys():
        return False
    asked = content["settings"]
    return isinstance(asked, dict) and {"models", "datasets", "rivals", "requests", "seed"} <= asked.keys()


def _refuse_links(path: Path) -> None:
    """Refuses the folder of a run with a link in the place of what is written there.

    Raises:
        ValueError: there is one, which may lead to anything.
    """
    links = [name for name in ("units", "plots", "metrics.json", "requests.parquet") if (path / name).is_symlink()]
    if links:
        raise ValueError(f"--out {path}: {links[0]} in it is a link; remove it, or give another folder.")


def _write(file: Path, content: Any) -> None:
    replace_whole(file, json.dumps(content, indent=1, sort_keys=True) + "\n")
