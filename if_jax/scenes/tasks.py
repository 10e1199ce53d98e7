"""Scenes by task: what text-to-image benchmarks ask for, one skill per picture, with a held-out split.

Each scene is one of seven tasks (an object, two objects, counting to six, colour, position, attributes bound to their
objects, a word on a sign). Nothing in it is hidden: of four ways to place the objects the first is taken in which each
shows at least `MIN_VISIBLE` of itself and the sign all but a little, so a caption never names what cannot be seen.

The training split never shows a held-out combination (a kind such as "cyan sphere", a count of a shape, a word);
every scene of the held-out split shows one. The endless source "scenes" knows no such split.

Beside them `pairs`: two groups that differ in shape and colour, one to three objects each, all named in full. Nothing
but the pairing of words then tells which blob is which, in every picture and in each of its objects: a net that only
knows which words occur learns from these which belong together.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.scenes import grammar, sampling
from if_jax.scenes.scene import COLOURS, MAX_LETTERS, MAX_OBJECTS, SHAPES, WORD_LETTERS, WORDS, Scene
from if_jax.scenes.visibility import visible_shares

TASKS = ("single", "two", "counting", "colour", "position", "binding", "text")
HELD_OUT = "held_out"
HELD_OUT_KINDS = (("cyan", "sphere"), ("orange", "cube"), ("purple", "cylinder"))
HELD_OUT_COUNTS = ((4, "cube"), (5, "sphere"), (6, "cylinder"))
HELD_OUT_WORDS = ("moon", "exit", "key", "happy")
MIN_VISIBLE = 0.6  # of an object's pixels
_MIN_SIGN = 0.97  # of the board's
_WAYS = 4  # placements tried
_LOOK = 48  # px at which visibility is judged
_TRIES = 40

_NOVEL_KIND = np.zeros(len(SHAPES) * len(COLOURS), bool)
for _colour, _shape in HELD_OUT_KINDS:
    _NOVEL_KIND[COLOURS.index(_colour) * len(SHAPES) + SHAPES.index(_shape)] = True
_NOVEL_COUNT = np.zeros((MAX_OBJECTS + 1, len(SHAPES)), bool)
for _count, _shape in HELD_OUT_COUNTS:
    _NOVEL_COUNT[_count, SHAPES.index(_shape)] = True
_NOVEL_WORD = np.asarray([word in HELD_OUT_WORDS for word in WORDS])


@jax.jit
def sample_tasks(indices: jax.Array, seed: int, held_out: bool | jax.Array = False) -> tuple[Scene, jax.Array]:
    """Sample scenes of a split.

    Args:
      indices: numbers (B,) of the scenes.
      seed: another seed has other scenes.
      held_out: the held-out split rather than that of training.

    Returns:
      The scenes, every field with a leading B, and their tasks (B,) int32 into `TASKS`.
    """
    base = jax.random.fold_in(jax.random.key(seed), 7 + held_out)  # other scenes than those of "scenes"
    sample = lambda index: sample_task(jax.random.fold_in(base, index), held_out)  # noqa: E731
    return jax.vmap(sample)(jnp.asarray(indices, jnp.uint32))


def sample_task(key: jax.Array, held_out: bool | jax.Array = False) -> tuple[Scene, jax.Array]:
    """Sample one scene and its task, () int32 into `TASKS`."""
    content_key, place_key = jax.random.split(key)
    u = jax.random.uniform(content_key, (64,))
    task = (u[0] * len(TASKS)).astype(jnp.int32)
    is_text = task == TASKS.index("text")
    kinds = _draw_kinds(u[1 : 1 + _NOVEL_KIND.size], u[30], held_out, task)  # (2,)
    counts = _draw_counts(u[31:35], task, kinds % len(SHAPES), held_out)  # (2,)
    word = _draw_word(u[35], held_out)
    letters = jnp.where(is_text, jnp.asarray(WORD_LETTERS)[word], -1)
    return _compose(place_key, u[36:48], kinds, counts, letters, is_text), task


@jax.jit
def sample_pairs(indices: jax.Array, seed: int) -> Scene:
    """Sample pairs number `indices` (B,) of a seed, every field with a leading B; no held-out combination."""
    base = jax.random.fold_in(jax.random.key(seed), 9)  # other scenes than those of the tasks
    return jax.vmap(lambda index: _pair(jax.random.fold_in(base, index)))(jnp.asarray(indices, jnp.uint32))


def _pair(key: jax.Array) -> Scene:
    content_key, place_key = jax.random.split(key)
    u = jax.random.uniform(content_key, (44,))
    kinds = _draw_kinds(u[: _NOVEL_KIND.size], jnp.zeros(()), False, TASKS.index("two"))
    counts = 1 + (u[30:32] * 3).astype(jnp.int32)
    return _compose(place_key, u[32:44], kinds, counts, jnp.full((MAX_LETTERS,), -1), False)


@jax.jit
def sample_alone(indices: jax.Array, seed: int) -> Scene:
    """Sample scenes of one solid, number `indices` (B,) of a seed, with a leading B; no held-out combination."""
    base = jax.random.fold_in(jax.random.key(seed), 10)  # other scenes than those of the tasks and the pairs
    return jax.vmap(lambda index: _alone(jax.random.fold_in(base, index)))(jnp.asarray(indices, jnp.uint32))


def _alone(key: jax.Array) -> Scene:
    content_key, place_key = jax.random.split(key)
    u = jax.random.uniform(content_key, (42,))
    kinds = _draw_kinds(u[: _NOVEL_KIND.size], jnp.zeros(()), False, TASKS.index("single"))
    return _compose(place_key, u[30:42], kinds, jnp.asarray([1, 0]), jnp.full((MAX_LETTERS,), -1), False)


def novelties(scene: Scene) -> list[str]:
    """The held-out combinations a scene on the host shows; empty for every scene of the training split."""
    present = grammar.groups(scene)
    kinds = [f"{g.colour} {g.shape}" for g in present if (g.colour, g.shape) in HELD_OUT_KINDS]
    counts = [f"{len(g.slots)} {g.shape}s" for g in present if (len(g.slots), g.shape) in HELD_OUT_COUNTS]
    return kinds + counts + [word for word in [grammar.word(scene)] if word in HELD_OUT_WORDS]


def labels(scene: Scene, task: int) -> dict[str, Any]:
    """`grammar.labels` with `task`, `visible` (the share of each object that is seen) and `held_out` (`novelties`)."""
    shares, _ = _shares(scene)
    seen = [round(float(share), 3) for share, there in zip(np.asarray(shares), scene.valid, strict=True) if there]
    return grammar.labels(scene) | {"task": TASKS[task], "visible": seen, "held_out": novelties(scene)}


def caption(scene: Scene, task: int, rng: np.random.Generator) -> str:
    """Describe a scene in the words its task asks for: exact counts always, attributes where they are the task.

    Args:
      scene: one scene on the host.
      task: its number in `TASKS`.
      rng: picks the wording.

    Returns:
      At most `grammar.MAX_BYTES` of lower-case ASCII.
    """
    present, name = grammar.groups(scene), TASKS[task]
    rng.shuffle(present)
    coloured = name in ("colour", "binding", "text") or (name in ("counting", "position") and rng.random() < 0.5)
    coloured |= len({group.shape for group in present}) < len(present)  # two groups of a shape differ in colour
    coloured |= any((g.colour, g.shape) in HELD_OUT_KINDS for g in present)  # what is unseen is asked for by name
    fields = {"colour"} if coloured else set()
    if name == "binding":
        fields.add(("size", "material")[int(rng.integers(2))])
    parts = [grammar.phrase(group, fields) for group in present]
    related = grammar.relation(*present) if name == "position" and len(present) == 2 else None
    body = f" {related} ".join(parts) if related else " and ".join(parts)
    if word := grammar.word(scene):
        sign = f"a sign that says {word}"
        body = f"{sign} and {body}" if body else sign
    start = ("a photo of ", "a picture of ")[int(rng.integers(2))] if rng.random() < 0.25 else ""
    return start + body if len(start + body) <= grammar.MAX_BYTES else body


def pair_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Both groups by number, colour and shape; one in four by size or material too, one in three by relation."""
    present = grammar.groups(scene)
    rng.shuffle(present)
    fields = {"colour"} | ({("size", "material")[int(rng.integers(2))]} if rng.random() < 0.25 else set())
    related = grammar.relation(*present) if len(present) == 2 and rng.random() < 1 / 3 else None
    return f" {related or 'and'} ".join(grammar.phrase(group, fields) for group in present)


def _draw_kinds(u: jax.Array, pick: jax.Array, held_out: bool | jax.Array, task: int | jax.Array) -> jax.Array:
    """Two different kinds (colour * 3 + shape); where one is named without its colour the shapes differ too."""
    novel = jnp.asarray(_NOVEL_KIND)
    allowed = jnp.where(novel, -1.0, u)
    first = jnp.argmax(jnp.where(novel == held_out, u, -1.0))
    all_kinds = jnp.arange(novel.size)
    other_shape = all_kinds % len(SHAPES) != first % len(SHAPES)
    other_colour = all_kinds // len(SHAPES) != first // len(SHAPES)
    apart = other_shape & other_colour
    fits = jnp.where((pick < 0.8) | (task == TASKS.index("two")), apart, other_colour)
    return jnp.stack([first, jnp.argmax(jnp.where(fits, allowed, -2.0))])


def _draw_counts(u: jax.Array, task: jax.Array, shapes: jax.Array, held_out: bool | jax.Array) -> jax.Array:
    """Objects of the two groups."""
    many = 1 + (u[0] * 6).astype(jnp.int32)  # 1 … 6
    split = jnp.stack([1 + (u[1] * 3).astype(jnp.int32), 1 + (u[2] * 3).astype(jnp.int32)])  # 1 … 3 each
    counting = jnp.where(u[3] < 0.7, jnp.stack([many, 0 * many]), split)
    pair, alone = jnp.asarray([1, 1]), jnp.asarray([1, 0])
    with_sign = jnp.where(u[0] < 0.5, 0 * alone, alone)
    of_task = jnp.stack([alone, pair, counting, alone, pair, pair, with_sign])  # (tasks, 2)
    counts = of_task[task]
    return counts - (jnp.asarray(_NOVEL_COUNT)[counts, shapes] & jnp.logical_not(held_out)).astype(jnp.int32)


def _draw_word(u: jax.Array, held_out: bool | jax.Array) -> jax.Array:
    """A word's number. Where objects may be missing it is the word that is held out."""
    novel, known = (jnp.asarray(np.flatnonzero(which)) for which in (_NOVEL_WORD, ~_NOVEL_WORD))
    return jnp.where(held_out, *(words[(u * len(words)).astype(jnp.int32)] for words in (novel, known)))


def _compose(
    key: jax.Array, u: jax.Array, kinds: jax.Array, counts: jax.Array, letters: jax.Array, has_sign: bool | jax.Array
) -> Scene:
    """A scene of two groups (the second may be empty): the rest of their looks from 12 chances, and places in sight."""
    total = counts.sum()
    slots = jnp.arange(MAX_OBJECTS)
    group = jnp.minimum((slots >= counts[0]).astype(jnp.int32), 1)
    size = (u[:2] < jnp.where(total <= 2, 0.5, jnp.where(total == 3, 0.35, 0.0))).astype(jnp.int32)[group]
    scene = Scene(
        valid=slots < total,
        group=group,
        shape=(kinds % len(SHAPES))[group],
        colour=(kinds // len(SHAPES))[group],
        size=size,
        material=(u[2:4] < 0.5).astype(jnp.int32)[group],
        position=jnp.zeros((MAX_OBJECTS, 2)),
        yaw=(u[4 : 4 + MAX_OBJECTS] - 0.5) * (jnp.pi / 2),
        letters=letters,
        sign_x=(u[10] - 0.5) * 0.8,
        tone=0.96 + 0.08 * u[11],
    )
    return _place_in_sight(scene, key, total, has_sign)


def _place_in_sight(scene: Scene, key: jax.Array, total: jax.Array, has_sign: bool | jax.Array) -> Scene:
    """The first placement in which everything finds room and is seen; else the first object alone, which always is."""
    chances = jax.random.uniform(key, (_WAYS, MAX_OBJECTS * _TRIES * 2))

    def attempt(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        position, valid = sampling.place_objects(u, scene.valid, scene.shape, scene.size, total, has_sign)
        shares, sign = visible_shares(scene._replace(position=position, valid=valid), _LOOK)
        seen = jnp.where(scene.valid, valid & (shares >= MIN_VISIBLE), True).all() & (sign >= _MIN_SIGN)
        return position, seen

    positions, good = jax.vmap(attempt)(chances)
    first = jnp.argmax(good)
    only = jnp.arange(MAX_OBJECTS) == 0
    alone = scene.valid & only & jnp.logical_not(has_sign)  # beside a sign nothing stays: it might hide the word
    valid = jnp.where(good.any(), scene.valid, alone)
    position = jnp.where(good.any(), positions[first], 0.0)
    return scene._replace(valid=valid, position=jnp.where(valid[:, None], position, 0.0))


_shares = jax.jit(visible_shares, static_argnames="size")
