"""Ask a server at times that do not depend on its answers, from a process of its own: a JSON line for each request."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time

import aiohttp


async def ask(session: aiohttp.ClientSession, url: str, number: int, text: str, at: float, found: list[dict]) -> None:
    """Send one text, and note what came back and how long after it was due that was."""
    try:
        async with session.post(url, json={"inputs": text}) as response:
            body = await response.json(content_type=None)
            status = response.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        status, body = type(error).__name__, None
    best = max(body, key=lambda label: label["score"]) if status == 200 else {}
    found.append(
        {
            "number": number,
            "status": status,
            "seconds": time.monotonic() - at,
            "label": best.get("label"),
            "score": best.get("score"),
            "exit_layer": best.get("exit_layer"),
        }
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="Texts per second, on average.")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = [line.rstrip("\n") for line in sys.stdin]
    generator, found, tasks = random.Random(options.seed), [], []
    url = f"http://127.0.0.1:{options.port}/predict"
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = at = time.monotonic()
        while at < start + options.seconds:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            number = generator.randrange(len(texts))
            tasks.append(asyncio.create_task(ask(session, url, number, texts[number], at, found)))
            at += generator.expovariate(options.rate)
        await asyncio.gather(*tasks)
    for row in found:
        print(json.dumps(row))
    print(json.dumps({"sent": len(tasks)}))


if __name__ == "__main__":
    asyncio.run(main())
