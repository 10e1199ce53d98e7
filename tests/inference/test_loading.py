"""Where the weights lie: a mesh, 8 bits, half precision and low memory draw the same pictures."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from if_jax.checkpoints import release
from if_jax.inference import loading
from if_jax.inference.cascade import Cascade
from if_jax.parallel.mesh import make_mesh

PROMPTS = [f"picture {k}" for k in range(8)]
KWARGS = {"return_tensors": True, "stages": 1, "if_I_kwargs": {"sample_timestep_respacing": "4"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, [tiny.on_one_level(stage) for stage in tiny.stages()], tiny.DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def one_device(folder):
    return np.stack(Cascade.load(folder).dream(PROMPTS, **KWARGS)["I"])


def test_eight_devices_draw_the_same_bits(folder, one_device):
    """Pictures split over the mesh, parameters whole on each device: every device runs the program of one."""
    cascade = Cascade.load(folder, mesh=make_mesh(data=8), rules="dp")
    np.testing.assert_array_equal(cascade.dream(PROMPTS, **KWARGS)["I"], one_device)
    fewer = cascade.dream(PROMPTS[:3], **KWARGS)["I"]
    np.testing.assert_array_equal(fewer, one_device[:3])


def test_sharded_parameters_draw_the_same_picture(folder, one_device):
    """Products are summed in another order, so to rounding."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    cascade = Cascade.load(folder, mesh=mesh, rules="fsdp_tp")
    kernels = [leaf for leaf in jax.tree.leaves(cascade.stages[0].unet_params) if leaf.ndim > 1]
    assert all(not leaf.sharding.is_fully_replicated for leaf in kernels if min(leaf.shape[-2:]) % 2 == 0)
    np.testing.assert_allclose(cascade.dream(PROMPTS[:4], **KWARGS)["I"], one_device[:4], atol=1e-4)


def test_low_memory_loads_what_it_uses_and_draws_the_same(folder, one_device, monkeypatch):
    order = []
    for name in ("place_text", "place_unet"):
        own = getattr(loading, name)
        monkeypatch.setattr(loading, name, lambda *args, own=own, name=name: (order.append(name), own(*args))[1])
    cascade = Cascade.load(folder, low_memory=True)
    assert not order and not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cascade.stages[1].unet_params))
    np.testing.assert_array_equal(cascade.dream(PROMPTS[:2], **KWARGS)["I"], one_device[:2])
    assert order == ["place_text", "place_unet"]


def test_eight_bits_in_the_text_encoder(folder):
    """Rounded weights err by at most half a step of their channel; the states stay within a few per cent."""
    exact, coarse = Cascade.load(folder, stages=1), Cascade.load(folder, stages=1, text_dtype="int8")
    kernels = [leaf for leaf in jax.tree.leaves(coarse.stages[0].text_params) if leaf.dtype == np.int8]
    assert len(kernels) == 7  # q, k, v, o, wi_0, wi_1, wo of the one layer
    want, got = exact.embed(PROMPTS), coarse.embed(PROMPTS)
    error = np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2))
    assert 1e-4 < error < 0.03
    kernel = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * np.geomspace(0.01, 10, 8)
    rounded = loading.dequantize(loading.quantize(kernel), np.float32)
    assert (np.abs(rounded - kernel) <= np.abs(kernel).max(0) / 127 * 0.5001).all()


def test_half_precision_weights_take_half_the_memory(folder, one_device):
    cascade = Cascade.load(folder, stages=1, param_dtype="bfloat16", text_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cascade.stages[0].unet_params)} == {"bfloat16"}
    drawn = np.stack(cascade.dream(PROMPTS[:1], **KWARGS)["I"])
    assert 0 < np.abs(drawn - one_device[:1]).mean() < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_dtype": "int8"}, "param_dtype is 'int8'"),
        ({"text_dtype": "int4"}, "text_dtype"),
        ({"rules": "x"}, "rules"),
    ],
)
def test_wrong_placements_are_one_line(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Cascade.load(folder, **options)
