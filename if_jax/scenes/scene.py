"""A scene: a few solids on a floor, sometimes a sign with a word, as one small record of arrays, and its vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

SHAPES = ("sphere", "cube", "cylinder")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
WORDS = (
    *("cat", "dog", "sun", "sky", "sea", "map", "box", "cup", "hat", "key", "bus", "car", "jax", "art"),
    *("go", "hi", "ok", "no", "yes", "stop", "open", "exit", "love", "moon", "star", "tree", "fish", "bird"),
    *("hello", "happy", "world", "magic"),
)
RELATIONS = ("left of", "right of", "in front of", "behind")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_OBJECTS = 6
MAX_LETTERS = 5


class Scene(NamedTuple):
    """One scene; every field may carry leading batch dimensions. Objects of one kind stand in neighbouring slots."""

    valid: jax.Array  # (6,) bool: the slot holds an object
    group: jax.Array  # (6,) int32: objects of one group share shape, colour, size and material
    shape: jax.Array  # (6,) int32 into SHAPES
    colour: jax.Array  # (6,) int32 into COLOURS
    size: jax.Array  # (6,) int32 into SIZES
    material: jax.Array  # (6,) int32 into MATERIALS
    position: jax.Array  # (6, 2) float32 floor coordinates: x to the right, y away from the camera
    yaw: jax.Array  # (6,) float32 radians, turns cubes
    letters: jax.Array  # (5,) int32 into glyphs.ALPHABET, -1 where there is none; all -1: no sign
    sign_x: jax.Array  # () float32 centre of the sign
    tone: jax.Array  # () float32 brightness of the floor, about 1


def as_numpy(scenes: Scene) -> list[Scene]:
    """A batch of scenes as a list of single scenes in host memory, for captions and labels."""
    host = jax.tree.map(np.asarray, scenes)
    return [Scene(*(field[i] for field in host)) for i in range(len(host.valid))]


def _spell(word: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in word] + [-1] * (MAX_LETTERS - len(word))


WORD_LETTERS = np.asarray([_spell(word) for word in WORDS], np.int32)
