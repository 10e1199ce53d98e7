"""Releases: finished models in the folder layout of diffusers, read by if_jax and, unmodified, by stock diffusers.

CASCADE/cascade.json   stage folders in order, how each draws by default, hashes of the weights
CASCADE/stage_I/       IFPipeline: unet, scheduler, text_encoder, tokenizer
CASCADE/stage_II/      IFSuperResolutionPipeline: unet, scheduler, image_noising_scheduler; text from stage_I
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from if_jax.checkpoints import names
from if_jax.checkpoints.files import atomic_folder, parse_config, read_json, require_file, sha256_of, write_json
from if_jax.checkpoints.scheduler import (
    SchedulerConfig,
    noising_scheduler_to_diffusers,
    scheduler_from_diffusers,
    scheduler_to_diffusers,
)
from if_jax.checkpoints.tensors import CONTENT_KEY, Progress, Storage, weight_files
from if_jax.checkpoints.weights import (
    DIFFUSERS_VERSION,
    STEMS,
    Params,
    load_params,
    read_params,
    text_encoder_sha256,
    write_config,
    write_params,
)
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig
from if_jax.text.tokens import Tokenizer, load_tokenizer

PIPELINES = {"base": "IFPipeline", "super-resolution": "IFSuperResolutionPipeline"}
STAGE_NAMES = ("I", "II", "III", "IV", "V", "VI")
# Parts of a pipeline that if_jax does not run: left out of its own releases, carried along by a conversion.
NOT_RUN = ("feature_extractor", "safety_checker", "watermarker")
HASH_KEY = "text_encoder_sha256"  # in the headers of the weight files and in cascade.json


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 encoder with its tokenizer; `sha256` is its identity, kept when it is written in another precision."""

    config: T5Config
    params: Params
    tokenizer: Tokenizer
    sha256: str
    notes: Mapping[str, str] = field(default_factory=dict)  # see `Stage.notes`


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage as it is released; parameters are nested dicts of arrays (or `Lazy`) without logical names.

    A super-resolution stage has no text encoder of its own; `text_encoder_sha256` says which one it was trained with
    (None: not known, as for IF's own releases). A base stage may leave it None: it is then computed.
    """

    kind: str  # "base" or "super-resolution"
    unet_config: UNetConfig
    unet_params: Params
    scheduler: SchedulerConfig
    text_config: T5Config | None = None
    text_params: Params | None = None
    tokenizer: Tokenizer | None = None
    text_encoder_sha256: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)  # for the headers of the weight files: recipe, step

    def __post_init__(self) -> None:
        if self.kind not in PIPELINES:
            raise ValueError(f"stage kind {self.kind!r} is unknown: choose one of {', '.join(PIPELINES)}")
        if (self.kind == "super-resolution") != self.unet_config.aug_level_embedding:
            raise ValueError(f"stage kind is {self.kind!r}, but its UNet is of the other kind")
        if self.text_config is not None and self.text_config.d_model != self.unet_config.encoder_hid_dim:
            raise ValueError(
                f"the text encoder makes states of width {self.text_config.d_model} (d_model), the UNet reads "
                f"{self.unet_config.encoder_hid_dim} (encoder_hid_dim): they were not trained together"
            )


@dataclass(frozen=True)
class StageDefaults:
    """How a stage draws unless told otherwise; the words are IF's, `noise_level` is aug_level in steps of 1000."""

    sample_timestep_respacing: str
    guidance_scale: float
    noise_level: int | None = None  # super-resolution stages only
    preserve_case: bool = False  # its captions were not lower-cased, so that its prompts must not be


_CASE = "preserve_case"

# How IF's own code calls its three stages: for releases that say nothing themselves.
IF_DEFAULTS = (StageDefaults("150", 7.0), StageDefaults("smart50", 4.0, 250), StageDefaults("super40", 4.0, 0))


def write_stage(
    folder: str | Path,
    stage: Stage,
    storage: Storage | None = None,
    overwrite: bool = False,
) -> None:
    """Write one stage as a complete diffusers folder, whole or not at all.

    storage: float32 in one file unless given (T5's `wo` stays float32 in float16, as transformers keeps it).
    Raises ValueError where the folder exists and `overwrite` is false, OSError when the disk is full.
    """
    with atomic_folder(Path(folder), overwrite) as beside:
        write_stage_files(beside, with_hash(stage), storage or Storage())


def read_stage(folder: str | Path, dtype: str | None = "float32") -> Stage:
    """Read one stage into memory, its parameters as NumPy arrays of `dtype`; None: opened, `Lazy` in stored precision.

    Raises FileNotFoundError naming the missing file, ValueError where weights and configuration do not fit.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    kinds = {pipeline: kind for kind, pipeline in PIPELINES.items()}
    if str(index.get("_class_name")) not in kinds:
        raise ValueError(f"{folder}: holds a {index.get('_class_name')}, expected one of {', '.join(kinds)}")
    path = folder / "unet/config.json"
    config = parse_config(path, read_json(path), names.unet_config_from_diffusers)
    path = folder / "scheduler/scheduler_config.json"
    scheduler = parse_config(path, read_json(path), scheduler_from_diffusers)
    params, metadata = read_params(folder / "unet", "unet", config)
    params = params if dtype is None else load_params(params, dtype)
    kind, sha256 = kinds[index["_class_name"]], metadata.get(HASH_KEY)
    text = read_text_encoder(folder, dtype) if has_component(folder, index, "text_encoder") else None
    try:
        stage = Stage(kind, config, params, scheduler, text_encoder_sha256=sha256, notes=notes_of(metadata))
        return stage if text is None else with_text(stage, text)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def notes_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a weight file's header says besides what every file's says."""
    return {name: value for name, value in metadata.items() if name not in ("format", CONTENT_KEY, HASH_KEY)}


def with_text(stage: Stage, text: TextEncoder) -> Stage:
    """The stage with a text encoder of its own."""
    return replace(
        stage,
        text_config=text.config,
        text_params=text.params,
        tokenizer=text.tokenizer,
        text_encoder_sha256=text.sha256,
    )


def read_text_encoder(folder: str | Path, dtype: str | None = "float32", *, identify: bool = True) -> TextEncoder:
    """Read the text encoder of a cascade or base stage folder, or a T5 folder alone; `dtype` and errors as above.

    identify: hash the weights, gigabytes perhaps, where their file does not tell their hash; else it is "".
    """
    folder = Path(folder)
    if (folder / "cascade.json").is_file():
        folder = folder / _cascade_rows(folder)[0]["folder"]
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
    stages: Sequence[Stage],
    defaults: Sequence[StageDefaults],
    *,
    storage: Storage | None = None,
    overwrite: bool = False,
    card: str = "",
    progress: Progress | None = None,
) -> None:
    """Join trained stages: a base stage with its text encoder, then super-resolution stages in growing size.

    storage: precision, shards and variant of all weight files, float32 in one file unless given. card: text of
    README.md, the model card.
    Raises ValueError where the stages do not fit each other, among others where a later stage was trained with another
    text encoder than the base stage brings.
    """
    stages = [with_hash(stage) for stage in stages]
    check_stages(stages, defaults)
    with atomic_folder(Path(folder), overwrite) as beside:
        rows = []
        for name, stage, default in zip(STAGE_NAMES, stages, defaults, strict=False):
            told = replace(stage, text_encoder_sha256=stages[0].text_encoder_sha256)
            write_stage_files(beside / f"stage_{name}", told, storage or Storage(), progress)
            row = {"folder": f"stage_{name}", "kind": stage.kind, "size": stage.unet_config.sample_size}
            rows.append(row | {"defaults": defaults_row(default), "sha256": _weight_hashes(beside / f"stage_{name}")})
        content = {"format": 1, HASH_KEY: stages[0].text_encoder_sha256, "stages": rows}
        write_json(beside / "cascade.json", content)
        if card:
            (beside / "README.md").write_text(card, encoding="utf-8")


def read_cascade(
    folder: str | Path, dtype: str | None = "float32", stages: int | None = None
) -> tuple[list[Stage], list[StageDefaults]]:
    """Read a cascade (its first `stages` stages) or a base stage folder, and check that its parts belong together.

    dtype: as for `read_stage`.

    Raises FileNotFoundError naming what is missing, ValueError where a weight file is not the one recorded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a release folder")
    if (folder / "model_index.json").is_file():
        stage = read_stage(folder, dtype)
        check_stages([stage], IF_DEFAULTS[:1])
        return [stage], [IF_DEFAULTS[0]]
    rows = _cascade_rows(folder)[:stages]
    for row in rows:
        for file, recorded in row["sha256"].items():
            path = folder / row["folder"] / file
            require_file(path)
            if sha256_of(path) != recorded:
                raise ValueError(f"{path}: not the weights this cascade was written with; copy or export it again")
    found = [read_stage(folder / row["folder"], dtype) for row in rows]
    defaults = [read_defaults(folder / "cascade.json", row) for row in rows]
    check_stages(found, defaults)
    return found, defaults


def _cascade_rows(folder: Path) -> list[dict[str, Any]]:
    """The stages of cascade.json, each with the keys that `write_cascade` gives it."""
    path = folder / "cascade.json"
    content = read_json(path)
    if content.get("format") != 1:
        raise ValueError(f"{path}: format {content.get('format')!r} is unknown; this if_jax reads format 1")
    return stage_rows(path, content.get("stages"), sha256=dict)


def stage_rows(path: Path, rows: Any, **kinds: type) -> list[dict[str, Any]]:
    """The stages that a file lists, each with its folder, its defaults and what `kinds` names, or ValueError."""
    known = {field.name for field in fields(StageDefaults)}
    needed, kinds = known - {_CASE}, {"folder": str, "defaults": dict, **kinds}
    for row in rows if rows and isinstance(rows, list) else [{}]:
        whole = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        if not whole or not needed <= row["defaults"].keys() <= known:
            raise ValueError(f"{path}: a stage lacks its {' or '.join(kinds)} ({', '.join(sorted(needed))})")
    return rows


def defaults_row(defaults: StageDefaults) -> dict[str, Any]:
    """What `read_defaults` reads. IF lower-cases: only a stage that does not says anything about it."""
    return {name: value for name, value in asdict(defaults).items() if name != _CASE or value}


def read_defaults(path: Path, row: Mapping[str, Any]) -> StageDefaults:
    """The defaults in a row of `stage_rows`; `path` is named where a value is of the wrong type."""
    return parse_config(path, row["defaults"], lambda values: StageDefaults(**values))


def has_component(folder: Path, index: Mapping[str, Any], name: str) -> bool:
    """Whether a model_index.json has a component: [library, class], both null where it is left out."""
    entry = index.get(name) or [None]
    if not isinstance(entry, list):
        raise ValueError(f"{folder / 'model_index.json'}: {name}={entry!r} must be [library, class]; copy it again")
    return entry[0] is not None


def with_hash(stage: Stage) -> Stage:
    """The stage with its text encoder's identity filled in, where it can be computed."""
    if stage.text_encoder_sha256 is not None or stage.text_params is None:
        return stage
    return replace(stage, text_encoder_sha256=text_encoder_sha256(stage.text_params))


def check_stages(stages: Sequence[Stage], defaults: Sequence[StageDefaults]) -> None:
    if not 1 <= len(stages) <= len(STAGE_NAMES) or len(defaults) != len(stages):
        raise ValueError(f"{len(stages)} stages and {len(defaults)} defaults: give one to {len(STAGE_NAMES)} of each")
    base = stages[0]
    if base.kind != "base" or base.text_params is None or base.tokenizer is None:
        raise ValueError("the first stage must be a base stage that brings its text encoder and tokenizer")
    for name, previous, stage in zip(STAGE_NAMES[1:], stages, stages[1:], strict=False):
        size, width = stage.unet_config.sample_size, stage.unet_config.encoder_hid_dim
        if stage.kind != "super-resolution":
            raise ValueError(f"stage {name} is a {stage.kind} stage: only the first may be")
        if size <= previous.unet_config.sample_size:
            raise ValueError(
                f"stage {name} draws {size} px, no more than the {previous.unet_config.sample_size} before"
            )
        if stage.text_encoder_sha256 not in (None, base.text_encoder_sha256) or width != base.text_config.d_model:
            raise ValueError(
                f"stage {name} was trained with another text encoder ({_brief(stage.text_encoder_sha256)}, width"
                f" {width}) than stage I brings ({_brief(base.text_encoder_sha256)}, width {base.text_config.d_model}):"
                " train it again with text_encoder_from = this base stage"
            )
    for name, stage, default in zip(STAGE_NAMES, stages, defaults, strict=False):
        if (default.noise_level is None) != (stage.kind == "base"):
            needs = "needs a noise_level" if stage.kind == "super-resolution" else "takes no noise_level"
            raise ValueError(f"defaults of stage {name}: a {stage.kind} stage {needs}")
        if default.preserve_case != defaults[0].preserve_case:
            kept = {True: "with their case kept", False: "in lower case"}
            raise ValueError(
                f"stage {name} was trained on captions {kept[default.preserve_case]}, stage I on captions"
                f" {kept[defaults[0].preserve_case]}: all stages are given the same text, train one of them again"
            )


def write_stage_files(folder: Path, stage: Stage, storage: Storage, progress: Progress | None = None) -> None:
    """The files of one stage, into a folder that is renamed into place by the caller."""
    super_resolution, has_text = stage.kind == "super-resolution", stage.text_params is not None
    index: dict[str, Any] = {"_class_name": PIPELINES[stage.kind], "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: [None, None] for name in NOT_RUN}
    index |= {"requires_safety_checker": False, "unet": ["diffusers", "UNet2DConditionModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    index["text_encoder"] = ["transformers", "T5EncoderModel"] if has_text else [None, None]
    index["tokenizer"] = ["transformers", stage.tokenizer.class_name] if stage.tokenizer else [None, None]
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "scheduler/scheduler_config.json", scheduler_to_diffusers(stage.scheduler))
    if super_resolution:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
        write_config(folder / "image_noising_scheduler/scheduler_config.json", noising_scheduler_to_diffusers())
    metadata = {HASH_KEY: stage.text_encoder_sha256} if stage.text_encoder_sha256 else {}
    metadata |= stage.notes
    unet_config = names.unet_config_to_diffusers(stage.unet_config)
    write_params(folder / "unet", "unet", unet_config, stage.unet_params, storage, metadata, progress)
    if has_text:
        write_text_encoder(folder / "text_encoder", stage.text_config, stage.text_params, storage, metadata, progress)
    if stage.tokenizer:
        stage.tokenizer.save(folder / "tokenizer")
    write_json(folder / "model_index.json", index)


def write_text_encoder(
    folder: Path,
    config: T5Config,
    params: Params,
    storage: Storage,
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """The files of a text encoder as transformers' `T5EncoderModel` opens them, into a folder of its own."""
    dtype = storage.dtype or params["shared"]["embedding"].dtype.name
    content = names.t5_config_to_hf(config) | {"dtype": dtype}
    write_params(folder, "text_encoder", content, params, storage, metadata, progress)


def _weight_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in _stage_weights(folder)}


def _stage_weights(folder: Path) -> Iterator[Path]:
    for part, stem in STEMS.items():
        if (folder / part).is_dir():
            yield from weight_files(folder / part, stem)


def _brief(sha256: str | None) -> str:
    return (sha256 or "unknown")[:12]
