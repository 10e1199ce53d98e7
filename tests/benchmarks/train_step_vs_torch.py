"""Times one training step of a stage with if_jax and with PyTorch, side by side, and says how equal the losses are.

    python tests/benchmarks/train_step_vs_torch.py [--unet demo-I] [--batch 8] [--rounds 5]

Both sides have the same UNet and weights, batch, text states, timesteps and noise, IF's hybrid loss, a global-norm
clip, AdamW and one EMA, in float32. The PyTorch side is diffusers' UNet2DConditionModel in the memory format in which
it is faster, with scaled-dot-product attention and the foreach optimizer, on all cores. The two take turns in one
process; the fastest of the rounds counts, compilation apart. The last line is one JSON object; a ratio above 1 means
that if_jax is faster. `share_of_peak` is held against the best float32 matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dream_vs_diffusers import PAUSE, matmul_peak, to_torch

from if_jax.checkpoints import names
from if_jax.config import OptimizerConfig
from if_jax.diffusion import losses, process
from if_jax.diffusion.schedule import cosine_schedule
from if_jax.models.flops import unet_flops
from if_jax.models.presets import UNETS
from if_jax.models.unet import UNet, UNetConfig
from if_jax.training.optimizer import make_optimizer
from if_jax.training.step import init_state, make_step

LENGTH, DECAY, RATE = 77, 0.999, 1e-4
OPTIMIZER = OptimizerConfig(learning_rate=RATE, warmup_steps=0, schedule="constant")


def main() -> None:
    """Measure, print a line for people and one JSON line for machines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unet", default="demo-I", choices=UNETS)
    parser.add_argument("--size", type=int, help="side of the pictures [default: 64]")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    config, size = UNETS[given.unet], given.size or 64
    batch = make_batch(config, given.batch, size)
    params = random_params(config, batch)
    ours, compile_seconds = jax_step(config, params, batch)
    sides = {name: torch_step(config, params, batch, name) for name in ("contiguous_format", "channels_last")}
    sides["if_jax"] = ours
    found = {name: step() for name, step in sides.items()}  # the first step's loss, from equal weights
    best = dict.fromkeys(sides, math.inf)
    for _ in range(given.rounds):
        for name, step in sides.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
    flops, peak = 3 * given.batch * unet_flops(config, size, LENGTH), matmul_peak()
    rival = min(("contiguous_format", "channels_last"), key=best.get)
    row = {
        "ratio": round(best[rival] / best["if_jax"], 3),
        "share_of_peak": round(flops / best["if_jax"] / peak, 3),
        "torch_share_of_peak": round(flops / best[rival] / peak, 3),
        "loss_rel_diff": abs(found["if_jax"] / found[rival] - 1),
        "seconds": {"if_jax": round(best["if_jax"], 3), "torch": round(best[rival], 3)},
        "torch_memory_format": rival,
        "compile_seconds": round(compile_seconds, 1),
        "gflop_per_step": round(flops / 1e9, 1),
        "matmul_gflops": round(peak / 1e9, 1),
        "unet": given.unet,
        "batch": given.batch,
        "size": size,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "torch", "diffusers")},
    }
    print(
        f"{given.unet}, {size} px, batch {given.batch}: if_jax {best['if_jax']:.2f} s a step "
        f"({row['share_of_peak']:.0%} of the matmul peak), torch {best[rival]:.2f} s "
        f"({row['torch_share_of_peak']:.0%}, {rival}); ratio {row['ratio']:.2f}; "
        f"losses agree to {row['loss_rel_diff']:.1e}"
    )
    print(json.dumps(row))


def make_batch(config: UNetConfig, rows: int, size: int) -> dict[str, np.ndarray]:
    """Everything random, drawn once for both sides."""
    rng = np.random.default_rng(0)
    image = (rows, size, size, 3)
    batch = {
        "x0": rng.uniform(-1, 1, image).astype(np.float32),
        "eps": rng.standard_normal(image, np.float32),
        "t": rng.integers(1, 1000, rows).astype(np.int32),
        "states": rng.standard_normal((rows, LENGTH, config.encoder_hid_dim), np.float32),
    }
    if config.aug_level_embedding:
        batch["low"] = rng.uniform(-1, 1, image).astype(np.float32)
        batch["level"] = rng.integers(0, 1000, rows).astype(np.int32)
    return batch


def random_params(config: UNetConfig, batch: dict[str, np.ndarray]) -> Any:
    """IF's start, moved off zero where it is zero, so that every gradient counts."""
    from flax import linen as nn

    x, t, states, *level = shown(batch, jnp.asarray(batch["x0"]))
    params = nn.unbox(jax.jit(UNet(config).init)(jax.random.key(0), x, t, states, *level)["params"])
    return jax.tree.map(lambda leaf: leaf if leaf.any() else leaf + 0.02, jax.device_get(params))


def shown(batch: dict[str, Any], x_t: Any) -> tuple:
    """The network's inputs."""
    if "low" not in batch:
        return x_t, batch["t"], batch["states"]
    return jnp.concatenate([x_t, batch["low"]], -1), batch["t"], batch["states"], batch["level"]


def jax_step(config: UNetConfig, params: Any, batch: dict[str, np.ndarray]) -> tuple[Any, float]:
    """(one call = one step, returning the loss; seconds of compiling)."""
    schedule, net = cosine_schedule(), UNet(config)

    def loss(params: Any, frozen: Any, batch: dict, drawn: dict) -> tuple[jax.Array, dict]:
        x_t = process.add_noise(schedule, batch["x0"], batch["t"], batch["eps"])
        output = net.apply({"params": params}, *shown(batch, x_t))
        parts = losses.hybrid_loss(schedule, output, batch["x0"], x_t, batch["eps"], batch["t"])
        mean = jnp.mean(parts["loss"])
        return mean, {"loss": mean}

    tx = make_optimizer(OPTIMIZER, 1000)
    state = jax.jit(partial(init_state, optimizer=tx, decays=(DECAY,)))(params)
    start = time.perf_counter()
    step = jax.jit(make_step(loss, tx, (DECAY,), 0), donate_argnums=0).lower(state, {}, batch).compile()
    seconds, kept = time.perf_counter() - start, [state]

    def call() -> float:
        kept[0], metrics = step(kept[0], {}, batch)
        return float(jax.block_until_ready(metrics["loss"]))

    return call, seconds


def torch_step(config: UNetConfig, params: Any, batch: dict[str, np.ndarray], memory_format: str) -> Any:
    """One call = one step of the PyTorch side, returning the loss."""
    import torch
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel.from_config(names.unet_config_to_diffusers(config))
    net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in names.to_torch(params, "unet")})
    net = net.train().to(memory_format=getattr(torch, memory_format))
    ema = [parameter.detach().clone() for parameter in net.parameters()]
    adam = torch.optim.AdamW(net.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    x0, eps, *low = (to_torch(batch[name]) for name in ("x0", "eps", "low") if name in batch)
    t, states = torch.from_numpy(batch["t"]).long(), torch.from_numpy(batch["states"])
    level = torch.from_numpy(batch["level"]).long() if "level" in batch else None
    loss_fn = TorchLoss()

    def call() -> float:
        x_t = loss_fn.at("sqrt_alpha_bar", t) * x0 + loss_fn.at("sqrt_one_minus_alpha_bar", t) * eps
        x = torch.cat([x_t, *low], 1).contiguous(memory_format=getattr(torch, memory_format))
        output = net(x, t, states, class_labels=level).sample
        loss = loss_fn(output, x0, x_t, eps, t)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(net.parameters()), 1 - DECAY)
        return loss.item()

    return call


class TorchLoss:
    """IF's hybrid loss for steps t > 0 in PyTorch: the equations of if_jax/diffusion/losses.py."""

    def __init__(self) -> None:
        import torch

        schedule = cosine_schedule()
        words = ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "posterior_coef_x0", "posterior_coef_xt")
        words += ("log_beta", "posterior_log_variance")
        self.tables = {word: torch.from_numpy(np.asarray(getattr(schedule, word), np.float32)) for word in words}

    def at(self, word: str, t: Any) -> Any:
        return self.tables[word][t].view(-1, 1, 1, 1)

    def __call__(self, output: Any, x0: Any, x_t: Any, eps: Any, t: Any) -> Any:
        predicted, v = output.chunk(2, 1)
        mse = (eps - predicted).square().mean((1, 2, 3))
        x0_hat = (x_t - self.at("sqrt_one_minus_alpha_bar", t) * predicted.detach()) / self.at("sqrt_alpha_bar", t)
        gap = self.at("posterior_coef_x0", t) * (x0 - x0_hat)
        true_log = self.at("posterior_log_variance", t)
        log = true_log + (v + 1) / 2 * (self.at("log_beta", t) - true_log)
        kl = 0.5 * ((true_log - log).exp() - (true_log - log) - 1 + gap.square() * (-log).exp())
        return (mse + kl.mean((1, 2, 3)) / math.log(2)).mean()


if __name__ == "__main__":
    main()
