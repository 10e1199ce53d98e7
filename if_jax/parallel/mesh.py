"""The device mesh: which devices there are, and how they are laid out along `data`, `fsdp` and `tensor`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as a (data, fsdp, tensor) mesh; one axis may be -1 and takes what the others leave.

    The axes are `Auto`: the compiler places the collectives, because a convolution with a sharded kernel would need an
    output sharding at every call in explicit mode.

    Args:
      data: devices along the data axis.
      fsdp: devices along the fsdp axis.
      tensor: devices along the tensor axis.
      devices: in any order; None: all there are.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve_axes(data, fsdp, tensor, len(devices))
    return Mesh(arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve_axes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The axis sizes of a mesh, with a -1 replaced by what the others leave.

    Args:
      data: devices along the data axis.
      fsdp: devices along the fsdp axis.
      tensor: devices along the tensor axis.
      devices: how many there are.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and fixed > 0 and devices % fixed == 0:
        sizes[open_axes[0]] = devices // fixed
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != devices:
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise ValueError(
            f"mesh {asked} does not fit {devices} device(s): the product must be {devices}; "
            "set one axis to -1 to let it take the rest"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def arrange(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices as an array of `shape` (data, fsdp, tensor), neighbours along the last axes close on the interconnect.

    Several slices of a TPU (a hybrid mesh) are joined along `data` alone: between slices only gradients travel, over
    the slow network, while fsdp and tensor stay inside a slice.

    On GPUs a slice is a node, or what NVLink joins. There fsdp and tensor may reach over several, where the data axis
    does not divide over them: slower, and the only way for a state that no node holds.

    Raises:
      ValueError: the slices of a TPU do not divide the data axis.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    count = len(slices)
    if count > 1 and (shape[0] % count or len({len(slice_) for slice_ in slices.values()}) > 1):
        if devices[0].platform != "tpu":
            ordered = [device for index in sorted(slices) for device in sorted(slices[index], key=lambda d: d.id)]
            return np.array(ordered, dtype=object).reshape(shape)
        raise ValueError(f"mesh data={shape[0]} does not divide over {count} slices: use a multiple of {count}")
    inner = (shape[0] // count, *shape[1:])
    parts = [mesh_utils.create_device_mesh(inner, devices=slices[index]) for index in sorted(slices)]
    return np.concatenate(parts)
