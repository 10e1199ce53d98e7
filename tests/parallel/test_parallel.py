"""Mesh and rules: the layout is what the rules say, and what does not divide is replicated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from if_jax.models.layers import convolve
from if_jax.parallel import mesh as meshes
from if_jax.parallel import rules


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(2, 2, 2)


def test_open_axis_takes_the_rest():
    assert dict(meshes.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)])
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match=r"does not fit 8 device"):
        meshes.make_mesh(*sizes)


def test_rules_place_kernels_and_replicate_what_does_not_divide(mesh):
    fsdp_tp = rules.PRESETS["fsdp_tp"]
    assert rules.spec_for((3, 3, 32, 64), (None, None, "in", "out"), mesh, fsdp_tp) == P(
        None, None, ("fsdp",), ("tensor",)
    )
    assert rules.spec_for((3, 3, 3, 64), (None, None, "in", "out"), mesh, fsdp_tp) == P(None, None, None, ("tensor",))
    assert rules.spec_for((3, 3, 32, 3), (None, None, "in", "out"), mesh, fsdp_tp) == P(None, None, ("fsdp",), None)


def test_an_axis_is_used_once_per_array(mesh):
    spec = rules.spec_for((64, 64), ("heads", "out"), mesh, rules.PRESETS["fsdp_tp"])
    assert spec == P(("tensor",), ("fsdp",))  # the second choice of "out"


def test_optimizer_moments_follow_their_parameters(mesh):
    def init(key):
        kernel = nn.LogicallyPartitioned(jax.random.normal(key, (32, 64)), ("in", "out"))
        params = {"kernel": kernel, "bias": jnp.zeros(64)}
        return params, optax.adam(1e-3).init(params)

    places = rules.state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, rules.PRESETS["fsdp_tp"])
    params, (adam, _) = places
    assert params["kernel"].spec == adam.mu["kernel"].spec == adam.nu["kernel"].spec == P(("fsdp",), ("tensor",))
    assert params["bias"].spec == P()


def test_batch_that_does_not_divide_is_refused(mesh):
    rules.check_batch_size(8, mesh, rules.PRESETS["dp"])
    with pytest.raises(ValueError, match=r"batch_size 6 does not divide over 8 devices: use a multiple of 8"):
        rules.check_batch_size(6, mesh, rules.PRESETS["dp"])


@dataclasses.dataclass(frozen=True)
class Device:
    """What tells a device's place, of machines that are not here."""

    id: int
    platform: str = "gpu"

    @property
    def slice_index(self) -> int:
        return self.id // 4


def test_axes_may_reach_over_nodes_of_gpus_but_not_over_slices_of_a_tpu():
    laid = meshes.arrange([Device(i) for i in (4, 0, 5, 1, 6, 2, 7, 3)], (1, 8, 1))
    assert [device.id for device in laid.flat] == list(range(8)) and laid.shape == (1, 8, 1)
    laid = meshes.arrange([Device(i) for i in range(8)], (1, 2, 4))
    assert [[device.id for device in row] for row in laid[0]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="mesh data=1 does not divide over 2 slices"):
        meshes.arrange([Device(i, "tpu") for i in range(8)], (1, 8, 1))


class OfProcess:
    """The sharding of a batch as one of several processes sees it: which rows its devices hold."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {device: (slice(*rows),) for device, rows in enumerate(self._rows)}


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([(0, 4), (4, 8)], (0, 1)),
        ([(4, 6), (6, 8)], (1, 2)),
        ([(4, 8), (4, 8)], (1, 2)),  # `tensor` over the devices of this process
        ([(2, 4)], (1, 4)),
        ([(0, 2), (4, 6)], (0, 1)),  # rows that do not lie together
        ([(None, None)], (0, 1)),
    ],
)
def test_a_process_reads_the_part_that_holds_its_devices_rows(rows, part):
    assert rules.batch_part(OfProcess(*rows), 8) == part


def test_devices_take_the_rows_that_the_sharding_says(mesh):
    rows = np.arange(8 * 3).reshape(8, 3)
    for preset in ("dp", "fsdp_tp"):
        sharding = rules.batch_sharding(mesh, rules.PRESETS[preset])
        got = rules.place_part(sharding, rows, rules.batch_part(sharding, 8))
        assert got.sharding == sharding
        np.testing.assert_array_equal(got, rows)


def test_a_masked_moment_stays_masked(mesh):
    """Muon's state holds boxes without an array where Adam updates."""
    masked = {"kernel": nn.LogicallyPartitioned(optax.MaskedNode(), ("in", "out")), "count": jnp.zeros(())}
    places = rules.state_shardings(masked, mesh, rules.PRESETS["fsdp_tp"])
    assert places["kernel"] == optax.MaskedNode() and places["count"].spec == P()


def test_gradients_through_convolutions_survive_the_partitioner(mesh):
    """Without `gather_convolutions` the first kernel's gradient comes out tens of per cent wrong on this mesh."""
    sharding_rules, rng = rules.PRESETS["fsdp_tp"], np.random.default_rng(0)
    kernels = [rng.standard_normal((3, 3, 32, 32)).astype(np.float32) / 17 for _ in range(2)]
    x = rng.standard_normal((8, 8, 8, 32)).astype(np.float32)

    def loss(kernels, x):
        first, second = rules.gather_convolutions(kernels, sharding_rules)
        return jnp.mean((convolve(nn.silu(convolve(x, first)), second) - 0.3) ** 2)

    want = jax.jit(jax.grad(loss))(kernels, x)
    split = NamedSharding(mesh, rules.spec_for(kernels[0].shape, (None, None, "in", "out"), mesh, sharding_rules))
    assert split.spec == P(None, None, ("fsdp",), ("tensor",))
    with jax.set_mesh(mesh):
        places = ([split, split], rules.batch_sharding(mesh, sharding_rules))
        got = jax.jit(jax.grad(loss), in_shardings=places, out_shardings=places[0])(
            *jax.device_put((kernels, x), places)
        )
    for expected, actual in zip(want, got, strict=True):
        assert np.linalg.norm(expected - actual) <= 1e-5 * np.linalg.norm(expected)
        assert actual.sharding.is_equivalent_to(split, 4)


def test_only_rule_sets_that_split_kernels_twice_gather_them(mesh):
    params = {"conv": jnp.ones((3, 3, 32, 32)), "dense": jnp.ones((32, 32))}
    assert rules.gather_convolutions(params, rules.PRESETS["fsdp_tp"]) is params  # no mesh
    with jax.set_mesh(mesh):
        for preset in ("dp", "fsdp"):
            assert rules.gather_convolutions(params, rules.PRESETS[preset]) is params
