"""The API reference is what the docstrings say, and no public name is missing from it."""

import runpy
from pathlib import Path

import hf_sparse_cache


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    written = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    assert written == (DOCS / "api.md").read_text(encoding="utf-8"), "docs/api.md is stale: run make api"


def test_no_public_name_is_missing() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in hf_sparse_cache.__all__ if f"\n### `{name}`\n" not in page] == []
