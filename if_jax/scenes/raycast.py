"""A small ray caster: analytic solids on a studio floor, soft shadows, matte or metal, and a sign.

Every pixel is the mean of four rays. All shading happens in display space, so averaging a large picture gives the
small one: one scene looks the same at 64, 256 and 1024 px. Each scene pays for as many objects as it has.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from if_jax.scenes import geometry, glyphs
from if_jax.scenes.geometry import CUBE_HALF, CYLINDER_HEIGHT, CYLINDER_RADIUS, EYE, Board, Hit, Ray, Solid
from if_jax.scenes.scene import Scene

PALETTE = np.asarray(
    [
        *([0.90, 0.10, 0.10], [1.00, 0.50, 0.05], [0.98, 0.85, 0.08], [0.10, 0.66, 0.18]),
        *([0.10, 0.80, 0.85], [0.12, 0.26, 0.92], [0.50, 0.14, 0.72], [1.00, 0.48, 0.72]),
    ],
    np.float32,
)  # red orange yellow green cyan blue purple pink

POST_GREY = 0.35  # of the sign's posts
_DIPPED = 1.2  # up to which height, in radii of an object
_PAINT_SHARE = 0.12  # of the light that the paint beside it throws back
LIGHT = tuple(np.asarray([-0.50, -0.42, 0.90]) / np.linalg.norm([-0.50, -0.42, 0.90]))


def render(scene: Scene, size: int, dipped: jax.Array | None = None) -> jax.Array:
    """Draw one scene.

    Args:
      scene: the scene.
      size: side of the picture in pixels.
      dipped: (6,) bool, objects that are dipped in black paint, which nothing else in the scenes is.

    Returns:
      (size, size, 3) float32 in [-1, 1].
    """
    n = 2 * size
    ray, solids = geometry.rays(n), geometry.place_solids(scene)
    count = jnp.where(scene.valid, jnp.arange(scene.valid.shape[-1]) + 1, 0).max()
    hit = jax.lax.fori_loop(0, count, lambda i, h: geometry.nearer(scene, solids, i, ray, h), geometry.bare_floor(ray))

    p = tuple(eye + hit.t * d for eye, d in zip(EYE, ray, strict=True))
    light = (jnp.ones((n, n)), jnp.ones((n, n)))
    lit, open_ = jax.lax.fori_loop(0, count, lambda i, s: _shade_by(scene, solids, i, p, hit, s), light)
    colour = _surface(scene, solids, hit, p, ray, lit, open_)
    if dipped is not None:
        dark = _in_paint(solids, hit, p) & _look_up(dipped, hit.slot) & (hit.slot >= 0)
        colour = [jnp.where(dark, _PAINT_SHARE * c, c) for c in colour]
    colour = jax.lax.cond(scene.letters[0] >= 0, lambda c: _with_sign(scene, c, hit, ray, n), lambda c: c, colour)
    colour = [jnp.clip(c, 0.0, 1.0).reshape(size, 2, size, 2).mean((1, 3)) for c in colour]
    return jnp.stack(colour, axis=-1) * 2.0 - 1.0


@functools.partial(jax.jit, static_argnames="size")
def render_scenes(scenes: Scene, size: int, dipped: jax.Array | None = None) -> jax.Array:
    """Draw a batch of scenes.

    Args:
      scenes: every field with a leading B.
      size: side of the pictures in pixels.
      dipped: (B, 6) bool, see `render`.

    Returns:
      (B, size, size, 3) uint8.
    """

    def render_bytes(drawn: tuple[Scene, jax.Array | None]) -> jax.Array:
        return jnp.round((render(drawn[0], size, drawn[1]) + 1.0) * 127.5).astype(jnp.uint8)

    # On a CPU scene after scene: each then pays for its own objects only. Elsewhere all at once.
    return jax.lax.platform_dependent(
        (scenes, dipped),
        cpu=lambda batch: jax.lax.map(render_bytes, batch),
        default=lambda batch: jax.lax.map(render_bytes, batch, batch_size=max(1, 64 * 64 * 64 // size**2)),
    )


def board_face(scene: Scene, board: Board, cell: int) -> jax.Array:
    """How bright the board's face is, in display space: its rim and the word.

    Args:
      scene: whose word it is.
      board: its x (1, columns) and up (rows, 1) span the points that are evaluated.
      cell: px of a letter in the atlas used.

    Returns:
      (rows, columns) float32 in [0, 1].
    """
    coverage, _ = glyphs.atlas(cell)
    x, up, ends = board.x, board.up, board.ends
    rim = (jnp.abs(x) > board.half - geometry.SIGN_PIXEL) | (jnp.abs(up) > geometry.BOARD_HALF - geometry.SIGN_PIXEL)
    width = ends[-1]
    along = x + 0.5 * width  # from the word's left edge
    which = jnp.clip((along[..., None] >= ends).sum(-1), 0, ends.shape[0] - 1)
    starts = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    middle = _look_up(0.5 * (starts + ends), which)
    column = ((along - middle) / geometry.LETTER_HEIGHT + 0.5) * cell - 0.5
    row = (0.5 - up / geometry.LETTER_HEIGHT) * cell - 0.5
    ink = _bilinear(jnp.asarray(coverage)[jnp.maximum(scene.letters, 0)], which, row, column)
    ink = jnp.where((along >= 0) & (along < width), ink, 0.0)
    return jnp.where(rim, 0.25, 1.0 - 0.95 * ink)


def _shade_by(scene: Scene, solids: Solid, i: jax.Array, p: tuple, hit: Hit, light: tuple) -> tuple:
    """Take from each surface point the light that object i blocks: the lamp's (soft shadow) and the room's."""
    o = Solid(*(field[i] for field in solids))
    other = (hit.slot != i) & scene.valid[i]
    branches = [lambda o, f=f: f(o, *p) for f in (_sphere_shadow, _cube_shadow, _cylinder_shadow)]
    shadow = jnp.where(other, jax.lax.switch(scene.shape[i], branches, o), 0.0)
    # A sphere's share of the hemisphere above a surface: (r/d)^2 times the cosine; good enough for every solid.
    wx, wy, wz = o.x - p[0], o.y - p[1], 0.85 * o.r - p[2]
    d2 = jnp.maximum(wx * wx + wy * wy + wz * wz, 0.5 * o.r * o.r)
    facing = jnp.maximum(wx * hit.nx + wy * hit.ny + wz * hit.nz, 0.0)
    blocked = jnp.where(other, jnp.minimum(facing * o.r * o.r * jax.lax.rsqrt(d2) / d2, 0.85), 0.0)
    return light[0] * (1.0 - shadow), light[1] * (1.0 - 0.9 * blocked)


def _sphere_shadow(o: Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    wx, wy, wz = o.x - px, o.y - py, o.r - pz
    along = wx * LIGHT[0] + wy * LIGHT[1] + wz * LIGHT[2]
    miss = jnp.sqrt(jnp.maximum(wx * wx + wy * wy + wz * wz - along * along, 0.0)) - o.r
    return jnp.where(along > 0, _inside(miss), 0.0)


def _cube_shadow(o: Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    half = CUBE_HALF * o.r
    lx, ly = LIGHT[0] / LIGHT[2], LIGHT[1] / LIGHT[2]  # sideways per unit of height
    slope_x, slope_y = geometry.not_zero(o.cos * lx + o.sin * ly), geometry.not_zero(o.cos * ly - o.sin * lx)
    qx, qy = px - o.x, py - o.y
    qx, qy = o.cos * qx + o.sin * qy, o.cos * qy - o.sin * qx
    # Heights over which the ray to the lamp lies within the cube's two side slabs; the overlap's length is the depth.
    near_x, far_x = -qx / slope_x - half / jnp.abs(slope_x), -qx / slope_x + half / jnp.abs(slope_x)
    near_y, far_y = -qy / slope_y - half / jnp.abs(slope_y), -qy / slope_y + half / jnp.abs(slope_y)
    enter = jnp.maximum(jnp.maximum(near_x, near_y), 0.0)
    leave = jnp.minimum(jnp.minimum(far_x, far_y), 2.0 * half - pz)
    return _inside(0.6 * (enter - leave))


def _cylinder_shadow(o: Solid, px: jax.Array, py: jax.Array, pz: jax.Array) -> jax.Array:
    lx, ly = LIGHT[0] / LIGHT[2], LIGHT[1] / LIGHT[2]
    qx, qy, above = px - o.x, py - o.y, CYLINDER_HEIGHT * o.r - pz
    rise = jnp.clip(-(qx * lx + qy * ly) / (lx * lx + ly * ly), 0.0, jnp.maximum(above, 0.0))
    ax, ay = qx + lx * rise, qy + ly * rise
    miss = jnp.sqrt(ax * ax + ay * ay) - CYLINDER_RADIUS * o.r
    return jnp.where(above > 0, _inside(miss), 0.0)


def _inside(distance: jax.Array) -> jax.Array:
    """1 well inside (negative distance), 0 outside, smooth over the half-shadow."""
    s = jnp.clip(0.5 - distance / 0.22, 0.0, 1.0)
    return s * s * (3.0 - 2.0 * s)


def _surface(
    scene: Scene, solids: Solid, hit: Hit, p: tuple, ray: tuple, lit: jax.Array, open_: jax.Array
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
    gloss = jnp.maximum(rx * LIGHT[0] + ry * LIGHT[1] + rz * LIGHT[2], 0.0)
    gloss = gloss * gloss
    g8 = (gloss * gloss) * (gloss * gloss)  # the eighth power of the cosine
    diffuse = jnp.maximum(nx * LIGHT[0] + ny * LIGHT[1] + nz * LIGHT[2], 0.0) * lit

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


def _in_paint(solids: Solid, hit: Hit, p: tuple) -> jax.Array:
    """Which surface points lie in the paint of their object, (rows, columns) bool."""
    height = p[2] / _look_up(solids.r, hit.slot)
    return height < _DIPPED


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


def _with_sign(scene: Scene, colour: list, hit: Hit, ray: Ray, n: int) -> list[jax.Array]:
    """Put the sign (board, posts, word) behind whatever stands in front of it."""
    board = geometry.find_board(scene, ray)
    post = jnp.abs(jnp.abs(board.x) - geometry.post_middle(board.half)) < 0.5 * geometry.SIGN_PIXEL
    above = EYE[2] + geometry.SIGN_DEPTH * ray[2] > 0.0
    post = post & (board.up <= -geometry.BOARD_HALF) & above
    face = board_face(scene, board, _cell(n))
    in_front = hit.t > geometry.SIGN_DEPTH
    painted = [jnp.where(in_front & post, POST_GREY, c) for c in colour]
    return [jnp.where(in_front & board.met, face, c) for c in painted]


def _cell(n: int) -> int:
    """Atlas cell whose pixels are about as large as the ray spacing of a picture of n x n rays."""
    letter_rays = n * geometry.LETTER_HEIGHT / (2 * geometry.HALF_VIEW * geometry.SIGN_DEPTH)
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
