"""The HTTP API: JSON in; a PNG, or JSON with pictures in base64, out."""

from __future__ import annotations

import asyncio
import base64
import html
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from if_jax.serving.engine import Engine
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import client_of
from if_jax.serving.jobs import Job
from if_jax.serving.requests import DrawRequest, Refused

_POLL = 0.5  # seconds between looks whether a client that waits is still there


def make_app(engine: Engine, files: PictureFiles, *, ready: threading.Event | None = None) -> FastAPI:
    """The routes of an engine.

    Args:
      engine: that draws.
      files: that makes the PNGs.
      ready: set when the server may be sent requests; None: it may at once.

    Returns:
      The application, without page and guard.
    """
    app = FastAPI(title="if_jax", docs_url=None, redoc_url=None, description="Pictures from text, stage by stage.")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail).lower()}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        engine.meters.refused(422)
        return JSONResponse({"error": in_one_line(error.errors()[0])}, 422)

    @app.post(
        "/v1/draw",
        summary="Draws, and answers when it is done: with Accept: image/png the last stage's first picture",
        response_model=None,
    )
    async def draw(body: DrawRequest, request: Request) -> Response:
        job = engine.submit(body, client_of(request))
        done = asyncio.wrap_future(job.done)
        while not done.done():
            await asyncio.wait({done}, timeout=_POLL)
            if await request.is_disconnected():
                engine.cancel(job)
        if job.state != "done":
            raise Refused(job.status if job.error else 409, job.error or job.state)
        if "image/png" in request.headers.get("accept", ""):
            headers = {"X-Job": job.id, "X-Seed": str(job.plan.seed)}
            return Response(files.png(job, job.plan.stages[-1], 0), media_type="image/png", headers=headers)
        return JSONResponse(described(job, files))

    @app.post("/v1/jobs", status_code=202, summary="Queues a request, and answers at once")
    async def submit(body: DrawRequest, request: Request) -> dict[str, Any]:
        return described(engine.submit(body, client_of(request)))

    @app.get("/v1/jobs/{identity}", summary="How far a job is, and which pictures are there")
    async def status(identity: str, request: Request) -> dict[str, Any]:
        return described(engine.job(identity, client_of(request)))

    @app.delete("/v1/jobs/{identity}", summary="Cancels a job")
    async def cancel(identity: str, request: Request) -> dict[str, Any]:
        job = engine.job(identity, client_of(request))
        engine.cancel(job)
        return described(job)

    @app.get("/v1/jobs/{identity}/{name}", summary="A picture: NUMBER-STAGE.png, such as 0-II.png", response_model=None)
    async def picture(identity: str, name: str, request: Request) -> Response:
        job = engine.job(identity, client_of(request))
        number, _, stage = name.removesuffix(".png").partition("-")
        known = number.isdecimal() and len(number) < 6 and int(number) < job.plan.count
        if not known or stage not in job.pictures[int(number)]:
            raise Refused(404, f"job {job.id} has no picture {name[:40]!r}: it is not drawn, or not yet")
        file = f"{job.plan.seed}-{number}-{stage}.png"
        headers = {"Content-Disposition": f'inline; filename="{file}"', "Cache-Control": "private, max-age=600"}
        content = await asyncio.to_thread(files.png, job, stage, int(number))
        return Response(content, media_type="image/png", headers=headers)

    @app.get("/healthz", summary="200 while the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="200 when requests may be sent here")
    async def readyz() -> dict[str, str]:
        if engine.stopping:
            raise Refused(503, "the server is stopping")
        if ready is not None and not ready.is_set():
            raise Refused(503, "the server is compiling: not ready yet", retry_after=10)
        return {"status": "ready"}

    @app.get("/metrics", summary="For Prometheus", response_model=None)
    async def metrics() -> Response:
        return Response(engine.meters.text(engine.waiting()), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False, response_model=None)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs_page(app))

    return app


def described(job: Job, files: PictureFiles | None = None) -> dict[str, Any]:
    """A job as JSON, with its pictures in it where `files` makes them."""
    stage, done, total = job.progress
    drawn = []
    for number, stages in enumerate(job.pictures):
        known: dict[str, Any] = {}
        for name, picture in list(stages.items()):
            known[name] = {"url": f"/v1/jobs/{job.id}/{number}-{name}.png", "size": picture.size}
            if files is not None:
                known[name]["png"] = base64.b64encode(files.png(job, name, number)).decode()
        drawn.append({"number": number, "stages": known})
    about = {"id": job.id, "state": job.state, "seed": job.plan.seed, "pictures": drawn}
    if job.state == "drawing":
        about["progress"] = {"stage": stage, "step": done, "steps": total}
    return about | ({"error": job.error} if job.error else {})


def in_one_line(error: Mapping[str, Any]) -> str:
    """Which field of a request is wrong, and how; error: of pydantic."""
    if error["type"] == "json_invalid":
        return "the body is no JSON"
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "the body"
    if error["type"] == "extra_forbidden":
        return f"{where[:80]} is no field: use {', '.join(DrawRequest.model_fields)}"
    return f"{where[:80]}: {error['msg'].lower()}"


def _docs_page(app: FastAPI) -> str:
    """The API in one page that needs nothing from elsewhere."""
    rows = []
    for path, methods in app.openapi()["paths"].items():
        for method, about in methods.items():
            cells = (f"<code>{method.upper()} {html.escape(path)}</code>", html.escape(about.get("summary", "")))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    fields = "".join(
        f"<tr><td><code>{name}</code></td><td>{html.escape(str(field.get_default(call_default_factory=True)))}</td>"
        f"<td>{html.escape(field.description or '')}</td></tr>"
        for name, field in DrawRequest.model_fields.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>if_jax: HTTP API</title><style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{padding:.3em 1em .3em 0;vertical-align:top}</style><h1>if_jax: HTTP API</h1>"
        f"<table>{''.join(rows)}</table><h2>Fields of a request</h2><table>{fields}</table>"
        "<p>Machine-readable: <a href=/openapi.json>/openapi.json</a></p></html>"
    )
