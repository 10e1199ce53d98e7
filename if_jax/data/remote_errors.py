"""What the errors of object stores and their libraries mean, each in one line with its remedy."""

from __future__ import annotations

import errno

_PASSING = frozenset((408, 429, *range(500, 505)))  # statuses of HTTP


class RemoteError(ValueError):
    """What is wrong with a bucket, or with reading from it, and will not pass: never a property of its records."""


def translate(address: str, error: Exception, silence: float, writes: bool = False) -> Exception:
    """What an error of a library means: `RemoteError` where it stays, `OSError` with a number where it may pass.

    Args:
      address: what was read or written.
      error: of fsspec, gcsfs, s3fs or what they rest on.
      silence: seconds without a byte after which a request is given up.
      writes: whether it was written, or removed.
    """
    words, kinds = " ".join(str(error).split()), {kind.__name__ for kind in type(error).__mro__}
    status = http_status(error)
    if status in _PASSING:
        return OSError(errno.EIO, f"status {status}", address)
    if status == 403 or isinstance(error, PermissionError) or words.startswith("Forbidden"):
        return RemoteError(_forbidden(address, writes))
    if status == 401 or kinds & {
        "RefreshError",
        "DefaultCredentialsError",
        "NoCredentialsError",
        "TokenRetrievalError",
    }:
        return RemoteError(_no_login(address))
    if "requester pays" in words.lower():
        return RemoteError(
            f"{address}: the bucket's reader pays: name the project that is billed, "
            "--config.data.remote.requester_pays="
        )
    if kinds & {"TimeoutError", "FSTimeoutError", "ReadTimeout"}:
        return OSError(errno.EIO, f"no answer for {silence:g} s", address)
    if kinds & {"ClientError", "RequestException", "TransportError", "OSError"} and status is None:
        return OSError(errno.EIO, words[:200] or type(error).__name__, address)
    return RemoteError(f"{address} cannot be read: {words[:300] or type(error).__name__}")


def http_status(error: Exception) -> int | None:
    """The status of HTTP in an error of gcsfs, aiohttp or botocore."""
    status = getattr(error, "code", None) or getattr(error, "status", None)
    if status is None and isinstance(response := getattr(error, "response", None), dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(str(status)) if str(status).isdigit() else None


def missing(address: str) -> str:
    """The line for what is not there."""
    return f"{address} does not exist: check the bucket's name, and what lies in it"


def _forbidden(address: str, writes: bool) -> str:
    bucket = "/".join(address.split("/")[:3])
    verb = "write" if writes else "read"
    if address.startswith("gs://"):
        role = "User" if writes else "Viewer"
        return (
            f"{address}: this account may not {verb} it (403): give it the role Storage Object {role} by `gcloud "
            f"storage buckets add-iam-policy-binding {bucket} --member=serviceAccount:ACCOUNT "
            f"--role=roles/storage.object{role}`"
        )
    act = "put" if writes else "get"
    return f"{address}: this account may not {verb} it (403): let it list {bucket} and {act} its objects"


def _no_login(address: str) -> str:
    remedy = "log in, or set the credentials of this machine"
    if address.startswith("gs://"):
        remedy = (
            "`gcloud auth application-default login`, or start the VM with a service account and the scope storage-ro"
        )
    return f"{address}: nobody is logged in here, or the login has expired (401): {remedy}"
