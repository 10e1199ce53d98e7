"""Releases: what is written is read back, stock diffusers opens it, and what does not fit is refused in one line."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from if_jax.checkpoints import names, release, write_tensors
from if_jax.checkpoints.scheduler import SchedulerConfig, scheduler_from_diffusers, scheduler_to_diffusers
from if_jax.checkpoints.stages import IF_DEFAULTS, check_stages
from if_jax.checkpoints.tensors import Storage
from if_jax.models.unet import UNet


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "cascade"
    release.write_cascade(folder, tiny.stages(), tiny.DEFAULTS)
    return folder


@pytest.fixture
def copy(cascade, tmp_path):
    return Path(shutil.copytree(cascade, tmp_path / "copy"))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_round_trip_is_exact(cascade):
    written, (read, defaults) = tiny.stages(), release.read_cascade(cascade)
    for before, after in zip(written, read, strict=True):
        assert (after.kind, after.unet_config, after.scheduler) == (before.kind, before.unet_config, before.scheduler)
        assert equal(before.unet_params, after.unet_params)
    assert read[0].text_config == tiny.TEXT and equal(read[0].text_params, written[0].text_params)
    assert np.array_equal(read[0].tokenizer(["a cube"])[0], written[0].tokenizer(["a cube"])[0])
    assert read[1].text_params is None and read[1].tokenizer is None
    assert tuple(defaults) == tiny.DEFAULTS


def test_text_encoder_alone(cascade):
    for folder in (cascade, cascade / "stage_I"):
        text = release.read_text_encoder(folder)
        assert text.config == tiny.TEXT and equal(text.params, tiny.stages()[0].text_params)
        assert text.sha256 == release.text_encoder_sha256(text.params)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stock_diffusers_opens_the_folders_in_float32(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    release.write_cascade(tmp_path / "c", tiny.stages(), tiny.DEFAULTS, storage=Storage(dtype))
    for name, kind in (("I", IFPipeline), ("II", IFSuperResolutionPipeline)):
        folder = tmp_path / f"c/stage_{name}"
        pipeline = tiny.open_in_diffusers(folder)
        assert type(pipeline) is kind and pipeline.unet.dtype == torch.float32
        stage = release.read_stage(folder)
        assert_same_weights(stage.unet_params, "unet", pipeline.unet)
        if name == "I":
            assert type(pipeline.tokenizer).__name__ == "ByT5Tokenizer"
            assert_same_weights(stage.text_params, "t5", pipeline.text_encoder)
            wo = stage.text_params["encoder"]["block_0"]["layer_1"]["DenseReluDense"]["wo"]["kernel"]
            full = tiny.stages()[0].text_params["encoder"]["block_0"]["layer_1"]["DenseReluDense"]["wo"]["kernel"]
            assert np.array_equal(wo, full) == (dtype != "bfloat16")  # transformers keeps it float32 beside float16
        else:
            assert pipeline.text_encoder is None and pipeline.tokenizer is None
            assert pipeline.image_noising_scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert pipeline.scheduler.config.sample_max_value == stage.scheduler.sample_max_value
        assert pipeline.scheduler.config.thresholding and pipeline.scheduler.config.variance_type == "learned_range"


def assert_same_weights(params, kind, module):
    theirs = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    ours = dict(names.to_torch(params, kind))
    assert theirs.keys() - ours.keys() <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    for name, tensor in ours.items():
        assert theirs[name].dtype == np.float32 and np.array_equal(theirs[name], tensor), name


def test_half_precision_halves_the_file_and_rounds_once(tmp_path):
    stage = tiny.stages()[1]
    for dtype in ("float32", "float16"):
        release.write_stage(tmp_path / dtype, stage, Storage(dtype))
    sizes = [(tmp_path / d / "unet/diffusion_pytorch_model.safetensors").stat().st_size for d in ("float16", "float32")]
    assert 0.49 < sizes[0] / sizes[1] < 0.53
    half = release.read_stage(tmp_path / "float16").unet_params
    assert equal(half, jax.tree.map(lambda w: w.astype(np.float16).astype(np.float32), stage.unet_params))
    # Read in half and written again, nothing is lost a second time.
    kept = release.read_stage(tmp_path / "float16", "float16")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept.unet_params)} == {np.dtype("float16")}
    release.write_stage(tmp_path / "again", kept, Storage("float16"))
    assert equal(release.read_stage(tmp_path / "again").unet_params, half)


@pytest.mark.parametrize(("factor", "message"), [(1e6, "does not fit float16"), (np.nan, "not diverged")])
def test_weights_that_cannot_be_released(tmp_path, factor, message):
    stage = tiny.stages()[1]
    params = jax.tree.map(lambda w: w * np.float32(factor), stage.unet_params)
    with pytest.raises(ValueError, match=message) as error:
        release.write_stage(tmp_path / "s", replace(stage, unet_params=params), Storage("float16"))
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    calls = iter(range(10_000))

    def cast_until_full(*args, original=write_tensors.cast):
        if next(calls) == 150:  # in the second network, after the first file is complete
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(write_tensors, "cast", cast_until_full)
    with pytest.raises(OSError, match="no space left") as error:
        release.write_cascade(tmp_path / "new/deep/cascade", tiny.stages(), tiny.DEFAULTS)
    assert error.value.errno == errno.ENOSPC and str(tmp_path / "new/deep/cascade") in one_line(error)
    assert not list(tmp_path.iterdir())


def test_existing_release_is_kept_unless_overwritten(copy, monkeypatch):
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    with pytest.raises(ValueError, match="exists already") as error:
        release.write_cascade(copy, tiny.stages(), tiny.DEFAULTS)
    assert str(copy) in one_line(error)
    with monkeypatch.context() as patched:  # a failure while overwriting leaves the old release as it was
        patched.setattr(write_tensors, "cast", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError):
            release.write_cascade(copy, tiny.stages(), tiny.DEFAULTS, overwrite=True)
    assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == before
    release.read_cascade(copy)
    other = [replace(row, guidance_scale=2.5) for row in tiny.DEFAULTS]
    release.write_cascade(copy, tiny.stages(), other, overwrite=True)
    assert release.read_cascade(copy)[1] == other
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_old_release_returns_when_the_new_one_cannot_take_its_place(copy, monkeypatch):
    rename = Path.rename

    def refuse_the_new_one(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "not allowed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(PermissionError):
        release.write_cascade(copy, tiny.stages(), tiny.DEFAULTS, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    release.read_cascade(copy)


def test_overwrite_spares_what_is_no_release(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a release") as error:
        release.write_cascade(tmp_path, tiny.stages(), tiny.DEFAULTS, overwrite=True)
    one_line(error)
    assert (tmp_path / "thesis.txt").exists()


def test_every_missing_file_is_named(copy):
    files = [path for path in copy.rglob("*.*") if path.is_file()]
    assert len(files) >= 12
    unread = {
        "image_noising_scheduler/scheduler_config.json"
    }  # its one schedule is known here; diffusers needs the file
    for path in files:
        if "/".join(path.parts[-2:]) in unread:
            continue
        hidden = path.with_name("hidden")
        path.rename(hidden)
        with pytest.raises(FileNotFoundError) as error:
            release.read_cascade(copy)
        assert path.name in one_line(error) or path.parent.name in one_line(error)
        hidden.rename(path)
    release.read_cascade(copy)


def test_missing_folder():
    with pytest.raises(FileNotFoundError, match="no such folder") as error:
        release.read_cascade("/nowhere/at/all")
    one_line(error)


def test_another_architecture_is_refused(copy):
    config = copy / "stage_I/unet/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"layers_per_block": [1, 2]}))
    with pytest.raises(ValueError, match="another architecture") as error:
        release.read_cascade(copy)
    assert "stage_I/unet" in one_line(error) and "down_blocks.1" in one_line(error)
    config.write_text(json.dumps(values | {"cross_attention_dim": 64}))
    with pytest.raises(ValueError, match=r"another architecture.* has shape"):
        release.read_cascade(copy)


def test_changed_or_cut_weights_are_refused(copy):
    path = copy / "stage_I/text_encoder/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="not the weights this cascade was written with") as error:
        release.read_cascade(copy)
    assert str(path) in one_line(error)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        release.read_stage(copy / "stage_I")
    assert str(path) in one_line(error)


def test_stage_of_another_text_encoder_is_refused(tmp_path, copy):
    base, later = tiny.stages()
    foreign = replace(later, text_encoder_sha256="0" * 64)
    with pytest.raises(ValueError, match="another text encoder") as error:
        release.write_cascade(tmp_path / "joined", [base, foreign], tiny.DEFAULTS)
    assert "stage II" in one_line(error) and "000000000000" in one_line(error)
    assert not (tmp_path / "joined").exists()
    # The same when a folder of another cascade is put in place by hand, with its hash written into cascade.json.
    release.write_stage(copy / "stage_II", foreign, overwrite=True)
    content = json.loads((copy / "cascade.json").read_text())
    content["stages"][1]["sha256"] = release._weight_hashes(copy / "stage_II")
    (copy / "cascade.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another text encoder"):
        release.read_cascade(copy)


def test_identity_of_the_text_encoder_survives_half_precision(tmp_path):
    base, later = tiny.stages()
    sha256 = release.text_encoder_sha256(base.text_params)
    release.write_cascade(
        tmp_path / "half", [base, replace(later, text_encoder_sha256=sha256)], tiny.DEFAULTS, storage=Storage("float16")
    )
    assert release.read_text_encoder(tmp_path / "half").sha256 == sha256
    stages, defaults = release.read_cascade(tmp_path / "half")
    assert {stage.text_encoder_sha256 for stage in stages} == {sha256}
    release.write_cascade(tmp_path / "again", stages, defaults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, later: [later, base], "first stage must be a base stage"),
        (lambda base, later: [base, base], "only the first may be"),
        (lambda base, later: [base, later, later], "draws 16 px, no more than"),
        (lambda base, later: [replace(base, tokenizer=None), later], "tokenizer"),
    ],
)
def test_stages_that_make_no_cascade(tmp_path, change, message):
    stages = change(*tiny.stages())
    with pytest.raises(ValueError, match=message) as error:
        release.write_cascade(tmp_path / "c", stages, [*tiny.DEFAULTS, tiny.DEFAULTS[1]][: len(stages)])
    one_line(error)


def test_first_stages_only_and_single_folder(cascade, copy):
    shutil.rmtree(copy / "stage_II")
    assert len(release.read_cascade(copy, stages=1)[0]) == 1
    stages, defaults = release.read_cascade(cascade / "stage_I")
    assert stages[0].kind == "base" and defaults == [IF_DEFAULTS[0]]
    with pytest.raises(ValueError, match="first stage must be a base stage"):
        release.read_cascade(cascade / "stage_II")


@pytest.mark.parametrize(
    "content", ["not json", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "stages": [{}]}']
)
def test_broken_cascade_json(copy, content):
    (copy / "cascade.json").write_text(content)
    with pytest.raises(ValueError, match=r"cascade\.json") as error:
        release.read_cascade(copy)
    one_line(error)


def test_reads_what_diffusers_writes_in_shards_and_half(cascade, tmp_path):
    torch = pytest.importorskip("torch")
    pipeline = tiny.open_in_diffusers(cascade / "stage_I")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "shards/unet/diffusion_pytorch_model.safetensors.index.json").exists()
    expected = tiny.stages()[0]
    read = release.read_stage(tmp_path / "shards")
    assert equal(read.unet_params, expected.unet_params) and equal(read.text_params, expected.text_params)
    assert read.scheduler == expected.scheduler
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = release.read_stage(tmp_path / "half").unet_params
    assert equal(half, jax.tree.map(lambda w: w.astype(np.float16).astype(np.float32), expected.unet_params))


def test_scheduler_files():
    published = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "dynamic_thresholding_ratio": 0.95,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.5,
        "thresholding": True,
        "variance_type": "learned_range",
    }
    assert scheduler_from_diffusers(published) == SchedulerConfig(1.5)
    for config in (
        SchedulerConfig(1.5),
        SchedulerConfig(1.0, prediction_type="v_prediction", trained_betas=(0.01,) * 1000),
    ):
        assert scheduler_from_diffusers(scheduler_to_diffusers(config)) == config
    clipped = scheduler_from_diffusers(published | {"thresholding": False})
    assert clipped.sample_max_value == 1.0
    wrong = [
        {"beta_schedule": "linear"},
        {"variance_type": "fixed_large"},
        {"prediction_type": "flow"},
        {"trained_betas": [0.1]},
        {"rescale_betas_zero_snr": True},
        {"thresholding": False, "clip_sample": False},
        {"sample_max_value": 0.5},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match=r"scheduler .*" + next(iter(change))) as error:
            scheduler_from_diffusers(published | change)
        one_line(error)


@pytest.mark.parametrize("carried", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_how_steps_are_spread_is_carried(carried):
    content = scheduler_to_diffusers(SchedulerConfig(1.5))
    assert not carried.keys() & content.keys()  # as IF publishes it
    assert scheduler_to_diffusers(scheduler_from_diffusers(content | carried)).items() >= carried.items()


def test_schedulers_of_another_class_are_refused_by_name(copy):
    content = scheduler_to_diffusers(SchedulerConfig(1.5))
    with pytest.raises(ValueError, match=r"scheduler is a PNDMScheduler, .*choose a sampler when drawing"):
        scheduler_from_diffusers(content | {"_class_name": "PNDMScheduler"})
    fixed = scheduler_from_diffusers(content | {"variance_type": "fixed_small"})  # of diffusers' DreamBooth script
    assert scheduler_to_diffusers(fixed)["variance_type"] == "fixed_small"
    change_json(copy / "stage_II/image_noising_scheduler/scheduler_config.json", beta_schedule="linear")
    with pytest.raises(ValueError, match=r"scheduler_config.json: image_noising_scheduler beta_schedule is 'linear'"):
        release.read_stage(copy / "stage_II", None)


@pytest.mark.parametrize("mode", ["Img2Img", "Inpainting"])
def test_pipelines_of_other_modes_are_ordinary_stages(copy, mode):
    change_json(copy / "stage_I/model_index.json", _class_name=f"IF{mode}Pipeline")
    change_json(copy / "stage_II/model_index.json", _class_name=f"IF{mode}SuperResolutionPipeline")
    read, _ = release.read_cascade(copy, None)
    assert [stage.kind for stage in read] == ["base", "super-resolution"]


def test_a_clone_without_git_lfs_is_named(copy):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4000000000\n"
    next((copy / "stage_I/unet").glob("*.safetensors")).write_text(pointer)
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, .*git lfs pull"):
        release.read_stage(copy / "stage_I", None)


def test_an_enlargement_is_a_whole_number():
    base, later = tiny.stages()
    later = replace(later, unet_config=replace(later.unet_config, sample_size=12))
    with pytest.raises(ValueError, match=r"stage II draws 12 px from 8, 1.5 times as much"):
        check_stages([base, later], tiny.DEFAULTS)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_what_is_ours_is_replaced(copy, tmp_path):
    def write(folder):
        release.write_stage(folder, tiny.stages()[1], overwrite=True)

    mine = tmp_path / "project"
    mine.mkdir()
    (mine / "config.yml").write_text("title: a project")
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a release"):
        write(mine)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt beside a release, which would be lost"):
        write(copy)
    link = tmp_path / "link"
    link.symlink_to(copy / "stage_II")
    with pytest.raises(ValueError, match="is a link: give the folder it leads to"):
        write(link)
    assert link.is_symlink() and (copy / "notes.txt").exists() and (mine / "thesis.tex").exists()


def test_stage_of_the_wrong_kind_is_refused():
    base, later = tiny.stages()
    with pytest.raises(ValueError, match="of the other kind"):
        replace(later, kind="base")
    with pytest.raises(ValueError, match="not trained together"):
        replace(base, text_config=replace(tiny.TEXT, d_model=48))


def test_abstract_params_are_those_of_init():
    from flax import linen as nn

    from if_jax.checkpoints.weights import abstract_params

    x = np.zeros((1, 8, 8, 3), np.float32)
    text = np.zeros((1, 5, 32), np.float32)
    made = jax.eval_shape(UNet(tiny.BASE).init, jax.random.key(0), x, np.zeros(1, np.int32), text)
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (nn.unbox(made)["params"], abstract_params(tiny.BASE))
    ]
    assert shapes[0] == shapes[1]
