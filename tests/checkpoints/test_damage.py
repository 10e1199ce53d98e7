"""Damaged folders, through the command line: one line that names the culprit, and the destination as it was."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from damage import (
    INDEX,
    KERNEL,
    TEXT,
    UNET,
    UNET_BIN,
    cascade_json,
    edit,
    gone,
    header,
    index_lists,
    lost_shard,
    nothing,
    offsets,
    old_format,
    overlapping,
    params,
    put,
    renamed,
    replaced,
    shard,
    short_table,
    state,
    tensor_in_two_shards,
    told,
    torch_state,
    unlisted_tensor,
    value,
    weights_of_another_day,
    wider_text,
)
from safetensors.numpy import load_file

from if_jax.checkpoints import release, write_tensors
from if_jax.checkpoints.convert import open_model, write_model
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.tensors import Storage
from if_jax.cli import main
from if_jax.models.presets import SCALE
from if_jax.models.unet import UNetConfig
from if_jax.text.tokens import load_tokenizer

torch = pytest.importorskip("torch")

WIDTHS = {
    "time_embedding_dim": 32,
    "cross_attention_dim": 64,
    "encoder_hid_dim": 32,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 2,
}
BASE = UNetConfig(8, (32,), (1,), (True,), **WIDTHS)
LATER = UNetConfig(
    16,
    (32,),
    (1,),
    (False,),
    in_channels=6,
    aug_level_embedding=True,
    time_embedding_act=True,
    resnet_skip_time_act=True,
    resnet_out_scale_factor=SCALE,
    mid_block_scale_factor=SCALE,
    **WIDTHS,
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """One valid folder of every layout, to be copied and damaged."""
    root = tmp_path_factory.mktemp("healthy")
    text = tiny.random_params(tiny.TEXT)
    base = StageRelease(
        "base", BASE, tiny.random_params(BASE), SchedulerConfig(1.5), tiny.TEXT, text, load_tokenizer("bytes")
    )
    later = StageRelease("super-resolution", LATER, tiny.random_params(LATER), SchedulerConfig(1.0))
    release.write_stage(root / "base", base)
    release.write_stage(root / "later", later)
    release.write_cascade(root / "cascade", [base, later], tiny.DEFAULTS)
    write_model(open_model(root / "base"), root / "deepfloyd", "deepfloyd", Storage(None))
    write_model(open_model(root / "cascade"), root / "deepfloyd_cascade", "deepfloyd", Storage(None))
    write_model(open_model(root / "base"), root / "shards", "diffusers", Storage(None, shard_bytes=100_000))
    shutil.copytree(root / "deepfloyd/t5", root / "text")
    shutil.copytree(root / "base", root / "bin")
    state = {name: torch.from_numpy(tensor) for name, tensor in load_file(root / "bin" / UNET).items()}
    torch.save(state, root / "bin" / UNET_BIN)
    (root / "bin" / UNET).unlink()
    return root


@pytest.fixture
def destination(healthy, tmp_path):
    return Path(shutil.copytree(healthy / "later", tmp_path / "out" / "release"))


def convert(source, destination, *args):
    return CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", "diffusers", *map(str, args)])


def everything_in(folder):
    """Every path below a folder, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_one_clear_line(result, message):
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code != 0
    lines = [line for line in result.output.splitlines() if line.strip() and "B/s" not in line and "?B" not in line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.output
    assert "Traceback" not in result.output
    assert re.search(message, lines[0]), lines[0]


def case(name, source, damage, message, *args):
    return pytest.param(source, damage, message, args, id=name.replace(" ", "-"))


WEIGHT_FILE = r"unet/diffusion_pytorch_model\.safetensors: not a whole safetensors file \(.+\); copy or export it again"
OF_TYPE = rf"{UNET}: {KERNEL} is of type"
ANOTHER = r"/unet: the weights are of another architecture than config\.json says: .*"
POINTER = r"unet/diffusion_pytorch_model\.safetensors: is a Git LFS pointer, not the file itself: run `git lfs pull` "
NOT_WHOLE_BIN = r"\.bin: not a whole PyTorch file \(.+\); copy it again"
CASES = [
    # Bytes of a safetensors file.
    case("cut by one byte", "base", edit(UNET, lambda b: b[:-1]), WEIGHT_FILE),
    case("cut in half", "base", edit(UNET, lambda b: b[: len(b) // 2]), WEIGHT_FILE),
    case("cut in the header", "base", edit(UNET, lambda b: b[:100]), WEIGHT_FILE),
    case("cut in the length", "base", edit(UNET, lambda b: b[:5]), WEIGHT_FILE),
    case("empty", "base", put(UNET, b""), WEIGHT_FILE),
    case("trailing bytes", "base", edit(UNET, lambda b: b + b"\0" * 4), WEIGHT_FILE),
    case("header length huge", "base", edit(UNET, lambda b: b"\xff" * 8 + b[8:]), WEIGHT_FILE),
    case("header length 0", "base", edit(UNET, lambda b: b"\0" * 8 + b[8:]), WEIGHT_FILE),
    case("header no JSON", "base", edit(UNET, lambda b: b[:8] + b"{nope" + b[13:]), WEIGHT_FILE),
    case("header a list", "base", header(UNET, lambda rows: [1, 2]), WEIGHT_FILE),
    case("a web page instead", "base", put(UNET, b"<!DOCTYPE html><html>Not found</html>"), WEIGHT_FILE),
    case("a pointer instead", "base", put(UNET, b"version https://git-lfs.github.com/spec/v1\n"), POINTER),
    case("overlapping offsets", "base", header(UNET, overlapping), WEIGHT_FILE),
    case("offsets behind the end", "base", header(UNET, offsets(KERNEL, 10**9, 10**9 + 3456)), WEIGHT_FILE),
    case("negative offsets", "base", header(UNET, offsets(KERNEL, -3456, 0)), WEIGHT_FILE),
    # Tensors that are not those of the configuration.
    case("tensor renamed", "base", state(UNET, renamed), rf"{ANOTHER}missing {KERNEL}; unexpected conv_inn\.weight"),
    case("tensor removed", "base", state(UNET, lambda s: s.pop(KERNEL)), rf"{ANOTHER}missing {KERNEL}"),
    case("tensor added", "base", state(UNET, lambda s: s.update(x=np.ones(2, "f4"))), rf"{ANOTHER}unexpected x"),
    case(
        "wrong shape", "base", state(UNET, replaced(KERNEL, lambda x: x[:5])), rf"{ANOTHER}{KERNEL} has shape \(5, 3, 3"
    ),
    case(
        "transposed shape",
        "base",
        state(UNET, replaced("add_embedding.proj.weight", lambda x: x.reshape(16, 64))),
        rf"{ANOTHER}add_embedding\.proj\.weight has shape \(16, 64\); the configuration says \(32, 32\)",
    ),
    case("not a number", "base", state(UNET, value(KERNEL, np.nan)), rf"{KERNEL} holds values that are not finite"),
    case("infinite", "base", state(TEXT, value("shared.weight", np.inf)), r"shared\.weight holds values that are not"),
    case("whole numbers", "base", state(UNET, replaced(KERNEL, lambda x: x.astype("i4"))), f"{OF_TYPE} I32"),
    case("double precision", "base", state(UNET, replaced(KERNEL, lambda x: x.astype("f8"))), f"{OF_TYPE} F64"),
    case(
        "two embeddings that differ",
        "base",
        state(TEXT, lambda s: s.update({"encoder.embed_tokens.weight": s["shared.weight"] + 1})),
        r"text_encoder: encoder\.embed_tokens\.weight and shared\.weight differ",
    ),
    case("too large for half", "base", state(UNET, value(KERNEL, 1e6)), rf"{KERNEL}: .*float16", "--dtype", "float16"),
    case("weights missing", "base", gone(UNET), UNET),
    case("weights a folder", "base", lambda f: (gone(UNET)(f), (f / UNET).mkdir()), UNET),
    # Configurations.
    case("config missing", "base", gone("unet/config.json"), r"unet/config\.json: the release lacks this file"),
    case("config no JSON", "base", put("unet/config.json", b"{'a': 1}"), r"unet/config\.json: not readable as JSON"),
    case("config no UTF-8", "base", put("unet/config.json", b"\xff\xfe{}"), r"unet/config\.json: not readable as JSON"),
    case("config a list", "base", put("unet/config.json", b"[]"), r"unet/config\.json: holds a JSON list"),
    case("other widths", "base", told("unet/config.json", block_out_channels=[64]), rf"{ANOTHER} has shape"),
    case("other depth", "base", told("unet/config.json", layers_per_block=[2]), rf"{ANOTHER}missing down_blocks"),
    case("unknown activation", "base", told("unet/config.json", act_fn="relu"), r"act_fn='relu' \(must be 'gelu'\)"),
    case("missing key", "base", told("unet/config.json", encoder_hid_dim=...), "configuration lacks encoder_hid_dim"),
    case("unknown key", "base", told("unet/config.json", warp_drive=True), r"warp_drive=True \(unknown\)"),
    case("number for a list", "base", told("unet/config.json", block_out_channels=32), r"unet/config\.json: a value"),
    case("string for a number", "base", told("unet/config.json", sample_size="8"), r"unet/config\.json: a value is of"),
    case(
        "float for a number", "base", told("unet/config.json", encoder_hid_dim=32.0), r"encoder_hid_dim=32\.0 must be"
    ),
    case("heads that do not fit", "base", told("unet/config.json", attention_head_dim=24), "multiple of 24"),
    case("other kind of net", "later", told("model_index.json", _class_name="IFPipeline"), "of the other kind"),
    case("scheduler missing", "base", gone("scheduler"), r"scheduler/scheduler_config\.json: the release lacks"),
    case("scheduler no JSON", "base", put("scheduler/scheduler_config.json", b""), r"scheduler_config\.json: not read"),
    case(
        "linear schedule",
        "base",
        told("scheduler/scheduler_config.json", beta_schedule="linear"),
        "beta_schedule is 'linear'",
    ),
    case(
        "fixed variance",
        "base",
        told("scheduler/scheduler_config.json", variance_type="fixed_large"),
        "variance_type is 'fixed_large'",
    ),
    case(
        "ceiling in words",
        "base",
        told("scheduler/scheduler_config.json", sample_max_value="1.5"),
        r"scheduler_config\.json: a value",
    ),
    case("index missing", "base", gone("model_index.json"), r"no model; expected cascade\.json, model_index\.json"),
    case("index no JSON", "base", put("model_index.json", b"\0\0"), r"model_index\.json: not readable as JSON"),
    case(
        "another pipeline",
        "base",
        told("model_index.json", _class_name="StableDiffusionPipeline"),
        "holds a StableDiffusionPipeline, expected one of .*IFPipeline",
    ),
    case("index of numbers", "base", told("model_index.json", text_encoder=5), "text_encoder"),
    # Text encoder and tokenizer.
    case(
        "text width", "base", told("text_encoder/config.json", d_model=48), "text_encoder: the weights are of another"
    ),
    case("text of another width", "base", wider_text, r"/source: .*width 48 \(d_model\).* 32 \(encoder_hid_dim\)"),
    case("other text model", "base", told("text_encoder/config.json", model_type="bert"), "model_type='bert'"),
    case(
        "plain feed-forward",
        "base",
        told("text_encoder/config.json", feed_forward_proj="relu"),
        r"text_encoder/config\.json: .*feed_forward_proj='relu' \(must be 'gated-gelu'\)",
    ),
    case("text lacks a key", "base", told("text_encoder/config.json", d_kv=...), "T5 configuration lacks d_kv"),
    case(
        "text key a string",
        "base",
        told("text_encoder/config.json", num_layers="1"),
        r"text_encoder/config\.json: a value",
    ),
    case("text encoder missing", "base", gone("text_encoder"), r"text_encoder/config\.json: the release lacks"),
    case("tokenizer missing", "base", gone("tokenizer"), 'tokenizer" does not exist'),
    case(
        "tokenizer no JSON",
        "base",
        put("tokenizer/tokenizer_config.json", b"{"),
        r'tokenizer_config\.json" is not a JSON object',
    ),
    case(
        "other tokenizer",
        "base",
        told("tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizer"),
        "is a CLIPTokenizer",
    ),
    case(
        "broken spiece",
        "base",
        lambda f: (
            told("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer")(f),
            put("tokenizer/spiece.model", b"nothing")(f),
        ),
        r'spiece\.model" is not a SentencePiece model',
    ),
    case("more ids than rows", "base", short_table, "tokenizer has 384 ids, the text encoder's table 300 rows"),
    case("text alone cut", "text", edit("model.safetensors", lambda b: b[:-2]), r"model\.safetensors: not a whole"),
    case("text alone without tokens", "text", gone("tokenizer_config.json"), "spiece.model or tokenizer.json"),
    # Shards.
    case("shard missing", "shards", lost_shard, r"model-00002-of-\d+\.safetensors: the release lacks this file"),
    case("shard cut", "shards", lambda f: edit(shard(f, 2), lambda b: b[:-9])(f), "model-00003-of-.*not a whole"),
    case("no weight map", "shards", told(INDEX, weight_map=...), r"index\.json: has no weight_map"),
    case("map of numbers", "shards", told(INDEX, weight_map={KERNEL: 5}), r"index\.json: .*weight_map"),
    case("absent tensor", "shards", index_lists(["ghost"]), r"-00001-of-\d+\.safetensors: lacks ghost, which .*index"),
    case("unlisted tensor", "shards", unlisted_tensor, r"index\.json: does not list surplus"),
    case("tensor in two shards", "shards", tensor_in_two_shards, "model-00002-of-.*: holds .*, which another shard"),
    # PyTorch files.
    case("bin cut", "bin", edit(UNET_BIN, lambda b: b[: len(b) // 2]), NOT_WHOLE_BIN),
    case("bin cut to its mark", "bin", edit(UNET_BIN, lambda b: b[:4]), NOT_WHOLE_BIN),
    case("bin empty", "bin", put(UNET_BIN, b""), r"\.bin: no PyTorch file"),
    case("bin garbage", "bin", put(UNET_BIN, b"garbage" * 99), r"\.bin: no PyTorch file"),
    case("bin of old", "bin", old_format, r"\.bin: no PyTorch file, or older than PyTorch 1\.6"),
    case("bin a list", "bin", torch_state(UNET_BIN, lambda s: list(s.values())), "something else than named tensors"),
    case("bin a tensor", "bin", torch_state(UNET_BIN, lambda s: s[KERNEL]), "something else than named tensors"),
    case("bin nested", "bin", torch_state(UNET_BIN, lambda s: {"state_dict": s}), "something else than named tensors"),
    case("bin numbered", "bin", torch_state(UNET_BIN, lambda s: dict(enumerate(s.values()))), "than named tensors"),
    case(
        "bin sparse",
        "bin",
        torch_state(UNET_BIN, lambda s: s.update({"conv_in.bias": s["conv_in.bias"].to_sparse()})),
        r"\.bin: conv_in\.bias",
    ),
    case(
        "bin in double precision",
        "bin",
        torch_state(UNET_BIN, lambda s: s.update({KERNEL: s[KERNEL].double()})),
        rf"\.bin: {KERNEL} is of type torch\.float64",
    ),
    # DeepFloyd's layout.
    case("yaml broken", "deepfloyd", put("config.yml", b"params: [1,\n  b: }"), r"config\.yml: not readable as YAML"),
    case("yaml a word", "deepfloyd", put("config.yml", b"nothing"), r"config\.yml: holds no settings"),
    case("yaml with code", "deepfloyd", put("config.yml", b"!!python/object/apply:os.getcwd []"), r"config\.yml: not"),
    case("unknown argument", "deepfloyd", params(warp_drive=1), r"config\.yml: .*warp_drive=1 \(unknown\)"),
    case("argument missing", "deepfloyd", params(model_channels=...), r"config\.yml: .*lacks model_channels"),
    case("argument of words", "deepfloyd", params(model_channels="wide"), r"config\.yml: .*'wide'"),
    case("params a list", "deepfloyd", put("config.yml", b"params: [1, 2]"), r"config\.yml"),
    case("without weights", "deepfloyd", gone("pytorch_model.bin"), r"pytorch_model\.bin: the release lacks this"),
    case(
        "tensor lost",
        "deepfloyd",
        torch_state("pytorch_model.bin", lambda s: {name: s[name] for name in s if name != "out.2.bias"}),
        r"pytorch_model\.bin: .*missing out\.2\.bias",
    ),
    case(
        "surplus tensor",
        "deepfloyd",
        torch_state("pytorch_model.bin", lambda s: s.update(x=torch.zeros(1))),
        r"pytorch_model\.bin: .*unexpected x",
    ),
    case(
        "other shape",
        "deepfloyd",
        torch_state("pytorch_model.bin", lambda s: s.update({"out.2.bias": torch.zeros(7)})),
        r"out\.2\.bias has shape \(7,\) where config\.yml says \(6,\)",
    ),
    case(
        "not a number in deepfloyd",
        "deepfloyd",
        torch_state("pytorch_model.bin", lambda s: s.update({"out.2.bias": torch.full([6], torch.nan)})),
        r"conv_out\.bias holds values that are not finite",
    ),
    case("bin of deepfloyd cut", "deepfloyd", edit("pytorch_model.bin", lambda b: b[:-100]), NOT_WHOLE_BIN),
    case("beside no JSON", "deepfloyd", put("if_jax.json", b"{"), r"if_jax\.json: not readable as JSON"),
    case(
        "beside of words",
        "deepfloyd",
        told("if_jax.json", scheduler="linear"),
        r"if_jax\.json: a value is of the wrong type",
    ),
    case(
        "beside another schedule",
        "deepfloyd",
        told("if_jax.json", scheduler={"thresholding": True}),
        r"if_jax\.json: scheduler beta_schedule is 'linear'",
    ),
    case("t5 incomplete", "deepfloyd", gone("t5/config.json"), r"t5/config\.json: the release lacks"),
    case("stage of deepfloyd lost", "deepfloyd_cascade", gone("stage_II"), r"stage_II/config\.yml: the release lacks"),
    case("no stages", "deepfloyd_cascade", told("if_jax.json", stages=...), r"if_jax\.json: a stage lacks its folder"),
    case("stages of words", "deepfloyd_cascade", told("if_jax.json", stages=["I"]), r"if_jax\.json: a stage lacks"),
    # Cascades.
    case("weights changed", "cascade", weights_of_another_day, f"stage_II/{UNET}: not the weights this cascade was"),
    case("stage missing", "cascade", gone("stage_II"), f"stage_II/{UNET}: the release lacks"),
    case("cascade no JSON", "cascade", put("cascade.json", b"]"), r"cascade\.json: not readable as JSON"),
    case("cascade of tomorrow", "cascade", told("cascade.json", format=2), r"cascade\.json: format 2 is unknown"),
    case("stages a word", "cascade", told("cascade.json", stages="I"), r"cascade\.json: a stage lacks"),
    case(
        "hashes lost",
        "cascade",
        cascade_json(lambda c: c["stages"][0].update(sha256=None)),
        r"cascade\.json: a stage lacks",
    ),
    case(
        "defaults lost",
        "cascade",
        cascade_json(lambda c: c["stages"][1]["defaults"].pop("noise_level")),
        r"cascade\.json: a stage lacks .*noise_level",
    ),
    case(
        "defaults in words",
        "cascade",
        cascade_json(lambda c: c["stages"][0]["defaults"].update(guidance_scale="high")),
        r"cascade\.json: guidance_scale='high' must be of type float",
    ),
    # What is asked for.
    case("no such folder", "base", lambda f: shutil.rmtree(f), "source: no such folder"),
    case("an empty folder", "base", lambda f: (shutil.rmtree(f), f.mkdir()), "source: no model; expected"),
    case("text from stage II", "base", nothing, r"later/text_encoder/config\.json", "--text-encoder", "LATER"),
    case("text into stage II", "later", nothing, "goes with a base stage", "--text-encoder", "TEXT"),
    case("text into a text", "text", nothing, "goes with a base stage", "--text-encoder", "TEXT"),
    case("text from nowhere", "base", nothing, "nowhere", "--text-encoder", "nowhere"),
    case("size in words", "base", nothing, "size 'much' is not understood", "--max-shard-size", "much"),
    case("size without unit", "base", nothing, "size '5' is not understood", "--max-shard-size", "5"),
    case("size zero", "base", nothing, "shard size is 0 bytes", "--max-shard-size", "0GB"),
    case("variant a path", "base", nothing, r"variant '\.\./x' cannot be part", "--variant", "../x"),
    case("variant empty", "base", nothing, "variant '' cannot be part", "--variant", ""),
]


@pytest.mark.parametrize(("source", "damage", "message", "args"), CASES)
def test_damage_is_one_line_and_the_destination_stays(healthy, destination, tmp_path, source, damage, message, args):
    folder = Path(shutil.copytree(healthy / source, tmp_path / "source"))
    damage(folder)
    before = everything_in(destination.parent)
    names = {"LATER": healthy / "later", "TEXT": healthy / "text"}
    result = convert(folder, destination, "--overwrite", *(names.get(arg, arg) for arg in args))
    assert_one_clear_line(result, message)
    assert everything_in(destination.parent) == before


class Trap:
    """Unpickled, it makes a folder: code in a file of weights."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("save", "load"),
    [(torch.save, partial(torch.load, weights_only=False)), (pickle.dump, pickle.load)],
    ids=["torch", "pickle"],
)
@pytest.mark.parametrize(("source", "file"), [("bin", UNET_BIN), ("deepfloyd", "pytorch_model.bin")])
def test_code_in_a_file_of_weights_is_refused_unrun(healthy, destination, tmp_path, source, file, save, load):
    folder, sprung = Path(shutil.copytree(healthy / source, tmp_path / "source")), tmp_path / "sprung"
    with open(folder / file, "wb") as opened:
        save({KERNEL: 1, "trap": Trap(sprung)}, opened)
    with open(folder / file, "rb") as opened:
        load(opened)
    assert sprung.exists()  # the trap works ...
    sprung.rmdir()
    before = everything_in(destination.parent)
    assert_one_clear_line(convert(folder, destination, "--overwrite"), rf"{file}: ")
    assert not sprung.exists()  # ... and is not sprung by us
    assert everything_in(destination.parent) == before


def test_destination_is_kept_unless_overwritten(healthy, destination):
    before = everything_in(destination.parent)
    assert_one_clear_line(convert(healthy / "base", destination), f"{destination} exists already")
    assert everything_in(destination.parent) == before


@pytest.mark.parametrize("source", ["base", "cascade", "text"])
def test_destination_that_is_no_release_is_never_overwritten(healthy, tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    before = everything_in(tmp_path)
    assert_one_clear_line(convert(healthy / source, tmp_path / "home", "--overwrite"), "home is not a release")
    assert everything_in(tmp_path) == before
    assert_one_clear_line(convert(healthy / source, tmp_path / "home/thesis.txt"), "thesis.txt exists already")
    assert_one_clear_line(convert(healthy / source, tmp_path / "home/thesis.txt/x"), "thesis.txt")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(("source", "layout"), [("base", "diffusers"), ("cascade", "diffusers"), ("base", "deepfloyd")])
def test_full_disk_leaves_the_destination(healthy, destination, monkeypatch, source, layout):
    calls = iter(range(10_000))

    def cast_until_full(*args, original=write_tensors.cast):
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(write_tensors, "cast", cast_until_full)
    before = everything_in(destination.parent)
    result = convert(healthy / source, destination, "--overwrite", "--to", layout)
    assert_one_clear_line(result, rf"no space left, .*{destination}$")
    assert everything_in(destination.parent) == before


def test_too_small_a_disk_is_found_out_before_writing(healthy, destination, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write_tensors.shutil, "disk_usage", lambda path: usage)
    before = everything_in(destination.parent)
    result = convert(healthy / "base", destination, "--overwrite", "--to", "deepfloyd")
    assert_one_clear_line(result, rf"no space left, .*{destination}$")
    assert everything_in(destination.parent) == before
