"""Releases: finished models in the folder layout of diffusers, read by if_jax and, unmodified, by stock diffusers.

CASCADE/cascade.json   stage folders in order, how each draws by default, hashes of the weights
CASCADE/stage_I/       IFPipeline: unet, scheduler, text_encoder, tokenizer
CASCADE/stage_II/      IFSuperResolutionPipeline: unet, scheduler, image_noising_scheduler; text from stage_I

A stage that reads others than T5 alone (CLIP's encoders, in `clip/`) has the same folder under a name of its own:
diffusers knows no such pipeline, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from if_jax.checkpoints import clip_files, names
from if_jax.checkpoints.cascade_folders import base_folder, cascade_rows
from if_jax.checkpoints.files import atomic_folder, parse_config, read_json, require_file, sha256_of, write_json
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.scheduler import (
    SCHEDULERS,
    check_noising_scheduler,
    noising_scheduler_to_diffusers,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)
from if_jax.checkpoints.stages import (
    BESIDE_DIFFUSERS,
    IF_DEFAULTS,
    PIPELINE_KINDS,
    PIPELINES,
    STAGE_NAMES,
    StageDefaults,
    StageRelease,
    TextEncoder,
    check_stages,
    defaults_row,
    read_defaults,
    with_hash,
    with_text,
)
from if_jax.checkpoints.tensors import CONTENT_KEY, BytesWritten, Storage, weight_files
from if_jax.checkpoints.weights import (
    DIFFUSERS_VERSION,
    STEMS,
    load_params,
    read_params,
    text_encoder_sha256,
    write_config,
    write_params,
)
from if_jax.models.t5 import T5Config
from if_jax.text.tokens import load_tokenizer

# Parts of a pipeline that if_jax does not run: left out of its own releases, carried along by a conversion.
NOT_RUN = ("feature_extractor", "safety_checker", "watermarker")
HASH_KEY = "text_encoder_sha256"  # in the headers of the weight files and in cascade.json


def write_stage(
    folder: str | Path,
    stage: StageRelease,
    storage: Storage | None = None,
    overwrite: bool = False,
) -> None:
    """Write one stage as a complete diffusers folder, whole or not at all.

    Args:
      folder: where it goes.
      stage: the stage.
      storage: float32 in one file unless set (T5's `wo` stays float32 in float16, as transformers keeps it).
      overwrite: replace a release that stands there.

    Raises:
      ValueError: the folder exists and `overwrite` is false.
      OSError: the disk is full.
    """
    with atomic_folder(Path(folder), overwrite) as beside:
        write_stage_files(beside, with_hash(stage), storage or Storage())


def read_stage(folder: str | Path, dtype: str | None = "float32") -> StageRelease:
    """Read one stage.

    Args:
      folder: a stage of a release, or one of IF's or diffusers' making.
      dtype: precision of the parameters, read into memory as NumPy arrays; None: `Lazy`, as they are stored.

    Returns:
      The stage.

    Raises:
      FileNotFoundError: names the missing file.
      ValueError: weights and configuration do not fit.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    kind = PIPELINE_KINDS.get(str(index.get("_class_name")))
    if kind is None:
        raise ValueError(f"{folder}: holds a {index.get('_class_name')}, expected one of {', '.join(PIPELINE_KINDS)}")
    path = folder / "unet/config.json"
    config = parse_config(path, read_json(path), names.unet_config_from_diffusers)
    path = folder / "scheduler/scheduler_config.json"
    scheduler = parse_config(path, read_json(path), scheduler_from_diffusers)
    noising = folder / "image_noising_scheduler/scheduler_config.json"
    if kind == "super-resolution" and noising.is_file():
        try:
            check_noising_scheduler(read_json(noising))
        except ValueError as error:
            raise ValueError(f"{noising}: {error}") from None
    params, metadata = read_params(folder / "unet", "unet", config)
    params = params if dtype is None else load_params(params, dtype)
    sha256 = metadata.get(HASH_KEY)
    text = read_text_encoder(folder, dtype) if has_component(folder, index, "text_encoder") else None
    try:
        clip = (
            clip_files.read_clip_encoder(folder / clip_files.FOLDER) if (folder / clip_files.FOLDER).is_dir() else None
        )
        stage = StageRelease(kind, config, params, scheduler, None, None, None, sha256, notes_of(metadata), clip)
        return stage if text is None else with_text(stage, text)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def notes_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a weight file's header says besides what every file's says."""
    return {name: value for name, value in metadata.items() if name not in ("format", CONTENT_KEY, HASH_KEY)}


def read_text_encoder(folder: str | Path, dtype: str | None = "float32", *, identify: bool = True) -> TextEncoder:
    """Read the text encoder of a cascade or base stage folder, or a T5 folder alone.

    Args:
      folder: holds it.
      dtype: as for `read_stage`.
      identify: hash the weights, gigabytes perhaps, where their file does not say their hash; else it is "".

    Returns:
      The encoder with its tokenizer.

    Raises:
      FileNotFoundError: names the missing file.
      ValueError: weights, tokenizer and configuration do not fit.
    """
    folder = base_folder(Path(folder))
    alone = not (folder / "text_encoder").exists() and not (folder / "model_index.json").exists()
    weights, tokenizer = (folder, folder) if alone else (folder / "text_encoder", folder / "tokenizer")
    config = parse_config(weights / "config.json", read_json(weights / "config.json"), names.t5_config_from_hf)
    params, metadata = read_params(weights, "text_encoder", config)
    read = load_tokenizer(tokenizer)
    if read.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer}: the tokenizer has {read.vocab_size} ids, the text encoder's table {config.vocab_size} rows: "
            "they do not belong together"
        )
    params = params if dtype is None else load_params(params, dtype)
    sha256 = metadata.get(HASH_KEY) or (text_encoder_sha256(params) if identify else "")
    return TextEncoder(config, params, read, sha256, notes_of(metadata))


def write_cascade(
    folder: str | Path,
    stages: Sequence[StageRelease],
    defaults: Sequence[StageDefaults],
    *,
    storage: Storage | None = None,
    overwrite: bool = False,
    card: str = "",
    progress: BytesWritten | None = None,
) -> None:
    """Join trained stages: a base stage with its text encoder, then super-resolution stages in growing size.

    Args:
      folder: where the cascade goes.
      stages: in order.
      defaults: how each draws.
      storage: precision, shards and variant of all weight files, float32 in one file unless set.
      overwrite: replace a release that stands there.
      card: text of README.md, the model card.
      progress: called with the bytes written.

    Raises:
      ValueError: the stages do not fit each other, or the folder exists.
      OSError: the disk is full.
    """
    stages = [with_hash(stage) for stage in stages]
    check_stages(stages, defaults)
    with atomic_folder(Path(folder), overwrite) as beside:
        rows = []
        for name, stage, default in zip(STAGE_NAMES, stages, defaults, strict=False):
            own = stages[0].text_encoder_sha256 if stage is stages[0] else stages[0].states_sha256
            named = replace(stage, text_encoder_sha256=own)
            write_stage_files(beside / f"stage_{name}", named, storage or Storage(), progress)
            row = {"folder": f"stage_{name}", "kind": stage.kind, "size": stage.unet_config.sample_size}
            rows.append(row | {"defaults": defaults_row(default), "sha256": _weight_hashes(beside / f"stage_{name}")})
        content = {"format": 1, HASH_KEY: stages[0].states_sha256, "stages": rows}
        write_json(beside / "cascade.json", content)
        if card:
            (beside / "README.md").write_text(card, encoding="utf-8")


def read_cascade(
    folder: str | Path, dtype: str | None = "float32", stages: int | None = None
) -> tuple[list[StageRelease], list[StageDefaults]]:
    """Read a cascade or a base stage folder, and check that its parts belong together.

    Args:
      folder: holds it.
      dtype: as for `read_stage`.
      stages: how many of them, all unless set.

    Returns:
      The stages, and how each draws by default.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: a weight file is not the one recorded, or the stages do not fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a release folder")
    if (folder / "model_index.json").is_file():
        stage = read_stage(folder, dtype)
        check_stages([stage], IF_DEFAULTS[:1])
        return [stage], [IF_DEFAULTS[0]]
    rows = cascade_rows(folder)[:stages]
    for row in rows:
        for file, recorded in row["sha256"].items():
            path = folder / row["folder"] / file
            require_file(path)
            if sha256_of(path) != recorded:
                raise ValueError(f"{path}: not the weights this cascade was written with; copy or export it again")
    read = [read_stage(folder / row["folder"], dtype) for row in rows]
    defaults = [read_defaults(folder / "cascade.json", row) for row in rows]
    check_stages(read, defaults)
    return read, defaults


def has_component(folder: Path, index: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index.json has a component: [library, class], both null where it is left out.

    Args:
      folder: that holds it, for the message.
      index: content of the file.
      name: of the component.

    Raises:
      ValueError: the entry is something else.
    """
    entry = index.get(name) or [None]
    if not isinstance(entry, list):
        raise ValueError(f"{folder / 'model_index.json'}: {name}={entry!r} must be [library, class]; copy it again")
    return entry[0] is not None


def write_stage_files(
    folder: Path, stage: StageRelease, storage: Storage, progress: BytesWritten | None = None
) -> None:
    """Write the files of one stage.

    Args:
      folder: where they go; the caller renames it into place.
      stage: the stage, with the hash of its text encoder.
      storage: precision, shards and variant.
      progress: called with the bytes written.
    """
    pipelines = BESIDE_DIFFUSERS if stage.unet_config.text_parts else PIPELINES
    index: dict[str, Any] = {"_class_name": pipelines[stage.kind], "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: [None, None] for name in NOT_RUN}
    index |= {"requires_safety_checker": False, "unet": ["diffusers", "UNet2DConditionModel"]}
    index["scheduler"] = ["diffusers", SCHEDULERS[stage.scheduler.sampler]]
    index["text_encoder"] = ["transformers", "T5EncoderModel"] if stage.text_params else [None, None]
    index["tokenizer"] = ["transformers", stage.tokenizer.class_name] if stage.tokenizer else [None, None]
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "scheduler/scheduler_config.json", scheduler_to_diffusers(stage.scheduler))
    if stage.kind == "super-resolution":
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
        write_config(folder / "image_noising_scheduler/scheduler_config.json", noising_scheduler_to_diffusers())
    metadata = {HASH_KEY: stage.text_encoder_sha256} if stage.text_encoder_sha256 else {}
    metadata |= stage.notes
    unet_config = names.unet_config_to_diffusers(stage.unet_config)
    write_params(folder / "unet", "unet", unet_config, stage.unet_params, storage, metadata, progress)
    if stage.text_config and stage.text_params:
        write_text_encoder(folder / "text_encoder", stage.text_config, stage.text_params, storage, metadata, progress)
    if stage.tokenizer:
        stage.tokenizer.save(folder / "tokenizer")
    if stage.clip:
        clip_files.write_clip_encoder(folder / clip_files.FOLDER, stage.clip, storage, progress)
    write_json(folder / "model_index.json", index)


def write_text_encoder(
    folder: Path,
    config: T5Config,
    params: Params,
    storage: Storage,
    metadata: Mapping[str, str],
    progress: BytesWritten | None = None,
) -> None:
    """Write the files of a text encoder as transformers' `T5EncoderModel` opens them.

    Args:
      folder: where they go, without the tokenizer.
      config: of the encoder.
      params: its parameters.
      storage: precision, shards and variant.
      metadata: for the headers of the weight files.
      progress: called with the bytes written.
    """
    dtype = storage.dtype or params["shared"]["embedding"].dtype.name
    content = names.t5_config_to_hf(config) | {"dtype": dtype}
    write_params(folder, "text_encoder", content, params, storage, metadata, progress)


def _weight_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in _stage_weights(folder)}


def _stage_weights(folder: Path) -> Iterator[Path]:
    for part, stem in (STEMS | {clip_files.FOLDER: "model"}).items():
        if (folder / part).is_dir():
            yield from weight_files(folder / part, stem)
