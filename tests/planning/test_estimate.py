"""Blocks, bytes and seconds of a plan, with a cost table in place of the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import fake_figures
import jax
import pytest
import tiny
from flax import linen as nn

from if_jax.checkpoints.weights import boxed_params
from if_jax.config import DataConfig, DistillConfig, LoraConfig, MeshConfig, Recipe
from if_jax.models import presets
from if_jax.models.flops import t5_flops, unet_flops
from if_jax.planning.blocks import PassSettings, t5_blocks, unet_blocks
from if_jax.planning.estimate import Case, blocks_of, picture_flops, step_time, traffic_of, with_keys
from if_jax.planning.memory import Memory, kept_of_picture, memory_of
from if_jax.planning.programs import block_program
from if_jax.planning.slices import parse_slice
from if_jax.training import setup
from if_jax.training.memory import step_bytes

TEXT = tiny.TEXT
RECIPE = Recipe(
    unet="tiny-plan",
    text_encoder_from="tiny",
    data=DataConfig(size=8),
    compute_dtype="bfloat16",
    batch_size=1024,
    accumulate=4,
    mesh=MeshConfig(fsdp=8, rules="fsdp"),
)
SLOW = 1.31072  # operations a cycle, a hundred-thousandth of a chip's: nets as small as these only exchange otherwise
CASE = Case(RECIPE, TEXT, parse_slice("v5e-16"))


@pytest.fixture(scope="module", autouse=True)
def preset() -> Iterator[None]:
    """Recipes name their nets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.UNETS, "tiny-plan", tiny.BASE)
        yield


@pytest.fixture(scope="module")
def memory() -> Memory:
    return memory_of(CASE)


@pytest.mark.parametrize("name", ["IF-I-M", "IF-I-XL", "IF-II-L"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_blocks_are_the_network(name: str, size: tuple[int, int]) -> None:
    """Their operations, times how often they run, are those of the whole."""
    config = presets.UNETS[name]
    blocks = unet_blocks(config, size, PassSettings(3, "forward", "bfloat16"))
    total = sum(fake_figures.block_flops(block) * times for block, times in blocks.items())
    assert total == 3 * unet_flops(config, size)


def test_blocks_hold_the_networks_weights() -> None:
    """What each program is compiled with: the parameters of all blocks are those of the net."""

    def count(tree: object) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(tree)))

    for config in (tiny.BASE, tiny.SUPER_RESOLUTION):
        blocks = unet_blocks(config, (8, 8), PassSettings(2, "forward", "float32", text_length=5))
        total = sum(count(block_program(block)[1]) * times for block, times in blocks.items())
        assert total == count(boxed_params(config))
    layer = t5_blocks(tiny.TEXT, PassSettings(2, "forward", "float32"))
    (block, times), whole = next(iter(layer.items())), boxed_params(tiny.TEXT)
    beside = count(whole["shared"]) + count(whole["encoder"]["final_layer_norm"])
    beside += count(whole["encoder"]["block_0"]["layer_0"]["SelfAttention"]["relative_attention_bias"])
    assert count(block_program(block)[1]) * times == count(whole) - beside


def test_xl_is_some_thirty_blocks() -> None:
    blocks = unet_blocks(presets.UNETS["IF-I-XL"], (64, 64), PassSettings(8, "train", "bfloat16"))
    assert len(blocks) == 28 and sum(blocks.values()) == 60


def test_gradients_reach_what_is_trained() -> None:
    """All gradients in training; of frozen weights those of what comes in alone, as beside a LoRA."""
    for block in unet_blocks(tiny.BASE, (8, 8), PassSettings(2, "train", "float32", "blocks", 5)):
        function, params, inputs = block_program(block)
        out, (gradient, *_) = jax.eval_shape(function, params, inputs)
        assert jax.tree.structure(gradient) == jax.tree.structure(params)
        assert jax.tree.map(lambda leaf: leaf.shape, out) == jax.tree.map(lambda leaf: leaf.shape, inputs[1])
        frozen = dataclasses.replace(block, work="inputs")
        function, params, inputs = block_program(frozen)
        _, gradients = jax.eval_shape(function, params, inputs)
        floats = [leaf.shape for leaf in inputs[0] if leaf.dtype != "int32"]
        assert [leaf.shape for leaf in gradients] == floats


def test_state_bytes_are_those_of_the_state_itself(memory: Memory) -> None:
    kinds = memory.kinds
    parts = setup.make_setup(RECIPE, TEXT, CASE.mesh)
    state, frozen = setup.abstract_state(parts), setup.abstract_frozen(parts)

    def shard(tree: object) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(_product(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    assert kinds["parameters"] == shard(state.params)
    assert kinds["EMA"] == shard(state.ema)
    assert kinds["moments"] == shard(state.opt_state)
    assert kinds["text encoder"] == shard(frozen["text_encoder"])
    assert {name: kinds[name] for name in kinds if name not in ("activations", "workspace")} == step_bytes(
        RECIPE, TEXT, CASE.mesh, activations=False
    )


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_what_is_kept_is_in_the_compute_precision_and_fills_lanes() -> None:
    """Of an attention block the scores in float32 as well; with whole blocks computed again what comes in alone."""
    recipe = dataclasses.replace(RECIPE, unet="IF-I-M", data=DataConfig(), remat="none")
    blocks = {block.label(): block for block in blocks_of(dataclasses.replace(CASE, recipe=recipe))[0]}
    residual = blocks["residual 192 → 192 at 64×64"]
    picture = 64 * 64 * 256 * 2  # bfloat16, 192 channels in 256
    kept = kept_of_picture(residual)
    assert 2 * picture <= kept < 2.1 * picture
    assert kept_of_picture(dataclasses.replace(residual, rows=1)) == kept
    scores = 4 * 6 * 1024 * (1024 + 77)
    assert scores < kept_of_picture(blocks["attention 384 at 32×32"]) < 1.4 * scores
    again = dataclasses.replace(residual, remat="blocks")
    assert picture <= kept_of_picture(again) < 1.1 * picture
    assert kept_of_picture(dataclasses.replace(residual, work="forward")) == 0


def test_the_compilers_scratch_takes_the_place_of_the_guess(memory: Memory) -> None:
    unet, text = blocks_of(CASE)
    table = {block: {"scratch": 0} for block in [*unet, *text]} | {next(iter(unet)): {"scratch": 12345678}}
    known = memory_of(CASE, figures=table).kinds
    assert 12345678 <= known["workspace"] < 12345678 + 10**6
    assert {name: known[name] for name in known if name != "workspace"} == {
        name: memory.kinds[name] for name in known if name != "workspace"
    }


def test_seconds_follow_from_cycles(memory: Memory) -> None:
    """A step takes its operations over the chips' rate, and the update besides."""
    unet, text = blocks_of(CASE)
    time = step_time(CASE, fake_figures.figures([*unet, *text], SLOW), memory.kinds)
    ideal = RECIPE.batch_size * (3 * unet_flops(tiny.BASE, 8) + t5_flops(TEXT)) / (16 * 197e12)
    assert picture_flops(CASE) * RECIPE.batch_size / (16 * 197e12) == ideal
    update = time.by_kind["update"]
    assert time.step.middle - update == pytest.approx(1e5 * ideal, rel=2e-3)
    assert time.step.best <= time.step.middle <= time.step.worst
    assert time.step.worst == pytest.approx(time.step.middle + sum(time.collectives.values()), rel=1e-6)
    assert time.peak_share.middle == pytest.approx(ideal / time.step.middle)


def test_what_is_no_product_may_be_faster_than_the_compiler_says(memory: Memory) -> None:
    unet, text = blocks_of(CASE)
    table = fake_figures.figures([*unet, *text], SLOW)
    slow = {block: own | {"by_kind": {"softmax": own["cycles"]}} for block, own in table.items()}
    time = step_time(CASE, slow, memory.kinds)
    update = time.by_kind["update"]
    assert (time.step.middle - update) / (time.step.best - update) == pytest.approx(2.7)


def test_a_block_that_failed_is_named_and_left_out(memory: Memory) -> None:
    unet, text = blocks_of(CASE)
    table = fake_figures.figures([*unet, *text], SLOW)
    lost = next(block for block in unet if block.kind == "attention")
    whole = step_time(CASE, table, memory.kinds)
    part = step_time(CASE, table | {lost: {"error": "RET_CHECK failure"}}, memory.kinds)
    assert part.failed == {lost.label(): "RET_CHECK failure"} and not whole.failed
    assert part.step.middle < whole.step.middle


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distill\.method is 'progressive': a plan knows no teachers"):
        with_keys(CASE, distill=DistillConfig("progressive", "teacher")).check()
    with pytest.raises(ValueError, match=r"mesh data=-1, fsdp=3, tensor=1 does not fit 16 device"):
        with_keys(CASE, mesh={"fsdp": 3}).check()
    with pytest.raises(ValueError, match="batch_size 24 does not divide over 16 devices"):
        with_keys(CASE, batch_size=24, accumulate=1).check()
    with pytest.raises(ValueError, match="mesh data=1 does not divide over 2 slices"):
        dataclasses.replace(with_keys(CASE, mesh={"fsdp": 32}), slice=parse_slice("v5e-16", 2)).check()


def test_a_lora_has_no_gradients_of_its_base() -> None:
    recipe = dataclasses.replace(RECIPE, lora=LoraConfig(rank=4), init_from="cascade/stage_I")
    case = dataclasses.replace(CASE, recipe=recipe)
    unet, text = blocks_of(case)
    assert {block.work for block in unet} == {"inputs"} and {block.work for block in text} == {"forward"}
    assert picture_flops(case) < picture_flops(CASE)
    assert traffic_of(case).gradients < traffic_of(CASE).gradients


def test_two_devices_of_a_chip_share_its_pictures() -> None:
    """Of a v4 JAX shows one device a chip, of a TPU7x two; the compiler sees two cores of both."""
    v4 = dataclasses.replace(CASE, slice=parse_slice("v4-32"))
    ironwood = dataclasses.replace(CASE, slice=parse_slice("tpu7x-32"))
    assert (v4.ways, v4.rows, v4.core_rows) == (16, 16, 8)
    assert (ironwood.ways, ironwood.rows, ironwood.core_rows) == (32, 8, 8)
