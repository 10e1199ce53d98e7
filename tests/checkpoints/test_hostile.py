"""Hostile checkpoint folders: the sound one before is taken, loudly, or one line says what to do; nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner

from if_jax.checkpoints import run
from if_jax.checkpoints.seal import METADATA, SEAL
from if_jax.cli import main
from if_jax.config import Recipe, recipe_to_dict
from if_jax.training import publish
from if_jax.training.resume import resume
from if_jax.training.step import init_state

RECIPE = Recipe(ema_decays=(0.9,))
OWN = {"recipe": recipe_to_dict(RECIPE), "text_encoder_sha256": ""}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _state(step, shape=(16, 16), **more):
    """A training state of a tiny net, other numbers at every step."""
    rng = np.random.default_rng(step)
    params = {"unet": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "bias": jnp.zeros(3)}, **more}
    return dataclasses.replace(init_state(params, OPTIMIZER, RECIPE.ema_decays), step=jnp.int32(step))


def _abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)


def _save(workdir, *states, own=OWN):
    with run.open_checkpoints(str(workdir), own, keep=5) as saved:
        for state in states:
            saved.save(int(state.step), state, {"window": []})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    _save(workdir, _state(10), _state(20))
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "run"))


def _start(workdir):
    """What the training command does before it compiles: the step it goes on from."""
    step, _ = resume(str(workdir), OWN)
    with run.open_checkpoints(str(workdir), OWN, keep=5) as saved:
        if not step:
            return 0
        state = saved.restore(_abstract(_state(0)))
    jax.tree.map(np.testing.assert_array_equal, state, _state(step))
    return step


def _bytes(workdir):
    """SHA-256 of every file under a run, by its name before it was set aside; and where links lead."""
    hashes = {}
    for folder, folders, files in os.walk(workdir):
        for path in (Path(folder) / name for name in (*folders, *files)):
            name = str(path.relative_to(workdir)).replace(".damaged", "")
            if path.is_symlink():
                hashes[name] = os.readlink(path)
            elif path.is_file():
                hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _newest(workdir):
    return workdir / "checkpoints" / "20"


def _content(workdir):
    """The file that holds the arrays' numbers, not what describes them."""
    files = [path for path in _newest(workdir).rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _unsealed(harm):
    """The same harm to a checkpoint whose process was killed before it was sealed."""

    def both(workdir):
        (_newest(workdir) / SEAL).unlink()
        harm(workdir)

    return both


def _edit_own(change):
    def edit(workdir):
        path = _newest(workdir) / METADATA
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return _unsealed(edit)


def _link_around(workdir):
    path = _content(workdir)
    path.unlink()
    path.symlink_to(path.name)


def _seal_as_folder(workdir):
    (_newest(workdir) / SEAL).unlink()
    (_newest(workdir) / SEAL).mkdir()


def _only_folders(workdir):
    for path in _newest(workdir).rglob("*"):
        if path.is_file():
            path.unlink()


# Set aside for step 10: (what was done to the run folder, the step set aside, words of the warning)
ASIDE = {
    "flipped byte": (lambda w: _flip(_content(w)), 20, "SHA-256 differs"),
    "truncated arrays": (lambda w: os.truncate(_content(w), 7), 20, "has 7 bytes where"),
    "missing file": (lambda w: _content(w).unlink(), 20, "is missing"),
    "a file that links to itself": (_link_around, 20, "leads nowhere"),
    "seal is not JSON": (lambda w: (_newest(w) / SEAL).write_text("{no"), 20, f"{SEAL} is not readable"),
    "seal of length zero": (lambda w: os.truncate(_newest(w) / SEAL, 0), 20, f"{SEAL} is not readable"),
    "seal is a folder": (_seal_as_folder, 20, f"{SEAL} is not readable"),
    "unsealed, truncated arrays": (_unsealed(lambda w: os.truncate(_content(w), 7)), 20, "arrays cannot be read"),
    "unsealed, arrays of length zero": (_unsealed(lambda w: os.truncate(_content(w), 0)), 20, "arrays cannot be read"),
    "unsealed, missing arrays": (_unsealed(lambda w: _content(w).unlink()), 20, "arrays cannot be read"),
    "unsealed, no index": (
        _unsealed(lambda w: (_newest(w) / "state" / "manifest.ocdbt").unlink()),
        20,
        "it holds no arrays",
    ),
    "unsealed, state is missing": (
        _unsealed(lambda w: shutil.rmtree(_newest(w) / "state")),
        20,
        "_METADATA is missing",
    ),
    "unsealed, metadata is not JSON": (
        _unsealed(lambda w: (_newest(w) / METADATA).write_text("{no")),
        20,
        f"{METADATA} is not readable",
    ),
    "metadata is a list": (_unsealed(lambda w: (_newest(w) / METADATA).write_text("[1]")), 20, "is not readable"),
    "unsealed, placement is not JSON": (
        _unsealed(lambda w: (_newest(w) / "state/_sharding").write_text("")),
        20,
        "state/_sharding is not readable",
    ),
    "no recipe": (_edit_own(lambda v: v.update(custom_metadata={"a": 1})), 20, "holds no recipe"),
    "recipe is a word": (_edit_own(lambda v: v["custom_metadata"].update(recipe="x")), 20, "holds no recipe"),
    "window is a number": (_edit_own(lambda v: v["custom_metadata"].update(window=5)), 20, "holds no recipe"),
    "nothing but folders": (_only_folders, 20, f"{METADATA} is missing"),
    "renamed to another step": (lambda w: _newest(w).rename(w / "checkpoints/40"), 40, "it holds step 20"),
}
# The newest is still step 20: nothing is in its way, or what is there is set aside.
AS_BEFORE = {
    "step folder is empty": (lambda w: (w / "checkpoints/30").mkdir(), [30], "_CHECKPOINT_METADATA is missing"),
    "step is a file": (lambda w: (w / "checkpoints/30").write_text("x"), [30], "it is not a folder"),
    "step links to itself": (lambda w: (w / "checkpoints/30").symlink_to("30"), [30], "it is not a folder"),
    "step is huge": (lambda w: (w / "checkpoints" / ("9" * 30)).mkdir(), [int("9" * 30)], "is missing"),
    "step is negative": (lambda w: (w / "checkpoints/-5").mkdir(), [], ""),
    "step with zeros": (lambda w: (w / "checkpoints/0030").mkdir(), [], ""),
    "step is no number to int()": (lambda w: (w / "checkpoints/³").mkdir(), [], ""),
    "an unknown item": (lambda w: (_newest(w) / "extra").write_text("x"), [], ""),
    "a link around in a circle": (lambda w: (_newest(w) / "again").symlink_to(_newest(w)), [], ""),
    "unsealed": (_unsealed(lambda w: None), [], ""),
}


@pytest.mark.parametrize("name", ASIDE)
def test_the_one_before_is_taken(workdir, name, caplog):
    harm, step, words = ASIDE[name]
    harm(workdir)
    before = _bytes(workdir)
    assert _start(workdir) == 10
    lines = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(lines) == 1 and words in lines[0] and f"checkpoint {step} of {workdir}" in lines[0]
    assert "\n" not in lines[0]
    assert (workdir / "checkpoints" / f"{step}.damaged").is_dir()
    assert _bytes(workdir) == before


@pytest.mark.parametrize("name", AS_BEFORE)
def test_the_newest_is_taken_all_the_same(workdir, name, caplog):
    harm, aside, words = AS_BEFORE[name]
    harm(workdir)
    before = _bytes(workdir)
    assert _start(workdir) == 20
    warnings = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(warnings) == len(aside) and all(words in line for line in warnings)
    assert all(f"{step}.damaged" in os.listdir(workdir / "checkpoints") for step in aside)
    assert _bytes(workdir) == before


def test_what_a_killed_process_left_half_written_is_cleared(workdir):
    half = workdir / "checkpoints" / "30.orbax-checkpoint-tmp"
    shutil.copytree(_newest(workdir) / "state", half / "state")
    before = _bytes(workdir)
    assert _start(workdir) == 20
    assert _bytes(workdir) == {
        name: digest for name, digest in before.items() if not name.startswith(f"checkpoints/{half.name}")
    }


def _instead(*states, own=OWN):
    def replace(workdir):
        shutil.rmtree(workdir / "checkpoints")
        _save(workdir, *states, own=own)

    return replace


def _all_damaged(workdir):
    for step in (10, 20):
        os.truncate(workdir / "checkpoints" / str(step) / SEAL, 3)


def _folder_as_file(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("x")


def _folder_as_link(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").symlink_to("checkpoints")


def _with(state, **changed):
    return dataclasses.replace(state, **changed)


def _recipe(**changed):
    return OWN | {"recipe": OWN["recipe"] | changed}


INTEGERS = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), _state(20))
# Refused: (what was done, words of the one line)
REFUSED = {
    "none is sound": (
        _all_damaged,
        ["no checkpoint of", "20: sha256.json is not", "10: sha256.json", "put a copy back"],
    ),
    "checkpoints is a file": (_folder_as_file, ["is not a folder", "another --workdir"]),
    "checkpoints links to itself": (_folder_as_link, ["is not a folder", "another --workdir"]),
    "another recipe": (_instead(_state(20), own=_recipe(batch_size=7)), ["batch_size was 7, is 64", "old values"]),
    "another text encoder": (
        _instead(_state(20), own=OWN | {"text_encoder_sha256": "ab"}),
        ["another text encoder", "another --workdir"],
    ),
    "a recipe key of a newer version": (
        _instead(_state(20), own=_recipe(quantum=3)),
        ["another version of if_jax", "quantum (value 3)", "another --workdir"],
    ),
    "a newer format": (
        _instead(_state(20), own=OWN | {"format": 2}),
        ["of format 2, this if_jax reads 1", "use the version"],
    ),
    "another net's shapes": (
        _instead(_state(20, shape=(16, 17))),
        ["checkpoint 20 of", "float32 (16, 17), not float32 (16, 16)", "(and 3 more)", "another --workdir"],
    ),
    "an unknown part": (
        _instead(_state(20, lora={"a": jnp.zeros(2)})),
        ["lora.a is unknown here", "another --workdir"],
    ),
    "no EMA": (_instead(_with(_state(20), ema={})), ["ema.0.9.unet.bias is missing", "another --workdir"]),
    "integers for floats": (_instead(INTEGERS), ["is int32 (3,), not float32 (3,)", "another --workdir"]),
    "no training state": (
        lambda w: (shutil.rmtree(w / "checkpoints"), _save_plain(w)),
        ["is missing", "another --workdir"],
    ),
}


def _save_plain(workdir):
    with run.open_checkpoints(str(workdir), OWN, keep=5) as saved:
        saved.save(20, {"x": jnp.zeros(3)})


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_what_to_do(workdir, name):
    harm, words = REFUSED[name]
    harm(workdir)
    before = _bytes(workdir)
    with pytest.raises((ValueError, NotADirectoryError)) as caught:
        _start(workdir)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in words), message
    assert str(workdir) in message
    assert _bytes(workdir) == before


def test_another_precision_is_converted_and_said(workdir, caplog):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, _state(20))
    _instead(half)(workdir)
    with run.open_checkpoints(str(workdir), OWN, keep=5) as saved:
        state = saved.restore(_abstract(_state(0)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), state, half)
    assert "holds bfloat16 arrays, which are converted" in caplog.text


@contextlib.contextmanager
def _as_nobody():
    """File modes bind everyone but root: as root, another user for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_workdir(written):
    """A run that other users could reach, were it not for what a test forbids."""
    with tempfile.TemporaryDirectory(prefix="if_jax_") as folder:
        os.chmod(folder, 0o755)
        yield Path(shutil.copytree(written, Path(folder) / "run"))


FORBIDDEN = {
    "a file may not be read": lambda w: _content(w).chmod(0),
    "a checkpoint may not be opened": lambda w: _newest(w).chmod(0),
    "the folder may not be listed": lambda w: (w / "checkpoints").chmod(0),
    "unsealed, and arrays may not be read": _unsealed(lambda w: _content(w).chmod(0)),
    "damaged, but may not be renamed": lambda w: (
        _content(w).write_bytes(b"x"),
        [path.chmod(0o755) for path in (_content(w), w / "checkpoints")],
        (w / "checkpoints").chmod(0o555),
    ),
}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no file modes here")
@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_permission_is_never_taken_for_damage(open_workdir, name):
    before = _bytes(open_workdir)
    FORBIDDEN[name](open_workdir)
    if "unsealed" in name:
        del before[f"checkpoints/20/{SEAL}"]
    if "damaged" in name:
        before = _bytes(open_workdir)
    try:
        with _as_nobody(), pytest.raises(PermissionError, match="no permission; train as the user who owns") as caught:
            resume(str(open_workdir), OWN)
    finally:
        for path in (open_workdir / "checkpoints", _newest(open_workdir), _content(open_workdir)):
            path.chmod(0o755)
    assert "\n" not in str(caught.value) and str(open_workdir) in str(caught.value)
    assert _bytes(open_workdir) == before


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (ASIDE["flipped byte"][0], "checkpoint 20 of .* is damaged: .*SHA-256 differs"),
        (ASIDE["unsealed, truncated arrays"][0], "is damaged: its arrays cannot be read"),
        (ASIDE["unsealed, placement is not JSON"][0], "_sharding is not readable"),
        (ASIDE["renamed to another step"][0], "checkpoint 40 of .* it holds step 20"),
        (REFUSED["no EMA"][0], "has no EMA of decay 0.9: it keeps none"),
        (REFUSED["no training state"][0], "has no EMA of decay 0.9: it keeps none"),
        (REFUSED["a recipe key of a newer version"][0], "another version of if_jax .*quantum"),
        (REFUSED["a newer format"][0], "of format 2"),
        (REFUSED["checkpoints is a file"][0], "is not a folder"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "no checkpoint under"),
    ],
)
def test_nothing_is_published_from_it(workdir, tmp_path, harm, words):
    harm(workdir)
    before = _bytes(workdir)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        publish.publish([str(workdir)], str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert _bytes(workdir) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["none is sound", "checkpoints is a file", "another recipe"])
def test_through_the_command_line(workdir, name):
    """As a user sees it: one line, exit code 1, and the run folder as it was."""
    REFUSED[name][0](workdir)
    before = _bytes(workdir)
    config = Path(__file__).parents[2] / "configs" / "demo_base.py"
    result = CliRunner().invoke(main, ["train", "--config", str(config), "--workdir", str(workdir)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.output.count("\n") == 1 and result.output.startswith("Error: ")
    assert _bytes(workdir) == before
