"""What a student is taught: jumps that land where the teacher's do, checked against the sampler and in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from if_jax.diffusion import distillation, guidance, process, samplers
from if_jax.diffusion.distillation import belief_of_jump, distillation_loss, jump, segment_end, student_timesteps
from if_jax.diffusion.schedule import cosine_betas, cosine_schedule, parse_steps, respace, schedule_from_betas

SCHEDULE = schedule_from_betas(cosine_betas(size=512))
MEAN, SPREAD = 0.3, 0.25  # of data that are normal, pixel by pixel


def noise(seed: int, rows: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, 4, 4, 3))


def table(name: str, t: jax.Array) -> jax.Array:
    return jnp.asarray(getattr(SCHEDULE, name))[t].reshape(-1, 1, 1, 1)


def ideal(x: jax.Array, t: jax.Array) -> jax.Array:
    """E[x0 | x_t] of normal data."""
    a, o = table("sqrt_alpha_bar", t), table("sqrt_one_minus_alpha_bar", t)
    return MEAN + SPREAD**2 * a / (a**2 * SPREAD**2 + o**2) * (x - a * MEAN)


def flow(x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Where the probability flow of normal data leads from t to s: the limit of jumps without number."""
    a, o = table("sqrt_alpha_bar", t), table("sqrt_one_minus_alpha_bar", t)
    clean = (s < 0).reshape(-1, 1, 1, 1)
    b = jnp.where(clean, 1.0, table("sqrt_alpha_bar", jnp.maximum(s, 0)))
    p = jnp.where(clean, 0.0, table("sqrt_one_minus_alpha_bar", jnp.maximum(s, 0)))
    widths = jnp.sqrt((b**2 * SPREAD**2 + p**2) / (a**2 * SPREAD**2 + o**2))
    return b * MEAN + widths * (x - a * MEAN)


def drawn_data(t: jax.Array) -> jax.Array:
    x0 = MEAN + SPREAD * noise(1, len(t))
    return process.add_noise(SCHEDULE, x0, t, noise(2, len(t)))


def perfect_student(substeps: int, steps: int):
    """Believes what the teacher's own small jumps to the end of the segment come to."""
    small = 1000 // (steps * substeps)

    def believe(x: jax.Array, t: jax.Array) -> jax.Array:
        end, at, y = segment_end(SCHEDULE, t, steps), t, x
        for _ in range(substeps):
            after = jump(SCHEDULE, y, at, jnp.maximum(at - small, end), ideal(y, jnp.maximum(at, 0)))
            y = jnp.where((at > end).reshape(-1, 1, 1, 1), after, y)
            at = jnp.maximum(at - small, end)
        return belief_of_jump(SCHEDULE, x, t, end, y)

    return believe


def test_a_jump_and_what_must_be_believed_for_it_are_inverse():
    t, s = jnp.array([999, 749, 20, 0]), jnp.array([749, 500, 7, -1])
    x, x0 = noise(3, 4), noise(4, 4)
    landed = jump(SCHEDULE, x, t, s, x0)
    np.testing.assert_allclose(landed[3], x0[3], atol=1e-6)  # the clean picture is what is believed
    np.testing.assert_allclose(belief_of_jump(SCHEDULE, x, t, s, landed), x0, atol=1e-4)
    assert segment_end(SCHEDULE, jnp.array([999, 750, 749, 250, 249, 0]), 4).tolist() == [749, 749, 499, 249, -1, -1]


@pytest.mark.parametrize(("prediction", "begin", "end"), [("v", 999, 749), ("x0", 249, -1)])
def test_a_progressive_student_lands_where_two_ddim_steps_of_the_sampler_do(prediction, begin, end):
    """Guided and thresholded, as the teacher draws; the sampler takes ε̂ from the thresholded x̂0 too."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)

    def net(x, t, text):
        out = jnp.tanh(x @ weights + text[:, None, None, :] + t.reshape(-1, 1, 1, 1) / 500)
        return jnp.concatenate([1.4 * out, out], -1)

    texts = (jnp.asarray(noise(5, 3)[:, 0, 0]), jnp.zeros((1, 3)))
    denoise = guidance.guided(net, texts, guidance.classifier_free(3.0))

    def teacher(x, t):
        predicted, _ = process.split_model_output(denoise(x, t))
        return guidance.dynamic_threshold(process.x0_from_prediction(SCHEDULE, prediction, x, t, predicted), 0.95, 1.5)

    x, t = noise(6, 3), jnp.full(3, begin)
    wanted = distillation.target("progressive", SCHEDULE, teacher, teacher, x, t, 4, 2)
    chain = respace(SCHEDULE, parse_steps("trailing8"))
    state = samplers.run_sampler(
        samplers.make_update("ddim", 0.0, True),
        denoise,
        chain,
        samplers.start(x, chain.timesteps.tolist().index(begin)),
        2,
        lambda index: jnp.zeros_like(x),
        prediction=prediction,
    )
    landed = jump(SCHEDULE, x, t, jnp.full(3, end), wanted)
    np.testing.assert_allclose(landed, state.x, atol=2e-5)
    loss = distillation_loss(SCHEDULE, wanted, wanted, t)["loss"]
    assert loss.max() == 0 and distillation_loss(SCHEDULE, teacher(x, t), wanted, t)["loss"].min() > 1e-4


@pytest.mark.parametrize(("method", "steps", "substeps"), [("progressive", 4, 2), ("consistency", 4, 25)])
def test_the_ideal_student_of_normal_data_has_no_loss_and_others_have(method, steps, substeps):
    t = jnp.asarray(list(student_timesteps(method, steps, substeps)))
    x, student = drawn_data(t), perfect_student(substeps, steps)
    wanted = distillation.target(method, SCHEDULE, ideal, student, x, t, steps, substeps)
    own = distillation_loss(SCHEDULE, student(x, t), wanted, t)["loss"]
    assert own.max() < 1e-9
    # The teacher as its own student is wrong where its one jump is not the sum of its small ones.
    off = distillation_loss(SCHEDULE, ideal(x, t), wanted, t)["loss"]
    first = t == segment_end(SCHEDULE, t, steps) + 1000 // (steps * substeps)
    assert (off > own)[~first].all() and off.max() > 1e3 * own.max()


def test_consistency_comes_to_the_flow_of_normal_data_as_jumps_get_small():
    """What the perfect student draws at the end of each segment, against the closed form."""
    t = jnp.array([999, 749, 499, 249])
    x, errors = drawn_data(t), []
    for substeps in (5, 25, 125):
        end = segment_end(SCHEDULE, t, 4)
        landed = jump(SCHEDULE, x, t, end, perfect_student(substeps, 4)(x, t))
        errors.append(float(jnp.abs(landed - flow(x, t, end)).max()))
    assert errors[2] < 0.05 and errors[0] > 2 * errors[1] > 4 * errors[2]


def test_nothing_is_differentiated_but_what_the_student_believes():
    def loss(scale):
        student = lambda x, t: scale * ideal(x, t)  # noqa: E731
        wanted = distillation.target("consistency", SCHEDULE, ideal, student, x, t, 2, 5)
        return jnp.sum(wanted)

    t = jnp.array([999, 499])
    x = noise(7, 2)
    assert jax.grad(loss)(1.0) == 0


def test_the_weight_is_that_of_v_up_to_its_cap():
    t = jnp.array([999, 700, 60])
    believed, wanted = noise(8, 3), noise(9, 3)
    parts = distillation_loss(cosine_schedule(), believed, wanted, t)
    velocity = [
        process.prediction_from_x0(cosine_schedule(), "v", jnp.zeros_like(believed), t, x0) for x0 in (believed, wanted)
    ]
    of_v = jnp.mean((velocity[0] - velocity[1]) ** 2, (1, 2, 3))
    np.testing.assert_allclose(parts["loss"][:2], of_v[:2], rtol=1e-4)
    np.testing.assert_allclose(parts["loss"][2], 6 * parts["mse"][2], rtol=1e-6)


def test_timesteps_are_those_that_trailing_draws_at():
    assert list(student_timesteps("progressive", 4, 2)) == parse_steps("trailing4").tolist() == [249, 499, 749, 999]
    assert list(student_timesteps("consistency", 2, 5)) == parse_steps("trailing10").tolist()
    with pytest.raises(ValueError, match=r"4 × 3 jumps do not divide a chain of 1000"):
        student_timesteps("consistency", 4, 3)
    with pytest.raises(ValueError, match="trailing0"):
        parse_steps("trailing0")
