"""LoRA files beside stock diffusers and peft: the same function and gradients; names of other writers; bad files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from if_jax.checkpoints import lora, names, release
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.weights import boxed_params
from if_jax.inference.cascade import DEMO
from if_jax.models import lora as factors
from if_jax.models.t5 import T5Encoder
from if_jax.models.unet import UNet

ALPHA, RANK = 6.0, 4
STAGES = [tiny.on_one_level(stage) for stage in tiny.stages()]


boxed = functools.cache(boxed_params)
# Each program runs once: optimising its machine code takes longer than all else about it.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def random_factors(config: Any, targets: str, seed: int = 0, rank: int = RANK) -> Any:
    """Factors of the size of the weights themselves, so that leaving any out would show."""
    init = lambda key: factors.init_factors(boxed(config), targets, rank, key)  # noqa: E731
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32),
        nn.unbox(jax.eval_shape(init, jax.random.key(0))),
    )


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, STAGES, tiny.DEFAULTS)
    return folder


def close(actual: Any, expected: Any, share: float) -> None:
    """To a share of the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("number", [0, 1], ids=["base", "super-resolution"])
@pytest.mark.parametrize("whose", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])  # a minute of a core each
def test_diffusers_computes_the_same_with_the_file_loaded(
    cascade: Path, tmp_path: Path, number: int, whose: str
) -> None:
    """Output of the UNet and gradients of all factors, attention and convolutions; merged as unmerged."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder = (cascade if whose == "tiny" else DEMO) / f"stage_{'I' * (number + 1)}"
    stage = STAGES[number] if whose == "tiny" else release.read_stage(folder)
    config, tree = stage.unet_config, random_factors(stage.unet_config, "attention+conv")
    lora.write_lora(tmp_path / lora.FILE_NAME, {"unet": tree}, ALPHA)
    fitted = lora.fit(lora.open_lora(tmp_path), "unet", config)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, fitted.factors), tree)
    rng = np.random.default_rng(1)
    side = min(config.sample_size, 64)
    x, weights = (rng.normal(size=(2, side, side, c)).astype(np.float32) for c in (config.in_channels, 6))
    states = rng.normal(size=(2, 9, config.encoder_hid_dim)).astype(np.float32)
    t = np.array([30, 700], np.int32)
    inputs = [x, t, states] + ([np.array([5, 250], np.int32)] if number else [])
    net = UNet(config)

    def loss(tree: Any, base: Any) -> tuple[jax.Array, jax.Array]:
        out = factors.apply(net, factors.AdaptedParams(base, tree, ALPHA / RANK), *map(jnp.asarray, inputs))
        return (out * weights).mean(), out

    (_, ours), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(tree, stage.unet_params)
    merged = factors.merge(factors.AdaptedParams(stage.unet_params, tree, ALPHA / RANK))
    zeros = jax.tree.map(np.zeros_like, tree)
    close(quick_jit(loss)(zeros, merged)[1], ours, 1e-5)

    pipeline = tiny.open_in_diffusers(folder, text_encoder=None)
    pipeline.load_lora_weights(tmp_path)
    adapted = {name: p for name, p in pipeline.unet.named_parameters() if "lora_" in name}
    assert len(adapted) == len(jax.tree.leaves(tree))
    for parameter in adapted.values():
        parameter.requires_grad_(True)
    chw = [torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, weights)]
    labels = torch.from_numpy(inputs[3]) if number else None
    theirs = pipeline.unet(chw[0], torch.from_numpy(t), torch.from_numpy(states), class_labels=labels).sample
    close(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), 1e-4)
    (theirs * chw[1]).mean().backward()
    for name, gradient in names.to_torch(gradients, "unet"):
        layer, part, _ = name.rsplit(".", 2)
        expected = next(p for own, p in adapted.items() if own.startswith(f"{layer}.{part}."))
        close(gradient, expected.grad.numpy(), 1e-4)


def test_diffusers_computes_the_same_text_states(cascade: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    tree = random_factors(tiny.TEXT, factors.TEXT_TARGETS)
    unet = random_factors(STAGES[0].unet_config, "to_q")
    lora.write_lora(tmp_path / lora.FILE_NAME, {"unet": unet, "text_encoder": tree}, ALPHA)
    ids, mask = np.arange(3, 15, dtype=np.int32).reshape(1, 12), np.ones((1, 12), np.int32)
    params = factors.AdaptedParams(STAGES[0].text_params, tree, ALPHA / RANK)
    ours = quick_jit(lambda p: factors.apply(T5Encoder(tiny.TEXT), p, jnp.asarray(ids), jnp.asarray(mask)))(params)
    pipeline = tiny.open_in_diffusers(cascade / "stage_I")
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        theirs = pipeline.text_encoder(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0].numpy()
    close(ours, theirs, 1e-4)


def merged_kernels(stage: StageRelease, files: Mapping[Path, float]) -> dict[Any, np.ndarray]:
    merged = lora.with_loras([stage], dict(files))[0].unet_params
    return {path: np.asarray(kernel) for path, kernel in factors.kernels_of(merged).items()}


def test_what_is_written_is_read_to_the_bit_and_weights_add_up(tmp_path: Path) -> None:
    config = STAGES[0].unet_config
    trees = [random_factors(config, "attention+conv", seed=1), random_factors(config, "to_q+conv2", seed=2, rank=3)]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for tree, file in zip(trees, files, strict=True):
        lora.write_lora(file, {"unet": tree}, ALPHA, notes={"stage": "base"})
    fitted = lora.fit(lora.open_lora(files[0]), "unet", config)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, fitted.factors), trees[0])
    assert set(fitted.scales.values()) == {ALPHA / RANK}
    kernels = factors.kernels_of(STAGES[0].unet_params)
    expected = dict(kernels)
    for tree, weight, rank in zip(trees, (0.8, -0.5), (RANK, 3), strict=True):
        for path, down, up in factors.pairs_of(tree):
            expected[path] = expected[path] + weight * ALPHA / rank * (down @ up.reshape(up.shape[-2:]))
    merged = merged_kernels(STAGES[0], {files[0]: 0.8, files[1]: -0.5})
    for path, kernel in merged.items():
        np.testing.assert_allclose(kernel, expected[path], rtol=0, atol=1e-6)
    changed = sum(not np.array_equal(merged[path], kernel) for path, kernel in kernels.items())
    assert changed == len(list(factors.pairs_of(trees[0])))
    assert all(
        np.array_equal(kernels[path], kernel) for path, kernel in merged_kernels(STAGES[0], {files[0]: 0}).items()
    )


def _kohya(name: str) -> str:
    layer, part, _ = name.removeprefix("unet.").rsplit(".", 2)
    return f"lora_unet_{layer.replace('.', '_')}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"


def _processor(name: str) -> str:
    layer, part, _ = name.rsplit(".", 2)
    block, _, own = layer.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{own}_lora.{'down' if part == 'lora_A' else 'up'}.weight"


@pytest.mark.parametrize(
    "rename", [_kohya, _processor, lambda name: name.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")]
)
def test_other_writers_names(tmp_path: Path, rename: Callable[[str], str]) -> None:
    """Without a header the product counts once; with kohya's alpha, alpha / rank times."""
    file, other = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    lora.write_lora(file, {"unet": random_factors(STAGES[0].unet_config, "attention")}, RANK)
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, other)
    expected = merged_kernels(STAGES[0], {file: 1.0})
    for path, kernel in merged_kernels(STAGES[0], {other: 1.0}).items():
        np.testing.assert_array_equal(kernel, expected[path])
    if rename is _kohya:
        alphas = {name.split(".")[0] + ".alpha": np.ones(1, np.float32) for name in tensors}
        save_file(tensors | alphas, other)
        expected = merged_kernels(STAGES[0], {file: 1 / RANK})
        for path, kernel in merged_kernels(STAGES[0], {other: 1.0}).items():
            np.testing.assert_allclose(kernel, expected[path], rtol=0, atol=1e-7)


def _without_one(tensors: dict[str, np.ndarray]) -> None:
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def _of_rank_zero(tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor[:0] if "lora_A" in name else tensor[:, :0]


def _of_a_wider_net(tensors: dict[str, np.ndarray]) -> None:
    tensors.update({name: np.concatenate([tensor] * 2, 1) for name, tensor in tensors.items() if "lora_A" in name})


def _of_other_layers(tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        tensors[name.replace("mid_block", "middle")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_one, r"bad\.safetensors: unet \S+ has only part of its pair \(lora_B missing\)"),
        (_of_rank_zero, r"has rank 0"),
        (_of_a_wider_net, r"is a LoRA of another net: unet \S+\.lora_A\.weight has shape \(4, 32\)"),
        (_of_other_layers, r"is a LoRA of another net: this unet has no layer middle"),
        (lambda tensors: tensors.clear(), r"holds no factors"),
        (lambda tensors: tensors.update(x=np.ones(2, np.float32)), r"holds x, which is no LoRA factor"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, spoil: Callable[[dict], None], message: str) -> None:
    file, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    lora.write_lora(file, {"unet": random_factors(STAGES[0].unet_config, "mid_block/attentions_0/to_q")}, RANK)
    tensors = load_file(file)
    spoil(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, bad)
    with pytest.raises(ValueError, match=message) as error:
        lora.with_loras([STAGES[0]], {bad: 1.0})
    assert "\n" not in str(error.value)


def test_what_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "good.safetensors"
    tree = random_factors(STAGES[0].unet_config, "mid_block/attentions_0")
    lora.write_lora(file, {"unet": tree}, RANK)
    with pytest.raises(ValueError, match="exists already"):
        lora.write_lora(file, {"unet": tree}, RANK)
    with pytest.raises(FileNotFoundError, match="no such file; give a LoRA file"):
        lora.open_lora(tmp_path)
    with pytest.raises(ValueError, match=r"weight of LoRA .* is nan"):
        lora.with_loras(STAGES, {file: float("nan")})
    with pytest.raises(ValueError, match="fits stages I and II, and does not say which"):
        lora.with_loras(STAGES, {file: 1.0})
    noted = tmp_path / "noted.safetensors"
    lora.write_lora(noted, {"unet": tree}, RANK, notes={"stage": "super-resolution"})
    merged = lora.with_loras(STAGES, {noted: 1.0})
    assert merged[0].unet_params is STAGES[0].unet_params and merged[1].unet_params is not STAGES[1].unet_params
    text = tmp_path / "text.safetensors"
    lora.write_lora(text, {"text_encoder": random_factors(tiny.TEXT, factors.TEXT_TARGETS)}, RANK)
    with pytest.raises(ValueError, match="holds factors of a text encoder, which stage"):
        lora.with_loras([dataclasses.replace(STAGES[0], text_config=None, text_params=None)], {text: 1.0})
    with safe_open(file, framework="numpy") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert header["unet.r"] == RANK and "mid_block.attentions.0.to_out.0" in header["unet.target_modules"]
    save_file(load_file(file), tmp_path / "odd.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="not readable as JSON"):
        lora.open_lora(tmp_path / "odd.safetensors")
    save_file(
        load_file(file), tmp_path / "dora.safetensors", metadata={"lora_adapter_metadata": '{"unet.use_dora": true}'}
    )
    with pytest.raises(ValueError, match=r"unet\.use_dora is set, which if_jax does not compute"):
        lora.open_lora(tmp_path / "dora.safetensors")
