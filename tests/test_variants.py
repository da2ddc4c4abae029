"""variants.py: each variant has the signature of what it replaces, and its closed form.

Each reaches the loop that it is for.

The closed forms of sub_interval, consistency_path, generator_loss, log_prob and advantages are in
the files of the Gaussian world: test_sampler, test_losses and test_policy.
"""

import inspect
import random
from types import SimpleNamespace

import pytest
import torch

import cold_start
import cps
import rtdmd_rl
import variants
from common import StepRandom
from gaussian import LEVELS, K, f64
from helpers import BASE, good, here, log_of, same_files

# Where each is called by name: the program's own module is None.
PLACES = {
    "printed_std": cps,
    "step_consistency": cold_start,
    "score_gradient": None,
    "step_weight": None,
    "dmd2": None,
    "gaussian_log_prob": None,
    "group_std": None,
    "subset_factor": None,
    "drawn_step": None,
    "rollout_log_prob": None,
    "free_noise": None,
}
PROGRAMS = {1: cold_start, 2: rtdmd_rl}
PAIRS = [(name, stage) for name, (_, _, stages) in variants.VARIANTS.items() for stage in stages]


def place_of(name, stage):
    return PLACES.get(name) or PROGRAMS[stage]


# ---- choosing ------------------------------------------------------------------------------------
def test_every_variant_is_listed_here():
    assert list(PLACES) == list(variants.VARIANTS), "PLACES, above, has a line for each variant"


def test_no_variant_is_another_one_under_a_second_name():
    """A second `def` of the same name in variants.py would take the first one's place."""
    functions = [function for _, function, _ in variants.VARIANTS.values()]
    assert len(set(functions)) == len(functions)


@pytest.mark.parametrize("name, stage", PAIRS)
def test_a_variant_has_the_signature_of_the_function_that_it_replaces(name, stage):
    replaced, variant, _ = variants.VARIANTS[name]
    default = getattr(place_of(name, stage), replaced)
    assert inspect.signature(variant) == inspect.signature(default)
    assert variant is not default


@pytest.mark.parametrize("stage", PROGRAMS)
def test_paper_chooses_variants_that_its_stage_knows(stage):
    chosen = PROGRAMS[stage].PAPER["variant"].split(",")
    for name in chosen:
        assert stage in variants.VARIANTS[name][2]
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(
    "names, stage",
    [
        ("nonsense", 1),
        ("nonsense", 2),
        ("free_noise", 1),
        ("dmd2", 2),
        ("printed_std,dmd2", 2),
    ],
)
def test_a_name_that_is_unknown_or_of_the_other_stage_ends_the_program(names, stage, capsys):
    with pytest.raises(SystemExit) as end:
        variants.swap(names, stage, {"sub_interval": None})
    assert end.value.code == 2
    assert f"stage {stage} knows printed_std, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, said",
    [
        ("step_weight,score_gradient", "no effect"),
        ("dmd2", "calls no function executed_levels"),
    ],
)
def test_a_variant_without_effect_ends_the_program(names, said, capsys):
    with pytest.raises(SystemExit) as end:
        variants.swap(names, 1, {"generator_loss": None})
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_levels_are_no_variant_since_sample_needs_the_same(monkeypatch, capsys):
    monkeypatch.setitem(variants.VARIANTS, "even", ("sigmas", cps.sigmas, (1, 2)))
    with pytest.raises(SystemExit) as end:
        variants.swap("even", 1, vars(cps))
    assert end.value.code == 2
    assert "cps.sigmas itself" in capsys.readouterr().err


def test_two_variants_of_one_function_end_the_program(monkeypatch, capsys):
    def by_rank(centred, scores, weights):
        return scores.argsort().argsort()

    monkeypatch.setitem(variants.VARIANTS, "by_rank", ("weighed_sum", by_rank, (2,)))
    place = {"weighed_sum": "default"}
    variants.swap(" by_rank, by_rank", 2, place)  # blanks, and twice the same
    assert place == {"weighed_sum": by_rank}
    with pytest.raises(SystemExit) as end:
        variants.swap("by_rank,group_std", 2, place)
    assert end.value.code == 2
    assert "by_rank and group_std both replace weighed_sum" in capsys.readouterr().err


def test_swapping_replaces_names_where_they_are_and_adds_none():
    one = {"log_prob": "default", "renoise": "kept"}
    two = {"weighed_sum": "default"}
    variants.swap("gaussian_log_prob,group_std", 2, one, two)
    assert one == {"log_prob": variants.log_prob, "renoise": "kept"}
    assert two == {"weighed_sum": variants.weighed_sum}
    variants.swap("", 2, one, two)
    assert one["renoise"] == "kept"


# ---- closed forms, of default and variant --------------------------------------------------------
@pytest.mark.parametrize("k", range(1, K + 1))
def test_executed_levels(k):
    assert cold_start.executed_levels(LEVELS, k) == LEVELS[: k + 1]
    assert variants.executed_levels(LEVELS, k) == LEVELS[:k] + [0]


def test_a_step_counts_as_1_or_as_much_as_its_gradient_is_small():
    """A shift of x0 by d moves x_s by (1-s) d.

    The loss's gradient comes back through 1-s again.
    """
    for s in (0.9, 0.75, 0.5, 0.0):
        assert cold_start.step_weight(s) == 1
        assert variants.step_weight(s) * (1 - s) * (1 - s) == pytest.approx(1)


def test_the_step_weight_multiplies_the_generators_loss(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 3, 4, 1, 2, 2, generator=rng)
    x_s, noise = drawn[:, 0]
    noise_back = noise.flip(0)
    t = torch.tensor([0.95, 0.97, 0.92, 0.98])

    def teacher(x, t):
        return 0.5 * x

    def fake(x, t):
        return 0.4 * x

    def loss():
        return cold_start.generator_loss(
            x_s,
            0.9,
            t,
            noise,
            noise_back,
            teacher,
            fake,
            eta=0.9,
        )

    plain = loss()
    monkeypatch.setattr(cold_start, "step_weight", variants.step_weight)
    torch.testing.assert_close(loss(), 100 * plain)


def test_the_subsets_weight_is_1_or_that_of_the_unbiased_sum():
    for M in (1, 2, 3):
        assert rtdmd_rl.subset_weight(4, M) == 1
        assert variants.subset_weight(4, M) == pytest.approx(3 / M)


def test_the_anchors_step_is_the_last_or_any():
    draw = SimpleNamespace(scalars=random.Random(0))
    by_default = {rtdmd_rl.anchor_step(draw, K) for _ in range(100)}
    of_variant = {variants.anchor_step(draw, K) for _ in range(100)}
    assert by_default == {K}
    assert of_variant == {1, 2, 3, 4}


def test_the_ratios_denominator_is_the_updates_own_or_the_rollouts():
    log_p = f64(-1.0, -2.0).requires_grad_()
    of_rollout = f64(-3.0, -4.0)
    own = rtdmd_rl.old_log_prob(log_p, of_rollout)
    assert torch.equal(own, log_p)
    assert not own.requires_grad
    assert variants.old_log_prob(log_p, of_rollout) is of_rollout


def noise_of_all_steps(monkeypatch, shared_noise):
    """step_noise with S = [1] for two prompts of two pictures -> [K][4, ...]"""
    monkeypatch.setattr(rtdmd_rl, "shared_noise", shared_noise)
    seed = 0
    epoch = 7
    draw = StepRandom(
        seed,
        epoch,
        n_pictures=4,
        my_rows=slice(0, 4),
        shape=(2, 3, 3),
        device=torch.device("cpu"),
    )
    prompts = ["a", "a", "b", "b"]
    return rtdmd_rl.step_noise(draw, K, [1], prompts, seed, epoch)


def different(noise):
    """How many different rows noise [B,...] has."""
    rows = {tuple(row.flatten().tolist()) for row in noise}
    return len(rows)


def test_noise_is_shared_outside_of_the_subset_or_nowhere(monkeypatch):
    shared = noise_of_all_steps(monkeypatch, rtdmd_rl.shared_noise)
    free = noise_of_all_steps(monkeypatch, variants.shared_noise)
    assert [different(noise) for noise in shared] == [2, 4, 2, 1]
    assert [different(noise) for noise in free] == [4, 4, 4, 1]
    for noises in (shared, free):
        *stochastic, last = noises
        assert not last.any()  # the last step is deterministic
        # No two steps have a row in common.
        assert different(torch.cat(stochastic)) == sum(different(noise) for noise in stochastic)


def test_how_far_the_consistency_looks_back():
    u = f64(0, 0.4999, 0.5, 0.999999)
    back = cold_start.steps_back(u)
    assert back.tolist() == pytest.approx([0.001, 0.1, 0.101, 0.2])


# ---- each reaches its loop -----------------------------------------------------------------------
# With seed 4: k = 3, 2 in stage 1, S = [1] and drawn_step's 1 in stage 2.
SMALL_COLD = [
    *BASE,
    *("--seed", 4),
    *("--steps", 2),
    *("--batch_size", 3),
    *("--generator_every", 1),
]
SMALL_RL = [
    *BASE,
    *("--seed", 4),
    *("--epochs", 1),
    *("--prompts_per_epoch", 2),
    *("--group_size", 3),
    *("--subset", 1),
    *("--rewards", "clipscore"),
]
SMALL = {1: SMALL_COLD, 2: SMALL_RL}


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("cold")
    good(here(cold_start, *SMALL[1], "--out_dir", out_dir))
    return out_dir


@pytest.mark.parametrize("name, stage", PAIRS)
def test_the_flag_puts_the_variant_into_the_loop(name, stage, cold, tmp_path, monkeypatch):
    """A run with --variant is not the default one.

    It is, to the byte, one with that function alone replaced.
    """
    program = PROGRAMS[stage]
    flags = SMALL[stage]
    beside = ""
    if stage == 2:
        flags = [*flags, "--cold_start", cold]
        # At s = 0 the printed kernel is the exact one: the anchor has to stand on an earlier step.
        if name != "drawn_step":
            beside = "drawn_step"
    if name == "rollout_log_prob":
        # Rollout and update agree to the bit on a CPU; here they do not.
        real = rtdmd_rl.log_prob

        def log_prob(x_next, mean, std):
            error = 0.0 if torch.is_grad_enabled() else 1e-3
            return real(x_next, mean, std) + error

        monkeypatch.setattr(rtdmd_rl, "log_prob", log_prob)

    def run(variant, out_dir):
        good(here(program, *flags, "--variant", variant, "--out_dir", out_dir))
        return log_of(out_dir)

    plain = run(beside, tmp_path / "plain")
    flag = run(f"{beside},{name}", tmp_path / "flag")
    name_of_default, function, _ = variants.VARIANTS[name]
    monkeypatch.setattr(place_of(name, stage), name_of_default, function)
    replaced = run(beside, tmp_path / "function")
    assert flag == replaced
    assert same_files(tmp_path / "flag", tmp_path / "function")
    assert flag != plain


def test_a_run_after_one_with_variants_is_the_default_one(cold, tmp_path):
    """The helper that runs a program in this process puts back what --variant has replaced."""
    good(here(cold_start, *SMALL[1], "--paper", "--out_dir", tmp_path / "paper"))
    good(here(cold_start, *SMALL[1], "--out_dir", tmp_path / "again"))
    assert same_files(tmp_path / "again", cold)
