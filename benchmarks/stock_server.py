"""A server as one writes it with Ray Serve and the stock pipeline: what `fastbert-hf serve` is compared with."""

from __future__ import annotations

import argparse
import asyncio
import signal

from fastbert_hf.serving.ray_cluster import start_ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--tokens", action="store_true", help="Batches of so many tokens, as batch_size_fn counts them."
    )
    options = parser.parse_args()
    start_ray(options.replicas)

    from ray import serve
    from starlette.requests import Request

    size = {"max_batch_size": 32, "batch_wait_timeout_s": 0.005}
    if options.tokens:
        # About a token for four characters, and at least one of each text fits.
        size["max_batch_size"] = 1024
        size["batch_size_fn"] = lambda texts: sum(min(2 + len(text) // 4, 512) for text in texts)

    @serve.deployment(num_replicas=options.replicas, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=512)
    class Stock:
        def __init__(self):
            from transformers import pipeline

            import fastbert_hf  # which registers the model

            folder = str(fastbert_hf.DEFAULT_MODEL_DIR)
            self.pipeline = pipeline("text-classification", model=folder, device="cpu")

        @serve.batch(**size)
        async def answer(self, texts: list[str]) -> list[dict]:
            return await asyncio.to_thread(self.pipeline, texts, batch_size=len(texts), truncation=True)

        async def __call__(self, request: Request) -> list[dict]:
            return [await self.answer((await request.json())["inputs"])]

    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(Stock.bind())
    print("Answering on", options.port, flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()


if __name__ == "__main__":
    main()
