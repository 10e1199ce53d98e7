"""The HTTP API: what comes back, who may ask, and one line with the right status for all that cannot be drawn."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_fixtures import client, decoded, encoded, mask, open_cascade, picture, running

from if_jax.inference.pictures import read_notes
from if_jax.serving.engine import Engine
from if_jax.serving.guard import read_tokens
from if_jax.serving.requests import DrawRequest, Limits

LIMITS = Limits(upload_bytes=2_000_000, pixels=1_000_000, prompt=500, steps=50, pictures=4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    cascade = open_cascade(tmp_path_factory.mktemp("release") / "cascade")
    with running(cascade, limits=LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def asked(engine: Engine) -> TestClient:
    return client(engine)


def test_a_png_holds_how_it_was_drawn(asked: TestClient, engine: Engine) -> None:
    body = {"prompt": "a red cube", "seed": 3, "negative_prompt": "dull", "settings": {"I": {"guidance_scale": 3}}}
    png = asked.post("/v1/draw", json=body, headers={"Accept": "image/png"})
    assert png.status_code == 200 and png.headers["content-type"] == "image/png" and png.headers["x-seed"] == "3"
    notes = read_notes(io.BytesIO(png.content))
    assert notes["prompt"] == "a red cube" and notes["mode"] == "dream" and notes["picture"] == 0
    options = notes["options"]
    again = engine.cascade.dream(
        notes["prompt"],
        seed=options["seed"],
        negative_prompt=options["negative_prompt"],
        if_I_kwargs=options["if_I_kwargs"],
        batch_size=options["batch_size"],
    )
    np.testing.assert_array_equal(decoded(png.content), np.asarray(again["II"][0]))
    reply = asked.post("/v1/draw", json=body).json()
    assert reply["state"] == "done" and list(reply["pictures"][0]["stages"]) == ["I", "II"]
    np.testing.assert_array_equal(decoded(reply["pictures"][0]["stages"]["II"]["png"]), decoded(png.content))


def test_a_job_is_followed_and_cancelled(asked: TestClient) -> None:
    reply = asked.post("/v1/jobs", json={"prompt": "a", "pictures": 2})
    assert reply.status_code == 202 and 0 <= reply.json()["seed"] < 2**32
    place = f"/v1/jobs/{reply.json()['id']}"
    until = time.monotonic() + 60
    while (known := asked.get(place).json())["state"] != "done":
        assert time.monotonic() < until
        time.sleep(0.05)
    url = known["pictures"][1]["stages"]["II"]["url"]
    assert decoded(asked.get(url).content).shape == (16, 16, 3)
    assert asked.get(f"{place}/2-II.png").status_code == asked.get(f"{place}/0-V.png").status_code == 404
    assert asked.get("/v1/jobs/nothing").status_code == 404
    waiting = asked.post("/v1/jobs", json={"prompt": "a", "pictures": 4, "aspect_ratio": "4:1"}).json()
    assert asked.delete(f"/v1/jobs/{waiting['id']}").json()["state"] in ("cancelled", "done")


def test_probes_meters_and_the_description_of_the_api(asked: TestClient) -> None:
    assert asked.get("/healthz").json() == {"status": "alive"} and asked.get("/readyz").status_code == 200
    assert "if_jax_queue_pictures 0.0" in asked.get("/metrics").text
    assert "/v1/draw" in asked.get("/openapi.json").json()["paths"]
    page = asked.get("/docs").text
    assert "POST /v1/draw" in page and not re.search(r"(src|href)=['\"]?https?:", page)


def bomb(width: int = 60_000) -> str:
    """A PNG of a few kilobytes that says it is 3.6 thousand million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return base64.b64encode(content + chunk(b"IEND", b"")).decode()


SVG = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>").decode()
OVER = {"mode": "style_transfer", "prompt": "a"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 422, "prompt is empty"),
        ({"prompt": "a" * 501}, 422, "prompt has 501 characters: give 500 or fewer"),
        ({"prompt": "a", "sed": 1}, 422, "sed is no field: use mode, prompt"),
        ({"prompt": "a", "seed": 2**32}, 422, "seed: input should be less than 4294967296"),
        ({"prompt": "a", "seed": -1}, 422, "seed: input should be greater"),
        ({"prompt": ["a"]}, 422, "prompt: input should be a valid string"),
        ({"prompt": "a", "pictures": 5}, 422, "this server draws 4 a request"),
        ({"prompt": "a", "stages": 3}, 422, "stages is 3: this cascade has 2"),
        ({"prompt": "a", "aspect_ratio": "1:90"}, 422, "aspect_ratio is '1:90'"),
        ({"prompt": "a", "settings": {"IV": {}}}, 422, "settings has stage 'IV': this cascade has I, II"),
        ({"prompt": "a", "settings": {"I": {"sed": 1}}}, 422, "if_I_kwargs has no 'sed'"),
        ({"prompt": "a", "settings": {"I": {"num_inference_steps": 900}}}, 422, "902 steps a picture: .* takes 50"),
        ({"prompt": "a", "mode": "paint"}, 422, "mode: input should be 'dream'"),
        ({"prompt": "a", "image": "x"}, 422, "dream takes no image"),
        (OVER, 422, "image is missing: style_transfer needs one"),
        (OVER | {"image": "!"}, 422, "image is no base64"),
        (OVER | {"image": "data:image/png;base64,"}, 422, "image has 0 bytes"),
        (OVER | {"image": SVG}, 422, "image is no picture that can be read"),
        (OVER | {"image": bomb()}, 413, "image is (60000x60000|enormous): this server takes 1,000,000 pixels"),
        (OVER | {"image": encoded(picture(1200, 1000), "JPEG")}, 413, "1200x1000: this server takes 1,000,000"),
        (OVER | {"image": encoded(picture())[:200]}, 422, "image is no picture that can be read"),
        (OVER | {"mode": "inpainting", "image": encoded(picture())}, 422, "mask is missing"),
        (
            OVER | {"mode": "inpainting", "image": encoded(picture()), "mask": encoded(mask(9, 9))},
            422,
            "mask is 9x9 and its picture 24x16",
        ),
        (OVER | {"image": encoded(picture()), "settings": {"I": {"strength": 7}}}, 422, "strength 7 is out of range"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    asked: TestClient, body: dict[str, Any], status: int, message: str
) -> None:
    reply = asked.post("/v1/draw", json=body)
    assert reply.status_code == status, reply.text
    assert re.search(message, reply.json()["error"]) and "\n" not in reply.json()["error"]


def test_bodies_that_are_no_request(asked: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    assert asked.post("/v1/draw", content=b"{", headers=json_type).json() == {"error": "the body is no JSON"}
    assert asked.post("/v1/draw", content=b"\xff\xfe", headers=json_type).status_code in (400, 422)
    assert asked.post("/v1/draw", data={"prompt": "a"}).status_code == 415
    assert asked.post("/v1/draw", content=b"x" * 2_000_001, headers=json_type).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    assert asked.post("/v1/draw", content=endless(), headers=json_type).status_code == 413
    deep = b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    assert asked.post("/v1/draw", content=deep, headers=json_type).status_code in (400, 422)
    assert asked.get("/v1/draw").status_code == 405 and asked.get("/v1/nothing").json() == {"error": "not found"}


def test_who_may_ask(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# clients\nanna 0123456789abcdef\nbert fedcba9876543210\n")
    asked = client(engine, tokens=read_tokens(file), hosts=frozenset({"testserver"}))
    assert asked.get("/healthz").status_code == 200
    refused = asked.post("/v1/jobs", json={"prompt": "a"})
    assert refused.status_code == 401 and "Bearer" in refused.json()["error"]
    anna, bert = ({"Authorization": f"Bearer {token}"} for token in ("0123456789abcdef", "fedcba9876543210"))
    job = asked.post("/v1/jobs", json={"prompt": "a"}, headers=anna).json()["id"]
    assert asked.get(f"/v1/jobs/{job}", headers=anna).status_code == 200
    assert asked.get(f"/v1/jobs/{job}", headers=bert).status_code == 404
    assert asked.get(f"/v1/jobs/{job}", auth=("", "0123456789abcdef")).status_code == 200
    for wrong in ("Bearer 0123456789abcdeg", "Basic %%%", "Basic AA==", "Digest x", "Bearer é"):
        value = wrong.encode("latin-1")
        assert asked.get("/metrics", headers=[(b"authorization", value)]).status_code == 401
    assert asked.get("/readyz", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anna\n", "line 1: write NAME TOKEN"),
        ("anna short\n", "16 characters"),
        ("a 0123456789abcdef\nb 0123456789abcdef\n", "line 2: this name or token is there twice"),
        ("# nobody\n", "no token in it"),
    ],
)
def test_files_of_tokens_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tokens(tmp_path / "tokens")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tokens(tmp_path / "none")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
_WORDS = ("guidance_scale", "timesteps", "apg", "guidance_interval", "num_inference_steps", "sample_loop", "eta")
_BODIES = st.one_of(
    _VALUES,
    st.dictionaries(st.sampled_from(list(DrawRequest.model_fields)), _VALUES, max_size=6),
    st.fixed_dictionaries(
        {"prompt": st.just("a"), "settings": st.dictionaries(st.sampled_from(("I", "II")), _VALUES, max_size=2)}
    ),
    st.fixed_dictionaries(
        {
            "prompt": st.text(max_size=20),
            "settings": st.fixed_dictionaries({"I": st.dictionaries(st.sampled_from(_WORDS), _VALUES, max_size=3)}),
        }
    ),
)


_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _never_fails(asked: TestClient, body: Any) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    reply = asked.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code in (202, 413, 422, 429), (body, reply.text)
    if reply.status_code == 202:
        asked.delete(f"/v1/jobs/{reply.json()['id']}")
    else:
        assert "\n" not in reply.json()["error"] and "Traceback" not in reply.text


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=_CHECKS,
    derandomize=True,
)
@given(body=_BODIES)
def test_no_request_is_an_error_of_the_server(asked: TestClient, body: Any) -> None:
    _never_fails(asked, body)


@pytest.fixture
def memory() -> Iterator[None]:
    """The process is no larger after a test than before, but for what a cache may hold."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    gc.collect()
    assert process.memory_info().rss - before < 100e6


@pytest.mark.slow
@pytest.mark.usefixtures("memory")
@settings(max_examples=500, deadline=None, suppress_health_check=_CHECKS)
@given(body=_BODIES)
def test_no_request_of_five_hundred_is_an_error_of_the_server(asked: TestClient, body: Any) -> None:
    _never_fails(asked, body)


def test_hostile_uploads_leave_the_server_drawing(asked: TestClient) -> None:
    rng = np.random.default_rng(0)
    good = {kind: base64.b64decode(encoded(picture(), kind)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    for number in range(60):
        content = bytearray(list(good.values())[number % len(good)])
        for place in rng.integers(0, len(content), 1 + number % 20):
            content[place] = int(rng.integers(256))
        cut = bytes(content[: int(rng.integers(1, len(content) + 1))] if number % 3 == 0 else content)
        body = OVER | {"image": base64.b64encode(cut).decode(), "stages": 1}
        reply = asked.post("/v1/jobs", json=body)
        assert reply.status_code in (202, 413, 422), reply.text
        if reply.status_code == 202:
            asked.delete(f"/v1/jobs/{reply.json()['id']}")
    assert asked.post("/v1/draw", json={"prompt": "a", "seed": 1}).status_code == 200
