"""What a client waits for: `hf-sparse-cache serve` beside `transformers serve`, on the same recorded conversations.

    python -m benchmarks.bench_serving ../shared/workloads/agent_tau_airline
    python -m benchmarks.bench_serving FOLDER --model jamba-30m --requests 100 --json benchmarks/results/serving.json

first token  four sessions in turn, one request at a time, to one server and to the other in alternating order, with
             one token to answer: CPU time of the server's process for each
replay       the same requests with their answers, four sessions at once: seconds until the last answer is there
overhead     short prompts: milliseconds of CPU that a server takes for one, and generate() itself; with a handle
             for ours
crowd        many short requests from eight clients: how many are answered, and how the memory of the process grows
leaving      clients that leave at random moments of a long prompt or of its answer: how long the next one waits for
             the model, beside what the longest piece of a prefill and a token take; whether its answer is right

Both servers load one folder, which holds a built-in model with random weights: what they answer means nothing.
"""

import argparse
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx

from benchmarks.bench_new_tokens import bounds
from benchmarks.outputs import results_file, write_results
from hf_sparse_cache import SparsePrefixCache
from hf_sparse_cache.serving.model import PLAIN_TEMPLATE
from hf_sparse_cache.stats import table
from hf_sparse_cache.tools import builtin
from hf_sparse_cache.tools.folders import read_requests
from hf_sparse_cache.tools.machine import describe_machine


SERVERS = ("transformers", "ours")
PARTS = ["first", "replay", "overhead", "crowd", "leaving"]
PIECE = 256  # tokens: what a built-in Jamba reads at once on a CPU
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """One of the two, in a process of its own."""

    def __init__(self, name, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        if name == "transformers":
            code = "from transformers.cli.transformers import main; main()"
            arguments = ["serve", str(folder), "--port", port, "--device", "cpu", "--log-level", "error"]
        else:
            code = "from hf_sparse_cache.cli import main; main()"
            arguments = ["serve", str(folder), "--port", port, "--device", "cpu", "--log-level", "warning"]
        self.model, self.url = str(folder), f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.client = httpx.Client(base_url=self.url, timeout=600)
        while True:
            try:
                self.client.get("/health")
                return
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    sys.exit(f"{name} did not start")
                time.sleep(0.2)

    def ask(self, messages, tokens):
        body = {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": 0.0}
        answer = self.client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return answer.json()

    def cpu(self):
        """Seconds of CPU that the process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self):
        """Bytes that the process holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self):
        self.process.terminate()
        self.process.wait(60)


def sessions_of(folder, requests, at_once):
    """Conversations, each a list of lists of messages, together so many requests."""
    found, left = defaultdict(list), requests
    for recorded in read_requests(folder):
        messages = [{"role": turn["role"], "content": turn["text"]} for turn in recorded.segments]
        found[recorded.group].append(messages)
    chosen = []
    for conversation in found.values():
        if left > 0:
            chosen.append(conversation[:left])
            left -= len(chosen[-1])
    return chosen


def in_turn(sessions, at_once):
    """The requests of some sessions one after the other, so many sessions at once; and whether each is a first one."""
    waiting, live = list(sessions), []
    while waiting or live:
        while waiting and len(live) < at_once:
            live.append((iter(waiting.pop(0)), True))
        for index, (session, first) in reversed(list(enumerate(live))):
            messages = next(session, None)
            if messages is None:
                del live[index]
                continue
            live[index] = (session, False)
            yield messages, first


def first_token(servers, sessions, at_once):
    ratios, seconds = [], defaultdict(list)
    for index, (messages, first) in enumerate(in_turn(sessions, at_once)):
        spent = {}
        for name in SERVERS if index % 2 else SERVERS[::-1]:
            before = servers[name].cpu()
            servers[name].ask(messages, 1)
            spent[name] = max(servers[name].cpu() - before, 1 / TICKS)
        if not first:
            ratios.append(spent["transformers"] / spent["ours"])
            for name in SERVERS:
                seconds[name].append(spent[name])
    low, high = bounds(ratios)
    return {
        "requests after a session's first": len(ratios),
        "sooner": round(statistics.median(ratios), 2),
        "interval": [round(low, 2), round(high, 2)],
        "seconds": {name: round(statistics.median(seconds[name]), 3) for name in SERVERS},
    }


def replay(server, sessions, at_once, tokens):
    """Seconds until every answer is there."""
    waiting, lock, answers = list(sessions), threading.Lock(), []

    def client():
        while True:
            with lock:
                if not waiting:
                    return
                session = waiting.pop(0)
            for messages in session:
                usage = server.ask(messages, tokens)["usage"]
                with lock:
                    answers.append(usage)

    started, before = time.perf_counter(), server.cpu()
    threads = [threading.Thread(target=client) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cached = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in answers)
    return {
        "answers": len(answers),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu seconds": round(server.cpu() - before, 2),
        "prompt tokens": sum(usage["prompt_tokens"] for usage in answers),
        "cached tokens": cached,
    }


def overhead(servers, model, tokenizer, requests):
    """Milliseconds of CPU for a prompt of which nothing is resumed, on the server and without one."""
    prompts = [[{"role": "user", "content": f"{number} and so on"}] for number in range(requests)]
    spent = {}
    for name in SERVERS:
        before = servers[name].cpu()
        for messages in prompts:
            servers[name].ask(messages, 1)
        spent[name] = 1000 * (servers[name].cpu() - before) / requests
    alone = {"transformers": {}, "ours": {"past_key_values": SparsePrefixCache(model, tokenizer)}}
    for name, keywords in alone.items():
        started = time.process_time()
        for messages in prompts:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            model.generate(**inputs, max_new_tokens=1, do_sample=False, **keywords)
        alone[name] = 1000 * (time.process_time() - started) / requests
    return {
        name: {
            "server": round(spent[name], 2),
            "generate()": round(alone[name], 2),
            "over": round(spent[name] - alone[name], 2),
        }
        for name in SERVERS
    }


def crowd(server, requests, clients):
    """Many clients: what comes back is right, and the memory of the process stays."""
    messages = [[{"role": "user", "content": f"question {number}"}] for number in range(20)]
    right = [server.ask(asked, 4)["choices"] for asked in messages]
    grown, wrong, lost, lock, left = [server.memory()], [], [], threading.Lock(), [requests]

    def client(seed):
        while True:
            with lock:
                left[0] -= 1
                number = left[0]
                if number < 0:
                    return
                if number % (requests // 10) == 0:
                    grown.append(server.memory())
            try:
                if server.ask(messages[number % 20], 4)["choices"] != right[number % 20]:
                    wrong.append(number)
            except httpx.HTTPError:
                lost.append(number)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half = grown[len(grown) // 2]
    return {
        "requests": requests, "clients": clients, "wrong": len(wrong), "lost": len(lost),
        "memory, second half": round(grown[-1] / half, 4),
    }  # fmt: skip


def leave(server, messages, tokens, streamed, seconds):
    """Ask, and close the connection after some time."""
    body = {"model": server.model, "messages": messages, "max_tokens": tokens, "stream": streamed}
    end = time.monotonic() + seconds
    with (
        suppress(httpx.HTTPError),
        httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=seconds)) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        for _ in answer.iter_raw():
            if time.monotonic() > end:
                break


def leaving(server, clients, piece=PIECE):
    """Clients that leave, one after the other, each followed by a short request that has to wait for what it left."""
    draw, asked = random.Random(5), [{"role": "user", "content": "And then?"}]

    def waited():
        started = time.perf_counter()
        answer = server.ask(asked, 1)
        return time.perf_counter() - started, answer["choices"]

    right = waited()[1]
    idle = statistics.median(waited()[0] for _ in range(20))
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(600)) for _ in range(clients + 3)]
    pieces = []
    for text in texts[:3]:
        started = time.perf_counter()
        tokens = server.ask([{"role": "user", "content": text}], 1)["usage"]["prompt_tokens"]
        pieces.append((time.perf_counter() - started) * piece / tokens)
    waits, wrong, grown = [], 0, []
    for text in texts[3:]:
        leave(
            server,
            [{"role": "user", "content": text}],
            draw.choice((1, 100_000)),
            draw.random() < 0.5,
            draw.uniform(0.02, 1.5),
        )
        seconds, choices = waited()
        waits.append(seconds - idle)
        wrong += choices != right
        grown.append(server.memory())
    # States of what was read are kept, so the memory of the process grows until its budget is reached.
    return {
        "clients": clients, "wrong": wrong, "piece tokens": piece,
        "seconds of a piece": round(statistics.median(pieces), 3), "seconds of a short request": round(idle, 3),
        "the next one waits, median": round(statistics.median(waits), 3),
        "95 of 100": round(sorted(waits)[int(0.95 * clients)], 3), "most": round(max(waits), 3),
        "memory, last over first quarter": round(grown[-1] / grown[clients // 4], 3),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a workload of chats")
    parser.add_argument("--model", default="jamba-30m", help="a built-in model")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=4, help="at once")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, in the replay")
    parser.add_argument("--crowd", type=int, default=1000, help="short requests")
    parser.add_argument("--leaving", type=int, default=200, help="clients that leave")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--json", type=results_file)
    options = parser.parse_args()
    wanted = options.only or PARTS
    sessions = sessions_of(options.folder, options.requests, options.sessions)
    texts = [message["content"] for session in sessions for messages in session[-1:] for message in messages]
    about = {"machine": describe_machine(), "model": options.model}
    about["command"] = shlex.join(["python", "-m", "benchmarks.bench_serving", *sys.argv[1:]])
    found = {}
    with tempfile.TemporaryDirectory() as name:
        model, tokenizer = builtin.load(options.model, texts)
        tokenizer.chat_template = PLAIN_TEMPLATE
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        for part in wanted:
            servers = {server: Server(server, name) for server in SERVERS}
            try:
                if part == "first":
                    found[part] = first_token(servers, sessions, options.sessions)
                elif part == "replay":
                    found[part] = {
                        server: replay(servers[server], sessions, options.sessions, options.tokens)
                        for server in SERVERS
                    }
                elif part == "overhead":
                    found[part] = overhead(servers, model, tokenizer, 200)
                elif part == "crowd":
                    found[part] = crowd(servers["ours"], options.crowd, 8)
                else:
                    found[part] = leaving(servers["ours"], options.leaving)
            finally:
                for server in servers.values():
                    server.end()
            print(table(("", part), [(key, str(value)) for key, value in found[part].items()]), flush=True)
            found[part] = {**about, **found[part]}
    if options.json is not None:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        write_results(options.json, {**known, **found})


if __name__ == "__main__":
    main()
