"""Scenes per minute of CoSER's benchmark against a naive sequential client, on the same server.

    python benchmarks/evaluate.py [--scenes 24] [--latency 0.2] [--concurrency 16] [--rounds 8] [--runs 3] [--json FILE]

The server is scripted: it plays every role, answers each request after a fixed time, and takes any number at once (as a
hosted endpoint does, or vLLM well below saturation), so what is measured is the client. "ours" is the benchmark as the
command runs it, cache on disk included. The naive client sends the very same requests, one after the other over one
connection, and neither builds prompts, reads answers, nor keeps them: it is at its best. "ours, again" is a second run,
from the cache. They take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx

from her_nemo.config.evaluation import CoserConfig
from her_nemo.evaluation.coser import roles_of, run_coser
from her_nemo.evaluation.coser_protocol import END_CHAT


def main() -> int:
    options = parse()
    found: dict[str, list[float]] = {"ours": [], "ours, again": [], "naive": []}
    requests = 0
    with tempfile.TemporaryDirectory(prefix="her_nemo_bench_") as scratch, server(options) as (url, seen):
        scenes = write_scenes(Path(scratch) / "scenes.json", options.scenes)
        for number in range(options.runs):
            cfg = config(options, url, scenes, Path(scratch) / f"out_{number}")
            seen.clear()
            found["ours"].append(timed(lambda cfg=cfg: run(cfg)))
            sent = list(seen)
            found["ours, again"].append(timed(lambda cfg=cfg: run(cfg)))
            assert len(seen) == len(sent), "a second run asks nothing"
            found["naive"].append(timed(lambda sent=sent: naive(url, sent)))
            requests = len(sent)
    figures = report(options, found, requests)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"figures are in {options.json}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=24, help="scenes to play and judge")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds the server takes for an answer")
    parser.add_argument("--concurrency", type=int, default=16, help="limits.concurrency of ours")
    parser.add_argument("--rounds", type=int, default=8, help="messages of a dialogue")
    parser.add_argument("--runs", type=int, default=3, help="repetitions, taking turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


# ---------------------------------------------------------------- the server


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, bodies of the requests seen) of a scripted endpoint in a thread of its own."""
    seen: list[dict[str, Any]] = []
    loop = asyncio.new_event_loop()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_all(reader, writer, options.latency, seen)

    async def end() -> None:
        listening.close()
        # The clients have closed their connections: what serves them ends by itself.
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=5)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(one, "127.0.0.1", 0), loop).result()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", seen
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def answer_all(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float, seen: list[dict[str, Any]]
) -> None:
    """Every request of one connection."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await reader.readexactly(int(length[1])) if length else b""
            if head.startswith(b"GET"):
                reply: dict[str, Any] = {"data": [{"id": "scripted"}]}
            else:
                request = json.loads(body)
                seen.append(request)
                await asyncio.sleep(latency)
                message = {"role": "assistant", "content": scripted(request)}
                reply = {
                    "choices": [{"message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 500, "completion_tokens": 50},
                }
            text = json.dumps(reply).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(text) + text)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionResetError):
        pass  # the client has closed the connection
    finally:
        writer.close()


def scripted(request: dict[str, Any]) -> str:
    """What each role says: actors and Environment a line, predictions in turn, judges three flaws."""
    system = request["messages"][0]["content"]
    if system.startswith("You review"):
        dimension = re.search(r"in one respect only: (.+)\.", system)
        flaws = [{"instance": "a place", "type": "a type", "severity": severity} for severity in (1, 2, 3)]
        return json.dumps({dimension[1] if dimension else "": {"flaws": flaws}})
    if system.startswith("You direct"):
        said = sum(message["role"] == "assistant" for message in request["messages"])
        return f"Next Speaker: {('Ann', 'Bob', 'Environment')[said % 3]}" if said < 1000 else END_CHAT
    return "<role_thinking>I must be careful.</role_thinking>" + "These are the words that are said. " * 6


def write_scenes(path: Path, count: int) -> Path:
    """Scenes of two characters, alike but for the hour, so that no two requests are the same."""
    rows = [
        {
            "book": "The Tale",
            "i_p": number,
            "i_c": 0,
            "scenario": f"A hall, {number} hours after nightfall. " + "Candles burn low. " * 20,
            "topic": "a letter",
            "key_characters": [{"name": name, "motivation": "The letter."} for name in ("Ann", "Bob")],
            "major_characters": ["Ann", "Bob"],
            "speaking_characters_w_env": ["Bob", "Ann", "Environment"],
            "character_profiles": {"Ann": "Ann is proud. " * 30, "Bob": "Bob is sly. " * 30},
            "plot": {"i_p": number, "summary": "They quarrel over a letter. " * 10, "key_characters": []},
            "dialogues": [{"character": "Bob", "message": "[She knows.] (bows) Good evening."}] * 8,
        }
        for number in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


# ---------------------------------------------------------------- the clients


def config(options: argparse.Namespace, url: str, scenes: Path, out: Path) -> CoserConfig:
    who = {"endpoint": url, "model": "scripted"}
    return CoserConfig(
        name="benchmark",
        out=str(out),
        scenes=str(scenes),
        max_rounds=options.rounds,
        actor=who,
        judge=who,
        limits={"concurrency": options.concurrency},
    )


def run(cfg: CoserConfig) -> None:
    results = asyncio.run(run_coser(cfg, roles_of(cfg), {}))
    assert results.valid, results.failures
    assert results.judgements == 4 * results.scenes


def naive(url: str, requests: list[dict[str, Any]]) -> None:
    with httpx.Client(timeout=60) as client:
        for request in requests:
            client.post(f"{url}/chat/completions", json=request).raise_for_status()


def timed(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def report(options: argparse.Namespace, found: dict[str, list[float]], requests: int) -> dict[str, Any]:
    seconds = {name: statistics.median(times) for name, times in found.items()}
    rates = {name: 60 * options.scenes / median for name, median in seconds.items()}
    print(
        f"{options.scenes} scenes of {options.rounds} messages, {requests} requests of {options.latency:g} s, "
        f"concurrency {options.concurrency}, median of {options.runs}"
    )
    for name, rate in rates.items():
        times = ", ".join(f"{value:.2f}" for value in found[name])
        print(f"  {name:12} {rate:9.1f} scenes/minute   {rate / rates['naive']:6.1f} x naive   ({times} s)")
    return {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "httpx": version("httpx"),
        },
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "requests": requests,
        "seconds": found,
        "scenes_per_minute": rates,
        "times_naive": rates["ours"] / rates["naive"],
    }


if __name__ == "__main__":
    sys.exit(main())
