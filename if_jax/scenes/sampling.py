"""Scene number i of a seed: the same on every machine and in every batch, so pictures are unlimited and not stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.scenes.geometry import GROUND_SCALE, RADII, middle_heights, project
from if_jax.scenes.scene import COLOURS, MAX_OBJECTS, SHAPES, WORD_LETTERS, WORDS, Scene

_TRIES = 40  # random places an object may choose from
_LARGE_SHARE = (0.65, 0.65, 0.5, 0.35, 0.0, 0.0, 0.0)  # of large groups, by the number of objects in the scene


def sample_scene(key: jax.Array) -> Scene:
    """Sample one scene: 1-3 groups of like objects, none touching another, and in one of six scenes a sign."""
    u = _chances(key)
    has_sign = u["sign"][0] < 1 / 6
    slots = jnp.arange(MAX_OBJECTS)
    counts = _group_counts(u["counts"], has_sign)  # (3,)
    total = jnp.minimum(counts.sum(), MAX_OBJECTS)
    group = jnp.minimum((slots[:, None] >= jnp.cumsum(counts)[None]).sum(1), 2)  # (6,)

    # Three different (shape, colour) pairs, so that a caption can tell the groups apart without size or material.
    kinds = jax.lax.top_k(u["kinds"], 3)[1]
    large = u["large"] < jnp.asarray(_LARGE_SHARE)[total]  # (3,)
    metal = u["metal"] < 0.5  # (3,)
    shape, size = (kinds % len(SHAPES))[group], large[group].astype(jnp.int32)

    position, valid = place_objects(u["place"], slots < total, shape, size, total, has_sign)
    word = (u["word"][0] * len(WORDS)).astype(jnp.int32)
    return Scene(
        valid=valid,
        group=group,
        shape=shape,
        colour=(kinds // len(SHAPES))[group],
        size=size,
        material=metal[group].astype(jnp.int32),
        position=position,
        yaw=(u["yaw"] - 0.5) * (jnp.pi / 2),
        letters=jnp.where(has_sign, jnp.asarray(WORD_LETTERS)[word], -1),
        sign_x=(u["sign_x"][0] - 0.5) * 0.8,
        tone=0.96 + 0.08 * u["tone"][0],
    )


@jax.jit
def sample_scenes(indices: jax.Array, seed: int) -> Scene:
    """Sample scenes number `indices` (B,) of `seed`, every field with a leading B."""
    base = jax.random.key(seed)
    return jax.vmap(lambda index: sample_scene(jax.random.fold_in(base, index)))(jnp.asarray(indices, jnp.uint32))


def _chances(key: jax.Array) -> dict[str, jax.Array]:
    """All of a scene's random numbers in [0, 1), by use; one draw, since each costs a second of compiling."""
    shapes = {
        **{"sign": 1, "counts": 6, "kinds": len(SHAPES) * len(COLOURS), "large": 3, "metal": 3},
        **{"yaw": MAX_OBJECTS, "word": 1, "sign_x": 1, "tone": 1, "place": MAX_OBJECTS * _TRIES * 2},
    }
    ends = np.cumsum(list(shapes.values()))
    parts = jnp.split(jax.random.uniform(key, (int(ends[-1]),)), ends[:-1])
    return dict(zip(shapes, parts, strict=True))


def _pick(u: jax.Array, shares: tuple[float, ...]) -> jax.Array:
    """Turn chances in [0, 1) into indices that occur with the given shares."""
    bounds = jnp.asarray(np.cumsum(shares)[:-1], jnp.float32)
    return (u[..., None] >= bounds).sum(-1)


def _group_counts(u: jax.Array, has_sign: jax.Array) -> jax.Array:
    """How many objects each of three groups holds, (3,) int32, from six chances; empty groups come last."""
    groups = 1 + _pick(u[0], (0.44, 0.42, 0.14))
    alone = 1 + _pick(u[1], (0.46, 0.24, 0.15, 0.08, 0.04, 0.03))
    shared = 1 + _pick(u[2:5], (0.62, 0.27, 0.11))
    plain = jnp.where(groups == 1, jnp.asarray([1, 0, 0]) * alone, shared * (jnp.arange(3) < groups))
    with_sign = jnp.asarray([[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [1, 1, 0], [2, 1, 0]])
    chosen = with_sign[_pick(u[5], (0.2, 0.32, 0.12, 0.06, 0.22, 0.08))]
    return jnp.where(has_sign, chosen, plain).astype(jnp.int32)


def place_objects(
    chances: jax.Array,
    wanted: jax.Array,
    shape: jax.Array,
    size: jax.Array,
    total: jax.Array,
    has_sign: bool | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Put objects on the floor one after another, clear of each other on the floor and in the picture.

    Of the random places tried an object takes the first comfortable one, else the best; where even that touches or
    hides another object, the slot stays empty.

    Args:
      chances: (6 * tries * 2,) random numbers in [0, 1).
      wanted: (6,) bool, the slots to fill.
      shape: (6,) int32 into SHAPES.
      size: (6,) int32 into SIZES.
      total: () int32, how many are wanted.
      has_sign: () bool; objects then keep to the front.

    Returns:
      Positions (6, 2) in floor units, and the slots filled (6,) bool.
    """
    radius = jnp.asarray(RADII)[size]  # (6,)
    footprint = radius * jnp.asarray(GROUND_SCALE)[shape]
    # The more objects, the wider they spread; a sign keeps them to the front, the picture's edge keeps them inside.
    reach = jnp.asarray([[0.0, 0.0], [0.9, 0.6], [1.45, 1.0], [1.65, 1.3], [1.7, 1.5], [1.8, 1.6], [1.8, 1.6]])[total]
    reach = jnp.where(has_sign, reach * jnp.asarray([1.0, 0.55]), reach)
    inside = jnp.minimum(reach[0], 1.92 - footprint)
    reach = jnp.stack([inside, jnp.full_like(inside, reach[1])], axis=-1)  # (6, 2)
    middle = jnp.where(has_sign, jnp.asarray([0.0, -0.8]), jnp.asarray([0.0, 0.0]))
    unit = 2.0 * chances.reshape(MAX_OBJECTS, _TRIES, 2) - 1.0
    places = middle + unit * reach[:, None]  # (6, TRIES, 2)
    seen = jnp.stack(project(places[..., 0], places[..., 1], middle_heights(size)[:, None]), axis=-1)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ground, picture, filled = state
        floor_gap = jnp.linalg.norm(places[i][:, None] - ground[None], axis=-1) - (footprint[i] + footprint)[None]
        view_gap = jnp.linalg.norm(seen[i][:, None] - picture[None], axis=-1) - 0.88 * (radius[i] + radius)[None]
        gap = jnp.minimum(floor_gap - 0.08, view_gap)  # (TRIES, 6)
        gap = jnp.where(filled[None], gap, jnp.inf).min(axis=1)
        best = jnp.where((gap >= 0.1).any(), jnp.argmax(gap >= 0.1), jnp.argmax(gap))
        fits = wanted[i] & (gap[best] >= 0.0)
        return ground.at[i].set(places[i, best]), picture.at[i].set(seen[i, best]), filled.at[i].set(fits)

    empty = jnp.zeros((MAX_OBJECTS, 2)), jnp.zeros((MAX_OBJECTS, 2)), jnp.zeros((MAX_OBJECTS,), bool)
    ground, _, filled = jax.lax.fori_loop(0, MAX_OBJECTS, step, empty)
    return jnp.where(filled[:, None], ground, 0.0), filled
