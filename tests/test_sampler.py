"""The sampler beside the paper; and as diffusers' scheduler.

Levels, steps, renoising, targets, log probabilities.
"""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxPipeline

import cps
import sample
import variants
from cold_start import renoise_time
from cps import CPSScheduler, ambient_target, cps_step, log_prob, renoise, rollout, sigmas
from gaussian import (
    EYE,
    LEVELS,
    ZERO,
    D,
    K,
    close,
    exact_normals,
    f64,
    generator_with,
    moments,
    normals,
)
from helpers import CPU, tiny_base


def test_the_time_shift_is_applied_exactly_once():
    assert sigmas() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-12)
    assert sigmas(2, shift=1) == [1, 0.5, 0]
    for num_steps, shift in ((0, 3), (4, 0), (4, -1)):
        with pytest.raises(ValueError):
            sigmas(num_steps, shift)


def test_a_cps_step_keeps_the_marginal_for_every_eta():
    """Eq. 19-21: with exact x0 and eps, x_t | x0 is N((1-t) x0, t^2) whatever eta.

    eta = 0 is Euler, eta = 1 forgets eps.
    """
    x0 = f64(0.3, -2)
    eps, noise = exact_normals(2)
    from_levels = (1.0, 0.9, 0.3)
    to_levels = (0.75, 0.5, 0.2, 0.0)
    etas = (0, 0.1, 0.5, 0.9, 1)
    for s, t, eta in itertools.product(from_levels, to_levels, etas):
        x = (1 - s) * x0 + s * eps
        v = eps - x0
        x_t, mean, std = cps_step(x, v, sigma=s, sigma_next=t, eta=eta, noise=noise)

        marginal_mean, marginal_covariance = moments(x_t)
        close(marginal_mean, (1 - t) * x0)
        close(marginal_covariance, t * t * EYE)

        close(x_t, mean + std * noise)
        close(float(std), t * math.sin(eta * math.pi / 2))
        if eta == 0:
            euler = x + (t - s) * v
            close(x_t, euler)
        if eta == 1 or t == 0:
            without_eps = (1 - t) * x0
            close(mean, without_eps.expand_as(mean))


def test_the_last_step_is_deterministic():
    x, v, noise, other_noise = normals(4, 5)
    x_0, mean, std = cps_step(x, v, sigma=0.5, sigma_next=0.0, eta=0.9, noise=noise)
    x_0_again, _, _ = cps_step(x, v, sigma=0.5, sigma_next=0.0, eta=0.9, noise=other_noise)
    assert torch.equal(x_0, x - 0.5 * v)
    assert torch.equal(x_0, mean)
    assert torch.equal(x_0, x_0_again)
    assert float(std) == 0

    # Without noise a step draws its own.
    one, _, _ = cps_step(x, v, sigma=0.9, sigma_next=0.75, eta=0.9)
    another, _, _ = cps_step(x, v, sigma=0.9, sigma_next=0.75, eta=0.9)
    assert not torch.equal(one, another)

    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError):
            cps_step(x, v, sigma=0.9, sigma_next=0.75, eta=eta)


def test_arithmetic_is_at_least_float32_and_one_sigma_a_sample_equals_one_call_a_sample():
    x, v, noise = normals(3, 3)
    s = f64(0.5, 0.75, 0)
    t = f64(0.6, 0.98, 0.02)

    def step_down(x, v, noise, s, t):
        x_s, _, _ = cps_step(x, v, sigma=t, sigma_next=s, eta=0.9, noise=noise)
        return x_s

    def noised_up(x, v, noise, s, t):
        return renoise(x, sigma_s=s, sigma_t=t, noise=noise)

    def target(x, v, noise, s, t):
        v_target, _ = ambient_target(x, sigma_s=s, sigma_t=t, noise=noise)
        return v_target

    for function in (step_down, noised_up, target):
        each = []
        for i in range(3):
            row = [tensor[i : i + 1] for tensor in (x, v, noise)]
            s_i = s[i].item()
            t_i = t[i].item()
            each.append(function(*row, s=s_i, t=t_i))
        close(function(x, v, noise, s, t), torch.cat(each))
        assert each[0].dtype == torch.float64

        halves = [tensor.bfloat16() for tensor in (x, v, noise)]
        singles = [half.float() for half in halves]
        of_halves = function(*halves, s=0.5, t=0.6)
        of_singles = function(*singles, s=0.5, t=0.6)
        assert torch.equal(of_halves, of_singles)


def velocity_of_score(score, x_t, t):
    """Eq. 2."""
    return -x_t / (1 - t) - t / (1 - t) * score


def test_renoising_keeps_the_schedule_and_the_target_obeys_eq_2(monkeypatch):
    """App. B: if x_s | x0 is N((1-s) x0, s^2), x_t | x0 is N((1-t) x0, t^2).

    The target is Eq. 2 of the kernel's score -n/sig. With App. B's printed std the target is Eq. 2
    of that kernel's score, and the variance falls short of t^2 wherever s > 0.
    """
    x0 = f64(0.3, -2)
    eps, n = exact_normals(2)
    for s, t in (
        (0.0, 0.02),
        (0.0, 0.98),
        (0.5, 0.51),
        (0.5, 0.9),
        (0.75, 0.76),
        (0.9, 0.91),
        (0.9, 0.98),
    ):
        x_s = (1 - s) * x0 + s * eps
        a = (1 - t) / (1 - s)

        x_t = renoise(x_s, s, t, n)
        target, sig = ambient_target(x_s, s, t, n)
        mean, covariance = moments(x_t)
        close(mean, (1 - t) * x0)
        close(covariance, t * t * EYE)
        close(x_t, a * x_s + sig * n)
        close(target, velocity_of_score(-n / sig, x_t, t))

        with monkeypatch.context() as patch:
            patch.setattr(cps, "sub_interval", variants.sub_interval)
            x_t_printed = renoise(x_s, s, t, n)
            target_printed, sig_printed = ambient_target(x_s, s, t, n)
        close(x_t_printed, a * x_s + sig_printed * n)
        close(target_printed, velocity_of_score(-n / sig_printed, x_t_printed, t))
        assert float(sig_printed) == pytest.approx((t - s) / (1 - s))
        _, covariance_printed = moments(x_t_printed)
        falls_short = covariance_printed[0, 0] < t * t - 1e-6
        assert falls_short == (s > 0)

        if s == 0:
            flow_matching_target = n - x_s
            close(target, flow_matching_target)


def test_the_target_is_finite_and_right_even_close_to_s():
    """These times are exact in float32, where t^2 - a^2 s^2 as it stands has no digits left."""
    x_s, n = normals(2, 4)
    x_s_single = x_s.float()
    n_single = n.float()
    levels = (0.0, 0.5, 0.75, 0.875)
    gaps = (2**-7, 2**-14, 2**-20)
    for s, gap in itertools.product(levels, gaps):
        t = s + gap
        exact_target, exact_sig = ambient_target(x_s, s, t, n)
        target, sig = ambient_target(x_s_single, s, t, n_single)
        close(target.double(), exact_target, 1e-5)
        close(sig.double(), exact_sig, 1e-5)

        target_at_s, sig_at_s = ambient_target(x_s_single, s, s, n_single)
        assert target_at_s.isfinite().all()
        assert sig_at_s.isfinite().all()


def test_both_log_probabilities_are_what_they_say():
    """Eq. 13, and the release's form: Eq. 13 times 2 std^2 / elements.

    That factor weighs the three steps by .81 : .5625 : .25.
    """
    x, mean, *_ = normals(3, 6)
    one_std = f64(0.3)
    one_a_sample = torch.linspace(0.1, 1, 6).double().view(-1, 1, 1, 1)
    for std in (one_std, one_a_sample):
        normal = torch.distributions.Normal(mean, std)
        up_to_a_constant = normal.log_prob(x) - normal.log_prob(mean)
        gaussian = up_to_a_constant.sum((1, 2, 3))
        close(variants.log_prob(x, mean, std), gaussian)
        close(log_prob(x, mean, std), gaussian * 2 * std.flatten() ** 2 / D)


def test_the_scheduler_draws_in_diffusers_what_our_own_loop_draws(tmp_path):
    base = tiny_base()
    pipe = base.pipe
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a circle", "two red squares"]
    seeds = (3, 4)
    text = base.encode(prompts)
    prompt_embeds, pooled_prompt_embeds = text
    encoded = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
    v = base.velocity([], text)

    def own(eta):
        return sample.draw(v, seeds, base.latent_shape, levels=LEVELS, eta=eta, device=CPU)

    def diffusers(scheduler, **inputs):
        scheduler.generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe.scheduler = scheduler
        return pipe(
            guidance_scale=1.0,  # turns guidance off
            generator=scheduler.generator,
            height=32,
            width=32,
            max_sequence_length=8,
            output_type="latent",
            **inputs,
        ).images

    ours = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)
    euler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.0)
    ours.save_pretrained(tmp_path)
    again = CPSScheduler.from_pretrained(tmp_path)
    assert ours.config.eta == again.config.eta == 0.9

    four_steps = {"num_inference_steps": 4}
    given_levels = {"sigmas": LEVELS[:-1]}  # they are not shifted again
    for scheduler, steps, eta in (
        (ours, four_steps, 0.9),
        (again, four_steps, 0.9),
        (again, given_levels, 0.9),
        (euler, four_steps, 0),
    ):
        close(diffusers(scheduler, **encoded, **steps), own(eta), 1e-5)
        close(scheduler.sigmas.tolist(), LEVELS, 1e-6)

    # diffusers encodes both prompts at once, we one by one: 3e-5 with torch 2.6.
    close(diffusers(ours, prompt=prompts, **four_steps), own(0.9), 1e-4)
    assert (own(0) - own(0.9)).abs().max() > 0.1


# -------------------------------------------------------------------------------------------------
# Rollout, times
def test_a_rollout_takes_k_steps_and_follows_the_grad_mode():
    theta = ZERO.clone().requires_grad_()
    x, *noises = normals(K + 1, 3)
    seen = []

    def generator(x, s):
        seen.append(s)
        return generator_with(theta)(x, s)

    for k in range(K + 1):
        seen.clear()
        with torch.no_grad():
            path = rollout(generator, x, levels=LEVELS, k=k, eta=0.9, noises=iter(noises))
            assert seen == LEVELS[:k]
            assert len(path) == k + 1
            assert path[0] is x
            assert not any(state.requires_grad for state in path)
            for i in range(k):
                s = LEVELS[i]
                t = LEVELS[i + 1]
                v = generator(path[i], s)
                x_t, _, _ = cps_step(path[i], v, s, t, eta=0.9, noise=noises[i])
                close(path[i + 1], x_t)
    path = rollout(generator, x, levels=LEVELS, k=2, eta=0.9, noises=noises)
    assert path[2].requires_grad


def test_times_stay_inside_the_sub_interval():
    u = torch.linspace(0, 1, 5).double()
    for s in LEVELS[1:]:
        expected = []
        for share in u.tolist():
            t = s + 0.01 + (0.99 - s) * share
            expected.append(min(max(t, 0.02), 0.98))
        assert renoise_time(s, u).tolist() == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------
# The scheduler's interface, as diffusers' own tests ask for it
def test_a_scheduler_that_was_saved_is_the_same(tmp_path):
    scheduler = CPSScheduler(eta=0.5)
    scheduler.save_pretrained(tmp_path)
    loaded = CPSScheduler.from_pretrained(tmp_path)
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert config == dict(loaded.config)


def test_a_scheduler_is_compatible_with_itself():
    scheduler = CPSScheduler()
    assert scheduler.compatibles == [CPSScheduler]
    again = CPSScheduler.from_config(scheduler.config)
    assert dict(again.config) == dict(scheduler.config)


@pytest.mark.parametrize("name", CPSScheduler.NOT_OURS)
def test_a_config_with_another_grid_is_refused(name):
    setting = {name: 0.1}  # as true as a terminal shift
    config = FlowMatchEulerDiscreteScheduler(**setting).config
    with pytest.raises(ValueError, match=name):
        CPSScheduler.from_config(config)


def test_timesteps_and_sigmas_are_honoured():
    scheduler = CPSScheduler()
    scheduler.set_timesteps(timesteps=[1000, 500])
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    assert scheduler.timesteps.tolist() == [1000, 500]
    scheduler.set_timesteps(2, sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 4, "timesteps": [1000, 500]},
        {"num_inference_steps": 3, "sigmas": [1.0, 0.5]},
        {"timesteps": [1000], "sigmas": [1.0]},
        {"timesteps": [500, 1000]},
        {"sigmas": [2.0, 1.0]},
        {"sigmas": [0.0]},
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments):
    with pytest.raises(ValueError, match=r"steps|sigmas|levels"):
        CPSScheduler().set_timesteps(**arguments)


# -------------------------------------------------------------------------------------------------
# The scheduler on tokens, as FLUX's pipelines call it
def scheduler_for(latent_shape):
    scheduler = CPSScheduler()
    scheduler.latent_shape = latent_shape
    return scheduler


def test_noise_for_tokens_is_drawn_as_latents_and_packed_as_diffusers_packs_them():
    def seeded_rng():
        return torch.Generator().manual_seed(0)

    latents = torch.randn(2, 3, 4, 6, generator=seeded_rng())
    of_flux1 = FluxPipeline._pack_latents(latents, 2, 3, 4, 6)
    of_klein = Flux2KleinPipeline._pack_latents(latents)
    for tokens in (of_flux1, of_klein):
        scheduler = scheduler_for((3, 4, 6))
        noise = scheduler.noise_like(torch.zeros_like(tokens), seeded_rng())
        assert torch.equal(noise, tokens)
    without_latent_shape = CPSScheduler().noise_like(of_flux1, seeded_rng())
    assert torch.equal(without_latent_shape.flatten(), latents.flatten())


@pytest.mark.parametrize(
    "latent_shape, sample",
    [
        ((3, 4, 6), (2, 6, 11)),  # another number of channels
        ((3, 4, 6), (2, 5, 12)),  # of tokens
        ((3, 4, 6), (2, 25, 3)),
        ((3, 4, 6), (2, 3, 4, 6)),  # no tokens
        ((1, 3, 12), (2, 9, 4)),  # an odd height
        ((1, 12, 3), (2, 9, 4)),
    ],
)
def test_a_latent_shape_that_does_not_fit_is_refused(latent_shape, sample):
    scheduler = scheduler_for(latent_shape)
    scheduler.set_timesteps(4)
    x = torch.randn(sample)
    with pytest.raises(ValueError, match=r"latent_shape is \(C, h, w\)"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_sigmas_that_come_with_mu_are_shifted_once_where_the_shift_is_one_number():
    """As FLUX.1-schnell's pipeline gives them, whose config has no use for mu."""
    scheduler = CPSScheduler()
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=0.8)
    close(scheduler.sigmas.tolist(), LEVELS, 1e-6)
    scheduler.set_timesteps(sigmas=LEVELS[:-1])
    close(scheduler.sigmas.tolist(), LEVELS, 1e-6)
