"""The same scenes through Mitsuba 3's path tracer: other light, other materials, the same places and colours.

A reader of pictures that was fitted to the ray caster's is checked with these: camera, solids and signs are those of
`geometry`, while shading follows physics (soft shadows, colour that bleeds from thing to floor, metal that mirrors its
neighbours). Mitsuba is an extra, `pip install 'if_jax[mitsuba]'`, and imported where it is used.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from if_jax.scenes import geometry
from if_jax.scenes.geometry import AXIS, BOARD_HALF, EYE, RADII, SIGN_DEPTH, SIGN_MIDDLE, SIGN_PIXEL, UP
from if_jax.scenes.raycast import LIGHT, PALETTE, POST_GREY, board_face
from if_jax.scenes.scene import Scene

SAMPLES = 49  # paths a pixel and pass; square numbers are spread best
_PASSES = 5
_VARIANT = "scalar_rgb"  # compiled ahead; the vectorised variants need an LLVM library that suits the processor
_DEPTH = 6  # a path's bounces and its end
_BLOCK = 16  # px a task; fixed, since a block's random numbers hang on its place
_CELL = 64  # px of a letter of which the sign is made
_FACE = (128, 384)  # px of its texture, the same for every word: one shape, compiled once
_BRIGHTEST = 0.9  # share of light that a paint throws back at most
_RIGHT = (1.0, 0.0, 0.0)


def check_mitsuba() -> None:
    """Raise ValueError with what to do about it where Mitsuba is not installed."""
    if importlib.util.find_spec("mitsuba") is None:
        raise ValueError("renderer mitsuba needs the mitsuba package: pip install 'if_jax[mitsuba]'")


def render(scene: Scene, size: int, seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Draw one scene. Equal arguments give equal bytes.

    Of several passes each pixel's brightest value is left out: a lucky path from floor to metal to lamp would else
    stand out as a white dot.

    Args:
      scene: one scene on the host.
      size: side of the picture in pixels.
      seed: of the paths.
      samples: paths a pixel in each of five passes.

    Returns:
      (size, size, 3) uint8.

    Raises:
      ValueError: Mitsuba is not installed.
    """
    check_mitsuba()
    import mitsuba as mi

    mi.set_variant(_VARIANT)
    described = mi.load_dict(describe(scene, size, samples))
    passes = [np.array(mi.render(described, seed=mi.UInt32(seed * _PASSES + i))) for i in range(_PASSES)]
    light = np.sort(passes, axis=0)[:-1].mean(axis=0)
    return np.round(255.0 * _shown(np.clip(light, 0.0, 1.0))).astype(np.uint8)


def describe(scene: Scene, size: int, samples: int = SAMPLES) -> dict[str, Any]:
    """A scene as Mitsuba's `load_dict` takes it; object i's shapes are named "object-i" and "lid-i".

    Args:
      scene: one scene on the host.
      size: side of the picture in pixels.
      samples: paths a pixel.
    """
    parts: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": _DEPTH, "block_size": _BLOCK},
        "camera": _camera(size, samples),
        **_lights(),
        "floor": _floor(float(scene.tone)),
    }
    for slot in np.flatnonzero(scene.valid):
        parts |= _solid(scene, int(slot))
    return parts | (_sign(scene) if scene.letters[0] >= 0 else {})


def _camera(size: int, samples: int) -> dict[str, Any]:
    import mitsuba as mi

    target = np.add(EYE, AXIS).tolist()
    return {
        "type": "perspective",
        "fov": math.degrees(2 * math.atan(geometry.HALF_VIEW)),
        "to_world": mi.ScalarTransform4f().look_at(list(EYE), target, list(UP)),
        "film": {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}},
        "sampler": {"type": "multijitter", "sample_count": samples},
    }


def _lights() -> dict[str, Any]:
    """A lamp where the ray caster has it, a paler one behind for outlines, and the light of a bright room."""
    return {
        "room": {"type": "constant", "radiance": _grey(0.27)},
        "lamp": _lamp(np.multiply(LIGHT, 9.0), half=2.0, radiance=16.5),
        "back": _lamp(np.asarray([5.0, 5.5, 5.5]), half=2.0, radiance=3.0),
    }


def _lamp(place: np.ndarray, half: float, radiance: float) -> dict[str, Any]:
    import mitsuba as mi

    turned = mi.ScalarTransform4f().look_at(place.tolist(), [0.0, 0.0, 0.4], [0.0, 0.0, 1.0])
    return {
        "type": "rectangle",
        "to_world": turned @ mi.ScalarTransform4f().scale(half),
        "emitter": {"type": "area", "radiance": _grey(radiance)},
    }


def _floor(tone: float) -> dict[str, Any]:
    import mitsuba as mi

    paint = {"type": "diffuse", "reflectance": _grey(min(0.58 * tone, 1.0))}
    return {"type": "rectangle", "to_world": mi.ScalarTransform4f().scale(40.0), "bsdf": paint}


def _solid(scene: Scene, slot: int) -> dict[str, Any]:
    import mitsuba as mi

    transform = mi.ScalarTransform4f()
    x, y = (float(value) for value in scene.position[slot])
    radius = RADII[scene.size[slot]]
    surface = (_rubber, _metal)[scene.material[slot]](PALETTE[scene.colour[slot]])
    name = f"object-{slot}"
    if scene.shape[slot] == 0:
        return {name: {"type": "sphere", "center": [x, y, radius], "radius": radius, "bsdf": surface}}
    if scene.shape[slot] == 1:
        half = geometry.CUBE_HALF * radius
        turn = transform.rotate([0, 0, 1], math.degrees(float(scene.yaw[slot])))
        place = transform.translate([x, y, half]) @ turn @ transform.scale(half)
        return {name: {"type": "cube", "to_world": place, "bsdf": surface}}
    wide, height = geometry.CYLINDER_RADIUS * radius, geometry.CYLINDER_HEIGHT * radius
    side = {"type": "cylinder", "p0": [x, y, 0.0], "p1": [x, y, height], "radius": wide, "bsdf": surface}
    lid = transform.translate([x, y, height]) @ transform.scale([wide, wide, 1.0])
    return {name: side, f"lid-{slot}": {"type": "disk", "to_world": lid, "bsdf": surface}}


def _rubber(paint: np.ndarray) -> dict[str, Any]:
    return {"type": "roughplastic", "diffuse_reflectance": _rgb(paint), "alpha": 0.3, "nonlinear": False}


def _metal(paint: np.ndarray) -> dict[str, Any]:
    return {"type": "roughconductor", "specular_reflectance": _rgb(paint), "alpha": 0.2}


def _sign(scene: Scene) -> dict[str, Any]:
    """The board with its word as a texture, and two posts down to the floor."""
    import mitsuba as mi

    board = geometry.find_board(scene, geometry.rays(2))
    half, across = float(board.half), float(geometry.board_middle(scene))
    rows, columns = _FACE
    x = half * ((np.arange(columns) + 0.5) * (2 / columns) - 1.0)
    up = BOARD_HALF * ((np.arange(rows) + 0.5) * (2 / rows) - 1.0)  # a texture begins at the bottom
    face = board_face(scene, board._replace(x=jnp.asarray(x)[None], up=jnp.asarray(up)[:, None]), _CELL)
    painted = mi.Bitmap(_linear(np.repeat(np.asarray(face)[..., None], 3, axis=-1)).astype(np.float32))
    texture = {"type": "bitmap", "bitmap": painted, "raw": True, "wrap_mode": "clamp"}
    parts = {"board": _upright(across, SIGN_MIDDLE, half, BOARD_HALF, texture)}

    lower = SIGN_MIDDLE - BOARD_HALF
    ground = -(EYE[2] + SIGN_DEPTH * AXIS[2]) / UP[2]  # how far above the axis the sign's plane meets the floor
    for side in (-1, 1):
        middle = across + side * float(geometry.post_middle(board.half))
        parts[f"post-{side + 1}"] = _upright(
            middle, 0.5 * (lower + ground), 0.5 * SIGN_PIXEL, 0.5 * (lower - ground), _grey(float(_linear(POST_GREY)))
        )
    return parts


def _upright(right: float, up: float, half_width: float, half_height: float, paint: dict[str, Any]) -> dict[str, Any]:
    """A rectangle in the sign's plane, which faces the camera."""
    import mitsuba as mi

    middle = np.asarray(EYE) + SIGN_DEPTH * np.asarray(AXIS) + right * np.asarray(_RIGHT) + up * np.asarray(UP)
    place = np.eye(4)
    place[:3] = np.stack(
        [np.multiply(_RIGHT, half_width), np.multiply(UP, half_height), np.negative(AXIS), middle], axis=1
    )
    surface = {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": paint}}
    return {"type": "rectangle", "to_world": mi.ScalarTransform4f(place.tolist()), "bsdf": surface}


def _grey(value: float) -> dict[str, Any]:
    return {"type": "rgb", "value": [value] * 3}


def _rgb(paint: np.ndarray) -> dict[str, Any]:
    return {"type": "rgb", "value": np.minimum(_linear(paint), _BRIGHTEST).tolist()}


def _linear(shown: np.ndarray | float) -> np.ndarray:
    """Light of a value in display space (IEC 61966-2-1)."""
    shown = np.asarray(shown, np.float64)
    return np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)


def _shown(light: np.ndarray) -> np.ndarray:
    """The display-space value of light, `_linear` turned round."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
