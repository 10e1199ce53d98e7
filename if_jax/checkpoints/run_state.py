"""Whether the state of a checkpoint is the one that is wanted: its arrays by name, shape and kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging


def check_fits(named: str, stored: Any, wanted: Any) -> None:
    """Refuses a stored state of other arrays than wanted; another precision is converted, and said.

    Args:
      named: what holds it, in words.
      stored: arrays or their metadata.
      wanted: the same tree, abstract.

    Raises:
      ValueError: an array is missing, unknown or of another shape or kind.
    """
    old, new = ({_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (stored, wanted))
    misfits = [f"{name} is missing" for name in new if name not in old]
    misfits += [f"{name} is unknown here" for name in old if name not in new]
    converted = set()
    for name in sorted(old.keys() & new.keys()):
        kinds = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (old[name], new[name])]
        if tuple(old[name].shape) != tuple(new[name].shape) or (old[name].dtype != new[name].dtype and not all(kinds)):
            misfits.append(f"{name} is {_kind(old[name])}, not {_kind(new[name])}")
        elif old[name].dtype != new[name].dtype:
            converted.add(str(old[name].dtype))
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise ValueError(
            f"{named} is of another net or optimizer: {misfits[0]}{more}; use the recipe and the if_jax that wrote it, "
            "or another --workdir"
        )
    if converted:
        logging.warning("%s holds %s arrays, which are converted", named, ", ".join(sorted(converted)))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}"
