"""A server under mixed load for long: no error that was not provoked, and memory that does not grow.

    python benchmarks/soak.py [--minutes 20] [--clients 12]

Starts `dspark-hf serve` with the embedded pair on this machine, asks it for texts of all lengths, streamed and not,
leaves in the middle of some, and sends what must be refused. Says at the end what came of it; exit status 1 where a
request failed that should not have, or memory grew by more than 2 % after the first two minutes.
"""

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx

# Minutes at the beginning in which memory may grow; by what share it may later.
FIRST, SHARE = 2, 0.02
WORDS = ("apples", "pages", "boxes", "how many", "each", "12", "7")
# So little memory that texts of ended requests have filled their share of it before memory is looked at.
SERVE = (sys.executable, "-m", "dspark_hf.cli", "serve", "--memory", "0.01")
BAD = ({"temperature": 9}, {"model": "another"}, {"nonsense": 1}, {"max_tokens": 10**12}, {"messages": []})


def resident(process: int) -> float:
    """MiB."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(address: str, number: int, over: asyncio.Event, counts: Counter) -> None:
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=address, timeout=300) as own:
        while not over.is_set():
            kind = chance.choices(("whole", "stream", "leave", "bad"), (4, 4, 2, 1))[0]
            words = " ".join(chance.choices(WORDS, k=chance.randrange(1, 120)))
            body = {
                "model": "dspark-pair",
                "messages": [{"role": "user", "content": words}],
                "max_tokens": chance.randrange(1, 200),
                "temperature": chance.choice([0, 0, 0.7, 1.3]),
                "stream": kind in ("stream", "leave"),
            }
            try:
                counts[kind + await ask(own, kind, body, chance)] += 1
            except Exception as error:
                counts[f"{kind}: {type(error).__name__}"] += 1
            await asyncio.sleep(chance.random() / 4)


async def ask(own: httpx.AsyncClient, kind: str, body: dict, chance: random.Random) -> str:
    """One request. Returns what went wrong, an empty string when nothing did."""
    if kind == "bad":
        response = await own.post("/v1/chat/completions", json=body | chance.choice(BAD))
        return "" if 400 <= response.status_code < 500 else f": {response.status_code}"
    if kind == "whole":
        response = await own.post("/v1/chat/completions", json=body)
        return "" if response.status_code == 200 else f": {response.status_code}"
    lines = chance.randrange(1, 6) if kind == "leave" else None
    async with own.stream("POST", "/v1/chat/completions", json=body) as response:
        last = ""
        async for line in response.aiter_lines():
            last = line or last
            lines = None if lines is None else lines - 1
            if lines == 0:
                return ""
    return "" if response.status_code == 200 and last == "data: [DONE]" else f": {response.status_code} {last[:60]}"


async def soak(address: str, process: int, minutes: float, clients: int) -> tuple[Counter, list[float]]:
    """What came of all requests, and memory of every minute, the mean of six looks."""
    counts, samples, memory, over = Counter(), [], [], asyncio.Event()
    running = [asyncio.create_task(client(address, number, over, counts)) for number in range(clients)]
    while len(memory) < minutes:
        await asyncio.sleep(10)
        samples.append(resident(process))
        if len(samples) % 6 == 0:
            memory.append(sum(samples[-6:]) / 6)
            print(f"minute {len(memory)}: {memory[-1]:.0f} MiB, {counts.total()} requests", flush=True)
    over.set()
    await asyncio.gather(*running)
    return counts, memory


def main(args: argparse.Namespace) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*SERVE, "--port", str(port)])
    try:
        while True:
            try:
                if httpx.get(f"{address}/health", timeout=60).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        counts, memory = asyncio.run(soak(address, server.pid, args.minutes, args.clients))
        metrics = httpx.get(f"{address}/metrics").text
    finally:
        server.terminate()
        server.wait(60)
    for line in metrics.splitlines():
        if line.startswith(("dspark_generated", "dspark_tau", "dspark_verified_length", "dspark_requests_total")):
            print(line)
    first = memory[min(FIRST, len(memory) // 2)]
    growth = max(memory[len(memory) // 2 :]) / first - 1
    wrong = {what: count for what, count in counts.items() if ":" in what}
    print(f"requests: {dict(counts)}")
    print(f"memory: {first:.0f} MiB at first, {memory[-1]:.0f} at last, at most {100 * growth:+.1f} %")
    return int(bool(wrong) or growth > SHARE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    sys.exit(main(parser.parse_args()))
