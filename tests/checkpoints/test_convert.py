"""Conversion between layouts: bit for bit there and back, opened by stock diffusers and transformers on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from click.testing import CliRunner

from if_jax.checkpoints import names, release
from if_jax.checkpoints.convert import open_model, stored_bytes, write_model
from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.checkpoints.stages import StageRelease
from if_jax.checkpoints.tensors import Lazy, Storage, read_tensors
from if_jax.checkpoints.weights import abstract_params
from if_jax.cli import main
from if_jax.models.presets import SCALE, UNETS
from if_jax.models.unet import UNetConfig

torch = pytest.importorskip("torch")

# Widths, layer lists and head sizes that no preset has, of a kind that DeepFloyd's layout can express.
WIDTHS = {
    "cross_attention_dim": 64,
    "encoder_hid_dim": 32,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 4,
}
BASE = UNetConfig(16, (32, 64, 96), (1, 2, 1), (False, True, True), time_embedding_dim=96, **WIDTHS)
LATER = UNetConfig(
    32,
    (32, 64),
    (2, 1),
    (False, True),
    in_channels=6,
    time_embedding_dim=64,
    aug_level_embedding=True,
    time_embedding_act=True,
    resnet_skip_time_act=True,
    resnet_out_scale_factor=SCALE,
    mid_block_scale_factor=SCALE,
    **WIDTHS,
)
SMALL = UNetConfig(16, (32,), (1,), (True,), time_embedding_dim=32, **WIDTHS)
CROSS_ONLY = replace(BASE, only_cross_attention=True, time_embedding_dim=None, block_out_channels=(32, 64, 128))
UNET, TEXT = "diffusion_pytorch_model", "model"


def odd_stages(**notes):
    """notes: what a published cascade says of its training in the headers."""
    base, later = tiny.stages()
    return (
        replace(base, unet_config=BASE, unet_params=tiny.random_params(BASE), notes=notes),
        replace(later, unet_config=LATER, unet_params=tiny.random_params(LATER), notes=notes),
    )


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def odd(request, tmp_path_factory):
    """A cascade of unusual nets, in every precision."""
    folder = tmp_path_factory.mktemp("odd") / request.param
    stages = odd_stages(recipe='{"batch_size": 8}', step="7")
    defaults = [replace(default, preserve_case=True) for default in tiny.DEFAULTS]
    release.write_cascade(folder, stages, defaults, storage=Storage(request.param), card="# odd\n")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same in float32."""
    folder = tmp_path_factory.mktemp("plain") / "cascade"
    release.write_cascade(folder, odd_stages(), tiny.DEFAULTS)
    return folder


@pytest.fixture(scope="module")
def bare(plain, tmp_path_factory):
    """A base stage as DeepFloyd published its own: config.yml and pytorch_model.bin, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    convert(plain / "stage_I", folder / "all", "deepfloyd")
    (folder / "stage").mkdir()
    for name in ("config.yml", "pytorch_model.bin"):
        shutil.copy(folder / "all" / name, folder / "stage")
    return folder / "stage"


@pytest.fixture(scope="module")
def text(plain, tmp_path_factory):
    """A T5 folder of its own, as transformers saves one."""
    folder = tmp_path_factory.mktemp("text") / "t5"
    shutil.copytree(plain / "stage_I/text_encoder", folder)
    return Path(shutil.copytree(plain / "stage_I/tokenizer", folder, dirs_exist_ok=True))


def convert(source, destination, layout, *args):
    result = CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", layout, *map(str, args)])
    assert result.exit_code == 0, result.output
    return destination


def refusal(source, destination, layout, *args):
    result = CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", layout, *map(str, args)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    return next(line for line in result.output.splitlines() if line.startswith("Error: "))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(a, b, but=()):
    one, two = contents(a), contents(b)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name] and name not in but] == []


def tensors(folder, stem):
    return {name: np.asarray(tensor) for name, tensor in read_tensors(folder, stem)[0].items()}


def assert_same_tensors(one, two):
    """Equal to the bit, in the same precision."""
    assert one.keys() == two.keys()
    unlike = [name for name in one if one[name].dtype != two[name].dtype or one[name].tobytes() != two[name].tobytes()]
    assert unlike == [] and all(one[name].shape == two[name].shape for name in one)


def torch_tensors(path):
    """What PyTorch itself reads from a .bin file, as bits."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in torch.load(path, weights_only=True).items()
    }


@pytest.mark.parametrize("part", ["", "stage_I", "stage_II"])
def test_from_diffusers_to_deepfloyd_and_back_not_a_byte_changes(odd, tmp_path, part):
    convert(odd / part, tmp_path / "there", "deepfloyd")
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert_same_files(odd / part, tmp_path / "back")


@pytest.mark.parametrize("part", ["", "stage_I", "stage_II"])
def test_from_deepfloyd_to_diffusers_and_back_no_tensor_changes(odd, tmp_path, part):
    convert(odd / part, tmp_path / "there", "deepfloyd")
    convert(tmp_path / "there", tmp_path / "between", "diffusers")
    convert(tmp_path / "between", tmp_path / "back", "deepfloyd")
    weights = [str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("pytorch_model.bin")]
    assert len(weights) == (1 if part else 2)
    assert_same_files(tmp_path / "there", tmp_path / "back", but=weights)
    for name in weights:
        assert torch_tensors(tmp_path / "there" / name) == torch_tensors(tmp_path / "back" / name)
        assert list(torch.load(tmp_path / "there" / name, weights_only=True)) == list(
            torch.load(tmp_path / "back" / name, weights_only=True)
        )


def test_what_deepfloyd_published_comes_back_with_nothing_changed(bare, tmp_path):
    convert(bare, tmp_path / "there", "diffusers")
    convert(tmp_path / "there", tmp_path / "back", "deepfloyd")
    assert torch_tensors(bare / "pytorch_model.bin") == torch_tensors(tmp_path / "back/pytorch_model.bin")
    assert (bare / "config.yml").read_bytes() == (tmp_path / "back/config.yml").read_bytes()
    assert release.read_stage(tmp_path / "there").scheduler == SchedulerConfig(1.5)  # IF's own, where none is told


@pytest.mark.parametrize("config", [CROSS_ONLY, replace(BASE, layers_per_block=(3, 1, 2), attention_head_dim=32)])
def test_other_nets_come_back_as_they_were(config, tmp_path):
    stage = replace(tiny.stages()[0], unet_config=config, unet_params=tiny.random_params(config))
    release.write_stage(tmp_path / "here", stage)
    convert(tmp_path / "here", tmp_path / "there", "deepfloyd")
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert_same_files(tmp_path / "here", tmp_path / "back")
    assert open_model(tmp_path / "there").stages[0].unet_config == config


@pytest.mark.parametrize("stages", [odd_stages, tiny.stages])
def test_shards_and_back_not_a_byte_changes(stages, tmp_path):
    release.write_cascade(tmp_path / "here", stages(), tiny.DEFAULTS)
    convert(tmp_path / "here", tmp_path / "shards", "diffusers", "--max-shard-size", "100KB")
    assert len(list((tmp_path / "shards/stage_I/unet").glob("*-of-*.safetensors"))) > 3
    convert(tmp_path / "shards", tmp_path / "back", "diffusers")
    assert_same_files(tmp_path / "here", tmp_path / "back")


def test_text_encoder_alone(text, tmp_path):
    convert(text, tmp_path / "again", "diffusers")
    assert_same_files(text, tmp_path / "again")
    convert(
        text, tmp_path / "shards", "diffusers", "--max-shard-size", "20KB", "--variant", "bf16", "--dtype", "bfloat16"
    )
    convert(tmp_path / "shards", tmp_path / "whole", "diffusers")
    for name, tensor in tensors(tmp_path / "whole", TEXT).items():
        assert np.array_equal(tensor, tensors(text, TEXT)[name].astype(jnp.bfloat16)), name
    assert "text encoder, which DeepFloyd reads as it is" in refusal(text, tmp_path / "no", "deepfloyd")


def test_text_encoder_is_joined_to_a_stage_that_has_none(plain, bare, text, tmp_path):
    convert(bare, tmp_path / "alone", "diffusers")
    assert open_model(tmp_path / "alone").stages[0].text_params is None
    for source in (text, plain, plain / "stage_I"):
        joined = convert(bare, tmp_path / f"with_{source.name}", "diffusers", "--text-encoder", source)
        assert_same_files(joined, plain / "stage_I")
    convert(bare, tmp_path / "beside", "deepfloyd", "--text-encoder", text)
    assert_same_files(tmp_path / "beside/t5", text)


def test_transformers_opens_the_text_encoder_beside_a_deepfloyd_stage(odd, tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    folder = convert(odd / "stage_I", tmp_path / "there", "deepfloyd") / "t5"
    with warnings.catch_warnings():  # `dtype` is the newer word, which the oldest transformers do not know
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        model = T5EncoderModel.from_pretrained(folder, torch_dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors(odd / "stage_I/text_encoder", TEXT).items():
        assert np.array_equal(state[name], tensor.astype(np.float32)), name
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "ByT5Tokenizer"


def test_half_precision_shards_of_a_variant_open_everywhere(plain, tmp_path):
    folder = tmp_path / "half"
    convert(plain, folder, "diffusers", "--max-shard-size", "100KB", "--variant", "fp16", "--dtype", "float16")
    base, later = folder / "stage_I", folder / "stage_II"
    assert (base / f"unet/{UNET}.safetensors.index.fp16.json").is_file()
    shards = list((base / "unet").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.name.startswith(f"{UNET}.fp16-") for path in shards)
    assert all(path.stat().st_size < 120_000 for path in shards if len(tensors_in(path)) > 1)
    for part, stem in (("unet", UNET), ("text_encoder", TEXT)):
        full = tensors(plain / "stage_I" / part, stem)
        for name, tensor in tensors(base / part, stem).items():
            kept = name.endswith("DenseReluDense.wo.weight")
            assert tensor.dtype == (np.float32 if kept else np.float16)
            assert np.array_equal(tensor, full[name] if kept else full[name].astype(np.float16)), name
    for stage in (base, later):
        pipeline = tiny.open_in_diffusers(stage, variant="fp16")
        for name, tensor in tensors(stage / "unet", UNET).items():
            assert np.array_equal(pipeline.unet.state_dict()[name].numpy(), tensor.astype(np.float32)), name


def tensors_in(path):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


@pytest.mark.parametrize("size", ["10GB", "100KB"])
def test_bin_files_that_diffusers_writes(plain, tmp_path, size):
    pipeline = tiny.open_in_diffusers(plain / "stage_I")
    pipeline.save_pretrained(tmp_path / "bins", safe_serialization=False, max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "bins/unet").glob("*.bin*"))
    assert files == [f"{UNET}.bin"] if size == "10GB" else f"{UNET}.bin.index.json" in files and len(files) > 3
    convert(tmp_path / "bins", tmp_path / "again", "diffusers")
    for part, stem in (("unet", UNET), ("text_encoder", TEXT)):
        assert_same_tensors(tensors(tmp_path / "again" / part, stem), tensors(plain / "stage_I" / part, stem))


def test_bin_files_of_transformers(text, tmp_path):
    """Under transformers' other name for them, whole and in shards, with the tied table stored twice."""
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors(text, TEXT).items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    parts = {"a.bin": dict(list(state.items())[:3]), "b.bin": dict(list(state.items())[3:])}
    whole, shards = (Path(shutil.copytree(text, tmp_path / name)) for name in ("whole", "shards"))
    for folder in (whole, shards):
        (folder / "model.safetensors").unlink()
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, whole / "pytorch_model.bin")
    for name, part in parts.items():
        torch.save(part, shards / name)
    listed = {name: file for file, part in parts.items() for name in part}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    for folder in (whole, shards):
        convert(folder, tmp_path / f"from_{folder.name}", "diffusers")
        assert_same_files(tmp_path / f"from_{folder.name}", text)  # the identity is computed anew, and is the same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_stays_on_the_way_through_bin_and_safetensors(plain, tmp_path, dtype):
    convert(plain / "stage_II", tmp_path / "half", "diffusers", "--dtype", dtype)
    convert(tmp_path / "half", tmp_path / "there", "deepfloyd")
    state = torch.load(tmp_path / "there/pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    precision = yaml.safe_load((tmp_path / "there/config.yml").read_text())["params"]["precision"]
    assert precision == {"float16": "16", "bfloat16": "bf16"}[dtype]
    found = tensors(convert(tmp_path / "there", tmp_path / "back", "diffusers") / "unet", UNET)
    assert_same_tensors(found, tensors(tmp_path / "half/unet", UNET))
    rounded = {n: t.astype(getattr(jnp, dtype)) for n, t in tensors(plain / "stage_II/unet", UNET).items()}
    assert_same_tensors(found, rounded)


def test_bfloat16_widens_without_loss(plain, tmp_path):
    convert(plain / "stage_II", tmp_path / "half", "diffusers", "--dtype", "bfloat16")
    convert(tmp_path / "half", tmp_path / "wide", "deepfloyd", "--dtype", "float32")
    convert(tmp_path / "wide", tmp_path / "half_again", "diffusers", "--dtype", "bfloat16")
    assert_same_files(tmp_path / "half", tmp_path / "half_again")


def test_components_that_are_not_ours_are_carried_along(plain, tmp_path):
    source = Path(shutil.copytree(plain / "stage_I", tmp_path / "source"))
    carried = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"],
    }
    for name in carried:
        (source / name).mkdir()
        (source / name / "weights.bin").write_bytes(name.encode())
    index = json.loads((source / "model_index.json").read_text()) | carried | {"requires_safety_checker": True}
    (source / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    assert_same_files(source, convert(source, tmp_path / "copy", "diffusers"))


def test_components_without_their_folder_are_left_out(plain, tmp_path):
    source = Path(shutil.copytree(plain / "stage_I", tmp_path / "source"))
    index = json.loads((source / "model_index.json").read_text())
    index |= {"safety_checker": ["deepfloyd_if", "IFSafetyChecker"]}
    (source / "model_index.json").write_text(json.dumps(index))
    assert_same_files(plain / "stage_I", convert(source, tmp_path / "copy", "diffusers"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 8}, "norm_num_groups=8"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"time_embedding_dim": 128}, "time_embedding_dim=128"),
        ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor=2.0"),
        ({"cross_attention_dim": 32}, "cross_attention_dim=32"),
    ],
)
def test_what_deepfloyd_cannot_express_is_named_and_nothing_written(change, message, tmp_path):
    config = replace(SMALL, **change)
    stage = replace(tiny.stages()[0], unet_config=config, unet_params=tiny.random_params(config))
    release.write_stage(tmp_path / "here", stage)
    line = refusal(tmp_path / "here", tmp_path / "there", "deepfloyd")
    assert "DeepFloyd's layout cannot express" in line and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_deepfloyd_is_one_file(plain, tmp_path):
    for args in (("--max-shard-size", "1MB"), ("--variant", "fp16")):
        assert "one pytorch_model.bin" in refusal(plain, tmp_path / "there", "deepfloyd", *args)
    assert not list(tmp_path.iterdir())


def test_one_matrix_of_two_precisions_asks_for_one(plain, tmp_path):
    """DeepFloyd keeps queries, keys and values in one tensor; a diffusers file may store each as it likes."""
    from safetensors.numpy import load_file, save_file

    source = Path(shutil.copytree(plain / "stage_I", tmp_path / "source"))
    path = source / f"unet/{UNET}.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("to_q.weight"))
    save_file(state | {name: state[name].astype(np.float16)}, path)
    line = refusal(source, tmp_path / "there", "deepfloyd")
    assert name in line and "float16 and float32" in line and "--dtype" in line
    convert(source, tmp_path / "there", "deepfloyd", "--dtype", "float32")
    assert tensors(convert(source, tmp_path / "kept", "diffusers") / "unet", UNET)[name].dtype == np.float16


def test_header_tells_the_hash_of_the_content(plain, tmp_path):
    folder = convert(plain, tmp_path / "c", "diffusers", "--max-shard-size", "100KB", "--dtype", "bfloat16")
    paths = list(folder.rglob("*.safetensors"))
    assert len(paths) > 6
    for path in paths:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        assert metadata["content_sha256"] == hashlib.sha256(content[8 + length :]).hexdigest()
        assert metadata["format"] == "pt" and not (8 + length) % 8


@pytest.mark.parametrize("layout", ["diffusers", "deepfloyd"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_progress_counts_every_byte_of_every_tensor(plain, tmp_path, layout, dtype):
    model, seen = open_model(plain), []
    write_model(model, tmp_path / "there", layout, Storage(dtype), progress=seen.append)
    total = stored_bytes(model, Storage(dtype))
    assert sum(seen) == total
    if layout == "diffusers":
        sizes = [
            sum(t.nbytes for t in tensors(path.parent, path.stem).values())
            for path in (tmp_path / "there").rglob("*.safetensors")
        ]
        assert sum(sizes) == total


def file_names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IF-I-M", "IF-II-L"])
def test_full_size_nets_come_back_with_nothing_changed(name, tmp_path):
    """Up to 2.5 GB a copy, three copies at a time; a tensor at a time in memory."""
    config = UNETS[name]
    kind = "super-resolution" if config.aug_level_embedding else "base"
    shapes, tree = jax.tree.flatten(abstract_params(config))

    def lazy(seed, shape):
        def read():
            values = np.random.default_rng(seed).standard_normal(shape, np.float32)
            return (values * 0.02).astype(np.float16)

        return Lazy(shape, np.dtype(np.float16), read)

    params = jax.tree.unflatten(tree, [lazy(seed, leaf.shape) for seed, leaf in enumerate(shapes)])
    stage = StageRelease(kind, config, params, SchedulerConfig(1.5 if kind == "base" else 1.0))
    release.write_stage(tmp_path / "here", stage, Storage(None))
    written = {path: digest(tmp_path / "here" / path) for path in file_names(tmp_path / "here")}
    convert(tmp_path / "here", tmp_path / "there", "deepfloyd")
    shutil.rmtree(tmp_path / "here")
    found = open_model(tmp_path / "there").stages[0]
    assert found.unet_config == config and found.kind == kind
    count = sum(int(np.prod(tensor.shape)) for tensor in names.lazy_torch(found.unet_params, "unet").values())
    assert count == sum(int(np.prod(leaf.shape)) for leaf in shapes)
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert {path: digest(tmp_path / "back" / path) for path in file_names(tmp_path / "back")} == written
    for name in ("there", "back"):  # pytest keeps the folders of its last runs
        shutil.rmtree(tmp_path / name)


def test_without_pytorch_the_line_says_so(plain, bare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "writing .bin files needs PyTorch" in refusal(plain / "stage_I", tmp_path / "there", "deepfloyd")
    assert "reading .bin files needs PyTorch" in refusal(bare, tmp_path / "there", "diffusers")
    assert not (tmp_path / "there").exists()
