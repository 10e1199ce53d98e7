"""This machine: the installed versions, who holds the TPU, the devices and their memory."""

from __future__ import annotations

import fcntl
import os
import platform
import struct
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

from if_jax.doctor.findings import Finding, Status
from if_jax.parallel import jax_internals

TPU_LOCK = Path("/tmp/libtpu_lockfile")  # libtpu locks it for as long as its process uses the TPU
DEVICE_QUERY = "if_jax asks for devices"  # name of a thread that may hang for ever
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# What belongs to jax: what it is without breaks at import or at the first program.
_PARTNERS = {"jaxlib": "", "libtpu": "[tpu]", "jax-cuda12-plugin": "[cuda12]", "jax-cuda13-plugin": "[cuda13]"}
_FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, pid


def versions() -> Finding:
    """jax and what is built for exactly its version, as jax's own metadata says; jax is not imported for it."""
    from packaging.requirements import Requirement

    jax = metadata.version("jax")
    wanted: dict[str, list[Any]] = {}
    for requirement in map(Requirement, metadata.requires("jax") or []):
        if requirement.marker is None or requirement.name != "jaxlib":  # extras ask for the newest jaxlib
            wanted.setdefault(requirement.name, []).append(requirement.specifier)
    installed, wrong = [f"python {platform.python_version()}", f"jax {jax}"], []
    for name, extra in _PARTNERS.items():
        try:
            own = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        installed.append(f"{name} {own}")
        specifiers = wanted.get(name, [])
        if all(specifier.contains(own, prereleases=True) for specifier in specifiers):
            continue
        message = f"{name} {own} does not belong to jax {jax}, which wants {specifiers[0]}"
        status: Status = "fail" if name == "jaxlib" or _is_older(own, specifiers) else "warn"
        wrong.append(Finding("versions", status, message, f'pip install -U "jax{extra}=={jax}"'))
    wrong.sort(key=lambda finding: finding.status)  # what fails before what warns
    return wrong[0] if wrong else Finding("versions", "pass", ", ".join(installed))


def tpu_lock(path: Path | None = None) -> Finding:
    """Whether another process holds the TPU; it is named, never ended."""
    path = path or TPU_LOCK
    if not path.exists():
        return Finding("TPU lock", "pass", "nobody has used a TPU here")
    try:
        with open(path, "rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, holder = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except PermissionError:
        kind, holder = fcntl.F_UNLCK, 0
    if kind != fcntl.F_UNLCK:
        who = f"process {holder} ({_command(holder)})" if holder > 0 else "a process of another container"
        remedy = f"let it end, or end it if it is yours: kill {holder}" if holder > 0 else "let it end there"
        return Finding("TPU lock", "fail" if _wants_tpu() else "warn", f"{who} holds {path}", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        owner = path.stat().st_uid
        status = "fail" if _wants_tpu() else "warn"
        return Finding(
            "TPU lock", status, f"{path} was left by user {owner} and cannot be locked by you", f"sudo rm {path}"
        )
    return Finding("TPU lock", "pass", "free")


def devices(seconds: float = 60.0) -> tuple[Finding, list[Any] | None]:
    """Asks JAX for its devices, in a thread that is left behind where no answer comes.

    Args:
      seconds: how long to wait.

    Returns:
      The finding, and the devices of all processes; None where JAX finds none or does not answer.
    """
    got: dict[str, Any] = {}

    def ask() -> None:
        import jax

        try:
            got["devices"] = jax.devices()
        except Exception as error:  # a runtime's own error, as different as the runtimes are
            got["error"] = str(error).strip().splitlines()[0]

    asking = threading.Thread(target=ask, daemon=True, name=DEVICE_QUERY)
    asking.start()
    asking.join(seconds)
    if not got:
        message = f"JAX has not found its devices after {seconds:g} s"
        remedy = "on a TPU of several hosts run this on all workers at once; else see who holds the TPU"
        return Finding("devices", "fail", message, remedy), None
    if "error" in got:
        asked = os.environ.get("JAX_PLATFORMS")
        remedy = (
            f"JAX_PLATFORMS is {asked!r}: unset it, or install what it names" if asked else "end what holds the device"
        )
        return Finding("devices", "fail", f"JAX finds no devices ({got['error']})", remedy), None
    return _describe(got["devices"]), got["devices"]


def show_devices() -> list[Any]:
    """For the first cell of a notebook: prints devices and memory in one line, and one more where all will be slow.

    Returns:
      The devices of all processes.

    Raises:
      RuntimeError: in one line, where JAX finds no device or another process holds it.
    """
    finding, available = devices()
    if available is None:
        raise RuntimeError(finding.line())
    print(finding.line())
    if available[0].platform == "cpu":
        print(
            "no accelerator: all of this runs on the CPU, slowly. In Colab: Runtime → Change runtime type → v5e-1 TPU, "
            "then run all cells again"
        )
    return available


def memory_per_device() -> tuple[int, bool]:
    """Bytes that a local device has, and whether they are its own rather than a share of the system's."""
    import jax

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return (limit, True) if limit else (system_memory() // jax.local_device_count(), False)


def system_memory() -> int:
    """Bytes of memory this machine, or this container, has."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(size, int(limit)) if limit.isdigit() else size


def idle_accelerators() -> str:
    """What accelerators this machine has, whatever JAX uses; "" for none."""
    try:
        chips, gpu = jax_internals.visible_accelerators()
    except (ImportError, AttributeError, OSError):  # JAX's own business, which may move
        return ""
    return f"{chips} TPU chip(s)" if chips else "an NVIDIA GPU" if gpu else ""


def _describe(available: list[Any]) -> Finding:
    import jax

    kind, platform_name = available[0].device_kind, available[0].platform
    size, own = memory_per_device()
    each = f"{size / 1e9:.1f} GB each" if own else f"{system_memory() / 1e9:.1f} GB of system memory"
    message = f"{len(available)} × {kind} ({jax.local_device_count()} here), {each}"
    if platform_name != "cpu" or not (idle := idle_accelerators()):
        return Finding("devices", "pass", message)
    extra = "tpu" if "TPU" in idle else "cuda"
    asked = os.environ.get("JAX_PLATFORMS")
    remedy = f"unset JAX_PLATFORMS (it is {asked})" if asked else f'pip install "if_jax[{extra}]"'
    return Finding("devices", "warn", f"{message}: JAX uses the CPU, but there is {idle}", remedy)


def _wants_tpu() -> bool:
    """Whether JAX would use a TPU here: it is asked to, or free to and able to."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return "tpu" in asked.split(",")
    try:
        return bool(metadata.version("libtpu"))
    except metadata.PackageNotFoundError:
        return False


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "its command is not to be seen"
    return " ".join(words).strip()[:80] or "its command is not to be seen"


def _is_older(own: str, specifiers: list[Any]) -> bool:
    from packaging.version import Version

    bounds = [Version(part.version.removesuffix(".*")) for specifier in specifiers for part in specifier]
    return Version(own) < min(bounds)
