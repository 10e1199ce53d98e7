"""Teaches a byte-level text encoder to read scene captions, before the stages of the demo are trained with it.

    python -m if_jax.training.teach_text encoders/demo
    if-jax train --config configs/demo_base.py --workdir runs/demo_I --config.text_encoder_from=encoders/demo

IF's encoder could read before the first picture was drawn. One that is trained by the denoising loss alone learns the
single words early, and which words belong together hardly at all: its gradients are mostly noise. Here every byte of
"two red cubes" must say number, size, colour, material and shape of the group it stands in and how this group stands
to the other, every byte what it is, and the end mark and all pads after it what all groups are. The heads that say it
are thrown away.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import linen as nn
from flax.core import meta

from if_jax.checkpoints.files import atomic_folder
from if_jax.checkpoints.release import write_text_encoder
from if_jax.checkpoints.tensors import Storage
from if_jax.models.presets import T5_ENCODERS
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.scenes import grammar, sampling, tasks
from if_jax.scenes.scene import COLOURS, MATERIALS, NUMBERS, RELATIONS, SHAPES, SIZES, Scene, as_numpy
from if_jax.text.tokens import ByteTokenizer

HeadLogits: TypeAlias = tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]


class CaptionHeads(nn.Module):
    """Linear heads: what a state says then lies open for the attention of a UNet."""

    fields: tuple[tuple[str, int], ...]  # name and number of classes of what is said of a group of objects
    groups: int  # the most a caption names
    tokens: int  # vocabulary

    @nn.compact
    def __call__(self, states: jax.Array) -> HeadLogits:
        """Read text states (B, L, D).

        Returns:
          Logits of each field (B, L, classes), for the group a token stands in; of each field (B, L, groups, classes),
          for all groups; of the token itself (B, L, tokens).
        """
        of_tokens = {name: nn.Dense(classes, name=f"token_{name}")(states) for name, classes in self.fields}
        of_groups = {
            name: nn.DenseGeneral((self.groups, classes), name=f"group_{name}")(states) for name, classes in self.fields
        }
        return of_tokens, of_groups, nn.Dense(self.tokens, name="itself")(states)


SEED = 3_000_003  # of the captions; no picture of these scenes is drawn anywhere
BATCH = 32
GROUPS = 3  # of a scene, at most
# What a group's words say. Number 0 is "no group", place 0 "not said"; so is index 0 of the others but for shape.
_UNSAID = ("",)
FIELDS = {
    "number": NUMBERS,
    "size": _UNSAID + SIZES,
    "colour": _UNSAID + COLOURS,
    "material": _UNSAID + MATERIALS,
    "shape": SHAPES,
    "place": _UNSAID + RELATIONS,
}
_BYTES = 256 + 3  # three special tokens come first
HEADS = CaptionHeads(tuple((name, len(names)) for name, names in FIELDS.items()), GROUPS, _BYTES)
_RATE = 3e-3
_WARM_UP = 100


class CaptionTargets(NamedTuple):
    """What captions say, as int32 indices into `FIELDS`; all with a leading B for a batch."""

    of_bytes: np.ndarray  # (L, fields): of the group the byte stands in; number 0 outside of every group
    of_groups: np.ndarray  # (GROUPS, fields): in the order they are named; number 0 where there is none


def main() -> None:
    """Parses, teaches, measures on captions of held-out combinations, writes."""
    parser = argparse.ArgumentParser(description="Teaches a byte-level text encoder to read scene captions.")
    parser.add_argument("out", type=Path, help="the folder to write, for `text_encoder_from`")
    parser.add_argument("--encoder", default="demo", help="a preset that reads bytes")
    parser.add_argument("--steps", type=int, default=6_000, help=f"updates, {BATCH} captions each")
    parser.add_argument("--scenes", type=int, default=32_768, help="scenes of either kind that are described")
    args = parser.parse_args()
    if args.encoder not in T5_ENCODERS or T5_ENCODERS[args.encoder].vocab_size > 384:
        parser.error(f"--encoder {args.encoder}: no preset of a byte-level encoder, expected demo")
    if args.out.exists():
        parser.error(f"{args.out} exists: remove it or choose another folder")
    config = T5_ENCODERS[args.encoder]
    params, heads = teach(config, args.steps, args.scenes)
    print(json.dumps(measure(config, params, heads)))
    with atomic_folder(args.out) as beside:
        write_text_encoder(beside, config, jax.tree.map(np.asarray, params), Storage(), {})
        ByteTokenizer().save(beside)


def teach(config: T5Config, steps: int, count: int) -> tuple[Any, Any]:
    """Train an encoder from random parameters on captions.

    Args:
      config: of an encoder that reads bytes.
      steps: updates, of `BATCH` captions each.
      count: scenes of either kind that are described, again and again in other words.

    Returns:
      The encoder's parameters, and those of the heads.
    """
    scenes = _scenes(count)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, _RATE, min(_WARM_UP, steps // 2), steps), 0.9, 0.99),
    )
    none = jnp.zeros((1, 2), int)
    params = meta.unbox(T5Encoder(config).init(jax.random.key(SEED), none, none + 1)["params"])
    heads = HEADS.init(jax.random.key(SEED + 1), jnp.zeros((1, 2, config.d_model)))
    trained = (params, heads)
    moments = optimizer.init(trained)
    rng = np.random.default_rng(SEED)
    with tqdm.trange(steps, desc="text encoder") as bar:
        for step in bar:
            captions = [_describe(*scenes[int(i)], rng) for i in rng.integers(len(scenes), size=BATCH)]
            trained, moments, loss = _step(trained, moments, *_batch(captions), config=config, optimizer=optimizer)
            if step % 50 == 49:
                bar.set_postfix(loss=f"{float(loss):.3f}")
    return trained


def measure(config: T5Config, params: Any, heads: Any, count: int = 1024) -> dict[str, float]:
    """Read captions of the held-out split.

    Args:
      config: of the encoder.
      params: its parameters.
      heads: those of the heads.
      count: captions.

    Returns:
      Shares of which every field is right: of "bytes"; of "captions", as their end mark and their "last_pad" say.
    """
    rng = np.random.default_rng(SEED + 1)
    batch, kinds = tasks.sample_tasks(np.arange(count), SEED + 1, True)
    pairs = zip(as_numpy(batch), np.asarray(kinds), strict=True)
    ids, mask, targets = _batch([tasks.caption(scene, int(task), rng) for scene, task in pairs])
    of_bytes, of_groups, _ = jax.jit(partial(_read, config))((params, heads), ids, mask)
    there = targets.of_bytes[..., 0] > 0
    right = np.all([np.argmax(of_bytes[name], -1) == targets.of_bytes[..., k] for k, name in enumerate(FIELDS)], 0)
    wanted = targets.of_groups[:, None]  # the same at every position
    whole = [np.argmax(of_groups[name], -1) == wanted[..., k] for k, name in enumerate(FIELDS)]
    whole[1:] = [fine | (wanted[..., 0] == 0) for fine in whole[1:]]
    captions = np.all(whole, axis=(0, 3))  # (count, L)
    end = captions[np.arange(count), mask.sum(1) - 1]
    return {
        "bytes": float(right[there].mean()),
        "captions": float(end.mean()),
        "last_pad": float(captions[:, -1].mean()),
    }


def caption_targets(caption: str, length: int) -> CaptionTargets:
    """What a caption of the scenes' grammar says of each of its first `length` bytes and of each group."""
    of_bytes, of_groups = np.zeros((length, len(FIELDS)), np.int32), np.zeros((GROUPS, len(FIELDS)), np.int32)
    parsed = grammar.parse_caption(caption)
    for number, (group, (start, end)) in enumerate(zip(parsed.groups, parsed.spans, strict=True)):
        relation = parsed.relation and (grammar.OPPOSITE[parsed.relation] if number else parsed.relation)
        words = {**group._asdict(), "number": NUMBERS[group.number], "place": relation}
        of_groups[number] = [names.index(words[name] or "") for name, names in FIELDS.items()]
        of_bytes[start:end] = of_groups[number]
    return CaptionTargets(of_bytes, of_groups)


def _scenes(count: int) -> list[tuple[Scene, int | None]]:
    """Scenes to describe, with their task where they are of one; no combination that is held out."""
    batch, kinds = tasks.sample_tasks(np.arange(count), SEED)
    plain = as_numpy(sampling.sample_scenes(np.arange(count), SEED))
    of_tasks = zip(as_numpy(batch), map(int, np.asarray(kinds)), strict=True)
    return [*of_tasks, *((scene, None) for scene in plain if not tasks.novelties(scene))]


def _describe(scene: Scene, task: int | None, rng: np.random.Generator) -> str:
    return grammar.caption(scene, rng) if task is None else tasks.caption(scene, task, rng)


def _batch(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, CaptionTargets]:
    ids, mask = ByteTokenizer()(captions)
    rows = [caption_targets(caption, ids.shape[1]) for caption in captions]
    return ids, mask, CaptionTargets(*(np.stack(column) for column in zip(*rows, strict=True)))


def _read(config: T5Config, trained: tuple[Any, Any], ids: jax.Array, mask: jax.Array) -> HeadLogits:
    params, heads = trained
    states = T5Encoder(config).apply({"params": params}, ids, mask)
    return cast(HeadLogits, HEADS.apply(heads, states))


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def _step(
    trained: tuple[Any, Any],
    moments: Any,
    ids: jax.Array,
    mask: jax.Array,
    targets: CaptionTargets,
    *,
    config: T5Config,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any, jax.Array]:
    loss, gradient = jax.value_and_grad(_loss)(trained, ids, mask, targets, config)
    update, moments = optimizer.update(gradient, moments, trained)
    return optax.apply_updates(trained, update), moments, loss


def _loss(
    trained: tuple[Any, Any], ids: jax.Array, mask: jax.Array, targets: CaptionTargets, config: T5Config
) -> jax.Array:
    """Mean cross entropies, in nats, summed over fields. That a byte or place names no group is a class of `number`.

    All groups are asked of the end mark and of every pad after it: a UNet attends to the pads as well.
    """
    of_bytes, of_groups, itself = _read(config, trained, ids, mask)
    total = _mean(itself, ids, mask)
    from_end = jnp.arange(ids.shape[1]) >= mask.sum(1, keepdims=True) - 1  # (B, L)
    groups = jnp.broadcast_to(targets.of_groups[:, None], (*ids.shape, *targets.of_groups.shape[1:]))
    at_end = jnp.broadcast_to(from_end[..., None], groups.shape[:-1])
    for fields, classes, possible in ((of_bytes, targets.of_bytes, mask), (of_groups, groups, at_end)):
        there = possible * (jnp.asarray(classes[..., 0]) > 0)
        for number, (name, logits) in enumerate(fields.items()):
            total += _mean(logits, jnp.asarray(classes[..., number]), possible if name == "number" else there)
    return total


def _mean(logits: jax.Array, classes: jax.Array, weight: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1)


if __name__ == "__main__":
    main()
