"""Every recipe, in every form: built, its state laid out on a mesh, its training step traced. Nothing is allocated."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import jax
import pytest

from if_jax.config import differences, recipe_to_dict, to_recipe
from if_jax.models import presets
from if_jax.parallel import mesh as meshes
from if_jax.training import setup

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))}
IF_STAGES = [name for name in CONFIGS if name.startswith("if_")]
LATER = [name for name in IF_STAGES if not name.startswith("if_I_")]


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(name, form=""):
    return to_recipe(load(name).get_config(form))


def lower(recipe):
    """The step on eight fake devices, four of them along fsdp, as the trainer traces it; with its abstract state."""
    mesh = meshes.make_mesh(2, 4, 1)
    text = None
    if recipe.text_encoder_from:
        text = presets.T5_ENCODERS["demo" if recipe.text_encoder_from.startswith("if_jax") else "t5-v1_1-xxl"]
    parts = setup.make_setup(recipe, text, mesh)
    with jax.set_mesh(mesh):
        state = setup.abstract_state(parts)
        return state, setup.lower_step(parts, state, setup.abstract_frozen(parts))


def test_there_is_a_recipe_for_every_stage():
    filling = {recipe_of(name, "tpu").unet for name in ("if_I_M", "if_I_L", "if_I_XL", "if_II_L")}
    assert {recipe_of(name).unet for name in CONFIGS} | filling == set(presets.UNETS)
    assert all(width % 256 == 0 for name in filling for width in presets.UNETS[name].block_out_channels)


@pytest.mark.parametrize("name", IF_STAGES)
def test_published_settings(name):
    """Batch size and steps of DeepFloyd's table, one-cycle rates, 10 % of captions dropped, the objective unchanged."""
    published = {
        "if_I_M": (3072, 2_500_000),
        "if_I_L": (3200, 2_500_000),
        "if_I_XL": (3072, 2_420_000),
        "if_II_M": (1536, 2_500_000),
        "if_II_L": (1536, 2_500_000),
        "if_III_L": (3072, 1_250_000),
    }
    recipe = recipe_of(name)
    assert (recipe.batch_size, recipe.steps) == published[name]
    assert (recipe.prediction, recipe.loss_weight, recipe.noise_size) == ("eps", "none", 64)
    assert recipe.optimizer.schedule == "one-cycle" and recipe.optimizer.warmup_steps == 10_000
    assert recipe.data.caption_dropout == 0.1
    docstring = CONFIGS[name].read_text().split('"""')[1]
    assert "in launch/tpu_vm/settings.sh" in docstring and "| 64 chips |" in docstring and "Ours:" in docstring


@pytest.mark.parametrize(("name", "form"), [("if_I_M", "smok"), ("if_I_M", "full_frame"), ("if_II_M", "full")])
def test_a_form_that_is_not_there_is_refused(name, form):
    others = {"if_I_M": "IF-I-M: leave it out or use smoke or tpu$", "if_II_M": "IF-II-M: .* use smoke or full_frame$"}
    with pytest.raises(ValueError, match=f"recipe form '{form}' is unknown for {others[name]}"):
        recipe_of(name, form)


# Per leg of the demo: side of the pictures, of the low-resolution ones, and of those the schedule is as noisy for; the
# share of captions withheld from the step embedding; and the release it starts from.
LEGS = {
    "demo_base": {
        "small": (32, 64, 256, 0.5, ""),
        "large": (64, 64, 512, 0.3, "cascades/small/stage_I"),
    },
    "demo_sr": {
        "crops": (256, 64, 64, 0.0, ""),
        "more": (256, 64, 64, 0.0, "stages/crops"),
    },
    "demo_sr_1024": {
        "fine": (1024, 256, 64, 0.0, ""),
    },
}


@pytest.mark.parametrize("name", LEGS)
def test_the_legs_of_the_demo_follow_each_other(name):
    plain = recipe_to_dict(recipe_of(name))
    assert list(load(name).FORMS) == list(LEGS[name])
    for form, expected in LEGS[name].items():
        recipe = recipe_of(name, form)
        sides = (recipe.data.size, recipe.data.low_size, recipe.noise_size)
        assert (*sides, recipe.pooled_dropout, recipe.init_from) == expected
        assert recipe.text_encoder_from == "encoders/demo" and f"`{form}`" in CONFIGS[name].read_text()
        changed = {key for key in differences(plain, recipe_to_dict(recipe)) if not key.startswith("data.")}
        assert changed <= {
            *("text_encoder_from", "init_from", "noise_size", "pooled_dropout", "batch_size", "steps"),
            *("optimizer.learning_rate", "optimizer.final_learning_rate", "optimizer.warmup_steps"),
            *("init_copy", "ema_decays"),
        }


@pytest.mark.parametrize("name", IF_STAGES)
def test_the_meshes_of_the_table_fit(name):
    """Chips, batch and accumulation of every cell divide; what lies on a chip is told by tools/state_bytes.py."""
    recipe = recipe_of(name)
    for line in CONFIGS[name].read_text().splitlines():
        if not re.match(r"\| \d+ chips", line):
            continue
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for cell in cells:
            sizes, accumulate = cell.split(",")
            data, fsdp = map(int, sizes.split("×"))
            assert data * fsdp == int(label.split()[0]), cell
            assert recipe.batch_size % (data * fsdp * int(accumulate)) == 0, cell


@pytest.mark.parametrize(
    "name",
    [
        "demo_base",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("demo_sr", "if_I_M", "if_II_M")),
    ],
)
def test_the_smoke_form_is_traced(name):
    state, lowered = lower(recipe_of(name, "smoke"))
    assert lowered.out_info[0].params.keys() == state.params.keys()


@pytest.mark.parametrize("form", ["demo", pytest.param("demo_II", marks=pytest.mark.slow)])
def test_a_lora_is_traced(form):
    """Its state holds factors alone; the recipe for IF's own stages differs by what it starts from."""
    state, lowered = lower(recipe_of("finetune_lora", form))
    assert lowered.out_info[0].params.keys() == {"unet"}
    names = {str(path[-2]) for path, _ in jax.tree.leaves_with_path(state.params)}
    assert names == {"['lora_A']", "['lora_B']"}
    for own in ("", "II"):
        recipe = recipe_of("finetune_lora", own)
        assert recipe.lora.rank == 16 and (recipe.prediction, recipe.noise_size) == ("eps", 64)


def test_new_words_are_recipes():
    """Of all that is trained the state holds the rows of the words alone, for the demo and for IF-I-XL."""
    for form, shape in (("demo", (1, 128)), ("", (1, 4096))):
        recipe = recipe_of("finetune_words", form)
        text = presets.T5_ENCODERS["demo" if form else "t5-v1_1-xxl"]
        parts = setup.make_setup(recipe, text, meshes.make_mesh(2, 4, 1))
        state = setup.abstract_state(parts)
        assert {leaf.shape for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state))} == {shape, ()}
        assert setup.abstract_frozen(parts).keys() == {"text_encoder", "unet"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IF_STAGES, *(f"{name}:full_frame" for name in LATER)])
def test_the_whole_recipe_is_traced(name):
    name, _, form = name.partition(":")
    recipe = recipe_of(name, form)
    state, lowered = lower(recipe)
    assert lowered.out_info[0].params.keys() == state.params.keys()
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params["unet"])]
    local = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state.params["unet"])]
    assert sum(local) < 0.27 * sum(sizes)  # four ways, but for norms and the edge convolutions
