"""`if-jax serve` as a process: how it ends, what it leaves on the disk, and clients that go away."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving_fixtures import served

LONG = {"prompt": "a sign", "stages": 1, "settings": {"I": {"num_inference_steps": 290}}}


def ask(address: str, body: dict[str, Any]) -> int:
    request = urllib.request.Request(
        f"{address}/v1/draw", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def meter(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
        match = re.search(rf"^{re.escape(name)} (\S+)", reply.read().decode(), re.MULTILINE)
    return float(match[1]) if match else 0.0


@pytest.mark.slow  # two starts of the server
def test_it_finishes_what_it_draws_and_refuses_the_rest(tmp_path: Path) -> None:
    with served(tmp_path, "--no-page", "--keep", str(tmp_path / "kept")) as (address, server):
        ask(address, LONG)  # compiled
        answers: dict[str, int] = {}
        bodies = {"drawn": LONG, "waits": LONG | {"negative_prompt": "", "settings": {"I": {"guidance_scale": 2.0}}}}
        threads = []
        for name, body in bodies.items():
            threads.append(
                threading.Thread(target=lambda name=name, body=body: answers.update({name: ask(address, body)}))
            )
            threads[-1].start()
            time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.wait(60) == 0
    assert answers == {"drawn": 200, "waits": 503}
    assert len(list((tmp_path / "kept").glob("*-0-I.png"))) == 2
    assert not list((tmp_path / "tmp").glob("if_jax-serve-*"))


@pytest.mark.slow
def test_a_client_that_leaves_is_forgotten(tmp_path: Path) -> None:
    with served(tmp_path, "--no-page") as (address, server):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(LONG | {"pictures": 8, "settings": {"I": {"timesteps": list(range(0, 1000, 4))}}}).encode()
        head = f"POST /v1/draw HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
        until = time.monotonic() + 60
        while not meter(address, 'if_jax_pictures_total{state="cancelled"}'):
            assert time.monotonic() < until
            time.sleep(0.2)
        assert ask(address, {"prompt": "a", "stages": 1}) == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
