"""Starts the server: cascade, engine, page and guard on one port, and ends it in order."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax.numpy as jnp
import uvicorn
from absl import logging

from if_jax.inference.cascade import Cascade
from if_jax.inference.guard import SafetyGuard
from if_jax.inference.options import checked_batch_size
from if_jax.serving.api import make_app
from if_jax.serving.engine import Engine, warm
from if_jax.serving.files import PictureFiles
from if_jax.serving.guard import RequestGuard
from if_jax.serving.requests import Limits, Refused

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before anything is loaded.

    Raises:
      ValueError: another program has it, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another with --port") from None
    return taken


def serve(
    cascade: Cascade,
    taken: socket.socket,
    *,
    files: PictureFiles,
    batch_size: int,
    limits: Limits,
    ratios: Sequence[str],
    listed: bool = False,
    tokens: dict[str, str] | None = None,
    page: bool = True,
    examples: Sequence[str] = (),
    guard: SafetyGuard | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM; then finishes what is being drawn, refuses the rest, and returns.

    Args:
      cascade: that draws.
      taken: of `listen`.
      files: that makes the PNGs.
      batch_size: rows of every program.
      limits: of requests.
      ratios: aspect ratios that are compiled for before `/readyz` answers 200.
      listed: refuse all others.
      tokens: token → name of a client; None: everybody may ask.
      page: whether the page is there too.
      examples: prompts on it.
      guard: hides pictures.
    """
    host = str(taken.getsockname()[0])
    allowed = ratios if listed else None
    engine = Engine(cascade, batch_size=batch_size, limits=limits, listed=allowed, when_done=files.keep, guard=guard)
    ready = threading.Event()
    app: Any = make_app(engine, files, ready=ready)
    with _temporary_folder() as folder:
        if page:
            os.environ["GRADIO_TEMP_DIR"], os.environ["GRADIO_ANALYTICS_ENABLED"] = folder, "False"
            app = with_page(app, engine, files, list(examples))
        hosts = LOCAL if host in LOCAL else None
        config = uvicorn.Config(
            RequestGuard(app, limits, tokens, hosts),
            log_level="warning",
            timeout_graceful_shutdown=600,
            server_header=False,
        )
        server = _Server(config, engine)
        threading.Thread(target=_warm, args=(engine, ratios, ready, server), daemon=True).start()
        server.run(sockets=[taken])
        engine.close()


def serve_beside(cascade: Cascade, *, name: str, port: int = 0) -> int:
    """Serves a cascade from a thread of this process, until that ends: for notebooks.

    Args:
      cascade: that draws.
      name: that the page and its PNGs call it by.
      port: on this machine; where it is taken, or 0, another.

    Returns:
      The port.
    """
    try:
        taken = listen("127.0.0.1", port)
    except ValueError:
        taken = listen("127.0.0.1", 0)
    batch_size = checked_batch_size(None)
    notes = {"cascade": name, "dtype": jnp.dtype(cascade.placement.dtype).name, "text_int8": False}
    options: dict[str, Any] = {"files": PictureFiles(notes, batch_size=batch_size), "batch_size": batch_size}
    options |= {"limits": Limits(), "ratios": ["1:1"]}
    threading.Thread(target=serve, args=(cascade, taken), kwargs=options, daemon=True).start()
    return int(taken.getsockname()[1])


def with_page(app: Any, engine: Engine, files: PictureFiles, examples: list[str]) -> Any:
    """Puts the page at / of an application; fonts and scripts come from this server alone."""
    import gradio as gr
    from gradio.themes import Default

    from if_jax.serving.page import CSS, make_page

    fonts = ["system-ui", "sans-serif"]
    theme = Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        make_page(engine, files, examples).queue(default_concurrency_limit=None),
        path="/",
        max_file_size=engine.limits.upload_bytes,
        show_error=False,
        footer_links=["settings"],
        theme=theme,
        css=CSS,
    )


def _warm(engine: Engine, ratios: Sequence[str], ready: threading.Event, server: Any) -> None:
    try:
        warm(engine, ratios)
    except Refused as refused:
        logging.error("compiling ahead failed: %s", refused.message)
        server.should_exit = True
        return
    ready.set()


@contextlib.contextmanager
def _temporary_folder() -> Any:
    """Gradio's uploads, readable by this user alone, and removed at the end."""
    folder = tempfile.mkdtemp(prefix="if_jax-serve-")
    try:
        yield folder
    finally:
        shutil.rmtree(Path(folder), ignore_errors=True)


class _Server(uvicorn.Server):
    """uvicorn's server, which refuses what waits as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._engine.stop, daemon=True).start()  # its lock may be held where this runs
        self.force_exit = self.should_exit  # asked twice
        self.should_exit = True
