"""A bucket of Google Cloud Storage as its JSON API tells it, kept in memory and served on localhost.

For runs at `gs://` paths: TensorStore and gcsfs are pointed at it through the variables of `environment`. Objects have
generations, conditions on them hold or fail, there are no folders, and what a client asks that is not here is refused
with 501, and noted in `refused`. https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

NAME = "bucket"
# What may be asked; the first group is an object's name. Sent, and without effect on what is stored, are the others.
_KNOWN = {"alt", "name", "uploadType", "prefix", "delimiter", "maxResults", "pageToken", "startOffset", "endOffset"}
_KNOWN |= {
    "userProject",
    "ifGenerationMatch",
    "ifGenerationNotMatch",
    "upload_id",
    "tensorstore",
    "fields",
    "projection",
    "prettyPrint",
}


class Bucket:
    """The objects, {name: (content, generation)}, and the uploads that are under way."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock, self.count, self.refused = threading.Lock(), itertools.count(1), []
        self.requests: list[str] = []  # answered or not
        self.location = "US"
        self.billed = ""  # the project that a reader must name; "": none
        self.delay = 0.0  # seconds before each answer
        self.trouble: Callable[[str], int | float | None] = lambda request: None  # a status, or seconds of silence

    def put(self, name: str, content: bytes) -> dict:
        self.objects[name] = (content, next(self.count))
        return self.describe(name)

    def describe(self, name: str) -> dict:
        content, generation = self.objects[name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        told = {"kind": "storage#object", "bucket": NAME, "name": name, "size": str(len(content)), "md5Hash": digest}
        told |= {"generation": str(generation), "metageneration": "1", "contentType": "application/octet-stream"}
        return told | {"timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}

    def list(self, asked: dict[str, str]) -> dict:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        first = max(asked.get("startOffset", ""), asked.get("pageToken", ""))
        items, prefixes, most = [], [], int(asked.get("maxResults", 1000))
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < first or (asked.get("endOffset") or "\U0010ffff") <= name:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found and prefix + head + delimiter in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                return {"items": items, "prefixes": prefixes, "nextPageToken": name}
            if found:
                prefixes.append(prefix + head + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the receipt of its head
    bucket: Bucket

    def _answer(self, code: int, content: bytes | dict = b"", **headers: str) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header(
            "Content-Type", "application/json" if isinstance(content, dict) else "application/octet-stream"
        )
        if code != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code != 304:
            self.wfile.write(body)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = url.path.replace("/download/storage/", "/storage/")
        self.bucket.requests.append(f"{self.command} {unquote(url.path)}")
        trouble = self.bucket.trouble(self.bucket.requests[-1])
        time.sleep(trouble if isinstance(trouble, float) else self.bucket.delay)
        if isinstance(trouble, int):
            return self._answer(trouble, {"error": {"code": trouble, "message": "in trouble"}})
        if re.match(rf"/storage/v1/b/(?!{NAME}(/|$))", path):
            return self._answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        if self.bucket.billed and asked.get("userProject") != self.bucket.billed:
            message = "Bucket is a requester pays bucket but no user project provided."
            return self._answer(400, {"error": {"code": 400, "message": message}})
        with self.bucket.lock:
            for method, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command and asked.keys() <= _KNOWN:
                    return handle(self, asked, body, *map(unquote, match.groups()))
            self.bucket.refused.append(f"{self.command} {self.path}")
        return self._answer(501, {"error": {"code": 501, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _fails(self, asked: dict[str, str], name: str) -> bool:
        """Answers 412 or 304 where a condition does not hold."""
        now = str(self.bucket.objects[name][1] if name in self.bucket.objects else 0)
        if asked.get("ifGenerationMatch", now) != now:
            self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            return True
        if asked.get("ifGenerationNotMatch") == now:
            self._answer(304)
            return True
        return False

    def _missing(self, name: str) -> bool:
        if name not in self.bucket.objects:
            self._answer(404, {"error": {"code": 404, "message": f"No such object: {NAME}/{name}"}})
        return name not in self.bucket.objects

    def _about(self, asked: dict, body: bytes) -> None:
        self._answer(
            200, {"kind": "storage#bucket", "name": NAME, "location": self.bucket.location, "storageClass": "STANDARD"}
        )

    def _list(self, asked: dict, body: bytes) -> None:
        self._answer(200, self.bucket.list(asked))

    def _get(self, asked: dict, body: bytes, name: str) -> None:
        if self._missing(name) or self._fails(asked, name):
            return
        if asked.get("alt") != "media":
            self._answer(200, self.bucket.describe(name))
            return
        content, generation = self.bucket.objects[name]
        told = {
            "x_goog_generation": str(generation),
            "x_goog_metageneration": "1",
            "x_goog_stored_content_encoding": "",
        }
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not span:
            self._answer(200, content, **told)
            return
        first = int(span[1]) if span[1] else max(0, len(content) - int(span[2]))
        last = min(len(content), int(span[2]) + 1 if span[1] and span[2] else len(content))
        if first >= len(content):
            self._answer(416, {"error": {"code": 416, "message": "requestedRangeNotSatisfiable"}})
            return
        self._answer(206, content[first:last], Content_Range=f"bytes {first}-{last - 1}/{len(content)}", **told)

    def _delete(self, asked: dict, body: bytes, name: str) -> None:
        if self._missing(name) or self._fails(asked, name):
            return
        del self.bucket.objects[name]
        self._answer(204)

    def _copy(self, asked: dict, body: bytes, name: str, other: str) -> None:
        if self._missing(name) or self._fails(asked, other):
            return
        told = self.bucket.put(other, self.bucket.objects[name][0])
        self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": told})

    def _move(self, asked: dict, body: bytes, name: str, other: str) -> None:
        if self._missing(name) or self._fails(asked, other):
            return
        told = self.bucket.put(other, self.bucket.objects[name][0])
        del self.bucket.objects[name]
        self._answer(200, told)

    def _upload(self, asked: dict, body: bytes) -> None:
        if "upload_id" in asked:
            self._go_on(asked, body)
            return
        kind, name = asked.get("uploadType"), asked.get("name", "")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            parts = body.split(b"--" + boundary)[1:-1]
            described, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            name, body = json.loads(described)["name"], re.sub(rb"\r?\n\Z", b"", content)
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            if not self._fails(asked, name):
                key = str(next(self.bucket.count))
                self.bucket.uploads[key] = (name, bytearray())
                host = self.headers["Host"]
                self._answer(200, Location=f"http://{host}/upload/storage/v1/b/{NAME}/o?upload_id={key}")
            return
        if not self._fails(asked, name):
            self._answer(200, self.bucket.put(name, body))

    def _go_on(self, asked: dict, body: bytes) -> None:
        name, content = self.bucket.uploads[asked["upload_id"]]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            self._answer(200, self.bucket.put(name, bytes(content)))

    def log_message(self, format: str, *args: object) -> None:
        pass


_ROUTES = (
    ("GET", f"/storage/v1/b/{NAME}", _Handler._about),
    ("GET", f"/storage/v1/b/{NAME}/o", _Handler._list),
    ("GET", f"/storage/v1/b/{NAME}/o/([^/]+)", _Handler._get),
    ("DELETE", f"/storage/v1/b/{NAME}/o/([^/]+)", _Handler._delete),
    ("POST", f"/storage/v1/b/{NAME}/o/([^/]+)/rewriteTo/b/{NAME}/o/([^/]+)", _Handler._copy),
    ("POST", f"/upload/storage/v1/b/{NAME}/o", _Handler._upload),
    ("POST", f"/storage/v1/b/{NAME}/o/([^/]+)/moveTo/o/([^/]+)", _Handler._move),
    ("PUT", f"/upload/storage/v1/b/{NAME}/o", _Handler._go_on),
)


def flip_a_byte(bucket: Bucket, name: str) -> None:
    """Rewrites an object with one bit changed in its middle."""
    content = bytearray(bucket.objects[name][0])
    content[len(content) // 2] ^= 1
    bucket.put(name, bytes(content))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


@contextmanager
def serve():
    """Yields the bucket and the environment variables that lead to it."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        names = {"TENSORSTORE_GCS_HTTP_URL": address, "STORAGE_EMULATOR_HOST": address}
        yield bucket, names | {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        server.shutdown()


@contextmanager
def metadata_server(zone: str):
    """Yields the HOST:PORT of what tells a machine of Google Cloud its zone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/computeMetadata/v1/instance/zone" and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(f"projects/1/zones/{zone}".encode() if known else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
