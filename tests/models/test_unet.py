"""The UNet computes what diffusers computes, block by block and as a whole, and says clearly what it cannot take."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import (
    CONFIGS,
    LENGTH,
    abstract_params,
    relative_error,
    to_nchw,
    to_nhwc,
    torch_unet,
    unet_inputs,
    unet_params,
)

from if_jax.checkpoints.names import to_torch
from if_jax.models.blocks import AttentionBlock, BlockSettings, ResBlock, StepEmbedding, TextEmbedding
from if_jax.models.unet import UNet, UNetConfig

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5


def torch_forward(
    kind: str, x_t: np.ndarray, t: np.ndarray, text: np.ndarray, aug_level: np.ndarray | None
) -> np.ndarray:
    labels = None if aug_level is None else torch.from_numpy(aug_level)
    with torch.inference_mode():
        out = torch_unet(kind)(to_nchw(x_t), torch.from_numpy(t), torch.from_numpy(text), class_labels=labels)
    return to_nhwc(out.sample)


def settings(config: UNetConfig) -> BlockSettings:
    return UNet(config)._settings


@pytest.mark.parametrize(("kind", "size"), [("base", (6, 10)), ("super-resolution", (16, 16)), ("cross-only", (4, 4))])
def test_whole_net_equals_diffusers(kind: str, size: tuple[int, int]) -> None:
    inputs = unet_inputs(CONFIGS[kind], size=size)
    out = jax.jit(UNet(CONFIGS[kind]).apply)({"params": unet_params(kind)}, *inputs)
    assert out.dtype == jnp.float32
    assert relative_error(out, torch_forward(kind, *inputs)) < TOLERANCE


@pytest.mark.parametrize("kind", ["base", "super-resolution"])
@pytest.mark.parametrize(
    ("level", "name", "resample"),
    [
        ("down_blocks_1", "resnets_0", "none"),  # with a shortcut convolution
        ("down_blocks_1", "resnets_1", "none"),
        ("down_blocks_0", "downsamplers_0", "down"),
        ("up_blocks_0", "upsamplers_0", "up"),
    ],
)
def test_residual_block_equals_diffusers(kind: str, level: str, name: str, resample: str) -> None:
    config, params = CONFIGS[kind], unet_params(kind)[level][name]
    reference = getattr(torch_unet(kind), level[:-2])[int(level[-1])].get_submodule(name.replace("_", "."))
    channels, features = params["conv1"]["kernel"].shape[2:]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, 6, channels)).astype(np.float32)
    emb = rng.normal(size=(2, config.time_dim)).astype(np.float32)
    block = ResBlock(features, settings(config), config.resnet_out_scale_factor, resample)
    out = jax.jit(block.apply)({"params": params}, x, emb)
    with torch.inference_mode():
        expected = to_nhwc(reference(to_nchw(x), torch.from_numpy(emb)))
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["base", "cross-only"])
def test_attention_block_equals_diffusers(kind: str) -> None:
    config, params = CONFIGS[kind], unet_params(kind)["mid_block"]["attentions_0"]
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 4, config.block_out_channels[-1])).astype(np.float32)
    text = rng.normal(size=(2, LENGTH, config.cross_attention_dim)).astype(np.float32)
    out = jax.jit(AttentionBlock(settings(config)).apply)({"params": params}, x, text)
    with torch.inference_mode():
        reference = torch_unet(kind).mid_block.attentions[0]
        expected = to_nhwc(reference(to_nchw(x), encoder_hidden_states=torch.from_numpy(text)))
    assert relative_error(out, expected) < TOLERANCE


def test_embeddings_equal_diffusers() -> None:
    config, params, net = CONFIGS["super-resolution"], unet_params("super-resolution"), torch_unet("super-resolution")
    rng = np.random.default_rng(3)
    step = rng.normal(size=(2, config.block_out_channels[0])).astype(np.float32)
    text = rng.normal(size=(2, LENGTH, config.encoder_hid_dim)).astype(np.float32)
    pool = TextEmbedding(config.time_dim, config.addition_embed_type_num_heads)
    for name, module, x in [
        ("time_embedding", StepEmbedding(config.time_dim), step),
        ("class_embedding", StepEmbedding(config.time_dim), step),
        ("add_embedding", pool, text),
    ]:
        out = module.apply({"params": params[name]}, x)
        with torch.inference_mode():
            expected = getattr(net, name)(torch.from_numpy(x)).numpy()
        assert relative_error(out, expected) < TOLERANCE, name


def test_gradients_of_the_blocks_equal_torch() -> None:
    """Of a random linear functional, by input and by every parameter: the one-pass norm is differentiated too."""
    config, params, net = CONFIGS["base"], unet_params("base"), torch_unet("base")
    rng = np.random.default_rng(4)
    x, weight = rng.normal(size=(2, 2, 4, 6, 32)).astype(np.float32)
    emb = rng.normal(size=(2, config.time_dim)).astype(np.float32)
    text = rng.normal(size=(2, LENGTH, config.cross_attention_dim)).astype(np.float32)
    mid, reference = params["mid_block"], net.mid_block
    for module, own, other, theirs in [
        (ResBlock(32, settings(config)), mid["resnets_0"], emb, reference.resnets[0]),
        (AttentionBlock(settings(config)), mid["attentions_0"], text, reference.attentions[0]),
    ]:

        def functional(own: dict, x: np.ndarray, module: nn.Module = module, other: np.ndarray = other) -> jax.Array:
            return jnp.sum(weight * module.apply({"params": own}, x, other))

        grads, grad_x = jax.jit(jax.grad(functional, argnums=(0, 1)))(own, x)
        image = to_nchw(x).requires_grad_()
        theirs.zero_grad()
        (to_nchw(weight) * theirs(image, torch.from_numpy(other))).sum().backward()
        assert relative_error(grad_x, to_nhwc(image.grad)) < TOLERANCE
        for name, grad in to_torch(grads, "unet"):
            expected = theirs.get_parameter(name).grad.numpy()
            # A bias before a softmax or a norm has no gradient but rounding: compare with the size of x's.
            assert np.abs(grad - expected).max() < TOLERANCE * max(np.abs(expected).max(), 10), name


def test_remat_recomputes_every_block_and_renames_nothing() -> None:
    config = CONFIGS["base"]
    inputs = unet_inputs(config)
    plain, remat = (UNet(config, remat=value) for value in ("none", "blocks"))
    shapes = [jax.eval_shape(net.init, jax.random.key(0), *inputs) for net in (plain, remat)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    blocks = [
        sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns)
        for net in (plain, remat)
        for jaxpr in [jax.make_jaxpr(net.apply)({"params": unet_params("base")}, *inputs)]
    ]
    assert blocks == [0, 12 + 6]  # residual blocks and attention blocks


def test_what_if_starts_at_zero_and_nothing_else() -> None:
    """The last convolution of the net, of every residual block and every attention: a fresh net returns zeros."""
    config = UNetConfig(
        2, (8,), (1,), (True,), 32, 6, attention_head_dim=8, addition_embed_type_num_heads=2, norm_num_groups=4
    )
    key = jax.random.key(0, impl="rbg")  # compiles in half the time
    out, variables = jax.jit(UNet(config).init_with_output)(key, *unet_inputs(config))
    assert not np.any(out)
    for path, leaf in jax.tree.leaves_with_path(nn.meta.unbox(variables)["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/kernel"):
            assert np.any(leaf) != name.endswith(("conv2/kernel", "to_out_0/kernel", "conv_out/kernel")), name


def test_bfloat16_is_close_and_returns_float32() -> None:
    kind = "base"
    inputs = unet_inputs(CONFIGS[kind])
    out = jax.jit(UNet(CONFIGS[kind], dtype=jnp.bfloat16).apply)({"params": unet_params(kind)}, *inputs)
    assert out.dtype == jnp.float32
    assert 1e-5 < relative_error(out, torch_forward(kind, *inputs)) < 0.05


def test_every_kernel_names_its_two_dimensions() -> None:
    net, inputs = UNet(CONFIGS["base"]), unet_inputs(CONFIGS["base"])
    boxed = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=is_box):
        name = jax.tree_util.keystr(path)
        assert is_box(leaf) == ("kernel" in name), name
        if is_box(leaf):
            assert len(leaf.names) == leaf.value.ndim
            assert leaf.names[:-2] == (None,) * (leaf.value.ndim - 2)
            assert set(leaf.names[-2:]) <= {"in", "out", "heads"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_per_block": (1,)}, "layers_per_block=.* must have 2 entries"),
        ({"attention_levels": (True,)}, "attention_levels=.* must have 2 entries"),
        ({"block_out_channels": (16, 44)}, "44 must be a multiple of norm_num_groups=8"),
        ({"attention_head_dim": 24}, "32 attends"),
        ({"cross_attention_dim": 40}, "cross_attention_dim=40"),
        ({"addition_embed_type_num_heads": 5}, "encoder_hid_dim=24"),
        ({"sample_size": 9}, "sample_size=9 must be a multiple of 2"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    fields = {name: getattr(CONFIGS["base"], name) for name in UNetConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**fields, **change})


def test_wrong_inputs_are_named() -> None:
    def run(kind: str, size: tuple[int, int] | None = None, **change: np.ndarray | None) -> None:
        config = CONFIGS[kind]
        inputs = dict(zip(("x_t", "t", "text_states", "aug_level"), unet_inputs(config, size=size), strict=True))
        jax.eval_shape(UNet(config).apply, {"params": abstract_params(config)}, **{**inputs, **change})

    with pytest.raises(ValueError, match="image of 7x8: both sides must be multiples of 2"):
        run("base", size=(7, 8))
    with pytest.raises(ValueError, match=r"x_t has shape .* expected \(B, H, W, 6\)"):
        run("super-resolution", x_t=np.zeros((2, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match=r"text_states has shape \(2, 11, 8\); expected \(B, L, 24\)"):
        run("base", text_states=np.zeros((2, 11, 8), np.float32))
    with pytest.raises(ValueError, match="needs aug_level"):
        run("super-resolution", aug_level=None)
    with pytest.raises(ValueError, match="takes no aug_level"):
        run("base", aug_level=np.zeros(2, np.int32))
