"""The analytic FLOPs are those torch counts."""

from __future__ import annotations

import pytest
from torch_reference import CONFIGS, LENGTH, to_nchw, torch_unet, unet_inputs

from if_jax.checkpoints.names import t5_config_to_hf
from if_jax.models.flops import t5_flops, unet_flops
from if_jax.models.presets import UNETS
from if_jax.models.t5 import T5Config

torch = pytest.importorskip("torch")
flop_counter = pytest.importorskip("torch.utils.flop_counter")


@pytest.mark.parametrize(("kind", "size"), [("base", (6, 10)), ("super-resolution", 16), ("cross-only", 4)])
def test_unet_flops_equal_torch(kind: str, size: int | tuple[int, int]) -> None:
    from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnAddedKVProcessor2_0

    net, config = torch_unet(kind), CONFIGS[kind]
    x_t, t, text, aug_level = unet_inputs(config, 1, (size, size) if isinstance(size, int) else size)
    labels = None if aug_level is None else torch.from_numpy(aug_level)
    net.set_attn_processor(AttnAddedKVProcessor())  # the fused kernel of the default is not counted on a CPU
    with flop_counter.FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(to_nchw(x_t), torch.from_numpy(t), torch.from_numpy(text), class_labels=labels)
    net.set_attn_processor(AttnAddedKVProcessor2_0())
    assert unet_flops(config, size, LENGTH) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_t5_flops_equal_torch() -> None:
    from transformers import T5Config as HFConfig
    from transformers import T5EncoderModel

    config = T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
    hf_config = HFConfig(**t5_config_to_hf(config))
    hf_config._attn_implementation = "eager"  # the fused kernel is not counted on a CPU
    model = T5EncoderModel(hf_config).eval()
    ids = torch.ones((1, 30), dtype=torch.long)
    with flop_counter.FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(ids, torch.ones_like(ids))
    assert t5_flops(config, 30) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_grow_with_the_image() -> None:
    """Four times the pixels: four times the convolutions, and more than that where pixels attend to each other."""
    small, large = (unet_flops(UNETS["IF-I-M"], size) for size in (64, 128))
    assert 4 * small < large < 6 * small
    with pytest.raises(ValueError, match="multiples of 8"):
        unet_flops(UNETS["IF-I-M"], 60)
