"""IF's UNet: one network for the text-to-image stage and the super-resolution stages.

For a super-resolution stage the caller concatenates the noised, upsampled low-resolution image to x_t on the channel
axis and gives its noise level as `aug_level`. No attention mask reaches the network: IF lets pads take part.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from if_jax.models import conditioning
from if_jax.models.blocks import (
    TEXT_GROUPS,
    ZEROS,
    BlockSettings,
    DownLevel,
    MidLevel,
    Remat,
    StepEmbedding,
    TextEmbedding,
    UpLevel,
)
from if_jax.models.conditioning import StatesPart
from if_jax.models.layers import Conv, Dense, gelu, sinusoid


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; field names follow diffusers' `UNet2DConditionModel`. Level 0 is the full resolution.

    Raises:
      ValueError: at construction, when the numbers do not fit each other.
    """

    sample_size: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    attention_levels: tuple[bool, ...]
    cross_attention_dim: int
    encoder_hid_dim: int
    in_channels: int = 3
    out_channels: int = 6
    attention_head_dim: int = 64  # channels per head
    addition_embed_type_num_heads: int = 64
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    aug_level_embedding: bool = False  # the noise level of the low-resolution image is an input
    time_embedding_act: bool = False  # one GELU on the summed embedding ...
    resnet_skip_time_act: bool = False  # ... in place of one in every residual block
    resnet_out_scale_factor: float = 1.0
    mid_block_scale_factor: float = 1.0
    only_cross_attention: bool = False
    # what the rows of the text states are, where others than T5 alone made them; encoder_hid_dim is the first's width
    text_parts: tuple[StatesPart, ...] = ()

    def __post_init__(self) -> None:
        levels, groups, head = len(self.block_out_channels), self.norm_num_groups, self.attention_head_dim
        for name in ("layers_per_block", "attention_levels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name}={getattr(self, name)} must have {levels} entries, one per level of block_out_channels="
                    f"{self.block_out_channels}"
                )
        # The middle of the net attends whatever attention_levels says.
        attended = (*self.attention_levels[:-1], True)
        for width, attends in zip(self.block_out_channels, attended, strict=True):
            if width % groups:
                raise ValueError(f"block_out_channels: {width} must be a multiple of norm_num_groups={groups}")
            if attends and width % head:
                raise ValueError(f"block_out_channels: {width} attends and must be a multiple of {head} (head dim)")
        if self.cross_attention_dim % TEXT_GROUPS:
            raise ValueError(f"cross_attention_dim={self.cross_attention_dim} must be a multiple of {TEXT_GROUPS}")
        if self.encoder_hid_dim % self.addition_embed_type_num_heads:
            raise ValueError(
                f"encoder_hid_dim={self.encoder_hid_dim} must be a multiple of addition_embed_type_num_heads="
                f"{self.addition_embed_type_num_heads}"
            )
        if self.text_parts and self.text_parts[0].width != self.encoder_hid_dim:
            raise ValueError(
                f"text_parts begin with states of width {self.text_parts[0].width}, encoder_hid_dim is "
                f"{self.encoder_hid_dim}: they must be the same"
            )
        if self.sample_size % self.size_multiple:
            raise ValueError(
                f"sample_size={self.sample_size} must be a multiple of {self.size_multiple} with {levels} levels"
            )

    @property
    def time_dim(self) -> int:
        """Width of the step embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def states_width(self) -> int:
        """Width D of the text states."""
        return conditioning.shape_of(self.text_parts)[1] if self.text_parts else self.encoder_hid_dim

    def states_length(self, text_length: int) -> int:
        """Rows L of the text states, where T5 reads so many tokens."""
        return conditioning.shape_of(self.text_parts)[0] if self.text_parts else text_length


class UNet(nn.Module):
    """The denoiser of one stage. `remat` trades computing again for memory in training: "blocks", "dots" or "none"."""

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        text_states: jax.Array,
        aug_level: jax.Array | None = None,
        pooled_text: jax.Array | None = None,
    ) -> jax.Array:
        """Predict the noise.

        Args:
          x_t: (B, H, W, in_channels).
          t: (B,) int, step of the 1000.
          text_states: (B, L, states_width).
          aug_level: (B,) int, noise level of the low-resolution image; super-resolution only.
          pooled_text: states to pool in place of text_states, of the same shape (IF's style prompt).

        Returns:
          (B, H, W, out_channels) float32: channels 0-2 eps (or v), 3-5 the interpolation value of the learned
          variance, not clamped.

        Raises:
          ValueError: for shapes that do not fit the configuration.
        """
        c = self.config
        _check_inputs(c, x_t, text_states, aug_level)
        emb = self._embedding(t, text_states if pooled_text is None else pooled_text, aug_level)  # (B, time_dim)
        text = self._text_tokens(text_states)
        h = Conv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x_t)
        h = self._levels(h, emb, text)
        h = gelu(self._settings.norm("conv_norm_out")(h))
        return Conv(c.out_channels, kernel_init=ZEROS, dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)

    def _embedding(self, t: jax.Array, text_states: jax.Array, aug_level: jax.Array | None) -> jax.Array:
        """Step, noise level of the low-resolution image and pooled text, summed: (B, time_dim)."""
        c, width = self.config, self.config.block_out_channels[0]
        emb = StepEmbedding(c.time_dim, self.dtype, name="time_embedding")(sinusoid(t, width))
        if aug_level is not None:  # a super-resolution stage, see `_check_inputs`
            emb = emb + StepEmbedding(c.time_dim, self.dtype, name="class_embedding")(sinusoid(aug_level, width))
        pooled = TextEmbedding(c.time_dim, c.addition_embed_type_num_heads, self.dtype, name="add_embedding")
        rows = conditioning.split(c.text_parts, text_states) or [text_states]
        emb = emb + pooled(rows[0])
        for part, row in zip(c.text_parts, rows, strict=False):
            if part.in_step:
                emb = emb + Dense(c.time_dim, dtype=self.dtype, name=f"{part.encoder}_step_proj")(row[:, 0])
        return gelu(emb) if c.time_embedding_act else emb

    def _text_tokens(self, text_states: jax.Array) -> jax.Array:
        """What attention reads, (B, tokens, cross_attention_dim): the states of each encoder, projected by itself."""
        c = self.config
        rows = conditioning.split(c.text_parts, text_states) or [text_states]
        tokens = [Dense(c.cross_attention_dim, dtype=self.dtype, name="encoder_hid_proj")(rows[0])]
        for part, row in zip(c.text_parts[1:], rows[1:], strict=False):
            if part.tokens:
                wide = Dense(
                    part.tokens // part.rows * c.cross_attention_dim, dtype=self.dtype, name=f"{part.encoder}_proj"
                )
                tokens.append(wide(row).reshape(row.shape[0], part.tokens, -1))
        return tokens[0] if len(tokens) == 1 else jnp.concatenate(tokens, axis=1)

    def _levels(self, h: jax.Array, emb: jax.Array, text: jax.Array) -> jax.Array:
        """Down, middle and up path; skips are used last in, first out."""
        c, settings, last = self.config, self._settings, len(self.config.block_out_channels) - 1
        skips = [h]
        for i, width in enumerate(c.block_out_channels):
            attend, scale = c.attention_levels[i], c.resnet_out_scale_factor
            level = DownLevel(width, c.layers_per_block[i], attend, i < last, settings, scale, name=f"down_blocks_{i}")
            h, new_skips = level(h, emb, text)
            skips.extend(new_skips)
        h = MidLevel(settings, c.mid_block_scale_factor, name="mid_block")(h, emb, text)
        for i, width in enumerate(reversed(c.block_out_channels)):
            attend, layers = c.attention_levels[last - i], c.layers_per_block[last - i] + 1
            used = tuple(skips.pop() for _ in range(layers))
            level = UpLevel(width, attend, i < last, settings, c.resnet_out_scale_factor, name=f"up_blocks_{i}")
            h = level(h, used, emb, text)
        return h

    @property
    def _settings(self) -> BlockSettings:
        c = self.config
        return BlockSettings(
            head_dim=c.attention_head_dim,
            num_groups=c.norm_num_groups,
            eps=c.norm_eps,
            skip_time_act=c.resnet_skip_time_act,
            only_cross_attention=c.only_cross_attention,
            dtype=self.dtype,
            remat=self.remat,
        )


def _check_inputs(c: UNetConfig, x_t: jax.Array, text_states: jax.Array, aug_level: jax.Array | None) -> None:
    """Shapes are known while tracing: name what does not fit before the compiler does."""
    if x_t.ndim != 4 or x_t.shape[-1] != c.in_channels:
        raise ValueError(f"x_t has shape {x_t.shape}; expected (B, H, W, {c.in_channels})")
    if x_t.shape[1] % c.size_multiple or x_t.shape[2] % c.size_multiple:
        raise ValueError(f"image of {x_t.shape[1]}x{x_t.shape[2]}: both sides must be multiples of {c.size_multiple}")
    rows = text_states.shape[1] if text_states.ndim == 3 else 0
    if not rows or text_states.shape[1:] != (c.states_length(rows), c.states_width):
        length = c.states_length(0) or "L"
        raise ValueError(f"text_states has shape {text_states.shape}; expected (B, {length}, {c.states_width})")
    if c.aug_level_embedding != (aug_level is not None):
        wants = "needs" if c.aug_level_embedding else "takes no"
        raise ValueError(f"this UNet {wants} aug_level, the noise level of a low-resolution image")
