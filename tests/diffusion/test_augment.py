"""Low-res augmentation: resampling equal to torch and Pillow, blur by hand, noise by the full chain, uniform levels."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from if_jax.diffusion.augment import blur, downsample, noise_augment, random_level, random_sigma, upsample
from if_jax.diffusion.schedule import cosine_schedule

torch = pytest.importorskip("torch")


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("source", "target"), [((64, 64), 256), ((64, 48), (256, 192)), ((7, 5), (16, 31)), ((16, 16), 8), ((1, 3), (4, 1))]
)
def test_upsample_matches_torch(source, target):
    low = picture((2, *source, 3))
    size = (target, target) if isinstance(target, int) else target
    nchw = torch.from_numpy(np.ascontiguousarray(low.transpose(0, 3, 1, 2)))
    want = torch.nn.functional.interpolate(nchw, size=size, mode="bilinear", align_corners=True)
    got = upsample(low, target)
    assert got.shape == (2, *size, 3)
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_upsample_puts_corners_on_corners():
    low = picture((1, 6, 6, 3))
    up = upsample(low, 21)  # (21 − 1) / (6 − 1) = 4: every fourth pixel is an input pixel
    np.testing.assert_allclose(up[:, ::4, ::4], low, atol=1e-6)
    np.testing.assert_array_equal(upsample(low, 6), low)


@pytest.mark.parametrize(("source", "target"), [((256, 256), (64, 64)), ((96, 64), (24, 16)), ((50, 37), (16, 9))])
def test_downsample_matches_pillow(source, target):
    x0 = 0.6 * picture((2, *source, 3), seed=1)  # leaves room for overshoot, which Pillow does not clip in mode F
    got = downsample(x0, target)
    for b in range(2):
        for c in range(3):
            channel = Image.fromarray(x0[b, :, :, c])
            want = np.asarray(channel.resize(target[::-1], Image.Resampling.BICUBIC))
            np.testing.assert_allclose(got[b, :, :, c], want, atol=2e-6)


def test_downsample_is_what_an_image_file_would_hold():
    """8-bit pictures resized by Pillow: within the rounding of its two passes, clipped alike at hard edges."""
    row = np.where(np.arange(64) < 31, 0, 255)  # an edge that overshoots on both sides
    row[40:] = np.random.default_rng(2).integers(60, 200, 24)
    pixels = np.broadcast_to(row[None, :, None], (64, 64, 3)).astype(np.uint8)
    want = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)).astype(np.float64)
    got = downsample(pixels[None].astype(np.float32) / 127.5 - 1, 16)[0]
    assert np.abs((got + 1) * 127.5 - want).max() <= 1
    assert got.min() >= -1 and got.max() <= 1


def test_resampling_keeps_constants():
    flat = np.full((1, 32, 32, 3), -0.37, np.float32)
    np.testing.assert_allclose(upsample(flat, 77), -0.37, atol=1e-6)
    np.testing.assert_allclose(downsample(flat, 9), -0.37, atol=1e-6)


def test_noise_level_0_is_nearly_and_250_partly_clean():
    schedule = cosine_schedule()
    low, eps = picture((2, 4, 4, 3)), picture((2, 4, 4, 3), seed=3)
    got = noise_augment(schedule, low, np.array([0, 250]), eps)
    np.testing.assert_allclose(got[0], 0.999979 * low[0] + 0.006425 * eps[0], atol=5e-6)
    np.testing.assert_allclose(got[1], 0.919722 * low[1] + 0.392571 * eps[1], atol=5e-6)


def test_levels_are_uniform_over_the_whole_chain():
    level = np.asarray(jax.jit(random_level, static_argnums=1)(jax.random.key(0), 20_000))
    assert level.dtype == np.int32 and level.shape == (20_000,)
    assert level.min() == 0 and level.max() == 999
    counts = np.bincount(level // 100, minlength=10)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert np.asarray(random_level(jax.random.key(0), 100, highest=9)).max() == 9


def test_blur_of_nothing_and_of_a_flat_picture_changes_nothing():
    image = picture((2, 9, 7, 3))
    np.testing.assert_array_equal(blur(image, np.zeros(2, np.float32), 1.0), image)
    flat = np.full((2, 9, 7, 3), -0.37, np.float32)
    np.testing.assert_allclose(blur(flat, np.array([0.3, 1.0], np.float32), 1.0), flat, atol=1e-6)


def test_blur_is_a_mirrored_gaussian_at_each_picture_its_own():
    image, sigmas, reach = picture((2, 8, 7, 3)), (0.5, 1.3), 4  # ⌈3 · 1.3⌉ taps to either side
    got = blur(image, np.array(sigmas, np.float32), 1.3)
    for b, sigma in enumerate(sigmas):
        want = np.zeros((8, 7, 3))
        wide = np.pad(image[b].astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        total = 0.0
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                weight = np.exp(-(i**2 + j**2) / (2 * sigma**2))
                want += weight * wide[reach + i : reach + i + 8, reach + j : reach + j + 7]
                total += weight
        np.testing.assert_allclose(got[b], want / total, atol=1e-6)


def test_half_of_the_pictures_are_blurred():
    image = np.broadcast_to(picture((1, 8, 8, 1)), (1000, 8, 8, 1))
    sigma = jax.jit(random_sigma, static_argnums=(1, 2))(jax.random.key(0), len(image), 0.8)
    got = np.asarray(jax.jit(blur, static_argnums=2)(image, sigma, 0.8))
    change = np.abs(got - image).max(axis=(1, 2, 3))
    assert 0.44 < np.mean(change == 0) < 0.62  # about a half, and the weakest blurs that round to nothing
    assert len(np.unique(change)) > 300  # each with a strength of its own
