"""Comparing two models through the command line: what passes, what fails, and that the culprit is named."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file

from if_jax.checkpoints import release
from if_jax.checkpoints.convert import open_model, write_model
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.tensors import Storage
from if_jax.cli import main
from if_jax.inference.verify import activations
from if_jax.models.unet import UNetConfig

WIDTHS = {
    "time_embedding_dim": 32,
    "cross_attention_dim": 64,
    "encoder_hid_dim": 32,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 2,
}
BASE = UNetConfig(8, (32,), (1,), (False,), **WIDTHS)
LATER = UNetConfig(16, (32,), (1,), (False,), in_channels=6, aug_level_embedding=True, **WIDTHS)
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
CHANGED = "up_blocks.0.resnets.1.conv2.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One level, one layer: what compiles fast."""
    folder = tmp_path_factory.mktemp("verify") / "base"
    with_text = replace(tiny.stages()[0], unet_config=BASE, unet_params=tiny.random_params(BASE))
    release.write_stage(folder, with_text)
    return folder


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "later"
    release.write_stage(
        folder,
        StageRelease("super-resolution", LATER, tiny.random_params(LATER), SchedulerConfig(1.0), None, None, None),
    )
    return folder


@pytest.fixture
def copy(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "copy"))


def verify(*args):
    result = CliRunner().invoke(main, ["verify", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def change(file, name, make):
    state = load_file(file)
    save_file(state | {name: make(state[name].copy())}, file)


def one_value(tensor, by=1.0):
    tensor.flat[np.abs(tensor).argmax()] *= 1 + by
    return tensor


def test_a_model_is_itself(base, copy):
    code, output = verify(base, copy)
    assert code == 0
    assert re.search(r"unet: \d+ tensors, 0 unmapped, 0 differ", output)
    assert re.search(r"text_encoder: \d+ tensors, 0 unmapped, 0 differ", output)
    assert "the same model, to 1e-05" in output and "Error" not in output
    counted = sum(map(int, re.findall(r"(\d+) tensors", output)))
    assert counted == len(load_file(base / UNET)) + len(load_file(base / TEXT))


def test_every_block_is_compared(base, copy):
    output = verify(base, copy)[1]
    blocks = ["conv_in", "encoder_hid_proj", "down_blocks_0", "mid_block", "up_blocks_0", "output", "encoder.block_0"]
    for block in blocks:
        assert re.search(rf"^  {re.escape(block)} +max \|Δ\| 0 relative$", output, re.MULTILINE), block


def test_one_changed_weight_is_named(base, copy):
    change(copy / UNET, CHANGED, one_value)
    code, output = verify(base, copy)
    assert code == 1
    assert f"differs: {CHANGED} by 1 relative" in output and "1 differ," in output
    assert re.search(r"^Error: .*base and .*copy are not the same model: \d+ difference", output, re.MULTILINE)
    # The blocks before the changed one are untouched, its own output is not.
    assert re.search(r"mid_block +max \|Δ\| 0 relative", output)
    assert not re.search(r"up_blocks_0 +max \|Δ\| 0 relative", output)


def test_blocks_are_those_of_stock_pytorch(base, copy):
    pytest.importorskip("diffusers")
    code, output = verify(base, copy, "--torch", "--tolerance", "1e-4")
    assert code == 0 and "0 unmapped, 0 differ" in output
    # From another implementation: equal but for rounding, so not to the bit.
    assert re.search(r"^  output +max \|Δ\| \d(\.\d)?e-0\d relative$", output, re.MULTILINE), output


def test_one_changed_weight_of_the_text_encoder_is_named(base, copy):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    change(copy / TEXT, name, one_value)
    code, output = verify(base, copy)
    assert code == 1 and f"differs: {name}" in output


def test_the_last_bit_passes_unless_asked_for(base, copy):
    change(copy / UNET, CHANGED, lambda tensor: one_value(tensor, 1.2e-7))
    code, output = verify(base, copy)
    assert code == 0 and "1 differ," in output and CHANGED in output
    code, output = verify(base, copy, "--tolerance", "1e-9")
    assert code == 1 and f"differs: {CHANGED}" in output


def test_half_precision_passes_where_it_may(base, tmp_path):
    write_model(open_model(base), tmp_path / "half", "diffusers", Storage("float16"))
    code, output = verify(base, tmp_path / "half", "--tolerance", "1e-2")
    assert code == 0 and "stored as float32 and float16" in output
    code, output = verify(base, tmp_path / "half")
    assert code == 1 and "and" in output and re.search(r"and \d+ more", output)


def test_a_diverged_weight_never_passes(base, copy):
    change(copy / UNET, CHANGED, lambda tensor: np.full_like(tensor, np.nan))
    code, output = verify(base, copy, "--tolerance", "1e9")
    assert code == 1 and f"differs: {CHANGED} by inf relative (not finite)" in output


@pytest.mark.parametrize(("key", "value"), [("sample_max_value", 1.0), ("prediction_type", "v_prediction")])
def test_a_scheduler_that_differs_is_named_by_its_key(base, copy, key, value):
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, output = verify(base, copy)
    assert code == 1 and re.search(rf"stage 1: schedulers differ: {key} .* and {value!r}$", output, re.MULTILINE)


def test_other_kinds_of_model_are_one_line(base, later):
    code, output = verify(base, later)
    assert code == 1
    assert re.fullmatch(r"Error: .*base holds unet, text_encoder; .*later holds unet: not the same kind .*\n", output)


def test_other_shapes_are_named(later, tmp_path):
    wider = replace(LATER, sample_size=32, attention_head_dim=32)
    stage = StageRelease("super-resolution", wider, tiny.random_params(wider), SchedulerConfig(1.0), None, None, None)
    release.write_stage(tmp_path / "wider", stage)
    code, output = verify(later, tmp_path / "wider")
    assert code == 1
    assert "unet: configurations differ: sample_size 16 and 32, attention_head_dim 16 and 32" in output


def test_a_damaged_folder_is_one_line(base, copy):
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1])
    code, output = verify(base, copy)
    assert code == 1 and re.fullmatch(rf"Error: .*{UNET}: not a whole safetensors file .*\n", output)


def test_defaults_of_cascades_count(base, tmp_path):
    stages, _ = release.read_cascade(base)
    for name, row in (("a", tiny.DEFAULTS[0]), ("b", replace(tiny.DEFAULTS[0], guidance_scale=2.0))):
        release.write_cascade(tmp_path / name, stages, [row])
    code, output = verify(tmp_path / "a", tmp_path / "b")
    assert code == 1 and "defaults of the cascades differ" in output
    assert "stage_I/unet: " in output and "stage_I/text_encoder: " in output


def test_one_model_in_two_layouts_is_one_model(base, later, tmp_path):
    pytest.importorskip("torch")
    for folder in (base, later):
        there = tmp_path / folder.name
        write_model(open_model(folder), there, "deepfloyd", Storage(None))
        code, output = verify(folder, there)
        assert code == 0, output
        assert "0 unmapped, 0 differ" in output


def test_activations_are_those_of_a_weighty_input(base, later):
    """No block's output may be all zeros or alike at every place: then it would compare nothing."""
    for folder in (base, later):
        stage = open_model(folder).stages[0]
        for name, value in activations(stage.unet_config, stage.unet_params).items():
            assert np.isfinite(value).all() and np.std(value) > 1e-3, name


def test_pictures_of_both_side_by_side(base, tmp_path):
    code, output = verify(base, base, "--pictures", tmp_path / "out")
    assert code == 0 and f"one row each: {tmp_path / 'out' / 'verify.png'}" in output
    with Image.open(tmp_path / "out/verify.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (18, 8, 3)  # two of 8 px and what keeps them apart
    assert np.array_equal(pixels[:8], pixels[10:]) and np.std(pixels[:8]) > 1


def test_a_sheet_of_somebody_else_is_not_replaced(base, tmp_path):
    (tmp_path / "verify.png").write_bytes(b"mine")
    code, output = verify(base, base, "--pictures", tmp_path)
    assert code == 1 and "exists and is no picture of if_jax" in output
    assert (tmp_path / "verify.png").read_bytes() == b"mine"


def test_no_pictures_without_a_text_encoder(later, tmp_path):
    code, output = verify(later, later, "--pictures", tmp_path / "out")
    assert code == 0 and "cannot draw without a text encoder: no pictures" in output
    assert not (tmp_path / "out").exists()
