"""How many pictures a second the server draws for many clients at a time, beside one call of `dream`.

    python tests/benchmarks/serve_load.py [--cascade demo] [--clients 64] [--requests 200] [--batch-size 4] [--stages 1]

All clients wait for each of their answers before they ask again; requests differ in prompt, seed, number of pictures
and, one in five, in guidance. The same pictures are then drawn by `Cascade.dream` in one call of each setting, in the
same process, at the same batch size. Prints one JSON line: pictures a second of both, their ratio, and the seconds from
request to answer that half (p50) and 99 in 100 (p99) of the requests took.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
import time
import urllib.request
from typing import Any

from if_jax import Cascade
from if_jax.serving.api import make_app
from if_jax.serving.engine import Engine, warm
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import RequestGuard
from if_jax.serving.requests import Limits

PROMPTS = ("a red cube", "two red spheres and a blue cube", "a green cylinder", "a purple sphere left of a red cube")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cascade", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of stage I; 0: the cascade's own")
    args = parser.parse_args()
    import uvicorn

    cascade = Cascade.load(args.cascade, stages=args.stages)
    limits = Limits(queue=10_000, queue_of_client=10_000)
    engine = Engine(cascade, batch_size=args.batch_size, limits=limits)
    files = PictureFiles({"cascade": args.cascade}, batch_size=args.batch_size)
    bodies = [body(number, args.steps) for number in range(args.requests)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        app = RequestGuard(make_app(engine, files), limits, None, None)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True).start()
        warm(engine, ["1:1"])
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/draw"
        ask(address, bodies[0])
        began = time.perf_counter()
        seconds = from_clients(address, bodies, args.clients)
        served = sum(each["pictures"] for each in bodies) / (time.perf_counter() - began)
        server.should_exit = True
        engine.close()
    began = time.perf_counter()
    drawn = directly(cascade, bodies, args.batch_size)
    alone = drawn / (time.perf_counter() - began)
    cuts = statistics.quantiles(seconds, n=100)
    report = {"pictures": drawn, "served_per_second": served, "dream_per_second": alone, "ratio": served / alone}
    report |= {"p50_s": cuts[49], "p99_s": cuts[98]}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}))


def body(number: int, steps: int) -> dict[str, Any]:
    words: dict[str, Any] = {"num_inference_steps": steps} if steps else {}
    words |= {"guidance_scale": 3.0} if number % 5 == 0 else {}
    settings = {"I": words} if words else {}
    prompt = PROMPTS[number % len(PROMPTS)]
    return {"prompt": prompt, "seed": number, "pictures": 1 + number % 3, "settings": settings}


def from_clients(address: str, bodies: list[dict[str, Any]], clients: int) -> list[float]:
    """Seconds that each request took."""
    seconds: list[float] = []

    def send(first: int) -> None:
        for each in bodies[first::clients]:
            began = time.perf_counter()
            ask(address, each)
            seconds.append(time.perf_counter() - began)

    threads = [threading.Thread(target=send, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def ask(address: str, each: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(each).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=3600) as reply:
        return json.load(reply)


def directly(cascade: Cascade, bodies: list[dict[str, Any]], batch_size: int) -> int:
    """Draws the same pictures, those of equal settings in one call; how many."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in bodies:
        groups.setdefault(json.dumps(each["settings"]), []).append(each)
    count = 0
    for name, group in groups.items():
        rows = [(each, number) for each in group for number in range(each["pictures"])]
        cascade.dream(
            [each["prompt"] for each, _ in rows],
            seed=[each["seed"] for each, _ in rows],
            first_picture=[number for _, number in rows],
            batch_size=batch_size,
            if_I_kwargs=json.loads(name).get("I"),
        )
        count += len(rows)
    return count


if __name__ == "__main__":
    main()
