"""Every Python block in README and docs runs, the links lead somewhere, and the demo has enough to read."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_sparse_cache.cli.sources import OWN_TOKENS, own_document, shorten
from hf_sparse_cache.models.families import FAMILIES, REFUSED
from hf_sparse_cache.tools.builtin import build_tokenizer, load


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUESTIONS = ["\n\nWhat is a cut?", "\n\nWhat is a checkpoint?", "\n\nWho holds the handle?"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "exactness.md").read_text(encoding="utf-8")
    model, tokenizer = load("jamba-3m", [document])
    # A page may load a model from the Hub; here it gets the small one, and what it writes stays short.
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    model.generation_config.max_new_tokens = 2
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "document": document, "questions": QUESTIONS}
    for index, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {index + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "README.md").read_text(encoding="utf-8").split("## Documentation")[1]
    listed = re.findall(r"^\| \[.*?\]\(docs/(\w+\.md)\)", contents, flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


def test_there_are_few_pages_and_the_readme_comes_to_the_point() -> None:
    assert len(PAGES) - 1 <= 15
    readme = PAGES[0].read_text(encoding="utf-8")
    order = [
        "## Install",
        "**A document**",
        "**A chat**",
        "**A batch**",
        "**An evaluation**",
        "**A server**",
        "## Measured",
    ]
    places = [readme.index(what) for what in order]
    assert places == sorted(places)
    measured = readme[readme.index("<!-- measured: begin") : readme.index("<!-- measured: end")]
    assert 1 <= sum(line.startswith("|") for line in measured.splitlines()) - 2 <= 12


def test_the_demo_has_enough_to_read() -> None:
    text, name = own_document()
    assert name == "the project's documentation"
    tokenizer = build_tokenizer([text])
    assert len(tokenizer(shorten(text, tokenizer, OWN_TOKENS))["input_ids"]) >= 5000


def test_the_readme_names_every_family() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Supported models")[1].split("\n\n")[1]
    supported, refused = section.split("Refused")
    for family in FAMILIES.values():
        assert re.search(rf"(?<![\w-]){re.escape(family.name)}(?![\w-])", supported), family.name
    for name in ("MiniMax", "RWKV", "xLSTM", "RecurrentGemma"):
        assert name in refused
    assert len(REFUSED) == 4


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_files_are_where_they_are_said_to_be(page: Path) -> None:
    """As paths from the package or from the top of the repository."""
    for file in re.findall(r"`((?:\w+/)*\w+\.pyx?)`", page.read_text(encoding="utf-8")):
        assert any((place / file).is_file() for place in (ROOT, ROOT / "hf_sparse_cache")), file


def test_the_architecture_names_what_is_there() -> None:
    """Every name is defined in one of the files of its row."""
    package = ROOT / "hf_sparse_cache"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in re.findall(r"^ (\w+)/ ", page, re.MULTILINE):
        assert (package / room).is_dir(), room
    named = 0
    placed: set[str] = set()
    for row in re.findall(r"^\|.*\|$", page.split("## The way of a prompt")[1], re.MULTILINE):
        files = re.findall(r"`((?!tests)[\w/]+\.py)`", row)
        placed.update(files)
        source = "\n".join((package / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`((?!\S+\.py`)[A-Za-z_.]+)`", row) if files else ():
            for part in name.split("."):
                defined = rf"^ *(async )?(def|class) {part}\b|^{part}\b.* = "
                assert re.search(defined, source, re.MULTILINE), (name, row)
                named += 1
    assert named > 200
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.stem[0] != "_"}
    assert sorted(modules - placed) == [], "has no place on the page"


def test_the_architecture_leads_to_what_is_looked_for() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for said in ("prompt is cut", "state is copied", "Room is made", "Who goes is decided"):
        assert f"**{said}**" in page or f"**The {said}**" in page
    for new in ("model family", "policy", "eviction", "tier"):
        assert f"\n| {new} |" in page
