"""LoRA files as stock diffusers reads and writes them: factors of a UNet, of a T5, or of both in a safetensors file.

Ours have peft's names for the UNet (`unet.LAYER.lora_A.weight`), the older ones for the text encoder, which are all
that diffusers opens there, and rank and alpha in the header. Read are these, those of older diffusers, and kohya's.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from if_jax.checkpoints import names
from if_jax.checkpoints.files import atomic_file
from if_jax.checkpoints.names import Params
from if_jax.checkpoints.stages import STAGE_NAMES, StageRelease
from if_jax.checkpoints.tensors import Lazy, TensorSpec, read_bin, read_tensors
from if_jax.checkpoints.weights import abstract_params
from if_jax.checkpoints.write_tensors import write_safetensors
from if_jax.models.lora import LayerPath, kernels_of, merge_where, merged_kernel, pairs_of
from if_jax.models.t5 import T5Config
from if_jax.models.unet import UNetConfig

FILE_NAME = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"  # peft's settings as JSON, in the header of the file
_KINDS: dict[str, names.Kind] = {"unet": "unet", "text_encoder": "t5"}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_DOWN_OR_UP = r"(?:lora\.|lora_linear_layer\.|lora_)(A|B|down|up)(?:\.default)?\.weight"
_TEXT_PARTS = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file holds, unread: by network and layer, both in the words of torch."""

    path: Path
    parts: Mapping[str, Mapping[str, Mapping[str, Lazy]]]  # network → layer → "lora_A", "lora_B", "alpha"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the header: "unet.lora_alpha", …


@dataclass(frozen=True, eq=False)
class FittedFactors:
    """The factors of a file that go with one network: the tree of `models.lora`, and what each product is scaled by."""

    factors: Params
    scales: Mapping[LayerPath, float]  # by path of the layer


def write_lora(
    path: Path,
    factors: Mapping[str, Params],
    alpha: float,
    *,
    dtype: str = "float32",
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write factors as a file that `load_lora_weights` of diffusers' IF pipelines opens, whole or not at all.

    Args:
      path: the file; its folder is made.
      factors: {"unet", "text_encoder"} or one of them: trees of `models.lora`.
      alpha: the product of the factors counts alpha / rank times.
      dtype: a key of `tensors.DTYPES`.
      notes: what else the header says: recipe, step.
      overwrite: replace a file that is there.

    Raises:
      ValueError: the file exists, or a value is not finite.
      OSError: the disk is full.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another place or ask to overwrite it")
    tensors: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for network, tree in factors.items():
        for name, tensor in names.lazy_torch(tree, _KINDS[network]).items():
            tensors[f"{network}.{_written(name) if network == 'text_encoder' else name}"] = tensor
        layers = [names.layer_name(place, _KINDS[network]) for place, _, _ in pairs_of(tree)]
        rank = next(down.shape[-1] for _, down, _ in pairs_of(tree))
        settings |= {f"{network}.r": rank, f"{network}.lora_alpha": alpha, f"{network}.target_modules": layers}
    specs: dict[str, TensorSpec] = {name: (tensor.shape, dtype) for name, tensor in tensors.items()}
    metadata = {"format": "pt", _HEADER: json.dumps(settings, sort_keys=True), **(notes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as beside:
        values = ((name, np.ascontiguousarray(tensor)) for name, tensor in tensors.items())
        write_safetensors(beside, specs, values, metadata)


def open_lora(path: str | Path) -> LoraFile:
    """Open a LoRA file: names of diffusers, peft or kohya.

    Args:
      path: a safetensors or `.bin` file, or the folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it holds something else, or only part of its pairs.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a LoRA file, or the folder of its {FILE_NAME}")
    if path.suffix not in (".safetensors", ".bin"):
        raise ValueError(f"{path}: is neither .safetensors nor .bin; give a LoRA file of one of those")
    tensors, metadata = (read_bin(path), {}) if path.suffix == ".bin" else read_tensors(path.parent, path.stem)
    parts: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        network, layer, part = _parse(path, name)
        parts[network][layer][part] = tensor
    if not parts:
        raise ValueError(f"{path}: holds no factors; give a LoRA file")
    for network, layers in parts.items():
        for layer, pair in layers.items():
            if absent := {"lora_A", "lora_B"} - pair.keys():
                raise ValueError(
                    f"{path}: {network} {layer} has only part of its pair ({' and '.join(sorted(absent))} missing); "
                    "download or export the file again"
                )
    return LoraFile(path, parts, _settings(path, metadata))


def fit(lora: LoraFile, network: str, config: UNetConfig | T5Config) -> FittedFactors:
    """The factors of a file beside the kernels of a network.

    Args:
      lora: an open file.
      network: "unet" or "text_encoder".
      config: of the network.

    Raises:
      ValueError: it is a LoRA of another net; names the first tensor that differs.
    """
    kind = _KINDS[network]
    kernels = kernels_of(abstract_params(config))
    paths = {names.layer_name(path, kind): path for path in kernels}
    flat = {name.replace(".", "_"): name for name in paths}  # as kohya writes them
    abstract, tensors, scales = {}, {}, {}
    for written, pair in lora.parts[network].items():
        layer = flat.get(written, written)
        if layer not in paths:
            raise ValueError(f"{lora.path} is a LoRA of another net: this {network} has no layer {written}")
        path, rank = paths[layer], pair["lora_B"].shape[1] if pair["lora_B"].ndim > 1 else 0
        if not rank:
            raise ValueError(f"{lora.path}: {network} {written} has rank 0; give a LoRA of rank 1 or more")
        *taps, width_in, width_out = kernels[path].shape
        shapes = {"lora_A": (*taps, width_in, rank), "lora_B": (*(1,) * len(taps), rank, width_out)}
        for part, shape in shapes.items():
            abstract[*path, part, "kernel"] = jax.ShapeDtypeStruct(shape, np.float32)
            tensors[f"{layer}.{part}.weight"] = pair[part]
        scales[path] = _alpha(lora, network, layer, pair, rank)
    try:
        return FittedFactors(names.lazy_from_torch(tensors, unflatten_dict(abstract), kind), scales)
    except ValueError as error:
        raise ValueError(f"{lora.path} is a LoRA of another net: {network} {error}") from None


def with_factors(params: Params, factors: Params, scale: float | Mapping[LayerPath, float]) -> Params:
    """Parameters with factors in their kernels, each computed in float32 when it is asked for.

    Args:
      params: of a network, arrays or `Lazy`.
      factors: the tree of factors, arrays or `Lazy`.
      scale: what the products are multiplied by: all, or by path of the layer.

    Returns:
      The tree, in which what has factors is a `Lazy` of its own dtype.
    """

    def join(path: LayerPath, kernel: Any, down: Any, up: Any) -> Lazy:
        own = scale if isinstance(scale, float | int) else scale[path]

        def read() -> np.ndarray:
            whole, a, b = (np.asarray(leaf, np.float32) for leaf in (kernel, down, up))
            return merged_kernel(whole, a, b, own)

        return Lazy(tuple(kernel.shape), np.dtype(kernel.dtype), read)

    return merge_where(params, factors, join)


def with_loras(stages: Sequence[StageRelease], loras: Mapping[str | Path, float]) -> list[StageRelease]:
    """The stages of a cascade with LoRA files in their weights, each in the stage whose net it fits.

    A LoRA of the text encoder changes what all stages read, as in diffusers, so that stage I has a new encoder then.

    Args:
      stages: in order, their parameters not on a device yet.
      loras: file, or its folder → its weight: 0 leaves it out, 1 is what was trained.

    Raises:
      FileNotFoundError: names the file.
      ValueError: a file fits none of the stages, or more than one; a weight is not finite.
    """
    merged = list(stages)
    for file, weight in loras.items():
        if not isinstance(weight, float | int) or not math.isfinite(weight):
            raise ValueError(f"weight of LoRA {file} is {weight!r}: use a number, such as 0.8")
        lora = open_lora(file)
        number, fitted = _stage_of(lora, merged)
        stage = merged[number]
        if "unet" in fitted:
            stage = replace(stage, unet_params=_weighted(stage.unet_params, fitted["unet"], weight))
        if "text_encoder" in fitted and stage.text_params is not None:
            text = _weighted(stage.text_params, fitted["text_encoder"], weight)
            stage = replace(stage, text_params=text, text_encoder_sha256=None)
            merged = [replace(other, text_encoder_sha256=None) for other in merged]
        merged[number] = stage
    return merged


def _stage_of(lora: LoraFile, stages: Sequence[StageRelease]) -> tuple[int, dict[str, FittedFactors]]:
    """The number of the stage that a file fits, and its factors by network."""
    matches, problems = {}, []
    for number, stage in enumerate(stages):
        configs = {"unet": stage.unet_config, "text_encoder": stage.text_config}
        if any(configs[network] is None for network in lora.parts):
            problems.append(f"{lora.path} holds factors of a text encoder, which stage {STAGE_NAMES[number]} lacks")
            continue
        try:
            matches[number] = {network: fit(lora, network, configs[network]) for network in lora.parts}
        except ValueError as error:
            problems.append(str(error))
    if len(matches) > 1 and (kind := lora.settings.get("stage")):
        matches = {number: fitted for number, fitted in matches.items() if stages[number].kind == kind}
    if len(matches) > 1:
        fitting = " and ".join(STAGE_NAMES[number] for number in matches)
        raise ValueError(
            f"{lora.path} fits stages {fitting}, and does not say which: load one stage, or merge it there"
        )
    if not matches:
        raise ValueError(problems[0] if problems else f"{lora.path} is a LoRA of another kind of stage")
    return next(iter(matches.items()))


def _weighted(params: Params, fitted: FittedFactors, weight: float) -> Params:
    return with_factors(params, fitted.factors, {path: scale * weight for path, scale in fitted.scales.items()})


def _written(name: str) -> str:
    """The older name of a factor, which is all that diffusers opens beside a text encoder."""
    layer, part, _ = name.rsplit(".", 2)
    return f"{layer}.{_TEXT_PARTS[part]}.weight"


def _parse(path: Path, name: str) -> tuple[str, str, str]:
    """(network, layer, part) of a tensor's name; the layer of kohya's has "_" for every ".".

    unet.mid_block.attentions.0.to_q.lora_A.weight                   peft, diffusers
    unet.mid_block.attentions.0.to_q.lora.down.weight                older diffusers
    unet.mid_block.attentions.0.processor.to_q_lora.down.weight      oldest: attention processors
    lora_unet_mid_block_attentions_0_to_q.lora_down.weight, .alpha   kohya
    """
    rest = name.removeprefix("base_model.model.")
    network = next((own for prefix, own in _KOHYA.items() if rest.startswith(prefix)), None)
    if network:
        rest = re.sub(r"^lora_(unet|te1?)_", "", rest)
    else:
        network = "text_encoder" if rest.startswith("text_encoder.") else "unet"
        rest = rest.removeprefix(f"{network}.")
    if match := re.fullmatch(r"(.+)\.processor\.(\w+)_lora\.(down|up)\.weight", rest):
        layer = f"{match[1]}.{match[2]}" + (".0" if match[2] == "to_out" else "")
        return network, layer, "lora_A" if match[3] == "down" else "lora_B"
    if match := re.fullmatch(rf"(.+)\.{_DOWN_OR_UP}", rest):
        return network, match[1], "lora_A" if match[2] in ("A", "down") else "lora_B"
    if match := re.fullmatch(r"(.+)\.alpha", rest):
        return network, match[1], "alpha"
    raise ValueError(f"{path}: holds {name}, which is no LoRA factor that if_jax knows (DoRA, LoKr and biases are not)")


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        settings = json.loads(metadata.get(_HEADER, "{}"))
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its {_HEADER} is not readable as JSON; download or export the file again")
    if variant := next(
        (word for word in settings if word.endswith(("use_dora", "lora_bias")) and settings[word]), None
    ):
        raise ValueError(f"{path}: {variant} is set, which if_jax does not compute; train a plain LoRA")
    return settings | ({"stage": metadata["stage"]} if "stage" in metadata else {})


def _alpha(lora: LoraFile, network: str, layer: str, pair: Mapping[str, Lazy], rank: int) -> float:
    """What the product of a layer's factors is scaled by: as the header says, else kohya's tensor, else 1."""
    settings = {word.removeprefix(f"{network}."): value for word, value in lora.settings.items()}
    alpha: Any = settings.get("lora_alpha")
    patterns = settings.get("alpha_pattern")
    for pattern, value in (patterns if isinstance(patterns, Mapping) else {}).items():
        if re.fullmatch(rf"(.*\.)?{re.escape(pattern.lstrip('^'))}", layer):
            alpha = value
    if alpha is None:
        alpha = np.asarray(pair["alpha"], np.float32).reshape(-1).tolist() if "alpha" in pair else [rank]
        alpha = alpha[0] if len(alpha) == 1 else alpha
    if not isinstance(alpha, float | int) or not math.isfinite(alpha):
        raise ValueError(f"{lora.path}: alpha of {network} {layer} is {alpha!r}; it must be a number")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
