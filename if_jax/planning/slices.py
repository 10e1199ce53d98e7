"""TPU slices by the names Google sells them under: chips, hosts, shape, and what a chip can do.

Sources: peaks, HBM and network of the pages of each generation at docs.cloud.google.com/tpu; the memory that programs
may use is what the compiler itself names where a program does not fit (libtpu 0.0.52); cycles a second are those that,
times the matrix unit's operations a cycle, give the published peak.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_DEEP = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
}
_HOST_CHIPS = 4
_GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """One kind of TPU chip."""

    name: str  # as the compiler's topologies spell it: "v5e"
    google: str  # as accelerator types spell it: "v5litepod"
    peak_flops: float  # bfloat16, a second, of a chip
    hertz: float
    hbm_bytes: int  # of a core that is compiled for, as far as a program may use it
    hbm_bandwidth: float  # bytes a second, of a chip
    link_bandwidth: float  # bytes a second, one way, of each link between neighbours
    host_network: float  # bytes a second and chip between slices
    shapes: dict[int, tuple[int, ...]]  # of slices, by chips
    cores_in_name: int = 1  # "v5p-128" counts two for each chip
    compiled_cores: int = 1  # devices that the compiler sees in a chip
    devices: int = 1  # devices that JAX shows of a chip, on a real one

    def __hash__(self) -> int:
        return hash(self.name)


# fmt: off
GENERATIONS = {
    row.name: row
    for row in (
        #          name     accelerator   FLOP/s   Hz       memory              HBM B/s  link B/s network  shapes
        Generation("v4",    "v4",         275e12,  1.05e9,  int(15.25 * _GIB),  1228e9,  45e9,    25e9 / 8, _DEEP,
                   cores_in_name=2, compiled_cores=2),
        Generation("v5e",   "v5litepod",  197e12,  1.5e9,   int(15.75 * _GIB),  819e9,   45e9,    25e9 / 8, _FLAT),
        Generation("v5p",   "v5p",        459e12,  1.75e9,  int(95.73 * _GIB),  2765e9,  90e9,    50e9 / 8, _DEEP,
                   cores_in_name=2),
        Generation("v6e",   "v6e",        918e12,  1.75e9,  int(31.24 * _GIB),  1638e9,  90e9,    100e9 / 8, _FLAT),
        Generation("tpu7x", "tpu7x",      2307e12, 2.2e9,   int(94.74 * _GIB),  7380e9,  100e9,   100e9 / 8, _DEEP,
                   cores_in_name=2, compiled_cores=2, devices=2),
    )
}
# fmt: on
_BY_WORD = {word: row for row in GENERATIONS.values() for word in (row.name, row.google)}


@dataclass(frozen=True)
class Slice:
    """Chips that one interconnect joins, or several such groups over the data centre's network."""

    generation: Generation
    shape: tuple[int, ...]  # chips along each direction of the interconnect
    count: int = 1  # of slices

    @property
    def name(self) -> str:
        """Google's name of one of the slices: "v5e-256", "v5p-128"."""
        return f"{self.generation.name}-{math.prod(self.shape) * self.generation.cores_in_name}"

    @property
    def accelerator_type(self) -> str:
        """What `gcloud` and launch/tpu_vm's TYPE call it: "v5litepod-256"."""
        return f"{self.generation.google}-{math.prod(self.shape) * self.generation.cores_in_name}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.count

    @property
    def devices(self) -> int:
        """Devices that JAX shows on them: what a mesh is made of."""
        return self.chips * self.generation.devices

    @property
    def hosts(self) -> int:
        """Machines that the chips are in."""
        alone = math.prod(self.shape)
        flat_host = self.generation.shapes is _FLAT and alone == 8  # one machine holds eight
        return self.count * (1 if flat_host else -(-alone // _HOST_CHIPS))

    @property
    def topology(self) -> str:
        """As the compiler spells one slice: "v5e:16x16"."""
        return f"{self.generation.name}:" + "x".join(map(str, self.shape))

    @property
    def device_memory(self) -> int:
        """Bytes that a program may use on one device."""
        g = self.generation
        return g.hbm_bytes * g.compiled_cores // g.devices

    @property
    def device_peak(self) -> float:
        """bfloat16 operations a second of one device."""
        return self.generation.peak_flops / self.generation.devices


def parse_slice(name: str, count: int = 1) -> Slice:
    """Reads a slice's name.

    Args:
      name: "v5e-16", "v5litepod-16", "v5p-128", "tpu7x-8", …
      count: slices of that kind.

    Raises:
      ValueError: there is no such slice; names those there are.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower())
    generation = _BY_WORD.get(match[1]) if match else None
    if match is None or generation is None:
        raise ValueError(f"slice {name!r} is unknown: use {' or '.join(map(_example, GENERATIONS.values()))}")
    size = int(match[2])
    shape = generation.shapes.get(size // generation.cores_in_name)
    if shape is None or size % generation.cores_in_name:
        raise ValueError(f"slice {name!r} is unknown: {generation.name} comes as {', '.join(names_of(generation))}")
    if count < 1:
        raise ValueError(f"slices are {count}: there must be at least 1")
    return Slice(generation, shape, count)


def names_of(generation: Generation) -> list[str]:
    """Names of all slices of a generation, smallest first."""
    return [f"{generation.name}-{chips * generation.cores_in_name}" for chips in generation.shapes]


def _example(generation: Generation) -> str:
    names = names_of(generation)
    return f"{names[0]} … {names[-1]}"
