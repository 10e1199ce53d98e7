"""What a stage is trained on: from a batch of pictures and captions to IF's hybrid loss.

Base stage:              x0 = picture;      the UNet sees x_t, t and the text.
Super-resolution stage:  x0 = picture;      the UNet sees [x_t, noised upsampled low-res picture], t, aug level, text.
The low-resolution picture is the training picture itself, downsampled with antialiasing and noised at a level drawn
uniformly from the 1000 steps, which the UNet is told (Ho et al. 2021, "Cascaded Diffusion Models", section 4.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from if_jax.checkpoints.weights import Params, boxed_params
from if_jax.config import LoraConfig, Recipe
from if_jax.diffusion import augment, losses, process
from if_jax.diffusion.schedule import Schedule, cosine_betas, cosine_schedule, schedule_from_betas
from if_jax.models import lora, presets
from if_jax.models.conditioning import CLIPShapes, clip_text_rows, join, keep, picture_vectors, with_picture
from if_jax.models.copy_start import start_by_copying
from if_jax.models.lora import AdaptedParams
from if_jax.models.t5 import T5Config, T5Encoder
from if_jax.models.unet import UNet, UNetConfig
from if_jax.parallel import rules
from if_jax.training.randomness import stream
from if_jax.training.stage import unet_config
from if_jax.training.step import Batch

T_BUCKETS = ("t0-249", "t250-499", "t500-749", "t750-999")  # quarters of the chain, for the metrics


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a stage as modules.

    Parameters travel separately: {"unet": …, "text_encoder": …, "clip_text": …, "clip_vision": …} or fewer.
    """

    unet: UNet
    text_encoder: T5Encoder | None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    vocabulary: int = 0  # rows of the token embedding that are in use, those of new words last
    clip: CLIPShapes | None = None  # what is read of a CLIP
    dtype: DTypeLike = jnp.float32  # that CLIP is computed in

    def joined(self, frozen: Params, params: Params) -> dict[str, Params | AdaptedParams]:
        """The parameters of both networks.

        Where one is both frozen and trained, what is trained are factors beside it, or the rows of new words.

        Args:
          frozen: parameters by network that are used and not trained.
          params: those that are trained.
        """
        both = {**frozen, **params}
        for name in frozen.keys() & params.keys():
            if not self.lora.rank:
                both[name] = _with_rows(frozen[name], params[name], self.vocabulary)
                continue
            both[name] = AdaptedParams(frozen[name], params[name], self.lora.scale, self.lora.dropout)
        return both

    def encode(
        self, params: Mapping[str, Params | AdaptedParams], batch: Batch, keys: jax.Array | None = None
    ) -> jax.Array:
        """What the UNet is told by a batch.

        Args:
          params: by network, see `joined`.
          batch: "ids" and "mask" (B, L) of T5 and "clip_ids" of CLIP, as far as they are read, or text states "states"
            that were kept; and, where CLIP reads pictures, "image" uint8 (B, S, S, 3), without which none is read.
          keys: see `lora.apply`.

        Returns:
          Text states (B, L, D) float32, see `conditioning`.
        """
        parts = self.unet.config.text_parts if self.clip else ()
        if "states" in batch:
            states = batch["states"].astype(jnp.float32)
        else:
            rows = []
            if self.text_encoder is not None:
                own = params["text_encoder"]
                rows.append(lora.apply(self.text_encoder, own, batch["ids"], batch["mask"], keys=keys))
            if self.clip and self.clip.text:
                rows += clip_text_rows(self.clip.text, lora.merge(params["clip_text"]), batch["clip_ids"], self.dtype)
            states = join(parts, rows) if parts else rows[0]
        if self.clip and self.clip.vision and "image" in batch:
            pictures = batch["image"].astype(jnp.float32) / 127.5 - 1.0
            vectors = picture_vectors(self.clip, lora.merge(params["clip_vision"]), pictures, self.dtype)
            states = with_picture(parts, states, vectors)
        return states

    def predict(
        self, params: Params | AdaptedParams, *inputs: jax.Array | None, keys: jax.Array | None = None
    ) -> jax.Array:
        """What the UNet says (B, H, W, 6) of its inputs, see `UNet`; params: the UNet's; keys: see `lora.apply`."""
        return lora.apply(self.unet, params, *inputs, keys=keys)


def make_networks(
    recipe: Recipe, text_config: T5Config | None = None, vocabulary: int = 0, clip: CLIPShapes | None = None
) -> Networks:
    """Builds the modules a recipe names.

    Args:
      recipe: what is trained.
      text_config: the frozen text encoder's, where there is one.
      vocabulary: ids of its tokenizer, new words last; 0: as many as its table has rows.
      clip: what is read of a CLIP, where one is read.
    """
    dtype = jnp.dtype(recipe.compute_dtype)
    text_config = text_config or presets.T5_ENCODERS[recipe.text_encoder]
    unet = UNet(unet_config(recipe, clip), dtype=dtype, remat=recipe.remat)
    t5 = T5Encoder(text_config, dtype=dtype) if "t5" in recipe.encoders else None
    return Networks(unet, t5, recipe.lora, vocabulary or text_config.vocab_size, clip, dtype)


def init_params(networks: Networks, recipe: Recipe, key: jax.Array) -> Params:
    """Random parameters, boxed with the logical names of their dimensions; of a LoRA the factors alone, of
    new words their rows.

    Args:
      networks: of the recipe.
      recipe: what is trained.
      key: decides them.

    Returns:
      {"unet", and "text_encoder" unless that is frozen}.

    Raises:
      ValueError: the factors of a LoRA do not fit the networks; names recipe key and layer.
    """
    if recipe.lora.rank:
        return _init_factors(networks, recipe, stream(key, "factors"))
    if recipe.new_words.tokens:
        assert networks.text_encoder is not None  # new words go with T5 alone
        rows = jnp.zeros((len(recipe.new_words.tokens), networks.text_encoder.config.d_model))
        return {"text_encoder": {"shared": {"embedding": nn.LogicallyPartitioned(rows, (None, "embed"))}}}
    config: UNetConfig = networks.unet.config
    side = recipe.data.crop or recipe.data.size
    inputs = [
        jnp.zeros((1, side, side, config.in_channels)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, config.states_length(recipe.text_length), config.states_width)),
    ]
    if config.aug_level_embedding:
        inputs.append(jnp.zeros((1,), jnp.int32))
    params = {"unet": networks.unet.init(stream(key, "unet weights"), *inputs)["params"]}
    if recipe.init_copy:
        copying = start_by_copying(nn.meta.unbox(params["unet"]), config)
        params["unet"] = nn.meta.replace_boxed(params["unet"], copying)
    if recipe.trains_text and networks.text_encoder is not None:
        ids = jnp.zeros((1, recipe.text_length), jnp.int32)
        text_key = stream(key, "text encoder weights")
        params["text_encoder"] = networks.text_encoder.init(text_key, ids, jnp.ones_like(ids))["params"]
    return params


def _with_rows(base: Params, trained: Params, end: int) -> Params:
    """A text encoder's parameters with the last rows of its vocabulary, before row `end`, replaced."""
    table, rows = base["shared"]["embedding"], trained["shared"]["embedding"]
    whole = jax.lax.dynamic_update_slice(table, rows.astype(table.dtype), (end - len(rows), 0))
    return {**base, "shared": {"embedding": whole}}


def _init_factors(networks: Networks, recipe: Recipe, key: jax.Array) -> Params:
    targets: dict[str, tuple[UNetConfig | T5Config, str]] = {"unet": (networks.unet.config, recipe.lora.targets)}
    if recipe.lora.text_encoder and networks.text_encoder is not None:
        targets["text_encoder"] = (networks.text_encoder.config, lora.TEXT_TARGETS)
    factors = {}
    for (name, (config, words)), own in zip(targets.items(), jax.random.split(key, len(targets)), strict=True):
        try:
            factors[name] = lora.init_factors(boxed_params(config), words, recipe.lora.rank, own)
        except ValueError as error:
            raise ValueError(f"recipe key lora.rank is {recipe.lora.rank}: {error}") from None
    return factors


def make_loss(networks: Networks, recipe: Recipe) -> Callable[[Params, Params, Batch, Batch], tuple[jax.Array, dict]]:
    """Makes the loss of the recipe's stage.

    Returns:
      `loss(params, frozen, batch, drawn) -> (mean loss, metrics)`. frozen: the parameters that are used but not
      trained, {"text_encoder", "clip_text", "clip_vision", "unet" of a LoRA} or fewer. batch: "image" uint8
      (B, S, S, 3), and what `Networks.encode` takes: ids, or text states as `if-jax embed` kept them. drawn: of the
      same rows, see `randomness.draw`.
    """
    schedule = training_schedule(recipe)
    sharding_rules = rules.PRESETS[recipe.mesh.rules]

    def loss(params: Params, frozen: Params, batch: Batch, drawn: Batch) -> tuple[jax.Array, dict]:
        image = batch["image"].astype(jnp.float32) / 127.5 - 1.0  # (B, S, S, 3)
        networks_params = networks.joined(frozen, params)
        keys = jax.random.wrap_key_data(drawn["dropout_keys"]) if recipe.lora.dropout else None
        states = networks.encode(networks_params, batch, keys)
        if recipe.dropped:
            kept = {encoder: drawn[f"{encoder}_kept"] for encoder in recipe.dropped}
            states = keep(networks.unet.config.text_parts, states, kept)
        x0, low_res, aug_level = picture_inputs(recipe, image, drawn)
        t, eps = drawn["t"], drawn["eps"]
        unet_params = rules.gather_convolutions(networks_params["unet"], sharding_rules)
        pooled = _pooled(states, drawn) if recipe.pooled_dropout else None
        network = lambda x, t: networks.predict(unet_params, x, t, states, aug_level, pooled, keys=keys)  # noqa: E731
        x_t, output = process.noise_and_predict(schedule, network, x0, t, eps, low_res)
        parts = losses.hybrid_loss(
            schedule,
            output,
            x0,
            x_t,
            eps,
            t,
            prediction=recipe.prediction,
            weight=recipe.loss_weight,
            bound_weight=recipe.bound_weight,
        )
        metrics = {name: jnp.mean(value) for name, value in parts.items()}
        return metrics["loss"], metrics | by_timestep(parts["mse"], t)

    return loss


def _pooled(states: jax.Array, drawn: Batch) -> jax.Array:
    """The text states (B, L, D) that the step embedding pools: none of them (zeros) in a share of the pictures.

    Pooled text tells all of a picture alike which words occur. A net that draws well enough by that may never learn to
    read at each place what is said of it: all that tells a red cube and a blue sphere from a blue cube and a red one.
    """
    return jnp.where(drawn["pooled_kept"][:, None, None], states, 0)


def training_schedule(recipe: Recipe) -> Schedule:
    """The noise schedule of the recipe's own pictures; low-resolution pictures are always noised along IF's."""
    return schedule_from_betas(cosine_betas(size=recipe.noise_size))


def by_timestep(mse: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
    """Squared error by quarter of the chain: sums and counts, whose quotient over many steps is the mean.

    Args:
      mse: (B,).
      t: (B,) int.
    """
    quarter = jax.nn.one_hot(t * len(T_BUCKETS) // 1000, len(T_BUCKETS))  # (B, 4)
    return {"mse_sum_by_t": mse @ quarter, "count_by_t": quarter.sum(0)}


Inputs = tuple[jax.Array, jax.Array | None, jax.Array | None]


def picture_inputs(recipe: Recipe, image: jax.Array, drawn: Batch) -> Inputs:
    """What a stage is trained to draw, and what it sees beside x_t.

    Args:
      recipe: what is trained.
      image: (B, S, S, 3) in [-1, 1].
      drawn: of `randomness.draw`.

    Returns:
      x0, and of a super-resolution stage the enlarged and noised low-resolution picture and its level (B,).
    """
    return _super_resolution_inputs(recipe, image, drawn) if recipe.stage == "super-resolution" else (image, None, None)


def _super_resolution_inputs(recipe: Recipe, image: jax.Array, drawn: Batch) -> Inputs:
    low = augment.downsample(image, recipe.data.low_size)
    if recipe.data.low_blur:
        low = augment.blur(low, drawn["sigma"], recipe.data.low_blur)
    low_up = augment.upsample(low, recipe.data.size)
    if recipe.data.crop:
        # Both are cropped after upsampling: the crop then holds exactly what the stage sees at full size.
        grid = recipe.data.size // recipe.data.low_size
        image, low_up = _crop((image, low_up), drawn["corner"] * grid, recipe.data.crop)
    low_up = augment.noise_augment(cosine_schedule(), low_up, drawn["level"], drawn["low_eps"])
    return image, low_up, drawn["level"]


def _crop(images: tuple[jax.Array, ...], corners: jax.Array, side: int) -> tuple[jax.Array, ...]:
    """Cuts the same square out of every image of a sample: images (B, H, W, C) each, corners (B, 2) in pixels."""

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (side, side, image.shape[-1]))

    return tuple(jax.vmap(cut)(image, corners) for image in images)
