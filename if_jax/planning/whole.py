"""The whole training step compiled for a slice: the compiler's own account of its memory, and its cycles."""

from __future__ import annotations

import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from if_jax.parallel.mesh import make_mesh
from if_jax.planning.estimate import Case
from if_jax.planning.hlo_cycles import read_cycles
from if_jax.training import setup

# "… (17.25G) exceeds available HBM (15.75G)", also in M and K
_TOO_MUCH = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_whole(case: Case) -> dict[str, Any]:
    """Compiles the training step as `if-jax train` would on the slice.

    Args:
      case: what is planned.

    Returns:
      JSON values: "bytes" of a device; where it fits also "cycles", "by_kind", "unestimated" of one device; and the
      "seconds" it took.

    Raises:
      ValueError: this libtpu does not know the slice.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    began = time.monotonic()
    more = {"num_slices": case.slice.count} if case.slice.count > 1 else {}
    if case.slice.chips == 1:
        more = {"chips_per_host_bounds": (1, 1, 1)}
    try:
        made = topologies.get_topology_desc(platform="tpu", topology_name=case.slice.topology, **more)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"this libtpu has no topology {case.slice.topology} ({reason})") from None
    own = case.recipe.mesh
    mesh = make_mesh(own.data, own.fsdp, own.tensor, devices=made.devices)
    parts = setup.make_setup(case.recipe, case.text, mesh)
    lowered = setup.lower_step(parts, setup.abstract_state(parts), setup.abstract_frozen(parts))
    result: dict[str, Any] = {}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (size := bytes_of_error(str(error))) is None:
            raise
        result["bytes"] = size
    else:
        memory = compiled.memory_analysis()
        assert memory is not None
        result["bytes"] = int(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        result["scratch"] = int(memory.temp_size_in_bytes)
        cycles = read_cycles(compiled.as_text() or "")
        result |= {"cycles": cycles.total, "by_kind": cycles.by_kind, "unestimated": cycles.unestimated}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def bytes_of_error(message: str) -> int | None:
    """Bytes that a program would need, of the compiler's refusal; None where it refuses for another reason."""
    match = _TOO_MUCH.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
