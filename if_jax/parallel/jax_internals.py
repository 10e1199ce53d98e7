"""All that is used of JAX's private modules, in one place: each function says which public API will replace it.

A JAX release may move any of them. What is asked for here is small, so that such a move is mended in this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def is_jax_in_use() -> bool:
    """Whether JAX has opened its devices, after which the processes of a run can no longer be joined.

    Replaced by: a public `jax.extend.backend` query of that kind; today `jax.distributed.initialize` asks this one.
    """
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def put_value(key: str, value: Mapping[str, Any]) -> None:
    """Stores a JSON value in the coordinator's key-value store, once for each key.

    Replaced by: the distributed client's key-value calls once `jax.distributed` exports them (today only
    `jax.experimental.multihost_utils` uses them, behind collectives that cannot say which process has not come).
    """
    _client().key_value_set(key, json.dumps(value, sort_keys=True))


def wait_for_value(key: str, seconds: int) -> dict[str, Any]:
    """The JSON value another process stores under a key. Replaced as `put_value`.

    Raises:
      jax.errors.JaxRuntimeError: none is there after `seconds`.
    """
    return json.loads(_client().blocking_key_value_get(key, seconds * 1000))


def detect_cluster(seconds: int) -> tuple[str | None, int | None, int | None]:
    """(HOST:PORT, processes, process) as JAX reads them from TPU VM, GKE, Slurm or Open MPI, None where it cannot.

    Replaced by: `jax.distributed.initialize()` alone, once it names the processes that have not come; until then the
    address is needed before JAX uses it. `jax.distributed` exports no detection without joining.
    """
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)[:3]


def visible_accelerators() -> tuple[int, bool]:
    """(TPU chips by their PCI numbers, whether there is an NVIDIA GPU), whatever platform JAX uses.

    Replaced by: `jax.devices(platform)` once it answers for a platform that is not installed or is switched off.

    Raises:
      ImportError, AttributeError, OSError: JAX has moved what is asked, or the machine does not show its hardware.
    """
    from jax._src import hardware_utils

    return hardware_utils.num_available_tpu_chips_and_device_id()[0], hardware_utils.has_visible_nvidia_gpu()


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
