"""Programs that speak the protocol: curl, and a library for agents."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from served import NAME, Running, messages


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(served: Running) -> None:
    body = json.dumps({"messages": messages("curl"), "max_tokens": 2, "stream": True})
    command = ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("data: {") and said.endswith("data: [DONE]\n\n")


# The library warns of decorators that it does not see.
@pytest.mark.filterwarnings("ignore:Function 'count' has decorators:UserWarning")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_agent_with_tools(served: Running, stream: bool) -> None:
    """A step of smolagents: what the model says means nothing; that its next step reads only what is new does."""
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel(
        NAME, api_base=f"{served.url}/v1", api_key="none", max_tokens=8, tool_choice="auto"
    )

    @smolagents.tool  # type: ignore[untyped-decorator]
    def count(text: str) -> int:
        """Counts letters.

        Args:
            text: whose letters.
        """
        return len(text)

    agent = smolagents.ToolCallingAgent(tools=[count], model=model, max_steps=2, verbosity_level=0)
    steps = list(agent.run("How many letters has 'cache'?", stream=True)) if stream else [agent.run("How many?")]
    assert steps
    served.idle()
    # Two steps and the answer that it is asked for in the end, each with the whole context.
    tickets = list(served.service.metrics.recent)[-3:]
    assert len(tickets) == 3 and not any(ticket.error for ticket in tickets)
    prompts = [ticket.requests[0] for ticket in tickets]
    assert prompts[1].resumed_tokens > 0.8 * prompts[0].prompt_tokens
