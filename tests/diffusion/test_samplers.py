"""The samplers: parity with diffusers step by step, correct statistics, independence from batch and interruptions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.checkpoints.scheduler import SchedulerConfig
from if_jax.diffusion import guidance, process, samplers
from if_jax.diffusion.guidance import dynamic_threshold
from if_jax.diffusion.samplers import array_noise, initial_noise, keyed_noise
from if_jax.diffusion.schedule import cosine_betas, cosine_schedule, padded, parse_steps, respace

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
scheduling_ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")

FULL = cosine_schedule()
IMAGE = (8, 8, 3)


def chain(spec):
    return respace(FULL, parse_steps(spec))


def keys_of(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.array(seeds))


@functools.partial(jax.jit, static_argnames=("denoise", "sampler", "clipped_eps"))
def advance(denoise, schedule, state, count, keys, noise, mask, max_value, eta, *, sampler, clipped_eps):
    noise_at = keyed_noise(keys, schedule, state.x.shape[1:]) if noise is None else array_noise(noise)
    update = samplers.make_update(sampler, eta, clipped_eps)
    settings = {"sample_max_value": max_value, "mask": mask}
    return samplers.run_sampler(update, denoise, schedule, state, count, noise_at, **settings)


def draw(
    denoise,
    schedule,
    x_T,
    keys,
    max_value=1.5,
    *,
    noise=None,
    mask=None,
    eta=0.0,
    sampler="ddpm",
    clipped_eps=False,
    stops=(),
):
    """The whole reverse process, compiled once for each shape of x_T; `stops`: steps after which it is interrupted."""
    total = schedule.num_steps
    schedule, state, done = padded(schedule), samplers.start(x_T, total - 1), 0
    for stop in (*stops, total):
        count = np.int32(stop - done)
        state = advance(
            denoise, schedule, state, count, keys, noise, mask, max_value, eta, sampler=sampler, clipped_eps=clipped_eps
        )
        done = stop
    assert int(state.index) == -1 and int(state.done) == total
    return state.x


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wavy(x_t, t):
    """A denoiser without training: smooth, bounded, different at every step."""
    s = jnp.sin(0.01 * t)[:, None, None, None]
    return jnp.concatenate([jnp.tanh(x_t + s), jnp.sin(x_t * s)], axis=-1)


def wavy_torch(x_t: torch.Tensor, t: int) -> torch.Tensor:
    s = torch.sin(torch.tensor(0.01 * t, dtype=torch.float32))
    return torch.cat([torch.tanh(x_t + s), torch.sin(x_t * s)], dim=1)


def to_torch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def to_numpy(image: torch.Tensor) -> np.ndarray:
    return image.numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def reference(monkeypatch):
    """reference(schedule, max_value) → step(model_output, t, x_t, z) of diffusers, with the noise given."""

    def make(schedule, max_value, prediction="eps", betas=None):
        scheduler = diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
            trained_betas=betas,
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=max_value,
        )
        scheduler.set_timesteps(timesteps=schedule.timesteps[::-1].tolist())

        def step(model_output, t, x_t, z):
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: z)
            return scheduler.step(model_output, int(t), x_t).prev_sample

        return step

    return make


def one_step(prediction, max_value):
    """A step of DDPM whose net says `out`."""

    @jax.jit
    def step(schedule, out, x_t, i, z):
        state = samplers.start(x_t, i)
        settings = {"prediction": prediction, "sample_max_value": max_value}
        return samplers.run_sampler(
            samplers.ddpm_update, lambda x, t: out, schedule, state, 1, lambda i: z, **settings
        ).x

    return step


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    ("spec", "max_value", "shifted"),
    [("smart50", 1.5, False), ("super27", 1.0, False), ("100", 1.5, False), ("super27", 1.0, True)],
)
def test_every_step_matches_diffusers(reference, spec, max_value, prediction, shifted):
    """Along IF's schedule, and along one that a stage of larger pictures publishes as its trained betas."""
    betas = cosine_betas(size=256).tolist() if shifted else None
    full = SchedulerConfig(max_value, trained_betas=betas and tuple(betas)).schedule()
    schedule, rng = respace(full, parse_steps(spec)), np.random.default_rng(0)
    ours = one_step(prediction, max_value)
    theirs = reference(schedule, max_value, prediction, betas)
    for i, t in enumerate(schedule.timesteps):
        x0, eps, v, z = rng.standard_normal((4, 2, *IMAGE)).astype(np.float32)
        index = np.full(2, i)
        x_t = np.asarray(process.add_noise(schedule, np.tanh(x0), index, eps))
        target = np.asarray(process.prediction_target(schedule, prediction, np.tanh(x0), index, eps))
        out = np.concatenate([target + 0.3 * x0, v], axis=-1)
        got = ours(schedule, out, x_t, np.int32(i), z)
        want = to_numpy(theirs(to_torch(out), t, to_torch(x_t), to_torch(z)))
        # diffusers takes 1 − ᾱ in float32, which is what limits the agreement near the clean end (4e-5 at t = 10)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(x_t).max(), f"t = {t}"
        if t >= 100:
            assert np.abs(got - want).max() <= 5e-6, f"t = {t}"


def test_a_fixed_variance_is_that_of_diffusers(monkeypatch):
    """Its pipelines drop the variance channels where the scheduler says `fixed_small`."""
    schedule, rng = chain("smart27"), np.random.default_rng(2)
    settings = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", **settings)
    scheduler.set_timesteps(timesteps=schedule.timesteps[::-1].tolist())

    @jax.jit
    def step(out, x_t, i, z):
        denoise, state = guidance.with_fixed_variance(lambda x, t: out), samplers.start(x_t, i)
        return samplers.run_sampler(samplers.ddpm_update, denoise, schedule, state, 1, lambda i: z, **limits).x

    limits = {"prediction": "eps", "sample_max_value": 1.5}
    for i, t in enumerate(schedule.timesteps):
        x_t, eps, v, z = rng.standard_normal((4, 2, *IMAGE)).astype(np.float32)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, z=z, **kwargs: to_torch(z))
        got = step(np.concatenate([eps, v], axis=-1), x_t, np.int32(i), z)
        want = to_numpy(scheduler.step(to_torch(eps), int(t), to_torch(x_t)).prev_sample)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(x_t).max(), f"t = {t}"


def test_whole_loop_matches_diffusers(reference):
    schedule, rng = chain("smart50"), np.random.default_rng(1)
    noise = rng.standard_normal((schedule.num_steps, 2, *IMAGE)).astype(np.float32)
    x_T = rng.standard_normal((2, *IMAGE)).astype(np.float32)
    step, x = reference(schedule, 1.5), to_torch(x_T)
    for i in range(schedule.num_steps - 1, -1, -1):
        t = schedule.timesteps[i]
        x = step(wavy_torch(x, int(t)), t, x, to_torch(noise[i]))
    got = draw(wavy, schedule, x_T, None, noise=noise)
    np.testing.assert_allclose(got, to_numpy(x), atol=2e-4)


def test_a_denoiser_that_knows_the_picture_draws_it():
    x0 = np.clip(np.random.default_rng(2).standard_normal((2, *IMAGE)), -1, 1).astype(np.float32)

    def oracle(x_t, t):
        return jnp.concatenate([process.eps_from_x0(FULL, x_t, t, x0), jnp.zeros_like(x_t)], axis=-1)

    np.testing.assert_allclose(draw(oracle, chain("smart50"), normal(3, x0.shape), keys_of(0, 1)), x0, atol=1e-5)


def test_samples_have_the_variance_of_the_data():
    """Data N(0, 0.3²): ε̂ and σ² are known for every chain, and sampling with them must give back a deviation of 0.3."""
    schedule = chain("smart27")

    def best(x_t, t):
        i = jnp.searchsorted(jnp.asarray(schedule.timesteps), t)
        a, previous = (
            jnp.asarray(table)[i][:, None, None, None] for table in (schedule.alpha_bar, schedule.alpha_bar_prev)
        )
        total = a * 0.3**2 + 1 - a
        # p(x_{t−1} | x_t) is wider than β̃, since x0 is uncertain: v says how far towards β
        variance = (1 - a / previous) * (previous * 0.3**2 + 1 - previous) / total
        low, high = (
            jnp.asarray(s)[i][:, None, None, None] for s in (schedule.posterior_log_variance, schedule.log_beta)
        )
        r = (jnp.log(variance) - low) / (high - low)
        return jnp.concatenate([jnp.sqrt(1 - a) / total * x_t, jnp.broadcast_to(2 * r - 1, x_t.shape)], axis=-1)

    x = draw(best, schedule, normal(5, (16, 16, 16, 3)), keys_of(*range(16)))
    assert float(jnp.std(x)) == pytest.approx(0.3, rel=0.025)  # 12288 samples: the standard error is 0.6 %
    assert float(jnp.mean(x)) == pytest.approx(0, abs=0.01)


def test_an_image_does_not_depend_on_its_batch():
    schedule = chain("super27")
    x_T, keys = normal(6, (3, *IMAGE)), keys_of(5, 6, 7)
    together = draw(wavy, schedule, x_T, keys)
    for b in range(3):
        alone = draw(wavy, schedule, x_T[b : b + 1], keys[b : b + 1])
        np.testing.assert_allclose(alone[0], together[b], atol=1e-6)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(draw(wavy, schedule, x_T[order], keys[order]), together[order], atol=1e-6)
    same_start = draw(wavy, schedule, x_T[[0, 0, 0]], keys)
    assert np.abs(same_start[0] - same_start[1]).max() > 0.1  # whereas another key draws another image


def test_noise_belongs_to_key_and_timestep():
    """Two chains that both visit t = 500 inject the same noise there; x_T is none of the step noises."""
    keys, seen = keys_of(3), []

    def zero(x_t, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t, ordered=True)
        return jnp.concatenate([jnp.zeros_like(x_t), jnp.ones_like(x_t)], axis=-1)

    def noise_at(steps):
        """The noise of the first step of a chain of two, undone from the x_t the second one sees."""
        schedule = respace(FULL, steps)
        seen.clear()
        draw(zero, schedule, np.zeros((1, *IMAGE), np.float32), keys).block_until_ready()
        jax.effects_barrier()
        x_t, x_prev = seen
        mean, _ = process.posterior(schedule, dynamic_threshold(x_t / schedule.sqrt_alpha_bar[1]), x_t, np.array([1]))
        return (x_prev - mean) / np.sqrt(schedule.beta[1])

    a, b, c = noise_at([0, 500]), noise_at([250, 500]), noise_at([0, 501])
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.std(a) == pytest.approx(1, abs=0.2)
    assert np.abs(a - c).max() > 0.1 and np.abs(a - initial_noise(keys, IMAGE)).max() > 0.1


def test_the_last_step_adds_no_noise():
    schedule = chain("super27")
    noise = np.random.default_rng(4).standard_normal((27, 1, *IMAGE)).astype(np.float32)
    x_T = np.ones((1, *IMAGE), np.float32)
    want = draw(wavy, schedule, x_T, None, noise=noise)
    noise[0] = np.nan
    np.testing.assert_array_equal(draw(wavy, schedule, x_T, None, noise=noise), want)
    noise[1] += 1.0  # whereas the step before does
    assert np.abs(draw(wavy, schedule, x_T, None, noise=noise) - want).max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_matches_diffusers(monkeypatch, eta):
    """Its own scheduler knows evenly spaced steps only."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5
    )
    scheduler.set_timesteps(20)
    schedule = respace(FULL, scheduler.timesteps.tolist())
    noise, x_T = normal(8, (20, 2, *IMAGE)), normal(9, (2, *IMAGE))
    x = to_torch(x_T)
    for clipped in (False, True):
        x = to_torch(x_T)
        for i in range(19, -1, -1):
            t = int(schedule.timesteps[i])
            monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, i=i, **__: to_torch(noise[i]))
            x = scheduler.step(wavy_torch(x, t)[:, :3], t, x, eta, use_clipped_model_output=clipped).prev_sample
        got = draw(wavy, schedule, x_T, None, noise=noise, sampler="ddim", eta=eta, clipped_eps=clipped)
        np.testing.assert_allclose(got, to_numpy(x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("spec", ["ays10", "smart27"])
def test_dpm_solver_matches_diffusers(spec):
    schedule = chain(spec)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    scheduler.set_timesteps(timesteps=schedule.timesteps[::-1].tolist())
    x_T = normal(10, (2, *IMAGE))
    x = to_torch(x_T)
    for t in scheduler.timesteps:
        x = scheduler.step(wavy_torch(x, int(t)), t, x).prev_sample
    np.testing.assert_allclose(draw(wavy, schedule, x_T, keys_of(0, 1), sampler="dpm++"), to_numpy(x), atol=1e-3)


def test_every_sampler_draws_data_it_knows():
    """Data N(0, 0.3²), whose best x̂0 is linear: the deterministic samplers scale x_T to a deviation of 0.3."""

    def best(x_t, t):
        a = jnp.asarray(FULL.alpha_bar)[t][:, None, None, None]
        eps = jnp.sqrt(1 - a) / (a * 0.3**2 + 1 - a) * x_t
        return jnp.concatenate([eps, jnp.zeros_like(x_t)], axis=-1)

    x_T = np.clip(normal(11, (2, *IMAGE)), -3, 3)  # within the range of pictures
    for sampler, tolerance in (("ddim", 0.04), ("dpm++", 0.01)):  # of first and second order
        x = draw(best, chain("100"), x_T, keys_of(0, 1), sampler=sampler)
        np.testing.assert_allclose(x, 0.3 * x_T, rtol=tolerance, atol=2e-3)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_masked_parts_stay_and_interruptions_change_nothing(sampler):
    schedule, x_T, keys = chain("super27"), normal(12, (2, *IMAGE)), keys_of(0, 1)
    mask = np.zeros((2, 8, 8, 1), np.float32)
    mask[:, 3:, :5] = 1
    settings = {"mask": mask, "sampler": sampler, "eta": 0.5}
    whole = draw(wavy, schedule, x_T, keys, **settings)
    kept = np.broadcast_to(mask == 0, x_T.shape)
    np.testing.assert_array_equal(whole[kept], x_T[kept])
    assert np.abs(whole - x_T)[~kept].mean() > 0.1
    np.testing.assert_array_equal(draw(wavy, schedule, x_T, keys, stops=(1, 7, 26), **settings), whole)


def test_any_number_of_steps_is_one_program():
    x_T = normal(6, (1, *IMAGE))
    a = draw(wavy, chain("super27"), x_T, keys_of(0), max_value=1.5)
    compiled = advance._cache_size()
    b = draw(wavy, chain("smart100"), x_T, keys_of(1), max_value=1.0)
    assert advance._cache_size() == compiled and np.all(np.isfinite(a)) and np.all(np.isfinite(b))


def test_a_chain_of_few_steps_can_be_differentiated():
    """A number of steps that is known while tracing makes a scan: the gradient agrees with finite differences."""
    schedule = respace(FULL, [20, 60, 100])  # where no value is large enough to be thresholded

    @jax.jit
    def brightness(x_T):
        state = samplers.start(x_T, 2)
        noise = array_noise(jnp.zeros((3, *x_T.shape)))
        return samplers.run_sampler(samplers.make_update("ddim"), wavy, schedule, state, 3, noise).x.mean()

    x_T, direction = 0.1 * normal(13, (1, *IMAGE)), normal(14, (1, *IMAGE))
    gradient = jax.jit(jax.grad(brightness))(x_T)
    change = (brightness(x_T + 1e-2 * direction) - brightness(x_T - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=0.05, abs=1e-4)
    assert float(jnp.abs(gradient).max()) > 0


def test_initial_noise_is_standard_normal_and_of_its_key():
    noise_of = jax.jit(initial_noise, static_argnums=1)
    x_T = noise_of(keys_of(*range(4)), (32, 32, 3))
    assert x_T.shape == (4, 32, 32, 3) and x_T.dtype == jnp.float32
    assert float(x_T.std()) == pytest.approx(1, abs=0.03) and float(x_T.mean()) == pytest.approx(0, abs=0.03)
    np.testing.assert_array_equal(noise_of(keys_of(2), (32, 32, 3))[0], x_T[2])  # whatever the batch
