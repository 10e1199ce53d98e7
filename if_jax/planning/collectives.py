"""What travels between chips in a training step, and how long that takes, by a stated model.

The compiler gives no estimate for collectives. The model: rings along the directions of the interconnect, at the full
rate of the links in both directions (in one, where a direction is too short to be closed to a ring), without latency.

* Weights that are split over devices are gathered for the forward pass and again for the backward one, in float32 where
  they are trained, for each part of the batch.
* Gradients are summed in float32 for each part: scattered over the axis that the weights are split along, then added
  up over the other devices. Between slices they travel once a step's parts, over the network of the data centre.
"""

from __future__ import annotations

from dataclasses import dataclass

from if_jax.planning.slices import Slice

_CLOSED = {2: 16, 3: 4}  # chips along a direction from which on it is closed to a ring, by directions


@dataclass(frozen=True)
class Traffic:
    """Bytes that one step moves."""

    gathered: int  # of weights that a device takes in from others for each pass over each part of the batch
    passes: int  # of them: parts × (forward, backward)
    gradients: int  # float32 bytes of all gradients, whole
    shard: int  # of those on one device, after they are scattered
    parts: int  # of the batch


def seconds(traffic: Traffic, slice_: Slice, split: int) -> dict[str, float]:
    """Time that a step's collectives take, if nothing else runs meanwhile.

    Args:
      traffic: of a step.
      slice_: which chips.
      split: devices that weights are split over.

    Returns:
      Seconds by what they are for: "weights gathered", "gradients summed", and with several slices "between slices".
    """
    inside = ring_bandwidth(slice_, split)
    ways = slice_.devices // slice_.count
    result = {"weights gathered": 0.0, "gradients summed": 0.0}
    if split > 1:
        share = (split - 1) / split
        result["weights gathered"] = traffic.passes * traffic.gathered / inside
        result["gradients summed"] = traffic.parts * traffic.gradients * share / inside
    copies = max(ways // split, 1)
    if copies > 1:  # an all-reduce sends everything twice
        result["gradients summed"] += (
            traffic.parts * 2 * traffic.shard * (copies - 1) / copies / ring_bandwidth(slice_, copies)
        )
    if slice_.count > 1:
        network = slice_.generation.host_network / slice_.generation.devices
        amount = traffic.parts * 2 * traffic.shard / copies
        result["between slices"] = amount * (slice_.count - 1) / slice_.count / network
    return result


def ring_bandwidth(slice_: Slice, devices: int) -> float:
    """Bytes a second that each device can take in while so many of them exchange in a ring.

    Args:
      slice_: which chips.
      devices: that exchange; as many directions of the interconnect serve as it takes to hold them.
    """
    generation, chips = slice_.generation, -(-devices // slice_.generation.devices)
    total, held = 0.0, 1
    for length in sorted(slice_.shape, reverse=True):
        if held >= chips or length == 1:
            break
        closed = length >= _CLOSED[len(slice_.shape)]
        total += generation.link_bandwidth * (2 if closed else 1)
        held *= length
    return (total or generation.link_bandwidth) / generation.devices
