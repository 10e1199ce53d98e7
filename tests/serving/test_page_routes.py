"""The page's own routes behind the guard: no hostile request comes back from Gradio as an error of the server."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving_fixtures import BATCH, NOTES, open_cascade, running

from if_jax.serving.api import make_app
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import RequestGuard
from if_jax.serving.requests import Limits

# Gradio leaves event loops and sockets open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LIMITS = Limits(upload_bytes=300_000)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gradio's own imports
        from if_jax.serving.run import with_page

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
            patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
            cascade = open_cascade(tmp_path_factory.mktemp("release") / "cascade")
            with running(cascade, limits=LIMITS) as engine:
                files = PictureFiles(NOTES, batch_size=BATCH)
                app = with_page(make_app(engine, files), engine, files, ["a red cube"])
                with TestClient(RequestGuard(app, LIMITS, None, None), raise_server_exceptions=False) as client:
                    yield client
                    gc.collect()  # what it left open is found here, not in another test


def test_the_page_is_there_and_asks_nobody_else(asked: TestClient) -> None:
    page = asked.get("/")
    assert page.status_code == 200 and "if_jax" in page.text
    for site in ("fonts.googleapis", "fonts.gstatic", "cdn.jsdelivr"):
        assert site not in page.text


@pytest.mark.parametrize(
    ("method", "path", "content", "kind"),
    [
        ("POST", "/gradio_api/queue/join", b"{", "application/json"),
        ("POST", "/gradio_api/queue/join", b"[]", "application/json"),
        ("POST", "/gradio_api/queue/join", b'{"data": 3, "fn_index": "x", "session_hash": []}', "application/json"),
        ("POST", "/gradio_api/queue/join", b'{"data": [], "fn_index": 99, "session_hash": "a"}', "application/json"),
        ("POST", "/gradio_api/run/predict", b'{"data": null}', "application/json"),
        ("POST", "/gradio_api/run/draw", b'{"data": [[]]}', "application/json"),
        ("POST", "/gradio_api/run/draw", b'{"data": [{"prompt": 1}]}', "application/json"),
        ("POST", "/gradio_api/call/draw", b"\xff", "application/json"),
        ("POST", "/gradio_api/upload", b"--x", "multipart/form-data; boundary=x"),
        ("POST", "/gradio_api/upload", b"", "multipart/form-data"),
        ("POST", "/gradio_api/upload", b"a" * 400_000, "multipart/form-data; boundary=x"),
        ("POST", "/gradio_api/reset", b"7", "application/json"),
        ("POST", "/gradio_api/component_server", b"{}", "application/json"),
        ("GET", "/gradio_api/file=/etc/passwd", b"", ""),
        ("GET", "/gradio_api/file=../../etc/passwd", b"", ""),
        ("GET", "/gradio_api/file=http://example.com/x.png", b"", ""),
        ("GET", "/gradio_api/proxy=http://example.com/", b"", ""),
        ("GET", "/gradio_api/stream/a/b/c/d", b"", ""),
        ("GET", "/custom_component/a/b/c/../../../x", b"", ""),
        ("GET", "/theme.css?v=%00", b"", ""),
        ("GET", "/static/../../../../etc/passwd", b"", ""),
    ],
)
def test_no_route_fails(asked: TestClient, method: str, path: str, content: bytes, kind: str) -> None:
    reply = asked.request(method, path, content=content, headers={"Content-Type": kind} if kind else {})
    assert reply.status_code < 500, reply.text
    assert "Traceback" not in reply.text and "root:" not in reply.text


def test_hostile_uploads_of_the_page(asked: TestClient) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        content = rng.bytes(int(rng.integers(0, 3000)))
        name = ("a.png", "../../x.png", "a" * 400 + ".png", "\u202egnp.exe", "a\x00.png")[number % 5]
        reply = asked.post("/gradio_api/upload", files={"files": (name, io.BytesIO(content), "image/png")})
        assert reply.status_code < 500, reply.text
    assert asked.post("/v1/draw", json={"prompt": "a", "seed": 1}).status_code == 200
