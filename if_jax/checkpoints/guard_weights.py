"""The weights of IF's guard, from the user's folder: CLIP's picture encoder and two heads. Nothing is fetched.

Either diffusers' `safety_checker/` of an IF release, or a folder that holds a CLIP ViT-L/14 as transformers knows it
beside the original's `p_head_v1.npz` and `w_head_v1.npz`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from if_jax.checkpoints.feature_weights import fitted_vision, read_clip
from if_jax.checkpoints.files import read_json, require_file
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.tensors import read_tensors
from if_jax.models.clip import CLIPVisionConfig

_FILES = {"unsafe": "p_head_v1.npz", "watermark": "w_head_v1.npz"}
_HEADS = {"unsafe": "p_head", "watermark": "w_head"}  # their names in diffusers


class GuardWeights(NamedTuple):
    """An opened guard."""

    config: CLIPVisionConfig
    params: Params  # of the picture encoder
    heads: dict[str, tuple[np.ndarray, float]]  # "unsafe" and "watermark": weights (D,) float32, bias


def read_guard(folder: str | Path) -> GuardWeights:
    """Open a guard.

    Args:
      folder: see the module.

    Raises:
      FileNotFoundError: names what is missing.
      ValueError: another network, heads of another width, or damaged files.
    """
    folder = Path(folder)
    require_file(folder / "config.json")
    if "IFSafetyChecker" in (read_json(folder / "config.json").get("architectures") or ()):
        config, params, heads = _of_diffusers(folder)
    else:
        for name in _FILES.values():
            require_file(folder / name)
        vision = read_clip(folder, ("vision",)).vision
        assert vision is not None  # it was asked for
        config, params = vision
        heads = {word: _head(folder / name) for word, name in _FILES.items()}
    for word, (weights, _) in heads.items():
        if weights.shape != (config.projection_dim,):
            raise ValueError(
                f"{folder}: the head {word!r} reads {weights.size} features, CLIP makes {config.projection_dim}: IF's "
                "heads go with ViT-L/14"
            )
    return GuardWeights(config, params, heads)


def _of_diffusers(folder: Path) -> tuple[CLIPVisionConfig, Params, dict[str, tuple[np.ndarray, float]]]:
    tensors, _ = read_tensors(folder, "model")
    own = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items() if name.startswith("vision_")}
    config, params = fitted_vision(folder, {n: t for n, t in own.items() if not n.endswith(".position_ids")})
    heads = {}
    for word, name in _HEADS.items():
        if f"{name}.weight" not in tensors or f"{name}.bias" not in tensors:
            raise ValueError(f"{folder}: holds no {name}: give the safety_checker of an IF release")
        weights = np.asarray(tensors[f"{name}.weight"], np.float32).reshape(-1)
        heads[word] = weights, float(np.asarray(tensors[f"{name}.bias"], np.float32).reshape(-1)[0])
    return config, params, heads


def _head(path: Path) -> tuple[np.ndarray, float]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: Any = stored
            return np.asarray(arrays["weights"], np.float32).reshape(-1), float(arrays["biases"])
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: holds no head of IF's guard ({error}); copy it again") from None
