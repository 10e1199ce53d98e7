"""Slices by Google's names, and what travels between their chips."""

from __future__ import annotations

import math

import pytest

from if_jax.planning.collectives import Traffic, ring_bandwidth, seconds
from if_jax.planning.slices import GENERATIONS, names_of, parse_slice


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts", "topology", "kind"),
    [
        ("v5e-1", 1, 1, 1, "v5e:1x1", "v5litepod-1"),
        ("v5e-8", 8, 8, 1, "v5e:2x4", "v5litepod-8"),
        ("v5litepod-16", 16, 16, 4, "v5e:4x4", "v5litepod-16"),
        ("v5p-128", 64, 64, 16, "v5p:4x4x4", "v5p-128"),  # cores are counted
        ("v4-32", 16, 16, 4, "v4:2x2x4", "v4-32"),
        ("v6e-256", 256, 256, 64, "v6e:16x16", "v6e-256"),
        ("TPU7x-8", 4, 8, 1, "tpu7x:2x2x1", "tpu7x-8"),  # JAX shows two devices a chip
    ],
)
def test_names_are_googles(name: str, chips: int, devices: int, hosts: int, topology: str, kind: str) -> None:
    made = parse_slice(name)
    assert (made.chips, made.devices, made.hosts) == (chips, devices, hosts)
    assert (made.topology, made.accelerator_type) == (topology, kind)


def test_every_name_that_is_offered_is_read() -> None:
    for generation in GENERATIONS.values():
        for name in names_of(generation):
            assert parse_slice(name).name == name


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v9-16", r"slice 'v9-16' is unknown: use .*v5e-1 … v5e-256"),
        ("v5e-17", "v5e comes as v5e-1, v5e-4, v5e-8"),
        ("v5p-7", "v5p comes as v5p-8"),  # half a chip
        ("v5e", "is unknown"),
    ],
)
def test_an_unknown_slice_names_those_there_are(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_slice(name)


def test_no_slice_is_no_plan() -> None:
    with pytest.raises(ValueError, match="slices are 0"):
        parse_slice("v5e-16", 0)


def test_clocks_give_the_published_peaks() -> None:
    """Operations a cycle are a power of two times the matrix units: what the clock was taken from."""
    for generation in GENERATIONS.values():
        per_cycle = generation.peak_flops / generation.hertz
        assert per_cycle == pytest.approx(2 ** round(math.log2(per_cycle)), rel=0.01)


def test_a_direction_that_closes_to_a_ring_carries_twice_as_much() -> None:
    link = GENERATIONS["v5e"].link_bandwidth
    assert ring_bandwidth(parse_slice("v5e-16"), 4) == link
    assert ring_bandwidth(parse_slice("v5e-16"), 16) == 2 * link  # two directions, open
    assert ring_bandwidth(parse_slice("v5e-256"), 16) == 2 * link  # one direction, closed
    assert ring_bandwidth(parse_slice("v5e-256"), 256) == 4 * link


def test_replicas_send_gradients_alone_and_split_weights_are_gathered_too() -> None:
    slice_, size = parse_slice("v5e-256"), 4 * 10**9
    replicas = seconds(Traffic(0, 2, size, size, 1), slice_, 1)
    assert replicas["weights gathered"] == 0
    assert replicas["gradients summed"] == pytest.approx(2 * size * 255 / 256 / 180e9)
    split = seconds(Traffic(size * 255 // 256, 2, size, size // 256, 1), slice_, 256)
    assert split["weights gathered"] == pytest.approx(2 * size * 255 / 256 / 180e9)
    assert split["gradients summed"] == pytest.approx(size * 255 / 256 / 180e9)
    assert "between slices" not in split


def test_parts_of_a_batch_and_slices_cost_more() -> None:
    size = 10**9
    once = seconds(Traffic(size, 2, size, size, 1), parse_slice("v6e-16"), 16)
    four = seconds(Traffic(size, 8, size, size, 4), parse_slice("v6e-16"), 16)
    assert {name: 4 * value for name, value in once.items()} == pytest.approx(four)
    two = seconds(Traffic(size, 2, size, size // 16, 1), parse_slice("v6e-16", 2), 16)
    assert two["between slices"] == pytest.approx(2 * (size // 16) / 2 / 12.5e9)
