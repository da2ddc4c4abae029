"""The sampler beside the paper: levels, steps, renoising, targets, log probabilities; and as diffusers' scheduler."""

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
    assert sigmas() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-12) and sigmas(2, shift=1) == [
        1,
        0.5,
        0,
    ]
    for wrong in ((0, 3), (4, 0), (4, -1)):
        with pytest.raises(ValueError):
            sigmas(*wrong)


def test_a_cps_step_keeps_the_marginal_for_every_eta():
    """Eq. 19-21: with exact x0 and eps, x_t | x0 is N((1-t) x0, t^2) whatever eta; eta = 0 is Euler, eta = 1 forgets eps."""
    x0, (eps, noise) = f64(0.3, -2), exact_normals(2)
    for s, t, eta in itertools.product(
        (1.0, 0.9, 0.3), (0.75, 0.5, 0.2, 0.0), (0, 0.1, 0.5, 0.9, 1)
    ):
        x, v = (1 - s) * x0 + s * eps, eps - x0
        x_t, mean, std = cps_step(x, v, s, t, eta, noise)
        close(moments(x_t), ((1 - t) * x0, t * t * EYE))
        close((x_t, float(std)), (mean + std * noise, t * math.sin(eta * math.pi / 2)))
        if eta == 0:
            close(x_t, x + (t - s) * v)
        if eta == 1 or t == 0:
            close(mean, ((1 - t) * x0).expand_as(mean))


def test_the_last_step_is_deterministic():
    x, v, n1, n2 = normals(4, 5)
    x_0, mean, std = cps_step(x, v, 0.5, 0.0, 0.9, n1)
    assert (
        all(
            torch.equal(x_0, same)
            for same in (x - 0.5 * v, mean, cps_step(x, v, 0.5, 0.0, 0.9, n2)[0])
        )
        and float(std) == 0
    )
    assert not torch.equal(
        cps_step(x, v, 0.9, 0.75, 0.9)[0], cps_step(x, v, 0.9, 0.75, 0.9)[0]
    )  # without noise it draws its own
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError):
            cps_step(x, v, 0.9, 0.75, eta)


def test_arithmetic_is_at_least_float32_and_one_sigma_a_sample_equals_one_call_a_sample():
    (x, v, n), s, t = normals(3, 3), f64(0.5, 0.75, 0), f64(0.6, 0.98, 0.02)
    for function in (
        lambda x, v, n, s, t: cps_step(x, v, t, s, 0.9, n)[0],
        lambda x, v, n, s, t: renoise(x, s, t, n),
        lambda x, v, n, s, t: ambient_target(x, s, t, n)[0],
    ):
        each = [
            function(x[i : i + 1], v[i : i + 1], n[i : i + 1], s[i].item(), t[i].item())
            for i in range(3)
        ]
        close(function(x, v, n, s, t), torch.cat(each))
        assert each[0].dtype == torch.float64
        halves = [part.bfloat16() for part in (x, v, n)]
        assert torch.equal(
            function(*halves, 0.5, 0.6), function(*(part.float() for part in halves), 0.5, 0.6)
        )


def test_renoising_keeps_the_schedule_and_the_target_obeys_eq_2(monkeypatch):
    """App. B: if x_s | x0 is N((1-s) x0, s^2), x_t | x0 is N((1-t) x0, t^2). The target is Eq. 2 of the kernel's score -n/sig.
    With App. B's printed std the target is Eq. 2 of that kernel's score, and the variance falls short of t^2 wherever s > 0."""
    x0, (eps, n) = f64(0.3, -2), exact_normals(2)
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
        x_t, (target, std) = renoise(x_s, s, t, n), ambient_target(x_s, s, t, n)
        close(moments(x_t), ((1 - t) * x0, t * t * EYE))
        close(
            (x_t, target),
            ((1 - t) / (1 - s) * x_s + std * n, -x_t / (1 - t) + t / (1 - t) * n / std),
        )
        with monkeypatch.context() as patch:
            patch.setattr(cps, "sub_interval", variants.sub_interval)
            x_p, (target_p, std_p) = renoise(x_s, s, t, n), ambient_target(x_s, s, t, n)
        close(
            (x_p, target_p),
            ((1 - t) / (1 - s) * x_s + std_p * n, -x_p / (1 - t) + t / (1 - t) * n / std_p),
        )
        assert float(std_p) == pytest.approx((t - s) / (1 - s)) and (
            moments(x_p)[1][0, 0] < t * t - 1e-6
        ) == (s > 0)
        if s == 0:
            close(target, n - x_s)  # ordinary flow matching


def test_the_target_is_finite_and_right_even_close_to_s():
    x_s, n = normals(2, 4)
    for s, gap in itertools.product(
        (0.0, 0.5, 0.75, 0.875), (2**-7, 2**-14, 2**-20)
    ):  # exact in float32, where t^2 - a^2 s^2 as it
        exact, rounded = (
            ambient_target(x_s, s, s + gap, n),
            ambient_target(x_s.float(), s, s + gap, n.float()),
        )  # stands has no digits left
        close([part.double() for part in rounded], list(exact), 1e-5)
        assert all(part.isfinite().all() for part in ambient_target(x_s.float(), s, s, n.float()))


def test_both_log_probabilities_are_what_they_say():
    """Eq. 13, and the release's form: Eq. 13 times 2 std^2 / elements, which weighs the three steps by .81 : .5625 : .25."""
    x, mean, *_ = normals(3, 6)
    for std in (f64(0.3), torch.linspace(0.1, 1, 6).double().view(-1, 1, 1, 1)):
        normal = torch.distributions.Normal(mean, std)
        expected = (normal.log_prob(x) - normal.log_prob(mean)).sum((1, 2, 3))
        close(
            (variants.log_prob(x, mean, std), log_prob(x, mean, std)),
            (expected, expected * 2 * std.flatten() ** 2 / D),
        )


def test_the_scheduler_draws_in_diffusers_what_our_own_loop_draws(tmp_path):
    base = tiny_base()
    pipe = base.pipe
    prompts = ["a circle", "two red squares"]
    seeds = (3, 4)
    text = base.encode(prompts)
    v = base.velocity([], text)
    encoded = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), text))

    def own(eta):
        return sample.draw(v, seeds, base.latent_shape, LEVELS, eta, CPU)

    def diffusers(scheduler, **inputs):
        scheduler.generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe.scheduler = scheduler  # guidance_scale=1 turns guidance off
        return pipe(
            guidance_scale=1.0,
            generator=scheduler.generator,
            height=32,
            width=32,
            max_sequence_length=8,
            output_type="latent",
            **inputs,
        ).images

    pipe.set_progress_bar_config(disable=True)
    ours, euler = (CPSScheduler.from_config(pipe.scheduler.config, eta=eta) for eta in (0.9, 0.0))
    ours.save_pretrained(tmp_path)
    again = CPSScheduler.from_pretrained(tmp_path)
    assert ours.config.eta == again.config.eta == 0.9
    four, given = (
        {"num_inference_steps": 4},
        {"sigmas": LEVELS[:-1]},
    )  # given levels are not shifted again
    for scheduler, steps, eta in (
        (ours, four, 0.9),
        (again, four, 0.9),
        (again, given, 0.9),
        (euler, four, 0),
    ):
        close(diffusers(scheduler, **encoded, **steps), own(eta), 1e-5)
        close(scheduler.sigmas.tolist(), LEVELS, 1e-6)
    close(
        diffusers(ours, prompt=prompts, **four), own(0.9), 1e-4
    )  # it encodes both prompts at once, we one by one: 3e-5 with torch 2.6
    assert (own(0) - own(0.9)).abs().max() > 0.1


# -------------------------------------------------------------------------------- rollout, times, data order; the real loops
def test_a_rollout_takes_k_steps_and_follows_the_grad_mode():
    theta, (x, *noises), seen = ZERO.clone().requires_grad_(), normals(K + 1, 3), []

    def G(x, s):
        return seen.append(s) or generator_with(theta)(x, s)

    for k in range(K + 1):
        seen.clear()
        with torch.no_grad():
            path = rollout(G, x, LEVELS, k, 0.9, iter(noises))
            assert (
                seen == LEVELS[:k]
                and len(path) == k + 1
                and path[0] is x
                and not any(p.requires_grad for p in path)
            )
            for i in range(k):
                close(
                    path[i + 1],
                    cps_step(
                        path[i], G(path[i], LEVELS[i]), LEVELS[i], LEVELS[i + 1], 0.9, noises[i]
                    )[0],
                )
    assert rollout(G, x, LEVELS, 2, 0.9, noises)[2].requires_grad


def test_times_stay_inside_the_sub_interval():
    u = torch.linspace(0, 1, 5).double()
    for s in LEVELS[1:]:
        assert renoise_time(s, u).tolist() == pytest.approx(
            [min(max(s + 0.01 + (0.99 - s) * w, 0.02), 0.98) for w in u.tolist()]
        )


# ---- the scheduler's interface, as diffusers' own tests ask for it
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
    assert dict(CPSScheduler.from_config(scheduler.config).config) == dict(scheduler.config)


@pytest.mark.parametrize("name", CPSScheduler.NOT_OURS)
def test_a_config_with_another_grid_is_refused(name):
    config = FlowMatchEulerDiscreteScheduler(**{name: 0.1}).config  # as true as a terminal shift
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


# ---- on tokens, as FLUX's pipelines call it
def scheduler_for(latent_shape):
    scheduler = CPSScheduler()
    scheduler.latent_shape = latent_shape
    return scheduler


def test_noise_for_tokens_is_drawn_as_latents_and_packed_as_diffusers_packs_them():
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    of_flux1 = FluxPipeline._pack_latents(latents, 2, 3, 4, 6)
    of_klein = Flux2KleinPipeline._pack_latents(latents)
    for tokens in (of_flux1, of_klein):
        scheduler = scheduler_for((3, 4, 6))
        noise = scheduler.noise_like(torch.zeros_like(tokens), torch.Generator().manual_seed(0))
        assert torch.equal(noise, tokens)
    plain = CPSScheduler().noise_like(of_flux1, torch.Generator().manual_seed(0))
    assert torch.equal(plain.flatten(), latents.flatten())


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
