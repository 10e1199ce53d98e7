"""What a text encoder is asked while it learns to read captions; nothing of it is released."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


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
