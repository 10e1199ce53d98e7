"""A small ray caster: analytic solids on a studio floor, soft shadows, matte or metal, and a sign.

Every pixel is the mean of four rays. All shading happens in display space, so averaging a large picture gives the
small one: one scene looks the same at 64, 256 and 1024 px. Rays start at a fixed camera; per object only the rays'
intersection with its own kind of solid is computed (`lax.switch`), for as many objects as the scene has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.data import glyphs

if TYPE_CHECKING:
    from if_jax.data.scenes import Scene

# Sizes of the solids relative to the object's radius (the sphere's), so that all of them look about equally big.
CUBE_HALF = 0.80
CYLINDER_RADIUS = 0.84
CYLINDER_HEIGHT = 1.75
GROUND_SCALE = (1.0, CUBE_HALF * math.sqrt(2), CYLINDER_RADIUS)  # radius of the circle each shape needs on the floor
RADII = (0.50, 0.82)  # of a small and a large sphere, floor units
PALETTE = np.asarray(
    [
        *([0.90, 0.10, 0.10], [1.00, 0.50, 0.05], [0.98, 0.85, 0.08], [0.10, 0.66, 0.18]),
        *([0.10, 0.80, 0.85], [0.12, 0.26, 0.92], [0.50, 0.14, 0.72], [1.00, 0.48, 0.72]),
    ],
    np.float32,
)  # red orange yellow green cyan blue purple pink

_PITCH = math.radians(33.0)
_SIN, _COS = math.sin(_PITCH), math.cos(_PITCH)
_DISTANCE = 9.0
_TARGET = (0.0, 0.10, 0.42)
_EYE = (0.0, _TARGET[1] - _DISTANCE * _COS, _TARGET[2] + _DISTANCE * _SIN)
_HALF_VIEW = 2.4 / _DISTANCE
_LIGHT = tuple(np.asarray([-0.50, -0.42, 0.90]) / np.linalg.norm([-0.50, -0.42, 0.90]))
_FAR = 1e9

# The sign stands behind the objects and leans back to face the camera, so its letters stay upright and undistorted;
# its edges and its letters' height are whole pixels of a 64 px picture, where legibility is scarcest.
_SIGN_DEPTH = 10.9  # along the view axis
_SIGN_PIXEL = 2 * _HALF_VIEW * _SIGN_DEPTH / 64
_SIGN_MIDDLE = 22.5 * _SIGN_PIXEL  # above the view axis
_BOARD_HALF = 7.5 * _SIGN_PIXEL
_LETTER_HEIGHT = 9 * _SIGN_PIXEL


class _Hit(NamedTuple):
    """Nearest surface along each ray so far; all (rows, columns)."""

    t: jax.Array
    slot: jax.Array  # int32; -1 floor
    nx: jax.Array
    ny: jax.Array
    nz: jax.Array


class _Solid(NamedTuple):
    """One object as scalars."""

    x: jax.Array
    y: jax.Array
    r: jax.Array
    cos: jax.Array
    sin: jax.Array


def middle_height(size: int | jax.Array) -> jax.Array:
    """How high above the floor the middle of an object of size index `size` is."""
    return 0.87 * (RADII[size] if isinstance(size, int) else jnp.asarray(RADII)[size])


def project(x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a point of the scene appears: to the right and up, in floor units at the picture's middle."""
    dx, dy, dz = x - _EYE[0], y - _EYE[1], z - _EYE[2]
    zoom = _DISTANCE / (_COS * dy - _SIN * dz)
    return dx * zoom, (_SIN * dy + _COS * dz) * zoom


def to_pixels(point: tuple[jax.Array, jax.Array], size: int) -> tuple[jax.Array, jax.Array]:
    """`project`'s coordinates as (column, row) in a picture of `size` px."""
    scale = size / (2 * _HALF_VIEW * _DISTANCE)
    return size / 2 + point[0] * scale, size / 2 - point[1] * scale


def render(scene: Scene, size: int) -> jax.Array:
    """Draw one scene as (size, size, 3) float32 in [-1, 1]."""
    n = 2 * size
    centres = (jnp.arange(n, dtype=jnp.float32) + 0.5) * (2.0 / n) - 1.0
    u, v = centres[None, :] * _HALF_VIEW, -centres[:, None] * _HALF_VIEW
    dx, dy, dz = u, _COS + v * _SIN, v * _COS - _SIN  # a ray is eye + t * (dx, dy, dz)
    solids = _solids(scene)
    count = jnp.where(scene.valid, jnp.arange(scene.valid.shape[-1]) + 1, 0).max()

    floor = jnp.broadcast_to(-_EYE[2] / dz, (n, n))
    zero = jnp.zeros((n, n))
    hit = _Hit(floor, jnp.full((n, n), -1, jnp.int32), zero, zero, zero + 1.0)
    hit = jax.lax.fori_loop(0, count, lambda i, h: _nearer(scene, solids, i, (dx, dy, dz), h), hit)

    p = (hit.t * dx, _EYE[1] + hit.t * dy, _EYE[2] + hit.t * dz)
    light = (zero + 1.0, zero + 1.0)
    lit, open_ = jax.lax.fori_loop(0, count, lambda i, s: _shade_by(scene, solids, i, p, hit, s), light)
    colour = _surface(scene, solids, hit, p, (dx, dy, dz), lit, open_)
    colour = jax.lax.cond(
        scene.letters[0] >= 0, lambda c: _with_sign(scene, c, hit, (dx, dy, dz), n), lambda c: c, colour
    )
    colour = [jnp.clip(c, 0.0, 1.0).reshape(size, 2, size, 2).mean((1, 3)) for c in colour]
    return jnp.stack(colour, axis=-1) * 2.0 - 1.0


def _solids(scene: Scene) -> _Solid:
    radius = jnp.asarray(RADII)[scene.size]
    return _Solid(scene.position[:, 0], scene.position[:, 1], radius, jnp.cos(scene.yaw), jnp.sin(scene.yaw))


def _nearer(scene: Scene, solids: _Solid, i: jax.Array, ray: tuple, hit: _Hit) -> _Hit:
    """Let object i take the rays it meets first."""
    o = _Solid(*(field[i] for field in solids))
    branches = [lambda o, f=f: f(o, *ray) for f in (_meet_sphere, _meet_cube, _meet_cylinder)]
    t, nx, ny, nz = jax.lax.switch(scene.shape[i], branches, o)
    nearer = (t < hit.t) & scene.valid[i]
    new = (t, jnp.full_like(hit.slot, i), nx, ny, nz)
    return _Hit(*(jnp.where(nearer, a, b) for a, b in zip(new, hit, strict=True)))


def _meet_sphere(o: _Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    ex, ey, ez = _EYE[0] - o.x, _EYE[1] - o.y, _EYE[2] - o.r
    a = dx * dx + dy * dy + dz * dz
    b = dx * ex + dy * ey + dz * ez
    disc = b * b - a * (ex * ex + ey * ey + ez * ez - o.r * o.r)
    t = jnp.where(disc > 0, (-b - jnp.sqrt(jnp.maximum(disc, 0.0))) / a, _FAR)
    return t, (ex + t * dx) / o.r, (ey + t * dy) / o.r, (ez + t * dz) / o.r


def _meet_cube(o: _Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    half = CUBE_HALF * o.r
    ex, ey = _EYE[0] - o.x, _EYE[1] - o.y
    ex, ey, ez = o.cos * ex + o.sin * ey, o.cos * ey - o.sin * ex, _EYE[2] - half
    rx, ry = o.cos * dx + o.sin * dy, o.cos * dy - o.sin * dx
    ix, iy, iz = 1.0 / _not_zero(rx), 1.0 / _not_zero(ry), 1.0 / dz
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


def _meet_cylinder(o: _Solid, dx: jax.Array, dy: jax.Array, dz: jax.Array) -> tuple[jax.Array, ...]:
    radius, height = CYLINDER_RADIUS * o.r, CYLINDER_HEIGHT * o.r
    ex, ey = _EYE[0] - o.x, _EYE[1] - o.y
    a = dx * dx + dy * dy
    b = dx * ex + dy * ey
    disc = b * b - a * (ex * ex + ey * ey - radius * radius)
    root = jnp.sqrt(jnp.maximum(disc, 0.0))
    enter, leave = (-b - root) / a, (-b + root) / a
    lid, ground = (height - _EYE[2]) / dz, -_EYE[2] / dz  # the camera looks down: the lid comes first
    t = jnp.maximum(enter, lid)
    met = (disc > 0) & (t < jnp.minimum(leave, ground))
    top = lid > enter
    nx = jnp.where(top, 0.0, (ex + t * dx) / radius)
    ny = jnp.where(top, 0.0, (ey + t * dy) / radius)
    return jnp.where(met, t, _FAR), nx, ny, jnp.where(top, 1.0, 0.0) + jnp.zeros_like(t)


def _shade_by(scene: Scene, solids: _Solid, i: jax.Array, p: tuple, hit: _Hit, light: tuple) -> tuple:
    """Take from each surface point the light that object i blocks: the lamp's (soft shadow) and the room's."""
    o = _Solid(*(field[i] for field in solids))
    other = (hit.slot != i) & scene.valid[i]
    branches = [lambda o, f=f: f(o, *p) for f in (_sphere_shadow, _cube_shadow, _cylinder_shadow)]
    shadow = jnp.where(other, jax.lax.switch(scene.shape[i], branches, o), 0.0)
    # A sphere's share of the hemisphere above a surface: (r/d)^2 times the cosine; good enough for every solid.
    wx, wy, wz = o.x - p[0], o.y - p[1], 0.85 * o.r - p[2]
    d2 = jnp.maximum(wx * wx + wy * wy + wz * wz, 0.5 * o.r * o.r)
    facing = jnp.maximum(wx * hit.nx + wy * hit.ny + wz * hit.nz, 0.0)
    blocked = jnp.where(other, jnp.minimum(facing * o.r * o.r * jax.lax.rsqrt(d2) / d2, 0.85), 0.0)
    return light[0] * (1.0 - shadow), light[1] * (1.0 - 0.9 * blocked)


def _sphere_shadow(o: _Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    wx, wy, wz = o.x - px, o.y - py, o.r - pz
    along = wx * _LIGHT[0] + wy * _LIGHT[1] + wz * _LIGHT[2]
    miss = jnp.sqrt(jnp.maximum(wx * wx + wy * wy + wz * wz - along * along, 0.0)) - o.r
    return jnp.where(along > 0, _inside(miss), 0.0)


def _cube_shadow(o: _Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    half = CUBE_HALF * o.r
    lx, ly = _LIGHT[0] / _LIGHT[2], _LIGHT[1] / _LIGHT[2]  # sideways per unit of height
    slope_x, slope_y = _not_zero(o.cos * lx + o.sin * ly), _not_zero(o.cos * ly - o.sin * lx)
    qx, qy = px - o.x, py - o.y
    qx, qy = o.cos * qx + o.sin * qy, o.cos * qy - o.sin * qx
    # Heights over which the ray to the lamp lies within the cube's two side slabs; the overlap's length is the depth.
    near_x, far_x = -qx / slope_x - half / jnp.abs(slope_x), -qx / slope_x + half / jnp.abs(slope_x)
    near_y, far_y = -qy / slope_y - half / jnp.abs(slope_y), -qy / slope_y + half / jnp.abs(slope_y)
    enter = jnp.maximum(jnp.maximum(near_x, near_y), 0.0)
    leave = jnp.minimum(jnp.minimum(far_x, far_y), 2.0 * half - pz)
    return _inside(0.6 * (enter - leave))


def _cylinder_shadow(o: _Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    lx, ly = _LIGHT[0] / _LIGHT[2], _LIGHT[1] / _LIGHT[2]
    qx, qy, above = px - o.x, py - o.y, CYLINDER_HEIGHT * o.r - pz
    rise = jnp.clip(-(qx * lx + qy * ly) / (lx * lx + ly * ly), 0.0, jnp.maximum(above, 0.0))
    ax, ay = qx + lx * rise, qy + ly * rise
    miss = jnp.sqrt(ax * ax + ay * ay) - CYLINDER_RADIUS * o.r
    return jnp.where(above > 0, _inside(miss), 0.0)


def _inside(distance: jax.Array) -> jax.Array:
    """1 well inside (negative distance), 0 outside, smooth over the half-shadow."""
    s = jnp.clip(0.5 - distance / 0.22, 0.0, 1.0)
    return s * s * (3.0 - 2.0 * s)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 1e-5, 1e-5, x)


def _surface(
    scene: Scene, solids: _Solid, hit: _Hit, p: tuple, ray: tuple, lit: jax.Array, open_: jax.Array
) -> list[jax.Array]:
    """Colour of the nearest surface: floor, rubber or metal. Three planes (rows, columns)."""
    paint = jnp.asarray(PALETTE)[scene.colour].T
    table = dict(zip(("red", "green", "blue"), paint, strict=True))
    table |= {"x": solids.x, "r": solids.r, "shape": scene.shape, "material": scene.material}
    look = {name: _look_up(values.astype(jnp.float32), hit.slot) for name, values in table.items()}

    nx, ny, nz = hit.nx, hit.ny, hit.nz
    inv = jax.lax.rsqrt(ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2])
    vx, vy, vz = ray[0] * inv, ray[1] * inv, ray[2] * inv
    twice = 2.0 * (vx * nx + vy * ny + vz * nz)
    rx, ry, rz = vx - twice * nx, vy - twice * ny, vz - twice * nz  # mirrored view
    gloss = jnp.maximum(rx * _LIGHT[0] + ry * _LIGHT[1] + rz * _LIGHT[2], 0.0)
    gloss = gloss * gloss
    g8 = (gloss * gloss) * (gloss * gloss)  # the eighth power of the cosine
    diffuse = jnp.maximum(nx * _LIGHT[0] + ny * _LIGHT[1] + nz * _LIGHT[2], 0.0) * lit

    # Floor: light grey, fading into a paler wall far behind.
    fade = jnp.clip((p[1] - 1.5) / 7.0, 0.0, 1.0)
    floor = (0.83 + 0.11 * fade) * (1.0 - (1.0 - fade) * (0.30 * (1.0 - lit) + 0.48 * (1.0 - open_))) * scene.tone

    # A paint's gain and the white on top. Rubber: matte, with a faint wide sheen.
    matte, sheen = (0.46 + 0.12 * nz) * open_ + 0.58 * diffuse, 0.16 * g8 * lit
    mirror, shine = _metal(look, p, rz, g8, diffuse, lit, open_)
    is_metal, is_floor = look["material"] > 0.5, hit.slot < 0
    gain = jnp.minimum(jnp.where(is_metal, mirror, matte), 1.15)
    white = jnp.where(is_metal, shine, sheen)
    paints = (look["red"], look["green"], look["blue"])
    return [jnp.where(is_floor, floor, gain * c + white * (1.0 - 0.25 * c)) for c in paints]


def _metal(
    look: dict, p: tuple, rz: jax.Array, g8: jax.Array, diffuse: jax.Array, lit: jax.Array, open_: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Metal mirrors a bright room above a dark horizon and the floor below it, and the lamp as a small hot spot."""
    sky = jnp.clip(0.5 + 3.0 * rz, 0.0, 1.0)
    sky = sky * sky * (3.0 - 2.0 * sky)
    room = (0.62 + 0.3 * jnp.minimum(rz, 0.0)) * (1.0 - sky) + sky * (0.34 + 0.95 * jnp.maximum(rz, 0.0))
    # A tall lamp's mirror image streaks down cubes and cylinders, whose flat faces would else look as dull as rubber.
    across = (p[0] - look["x"]) / look["r"] + 0.3 * (p[2] / look["r"] - 0.87)
    streak = jnp.where(look["shape"] > 0, jnp.clip(1.5 - 5.5 * jnp.abs(across + 0.3), 0.0, 1.0), 0.0)
    streak = streak * streak * (3.0 - 2.0 * streak)
    mirror = room * (1.0 + 0.35 * streak) * (0.45 + 0.55 * open_) + 0.26 * diffuse
    g16 = g8 * g8
    g64 = (g16 * g16) * (g16 * g16)
    return mirror, (0.25 * g16 + 0.95 * g64) * lit + 0.34 * streak * open_


def _look_up(values: jax.Array, slot: jax.Array) -> jax.Array:
    """values[slot] by selection, which vectorises where a gather would not; values[0] for the floor."""
    out = jnp.full(slot.shape, values[0])
    for i in range(1, values.shape[0]):
        out = jnp.where(slot == i, values[i], out)
    return out


def _with_sign(scene: Scene, colour: list, hit: _Hit, ray: tuple, n: int) -> list[jax.Array]:
    """Put the sign (board, posts, word) behind whatever stands in front of it."""
    coverage, advance = glyphs.atlas(_cell(n))
    cell = coverage.shape[-1]
    used = scene.letters >= 0
    letters = jnp.maximum(scene.letters, 0)
    ends = jnp.cumsum(jnp.where(used, jnp.asarray(advance)[letters], 0.0)) * _LETTER_HEIGHT  # (5,)
    width = ends[-1]

    # With the camera's axis of unit length in every ray, the sign's plane is simply t = depth.
    t = _SIGN_DEPTH
    x = t * ray[0] - _SIGN_PIXEL * jnp.round(scene.sign_x / _SIGN_PIXEL)
    up = t * (_SIN * ray[1] + _COS * ray[2]) - _SIGN_MIDDLE
    half = _SIGN_PIXEL * jnp.round(0.5 * width / _SIGN_PIXEL + 2.0)
    leg = _SIGN_PIXEL * jnp.round(0.6 * half / _SIGN_PIXEL)
    board = (jnp.abs(x) < half) & (jnp.abs(up) < _BOARD_HALF)
    rim = (jnp.abs(x) > half - _SIGN_PIXEL) | (jnp.abs(up) > _BOARD_HALF - _SIGN_PIXEL)
    post = (jnp.abs(x) > leg) & (jnp.abs(x) < leg + _SIGN_PIXEL) & (up <= -_BOARD_HALF) & (_EYE[2] + t * ray[2] > 0.0)

    along = x + 0.5 * width  # from the word's left edge
    which = jnp.clip((along[..., None] >= ends).sum(-1), 0, ends.shape[0] - 1)
    starts = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    middle = _look_up(0.5 * (starts + ends), which)
    column = ((along - middle) / _LETTER_HEIGHT + 0.5) * cell - 0.5
    row = (0.5 - up / _LETTER_HEIGHT) * cell - 0.5
    ink = _bilinear(jnp.asarray(coverage)[letters], which, row, column)
    ink = jnp.where((along >= 0) & (along < width), ink, 0.0)
    face = jnp.where(rim, 0.25, 1.0 - 0.95 * ink)

    in_front = t < hit.t
    painted = [jnp.where(in_front & post, 0.35, c) for c in colour]
    return [jnp.where(in_front & board, face, c) for c in painted]


def _cell(n: int) -> int:
    """Atlas cell whose pixels are about as large as the ray spacing of a picture of n x n rays."""
    letter_rays = n * _LETTER_HEIGHT / (2 * _HALF_VIEW * _SIGN_DEPTH)
    return int(min(256, 2 ** round(math.log2(letter_rays))))


def _bilinear(cells: jax.Array, which: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Read cells (L, C, C) at fractional (row, column) of cell `which`; 0 outside the cell."""
    size = cells.shape[-1]
    row0, col0 = jnp.floor(row), jnp.floor(column)
    fr, fc = row - row0, column - col0
    out = jnp.zeros(row.shape)
    for dr, wr in ((0, 1.0 - fr), (1, fr)):
        for dc, wc in ((0, 1.0 - fc), (1, fc)):
            r, c = (row0 + dr).astype(jnp.int32), (col0 + dc).astype(jnp.int32)
            inside = (r >= 0) & (r < size) & (c >= 0) & (c < size)
            value = cells[which, jnp.clip(r, 0, size - 1), jnp.clip(c, 0, size - 1)]
            out = out + jnp.where(inside, value * wr * wc, 0.0)
    return out


def visible_shares(scene: Scene, size: int = 64) -> tuple[jax.Array, jax.Array]:
    """How much of each object and of the sign's board can be seen, nothing standing in front of it.

    Returns:
      objects: (6,) float32, pixels seen over pixels it would have alone; 0 for an empty slot.
      sign: () float32, the same of the board; 1 without a sign.
    """
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    u, v = centres[None, :] * _HALF_VIEW, -centres[:, None] * _HALF_VIEW
    ray = (u, _COS + v * _SIN, v * _COS - _SIN)
    solids, slots = _solids(scene), scene.valid.shape[-1]
    floor, zero = jnp.broadcast_to(-_EYE[2] / ray[2], (size, size)), jnp.zeros((size, size))
    empty = _Hit(floor, jnp.full((size, size), -1, jnp.int32), zero, zero, zero)

    def add(i: jax.Array, state: tuple[_Hit, jax.Array]) -> tuple[_Hit, jax.Array]:
        hit, alone = state
        own = _nearer(scene, solids, i, ray, empty)
        return _nearer(scene, solids, i, ray, hit), alone.at[i].set((own.slot == i).sum())

    hit, alone = jax.lax.fori_loop(0, slots, add, (empty, jnp.zeros(slots, jnp.int32)))
    board = _board(scene, ray)
    uncovered = board & (hit.t > _SIGN_DEPTH)
    seen = (hit.slot[None] == jnp.arange(slots)[:, None, None]) & ~uncovered
    shares = seen.sum((1, 2)) / jnp.maximum(alone, 1)
    return shares, jnp.where(board.any(), uncovered.sum() / jnp.maximum(board.sum(), 1), 1.0)


def _board(scene: Scene, ray: tuple) -> jax.Array:
    """Rays that meet the sign's board, if nothing stands before it."""
    _, advance = glyphs.atlas(16)
    used = scene.letters >= 0
    width = jnp.where(used, jnp.asarray(advance)[jnp.maximum(scene.letters, 0)], 0.0).sum() * _LETTER_HEIGHT
    half = _SIGN_PIXEL * jnp.round(0.5 * width / _SIGN_PIXEL + 2.0)
    x = _SIGN_DEPTH * ray[0] - _SIGN_PIXEL * jnp.round(scene.sign_x / _SIGN_PIXEL)
    up = _SIGN_DEPTH * (_SIN * ray[1] + _COS * ray[2]) - _SIGN_MIDDLE
    return (jnp.abs(x) < half) & (jnp.abs(up) < _BOARD_HALF) & used[0]
