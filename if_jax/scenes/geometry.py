"""Where things are: solids on a floor and a sign behind them, as rays from a fixed camera meet them.

Per object only the rays' intersection with its own kind of solid is computed (`lax.switch`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from if_jax.scenes import glyphs
from if_jax.scenes.scene import Scene

# Sizes of the solids relative to the object's radius (the sphere's), so that all of them look about equally big.
CUBE_HALF = 0.80
CYLINDER_RADIUS = 0.84
CYLINDER_HEIGHT = 1.75
GROUND_SCALE = (1.0, CUBE_HALF * math.sqrt(2), CYLINDER_RADIUS)  # radius of the circle each shape needs on the floor
RADII = (0.50, 0.82)  # of a small and a large sphere, floor units

_PITCH = math.radians(33.0)
_SIN, _COS = math.sin(_PITCH), math.cos(_PITCH)
_DISTANCE = 9.0
_TARGET = (0.0, 0.10, 0.42)
EYE = (0.0, _TARGET[1] - _DISTANCE * _COS, _TARGET[2] + _DISTANCE * _SIN)
AXIS, UP = (0.0, _COS, -_SIN), (0.0, _SIN, _COS)  # of the camera, whose right is +x
HALF_VIEW = 2.4 / _DISTANCE
_FAR = 1e9

# The sign stands behind the objects and leans back to face the camera, so its letters stay upright and undistorted;
# its edges and its letters' height are whole pixels of a 64 px picture, where legibility is scarcest.
SIGN_DEPTH = 10.9  # along the view axis
SIGN_PIXEL = 2 * HALF_VIEW * SIGN_DEPTH / 64
SIGN_MIDDLE = 22.5 * SIGN_PIXEL  # above the view axis
BOARD_HALF = 7.5 * SIGN_PIXEL
LETTER_HEIGHT = 9 * SIGN_PIXEL

Ray = tuple[jax.Array, jax.Array, jax.Array]  # direction: (1, columns), (rows, 1), (rows, 1)
Number = TypeVar("Number", float, jax.Array)


class Hit(NamedTuple):
    """Nearest surface along each ray so far; all (rows, columns)."""

    t: jax.Array
    slot: jax.Array  # int32; -1 floor
    nx: jax.Array
    ny: jax.Array
    nz: jax.Array


class Solid(NamedTuple):
    """One object as scalars."""

    x: jax.Array
    y: jax.Array
    r: jax.Array
    cos: jax.Array
    sin: jax.Array


class Board(NamedTuple):
    """The sign, in floor units, and where rays meet its plane."""

    x: jax.Array  # (1, columns) from its middle to the right
    up: jax.Array  # (rows, 1) from its middle
    half: jax.Array  # () half its width
    ends: jax.Array  # (5,) where each letter ends, from the word's left edge
    met: jax.Array  # (rows, columns) bool: the ray goes through the board, nothing standing before it


def middle_height(size: int) -> float:
    """How high above the floor the middle of an object of size index `size` is, in floor units."""
    return 0.87 * RADII[size]


def middle_heights(size: jax.Array) -> jax.Array:
    """`middle_height` of every size index of an array, in float32."""
    return 0.87 * jnp.asarray(RADII)[size]


def project(x: Number, y: Number, z: Number) -> tuple[Number, Number]:
    """Where points of the scene appear.

    Args:
      x: to the right, floor units.
      y: away from the camera.
      z: above the floor.

    Returns:
      How far to the right and up of the picture's middle, in floor units there.
    """
    dx, dy, dz = x - EYE[0], y - EYE[1], z - EYE[2]
    zoom = _DISTANCE / (_COS * dy - _SIN * dz)
    return dx * zoom, (_SIN * dy + _COS * dz) * zoom


def to_pixels(point: tuple[Number, Number], size: int) -> tuple[Number, Number]:
    """`project`'s coordinates as (column, row) in a picture of `size` px."""
    scale = size / (2 * HALF_VIEW * _DISTANCE)
    return size / 2 + point[0] * scale, size / 2 - point[1] * scale


def unproject(at: tuple[float, float], size: int) -> tuple[float, float]:
    """Where an object stands whose middle is seen in a picture.

    Args:
      at: column and row of its middle, as shares of the picture.
      size: its size index.

    Returns:
      How far to the right it is seen and its distance along the floor, as `grammar.Group` has them.
    """
    right, up = ((at[0] - 0.5) * 2 * HALF_VIEW * _DISTANCE, (0.5 - at[1]) * 2 * HALF_VIEW * _DISTANCE)
    dz = middle_height(size) - EYE[2]
    return right, EYE[1] + dz * (_DISTANCE * _COS + up * _SIN) / (up * _COS - _DISTANCE * _SIN)


def rays(n: int) -> Ray:
    """The rays through the middles of n x n pixels, EYE + t (dx, dy, dz), each of length 1 along the camera's axis."""
    centres = (jnp.arange(n, dtype=jnp.float32) + 0.5) * (2.0 / n) - 1.0
    u, v = centres[None, :] * HALF_VIEW, -centres[:, None] * HALF_VIEW
    return u, _COS + v * _SIN, v * _COS - _SIN


def bare_floor(ray: Ray) -> Hit:
    """What the rays meet where there is no object."""
    t = -EYE[2] / ray[2] + jnp.zeros_like(ray[0])
    zero = jnp.zeros_like(t)
    return Hit(t, jnp.full(t.shape, -1, jnp.int32), zero, zero, zero + 1.0)


def place_solids(scene: Scene) -> Solid:
    """All objects of a scene; every field (6,)."""
    radius = jnp.asarray(RADII)[scene.size]
    return Solid(scene.position[:, 0], scene.position[:, 1], radius, jnp.cos(scene.yaw), jnp.sin(scene.yaw))


def nearer(scene: Scene, solids: Solid, i: jax.Array, ray: Ray, hit: Hit) -> Hit:
    """Let an object take the rays it meets first.

    Args:
      scene: one scene.
      solids: its objects, of `place_solids`.
      i: () int32, which object.
      ray: the rays.
      hit: what they met so far.

    Returns:
      What they meet first now.
    """
    o = Solid(*(field[i] for field in solids))
    branches = [lambda o, f=f: f(o, *ray) for f in (_meet_sphere, _meet_cube, _meet_cylinder)]
    t, nx, ny, nz = jax.lax.switch(scene.shape[i], branches, o)
    taken = (t < hit.t) & scene.valid[i]
    new = (t, jnp.full_like(hit.slot, i), nx, ny, nz)
    return Hit(*(jnp.where(taken, a, b) for a, b in zip(new, hit, strict=True)))


def find_board(scene: Scene, ray: Ray) -> Board:
    """Where the rays meet the plane of the sign, and whether on its board."""
    used = scene.letters >= 0
    advance = jnp.asarray(glyphs.atlas(1)[1])  # the same at every resolution
    ends = jnp.cumsum(jnp.where(used, advance[jnp.maximum(scene.letters, 0)], 0.0)) * LETTER_HEIGHT  # (5,)
    # The sign stands upright to the camera's axis: its plane is simply t = depth.
    x = SIGN_DEPTH * ray[0] - board_middle(scene)
    up = SIGN_DEPTH * (_SIN * ray[1] + _COS * ray[2]) - SIGN_MIDDLE
    half = SIGN_PIXEL * jnp.round(0.5 * ends[-1] / SIGN_PIXEL + 2.0)
    return Board(x, up, half, ends, (jnp.abs(x) < half) & (jnp.abs(up) < BOARD_HALF) & used[0])


def board_middle(scene: Scene) -> jax.Array:
    """How far to the right of the view axis the middle of the sign is."""
    return SIGN_PIXEL * jnp.round(scene.sign_x / SIGN_PIXEL)


def post_middle(half: jax.Array) -> jax.Array:
    """How far from the middle of a board, half so wide, its two posts stand; they are one `SIGN_PIXEL` thick."""
    return SIGN_PIXEL * (jnp.round(0.6 * half / SIGN_PIXEL) + 0.5)


def _meet_sphere(o: Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    ex, ey, ez = EYE[0] - o.x, EYE[1] - o.y, EYE[2] - o.r
    a = dx * dx + dy * dy + dz * dz
    b = dx * ex + dy * ey + dz * ez
    disc = b * b - a * (ex * ex + ey * ey + ez * ez - o.r * o.r)
    t = jnp.where(disc > 0, (-b - jnp.sqrt(jnp.maximum(disc, 0.0))) / a, _FAR)
    return t, (ex + t * dx) / o.r, (ey + t * dy) / o.r, (ez + t * dz) / o.r


def _meet_cube(o: Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    half = CUBE_HALF * o.r
    ex, ey = EYE[0] - o.x, EYE[1] - o.y
    ex, ey, ez = o.cos * ex + o.sin * ey, o.cos * ey - o.sin * ex, EYE[2] - half
    rx, ry = o.cos * dx + o.sin * dy, o.cos * dy - o.sin * dx
    ix, iy, iz = 1.0 / not_zero(rx), 1.0 / not_zero(ry), 1.0 / dz
    near = [-e * i - half * jnp.abs(i) for e, i in ((ex, ix), (ey, iy), (ez, iz))]
    far = [-e * i + half * jnp.abs(i) for e, i in ((ex, ix), (ey, iy), (ez, iz))]
    t = jnp.maximum(jnp.maximum(near[0], near[1]), near[2])
    met = t < jnp.minimum(jnp.minimum(far[0], far[1]), far[2])
    top = near[2] >= t
    side_x = (near[0] >= t) & ~top
    mx = jnp.where(side_x, -jnp.sign(rx), 0.0)
    my = jnp.where(side_x | top, 0.0, -jnp.sign(ry))
    normal = (o.cos * mx - o.sin * my, o.sin * mx + o.cos * my, jnp.where(top, 1.0, 0.0))
    return jnp.where(met, t, _FAR), *normal


def _meet_cylinder(o: Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    radius, height = CYLINDER_RADIUS * o.r, CYLINDER_HEIGHT * o.r
    ex, ey = EYE[0] - o.x, EYE[1] - o.y
    a = dx * dx + dy * dy
    b = dx * ex + dy * ey
    disc = b * b - a * (ex * ex + ey * ey - radius * radius)
    root = jnp.sqrt(jnp.maximum(disc, 0.0))
    enter, leave = (-b - root) / a, (-b + root) / a
    lid, ground = (height - EYE[2]) / dz, -EYE[2] / dz  # the camera looks down: the lid comes first
    t = jnp.maximum(enter, lid)
    met = (disc > 0) & (t < jnp.minimum(leave, ground))
    top = lid > enter
    nx = jnp.where(top, 0.0, (ex + t * dx) / radius)
    ny = jnp.where(top, 0.0, (ey + t * dy) / radius)
    return jnp.where(met, t, _FAR), nx, ny, jnp.where(top, 1.0, 0.0) + jnp.zeros_like(t)


def not_zero(x: jax.Array) -> jax.Array:
    """x, or a small number in its place, to divide by."""
    return jnp.where(jnp.abs(x) < 1e-5, 1e-5, x)
