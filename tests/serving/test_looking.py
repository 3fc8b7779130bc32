"""What operators see: the page, the figures for Prometheus; and what the server needs of transformers."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Running, messages
from transformers.cli.serving import chat_completion, completion, model_manager, response, utils


def test_figures_for_prometheus_add_up(served: Running) -> None:
    for text in ("a", "a", "b"):
        served.chat(text)
    served.idle()
    with served.http as client:
        text = client.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    prompt, cached, computed = (
        found["hf_sparse_cache_tokens_total", kind] for kind in ("prompt", "cached", "computed")
    )
    assert prompt == cached + computed and cached > 0
    assert found["hf_sparse_cache_tokens_total", "answer"] == 12
    assert found["hf_sparse_cache_requests_total", "/v1/chat/completions", "answered"] == 3
    assert found["hf_sparse_cache_first_token_seconds_count",] == 3
    assert found["hf_sparse_cache_misses_total", "nothing_stored"] == 1
    assert found["hf_sparse_cache_queue_length",] == 0
    assert found["hf_sparse_cache_stored_bytes", "memory"] == served.service.store.used_bytes > 0
    assert found["hf_sparse_cache_checkpoints", "memory"] == len(served.service.store)


def test_the_page_shows_what_happened_and_runs_nothing(served: Running) -> None:
    served.chat("<script>alert(1)</script> & 'quoted'")
    served.chat("<script>alert(1)</script> & 'quoted'")
    with served.http as client:
        answer = client.get("/")
        assert 'http-equiv="refresh"' not in answer.text
        assert 'content="5"' in client.get("/?every=5").text
        for odd in ("-1", "x", "0", "9" * 30, "%00"):
            assert client.get(f"/?every={odd}").status_code == 200
    assert "<script" not in answer.text and "Stored prefixes" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.search(r"of them cached</dt><dd>[1-9]", answer.text)
    assert "checkpoint at" in answer.text and "What was not reused" in answer.text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_a_browser(served: Running, width: int, tmp_path: Path) -> None:
    """Nothing sticks out sideways, everything that scrolls can be reached by keyboard, and all text can be read."""
    served.chat("browser")
    with served.http as client:
        page = client.get("/").text
    # Asked inside a frame of the width, as headless Chromium has a smallest width of its own.
    probe = """
    <script>
    addEventListener("load", () => {
      const view = document.querySelector("iframe"), page = view.contentDocument, root = page.documentElement;
      const wide = [...page.querySelectorAll("main > *, header > *")].filter(
        e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != "auto");
      const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(Number).map(c => c / 255)
        .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const ground = light(getComputedStyle(page.body).backgroundColor);
      const contrast = [...page.querySelectorAll("p, td, th, dt, dd, a, h1, h2, summary, code")].map(e => {
        const style = getComputedStyle(e), ink = light(style.color);
        return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05); });
      const stuck = [...page.querySelectorAll(".wide")].filter(e => e.tabIndex < 0);
      document.title = JSON.stringify({over: root.scrollWidth - root.clientWidth, wide: wide.length,
                                       contrast: Math.min(...contrast), stuck: stuck.length, width: root.clientWidth});
      document.body.append(document.title);
    });
    </script>"""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    frame = f'<!doctype html><iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe>{probe}'
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--virtual-time-budget=5000",
        "--dump-dom",
        f"file://{tmp_path / 'frame.html'}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(
        r'\{"over":(-?\d+),"wide":(\d+),"contrast":([0-9.]+),"stuck":(\d+),"width":(\d+)\}', shown.stdout
    )
    assert found, shown.stdout[-500:] + shown.stderr[-500:]
    over, wide, contrast, stuck, seen = (float(value) for value in found.groups())
    assert over <= 0 and not wide and not stuck and contrast >= 4.5
    assert width - 20 <= seen <= width  # less a scroll bar


# What the server takes from transformers' serving classes, and the parameters that it uses.
SEAMS = [
    (utils.GenerateManager.generate_streaming, "self model processor inputs gen_config request_id response_parser"),
    (utils.GenerateManager.generate_non_streaming, "self model processor inputs gen_config request_id"),
    (utils.GenerateManager.submit, "self fn"),
    (utils.GenerationState.get_manager, "self model_id use_cb"),
    (utils.BaseHandler._build_generation_config, "self body model_generation_config use_cb"),
    (utils.BaseHandler.get_processor_inputs_from_messages, "messages modality"),
    (utils.DirectStreamer.__init__, "self tokenizer loop queue response_parser"),
    (utils.DirectStreamer._enqueue, "self item"),
    (utils.DirectStreamer.put, "self value"),
    (utils.DirectStreamer.cancel, "self"),
    (utils._StreamError.__init__, "self msg"),
    (model_manager.ModelManager.load_model_and_processor, "self model_id_and_revision"),
    (model_manager.ModelManager._load_model, "self model_id_and_revision"),
    (model_manager.ModelManager._load_processor, "self model_id_and_revision"),
    (model_manager.ModelManager.get_model_modality, "model processor"),
    (chat_completion.ChatCompletionHandler.handle_request, "self body request_id"),
    (completion.CompletionHandler.handle_request, "self body request_id"),
    (response.ResponseHandler.handle_request, "self body request_id"),
    (chat_completion.ChatCompletionHandler.__init__, "self model_manager generation_state chat_template_kwargs"),
]


@pytest.mark.parametrize(("seam", "names"), SEAMS, ids=[seam.__qualname__ for seam, _ in SEAMS])
def test_transformers_has_what_the_server_extends(seam: object, names: str) -> None:
    parameters = inspect.signature(seam).parameters  # type: ignore[arg-type]
    assert names.split() == [name for name in names.split() if name in parameters]


def test_the_loop_of_messages(served: Running) -> None:
    """The page is made while others ask, too."""
    with served.http as client:
        for number in range(3):
            client.post("/v1/chat/completions", json={"messages": messages(f"{number}"), "max_tokens": 1})
            assert client.get("/").status_code == 200
