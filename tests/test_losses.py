"""Stage 1's losses beside the paper: the fake score (Eq. 10), the generator (Eq. 8, 9), consistency (Eq. 11)."""

import itertools
import math

import pytest
import torch

import cold_start
import cps
import variants
from cold_start import fake_score_loss, generator_loss, renoise_time
from cps import ambient_target, cps_step, renoise, rollout
from gaussian import (
    COV,
    DATA,
    ETAS,
    EYE,
    LEVELS,
    MEAN,
    ZERO,
    D,
    close,
    exact_field,
    exact_normals,
    f64,
    full,
    generator_with,
    linear,
    marginal,
    moments,
    normals,
    pack,
    rms_error,
    student_at,
    unpack,
    velocity,
)


# ------------------------------------------------------------------------------- the fake score (Eq. 10, Prop. D.1, App. K)
def fitted(x_s, s, t, n):
    """The linear field that minimises fake_score_loss (gamma = 0) at t: one Newton step, the loss is quadratic."""

    def loss(theta):
        v = linear(unpack(theta))
        return fake_score_loss(v, x_s, s, None, full(t, n), n, None, None, None, 0, 0.9)[0].mean()

    theta = ZERO.clone().requires_grad_()
    return unpack(
        -torch.linalg.solve(
            torch.autograd.functional.hessian(loss, theta),
            torch.autograd.grad(loss(theta), theta)[0],
        )
    )


def test_the_fake_score_learns_the_students_exact_velocity():
    """Prop. D.1: the ambient loss is least at the student's marginal velocity, at every s, t and eta."""
    for k, eta in itertools.product((1, 2, 3, 4), ETAS):
        path, world, (n,) = student_at(k, eta, 1)
        s, x_s = world[0], path[k]
        for t in renoise_time(s, f64(0, 0.3, 1)).tolist():
            assert rms_error(fitted(x_s, s, t, n), world, t) < 1e-9
            theta = pack(exact_field(world, t)).requires_grad_()
            loss, ambient, _ = fake_score_loss(
                linear(unpack(theta)), x_s, s, None, full(t, n), n, None, None, None, 0, eta
            )
            assert torch.autograd.grad(loss.mean(), theta)[0].abs().max() < 1e-9
            error = (
                (linear(unpack(theta))(renoise(x_s, s, t, n)) - ambient_target(x_s, s, t, n)[0])
                .square()
                .flatten(1)
                .mean(1)
            )
            close(
                (loss, ambient), (min(1, 10 * (t * t - ((1 - t) / (1 - s) * s) ** 2)) * error,) * 2
            )  # weight: min(1, 10 sig^2)


def test_the_papers_printed_std_and_full_interval_renoising_are_biased(monkeypatch):
    """Relative rms error of the learned velocity in the middle of the sub-interval, at s = .9, .75, .5, 0 (ours: below 1e-9).
    printed: App. B's std (t-s)/(1-s) for the kernel, and for the score -n/std of that kernel in the target. DMD2: the generator's x-prediction re-noised over [0,1], for eta = 0,
    .5, .9, 1; it learns the student's velocity at eta = 1 and only there (App. K)."""
    table = {
        ("printed", 0.9): (13.5, 6.29, 2.76, 0),
        ("DMD2", 0): (0.130, 0.071, 0.024, 0),
        ("DMD2", 0.5): (0.095, 0.041, 0.031, 0),
        ("DMD2", 0.9): (0.022, 0.008, 0.010, 0),
        ("DMD2", 1): (0, 0, 0, 0),
    }
    for ((which, eta), errors), k in itertools.product(table.items(), (1, 2, 3, 4)):
        path, world, (n,) = student_at(k, eta, 1)
        s, before, t = LEVELS[k], LEVELS[k - 1], (LEVELS[k] + 0.98) / 2
        x_0 = path[k - 1] - before * generator_with(ZERO)(path[k - 1], before)
        if which == "printed":
            with monkeypatch.context() as patch:
                patch.setattr(cps, "sub_interval", variants.sub_interval)
                field = fitted(path[k], s, t, n)
        else:
            field = fitted(x_0, 0.0, t, n)
        assert rms_error(field, world, t) == pytest.approx(errors[k - 1], rel=0.02, abs=6e-4), (
            which,
            eta,
            s,
        )


# --------------------------------------------------------------------------------------------------- the generator (Eq. 8, 9)
def matched_step(k, eta):
    """The linear field with which step k lands exactly on the teacher's marginal at t_k; the earlier steps are the student's."""
    (mean, cov), (goal_mean, goal_cov) = student_at(k - 1, eta, 0)[1][1:], marginal(DATA, LEVELS[k])

    def step(x, v):
        return [
            part.item()
            for part in cps_step(f64([x]), f64([v]), LEVELS[k - 1], LEVELS[k], eta, f64([0]))
        ]

    (from_x, _, std), (from_v, *_) = step(1, 0), step(0, 1)
    A = (
        torch.linalg.cholesky(goal_cov - std**2 * EYE)
        @ torch.linalg.inv(torch.linalg.cholesky(cov))
        - from_x * EYE
    ) / from_v
    return A, (goal_mean - from_x * mean) / from_v - A @ mean


def last_step(field, k, eta, x, noise):
    return cps_step(x, linear(field)(x), LEVELS[k - 1], LEVELS[k], eta, noise)[0]


def test_the_generator_gradient_vanishes_where_student_and_teacher_agree():
    """Eq. 9. The student is another sampler with the teacher's marginals; F is its exact velocity, computed from its own samples."""
    for k, eta in itertools.product((1, 2, 3, 4), ETAS):
        path, _, (noise,) = student_at(k - 1, eta, 1)
        x_s = last_step(matched_step(k, eta), k, eta, path[-1], noise).requires_grad_()
        world, (n, back) = (LEVELS[k], *moments(x_s.detach())), normals(2, len(x_s))
        t = renoise_time(world[0], torch.linspace(0, 1, len(x_s)).double())
        loss = generator_loss(x_s, world[0], t, n, back, velocity(DATA), velocity(world), eta).sum()
        assert torch.autograd.grad(loss, x_s)[0].abs().max() < 1e-9, (k, eta)


def test_the_generator_gradient_is_the_normalised_difference_of_the_scores():
    """d loss / d x_s = (y_fake - y_real) / mean |x_s - y_real|, and y_fake - y_real is a positive multiple of score_fake - score_real."""
    s, eta, (x_s, n, back), t = (
        0.5,
        0.9,
        normals(3, 7),
        renoise_time(0.5, torch.linspace(0, 1, 7).double()),
    )
    fake, x_t = (s, MEAN + 1, 2 * COV + 0.25 * EYE), renoise(x_s, s, t, n)
    y_real, y_fake = (
        cps_step(x_t, v(x_t, t), t, s, eta, back)[0] for v in (velocity(DATA), velocity(fake))
    )

    def gradient(x, *inputs):
        return torch.autograd.grad(generator_loss(x.requires_grad_(), *inputs, eta).sum(), x)[0]

    expected = (
        (y_fake - y_real) / (x_s - y_real).abs().mean((1, 2, 3), keepdim=True) / D
    )  # the loss is a mean over D elements
    close(gradient(x_s.clone(), s, t, n, back, velocity(DATA), velocity(fake)), expected)

    def score(world):
        return torch.stack(
            [
                (m - x) @ torch.linalg.inv(C)
                for x, (m, C) in zip(x_t, (marginal(world, u) for u in t.tolist()))
            ]
        )

    factor = (y_fake - y_real) / (score(fake) - score(DATA))
    close(factor, factor[..., :1].expand_as(factor))
    assert (factor > 0).all()

    def nothing(x, t):
        return 0 * x  # 0/0 counts as 0

    assert torch.equal(gradient(0 * n, 0.0, t, 0 * n, back, nothing, nothing), 0 * n)


def test_the_papers_letter_of_the_generator_gradient_is_the_gradient_of_the_kl():
    """--variant score_gradient. Per sample a (score_fake - score_real)(x_t), a = dx_t/dx_s, and on exact points its mean over a shift of x_s is
    the gradient of KL(student at t || teacher at t) with respect to that shift, P_real (mean_fake - mean_real) a for Gaussians."""
    for s in LEVELS[1:]:
        z, n = exact_normals(2)
        fake = (s, *marginal((0.0, MEAN + 0.5, 1.7 * COV), s))
        x_s, t = (fake[1] + z @ torch.linalg.cholesky(fake[2]).mT).requires_grad_(), (s + 0.98) / 2
        loss = variants.generator_loss(
            x_s, s, full(t, z), n, None, velocity(DATA), velocity(fake), 0.9
        )
        (gradient,) = torch.autograd.grad(loss.sum(), x_s)
        (mean, cov), (mean_F, cov_F), a, x_t = (
            marginal(DATA, t),
            marginal(fake, t),
            (1 - t) / (1 - s),
            renoise(x_s.detach(), s, t, n),
        )

        def score(m, C):
            return (m - x_t) @ torch.linalg.inv(C)

        close(gradient, a * (score(mean_F, cov_F) - score(mean, cov)))
        close(gradient.mean(0).flatten(), a * torch.linalg.inv(cov) @ (mean_F - mean))


@pytest.mark.parametrize("k", (1, 2, 3, 4))
def test_descent_with_exact_scores_ends_at_the_teachers_marginal(k):
    """Eq. 9 at s = t_k, from shifted and wrongly scaled students: 300 Adam steps on 128 fresh samples each. Student = teacher makes
    every single sample's gradient zero, so dividing by mean |x_s - y_real| moves no fixed point and there is no sampling noise at it.
    The distance (largest error in mean and covariance) must fall 100-fold; measured: 240 (scaled, s = .9) to 8e6."""
    s = LEVELS[k]
    for eta, shift, scale in ((0.9, 1.0, 1.0), (0.9, 0.0, 1.6), (0, 0.5, 1.3)):
        A, b = matched_step(k, eta)
        theta = pack((A * scale, b + shift)).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: (1 + math.cos(math.pi * i / 300)) / 2
        )
        (*_, before), _, (noise,) = student_at(k - 1, eta, 1)

        def student():
            return (s, *moments(last_step(unpack(theta.detach()), k, eta, before, noise)))

        def distance():
            return max((p - q).abs().max().item() for p, q in zip(student()[1:], marginal(DATA, s)))

        start = distance()
        for i in range(300):
            z, *noises, n, back, last = normals(k + 3, 128, seed=i)
            x_s = last_step(
                unpack(theta),
                k,
                eta,
                rollout(generator_with(ZERO), z, LEVELS, k - 1, eta, noises)[-1],
                last,
            )
            t = renoise_time(
                s, torch.rand(128, generator=torch.Generator().manual_seed(i)).double()
            )
            generator_loss(
                x_s, s, t, n, back, velocity(DATA), velocity(student()), eta
            ).mean().backward()
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        print(
            f"s {s:.2f} eta {eta} shift {shift} scale {scale}: distance {start:.1e} -> {distance():.1e}"
        )
        assert distance() < start / 100


# -------------------------------------------------------------------------------- consistency (Eq. 11, 22, Prop. E.1, App. F)
WORLDS = (DATA, (0.5, *marginal((0.0, MEAN + 0.3, COV * 1.5), 0.5)))


def reverse_kernel(world, t, t2):
    """The exact p(x_t2 | x_t) = N(R x_t + r, Q), by Bayes' rule from x_t | x_t2."""
    (mean, cov), (mean2, cov2), a = marginal(world, t), marginal(world, t2), (1 - t) / (1 - t2)
    R = a * cov2 @ torch.linalg.inv(cov)
    return R, mean2 - R @ mean, cov2 - a * R @ cov2


def consistency(world, F, t, back, eta, one_sample=False):
    """E[two-sample estimator] of the code, on exact points. one_sample: the same transition twice, i.e. a mean square."""
    z, n, n1, n2 = exact_normals(4)
    x_s = world[1] + z @ torch.linalg.cholesky(world[2]).T
    return (
        fake_score_loss(
            F,
            x_s,
            world[0],
            None,
            full(t, z),
            n,
            full(back, z),
            n1,
            n1 if one_sample else n2,
            1.0,
            eta,
        )[2]
        .mean()
        .item()
    )


@pytest.mark.parametrize("wrong", (0.0, 0.2), ids=("at the optimum", "away from it"))
def test_two_samples_estimate_the_squared_violation_and_one_adds_its_variance(wrong, monkeypatch):
    """Prop. E.1, Eq. 22, with the exact reverse kernel: E[two-sample] = E|E[h(x'')|x_t] - h(x_t)|^2, which is 0 for the exact velocity."""
    for world, (t, back) in itertools.product(WORLDS, ((0.98, 0.2), (0.8, 0.1), (0.6, 0.001))):
        R, r, Q = reverse_kernel(world, t, t - back)
        monkeypatch.setattr(
            cold_start,
            "cps_step",
            lambda x, v, t, t2, eta, noise: (
                x @ R.T + r + noise @ torch.linalg.cholesky(Q).T,
                None,
                None,
            ),
        )

        def at(t):
            return tuple(
                p + wrong * q
                for p, q in zip(exact_field(world, t), (f64([1.0, 0.3], [-0.2, 0.5]), f64(0.7, -1)))
            )

        (A, b), (A2, b2), (mean, cov) = at(t), at(t - back), marginal(world, t)
        H = EYE - (t - back) * A2  # h(x'', t'') = H x'' - t'' b2, so the violation is V x_t + w:
        V, w = H @ R - (EYE - t * A), H @ r - (t - back) * b2 + t * b
        violation, variance = (
            ((V @ cov * V).sum() + (V @ mean + w).square().sum()).item() / D,
            (H @ Q * H).sum().item() / D,
        )
        assert (violation < 1e-20) == (wrong == 0)

        def F(x, t):
            return linear(at(t[0].item()))(x)

        assert consistency(world, F, t, back, 0.9) == pytest.approx(violation, rel=1e-9, abs=1e-12)
        assert consistency(world, F, t, back, 0.9, one_sample=True) == pytest.approx(
            violation + variance, rel=1e-9
        )


def unbiased_eta(t, t2):
    """The eta whose CPS step has the exact reverse kernel's coefficients: sin^2(eta pi/2) = 1 - ((1-t) t'' / ((1-t'') t))^2."""
    return math.asin(math.sqrt(1 - ((1 - t) * t2 / ((1 - t2) * t)) ** 2)) * 2 / math.pi


def test_with_cps_transitions_the_consistency_term_is_biased_unless_eta_fits_the_step():
    """In practice the transition is a CPS step, and the estimator at the EXACT velocity is not 0. At t' = .5, times 1000 (for scale: the
    variance that the one-sample form would add at eta .9 is 77 to 102):
        t'-t''   eta 0    .5     .9      1    the eta without bias
         .001      .0    5.0   42.5   59.8    .057
         .01       .1    3.9   39.6   56.4    .179
         .05      2.1     .8   27.9   42.6    .390
         .1       7.0     .1   16.4   28.1    .535
         .2      16.6    4.0    3.8    9.4    .718
    For a fixed eta > 0 the bias does NOT go away as t'' -> t': a CPS step's noise does not shrink with the step. One eta has no bias, far
    below .9 for short steps. What it does to the fake score is the next test."""
    table = {
        0.001: (0, 5.0, 42.5, 59.8, 0.057),
        0.01: (0.1, 3.9, 39.6, 56.4, 0.179),
        0.05: (2.1, 0.8, 27.9, 42.6, 0.390),
        0.1: (7.0, 0.1, 16.4, 28.1, 0.535),
        0.2: (16.6, 4.0, 3.8, 9.4, 0.718),
    }
    for back, (*biases, eta) in table.items():
        assert [
            1e3 * consistency(DATA, velocity(DATA), 0.5, back, e) for e in ETAS
        ] == pytest.approx(biases, abs=0.06)
        assert (
            76
            < 1e3 * consistency(DATA, velocity(DATA), 0.5, back, 0.9, one_sample=True) - biases[2]
            < 103
        )
        assert unbiased_eta(0.5, 0.5 - back) == pytest.approx(eta, abs=6e-4)
        assert all(
            abs(consistency(world, velocity(world), 0.8, back, unbiased_eta(0.8, 0.8 - back)))
            < 1e-12
            for world in WORLDS
        )


def learned(gamma, t, back, eta):
    """Where training with the whole fake_score_loss comes to rest, for a field that is free at t' and at t'' -> its rms_error at t'."""
    z, n, n1, n2, m = exact_normals(5)
    x_s = MEAN + z @ torch.linalg.cholesky(COV).T

    def loss(theta):
        def F(x, u):
            return linear(unpack(theta[:6] if abs(u[0].item() - t) < 1e-9 else theta[6:]))(x)

        return (
            fake_score_loss(F, x_s, 0.0, None, full(t, z), n, full(back, z), n1, n2, gamma, eta)[0]
            + fake_score_loss(F, x_s, 0.0, None, full(t - back, z), m, None, None, None, 0, eta)[0]
        ).mean()

    theta = torch.cat([pack(exact_field(DATA, u)) for u in (t, t - back)])
    hessian = torch.autograd.functional.hessian(loss, theta)
    for _ in range(40):  # repeated Newton steps: the detached transition moves with theta
        gradient = torch.autograd.functional.jacobian(loss, theta)
        theta = theta - torch.linalg.solve(hessian, gradient)
    assert gradient.abs().max() < 1e-10
    return rms_error(unpack(theta[:6]), DATA, t)


def test_the_consistency_bias_moves_the_fake_score_by_a_thousandth_at_the_papers_gamma():
    """Relative rms error of v_F at t' = .5 in %, eta 0, .5, .9, 1: harmless at gamma .01, ten times as much at .1, 0 at the right eta."""
    table = {
        (0.01, 0.01): (0.005, 0.036, 0.114, 0.136),
        (0.01, 0.2): (0.073, 0.036, 0.035, 0.056),
        (0.1, 0.01): (0.053, 0.344, 1.11, 1.33),
    }
    for (gamma, back), errors in table.items():
        assert [100 * learned(gamma, 0.5, back, eta) for eta in ETAS] == pytest.approx(
            errors, rel=0.02, abs=6e-4
        )
    assert learned(0.1, 0.5, 0.2, unbiased_eta(0.5, 0.3)) < 1e-9


def test_the_consistency_gradient_goes_through_all_three_h_and_not_through_the_transition():
    """App. F: the transition is driven by the anchor's DETACHED velocity; the reference below drives it with a frozen copy of F."""
    (x_s, n, n1, n2), frozen = normals(4, 6), torch.linspace(-1, 1, 6).double()
    theta, h = frozen.clone().requires_grad_(), lambda x, t: x - t * linear(unpack(theta))(x)

    def term(t, back):
        return fake_score_loss(
            linear(unpack(theta)), x_s, 0.0, None, full(t, n), n, full(back, n), n1, n2, 1.0, 0.9
        )[2]

    x_t = renoise(x_s, 0.0, 0.6, n)
    x1, x2 = (
        cps_step(x_t, linear(unpack(frozen))(x_t), 0.6, 0.5, 0.9, noise)[0] for noise in (n1, n2)
    )
    expected = ((h(x1, 0.5) - h(x_t, 0.6)) * (h(x2, 0.5) - h(x_t, 0.6))).mean()
    close(torch.autograd.grad(term(0.6, 0.1).mean(), theta), torch.autograd.grad(expected, theta))
    close(term(0.02, 0.2), term(0.02, 0.02))  # t'' stops at 0


def test_the_papers_consistency_times_are_the_generators_own_levels(monkeypatch):
    """--variant step_consistency: from x_s itself at t' = t_k to t'' = t_{k+1}. Where t_{k+1} = 0 the
    transition lands on the anchor itself and the term vanishes with its gradient: by the letter only .9 -> .75 and .75 -> .5 are constrained."""
    (x_s, n, n1, n2), theta = normals(4, 6), torch.linspace(-1, 1, 6).double().requires_grad_()

    def F(x, t):
        return linear(unpack(theta))(x) * t.view(-1, 1, 1, 1)

    def h(x, t):
        return x - t * F(x, full(t, x))

    monkeypatch.setattr(cold_start, "consistency_path", variants.consistency_path)
    for s, after in zip(LEVELS[1:], LEVELS[2:] + [0.0]):
        loss, ambient, term = fake_score_loss(
            F, x_s, full(s, n), full(after, n), full(0.97, n), n, full(0.1, n), n1, n2, 0.3, 0.9
        )
        x1, x2 = (
            cps_step(x_s, F(x_s, full(s, n)).detach(), s, after, 0.9, noise)[0]
            for noise in (n1, n2)
        )
        expected = ((h(x1, after) - h(x_s, s)) * (h(x2, after) - h(x_s, s))).flatten(1).mean(1)
        close(term, expected), close(loss, ambient + 0.3 * expected)
        close(
            torch.autograd.grad(term.mean(), theta, retain_graph=True),
            torch.autograd.grad(expected.mean(), theta),
        )
        assert (term.abs().max() < 1e-12) == (after == 0)
