"""Models from one layout to another, tensor by tensor: diffusers folders, cascades, T5 folders, DeepFloyd's own layout.

A model is opened without reading its weights, checked (every tensor used exactly once, every shape right), and written
again; what passes through memory is one tensor. The DeepFloyd layout is `config.yml` beside `pytorch_model.bin`, for
one stage. What it has no place for goes beside it, so that nothing is lost on the way back: `if_jax.json` (scheduler,
identity of the text encoder, defaults of a cascade) and `t5/` (the text encoder as transformers knows it).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from if_jax.checkpoints import deepfloyd, lora, names, release, words
from if_jax.checkpoints.deepfloyd_config import unet_config_from_deepfloyd, unet_config_to_deepfloyd
from if_jax.checkpoints.encoders import refuse_other_text
from if_jax.checkpoints.files import atomic_folder, parse_config, read_json, require_file, write_json
from if_jax.checkpoints.scheduler import SchedulerConfig, scheduler_from_diffusers, scheduler_to_diffusers
from if_jax.checkpoints.stages import (
    STAGE_NAMES,
    StageDefaults,
    StageRelease,
    TextEncoder,
    check_stages,
    defaults_row,
    read_defaults,
    stage_rows,
    with_hash,
    with_text,
)
from if_jax.checkpoints.tensors import BytesWritten, Lazy, Storage, read_bin, tensor_bytes
from if_jax.checkpoints.weights import abstract_params, stored_specs
from if_jax.checkpoints.write_tensors import write_bin

LAYOUTS = ("diffusers", "deepfloyd")
_CEILING = {"base": 1.5, "super-resolution": 1.0}  # of dynamic thresholding, in IF's own sampling code


@dataclass(frozen=True, eq=False)
class Model:
    """What a folder holds, opened: one stage, the stages of a cascade, or a text encoder alone."""

    folder: Path
    stages: tuple[StageRelease, ...]
    defaults: tuple[StageDefaults, ...] = ()  # of a cascade, one for each stage
    text: TextEncoder | None = None  # of a folder that holds a text encoder alone

    def networks(self) -> Iterator[tuple[str, names.Kind, Any, Any]]:
        """(name, kind, configuration, parameters) of every network."""
        for name, stage in zip(STAGE_NAMES, self.stages, strict=False):
            prefix = f"stage_{name}/" if self.defaults else ""
            yield f"{prefix}unet", "unet", stage.unet_config, stage.unet_params
            if stage.text_params is not None:
                yield f"{prefix}text_encoder", "t5", stage.text_config, stage.text_params
        if self.text is not None:
            yield "text_encoder", "t5", self.text.config, self.text.params


def open_model(folder: str | Path, text_encoder: str | Path | None = None) -> Model:
    """Open any folder that if_jax knows; nothing but headers is read.

    Args:
      folder: a cascade, a stage or a text encoder, in any layout.
      text_encoder: a T5 folder (or a release that has one), for a base stage that comes without.

    Returns:
      The model, its tensors unread.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: weights and configuration do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a model folder")
    model = _open(folder)
    if text_encoder is None:
        return model
    if not model.stages or model.stages[0].kind != "base":
        raise ValueError(f"{folder}: a text encoder goes with a base stage, and this folder has none")
    joined = with_text(model.stages[0], release.read_text_encoder(text_encoder, None))
    return replace(model, stages=(joined, *model.stages[1:]))


def with_merged(model: Model, loras: Mapping[str | Path, float]) -> Model:
    """The model with LoRA files baked into its weights.

    Args:
      model: an opened one.
      loras: file → weight, see `lora.with_loras`.

    Raises:
      FileNotFoundError, ValueError: as for `lora.with_loras`; or the model is a text encoder alone.
    """
    if not model.stages:
        raise ValueError(f"{model.folder} is a text encoder alone: a LoRA goes into a stage or a cascade")
    return replace(model, stages=tuple(lora.with_loras(model.stages, loras)))


def with_new_words(model: Model, files: Sequence[str | Path]) -> Model:
    """The model with the words of files in its text encoder.

    Args:
      model: an opened one.
      files: see `words.read_words`.

    Raises:
      FileNotFoundError, ValueError: as for `words.with_word_files`; or the model is a text encoder alone.
    """
    if not model.stages:
        raise ValueError(f"{model.folder} is a text encoder alone: new words go into a stage or a cascade")
    return replace(model, stages=tuple(words.with_word_files(model.stages, files)))


def write_model(
    model: Model,
    folder: str | Path,
    layout: str,
    storage: Storage,
    overwrite: bool = False,
    progress: BytesWritten | None = None,
) -> None:
    """Write a model as a folder, whole or not at all.

    Args:
      model: an opened one; its tensors are read one by one.
      folder: where it goes.
      layout: one of LAYOUTS.
      storage: precision, shards and variant of the weight files.
      overwrite: replace a model that stands there.
      progress: called with the bytes written.

    Raises:
      ValueError: the layout cannot express the model, or the folder exists.
      OSError: the disk is full.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    check_text(model, layout)
    if layout == "deepfloyd":
        _write_deepfloyd(model, Path(folder), storage, overwrite, progress)
    elif model.defaults:
        release.write_cascade(
            folder,
            model.stages,
            model.defaults,
            storage=storage,
            overwrite=overwrite,
            card=_card(model),
            progress=progress,
        )
    else:
        with atomic_folder(Path(folder), overwrite) as beside:
            if model.text is not None:
                _write_text(beside, model.text, storage, progress)
            else:
                release.write_stage_files(beside, with_hash(model.stages[0]), storage, progress)
                _carry_components(model.folder, beside)


def check_text(model: Model, layout: str) -> None:
    """Raises ValueError where a stage is told what no pipeline of a layout tells it, see `refuse_other_text`."""
    refuse_other_text(model.folder, model.stages, model.defaults, layout)


def stored_bytes(model: Model, storage: Storage) -> int:
    """Bytes of all tensors as they will be written: the whole of a progress bar."""
    specs = (stored_specs(params, kind, storage.dtype) for _, kind, _, params in model.networks())
    return sum(tensor_bytes(spec) for part in specs for spec in part.values())


def _open(folder: Path) -> Model:
    if (folder / "cascade.json").is_file():
        stages, defaults = release.read_cascade(folder, None)
        return Model(folder, tuple(stages), tuple(defaults))
    if (folder / "model_index.json").is_file():
        return Model(folder, (release.read_stage(folder, None),))
    if (folder / "config.yml").is_file():
        return Model(folder, (_read_deepfloyd_stage(folder),))
    if (folder / "if_jax.json").is_file():
        return _read_deepfloyd_cascade(folder)
    if (folder / "config.json").is_file():
        return Model(folder, (), text=release.read_text_encoder(folder, None))
    raise FileNotFoundError(
        f"{folder}: no model; expected cascade.json, model_index.json, config.yml (DeepFloyd) or a T5's config.json"
    )


def _write_text(folder: Path, text: TextEncoder, storage: Storage, progress: BytesWritten | None) -> None:
    """A T5 folder as transformers knows it: weights and tokenizer side by side."""
    metadata = {release.HASH_KEY: text.sha256, **text.notes}
    release.write_text_encoder(folder, text.config, text.params, storage, metadata, progress)
    text.tokenizer.save(folder)


def _card(model: Model) -> str:
    path = model.folder / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _carry_components(source: Path, target: Path) -> None:
    """Copy the safety checker and its like, with their entries in model_index.json."""
    if not (source / "model_index.json").is_file():
        return
    old, new = read_json(source / "model_index.json"), read_json(target / "model_index.json")
    for name in release.NOT_RUN:
        if release.has_component(source, old, name) and (source / name).is_dir():
            shutil.copytree(source / name, target / name)
            new[name] = old[name]
    if "requires_safety_checker" in old:
        new["requires_safety_checker"] = old["requires_safety_checker"]
    write_json(target / "model_index.json", new)


def _read_deepfloyd_stage(folder: Path) -> StageRelease:
    try:
        values = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.yml'}: not readable as YAML ({error}); copy it again") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{folder / 'config.yml'}: holds no settings; copy it again")
    config = parse_config(folder / "config.yml", values, unet_config_from_deepfloyd)
    params = _deepfloyd_params(folder / "pytorch_model.bin", config)
    kind = "super-resolution" if config.aug_level_embedding else "base"
    beside = read_json(folder / "if_jax.json") if (folder / "if_jax.json").is_file() else {}
    scheduler = SchedulerConfig(_CEILING[kind])
    if content := beside.get("scheduler"):
        scheduler = parse_config(folder / "if_jax.json", content, scheduler_from_diffusers)
    sha256, notes = beside.get(release.HASH_KEY), beside.get("notes", {})
    if not all(isinstance(word, str) for word in (sha256 or "", *notes, *notes.values())):
        raise ValueError(f"{folder / 'if_jax.json'}: {release.HASH_KEY} and notes must be words; copy the file again")
    stage = StageRelease(kind, config, params, scheduler, text_encoder_sha256=sha256, notes=notes)
    if not (folder / "t5").exists():
        return stage
    return with_text(stage, release.read_text_encoder(folder / "t5", None))


def _deepfloyd_params(path: Path, config: Any) -> Any:
    """The weights of a DeepFloyd stage as a tree of `Lazy`; every tensor is accounted for before any is read."""
    require_file(path)
    state, rows = read_bin(path), deepfloyd.table(config)
    expected = {row.name: row for row in rows}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing {', '.join(missing[:5])}")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected {', '.join(extra[:5])}")
    problems += [
        f"{row.name} has shape {state[row.name].shape} where config.yml says {row.shape}"
        for row in rows
        if row.name in state and state[row.name].shape != row.shape
    ][:1]
    if problems:
        raise ValueError(f"{path}: the weights are of another architecture than config.yml says: {'; '.join(problems)}")

    def lazy(row: deepfloyd.TensorRow, part: str) -> Lazy:
        tensor = state[row.name]
        return Lazy(row.part_shape, tensor.dtype, lambda: deepfloyd.split(row, np.asarray(tensor))[part])

    parts = {part: lazy(row, part) for row in rows for part in row.parts}
    return names.lazy_from_torch(parts, abstract_params(config), "unet")


def _read_deepfloyd_cascade(folder: Path) -> Model:
    rows = stage_rows(folder / "if_jax.json", read_json(folder / "if_jax.json").get("stages"))
    for row in rows:
        require_file(folder / row["folder"] / "config.yml")
    stages = tuple(_read_deepfloyd_stage(folder / row["folder"]) for row in rows)
    defaults = tuple(read_defaults(folder / "if_jax.json", row) for row in rows)
    check_stages(stages, defaults)
    return Model(folder, stages, defaults)


def _write_deepfloyd(
    model: Model, folder: Path, storage: Storage, overwrite: bool, progress: BytesWritten | None
) -> None:
    if model.text is not None:
        raise ValueError(f"{model.folder} is a text encoder, which DeepFloyd reads as it is: convert it to diffusers")
    if storage.shard_bytes or storage.variant:
        raise ValueError("the DeepFloyd layout is one pytorch_model.bin: leave out the shard size and the variant")
    stages = [with_hash(stage) for stage in model.stages]
    configs = [unet_config_to_deepfloyd(stage.unet_config, _main_dtype(stage, storage)) for stage in stages]
    with atomic_folder(folder, overwrite) as beside:
        rows = []
        for name, stage, config in zip(STAGE_NAMES, stages, configs, strict=False):
            place = beside / f"stage_{name}" if model.defaults else beside
            place.mkdir(exist_ok=True)
            _write_deepfloyd_stage(place, stage, config, storage, progress)
            rows.append({"folder": place.name})
        if model.defaults:
            for row, default in zip(rows, model.defaults, strict=True):
                row["defaults"] = defaults_row(default)
            write_json(beside / "if_jax.json", {"format": 1, "stages": rows})
            if card := _card(model):
                (beside / "README.md").write_text(card, encoding="utf-8")


def _write_deepfloyd_stage(
    folder: Path, stage: StageRelease, config: Mapping[str, Any], storage: Storage, progress: BytesWritten | None
) -> None:
    (folder / "config.yml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    tensors = names.lazy_torch(stage.unet_params, "unet")
    rows, specs = deepfloyd.table(stage.unet_config), {}
    for row in rows:
        dtypes = {tensors[part].dtype.name for part in row.parts}
        if storage.dtype is None and len(dtypes) > 1:
            raise ValueError(f"{', '.join(row.parts)} are stored in {' and '.join(sorted(dtypes))}: give one --dtype")
        specs[row.name] = (row.shape, storage.dtype or dtypes.pop())
    joined = ((row.name, deepfloyd.join(row, {part: np.asarray(tensors[part]) for part in row.parts})) for row in rows)
    write_bin(folder / "pytorch_model.bin", specs, joined, progress)
    beside = {"format": 1, "scheduler": scheduler_to_diffusers(stage.scheduler)}
    beside |= {release.HASH_KEY: stage.text_encoder_sha256, "notes": dict(stage.notes)}
    write_json(folder / "if_jax.json", beside)
    if text := stage.text_encoder():
        _write_text(folder / "t5", text, storage, progress)


def _main_dtype(stage: StageRelease, storage: Storage) -> str:
    return storage.dtype or stage.unet_params["conv_in"]["kernel"].dtype.name
