"""What stands before every route, the page's too: tokens, hosts, the size of bodies, one line for each error."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from absl import logging
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from if_jax.serving.requests import Limits

_CLIENT = "if_jax.client"  # in the scope of a request
_OPEN = ("/healthz", "/readyz")  # probes of a load balancer carry no token


class _BodyTooLarge(Exception):
    """More came than the limit."""


class RequestGuard:
    """ASGI middleware."""

    def __init__(
        self, app: ASGIApp, limits: Limits, tokens: Mapping[str, str] | None, hosts: frozenset[str] | None
    ) -> None:
        """Wrap an application.

        Args:
          app: behind it.
          limits: whose `upload_bytes` is the largest body.
          tokens: token → its name; None: everybody may ask.
          hosts: names that the server may be asked by, so that no other site's script reaches it through a name of
            its own (DNS rebinding); None: any.
        """
        self._app, self._limits, self._tokens, self._hosts = app, limits, tokens, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            elif scope["type"] == "websocket":  # nothing here speaks it
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        identity, began = secrets.token_hex(6), False
        if refusal := self._refusal(scope, headers):
            await _answer(send, *refusal)
            return
        size, page = 0, not scope["path"].startswith("/v1/")

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limits.upload_bytes:
                raise _BodyTooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal began
            if size > self._limits.upload_bytes and not began:
                raise _BodyTooLarge  # whatever the route makes of a body that ends too early
            if message["type"] == "http.response.start":
                if message["status"] >= 500 and message["status"] not in (503, 507) and page:
                    raise _Failed(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
                began = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _BodyTooLarge:
            if not began:
                await _answer(send, 413, self._too_large())
        except _Failed:
            logging.error("request %s: %s %s was not understood", identity, scope["method"], scope["path"])
            await _answer(send, 400, f"the page does not understand this request ({identity})")
        except Exception:
            logging.exception("request %s: %s %s failed", identity, scope["method"], scope["path"])
            if not began:
                status = 400 if page else 500
                await _answer(send, status, f"this request failed: the server's log has the reason under {identity}")

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]] | None:
        """Status, message and headers for what is refused unread."""
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._hosts is not None and host.strip("[]") not in self._hosts:
            return 403, f"this server is not {host[:80]!r}: ask it by the address it listens at", {}
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.upload_bytes:
            return 413, self._too_large(), {}
        name = "" if self._tokens is None else self._name(headers.get("authorization", ""))
        if self._tokens is not None and not name and scope["path"] not in _OPEN:
            return 401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": 'Basic realm="if_jax"'}
        posted = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        if posted and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A form on another site could be posted here by a browser that is logged in; JSON cannot.
            return 415, "send JSON: Content-Type: application/json", {}
        scope[_CLIENT] = name or (scope.get("client") or ("local",))[0]
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.upload_bytes:,} bytes"

    def _name(self, authorization: str) -> str:
        """Whose token came: as a bearer, or as the password that a browser asks for."""
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return ""
        elif kind.lower() != "bearer":
            return ""
        names = [
            name
            for token, name in (self._tokens or {}).items()
            if hmac.compare_digest(token.encode(), value.strip().encode())
        ]
        return names[0] if names else ""


class _Failed(Exception):
    """A route of the page was about to answer with an error of its own."""


def client_of(request: Request) -> str:
    """Who asks: the name of a token, or an address."""
    return str(request.scope.get(_CLIENT, "local"))


def read_tokens(path: Path) -> dict[str, str]:
    """Tokens from a file with a line NAME TOKEN for each; # begins a comment.

    Returns:
      Token → name.

    Raises:
      FileNotFoundError, ValueError: there is no such file, a line is malformed, a token is short or there twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--auth {path}: no such file; write a line NAME TOKEN for each client")
    tokens: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < 16:
            raise ValueError(f"--auth {path}, line {number}: write NAME TOKEN, a token of 16 characters or more")
        if words[1] in tokens or words[0] in tokens.values():
            raise ValueError(f"--auth {path}, line {number}: this name or token is there twice")
        tokens[words[1]] = words[0]
    if not tokens:
        raise ValueError(f"--auth {path}: no token in it; write a line NAME TOKEN for each client")
    return tokens


async def _answer(send: Send, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    body = json.dumps({"error": message}).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    fields += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
