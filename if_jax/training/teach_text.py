"""Teaches a byte-level text encoder to read scene captions, before the stages of the demo are trained with it.

    python -m if_jax.training.teach_text encoders/demo
    if-jax train --config configs/demo_base.py --workdir runs/demo_I --config.text_encoder_from=encoders/demo

IF's encoder could read before the first picture was drawn. One that is trained by the denoising loss alone learns the
single words early, and which words belong together hardly at all: its gradients are mostly noise. Here every byte of
"two red cubes" must say number, size, colour, material and shape of the group it stands in and how this group stands
to the other, every byte what it is, and the end mark what all groups are. The heads that say it are thrown away.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


class CaptionHeads(nn.Module):
    """Linear, so that what a state says lies open for the attention of a UNet.

    fields: names and numbers of classes of what is said of a group of objects; groups: the most a caption names.
    """

    fields: tuple[tuple[str, int], ...]
    groups: int
    tokens: int

    @nn.compact
    def __call__(self, states: jax.Array, last: jax.Array) -> tuple[dict, dict, jax.Array]:
        """states (B, L, D), last (B,) the end mark's place -> logits.

        Of each field (B, L, classes), for the group a token stands in; of each field (B, groups, classes), from the end
        mark; of the token itself (B, L, tokens).
        """
        of_tokens = {name: nn.Dense(classes, name=f"token_{name}")(states) for name, classes in self.fields}
        end = states[jnp.arange(states.shape[0]), last]
        of_groups = {
            name: nn.DenseGeneral((self.groups, classes), name=f"group_{name}")(end) for name, classes in self.fields
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
_OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
_RELATION = re.compile("|".join(RELATIONS))
_PHRASE = re.compile(
    rf"\b(?P<number>an?|{'|'.join(NUMBERS[1:])})(?: (?P<size>{'|'.join(SIZES)}))?"
    rf"(?: (?P<colour>{'|'.join(COLOURS)}))?(?: (?P<material>{'|'.join(MATERIALS)}))?"
    rf" (?P<shape>{'|'.join(SHAPES)})s?\b"
)
_RATE = 3e-3
_WARM_UP = 100


class Said(NamedTuple):
    """What captions say, as indices into `FIELDS`."""

    of_bytes: np.ndarray  # (B, L, fields): of the group the byte stands in; number 0 outside of every group
    of_groups: np.ndarray  # (B, GROUPS, fields): in the order they are named; number 0 where there is none


def main() -> None:
    """Parses, teaches, measures on captions of held-out combinations, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write, for `text_encoder_from`")
    parser.add_argument("--encoder", default="demo", help="a preset that reads bytes")
    parser.add_argument("--steps", type=int, default=1_500, help=f"updates, {BATCH} captions each")
    parser.add_argument("--scenes", type=int, default=8_192, help="scenes of either kind that are described")
    given = parser.parse_args()
    if given.encoder not in T5_ENCODERS or T5_ENCODERS[given.encoder].vocab_size > 384:
        parser.error(f"--encoder {given.encoder}: no preset of a byte-level encoder, expected demo")
    if given.out.exists():
        parser.error(f"{given.out} exists: remove it or choose another folder")
    config = T5_ENCODERS[given.encoder]
    params, heads = teach(config, given.steps, given.scenes)
    print(json.dumps(measure(config, params, heads)))
    with atomic_folder(given.out) as beside:
        write_text_encoder(beside, config, jax.tree.map(np.asarray, params), Storage(), {})
        ByteTokenizer().save(beside)


def teach(config: T5Config, steps: int, count: int) -> tuple[Any, Any]:
    """The encoder's parameters after `steps` updates from random ones, and those of the heads."""
    described = _scenes(count)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, _RATE, min(_WARM_UP, steps // 2), steps), 0.9, 0.99),
    )
    none = jnp.zeros((1, 2), int)
    params = meta.unbox(T5Encoder(config).init(jax.random.key(SEED), none, none + 1)["params"])
    heads = HEADS.init(jax.random.key(SEED + 1), jnp.zeros((1, 2, config.d_model)), none[0, :1])
    trained = (params, heads)
    moments = optimizer.init(trained)
    rng = np.random.default_rng(SEED)
    with tqdm.trange(steps, desc="text encoder") as bar:
        for step in bar:
            captions = [_describe(described[i], rng) for i in rng.integers(len(described), size=BATCH)]
            trained, moments, loss = _step(trained, moments, *_batch(captions), config=config, optimizer=optimizer)
            if step % 50 == 49:
                bar.set_postfix(loss=f"{float(loss):.3f}")
    return trained


def measure(config: T5Config, params: Any, heads: Any, count: int = 1024) -> dict[str, float]:
    """Shares said rightly of captions of the held-out split: bytes in everything, captions in everything."""
    rng = np.random.default_rng(SEED + 1)
    drawn, kinds = tasks.sample_tasks(np.arange(count), SEED + 1, True)
    pairs = zip(as_numpy(drawn), np.asarray(kinds), strict=True)
    captions = [tasks.caption(scene, int(task), rng) for scene, task in pairs]
    ids, mask, said = _batch(captions)
    run = jax.jit(lambda p, h, i, m: HEADS.apply(h, T5Encoder(config).apply({"params": p}, i, m), m.sum(1) - 1))
    of_bytes, of_groups, _ = run(params, heads, ids, mask)
    there = said.of_bytes[..., 0] > 0
    right = np.all([np.argmax(of_bytes[name], -1) == said.of_bytes[..., k] for k, name in enumerate(FIELDS)], 0)
    whole = [np.argmax(of_groups[name], -1) == said.of_groups[..., k] for k, name in enumerate(FIELDS)]
    whole[1:] = [fine | (said.of_groups[..., 0] == 0) for fine in whole[1:]]
    return {"bytes": float(right[there].mean()), "captions": float(np.all(whole, axis=(0, 2)).mean())}


def said(caption: str, length: int) -> Said:
    """What one caption of the grammars says, without the batch's dimension."""
    of_bytes, of_groups = np.zeros((length, len(FIELDS)), np.int32), np.zeros((GROUPS, len(FIELDS)), np.int32)
    phrases = list(_PHRASE.finditer(caption))
    related = _RELATION.search(caption) if len(phrases) == 2 else None
    for number, phrase in enumerate(phrases):
        words = phrase.groupdict(default="")
        words["number"] = {"a": "one", "an": "one"}.get(words["number"], words["number"])
        relation = related.group() if related else ""
        words["place"] = _OPPOSITE.get(relation, "") if number else relation
        row = [names.index(words[name]) for name, names in FIELDS.items()]
        of_bytes[phrase.start() : phrase.end()] = of_groups[number] = row
    return Said(of_bytes, of_groups)


def _scenes(count: int) -> list[tuple[Scene, int | None]]:
    """Scenes to describe, with their task where they are of one; no combination that is held out."""
    drawn, kinds = tasks.sample_tasks(np.arange(count), SEED)
    plain = as_numpy(sampling.sample_scenes(np.arange(count), SEED))
    asked = zip(as_numpy(drawn), map(int, np.asarray(kinds)), strict=True)
    return [*asked, *((scene, None) for scene in plain if not tasks.novelties(scene))]


def _describe(described: tuple[Scene, int | None], rng: np.random.Generator) -> str:
    scene, task = described
    return grammar.caption(scene, rng) if task is None else tasks.caption(scene, task, rng)


def _batch(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, Said]:
    ids, mask = ByteTokenizer()(captions)
    rows = [said(caption, ids.shape[1]) for caption in captions]
    return ids, mask, Said(*(np.stack(column) for column in zip(*rows, strict=True)))


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def _step(
    trained: tuple[Any, Any],
    moments: Any,
    ids: jax.Array,
    mask: jax.Array,
    wanted: Said,
    *,
    config: T5Config,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any, jax.Array]:
    loss, gradient = jax.value_and_grad(_loss)(trained, ids, mask, wanted, config)
    update, moments = optimizer.update(gradient, moments, trained)
    return optax.apply_updates(trained, update), moments, loss


def _loss(trained: tuple[Any, Any], ids: jax.Array, mask: jax.Array, wanted: Said, config: T5Config) -> jax.Array:
    """Mean cross entropies, in nats, summed over fields."""
    params, heads = trained
    states = T5Encoder(config).apply({"params": params}, ids, mask)
    of_bytes, of_groups, itself = HEADS.apply(heads, states, mask.sum(1) - 1)
    total = _mean(itself, ids, mask)
    for said_by, fields in ((of_bytes, wanted.of_bytes), (of_groups, wanted.of_groups)):
        there = fields[..., 0] > 0
        for number, (name, logits) in enumerate(said_by.items()):
            weight = mask if name == "number" and said_by is of_bytes else there
            weight = jnp.ones_like(there) if name == "number" and said_by is of_groups else weight
            total += _mean(logits, fields[..., number], weight)
    return total


def _mean(logits: jax.Array, wanted: jax.Array, weight: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1)


if __name__ == "__main__":
    main()
