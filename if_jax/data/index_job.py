"""`if-jax data index`: the parts of a source that are not indexed yet, by processes of this machine or by Apache Beam.

Each part is one store's: whoever makes it writes it beside the store, whole or not at all, and the same rows whatever
the engine and the number of its workers. So a job that was killed goes on, and its progress is seen at the parts.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from if_jax.data.discovery import discover
from if_jax.data.index import load_index
from if_jax.data.indexing import index_store
from if_jax.data.parts_table import index_stamp
from if_jax.data.reading import in_flight
from if_jax.data.records import RecordStore
from if_jax.data.remote import RemoteError, RemotePath, RemoteSettings, forget_listings
from if_jax.data.selection import FOLDER
from if_jax.data.sources import Stored, cores, in_processes, open_stored, rows_folders
from if_jax.parallel import run_lock
from if_jax.scenes import sources

_LOOK_SECONDS = 5.0  # between looks at the parts
_REMEDY = "let it end, or stop it; what it has indexed stays"
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception): (.+?)(?: \[while running .*\])?$", re.MULTILINE)


def index_source(
    source: str,
    *,
    check: str = "decode",
    workers: int | None = None,
    reindex: bool = False,
    runner: str = "",
    options: Sequence[str] = (),
    settings: RemoteSettings = RemoteSettings(),  # noqa: B008 (frozen)
    say: Callable[[str], Any] = print,
) -> Stored:
    """Index what is not indexed yet of a source, and open it.

    Args:
      source: as for training, but no mixture.
      check: "decode" every picture, or read "headers" alone; a part that was made by heads is made again by "decode".
      workers: processes of this machine; None: one per core.
      reindex: index again what has changed since it was indexed, rather than refuse it.
      runner: of Apache Beam, by name; "": processes of this machine without Beam.
      options: of that runner.
      settings: of buckets.
      say: is given lines for the user.

    Raises:
      FileNotFoundError, ValueError, OSError: one line; parts that were made stay.
    """
    if source in sources.NAMES:
        raise ValueError(f"{source!r} is drawn on the fly and has no index: name a stored source")
    stores, _ = discover(source, settings)
    with _locked(stores):
        pending = _pending(stores, check, reindex)
        say(f"{len(stores) - len(pending)} of {len(stores)} parts are indexed, {len(pending)} to do")
        task = functools.partial(index_store, reindex=reindex, check=check, beside=True)
        if pending and runner:
            _run_beam(pending, task, runner, [*_local_workers(runner, options, workers), *options])
        else:
            for _ in in_processes(task, pending, cores() if workers is None else workers, "indexing"):
                pass
    forget_listings()
    return open_stored(source, settings=settings)


def _pending(stores: Sequence[RecordStore], check: str, reindex: bool) -> list[RecordStore]:
    remote = any(isinstance(store.path, RemotePath) for store in stores)
    indexes = in_flight(functools.partial(load_index, reindex=reindex), stores, remote)
    return [
        store
        for store, index in zip(stores, indexes, strict=True)
        if index is None or (check == "decode" and index.head.check != check)
    ]


@contextmanager
def _locked(stores: Sequence[RecordStore]) -> Iterator[None]:
    """Keeps other index jobs out, where the store of the lock has conditional writes."""
    with ExitStack() as stack:
        path = stores[0].path if stores else None
        if path is not None and not isinstance(path, RemotePath):
            stack.enter_context(run_lock.locked(str(rows_folders(tuple(stores))[0]), _REMEDY))
        elif path is not None and path.address.startswith("gs://"):
            try:
                stack.enter_context(run_lock.locked(str(path.parent / FOLDER), _REMEDY))
            except PermissionError:
                raise RemoteError(
                    f"{path.parent}: this account may not write there (403), where the index is kept: give it the role "
                    "Storage Object User; or leave `data index` out: each host then keeps an index of its own"
                ) from None
        yield


def _local_workers(runner: str, options: Sequence[str], workers: int | None) -> list[str]:
    """What Beam's own runner takes for processes of this machine, where nothing is said of them."""
    if runner != "DirectRunner" or any(option.startswith("--direct_") for option in options):
        return []
    count = cores() if workers is None else workers
    return [f"--direct_num_workers={count}", "--direct_running_mode=multi_processing"]


def _run_beam(stores: list[RecordStore], task: Callable[[RecordStore], Any], runner: str, options: list[str]) -> None:
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"--runner {runner} needs Apache Beam, which is not installed: pip install 'if_jax[beam]', or leave "
            "--runner out to index by processes of this machine"
        ) from None
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    # By name Beam would ask for Prism first, a program that it downloads.
    engine = FnApiRunner() if runner == "DirectRunner" else runner
    with _progress(stores):
        try:
            pipeline = beam.Pipeline(engine, options=PipelineOptions(options))
            parts = pipeline | "Parts" >> beam.Create(stores, reshuffle=False) | beam.Reshuffle()
            _ = parts | "Index" >> beam.Map(functools.partial(_index_part, task=task))
            pipeline.run().wait_until_finish()
        except Exception as error:
            raised = _RAISED.findall(str(error))
            line = raised[-1] if raised else " ".join(str(error).split())
            raise ValueError(f"{line[:500]} ({runner}; the parts that are done stay)") from None


def _index_part(store: RecordStore, task: Callable[[RecordStore], Any]) -> str:
    """Index a store on a worker; nothing large travels back."""
    task(store)
    return store.name


@contextmanager
def _progress(stores: Sequence[RecordStore]) -> Iterator[None]:
    """A bar that counts parts as they appear, whoever makes them."""
    left = {store.name: (store, index_stamp(store)) for store in stores}
    done = threading.Event()

    def look() -> None:
        forget_listings()
        for parent in {store.path.parent for store in stores if isinstance(store.path, RemotePath)}:
            parent.entries()  # one request, not one for each part
        for name in [name for name, (store, stamp) in left.items() if index_stamp(store) != stamp]:
            del left[name]
            bar.update()

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            try:
                look()
            except (OSError, ValueError):  # the bucket stumbles: the next look will tell
                continue

    with tqdm(total=len(stores), desc="indexing", unit="part") as bar:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
            look()
        finally:
            done.set()
            thread.join()
