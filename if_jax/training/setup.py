"""From a recipe on a mesh to its training step: networks, optimizer, abstract state, the step lowered, the first state.

Planning reads the same (`memory.py`, the doctor): nothing is allocated before `fresh_state` and `place_frozen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from if_jax.checkpoints.encoders import read_encoders
from if_jax.checkpoints.stages import Encoders, TextEncoder
from if_jax.checkpoints.weights import Params, boxed_params, load_params
from if_jax.checkpoints.words import with_words, word_rows
from if_jax.config import Recipe
from if_jax.data import pipeline
from if_jax.data.embeddings import Embeddings
from if_jax.models import int8
from if_jax.models.conditioning import CLIPShapes
from if_jax.models.t5 import T5Config
from if_jax.parallel import rules
from if_jax.text import tokens
from if_jax.text.clip_tokens import CaptionReader
from if_jax.training import distilling, host_facts, objective, optimizer, randomness
from if_jax.training.step import LossFn, TrainState, init_state, make_step
from if_jax.training.warm_start import start_from_release, with_start


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """A recipe on a mesh: all that its state and its step follow from, but for the weights."""

    recipe: Recipe
    networks: objective.Networks
    optimizer: optax.GradientTransformation
    mesh: Mesh | AbstractMesh
    sharding_rules: rules.Rules


def make_setup(
    recipe: Recipe,
    text_config: T5Config | None,
    mesh: Mesh | AbstractMesh,
    vocabulary: int = 0,
    clip: CLIPShapes | None = None,
) -> TrainingSetup:
    """Builds the parts that a recipe names.

    Args:
      recipe: what is trained.
      text_config: the frozen text encoder's configuration; None where the encoder is trained too.
      mesh: of the devices; an abstract one serves planning.
      vocabulary: ids of that encoder's tokenizer, the recipe's new words last; 0: as many as its table has rows, which
        does for planning.
      clip: what is read of a CLIP, where one is read.
    """
    tx = optimizer.make_optimizer(recipe.optimizer, recipe.steps)
    networks = objective.make_networks(recipe, text_config, vocabulary, clip)
    return TrainingSetup(recipe, networks, tx, mesh, rules.PRESETS[recipe.mesh.rules])


def abstract_state(setup: TrainingSetup) -> TrainState:
    """Shapes, dtypes and shardings of the training state, as a tree of `jax.ShapeDtypeStruct`."""
    return _with_shardings(setup, jax.eval_shape(partial(_init, setup), jax.random.key(setup.recipe.seed)))


def abstract_frozen(setup: TrainingSetup) -> dict[str, Params]:
    """Shapes and shardings of what is used but not trained, by network: a frozen text encoder, the UNet of a LoRA
    or of new words, a teacher and the text states of no caption by which it is guided.

    In the compute precision, since nothing is ever added to it, or that of `lora.base_dtype`. A text encoder whose
    states are kept (`data.embeddings`) is left out where neither samples nor validation need it.
    """
    recipe, configs = setup.recipe, {}
    kept = recipe.data.embeddings and not recipe.sample.every and not recipe.validation.every
    text, clip = setup.networks.text_encoder, setup.networks.clip
    if text is not None and not recipe.trains_text and not kept:
        configs["text_encoder"] = text.config
    if clip and clip.text and not kept:
        configs["clip_text"] = clip.text
    if clip and clip.vision:
        configs["clip_vision"] = clip.vision
    if recipe.keeps_base:
        configs["unet"] = setup.networks.unet.config
    if recipe.distill.method:
        configs["teacher"] = setup.networks.unet.config
    dtype = _frozen_dtype(recipe)
    trees = {name: _with_shardings(setup, boxed_params(config), dtype) for name, config in configs.items()}
    if recipe.lora.base_dtype == "int8":
        return {name: int8.abstract_kernels(tree) for name, tree in trees.items()}
    if recipe.distill.method and recipe.distill.guidance_scale != 1:
        shape = (1, recipe.text_length, setup.networks.unet.config.states_width)
        trees["empty"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rules.replicated(setup.mesh))
    return trees


def batch_rows(setup: TrainingSetup) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of one row of a batch on the devices, by name.

    Returns:
      "image" (S, S, 3) uint8, and "ids" and "mask" (L,) int32 of T5 and "clip_ids" of CLIP, as far as they are read, or
      their kept text states "states" (L, D) bfloat16.
    """
    recipe, networks = setup.recipe, setup.networks
    side, length, config = recipe.data.size, recipe.text_length, networks.unet.config
    rows: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((side, side, 3), np.uint8)}
    if recipe.data.embeddings:
        return rows | {"states": ((config.states_length(length), config.states_width), jnp.bfloat16)}
    if networks.text_encoder is not None:
        rows |= {"ids": ((length,), np.int32), "mask": ((length,), np.int32)}
    if networks.clip and networks.clip.text:
        rows["clip_ids"] = ((networks.clip.text.max_position_embeddings,), np.int32)
    return rows


def make_loss(setup: TrainingSetup) -> LossFn:
    """The loss of the recipe: that of its pictures, or of what a teacher says of them."""
    return (distilling if setup.recipe.distill.method else objective).make_loss(setup.networks, setup.recipe)


def lower_step(setup: TrainingSetup, state: TrainState, frozen: Params) -> jax.stages.Lowered:
    """Traces the training step for the mesh of the setup; compiles and allocates nothing.

    Args:
      setup: of a mesh of real devices.
      state: abstract, see `abstract_state`.
      frozen: parameters that are used but not trained, see `abstract_frozen`, abstract or not.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`, lowered; it takes the state's memory for the new one.
    """
    recipe, split = setup.recipe, rules.batch_sharding(setup.mesh, setup.sharding_rules)
    state_shardings, frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen))
    step = make_step(
        make_loss(setup),
        setup.optimizer,
        recipe.ema_decays,
        recipe.seed,
        recipe.guard,
        recipe.accumulate,
        partial(randomness.draw, recipe, recipe.batch_size),
        lambda part: jax.lax.with_sharding_constraint(part, split),
        recipe.posthoc_ema.lengths,
    )
    batch = {
        name: jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in batch_rows(setup).items()
    }
    # Output shardings are pinned: left free, the compiler moves un-annotated kernels after the first step.
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, frozen_shardings, split),
        out_shardings=(state_shardings, rules.replicated(setup.mesh)),
    )
    return jitted.lower(state, frozen, batch)


def fresh_state(setup: TrainingSetup, abstract: TrainState, text: TextEncoder | None = None) -> TrainState:
    """Step 0, made in place on the mesh: random weights (or factors of a LoRA), or those of the release `init_from`,
    without which a student starts as its teacher.

    Args:
      setup: of a mesh of real devices.
      abstract: see `abstract_state`.
      text: the frozen text encoder, of `read_frozen`: the rows of new words begin as they are there.

    Raises:
      ValueError: the release does not fit the recipe, see `start_from_release`.
    """
    recipe = with_start(setup.recipe)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once: on a CPU optimising its machine code takes longer than all else about it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    make = jax.jit(
        lambda key: nn.meta.unbox(_init(setup, key)),
        out_shardings=shardings,
        compiler_options=quick if jax.default_backend() == "cpu" else None,
    )
    key = jax.random.key(recipe.seed)
    if not recipe.init_from or recipe.lora.rank:
        return make(key)
    if text and recipe.new_words.tokens:
        rows = {"text_encoder": {"shared": {"embedding": word_rows(text, len(recipe.new_words.tokens))}}}
        params = load_params(rows, "float32", shardings.params)
    else:
        params = start_from_release(recipe, abstract.params, lambda: make(key).params)
    fill = partial(init_state, optimizer=setup.optimizer, decays=recipe.ema_decays, lengths=recipe.posthoc_ema.lengths)
    return jax.jit(fill, out_shardings=shardings, donate_argnums=0)(params)


def read_frozen(recipe: Recipe) -> Encoders:
    """Opens the frozen encoders: T5 of `text_encoder_from`, with the recipe's new words, and CLIP.

    Raises:
      FileNotFoundError, ValueError: one cannot be read, does not go with the UNet, or knows a new word already.
    """
    encoders = read_encoders(recipe.text_encoder_from, recipe.encoders, recipe.conditioning.clip_from)
    if encoders.t5 is None:
        return encoders
    host_facts.check_text_width(recipe, encoders.t5.config)
    if not recipe.new_words.tokens:
        return encoders
    try:
        return Encoders(with_words(encoders.t5, recipe.new_words.tokens, recipe.new_words.init))
    except ValueError as error:
        raise ValueError(f"recipe key new_words.tokens: {error}") from None


def caption_reader(recipe: Recipe, encoders: Encoders) -> CaptionReader:
    """Turns captions into what the encoders take; a T5 that is trained reads bytes."""
    t5 = encoders.t5.tokenizer if encoders.t5 else tokens.load_tokenizer("bytes") if recipe.trains_text else None
    return CaptionReader(t5, encoders.clip.tokenizer if encoders.clip else None, recipe.text_length)


def place_frozen(setup: TrainingSetup, encoders: Encoders, base: Params | None) -> dict[str, Params]:
    """Reads what is used but not trained onto the mesh, tensor by tensor.

    Args:
      setup: of a mesh of real devices.
      encoders: of `read_frozen`.
      base: the frozen UNet, of `warm_start.open_frozen_unet`.

    Returns:
      Parameters by network, as in `abstract_frozen`.
    """
    opened: dict[str, Any] = {"text_encoder": encoders.t5.params if encoders.t5 else None}
    opened |= {"unet": base, "teacher": base, **(encoders.clip.params if encoders.clip else {})}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_frozen(setup))
    empty = shardings.pop("empty", None)
    dtype = _frozen_dtype(setup.recipe)
    frozen: dict[str, Any] = {name: load_params(opened[name], dtype, own) for name, own in shardings.items()}
    if empty is not None:
        frozen["empty"] = _empty_states(setup, encoders, frozen, empty)
    return frozen


def open_source(recipe: Recipe) -> pipeline.Source:
    """The pictures and captions of `data.source`, indexed where they were not.

    Raises:
      FileNotFoundError, ValueError: one line that says what is wrong with them.
    """
    data = recipe.data
    pipeline.check_workers(data.source, data.workers)
    return pipeline.open_source(
        data.source, data.size, data.seed, data.preparation, data.keep, data.remote, data.exclude
    )


def open_batches(
    setup: TrainingSetup,
    source: pipeline.Source,
    read: CaptionReader,
    encoder: str,
    start: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every batch from step `start` on, as host arrays named as in `batch_rows`.

    Args:
      setup: whose recipe says how the source is read.
      source: of `open_source`.
      read: turns captions into what the encoders take.
      encoder: SHA-256 of the frozen encoders, which kept text states must have come from; "" for none.
      start: batches that are left out, because an earlier session has trained on them.
      part: (i, n) for the i-th of n equal parts of every batch, see `rules.batch_part`.
    """
    recipe, config = setup.recipe, setup.networks.unet.config
    return pipeline.batches(
        source,
        size=recipe.data.size,
        batch_size=recipe.batch_size,
        seed=recipe.data.seed,
        start_step=start,
        tokenize=read,
        text_names=read.names,
        states_shape=(config.states_length(recipe.text_length), config.states_width),
        caption_dropout=recipe.data.caption_dropout,
        shard_index=part[0],
        shard_count=part[1],
        threads=recipe.data.threads,
        workers=recipe.data.workers,
        preparation=recipe.data.preparation,
        keep=recipe.data.keep,
        embeddings=recipe.data.embeddings,
        encoder=encoder,
        settings=recipe.data.remote,
    )


def _empty_states(
    setup: TrainingSetup, encoders: Encoders, frozen: Params, sharding: jax.sharding.Sharding
) -> jax.Array:
    """The text states (1, L, D) of the empty caption: kept ones where those are read, or encoded once."""
    recipe = setup.recipe
    if recipe.data.embeddings:
        kept = Embeddings(recipe.data.embeddings, recipe.data.remote).states(0, 0, "")
        return jax.device_put(kept[None].astype(np.float32), sharding)
    read = caption_reader(recipe, encoders)
    encode = jax.jit(setup.networks.encode, out_shardings=sharding)
    return encode(frozen, dict(zip(read.names, read([""]), strict=True)))


def _frozen_dtype(recipe: Recipe) -> str:
    """Of what is frozen and not in int8."""
    dtype = recipe.lora.base_dtype
    return recipe.compute_dtype if dtype in ("", "int8") else dtype


def _with_shardings(setup: TrainingSetup, boxed: Any, dtype: str | None = None) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        rules.state_shardings(boxed, setup.mesh, setup.sharding_rules),
    )


def _init(setup: TrainingSetup, key: jax.Array) -> TrainState:
    params = objective.init_params(setup.networks, setup.recipe, key)
    return init_state(params, setup.optimizer, setup.recipe.ema_decays, setup.recipe.posthoc_ema.lengths)
