"""Are two model folders the same model? Tensor by tensor, block by block, picture by picture."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np

from if_jax.checkpoints import names
from if_jax.checkpoints.convert import Model, open_model
from if_jax.checkpoints.weights import Params, load_params
from if_jax.inference.cascade import Cascade
from if_jax.inference.pictures import grid, is_own, write_png
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.models.unet import UNet, UNetConfig
from if_jax.text.tokens import TEXT_LENGTH

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance

Outputs = Mapping[str, Any]  # the nested outputs of a network's blocks, as Flax keeps them
TOLERANCE = 1e-5  # float32: rounding alone stays below it
PROMPT = "two red spheres and a blue cube"
_SHEET = "verify.png"
_BLOCKS = re.compile(r"(down_blocks|up_blocks|block)_\d+|mid_block|encoder_hid_proj|conv_in")


@dataclasses.dataclass(frozen=True)
class Difference:
    """What two tensors or activations of one name differ by: max |Δ| over the largest magnitude of the first."""

    name: str
    relative: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What was compared, in lines for a person, and the differences above the tolerance."""

    say: Callable[[str], None]  # called with each line
    lines: list[str] = dataclasses.field(default_factory=list)
    failures: list[Difference] = dataclasses.field(default_factory=list)

    def add(self, line: str, *failures: Difference) -> None:
        """A line, and the differences that it is about."""
        self.lines.append(line)
        self.failures.extend(failures)
        self.say(line)


def verify(
    a: str | Path,
    b: str | Path,
    tolerance: float = TOLERANCE,
    pictures: str | Path | None = None,
    torch: bool = False,
    text_encoder: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> VerifyReport:
    """Compare two model folders of any layout; tensors go by the names that diffusers gives them.

    Args:
      a: a folder.
      b: another.
      tolerance: largest relative difference of a tensor or of a block's output that passes.
      pictures: folder for both models' pictures side by side, where both can draw.
      torch: the outputs of A's blocks come from stock diffusers and transformers, which must be able to open A.
      text_encoder: as in `open_model`, for A.
      say: called with each line of the report as soon as it is known.

    Raises:
      ValueError: where a folder is damaged or the two hold different kinds of model.
    """
    first, second = open_model(a, text_encoder), open_model(b)
    if pictures is not None and (sheet := Path(pictures) / _SHEET).exists() and not is_own(sheet):
        raise FileExistsError(f"{sheet} exists and is no picture of if_jax, so it is not replaced: give another folder")
    report = VerifyReport(say)
    for name, config_a, config_b, params_a, params_b, kind in _pairs(first, second):
        if config_a != config_b:
            differences = _unlike(config_a, config_b)
            report.add(f"{name}: configurations differ: {differences}", Difference(name, math.inf, differences))
            continue
        _compare_tensors(name, kind, params_a, params_b, tolerance, report)
        expected = torch_activations(first.folder / name, config_a) if torch else activations(config_a, params_a)
        gc.collect()  # the first net is gone before the second is loaded
        _compare_blocks(name, expected, activations(config_b, params_b), tolerance, report)
    _compare_settings(first, second, report)
    if pictures is not None:
        report.add(_draw_both(first, second, Path(pictures)))
    return report


def activations(config: UNetConfig | T5Config, params: Params) -> dict[str, np.ndarray]:
    """The output of every block of a network on one fixed random input; lazy parameters are loaded here.

    Returns:
      Block's name → its output, float32; "output" → that of the network.
    """
    out, kept = _compiled(config)(load_params(params), *_inputs(config))
    return {**dict(_flat(kept)), "output": np.asarray(out)}


@functools.cache
def _compiled(config: UNetConfig | T5Config) -> Callable[..., tuple[jax.Array, Outputs]]:
    """One program for both models: parameters and inputs → the output, and those of the blocks."""
    module = T5Encoder(config) if isinstance(config, T5Config) else UNet(config)

    @jax.jit
    def run(params: Params, *inputs: jax.Array) -> tuple[jax.Array, Outputs]:
        def is_block(module: nn.Module, method: str) -> bool:
            return method == "__call__" and bool(_BLOCKS.fullmatch(module.name or ""))

        out, kept = module.apply({"params": params}, *inputs, capture_intermediates=is_block, mutable="intermediates")
        return out, kept["intermediates"]

    return run


def torch_activations(folder: Path, config: UNetConfig | T5Config) -> dict[str, np.ndarray]:
    """The same from PyTorch: diffusers' UNet2DConditionModel or transformers' T5EncoderModel, opened from `folder`.

    Raises:
      ValueError: where one of the three is not installed or cannot open the folder.
    """
    try:
        import torch
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import T5EncoderModel
    except ImportError as error:
        raise ValueError(f"comparing with PyTorch needs torch, diffusers and transformers ({error})") from None
    is_text = isinstance(config, T5Config)
    folder = folder if folder.is_dir() else folder.parent  # a T5 folder alone
    try:
        net = (T5EncoderModel if is_text else UNet2DConditionModel).from_pretrained(folder).float().eval()
    except OSError as error:
        raise ValueError(f"{folder}: PyTorch cannot open it: {str(error).splitlines()[0]}") from None
    kept: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            kept[name] = _from_torch(out[0] if isinstance(out, tuple) else out)

        return hook

    for name, module in net.named_modules():
        ours = re.sub(r"\.(\d+)", r"_\1", name)
        if _BLOCKS.fullmatch(ours.rsplit(".", 1)[-1]):
            module.register_forward_hook(keep(ours))
    inputs = [torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else x) for x in _inputs(config)]
    with torch.inference_mode():
        if is_text:
            out = net(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
        else:
            out = net(inputs[0], inputs[1], inputs[2], class_labels=inputs[3] if len(inputs) > 3 else None).sample
    return {**kept, "output": _from_torch(out)}


def _from_torch(tensor: torch.Tensor) -> np.ndarray:
    values = tensor.float().numpy()
    return np.moveaxis(values, 1, -1) if values.ndim == 4 else values


def _inputs(config: UNetConfig | T5Config) -> tuple[np.ndarray, ...]:
    """One fixed random input of a network."""
    rng = np.random.default_rng(0)
    if isinstance(config, T5Config):
        ids = rng.integers(2, config.vocab_size, (2, TEXT_LENGTH)).astype(np.int32)
        return ids, (np.arange(TEXT_LENGTH) < [[TEXT_LENGTH], [9]]).astype(np.int32)
    side = min(config.sample_size, 2 * config.size_multiple)
    image = rng.normal(size=(2, side, side, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, config.states_length(TEXT_LENGTH), config.states_width)).astype(np.float32)
    level = (np.asarray([100, 700], np.int32),) if config.aug_level_embedding else ()
    return (image, np.asarray([10, 900], np.int32), text, *level)


def _pairs(first: Model, second: Model) -> list[tuple]:
    """The networks of both by name; ValueError where they hold different ones."""
    left, right = ({name: row for name, *row in model.networks()} for model in (first, second))
    if left.keys() != right.keys():
        raise ValueError(
            f"{first.folder} holds {', '.join(left)}; {second.folder} holds {', '.join(right)}: not the same kind of"
            " model"
        )
    return [(name, left[name][1], right[name][1], left[name][2], right[name][2], left[name][0]) for name in left]


def _compare_tensors(name: str, kind: names.Kind, a: Params, b: Params, tolerance: float, report: VerifyReport) -> None:
    """Both sides were opened strictly, so every tensor of one has its partner in the other."""
    first, second = names.lazy_torch(a, kind), names.lazy_torch(b, kind)
    compared, types = [], {}
    for tensor in first:
        left, right = np.asarray(first[tensor]), np.asarray(second[tensor])
        compared.append(_difference(f"{name}: {tensor}", left, right))
        if left.dtype != right.dtype:
            types[f"{left.dtype} and {right.dtype}"] = types.get(f"{left.dtype} and {right.dtype}", 0) + 1
    changed = [row for row in compared if row.relative > 0]
    largest = max(compared, key=lambda row: row.relative)
    stored = "".join(f", {count} stored as {pair}" for pair, count in types.items())
    report.add(
        f"{name}: {len(compared)} tensors, 0 unmapped, {len(changed)} differ, max |Δ| {largest.relative:.2g} relative"
        + (f" ({largest.name.split(': ')[1]})" if changed else "")
        + stored
    )
    failures = [row for row in changed if row.relative > tolerance]
    report.failures.extend(failures)
    for row in failures[:5]:
        report.add(f"  differs: {row.name.split(': ')[1]} by {row.relative:.2g} relative{row.note}")
    if len(failures) > 5:
        report.add(f"  and {len(failures) - 5} more")


def _compare_blocks(
    name: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float, report: VerifyReport
) -> None:
    for block in a:
        row = _difference(f"{name}: {block}", a[block], b[block])
        failures = () if row.relative <= tolerance else (row,)
        report.add(f"  {block:<32} max |Δ| {row.relative:.2g} relative{row.note}", *failures)


def _compare_settings(first: Model, second: Model, report: VerifyReport) -> None:
    """How the stages draw: schedulers, tokens, defaults."""
    for number, (a, b) in enumerate(zip(first.stages, second.stages, strict=True)):
        if a.scheduler != b.scheduler:
            differences = _unlike(a.scheduler, b.scheduler)
            failure = Difference("scheduler", math.inf, differences)
            report.add(f"stage {number + 1}: schedulers differ: {differences}", failure)
        if a.tokenizer and b.tokenizer:
            # Files of two kinds may hold one vocabulary, so what they make of all its pieces is compared.
            pieces = [PROMPT, "", "Ünïcödé <pad> 123", *a.tokenizer.pieces(), *b.tokenizer.pieces()]
            left, right = (tokenizer(pieces)[0] for tokenizer in (a.tokenizer, b.tokenizer))
            if a.tokenizer != b.tokenizer and not np.array_equal(left, right):
                report.add(f"stage {number + 1}: tokenizers differ", Difference("tokenizer", math.inf))
    if first.defaults and second.defaults and first.defaults != second.defaults:
        report.add("defaults of the cascades differ", Difference("defaults", math.inf))


def _draw_both(first: Model, second: Model, folder: Path) -> str:
    """One prompt, one seed, few steps, drawn by both: a grid of two rows."""
    path, rows = folder / _SHEET, []
    for model in (first, second):
        if not model.stages or model.stages[0].kind != "base" or model.stages[0].text_params is None:
            return f"{model.folder} cannot draw without a text encoder: no pictures"
        drawn = Cascade.of(model.stages, model.defaults).dream(PROMPT, if_I_kwargs={"num_inference_steps": 20})
        rows.append([pictures[0] for pictures in drawn.values()])
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [picture.resize(rows[0][-1].size, 0) for row in rows for picture in row]
    write_png(path, grid(pictures, columns=len(rows[0])))
    return f"pictures of both, one row each: {path}"


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    if a.shape != b.shape:
        return Difference(name, math.inf, f" (shapes {a.shape} and {b.shape})")
    if a.dtype == b.dtype and np.array_equal(a, b):
        return Difference(name, 0.0)
    left, right = a.astype(np.float32), b.astype(np.float32)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return Difference(name, math.inf, " (not finite)")
    gap = float(np.abs(left - right).max())
    return Difference(name, gap / max(float(np.abs(left).max()), float(np.finfo(np.float32).tiny)))


def _unlike(a: DataclassInstance, b: DataclassInstance) -> str:
    pairs = ((field.name, getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return ", ".join(f"{name} {x!r:.80} and {y!r:.80}" for name, x, y in pairs if x != y)


def _flat(tree: Outputs, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Block name → its output; a level that also returns its skips counts by its first output."""
    for key, value in tree.items():
        if key == "__call__":
            first = value[0]
            yield path, np.asarray(first[0] if isinstance(first, tuple) else first)
        else:
            yield from _flat(value, f"{path}.{key}" if path else key)
