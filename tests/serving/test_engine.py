"""Pictures drawn for many at a time are those that each would have had alone; nobody waits for what others ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving_fixtures import BATCH, encoded, mask, open_cascade, picture, running

from if_jax.inference.cascade import Cascade
from if_jax.inference.guard import GuardScores, SafetyGuard
from if_jax.serving.engine import Engine, Job, warm
from if_jax.serving.requests import DrawRequest, Limits, Refused, decode_picture

STRONGER = {"I": {"guidance_scale": 2.5}}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return open_cascade(tmp_path_factory.mktemp("release") / "cascade")


@pytest.fixture
def engine(cascade: Cascade) -> Iterator[Engine]:
    with running(cascade) as made:
        yield made


def mixed(count: int) -> list[DrawRequest]:
    """Requests of all modes, some of which can share programs."""
    drawn: list[dict[str, Any]] = [
        {"prompt": "a red cube"},
        {"prompt": "two blue spheres", "negative_prompt": "dull", "pictures": 2},
        {"prompt": "a sign", "settings": STRONGER},
        {"prompt": "a cone", "stages": 1, "pictures": 3},
        {"prompt": "a wall", "aspect_ratio": "3:2"},
        {"mode": "style_transfer", "prompt": "a toy", "image": encoded(picture())},
        {"mode": "inpainting", "prompt": "a hat", "image": encoded(picture()), "mask": encoded(mask())},
        {"mode": "super_resolution", "image": encoded(picture(8, 8))},
        {"prompt": "a tree", "style_prompt": "in oil"},
    ]
    return [DrawRequest(**drawn[k % len(drawn)], seed=k // 2) for k in range(count)]


def alone(cascade: Cascade, request: DrawRequest) -> dict[str, list]:
    """What a call of the cascade draws for a request."""
    words: dict[str, Any] = {"seed": request.seed, "batch_size": BATCH, "stages": request.stages}
    words |= {f"if_{stage}_kwargs": kwargs for stage, kwargs in request.settings.items()}
    for word in ("negative_prompt", "style_prompt"):
        words |= {word: getattr(request, word)} if getattr(request, word) else {}
    for word, name in (("image", "image"), ("mask", "mask_image")):
        if text := getattr(request, word):
            import base64

            words[name] = decode_picture(word, base64.b64decode(text), Limits())
    if request.mode == "dream":
        words["aspect_ratio"] = request.aspect_ratio
    return getattr(cascade, request.mode)(prompt=[request.prompt] * request.pictures, **words)


def check(cascade: Cascade, engine: Engine, requests: list[DrawRequest], clients: int) -> list[Job]:
    """Sends all at a time from so many clients; each picture is held against the same request drawn alone."""
    jobs: dict[int, Job] = {}

    def send(first: int) -> None:
        for k in range(first, len(requests), clients):
            jobs[k] = engine.submit(requests[k], f"client {first}")
            jobs[k].done.result()

    threads = [threading.Thread(target=send, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known: dict[str, dict[str, list]] = {}
    for k, request in enumerate(requests):
        assert jobs[k].state == "done", jobs[k].error
        name = request.model_dump_json()
        known[name] = known.get(name) or alone(cascade, request)
        for number, stages in enumerate(jobs[k].pictures):
            assert list(stages) == list(known[name])
            for stage, drawn in stages.items():
                np.testing.assert_array_equal(np.asarray(drawn), np.asarray(known[name][stage][number]))
    assert len({id(job) for job in jobs.values()}) == len(requests)
    return list(jobs.values())


def test_a_picture_is_what_it_would_be_alone(cascade: Cascade, engine: Engine) -> None:
    check(cascade, engine, mixed(4) * 4, clients=8)
    text = engine.meters.text(0).decode()
    assert 'if_jax_batch_pictures_bucket{le="1.0"}' in text
    batches = float(next(line for line in text.splitlines() if "batch_pictures_count" in line).split()[-1])
    pictures = float(next(line for line in text.splitlines() if "batch_pictures_sum" in line).split()[-1])
    assert pictures == 28 and batches < 20  # they did share programs


@pytest.mark.slow  # programs of nine kinds of request
def test_sixty_four_clients_get_what_each_would_alone(cascade: Cascade) -> None:
    with running(cascade, limits=Limits(queue=1000)) as engine:
        check(cascade, engine, mixed(200), clients=64)


def test_a_new_shape_is_compiled_beside_the_others(engine: Engine) -> None:
    warm(engine, ["1:1"])
    other = engine.submit(DrawRequest(prompt="a", aspect_ratio="2:1", seed=1), "a")
    usual = [engine.submit(DrawRequest(prompt="a", seed=k), "b") for k in range(3)]
    for job in usual:
        job.done.result()
    assert not other.ended  # it compiles, for seconds, while these are drawn
    assert other.done.result().state == "done"


def test_other_shapes_are_refused_where_they_are_listed(cascade: Cascade) -> None:
    with running(cascade, listed=["1:1", "3:2"]) as engine:
        with pytest.raises(Refused, match="aspect_ratio is '2:1': this server draws 1:1, 3:2"):
            engine.submit(DrawRequest(prompt="a", aspect_ratio="2:1"), "a")
        over = DrawRequest(mode="style_transfer", prompt="a", image=encoded(picture(20, 10)), stages=1)
        assert engine.submit(over, "a").done.result().state == "done"


def test_what_is_cancelled_is_not_drawn(engine: Engine) -> None:
    many = [engine.submit(DrawRequest(prompt="a", seed=k, pictures=8), "a") for k in range(4)]
    for job in many:
        engine.cancel(job)
        assert job.done.result(10).state == "cancelled"
    assert engine.waiting() == 0
    assert engine.submit(DrawRequest(prompt="a", seed=1), "a").done.result().state == "done"
    assert sum(len(stages) for job in many[1:] for stages in job.pictures) == 0
    engine.cancel(many[0])  # again: nothing
    assert many[0].state == "cancelled"


def test_clients_take_turns(engine: Engine) -> None:
    warm(engine, ["1:1"])
    order: list[str] = []
    greedy = engine.submit(DrawRequest(prompt="a", pictures=8, seed=0), "greedy")
    more = [
        engine.submit(DrawRequest(prompt="a", pictures=8, seed=k, settings=STRONGER), "greedy") for k in range(1, 4)
    ]
    late = engine.submit(DrawRequest(prompt="b", seed=9, negative_prompt="c"), "late")
    for job, name in [(greedy, "greedy"), *((job, "more") for job in more), (late, "late")]:
        job.done.add_done_callback(lambda _, name=name: order.append(name))
    for job in (greedy, *more, late):
        job.done.result()
    assert order.index("late") < 2, order


def test_a_stage_that_does_not_fit_fails_alone(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(cascade) as engine:
        for error, status in ((MemoryError("out of memory in stage II"), 507), (RuntimeError("secret"), 500)):
            with monkeypatch.context() as patch:

                def fails(*_: Any, error: Exception = error, **__: Any) -> None:
                    raise error

                patch.setattr(Cascade, "dream", fails)
                job = engine.submit(DrawRequest(prompt="a", seed=1, pictures=6), "a").done.result()
            assert (job.state, job.status) == ("failed", status) and "secret" not in job.error
        assert engine.submit(DrawRequest(prompt="a", seed=1), "a").done.result().state == "done"


def test_a_guard_sees_every_picture_before_it_is_shown(cascade: Cascade) -> None:
    class Hides(SafetyGuard):
        def hide(self, pictures: np.ndarray) -> tuple[np.ndarray, list[GuardScores]]:
            return np.zeros_like(pictures), [GuardScores(1.0, 0.0)] * len(pictures)

    with running(cascade, guard=Hides("nowhere")) as engine:
        job = engine.submit(DrawRequest(prompt="a", seed=1, pictures=2), "a")
        ended = False
        while not ended:
            ended = job.ended
            shown = [picture for drawn in job.pictures for picture in drawn.copy().values()]
            assert not job.previews and all(np.unique(np.asarray(picture)).tolist() == [128] for picture in shown)
        assert [list(drawn) for drawn in job.pictures] == [["I", "II"]] * 2


def test_a_full_queue_says_when_to_come_again(cascade: Cascade) -> None:
    with running(cascade, limits=Limits(queue=12, queue_of_client=8)) as engine:
        engine.submit(DrawRequest(prompt="a", pictures=8, seed=0), "a")
        for client in ("a", "b", "c"):
            with pytest.raises(Refused, match=r"try again in \d+ s") as refused:
                for k in range(6):
                    engine.submit(DrawRequest(prompt="a", pictures=4, seed=k), client)
            assert refused.value.status == 429 and refused.value.retry_after > 0
        engine.stop()
        with pytest.raises(Refused, match="stopping"):
            engine.submit(DrawRequest(prompt="a"), "d")


def test_finished_pictures_are_forgotten_by_size_and_age(cascade: Cascade) -> None:
    one = 3 * (8 * 8 + 16 * 16)
    with running(cascade, limits=Limits(kept_bytes=2 * one)) as engine:
        jobs = [engine.submit(DrawRequest(prompt="a", seed=k), "a") for k in range(4)]
        for job in jobs:
            job.done.result()
        with pytest.raises(Refused, match="no longer kept"):
            engine.job(jobs[0].id)
        assert engine.job(jobs[-1].id) is jobs[-1]
        with pytest.raises(Refused, match="no job"):
            engine.job(jobs[-1].id, "somebody else")
