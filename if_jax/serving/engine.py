"""Draws what is asked, batch by batch: pictures that wait with equal settings share a program, all others take turns.

Every program has one fixed number of rows, so a picture has the same bits whatever else is in its batch, and the same
as `if-jax dream` draws at that batch size. Two threads draw: one what is compiled, the other what is not yet, so that a
new shape holds nobody up.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from absl import logging

from if_jax.inference.cascade import Cascade
from if_jax.inference.guard import SafetyGuard
from if_jax.inference.options import StepInfo
from if_jax.inference.pictures import to_pil
from if_jax.serving.jobs import Job
from if_jax.serving.meters import Meters
from if_jax.serving.requests import DrawRequest, Limits, Refused, plan_request

_WARM = " warm"  # the client of pictures that nobody asked for; no token has such a name
STOPPING = Refused(503, "the server is stopping: ask another one, or try again", retry_after=30)


@dataclass(frozen=True)
class _Item:
    """One picture of a job."""

    job: Job
    number: int


class _Cancelled(Exception):
    """All pictures of the batch that is being drawn were cancelled."""


class Engine:
    """Queue, batches and results of one cascade."""

    def __init__(
        self,
        cascade: Cascade,
        *,
        batch_size: int,
        limits: Limits | None = None,
        listed: Iterable[str] | None = None,
        when_done: Callable[[Job], None] = lambda _: None,
        guard: SafetyGuard | None = None,
    ) -> None:
        """Start the two threads.

        Args:
          cascade: that draws.
          batch_size: rows of every program, on each device.
          limits: of requests and of what is kept.
          listed: aspect ratios; where given, those alone are drawn from text.
          when_done: called with a job that was drawn, before its client hears of it.
          guard: hides pictures; nothing of a picture is shown before it has passed.
        """
        self.cascade, self.batch_size, self.limits = cascade, batch_size, limits or Limits()
        self.meters, self._when_done, self._guard = Meters(), when_done, guard
        self._listed = None if listed is None else frozenset(listed)
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Item]] = OrderedDict()  # by client, who waits longest first
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._compiled: set[Any] = set()
        self._compiling: set[Any] = set()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, args=(compiles,), daemon=True, name=f"draw-{compiles}")
            for compiles in (False, True)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: DrawRequest, client: str) -> Job:
        """Queues a request.

        Args:
          request: what is asked.
          client: who asks; clients take turns.

        Raises:
          Refused: it cannot be drawn, there is no room in the queue, or the server is stopping.
        """
        try:
            if self._stopping:
                raise STOPPING
            if self._listed is not None and request.mode == "dream" and request.aspect_ratio not in self._listed:
                own = ", ".join(sorted(self._listed))
                raise Refused(422, f"aspect_ratio is {request.aspect_ratio!r}: this server draws {own}")
            plan = plan_request(self.cascade, request, self.limits)
            job = Job(secrets.token_urlsafe(12), client, plan, pictures=[{} for _ in range(plan.count)])
            with self._changed:
                self._check_room(client, plan.count)
                self._jobs[job.id] = job
                self._queues.setdefault(client, deque()).extend(_Item(job, k) for k in range(plan.count))
                self._forget()
                self._changed.notify_all()
        except Refused as refused:
            self.meters.refused(refused.status)
            raise
        return job

    def job(self, identity: str, client: str | None = None) -> Job:
        """A job that is still known.

        Args:
          identity: of the job.
          client: who asks for it; other people's jobs are unknown to them.

        Raises:
          Refused: there is none.
        """
        job = self._jobs.get(identity)
        if job is None or client not in (None, job.client):
            raise Refused(404, f"no job {identity[:40]!r}: it never was, or is no longer kept")
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job: what waits is not drawn, what is being drawn stops at its next step if nobody else needs it."""
        with self._changed:
            if not job.ended:
                self._end(job, "cancelled")
            for queue in self._queues.values():
                for item in [item for item in queue if item.job is job]:
                    queue.remove(item)

    @property
    def stopping(self) -> bool:
        """Whether it takes no more requests."""
        return self._stopping

    def waiting(self) -> int:
        """Pictures in the queue."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    def stop(self) -> None:
        """Refuses what waits and what comes; what is being drawn is finished."""
        with self._changed:
            self._stopping = True
            for queue in self._queues.values():
                for item in queue:
                    if not item.job.ended:
                        self._end(item.job, "failed", STOPPING.message, 503)
                queue.clear()
            self._changed.notify_all()

    def close(self, seconds: float = 600.0) -> None:
        """`stop`, then waits for what is being drawn."""
        self.stop()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _check_room(self, client: str, count: int) -> None:
        waiting = sum(map(len, self._queues.values()))
        own = len(self._queues.get(client, ()))
        limits = self.limits
        seconds = max(1, round(self.meters.seconds_of_picture() * min(waiting, own or waiting)))
        if waiting + count > limits.queue:
            raise Refused(429, f"{waiting} pictures are waiting: try again in {seconds} s", seconds)
        if own + count > limits.queue_of_client:
            raise Refused(429, f"{own} pictures of yours are waiting: try again in {seconds} s", seconds)

    def _work(self, compiles: bool) -> None:
        while True:
            with self._changed:
                items = self._take(compiles)
                while not items:
                    if self._stopping:
                        return
                    self._changed.wait()
                    items = self._take(compiles)
                program = items[0].job.plan.program
                if compiles:
                    self._compiling.add(program)
            try:
                drawn = self._draw(items)
            finally:
                with self._changed:
                    self._compiling.discard(program)
                    self._changed.notify_all()
            if drawn:
                with self._changed:
                    self._compiled.add(program)
                    self._changed.notify_all()

    def _take(self, compiles: bool) -> list[_Item]:
        """The next batch: a picture of the client who waits longest, and others that can be drawn with it."""

        def fits(item: _Item) -> bool:
            program = item.job.plan.program
            if compiles:
                return program not in self._compiled and program not in self._compiling
            return program in self._compiled

        for client, queue in self._queues.items():
            first = next((item for item in queue if fits(item)), None)
            if first is None:
                continue
            self._queues.move_to_end(client)
            same = [
                item
                for own in [queue, *(other for other in self._queues.values() if other is not queue)]
                for item in own
                if item.job.plan.batch == first.job.plan.batch
            ]
            items = same[: self.batch_size * self.cascade.placement.ways]
            for item in items:
                self._queues[item.job.client].remove(item)
                if item.job.state == "queued":
                    item.job.state = "drawing"
            return items
        return []

    def _draw(self, items: list[_Item]) -> bool:
        """Draws a batch; whether that was done."""
        jobs = list(dict.fromkeys(item.job for item in items))
        began, stage_began = time.monotonic(), {"": time.monotonic()}

        def after_step(info: StepInfo) -> None:
            if all(job.ended for job in jobs):
                raise _Cancelled
            for row, item in enumerate(items if self._guard is None else ()):
                if info.left:
                    item.job.previews[item.number] = info.stage, info.x0[row]
                else:
                    item.job.pictures[item.number][info.stage] = to_pil(info.x[row])
                    item.job.previews.pop(item.number, None)
            if not info.left:
                now = time.monotonic()
                self.meters.stage(info.stage, now - stage_began[""])
                stage_began[""] = now

        def show(stage: str, done: int, total: int) -> None:
            for job in jobs:
                job.progress = stage, done, total

        try:
            drawn = self._call(items, callback=after_step, progress=show)
        except _Cancelled:
            return False
        except MemoryError as error:
            self._fail(jobs, str(error), 507)
            return False
        except ValueError as error:
            self._fail(jobs, str(error), 422)
            return False
        except Exception:
            identities = ", ".join(job.id for job in jobs)
            logging.exception("drawing %s failed", identities)
            self._fail(jobs, f"drawing failed: the server's log has the reason under {identities}", 500)
            return False
        if self._guard is not None:
            for stage, rows in drawn.items():
                for item, row in zip(items, rows, strict=True):
                    item.job.pictures[item.number][stage] = to_pil(row)
        self.meters.batch(len(items), time.monotonic() - began)
        for job in jobs:
            if not job.ended and all(len(drawn) == len(job.plan.stages) for drawn in job.pictures):
                self._finish(job)
        return True

    def _finish(self, job: Job) -> None:
        try:
            if job.client != _WARM:
                self._when_done(job)
        except OSError as error:
            self._fail([job], f"the pictures could not be kept: {error.strerror}", 507)
            return
        with self._changed:
            if not job.ended:
                self._end(job, "done")
            self._forget()

    def _call(self, items: list[_Item], **options: Any) -> dict[str, list]:
        plan = items[0].job.plan
        plans = [item.job.plan for item in items]
        texts: dict[str, Any] = {"prompt": [each.prompt for each in plans]}
        if any(each.negative for each in plans):
            texts["negative_prompt"] = [each.negative for each in plans]
        if plan.style:
            texts["style_prompt"] = [each.style for each in plans]
        if plan.image is not None:
            texts["image"] = [each.image for each in plans]
        if plan.mask is not None:
            texts["mask_image"] = [each.mask for each in plans]
        if self._guard is not None:
            options["guard"] = self._guard
        draw: Callable[..., dict[str, list]] = getattr(self.cascade, plan.mode)
        return draw(
            **texts,
            **plan.arguments,
            seed=[each.seed for each in plans],
            first_picture=[item.number for item in items],
            batch_size=self.batch_size,
            return_tensors=True,
            **options,
        )

    def _fail(self, jobs: list[Job], error: str, status: int) -> None:
        with self._changed:
            for job in jobs:
                if not job.ended:
                    self._end(job, "failed", " ".join(error.split()), status)
                for queue in self._queues.values():
                    for item in [item for item in queue if item.job is job]:
                        queue.remove(item)

    def _end(self, job: Job, state: str, error: str = "", status: int = 200) -> None:
        job.state, job.error, job.status = state, error, status
        job.previews.clear()
        self.meters.ended(state, job.plan.count)
        if not job.done.done():
            job.done.set_result(job)

    def _forget(self) -> None:
        """Drops what was finished longest ago, by time and by the bytes of what is kept."""
        ended = [job for job in self._jobs.values() if job.ended]
        bytes_kept = sum(map(_bytes_of, ended))
        for job in ended:
            old = time.monotonic() - job.began > self.limits.kept_seconds
            if not old and bytes_kept <= self.limits.kept_bytes:
                continue
            bytes_kept -= _bytes_of(job)
            del self._jobs[job.id]


def _bytes_of(job: Job) -> int:
    return sum(3 * picture.width * picture.height for drawn in job.pictures for picture in drawn.values())


def warm(engine: Engine, ratios: Iterable[str]) -> None:
    """Compiles for these aspect ratios, by drawing a picture of each.

    Raises:
      Refused: a ratio cannot be drawn, or drawing failed.
    """
    jobs = [engine.submit(DrawRequest(prompt="a picture", aspect_ratio=ratio, seed=0), _WARM) for ratio in ratios]
    for job in jobs:
        job.done.result()
        if job.state != "done":
            raise Refused(job.status, job.error or job.state)
