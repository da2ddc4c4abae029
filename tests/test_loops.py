"""Both training loops.

What each step calls with what, the paper's variants, any number of processes, and low memory.
"""

import copy
import itertools
import json
import math
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from diffusers import SD3Transformer2DModel

import checkpoint
import cold_start
import common
import cps
import model
import rewards
import rtdmd_rl
import variants
from cold_start import fake_score_loss, generator_loss
from common import data_order, shard
from cps import cps_step, rollout
from gaussian import LEVELS, K, close
from helpers import (
    ADAPTERS,
    COLD,
    ONE_BATCH,
    RL,
    TINY,
    flags_of,
    flat,
    good,
    here,
    lines_of,
    load,
    log_of,
    same_files,
    shell,
    stage_of,
    tiny_base,
    unswapped,
)
from rtdmd_rl import policy_loss, shared_noise

# With these an update of Adam moves a weight by 1e-5 at most.
SMALL_RATES = ["--lr", 1e-5, "--fake_lr", 1e-5]


def test_a_batch_is_the_same_on_any_number_of_ranks_and_every_prompt_comes_once_a_pass():
    def draw(n, step):
        return torch.randn(n, 3, generator=common.seeded_rng("cpu", 0, step))

    for n, world in itertools.product((1, 2, 7, 12), (1, 2, 3)):
        parts = [draw(n, 9)[shard(n, rank, world)] for rank in range(world)]
        sizes = [len(part) for part in parts]
        assert torch.equal(torch.cat(parts), draw(n, 9))
        assert max(sizes) - min(sizes) <= 1
    assert not torch.equal(draw(4, 9), draw(4, 10))
    for length, batch in ((10, 4), (3, 8), (5, 5)):
        six_passes = 6 * length
        order = []
        for first in range(0, six_passes, batch):
            order += data_order(length, first, batch, seed=1)
        order = order[:six_passes]
        passes = [order[i : i + length] for i in range(0, six_passes, length)]
        assert order == data_order(length, 0, six_passes, seed=1)
        assert len({tuple(one_pass) for one_pass in passes}) > 1
        assert all(Counter(one_pass) == Counter(range(length)) for one_pass in passes)
    assert data_order(50, 0, 50, seed=1) != data_order(50, 0, 50, seed=2)


def run_main(module, base, out_dir, monkeypatch, *flags):
    """A script's own main(), in this process, on a copy of the tiny base model.

    -> the lines of its log
    """

    def load_copy(*_):
        return copy.deepcopy(base)

    command = f"main --preset tiny --device cpu --out_dir {out_dir} --sample_every 0".split()
    monkeypatch.setattr(module, "load_base", load_copy)
    monkeypatch.setattr(sys, "argv", [*command, *flags])
    with unswapped():
        module.main()
    return lines_of(out_dir)


def level_of(s):
    """The noise level that s is up to rounding; of a [B] tensor, too."""
    value = float(s.flatten()[0] if torch.is_tensor(s) else s)

    def distance(level):
        return abs(level - value)

    return min(LEVELS, key=distance)


def test_stage_1_trains_each_adapter_by_its_own_loss_and_the_generator_through_its_last_step(
    tiny_parts, tmp_path, monkeypatch
):
    _, base = tiny_parts
    paths = []
    ends_with_gradient = []
    has_gradient = []
    update = cold_start.update

    def note_gradient(parameters):
        has_gradient.append(parameters.grad.any())

    def noted_rollout(*inputs):
        path = rollout(*inputs)
        paths.append(path)
        return path

    def noted_generator_loss(x_s, *rest):
        ends_with_gradient.append(x_s)
        return generator_loss(x_s, *rest)

    def noted_update(parameters, *rest):
        note_gradient(parameters)
        return update(parameters, *rest)

    def noted_save(run, step):
        note_gradient(run.state["generator"])

    monkeypatch.setattr(cold_start, "rollout", noted_rollout)
    monkeypatch.setattr(cold_start, "generator_loss", noted_generator_loss)
    monkeypatch.setattr(cold_start, "update", noted_update)
    monkeypatch.setattr(checkpoint.Run, "save", noted_save)
    flags = "--steps 2 --generator_every 2 --batch_size 3 --micro_batch 2 --save_every 1 --seed 4"
    log = run_main(cold_start, base, tmp_path, monkeypatch, *flags.split())
    assert has_gradient == [
        True,  # fake's update
        False,  # the fake score's loss left the generator alone
        True,  # fake's update
        True,  # the generator's update
        False,  # the generator's gradient is used up
    ]
    assert not any(x.requires_grad for path in paths for x in path)
    assert all(x_s.requires_grad for x_s in ends_with_gradient)
    assert log[1]["grad_generator"] > 0
    assert log[1]["k"] < K  # with this seed, so that noise takes part
    for path, x_s in zip(paths[-2:], ends_with_gradient, strict=True):
        close(x_s.detach(), path[-1], 1e-5)  # the last step once more, now with gradient


class Step(NamedTuple):
    """What a call of cps_step was given."""

    level: float
    x: torch.Tensor
    noise: torch.Tensor


class FixedSubset(random.Random):
    """Draws S = (1,), and (1, 1): the sum over S is twice as large."""

    def sample(self, population, k):
        if population == range(K - 1):
            return [1] * k
        return super().sample(population, k)


def leave_out_stage_1(monkeypatch):
    """Stage 2 finds no weights and no settings of a stage 1, and loads none."""

    def nothing(*_, **__):
        return None

    for name in ("find_weights", "take_settings", "load_stage_1"):
        monkeypatch.setattr(rtdmd_rl, name, nothing)


def distinct(tensors):
    """How many of the tensors, or of the rows of one, differ."""
    return len({tuple(tensor.flatten().tolist()) for tensor in tensors})


def test_stage_2_shares_noise_on_the_other_steps_only_and_its_first_ratio_is_1(
    tiny_parts, tmp_path, monkeypatch
):
    """Eq. 16 in the real loop.

    A prompt's pictures differ in the noise of the steps in S and in their start, and in nothing
    else.
    """
    _, base = tiny_parts
    prompts = tmp_path / "prompts"
    prompts.write_text("a circle\na square\n")
    group_size = 3
    n_pictures = 2 * group_size
    calls_an_epoch = K + 2  # the rollout, the last step with gradient, the one step in S
    calls = []
    need_gradient = []
    used = []

    def noted_step(x, v, s, t, eta, noise):
        calls.append(Step(level_of(s), x, noise))
        return cps_step(x, v, s, t, eta, noise)

    def noted_policy_loss(log_p, old_log_p, advantage):
        need_gradient.append((log_p.requires_grad, old_log_p.requires_grad))
        return policy_loss(log_p, old_log_p, advantage)

    def train(folder, *flags):
        command = f"--prompts {prompts} --prompts_per_epoch 2 --group_size {group_size}".split()
        command += flags
        return run_main(rtdmd_rl, base, tmp_path / folder, monkeypatch, *command)

    monkeypatch.setattr(rtdmd_rl, "cps_step", noted_step)
    monkeypatch.setattr(rtdmd_rl, "policy_loss", noted_policy_loss)
    leave_out_stage_1(monkeypatch)
    log = train("a", "--epochs", "4", "--subset", "1")
    assert len(calls) == 4 * calls_an_epoch
    assert len({tuple(line["S"]) for line in log}) > 1

    for epoch, line in enumerate(log):
        S = line["S"]
        first_call = epoch * calls_an_epoch
        *steps, last_step, policy_step = calls[first_call : first_call + calls_an_epoch]
        assert [step.level for step in steps] == LEVELS[:K]
        assert [LEVELS.index(policy_step.level)] == S
        assert torch.equal(policy_step.x, steps[S[0]].x)
        for k, step in enumerate(steps[:-1]):
            each_prompt_and_all = (*step.noise.split(group_size), step.noise)
            counts = [distinct(noise) for noise in each_prompt_and_all]
            if k in S:
                assert counts == [group_size, group_size, n_pictures]
            else:
                assert counts == [1, 1, 2]
            used.append(step.noise[0])
        assert distinct(steps[0].x) == n_pictures
        assert steps[-1].noise.abs().max() == 0
        # Eq. 15 starts from the rollout's x_{K-1}, as a constant
        assert torch.equal(last_step.x, steps[-1].x)
        assert not last_step.x.requires_grad
    # new noise for every step and epoch, though the prompts are always the same two
    assert distinct(used) == len(used)
    assert [line["drift_max"] for line in log] == pytest.approx([0] * 4, abs=1e-6)
    assert set(need_gradient) == {(True, False)}

    def policy_gradient_alone(folder, *flags):
        """-> the line of one epoch without the other two gradients"""
        alone = "--epochs 1 --det_weight 0 --dm_weight 0".split()
        return train(folder, *alone, *flags)[0]

    # the sum over S, and with the factor of Eq. 17 (K-1)/M times that
    plain = policy_gradient_alone("v", "--subset", "2", "--variant", "")
    scaled = policy_gradient_alone("vs", "--subset", "2", "--variant", "subset_factor")
    factor = (K - 1) / 2
    assert scaled["grad_generator"] == pytest.approx(factor * plain["grad_generator"], rel=1e-4)
    assert plain["grad_generator"] > 0

    monkeypatch.setattr(random, "Random", FixedSubset)
    once = policy_gradient_alone("M1", "--subset", "1")
    twice = policy_gradient_alone("M2", "--subset", "2")
    assert once["S"] == [1]
    assert twice["S"] == [1, 1]
    assert twice["grad_generator"] == pytest.approx(2 * once["grad_generator"], rel=1e-4)


@pytest.mark.parametrize("update", ("float32", "bf16"))
def test_half_of_the_policy_gradient_is_clipped_away_where_rollout_and_update_round_differently(
    tiny_parts, tmp_path, monkeypatch, update
):
    """--variant rollout_log_prob is what the release does.

    It clips at 1e-5 around a ratio that should be 1.
    With a bf16 rollout and a float32 update rounding moves nearly every ratio further than that, up
    or down by chance. Where it moved the way the advantage points, the picture's gradient is 0:
    46 % on a trained model (docs/paper_vs_release.md). With the same precision (and kernels) in
    both nothing is clipped.
    """
    _, base = tiny_parts
    seen = []
    real_forward = SD3Transformer2DModel.forward

    def forward(self, *inputs, **more):
        in_bf16 = update == "bf16" or not torch.is_grad_enabled()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            return real_forward(self, *inputs, **more)

    def noted_policy_loss(log_p, old_log_p, advantage):
        x = log_p.detach().requires_grad_()
        (slope,) = torch.autograd.grad(policy_loss(x, old_log_p, advantage).sum(), x)
        dropped = (slope == 0) & (advantage != 0)
        outside = (x - old_log_p).exp().sub(1).abs() > rtdmd_rl.RATIO_CLIP
        seen.append((advantage, dropped, outside))
        return policy_loss(log_p, old_log_p, advantage)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    monkeypatch.setattr(rtdmd_rl, "policy_loss", noted_policy_loss)
    leave_out_stage_1(monkeypatch)
    flags = "--variant rollout_log_prob --epochs 1 --prompts_per_epoch 4 --group_size 8 --subset 3"
    flags += " --rewards clipscore --dm_weight 0 --det_weight 0"
    (line,) = run_main(rtdmd_rl, base, tmp_path, monkeypatch, *flags.split())
    advantage, dropped, outside = (torch.cat(parts).float() for parts in zip(*seen))
    size = advantage.abs()
    share = (size * dropped).sum() / size.sum()
    expected = (size * outside).sum() / size.sum() / 2
    error = size.norm() / size.sum() / 2
    print(
        f"update in {update}: ratio outside 1 +- 1e-5 for {outside.mean():.0%}, "
        f"{share:.0%} of the gradient's weight dropped"
    )
    if update == "bf16":
        assert share == 0
        assert line["drift_max"] == 0
    else:
        assert outside.mean() > 0.8
        assert abs(share - expected) < 5 * error
        assert 0 < line["drift_max"] < 0.01


def test_paper_follows_the_papers_letter_wherever_the_release_differs_and_every_choice_can_be_taken_back(
    monkeypatch,
):
    """Item by item; nothing else changes."""
    variants_1 = "printed_std,step_consistency,score_gradient"
    variants_2 = f"{variants_1},gaussian_log_prob,group_std,subset_factor,drawn_step"
    # {flag: (the release's, the paper's)}
    both = {"lora_rank": (32, 64), "lora_alpha": (64, 32), "variant": ("", variants_1)}
    stage_2 = {
        "variant": ("", variants_2),
        "dm_weight": (1e-3, 1),
        "det_weight": (1e-4, 1),
        "margin": (3, 100),
    }
    monkeypatch.setattr(rtdmd_rl, "find_weights", lambda *_, **__: None)
    monkeypatch.setattr(rtdmd_rl, "take_settings", lambda *_: None)
    for module, expected in ((cold_start, both), (rtdmd_rl, {**both, **stage_2})):
        release = flags_of(module)
        paper = flags_of(module, "--paper")
        differ = {}
        for name, value in release.items():
            if value != paper[name]:
                differ[name] = (value, paper[name])
        assert differ == {**expected, "paper": (False, True)}
        taken_back = []
        for name, (of_release, _) in expected.items():
            taken_back += [f"--{name}", str(of_release)]
        assert flags_of(module, *taken_back, "--paper") == {**release, "paper": True}
        over_a_preset = flags_of(module, "--preset", "tiny", "--paper")
        assert over_a_preset["lora_rank"] == 64


def test_the_papers_letter_reaches_the_losses_of_both_loops(tiny_parts, tmp_path, monkeypatch):
    """--paper in stage 1, then in stage 2 on its result.

    What the losses are given at every step, and that all numbers stay finite.
    """
    _, base = tiny_parts
    of_fake = []
    of_generator = []
    kernels = []
    next_level = dict(zip(LEVELS[1:], LEVELS[2:] + [0.0]))
    real_path = variants.consistency_path
    real_loss = variants.generator_loss
    real_kernel = variants.sub_interval

    def consistency_path(fake, x_s, s, s_next, *rest):
        of_fake.append((level_of(s), x_s.clone(), level_of(s_next)))
        return real_path(fake, x_s, s, s_next, *rest)

    def generator_loss(x_s, s, *rest):
        of_generator.append((level_of(s), x_s.detach()))
        return real_loss(x_s, s, *rest)

    def sub_interval(s, t):
        kernels.append((s, t))
        return real_kernel(s, t)

    for name, function in (
        ("step_consistency", consistency_path),
        ("score_gradient", generator_loss),
        ("printed_std", sub_interval),
    ):
        monkeypatch.setitem(variants.VARIANTS, name, (function.__name__, function, (1, 2)))
    # a step: fake re-noises and has a target, the student re-noises
    kernels_a_step = 2 + 1
    cold_dir = tmp_path / "cold"
    flags = "--paper --steps 4 --generator_every 1 --batch_size 2 --seed 4"
    cold = run_main(cold_start, base, cold_dir, monkeypatch, *flags.split())
    assert len(kernels) == 4 * kernels_a_step
    flags = f"--paper --epochs 4 --prompts_per_epoch 2 --group_size 2 --cold_start {cold_dir}"
    rl = run_main(rtdmd_rl, base, tmp_path / "rl", monkeypatch, *flags.split())
    assert len(kernels) == 2 * 4 * kernels_a_step
    for line in (*cold, *rl):
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert rl[0]["grad_generator"] > 0
    stage_1 = (of_fake[:4], of_generator[:4])
    stage_2 = (of_fake[4:], of_generator[4:])
    for seen_by_fake, seen_by_generator in (stage_1, stage_2):
        # more than the last step, in stage 2 too
        assert len({s for s, _, _ in seen_by_fake}) > 1
        for of_one, of_other in zip(seen_by_fake, seen_by_generator, strict=True):
            s, x, s_next = of_one
            s_of_generator, x_of_generator = of_other
            assert s == s_of_generator
            assert s_next == next_level[s]
            # teacher and fake score meet on the very state of the rollout that fake was trained on
            close(x_of_generator, x, 1e-5)


def test_dmd2_style_training_takes_the_last_executed_step_to_level_0(
    tiny_parts, tmp_path, monkeypatch
):
    """--variant dmd2: fake and the teacher see the x-prediction of whichever step is drawn.

    It is re-noised over [0, 1].
    """
    _, base = tiny_parts
    seen = []  # (level, state) of each loss
    rollouts = []  # (k, path)
    predictions = []  # (x-prediction, from level, to level) of each step of a rollout

    def noted_rollout(velocity, x, levels, k, *rest):
        path = rollout(velocity, x, levels, k, *rest)
        rollouts.append((k, path))
        return path

    def noted_step(x, v, s, t, *rest):
        if not torch.is_tensor(s):
            predictions.append((x - s * v, s, t))
        return cps_step(x, v, s, t, *rest)

    def noted_fake_score_loss(fake, x_s, s, *rest):
        seen.append((level_of(s), x_s))
        return fake_score_loss(fake, x_s, s, *rest)

    def noted_generator_loss(x_s, s, *rest):
        seen.append((level_of(s), x_s.detach()))
        return generator_loss(x_s, s, *rest)

    monkeypatch.setattr(cold_start, "rollout", noted_rollout)
    monkeypatch.setattr(cps, "cps_step", noted_step)
    monkeypatch.setattr(cold_start, "fake_score_loss", noted_fake_score_loss)
    monkeypatch.setattr(cold_start, "generator_loss", noted_generator_loss)
    flags = "--variant dmd2 --gamma 0 --steps 4 --generator_every 1 --batch_size 2 --seed 4"
    run_main(cold_start, base, tmp_path, monkeypatch, *flags.split())
    assert len({k for k, _ in rollouts}) > 1
    assert {s for s, _ in seen} == {0.0}
    last = [(x_0, s) for x_0, s, t in predictions if t == 0]
    for i, (k, path) in enumerate(rollouts):
        state = path[k]
        level_before = LEVELS[k - 1]
        by_fake_and_generator = seen[2 * i : 2 * i + 2]
        for _, x in by_fake_and_generator:
            assert torch.equal(x, state) or (x - state).abs().max() < 1e-5
        assert any(torch.equal(x_0, state) and s == level_before for x_0, s in last)


def k_of(step, seed=0):
    """Stage 1's k."""
    return random.Random(f"{seed}/{step}").randint(1, K)


@pytest.fixture(scope="session")
def again(run, tmp_path_factory):
    """The same two command lines once more, in this process.

    With a look at the transformers afterwards.
    """
    folder = tmp_path_factory.mktemp("again")
    bases = {}
    real_load_base = model.load_base
    for stage in ("cold", "rl"):
        program, flags, *_ = stage_of(run, stage)

        def kept_base(*inputs):
            return bases.setdefault(stage, real_load_base(*inputs))

        good(here(program, *flags, "--out_dir", folder / stage, load_base=kept_base))
    return SimpleNamespace(cold=folder / "cold", rl=folder / "rl", bases=bases)


def test_three_commands_go_from_the_teacher_to_pictures(run):
    for status, _, err in run.results:
        assert status == 0, err
        assert "Traceback" not in err, err
        assert "[transformers]" not in err, err  # what diffusers' pipelines say of torchvision
    for stage, length in ((run.cold, 4), (run.rl, 2)):
        files = {path.name for path in stage.iterdir() if path.is_file()}
        assert files == {*ADAPTERS, "ckpt.pt", "log.jsonl", "settings.json"}
        lines = log_of(stage)
        assert [line["step"] for line in lines] == list(range(length))
        numbers = []
        for line in lines:
            numbers += [value for value in line.values() if isinstance(value, float)]
        assert len(numbers) >= 5 * length
        assert all(map(math.isfinite, numbers))
    pictures = {path.name for path in run.pictures.iterdir()}
    assert pictures == {"grid.png", "00000.png", "00001.png", "00002.png"}


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_every_adapter_weight_with_a_gradient_moves_and_the_teacher_does_not_move_by_a_bit(
    run, again, stage
):
    base = tiny_base()
    transformer = base.transformer
    trained = again.bases[stage].transformer.state_dict()
    for key, value in transformer.state_dict().items():
        name, _, kind = key.rpartition(".")
        under_an_adapter = f"{name}.base_layer.{kind}"
        key_now = under_an_adapter if under_an_adapter in trained else key
        assert torch.equal(value, trained[key_now])
    last_block = len(transformer.transformer_blocks) - 1
    # the last block's text stream is dropped
    without_gradient = {f"transformer_blocks.{last_block}.attn.add_q_proj"}
    for name, file in (("generator", "generator_ema.pt"), ("fake", "fake.pt")):
        base.add_adapter(name, 32, 64, 0)
        start = base.adapter(name)
        end = load(getattr(run, stage) / file)
        assert all(torch.isfinite(weights).all() for weights in end.values())
        still = set()
        for key, weights in end.items():
            if torch.equal(weights, start[key]):
                still.add(key.split(".lora_")[0])
        assert still == without_gradient


# ---- one command line, one result ---------------------------------------------------------------
@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_the_same_command_twice_gives_the_same_bytes(run, again, stage):
    one = getattr(run, stage)
    two = getattr(again, stage)
    assert same_files(one, two)
    assert log_of(one) == log_of(two)


@pytest.fixture(scope="session")
def alone(run, tmp_path_factory):
    """One process, at small learning rates."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in ("cold", "rl"):
        program, flags, *_ = stage_of(run, stage)
        good(here(program, *flags, *SMALL_RATES, "--out_dir", folder / stage))
    return folder


def assert_same_logs_but_for_rounding(one, two):
    for line, other in zip(log_of(one), log_of(two), strict=True):
        expected = {}
        for name, value in other.items():
            expected[name] = pytest.approx(value, rel=1e-3, abs=1e-6)
        assert line == expected


@pytest.mark.parametrize(
    "stage, processes",
    [
        ("cold", 3),
        ("cold", 8),
        ("rl", 2),
        ("rl", 3),
        ("rl", 8),
    ],
)
def test_several_processes_train_the_same_adapters_as_one(run, alone, tmp_path, stage, processes):
    """The whole to 1 % of the way it went, and every weight to what Adam can do with rounding.

    Batches have 5 and 10 pictures, and groups are split between ranks; of eight ranks, three have
    none of the five. Adam divides by the gradient's size: a weight whose gradient is nothing but
    rounding moves by a learning rate either way, in each of four updates at most. For the same
    reason the weights do not show a wrong scale of the gradient; the norms in the log do.
    """
    program, flags, *_ = stage_of(run, stage)
    out_dir = tmp_path / "out"
    good(shell(program, *flags, *SMALL_RATES, "--out_dir", out_dir, processes=processes))
    one = load(alone / stage / "ckpt.pt")
    many = load(out_dir / "ckpt.pt")
    base = tiny_base()
    for name in ("generator", "fake"):
        base.add_adapter(name, 32, 64, 0)
        end = flat(one[name])
        difference = flat(many[name]) - end
        way = end - flat(base.adapter(name))
        sizes = (difference.abs().max(), difference.norm() / way.norm())
        assert difference.abs().max() <= 2 * 4 * 1e-5, sizes
        assert difference.norm() < 0.01 * way.norm(), sizes
    assert_same_logs_but_for_rounding(alone / stage, out_dir)


def test_at_the_update_of_an_epoch_the_ppo_ratio_is_one(run):
    """Eq. 14 on-policy, in float32.

    drift_max is the greatest |exp(log p at the update - log p at the rollout) - 1| of an epoch.
    """
    for line in log_of(run.rl):
        assert line["drift_max"] < 1e-6
        assert line["drift_clipped"] == 0
        assert line["grad_generator"] > 0


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_low_memory_trains_the_same_and_frees_the_text_encoders(run, alone, tmp_path, stage):
    """Only the rounding may differ.

    Activations are recomputed, pictures decoded one by one, text is from a file, and the
    micro-batches are others.
    """
    program, flags, *_ = stage_of(run, stage)
    bases = []
    real_load_base = model.load_base

    def kept_base(*inputs):
        bases.append(real_load_base(*inputs))
        return bases[0]

    flags = [*flags, *SMALL_RATES, "--low_memory", "--micro_batch", 2, "--out_dir", tmp_path]
    good(here(program, *flags, load_base=kept_base))
    pipe = bases[0].pipe
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.text_encoder_3 is None
    assert_same_logs_but_for_rounding(alone / stage, tmp_path)


STUDENTS_PASSES = {"student_pass", "fake_pass"}
PASSES = {
    "cold": STUDENTS_PASSES | {"generator_pass"},
    "rl": STUDENTS_PASSES | {"anchor_pass", "step_pass", "policy_pass", "score_pass"},
}


@pytest.mark.parametrize(
    "stage, more, left_out",
    [("cold", [], set()), ("rl", [], set()), ("rl", ["--low_memory"], {"score_pass"})],
)
def test_what_a_gpu_records_are_functions_of_tensors(run, tmp_path, stage, more, left_out):
    """With --low_memory the models of the rewards move, so that a recording would read what is gone."""
    program, flags, *_ = stage_of(run, stage)
    called = set()

    def noted(function):
        def call(*inputs):
            called.add(function.__name__)
            output = function(*inputs)
            outputs = [output] if torch.is_tensor(output) else output
            assert all(torch.is_tensor(x) for x in (*inputs, *outputs))
            assert not any(x.requires_grad for x in outputs)
            return output

        return call

    def graphed(on, device, *functions):
        return [noted(function) for function in functions]

    good(here(program, *flags, *more, "--out_dir", tmp_path, graphed=graphed))
    assert called == PASSES[stage] - left_out


def test_rewards_with_and_without_a_gradient_may_be_named_in_any_order(run, tmp_path):
    _, flags, *_ = stage_of(run, "rl")
    for name, order in (("one", "clipscore:2,checker:.5"), ("other", "checker:.5,clipscore:2")):
        good(here(rtdmd_rl, *flags, "--rewards", order, "--out_dir", tmp_path / name))
    for file in ADAPTERS:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    first, second = log_of(tmp_path / "one"), log_of(tmp_path / "other")
    for name in ("reward_clipscore", "reward_checker"):
        assert [line[name] for line in first] == [line[name] for line in second]
    assert first[0]["reward_clipscore"] != first[0]["reward_checker"]


def test_a_reward_with_a_gradient_reads_each_prompt_with_its_own_metadata(
    run, tmp_path, monkeypatch
):
    """Also where a micro-batch begins between the pictures of one prompt."""
    known = []

    def read(prompts, metadata):
        assert [row["prompt"] for row in metadata] == prompts
        known.extend(prompts)
        return rewards.read_nothing(prompts, metadata)

    def look(images, text):
        return images.mean((1, 2, 3))

    def load(path, device, dtype, clip_l):
        return rewards.in_two_parts(look, read=read)

    monkeypatch.setitem(rewards.REWARDS, "clipscore", (load, True, ""))
    rows = [{"prompt": f"a circle, number {number}"} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, flags, *_ = stage_of(run, "rl")
    flags = [*flags, "--rewards", "clipscore", "--prompts", tmp_path / "rows.jsonl"]
    good(here(rtdmd_rl, *flags, "--out_dir", tmp_path / "out"))
    # Two epochs of five prompts read each of the ten once, for two pictures.
    assert sorted(known) == sorted(2 * [row["prompt"] for row in rows])


def test_with_cached_text_the_transformer_waits_until_the_text_encoders_have_left(
    tmp_path, monkeypatch
):
    """Stage 1 of SD3.5-M then needs 12 GiB at most, where it would need 16 for this moment alone.

    A GPU's part is played by "meta".
    """
    moves = []
    path = str(tmp_path / "text.bin")
    _, pipe = model.load_pipeline(TINY, torch.device("meta"))
    assert pipe.vae.device.type == pipe.text_encoder.device.type == "meta"
    assert pipe.transformer.device.type == "cpu"
    base = tiny_base(cache_text=True)

    def noted_move(device):
        moves.append((device.type, base.pipe.text_encoder))

    monkeypatch.setattr(base.transformer, "to", noted_move)
    base.cache_texts(["a red circle"], path)
    assert moves == [("cpu", None)]


@pytest.mark.parametrize("cache_text", [False, True])
def test_where_the_transformer_finds_no_room_one_line_says_so(
    cache_text, tmp_path, monkeypatch, capsys
):
    def full(transformer, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SD3Transformer2DModel, "to", full)
    with pytest.raises(SystemExit) as end:
        base = tiny_base(cache_text=cache_text)  # ends here without a cache
        base.cache_texts(["a red circle"], str(tmp_path / "text.bin"))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no room for the frozen transformers" in line


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_no_evaluation_of_the_transformer_is_one_too_many(run, tmp_path, stage, monkeypatch):
    """What Algorithm 1 has to do, in pictures.

    Those with gradient count twice, for the backward pass.
    """
    program, flags, *_ = stage_of(run, stage)
    real_forward = SD3Transformer2DModel.forward
    evaluated = 0

    def forward(self, hidden_states, *inputs, **more):
        nonlocal evaluated
        evaluated += len(hidden_states) * (2 if torch.is_grad_enabled() else 1)
        return real_forward(self, hidden_states, *inputs, **more)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    good(here(program, *flags, "--out_dir", tmp_path))
    fake_score = 2 * (1 + 2)  # with gradient
    anchor = 2 + 1 + 2  # the student with gradient, fake, and the guided teacher
    if stage == "cold":
        rollouts = sum(map(k_of, range(4)))
        # four steps; the student moves in every 2nd one
        wanted = 5 * (rollouts + 4 * fake_score + 2 * anchor)
    else:
        M = 2
        policy = 2 * M  # with gradient
        wanted = 2 * 10 * (K + fake_score + anchor + policy)
    assert evaluated == wanted


def test_wandb_gets_the_numbers_of_the_log_and_is_asked_for_in_one_line_where_it_is_missing(
    tmp_path, monkeypatch
):
    sent = []
    flags = [*COLD, *ONE_BATCH, "--steps", 2, "--wandb", "project", "--out_dir"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = here(cold_start, *flags, tmp_path / "none")
    assert status == 2
    assert err.count("\n") == 1
    assert "pip install wandb" in err

    def init(project, **_):
        def log(numbers, step):
            sent.append((project, step, numbers))

        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    good(here(cold_start, *flags, tmp_path / "there"))
    text = (tmp_path / "there/log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert sent == [("project", line["step"], line) for line in lines]
    assert len(lines) == 2


def test_a_rank_without_pictures_has_no_noise_and_no_gradient_but_takes_part():
    """More processes than pictures."""
    draw = SimpleNamespace(shape=(4, 2, 2), device=torch.device("cpu"))
    assert shared_noise(draw, [], 0).shape == (0, 4, 2, 2)
    assert shard(2, 0, 3) == slice(0, 0)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([parameter], 0.1)
    norm = cold_start.update(parameter, optimizer, {"x": 0}, "x", torch.tensor(0.0))
    assert norm == 0
    assert (parameter == 1).all()


def test_a_one_step_generator_is_reinforced_by_back_propagation_alone(tmp_path):
    cold = tmp_path / "cold"
    good(here(cold_start, *COLD, "--steps", 1, "--num_steps", 1, "--out_dir", cold))
    flags = [*RL, "--epochs", 1, "--cold_start", cold, "--policy_weight", 0]
    status, said, err = here(rtdmd_rl, *flags, "--out_dir", tmp_path / "rl")
    assert status == 0, err
    assert "clipscore (1, by back-propagation too)" in said
    (line,) = log_of(tmp_path / "rl")
    assert line["S"] == []
    assert line["grad_generator"] > 0
    flags += ["--det_weight", 0]
    status, said, err = here(rtdmd_rl, *flags, "--out_dir", tmp_path / "rl without")
    assert status == 0, err
    assert "back-propagation" not in said
