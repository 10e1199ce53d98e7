"""The model card says what was trained, how to draw, and what was measured; its Python is Python."""

from __future__ import annotations

import re
from dataclasses import replace

import tiny

from if_jax.config import Recipe, recipe_to_dict
from if_jax.training.card import model_card

RECIPES = [recipe_to_dict(Recipe(batch_size=32)), recipe_to_dict(Recipe(unet="demo-II", stage="super-resolution"))]


def card(**more):
    return model_card("my_cascade", tiny.stages(), tiny.DEFAULTS, RECIPES, [500, 70], **more)


def test_the_card_names_stages_recipes_and_steps():
    text = card()
    assert text.startswith("---\nlibrary_name: diffusers\n") and "# my_cascade" in text and "8 → 16 pixels" in text
    assert "500 steps of 32 from `scenes`" in text and "70 steps of 64" in text
    assert "steps 2, guidance 3, noise level 200" in text and "None measured yet" in text
    assert '"learning_rate": 0.0001' in text


def test_the_card_says_where_prompts_keep_their_case():
    kept = [replace(default, preserve_case=True) for default in tiny.DEFAULTS]
    text = model_card("my_cascade", tiny.stages(), kept, RECIPES, [500, 70])
    assert "diffusers` lower-cases every prompt" in text and "lower-cases" not in card()


def test_scores_become_a_table():
    text = card(scores={"pictures": 64, "sha256": "0f", "accuracy": {"colour": 0.91234, "colour_ci": [0.9, 0.95]}})
    assert "| pictures | 64 |" in text and "| accuracy: colour | 0.9123 (0.900 … 0.950) |" in text and "0f" not in text


def test_its_examples_are_python():
    blocks = re.findall(r"```python\n(.*?)```", card(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
    assert "stage_II(" in blocks[1]
