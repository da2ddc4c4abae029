"""Stage 2's mathematics beside the paper.

The policy gradient (Prop. G.1), SubGRPO, advantages, policy loss, shared noise.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import rtdmd_rl
import variants
from common import shard
from cps import cps_step, rollout
from gaussian import (
    EYE,
    LEVELS,
    MEAN,
    STUDENT,
    ZERO,
    K,
    close,
    exact_normals,
    f64,
    generator_with,
    normals,
)
from rtdmd_rl import policy_loss, shared_noise

# -------------------------------------------------------------------------------------------------
# The two parts of the policy gradient (Prop. G.1)
GOAL = f64(0.2, 0.4)
FORM = f64([1.0, 0.3], [0.3, 0.5])
SLOPE = f64(1, -0.5)


def quadratic(x):
    """A reward with its maximum, 0, at GOAL -> [B]."""
    distance = x.flatten(1) - GOAL
    return -(distance @ FORM * distance).sum(1)


def linear(x):
    """A reward without a maximum -> [B]."""
    return x.flatten(1) @ SLOPE


def exact_gradient(reward, eta, steps, fields=STUDENT):
    """-> (d E[r(x_K)] / d theta, E[r]), where theta is at work in the given steps only.

    The points are exact, and back-propagation goes through all steps.
    """
    theta = ZERO.clone().requires_grad_()
    x, *noises = exact_normals(K + 1)
    for k, noise in enumerate(noises):
        s = LEVELS[k]
        t = LEVELS[k + 1]
        generator = generator_with(theta if k in steps else ZERO, fields)
        v = generator(x, s)
        x, _, _ = cps_step(x, v, sigma=s, sigma_next=t, eta=eta, noise=noise)
    mean_reward = reward(x).mean()
    (gradient,) = torch.autograd.grad(mean_reward, theta)
    return gradient, mean_reward.item()


def score_term(path, steps, advantage, eta, fields=STUDENT):
    """Per-sample gradient [B,6] of sum_k advantage * log pi(x_{k+1} | x_k).

    It goes through the Gaussian's log_prob (Eq. 13) and policy_loss.
    """
    theta = ZERO.repeat(len(advantage), 1).requires_grad_()
    generator = generator_with(theta, fields)
    for k in steps:
        x = path[k]
        s = LEVELS[k]
        t = LEVELS[k + 1]
        v = generator(x, s)
        _, mean, std = cps_step(x, v, sigma=s, sigma_next=t, eta=eta, noise=0 * x)
        log_p = variants.log_prob(path[k + 1], mean, std)
        objective = -policy_loss(log_p, log_p.detach(), advantage)
        objective.sum().backward()
    return theta.grad


def back_propagation_term(path, noises, first, eta):
    """Per-sample gradient [B,6] of the quadratic reward through the steps from `first` on.

    The state where they begin, path[first], is detached.
    """
    theta = ZERO.repeat(len(path[first]), 1).requires_grad_()
    last_steps = rollout(
        generator_with(theta),
        path[first],
        levels=LEVELS[first:],
        k=K - first,
        eta=eta,
        noises=noises[first:],
    )
    x_0 = last_steps[-1]
    (gradient,) = torch.autograd.grad(quadratic(x_0).sum(), theta)
    return gradient


def off(each, exact):
    """By how many standard errors the mean of per-sample values [B,6] misses `exact`.

    The worst component counts.
    """
    standard_error = each.std(0) / len(each) ** 0.5
    return ((each.mean(0) - exact) / standard_error).abs().max().item()


def test_score_function_and_last_step_back_propagation_add_up_to_the_reward_gradient():
    """Prop. G.1: the K-1 stochastic steps learn by log-probability.

    The deterministic last one learns by back-propagation at a detached x_{K-1}.
    """
    for eta in (0.5, 0.9):
        exact, baseline = exact_gradient(quadratic, eta, range(K))
        x, *noises = normals(K + 1, 100000)
        path = rollout(generator_with(ZERO), x, levels=LEVELS, k=K, eta=eta, noises=noises)
        advantage = quadratic(path[K]) - baseline
        score = score_term(path, range(K - 1), advantage, eta)
        last_step = back_propagation_term(path, noises, K - 1, eta)
        all_steps = back_propagation_term(path, noises, 0, eta)

        assert off(score + last_step, exact) < 5
        # A part is missing.
        assert off(score, exact) > 5
        assert off(last_step, exact) > 5
        # x_{K-1} is not detached: the stochastic steps are counted twice (App. G.2).
        assert off(score + all_steps, exact) > 5


# -------------------------------------------------------------------------------------------------
# SubGRPO (Eq. 16, 17, 31)
DOUBLING_AT_STEP_2 = (-7.7 * EYE, 0 * MEAN)
DOUBLING_AT_STEP_3 = (-4.0 * EYE, 0 * MEAN)
# In this generator steps 2 and 3 double what they are given.
EARLY = {**STUDENT, LEVELS[1]: DOUBLING_AT_STEP_2, LEVELS[2]: DOUBLING_AT_STEP_3}


def group_gradients(steps, N, groups, reward, fields, seed, eta=0.9):
    """[groups,6]: each group's policy gradient, (K-1)/M times the sum over `steps`.

    The other steps share their noise in the group of N pictures.
    """
    M = len(steps)
    x, *noises = normals(K + 1, groups * N, seed)
    for k in range(K):
        if k not in steps:
            noise_of_group = noises[k][::N]
            noises[k] = noise_of_group.repeat_interleave(N, 0)
    generator = generator_with(ZERO, fields)
    path = rollout(generator, x, levels=LEVELS, k=K, eta=eta, noises=noises)

    r = reward(path[K]).view(groups, N)
    centred = (r - r.mean(1, keepdim=True)).flatten()
    # A picture is part of its own baseline, which costs the factor (N-1)/N.
    advantage = centred * N / (N - 1)
    of_pictures = score_term(path, steps, advantage, eta, fields)
    of_groups = of_pictures.view(groups, N, 6).mean(1)
    return (K - 1) / M * of_groups


def test_subgrpo_is_unbiased_and_when_its_variance_is_smaller():
    """Eq. 17: (K-1)/M times the sum over a random subset S is unbiased.

    It has the expectation of the sum over all steps, though the others share their noise. Its
    variance (trace), over that of naive GRPO with as many pictures, is (eta .9, groups of 8, an S
    for each, standard errors .1 / .01):

        world                                                           M = 1   M = 2
        late noise decides the reward (the student, quadratic reward)   3.4     1.6
        early noise decides it (steps 2, 3 amplify; linear reward)      .21     .77

    Sharing takes the other steps' noise out of the reward. But S costs the factor (K-1)/M, and what
    a group shares does not average out in it (groups of 24: 6 and 2.4 in the first world).

    Let the reward be linear, the parameter a bias, the dimensions many. Let h_k be the variance of
    grad log pi_k and V_k that of the reward by step k's noise (V_0: by the start). M = 1 wins if

        (K-1) sum h_k (V_0 + V_k)  <  sum h_k (V_0 + sum V_k),

    i.e. if the steps with the loudest scores are not those that decide. CPS at eta .9 is loudest in
    its last steps (h = .08, .43, 2.2 here), so early decisions must matter most.

    SubGRPO needs M/(K-1) of naive GRPO's policy passes.
    """
    N = 8
    groups = 6000
    stochastic_steps = range(K - 1)
    # sign: of SubGRPO's variance less naive GRPO's
    for world, reward, fields, sign in (
        ("late", quadratic, STUDENT, 1),
        ("early", linear, EARLY, -1),
    ):

        def gradients(S, seed):
            return group_gradients(S, N=N, groups=groups, reward=reward, fields=fields, seed=seed)

        exact, _ = exact_gradient(reward, 0.9, stochastic_steps, fields)
        naive = gradients(stochastic_steps, seed=1)
        assert off(naive, exact) < 5
        naive_squares = (naive - exact).square().sum(-1)
        naive_variance = naive_squares.mean()
        for M in (1, 2):
            subsets = list(itertools.combinations(stochastic_steps, M))
            each_subset = [gradients(S, seed=2 + i) for i, S in enumerate(subsets)]
            each = torch.stack(each_subset)  # [3 subsets, groups, 6]

            # The three subsets come equally often: only the spread within a subset counts.
            variance_within = each.var(1).sum(0)
            standard_error = (variance_within / groups).sqrt() / 3
            bias = each.mean((0, 1)) - exact
            assert (bias / standard_error).abs().max() < 5

            # The means of the squares are the traces of the variances.
            squares = (each - exact).square().sum(-1).flatten()
            variance = squares.mean()
            difference = (variance - naive_variance).item()
            square_error = squares.var() / len(squares)
            naive_square_error = naive_squares.var() / len(naive_squares)
            error = (square_error + naive_square_error).sqrt().item()
            ratio = variance / naive_variance
            ratio_error = error / naive_variance
            print(
                f"{world} noise decides, M = {M}: variance ratio {ratio:.3f} +- {ratio_error:.3f}"
            )
            assert sign * difference > 5 * error


# -------------------------------------------------------------------------------------------------
# Advantages, policy loss, shared noise
def advantages_by_group(scores, weights, group_size):
    """The variant group_std."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtdmd_rl, "weighed_sum", variants.weighed_sum)
        return rtdmd_rl.advantages(scores, weights, group_size)


ADVANTAGES = {"batch": rtdmd_rl.advantages, "group": advantages_by_group}


def test_advantages_have_their_closed_forms(monkeypatch):
    """Eq. 14 with the release's standard deviation (batch) and with the paper's (group).

    Tolerances of 1e-3 are for the 1e-4 that guards the divisions.
    """
    pairs = f64([0.0, 1.0] * 4)
    outlier = f64([0.0] * 7 + [1.0] + [0.0] * 92)
    uneven = f64([0.0, 1.0, 0.0, 10.0])
    scores = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).double()
    weights = f64(1, 0.5, 2)
    one_reward = scores[:1]
    for std in ("batch", "group"):

        def advantages_of(scores, weights=(1.0,), N=6, clip=None):
            """clip: None leaves it as it is, 5."""
            with monkeypatch.context() as patch:
                if clip:
                    patch.setattr(rtdmd_rl, "ADVANTAGE_CLIP", clip)
                return ADVANTAGES[std](scores, weights, N)

        # Pairs get +-1, up to the n-1 in the standard deviation.
        size = math.sqrt(7 / 8)
        if std == "group":
            # A pair's own standard deviation is 1/sqrt(2), and it is not standardised again.
            size = 1 / math.sqrt(7 / 4) * math.sqrt(7 / 8)
        signs = 2 * pairs[0] - 1
        close(advantages_of(pairs, N=2), size * signs, 1e-3)

        # No reward varies.
        constant = torch.full((2, 48), 0.5)
        assert torch.equal(advantages_of(constant, (1.0, 2.0)), torch.zeros(48))

        # Each group's mean is 0.
        unclipped = advantages_of(scores, weights, clip=100)
        assert unclipped.view(-1, 6).mean(1).abs().max() < 1e-9

        # The scales of rewards do not matter.
        rescaled = scores * f64([10], [3], [7])
        close(unclipped, advantages_of(rescaled, weights, clip=100), 4e-3)

        # A reward and its opposite cancel.
        twice = scores[[0, 0]]
        close(advantages_of(twice, (1.0, -1.0)), torch.zeros(48).double())

        # A hard prompt makes no picture worse.
        difficulty = torch.arange(8).repeat_interleave(6)
        close(advantages_of(one_reward), advantages_of(one_reward + difficulty), 2e-3)

        # A reward of weight 0 does not count; its copy does.
        with_a_copy = torch.cat([scores, one_reward])
        weights_with_a_copy = f64(0, 0.5, 2, 1)
        close(unclipped, advantages_of(with_a_copy, weights_with_a_copy, clip=100), 2e-3)

        if std == "batch":
            # The scale of the weights matters neither.
            assert float(unclipped.std()) == pytest.approx(1, abs=1e-3)
            close(unclipped, advantages_of(scores, weights * 10), 2e-3)
        else:
            # The paper's letter: each reward over its group's standard deviation, weighed,
            # and no more.
            grouped = scores.view(3, 8, 6)
            centred = grouped - grouped.mean(2, True)
            standardised = centred / grouped.std(2, keepdim=True)
            weighed = standardised * weights.view(3, 1, 1)
            close(unclipped, weighed.sum(0).flatten(), 2e-3)

        # Outliers are clipped.
        for clip in (5, 2):
            assert advantages_of(outlier, N=100, clip=clip)[7] == clip
        assert advantages_of(outlier, N=100)[7] == 5
        assert advantages_of(-outlier, N=100)[7] == -5

    # A pair with ten times the difference counts ten times in the batch, and once in its group.
    by_group = ADVANTAGES["group"](uneven, [1.0], 2).abs()
    by_batch = ADVANTAGES["batch"](uneven, [1.0], 2).abs()
    close(by_group[2] / by_group[0], f64(1)[0], 1e-3)
    close(by_batch[2] / by_batch[0], f64(10)[0], 1e-2)


def test_a_group_whose_pictures_all_score_the_same_has_advantage_exactly_0():
    """Such pictures are not counted, so rounding must not let them in.

    The checker's groups are often all right or all wrong. The mean of seven equal numbers is rarely
    that number.
    """
    flat_groups = (torch.arange(101) / 100).repeat_interleave(7)
    assert (flat_groups.view(-1, 7).mean(1) != flat_groups[::7]).any()
    mixed = torch.tensor([1.0, 0, 0, 1, 0, 0, 0])
    scores = torch.cat([flat_groups, mixed])[None]
    for advantages in ADVANTAGES.values():
        counted = advantages(scores, [1.0], 7) != 0
        assert not counted[:-7].any()
        assert counted[-7:].all()


def test_the_policy_gradient_is_minus_advantage_at_ratio_1_and_is_clipped_on_one_side(monkeypatch):
    def gradient_and_loss(log_ratio, advantage):
        log_p = f64(*log_ratio).requires_grad_()
        old_log_p = torch.zeros_like(log_p)
        loss = policy_loss(log_p, old_log_p, f64(*advantage))
        (gradient,) = torch.autograd.grad(loss.sum(), log_p)
        return gradient.tolist(), loss.tolist()

    gradient, _ = gradient_and_loss((0, 0, 0), (2, -3, 0))
    assert gradient == pytest.approx([-2, 3, 0])

    near = (0.9e-5, 1.1e-5, -0.9e-5, -1.1e-5)  # around the clip range as it is, 1e-5
    gradient, _ = gradient_and_loss(near, (1, 1, -1, -1))
    assert gradient == pytest.approx([-1, 0, 1, 0], rel=1e-4)

    # There is nothing to gain from going on, but a wrong move is always taken back.
    monkeypatch.setattr(rtdmd_rl, "RATIO_CLIP", 0.2)
    up = math.log(1.5)
    down = math.log(0.5)
    gradient, loss = gradient_and_loss((up, up, down, down), (1, -1, 1, -1))
    assert gradient == pytest.approx([0, 1.5, -0.5, 0])
    assert loss == pytest.approx([-1.2, 1.5, -0.5, 0.8])


def test_shared_noise_depends_on_prompt_step_and_epoch_and_on_nothing_else():
    prompts = ["a", "a", "b", "a", "c", "b"]

    def noise_of(prompts, *key):
        draw = SimpleNamespace(shape=(4, 8, 8), device="cpu")
        return shared_noise(draw, prompts, *key)

    noise = noise_of(prompts, 0, 5, 1)
    for i, j in itertools.combinations(range(6), 2):
        same_prompt = prompts[i] == prompts[j]
        assert torch.equal(noise[i], noise[j]) == same_prompt

    # It does not matter which rows a rank holds.
    for world in (1, 2, 3, 4):
        for rank in range(world):
            rows = shard(6, rank, world)
            assert torch.equal(noise_of(prompts[rows], 0, 5, 1), noise[rows])

    keys = [
        (0, 5, 1),
        (0, 5, 2),
        (0, 6, 1),
        (1, 5, 1),
        (0, 1, 5),
        (0, 51),
    ]
    of_other_keys = [noise_of(["a"], *key) for key in keys]
    for one, other in itertools.combinations(of_other_keys, 2):
        assert not torch.equal(one, other)

    # Mean 0 and variance 1, to 5 standard errors.
    forty_prompts = [str(i) for i in range(40)]
    many = noise_of(forty_prompts, 0)
    count = many.numel()
    assert abs(many.mean()) < 5 / count**0.5
    assert abs(many.var() - 1) < 5 * (2 / count) ** 0.5
