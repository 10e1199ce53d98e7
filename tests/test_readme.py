"""Every block of README.md and of the pages in docs/ as it stands: shell commands through the real command line, Python
executed.

The blocks of a page are run in order in a folder of its own, as a reader would; tests/launch/test_launch_readme.py runs
those of docs/launch.md. The demo is that of tests/tiny.py, and what a reader brings (photos, tars, checkpoints) is made
beforehand, as small. What a command gets besides (`LESS`) makes it short; nothing is taken away.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import record_stores
import remote_sources
import tiny
from blocks import Block, blocks, commands
from click.testing import CliRunner
from PIL import Image

from if_jax import Cascade
from if_jax.checkpoints.lora import write_lora
from if_jax.checkpoints.release import write_cascade
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.weights import boxed_params
from if_jax.cli import main
from if_jax.cli_recipe import read_recipe
from if_jax.config import to_recipe
from if_jax.models.lora import init_factors

pytestmark = pytest.mark.documents

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "launch.md")]
SHORT = "".join(
    f"--config.{key} "
    for key in (
        "steps=2",
        "log_every=1",
        "checkpoint_every=2",
        "sample.every=0",
        "validation.every=0",
        "batch_size=8",
        "data.threads=1",
    )
)
MARKERS = ("documents", "slow", "browser", "tpu_compiler")
LESS = {  # by what is named in the command
    "data build": "--size 16 --workers 1",
    "data build scenes": "--count 4",
    "data build tasks": "--count 4",
    "configs/demo_base.py": SHORT + "--config.data.size=8",
    "configs/demo_sr.py": SHORT + "--config.data.size=16 --config.data.low_size=8 --config.data.crop=8",
    "configs/finetune_": SHORT
    + "--config.data.size=8 --config.init_from=demo/stage_I --config.text_encoder_from=demo/stage_I",
    "configs/distill_demo.py": SHORT
    + "--config.data.size=8 --config.distill.teacher=demo/stage_I --config.text_encoder_from=demo/stage_I",
    "configs/if_I_M.py": SHORT + "--config.data.size=8 --config.unet=demo-I --config.mesh.fsdp=2",
    "if_jax.training.teach_text": "--steps 2 --scenes 32",
    "tools/caption_binding.py": "--count 2 --timesteps 250",
}
# Read, not run, and why.
PARSED = {
    "pip": "would build and install into the environment of the tests, from the network",
    "python -m pytest": "would run these tests in these tests",
    "if-jax evaluate": "tests/evaluation/test_synth.py runs it, for a minute",
    "if-jax serve": "tests/serving does, and it would not end",
    "if-jax plan": "needs the TPU compiler, and minutes: tests/planning/test_plan_report.py runs it",
    "mkdocs": "tests/test_site.py builds the site",
}
# Asked for --help instead, which imports all they use: they take minutes, or need the demo as it is.
LONG = (
    "tests/",
    "tools/draw_",
    "tools/refresh_demo.py",
    "tools/sweep.py",
    "tools/overfit.py",
    "tools/learn_concept.py",
    "tools/guidance_curve.py",
    "tools/calls_curve.py",
    "if_jax.evaluation.synth.train_reader",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with what the blocks speak of; the demo shrunk."""
    folder = tmp_path_factory.mktemp("readme")
    with remote_sources.served(folder) as far, pytest.MonkeyPatch.context() as patch:
        tiny.shrink_demo(folder / "demo", patch)
        write_cascade(folder / "my_cascade", [plain(stage) for stage in tiny.stages()], tiny.DEFAULTS)
        patch.setattr(Image.Image, "show", lambda picture: picture.load())
        for name, side in (("photo.jpg", 30), ("small.png", 8), ("room.png", 24)):
            Image.effect_noise((side, side), 80).convert("RGB").save(folder / name)
        mask = Image.new("L", (24, 24))
        mask.paste(255, (0, 0, 12, 24))
        mask.save(folder / "mask.png")
        remote_sources.upload(far, record_stores.write_tars(folder / "my_tars", 12, 6), "my_tars")
        (folder / "pictures").mkdir()
        for name in ("a", "b"):
            Image.effect_noise((20, 20), 80).convert("RGB").save(folder / f"pictures/{name}.png")
            (folder / f"pictures/{name}.txt").write_text(f"picture {name}")
        config = plain(tiny.stages()[0]).unet_config
        key = jax.random.key(0)
        factors = jax.jit(lambda: nn.unbox(init_factors(boxed_params(config), "attention", 2, key)))()
        write_lora(
            folder / "cascade_style/pytorch_lora_weights.safetensors", {"unet": factors}, 2, notes={"stage": "base"}
        )
        t5 = folder / "t5-v1_1-xxl"
        shutil.copytree(folder / "my_cascade/stage_I/text_encoder", t5)
        shutil.copytree(folder / "my_cascade/stage_I/tokenizer", t5, dirs_exist_ok=True)
        shutil.copytree(t5, folder / "t5-v1_1-base")
        call("convert", str(folder / "my_cascade/stage_I"), str(folder / "converted"), "--to", "deepfloyd")
        (folder / "IF-I-M-v1.0").mkdir()
        for name in ("config.yml", "pytorch_model.bin"):  # what DeepFloyd's own folders hold
            shutil.move(folder / "converted" / name, folder / "IF-I-M-v1.0")
        shutil.copytree(ROOT / "configs", folder / "configs")
        jax.config.update("jax_disable_most_optimizations", True)  # of machine code: a fifth less time to compile
        yield folder
        jax.config.update("jax_disable_most_optimizations", False)


def plain(stage: StageRelease) -> StageRelease:
    """A net of one level that DeepFloyd's layout can express."""
    config = replace(
        tiny.one_level(stage.unet_config),
        block_out_channels=(32,),
        time_embedding_dim=32,
        cross_attention_dim=64,
        addition_embed_type_num_heads=4,
        norm_num_groups=32,
    )
    return replace(stage, unet_config=config, unet_params=tiny.random_params(config))


def call(*words: str) -> str:
    """`if-jax WORDS`; what it prints."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_is_no_command(page):
    assert {block.language for block in blocks(page)} <= {"bash", "python", "text"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")  # modules run as scripts
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_page(page, material, tmp_path, monkeypatch):
    for path in material.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["if-jax"])
    for block in blocks(page):
        if block.language != "text":
            {"bash": run_shell, "python": run_python}[block.language](block)


def run_shell(block: Block) -> None:
    assert subprocess.run(["bash", "-n", "-c", block.text], capture_output=True).returncode == 0
    for words in commands(block.text):
        line = " ".join(words)
        if any(f"{line} ".startswith(f"{start} ") for start in PARSED):
            check(words)
        elif words[0] == "python":
            run_script(words[1:])
        elif words[0] == "launch/demo.sh":  # tests/launch/test_demo_script.py runs it
            usage = subprocess.run([ROOT / words[0], "--help"], capture_output=True, text=True, check=True).stdout
            assert all(word in usage for word in words if word.startswith("--"))
        else:
            assert words[0] == "if-jax", f"neither run nor known: {words}"
            call(*words[1:], *less(words[1:]))


def run_script(words: list[str]) -> None:
    """`python WORDS`, a script or -m MODULE, in this process."""
    module = words[0] == "-m"
    name, options = words[module], words[module + 1 :]
    long = name.startswith(LONG)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [name, *(["--help"] if long else [*options, *less([name])])])
        patch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
        with pytest.raises(SystemExit) if long else contextlib.nullcontext():
            if module:
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    known = re.findall(r"--[\w-]+", out.getvalue())
    missing = [option for option in options if long and option.startswith("--") and option not in known]
    assert not missing, f"{name} has no {missing[0]}"


def less(words: list[str]) -> list[str]:
    """What a command is given besides, so that it is short."""
    options = [more for name, more in LESS.items() if name in " ".join(words)]
    assert options or "--config" not in words, f"no short form of {words}"
    return " ".join(options).split()


def check(words: list[str]) -> None:
    """Of what is not run: its options are known here, what it names is there."""
    *verb, last = words
    if words[0] == "if-jax":
        context = main.commands[words[1]].make_context(words[1], words[2:])  # raises for an unknown option
        if words[1] == "train":
            to_recipe(read_recipe(context.params["config"], context.args))
    elif words[0] == "mkdocs":
        assert words == ["mkdocs", "build", "--strict"] and (ROOT / "mkdocs.yml").is_file()
    elif words[0] == "pip":
        extras = re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert verb in (["pip", "install"], ["pip", "install", "-e"])
        assert last == "." or last[1:].strip("[]") in extras
    else:
        assert words[:5] == ["python", "-m", "pytest", "-q", "tests"] and (len(words) == 5 or last in MARKERS)


def run_python(block: Block) -> None:
    exec(compile(block.text, block.heading, "exec"), surroundings() if "stage.predict" in block.text else {})


def surroundings() -> dict:
    """What the block for research takes as given."""
    cascade, prompts = Cascade.load("demo"), ["two red spheres"]
    text = cascade.embed([*prompts, ""])
    x_t = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    return {
        "cascade": cascade,
        "prompts": prompts,
        "text": text[:1],
        "uncond": text[1:],
        "x_t": x_t,
        "t": np.array([500]),
    }


def test_a_mistake_in_a_block_is_found(material, tmp_path, monkeypatch):
    """What these tests are for: an option, a word or a program that is not there."""
    monkeypatch.chdir(tmp_path)
    for language, text in (
        ("bash", 'if-jax dream "a" --guidence 2'),
        ("bash", "if-jax train --config configs/demo_base.py"),
        ("bash", "pip install -e '.[tests]'"),
        ("bash", "wget https://example.org"),
        ("bash", "python tools/sweep.py --prompt 3"),
        ("bash", "python tools/sweeps.py"),
        ("python", "from if_jax import Cascades"),
    ):
        with pytest.raises((AssertionError, ImportError, FileNotFoundError)), contextlib.redirect_stdout(None):
            {"bash": run_shell, "python": run_python}[language](Block("", language, text))
