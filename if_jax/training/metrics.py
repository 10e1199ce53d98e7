"""What a run reports of itself: means over a window of steps, speed, and the share of the hardware's peak."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax

from if_jax.config import Recipe
from if_jax.models.flops import t5_flops, unet_flops
from if_jax.training.objective import T_BUCKETS, Networks

# Peak dense bfloat16 TFLOP/s of one device, by the beginning of its kind (vendors' data sheets).
PEAK_TFLOPS = {
    "TPU v6": 918.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
}
_REPLACED = "pictures_replaced"  # in a window, where there are any
_COUNTERS = ("skipped", "skipped_in_a_row")  # reported as they are, not as means


def step_flops(recipe: Recipe, networks: Networks) -> float:
    """Floating-point operations of one update: forward and twice that backward; recomputation is not counted.

    Beside a frozen kernel (LoRA, new words) the backward pass costs as much as the forward one: the factors are not
    counted, nor is a CLIP that is read.
    """
    passes = 2 if recipe.keeps_base else 3
    config = networks.unet.config
    tokens = sum(part.tokens for part in config.text_parts) or recipe.text_length
    unet = unet_flops(config, recipe.data.crop or recipe.data.size, tokens)
    text_trained = recipe.lora.text_encoder or recipe.new_words.tokens or recipe.trains_text
    text_passes = passes if text_trained else 1
    text = networks.text_encoder
    read = t5_flops(text.config, recipe.text_length) * text_passes if text is not None else 0
    return float(recipe.batch_size * ((passes + _teacher_passes(recipe)) * unet + read))


def _teacher_passes(recipe: Recipe) -> int:
    """Forward passes of a teacher, and of a student that finishes what it began."""
    own = recipe.distill
    if not own.method:
        return 0
    branches = 1 if own.guidance_scale == 1 else 2
    return branches * own.substeps if own.method == "progressive" else branches + 1


def peak_tflops(device_kind: str) -> float | None:
    """The peak of a kind of device, None where it is not in the table (a CPU)."""
    return next((peak for kind, peak in PEAK_TFLOPS.items() if device_kind.startswith(kind)), None)


class Window:
    """Collects the metrics of `log_every` steps; stops the run where updates can no longer be made."""

    def __init__(
        self, recipe: Recipe, schedule: optax.Schedule, flops: float, rows: list[dict[str, Any]] | None = None
    ) -> None:
        """Begins a window.

        Args:
          recipe: says how long it is, and when a run stops.
          schedule: learning rate by the number of updates made.
          flops: of one update, see `step_flops`.
          rows: those of the window that an earlier session began, as its checkpoint has them.
        """
        self._recipe, self._schedule, self._flops = recipe, schedule, flops
        self.rows: list[dict[str, Any]] = list(rows or [])  # JSON values
        self._own = 0  # rows of this session, which are timed
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any], replaced: int = 0) -> dict[str, float] | None:
        """Takes the metrics of a step.

        Args:
          step: its number.
          metrics: scalars and small vectors by name, on the devices.
          replaced: pictures of this process's part of the batch that another one stands for.

        Returns:
          The means of the window when it is full, else None.

        Raises:
          FloatingPointError: so many updates in a row were left out that the run cannot recover.
        """
        row = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
        if row["skipped_in_a_row"] >= self._recipe.guard.max_in_a_row:
            raise FloatingPointError(
                f"{row['skipped_in_a_row']} updates in a row were left out, the last at step {step} with loss "
                f"{float(row['loss']):.4g} and gradient norm {float(row['grad_norm']):.4g}: the newest checkpoint is "
                f"sound; lower optimizer.learning_rate ({self._recipe.optimizer.learning_rate}) and start from it with "
                "init_from, or look at the data"
            )
        self.rows.append(row | ({_REPLACED: replaced} if replaced else {}))
        self._own += 1
        if step % self._recipe.log_every:
            return None
        report = self._report(step)
        self.rows, self._own, self._since = [], 0, time.perf_counter()
        return report

    def _report(self, step: int) -> dict[str, float]:
        rows, recipe = self.rows, self._recipe
        finite = [row for row in rows if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])] or rows
        sums = {name: np.sum([row[name] for row in finite], 0) for name in ("mse_sum_by_t", "count_by_t")}
        plain = [name for name in rows[0] if name not in sums and name not in (*_COUNTERS, _REPLACED)]
        means = {name: float(np.mean([row[name] for row in finite])) for name in plain}
        for name, total, count in zip(T_BUCKETS, sums["mse_sum_by_t"], sums["count_by_t"], strict=True):
            if count and np.isfinite(total):
                means[f"mse_{name}"] = float(total / count)
        if replaced := sum(row.get(_REPLACED, 0) for row in rows):
            means[_REPLACED] = float(replaced)
        seconds = (time.perf_counter() - self._since) / self._own
        total_skipped = int(rows[-1]["skipped"])
        # The optimizer counts the updates that were made.
        rate = self._schedule(max(step - total_skipped - 1, 0))
        means |= {"learning_rate": float(np.asarray(rate)), "step_seconds": seconds}
        means |= {"skipped": total_skipped, "images_per_second": recipe.batch_size / seconds}
        means["images_per_second_per_device"] = means["images_per_second"] / jax.device_count()
        means["input_wait_share"] = means.pop("input_wait") / seconds
        means["tflops_per_device"] = self._flops / seconds / jax.device_count() / 1e12
        if peak := peak_tflops(jax.devices()[0].device_kind):
            means["mfu"] = means["tflops_per_device"] / peak
        return means
