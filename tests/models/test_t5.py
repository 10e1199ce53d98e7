"""The T5 encoder computes what transformers' computes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.checkpoints.names import lazy_from_torch, t5_config_to_hf
from if_jax.checkpoints.weights import load_params
from if_jax.models.t5 import T5Config, T5Encoder, relative_buckets

torch = pytest.importorskip("torch")

CONFIG = T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
TYPES = (jnp.float32, jnp.bfloat16)
LENGTH = 40  # beyond the offsets that have a bucket of their own


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import T5Config as HFConfig
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(HFConfig(**t5_config_to_hf(CONFIG))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def params(reference: Any) -> dict[str, Any]:
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    init = jax.eval_shape(T5Encoder(CONFIG).init, jax.random.key(0), *inputs())
    return load_params(lazy_from_torch(state, nn.meta.unbox(init)["params"], "t5"))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Two captions, the second of 5 tokens and then pads."""
    ids = np.random.default_rng(0).integers(2, 50, (2, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return ids, mask


def test_encoder_equals_transformers(reference: Any, params: dict[str, Any]) -> None:
    ids, mask = inputs()
    out = np.asarray(jax.jit(T5Encoder(CONFIG).apply)({"params": params}, ids, mask))
    with torch.inference_mode():
        expected = reference(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()  # rows of pads included: IF feeds them on


def test_pads_and_batch_neighbours_change_nothing(params: dict[str, Any]) -> None:
    ids, mask = inputs()
    encode = jax.jit(T5Encoder(CONFIG).apply)
    alone = encode({"params": params}, ids[1:, :5], mask[1:, :5])
    other_pads = encode({"params": params}, np.where(mask == 1, ids, 7), mask)[1:, :5]
    np.testing.assert_allclose(alone, other_pads, atol=1e-5)


def test_bfloat16_is_close_and_returns_float32(params: dict[str, Any]) -> None:
    exact, half = (jax.jit(T5Encoder(CONFIG, dtype).apply)({"params": params}, *inputs()) for dtype in TYPES)
    assert half.dtype == jnp.float32
    difference = float(jnp.abs(half - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < difference < 0.05


def test_buckets_of_relative_positions() -> None:
    """Edges of the 16 buckets per direction, and the split into keys behind and keys ahead."""
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]  # smallest distance of each bucket
    distances = np.arange(200)
    behind = relative_buckets(-distances, 32, 128)
    np.testing.assert_array_equal(behind, np.searchsorted(first, distances, side="right") - 1)
    np.testing.assert_array_equal(relative_buckets(distances[1:], 32, 128), behind[1:] + 16)


def test_impossible_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=0"):
        T5Config(50, 24, 8, 40, 3, 0)
