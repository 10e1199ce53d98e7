"""The device mesh: which devices there are, and how they are laid out along `data`, `fsdp` and `tensor`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as a (data, fsdp, tensor) mesh; one axis may be -1 and takes what the others leave.

    The axes are `Auto`: the compiler places the collectives, because a convolution with a sharded kernel would need an
    output sharding at every call in explicit mode.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        given = ", ".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} device(s): the product must be {len(devices)}; "
            "set one axis to -1 to let it take the rest"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
