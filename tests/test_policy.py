"""Stage 2's mathematics beside the paper: the policy gradient (Prop. G.1), SubGRPO, advantages, shared noise."""

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

# -------------------------------------------------------------------------- the two parts of the policy gradient (Prop. G.1)
GOAL, FORM, SLOPE = f64(0.2, 0.4), f64([1.0, 0.3], [0.3, 0.5]), f64(1, -0.5)


def quadratic(x):
    return -((x.flatten(1) - GOAL) @ FORM * (x.flatten(1) - GOAL)).sum(1)


def exact_gradient(reward, eta, steps, fields=STUDENT):
    """d E[r(x_K)] / d theta, theta at work in the given steps only, and E[r]: exact points, back-propagation through all steps."""
    theta, (x, *noises) = ZERO.clone().requires_grad_(), exact_normals(K + 1)
    for k in range(K):
        v = generator_with(theta if k in steps else ZERO, fields)
        x = cps_step(x, v(x, LEVELS[k]), LEVELS[k], LEVELS[k + 1], eta, noises[k])[0]
    return torch.autograd.grad(reward(x).mean(), theta)[0], reward(x).mean().item()


def score_term(path, steps, advantage, eta, fields=STUDENT):
    """Per-sample gradient [B,6] of sum_k advantage * log pi(x_{k+1} | x_k), through the Gaussian's log_prob (Eq. 13) and policy_loss."""
    theta = ZERO.repeat(len(advantage), 1).requires_grad_()
    for k in steps:
        _, mean, std = cps_step(
            path[k],
            generator_with(theta, fields)(path[k], LEVELS[k]),
            LEVELS[k],
            LEVELS[k + 1],
            eta,
            0 * path[k],
        )
        log_p = variants.log_prob(path[k + 1], mean, std)
        (-policy_loss(log_p, log_p.detach(), advantage)).sum().backward()
    return theta.grad


def off(each, exact):
    """By how many standard errors the mean of per-sample values [B,6] misses `exact`, worst component."""
    return ((each.mean(0) - exact) / (each.std(0) / len(each) ** 0.5)).abs().max().item()


def test_score_function_and_last_step_back_propagation_add_up_to_the_reward_gradient():
    """Prop. G.1: the K-1 stochastic steps by log-probability, the deterministic last one by back-propagation at a detached x_{K-1}."""
    for eta in (0.5, 0.9):
        (exact, baseline), (x, *noises) = (
            exact_gradient(quadratic, eta, range(K)),
            normals(K + 1, 100000),
        )
        path = rollout(generator_with(ZERO), x, LEVELS, K, eta, noises)
        score = score_term(path, range(K - 1), quadratic(path[K]) - baseline, eta)

        def back_propagated(first):  # through the steps from `first` on
            theta = ZERO.repeat(len(x), 1).requires_grad_()
            x_0 = rollout(
                generator_with(theta), path[first], LEVELS[first:], K - first, eta, noises[first:]
            )[-1]
            return torch.autograd.grad(quadratic(x_0).sum(), theta)[0]

        assert off(score + back_propagated(K - 1), exact) < 5
        for wrong in (
            score,
            back_propagated(K - 1),
            score + back_propagated(0),
        ):  # a part missing; not detached: counted twice (App. G.2)
            assert off(wrong, exact) > 5


# ------------------------------------------------------------------------------------------------- SubGRPO (Eq. 16, 17, 31)
EARLY = {
    **STUDENT,
    LEVELS[1]: (-7.7 * EYE, 0 * MEAN),
    LEVELS[2]: (-4.0 * EYE, 0 * MEAN),
}  # steps 2 and 3 double what they are given


def group_gradients(steps, N, groups, reward, fields, seed, eta=0.9):
    """[groups,6]: each group's policy gradient, (K-1)/M times the sum over `steps`; the other steps share their noise in the group."""
    x, *noises = normals(K + 1, groups * N, seed)
    noises = [n if k in steps else n[::N].repeat_interleave(N, 0) for k, n in enumerate(noises)]
    path = rollout(generator_with(ZERO, fields), x, LEVELS, K, eta, noises)
    r = reward(path[K]).view(groups, N)
    advantage = (
        (r - r.mean(1, keepdim=True)).flatten() * N / (N - 1)
    )  # a picture is part of its own baseline: factor (N-1)/N
    return (
        (K - 1)
        / len(steps)
        * score_term(path, steps, advantage, eta, fields).view(groups, N, 6).mean(1)
    )


def test_subgrpo_is_unbiased_and_when_its_variance_is_smaller():
    """Eq. 17: (K-1)/M times the sum over a random subset S has the expectation of the sum over all steps, though the others share their
    noise. Its variance (trace) over naive GRPO's with as many pictures, eta .9, groups of 8, an S for each, standard errors .1 / .01:
        world                                                         M = 1   M = 2
        late noise decides the reward (the student, quadratic reward)   3.4     1.6
        early noise decides it (steps 2, 3 amplify; linear reward)      .21     .77
    Sharing takes the other steps' noise out of the reward, but S costs the factor (K-1)/M, and what a group shares does not average out
    in it (groups of 24: 6 and 2.4 in the first world). Linear reward, bias as parameter, many dimensions: let h_k be the variance of
    grad log pi_k and V_k that of the reward by step k's noise (V_0: by the start); M = 1 wins if (K-1) sum h_k (V_0 + V_k) <
    sum h_k (V_0 + sum V_k), i.e. if the steps with the loudest scores are not those that decide. CPS at eta .9 is loudest in its last
    steps (h = .08, .43, 2.2 here), so early decisions must matter most. SubGRPO needs M/(K-1) of naive GRPO's policy passes."""
    N, groups = 8, 6000
    for world, reward, fields, sign in (
        ("late", quadratic, STUDENT, 1),
        ("early", lambda x: x.flatten(1) @ SLOPE, EARLY, -1),
    ):
        exact, _ = exact_gradient(reward, 0.9, range(K - 1), fields)
        naive = group_gradients(range(K - 1), N, groups, reward, fields, 1)
        assert off(naive, exact) < 5
        for M in (1, 2):
            subsets = enumerate(itertools.combinations(range(K - 1), M))
            each = torch.stack(
                [group_gradients(S, N, groups, reward, fields, 2 + i) for i, S in subsets]
            )
            error = (
                each.var(1).sum(0) / groups
            ).sqrt() / 3  # the three subsets equally often: only the spread within a subset counts
            assert ((each.mean((0, 1)) - exact) / error).abs().max() < 5
            a, b = (
                (g - exact).square().sum(-1).flatten() for g in (each, naive)
            )  # the means are the traces of the variances
            difference, error = (
                (a.mean() - b.mean()).item(),
                (a.var() / len(a) + b.var() / len(b)).sqrt().item(),
            )
            print(
                f"{world} noise decides, M = {M}: variance ratio {a.mean() / b.mean():.3f} +- {error / b.mean():.3f}"
            )
            assert sign * difference > 5 * error


# --------------------------------------------------------------------------------------- advantages, policy loss, shared noise
def advantages_by_group(scores, weights, group_size):
    """The variant group_std."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtdmd_rl, "weighed_sum", variants.weighed_sum)
        return rtdmd_rl.advantages(scores, weights, group_size)


ADVANTAGES = {"batch": rtdmd_rl.advantages, "group": advantages_by_group}


def test_advantages_have_their_closed_forms(monkeypatch):
    """Eq. 14 with the release's and the paper's standard deviation. 1e-3: the 1e-4 that guards the divisions."""
    pairs, outlier, uneven = (
        f64([0.0, 1.0] * 4),
        f64([0.0] * 7 + [1.0] + [0.0] * 92),
        f64([0.0, 1.0, 0.0, 10.0]),
    )
    scores, weights = (
        torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).double(),
        f64(1, 0.5, 2),
    )
    for std in ("batch", "group"):

        def of(scores, weights=(1.0,), N=6, clip=None):  # None: as it is, 5
            with monkeypatch.context() as patch:
                if clip:
                    patch.setattr(rtdmd_rl, "ADVANTAGE_CLIP", clip)
                return ADVANTAGES[std](scores, weights, N)

        pair = (
            1 if std == "batch" else 1 / math.sqrt(7 / 4)
        )  # a pair's own standard deviation is 1/sqrt(2), and it is not standardised again
        close(
            of(pairs, N=2), pair * math.sqrt(7 / 8) * (2 * pairs[0] - 1), 1e-3
        )  # +-1, up to the n-1 in the standard deviation
        assert torch.equal(
            of(torch.full((2, 48), 0.5), (1.0, 2.0)), torch.zeros(48)
        )  # no reward varies
        a = of(scores, weights, clip=100)
        assert a.view(-1, 6).mean(1).abs().max() < 1e-9
        close(
            a, of(scores * f64([10], [3], [7]), weights, clip=100), 4e-3
        )  # the scales of rewards do not matter
        close(of(scores[[0, 0]], (1.0, -1.0)), torch.zeros(48).double())
        close(
            of(scores[:1]), of(scores[:1] + torch.arange(8).repeat_interleave(6)), 2e-3
        )  # a hard prompt makes no picture worse
        close(a, of(torch.cat([scores, scores[:1]]), f64(0, 0.5, 2, 1), clip=100), 2e-3)
        if std == "batch":  # the scale of the weights matters neither
            assert float(a.std()) == pytest.approx(1, abs=1e-3)
            close(a, of(scores, weights * 10), 2e-3)
        else:  # the paper's letter: each reward over its group's standard deviation, weighed, and no more
            grouped = scores.view(3, 8, 6)
            close(
                a,
                (
                    (grouped - grouped.mean(2, True))
                    / grouped.std(2, keepdim=True)
                    * weights.view(3, 1, 1)
                )
                .sum(0)
                .flatten(),
                2e-3,
            )
        assert (
            [of(outlier, N=100, clip=c)[7] for c in (5, 2)] == [5, 2]
            and of(outlier, N=100)[7] == 5
            and of(-outlier, N=100)[7] == -5
        )
    by_group, by_batch = (ADVANTAGES[std](uneven, [1.0], 2).abs() for std in ("group", "batch"))
    close(by_group[2] / by_group[0], f64(1)[0], 1e-3)
    close(by_batch[2] / by_batch[0], f64(10)[0], 1e-2)


def test_a_group_whose_pictures_all_score_the_same_has_advantage_exactly_0():
    """Such pictures are not counted, so rounding must not let them in (the checker's groups are often all right or all wrong)."""
    scores = torch.tensor([[1.0] * 8 + [0.0] * 8 + [0.27] * 8 + [1, 0, 0, 1, 0, 0, 0, 0]])
    for advantages in ADVANTAGES.values():
        assert (advantages(scores, [1.0], 8) != 0).tolist() == [False] * 24 + [True] * 8


def test_the_policy_gradient_is_minus_advantage_at_ratio_1_and_is_clipped_on_one_side(monkeypatch):
    def gradient(log_ratio, advantage):
        log_p = f64(*log_ratio).requires_grad_()
        loss = policy_loss(log_p, torch.zeros_like(log_p), f64(*advantage))
        return torch.autograd.grad(loss.sum(), log_p)[0].tolist(), loss.tolist()

    assert gradient((0, 0, 0), (2, -3, 0))[0] == pytest.approx([-2, 3, 0])
    near = (0.9e-5, 1.1e-5, -0.9e-5, -1.1e-5)  # around the clip range as it is, 1e-5
    assert gradient(near, (1, 1, -1, -1))[0] == pytest.approx([-1, 0, 1, 0], rel=1e-4)
    monkeypatch.setattr(rtdmd_rl, "RATIO_CLIP", 0.2)
    up, down = math.log(1.5), math.log(0.5)
    grads, losses = gradient(
        (up, up, down, down), (1, -1, 1, -1)
    )  # nothing to gain from going on, but a wrong move is always taken back
    assert grads == pytest.approx([0, 1.5, -0.5, 0]) and losses == pytest.approx(
        [-1.2, 1.5, -0.5, 0.8]
    )


def test_shared_noise_depends_on_prompt_step_and_epoch_and_on_nothing_else():
    prompts = ["a", "a", "b", "a", "c", "b"]

    def draw(prompts, *key):
        return shared_noise(SimpleNamespace(shape=(4, 8, 8), device="cpu"), prompts, *key)

    noise = draw(prompts, 0, 5, 1)
    assert all(
        torch.equal(noise[i], noise[j]) == (prompts[i] == prompts[j])
        for i, j in itertools.combinations(range(6), 2)
    )
    for rows in (
        shard(6, rank, world) for world in (1, 2, 3, 4) for rank in range(world)
    ):  # whichever rows a rank holds
        assert torch.equal(draw(prompts[rows], 0, 5, 1), noise[rows])
    others = [
        draw(["a"], *key)
        for key in ((0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1), (0, 1, 5), (0, 51))
    ]
    assert not any(torch.equal(p, q) for p, q in itertools.combinations(others, 2))
    many = draw([str(i) for i in range(40)], 0)
    assert (
        abs(many.mean()) < 5 / many.numel() ** 0.5
        and abs(many.var() - 1) < 5 * (2 / many.numel()) ** 0.5
    )
