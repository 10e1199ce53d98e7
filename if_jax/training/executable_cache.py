"""A compiled program kept on disk whole: a run that starts again neither traces nor compiles its step a second time.

JAX's own cache keeps what XLA makes under a key that takes the whole program to know, so tracing (minutes for a large
net) comes first all the same; and only process 0 writes to it, under a key that on CPUs no other process ever asks for.
Here the key is what the program follows from: this code, the recipe, the libraries, the devices and JAX's settings.
A restart of the demo's stage I on CPUs, in one process, then takes 31 s of a core for its step, where JAX's cache alone
takes 44 s. The second of two processes compiles anew with JAX's cache alone: 41 s against 3.5 s for a tiny recipe.

A stored program is unpickled (`jax.experimental.serialize_executable` does so too), which runs what is in it. So only a
file is read that this user has written, in a folder that nobody else can write to, and whose checksum is right.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from if_jax.checkpoints.files import atomic_file
from if_jax.parallel import hosts

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_WRITABLE_BY_OTHERS = 0o022  # mode bits of group and world


def compiled(lower: Callable[[], jax.stages.Lowered], mesh: Mesh, *follows_from: object) -> jax.stages.Compiled:
    """The program that `lower` traces: out of the folder of JAX's compilation cache, or compiled and kept there.

    What cannot be read or written costs time, nothing else.

    Args:
      lower: traces the program, where it is not stored.
      mesh: of the devices it runs on.
      follows_from: with the code of this package, all that decides what the program is, distinguished by `repr`.
    """
    devices = list(mesh.devices.flat)
    path = _path(devices, follows_from)
    if path is not None and path.is_file():
        try:
            return serialize_executable.deserialize_and_load(*_read(path), execution_devices=devices)
        except Exception as error:  # whatever is wrong with it, compiling is right
            logging.info("%s cannot be used (%s: %s): compiling anew", path, type(error).__name__, error)
    if path is None:
        return lower().compile()
    with _without_jax_cache(devices[0].platform):
        program = lower().compile()
    _write(program, path)
    return program


@contextmanager
def _without_jax_cache(platform: str) -> Iterator[None]:
    """On CPUs a program that came out of JAX's cache runs, but what is written of it lacks functions."""
    if platform != "cpu" or not jax.config.values["jax_enable_compilation_cache"]:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def _path(devices: Sequence[Any], follows_from: tuple[object, ...]) -> Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder:
        return None
    parts = [
        hosts.code_hash(),
        *follows_from,
        *(version(name) for name in _LIBRARIES),
        *(os.environ.get(name) for name in _ENVIRONMENT),
        socket.gethostname(),  # code for the CPU of another machine is no use here
        devices[0].client.platform_version,
        [(device.id, device.process_index, device.device_kind) for device in devices],
        jax.process_index(),
        sorted((name, value) for name, value in jax.config.values.items() if "cache_dir" not in name),
    ]
    digest = hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()
    return Path(folder) / "if_jax-steps" / digest[:40]


def _read(path: Path) -> tuple[Any, ...]:
    """What `serialize` has given. Raises PermissionError where others could have written it, ValueError if damaged."""
    with path.open("rb") as file:
        for status in (os.fstat(file.fileno()), path.parent.stat()):
            if status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:
                raise PermissionError("another user could have written it")
        checksum, data = file.read(hashlib.sha256().digest_size), file.read()
    if hashlib.sha256(data).digest() != checksum:
        raise ValueError("its checksum is wrong")
    return pickle.loads(data)


def _write(program: jax.stages.Compiled, path: Path) -> None:
    try:
        data = pickle.dumps(serialize_executable.serialize(program))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # whatever the user's umask lets others do
        with atomic_file(path) as beside:
            beside.touch(mode=0o600)
            beside.write_bytes(hashlib.sha256(data).digest() + data)
    except Exception as error:  # a program that cannot be stored, a full disk
        logging.info("%s is not kept (%s: %s)", path, type(error).__name__, error)
