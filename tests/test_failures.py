"""Numbers that are not finite, rewards that raise or never vary; the log: its seconds, and the signs of a collapse."""

import itertools
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import cold_start
import common
import rewards
import rtdmd_rl
from cold_start import generator_loss
from cps import cps_step, rollout
from gaussian import full, normals
from helpers import (
    BASE,
    COLD,
    CPU,
    ONE_BATCH,
    RL,
    flat,
    good,
    here,
    listing,
    load,
    log_of,
    stage_of,
)
from tools import evaluate


def nan_at(loss, calls):
    """`loss` with NaN in place of its result at these calls of it."""
    count = iter(range(10**6))

    def poisoned(*inputs):
        result, factor = loss(*inputs), math.nan if next(count) in calls else 1.0
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return poisoned


def test_a_nan_in_stage_1_skips_that_update_alone(tmp_path):
    flags = [*COLD, *ONE_BATCH, "--generator_every", 1]
    good(here(cold_start, *flags, "--steps", 1, "--out_dir", tmp_path / "before"))
    good(
        here(
            cold_start,
            *flags,
            "--steps",
            2,
            "--out_dir",
            tmp_path / "out",
            fake_score_loss=nan_at(cold_start.fake_score_loss, {1}),
        )
    )
    before, after = load(tmp_path / "before/ckpt.pt"), load(tmp_path / "out/ckpt.pt")
    assert torch.equal(flat(before["fake"]), flat(after["fake"])) and {
        int(s["step"]) for s in after["F_opt"]["state"].values()
    } == {1}
    assert torch.isfinite(flat(after["generator"])).all() and not torch.equal(
        flat(before["generator"]), flat(after["generator"])
    )
    assert log_of(tmp_path / "out")[1]["grad_fake"] is None


def test_skipped_updates_are_counted_in_the_log(tmp_path):
    good(
        here(
            cold_start,
            *COLD,
            *ONE_BATCH,
            "--out_dir",
            tmp_path,
            fake_score_loss=nan_at(cold_start.fake_score_loss, {1, 3}),
        )
    )
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 1, 0, 1]


def test_a_nan_reward_of_one_picture_in_stage_2_skips_that_update_alone(run, tmp_path, monkeypatch):
    """Through the batch's standard deviation it would be everyone's advantage."""
    flags, real, count = (
        [*RL, *ONE_BATCH, "--cold_start", run.cold],
        rewards.build,
        iter(range(10**6)),
    )

    def build(*inputs):
        clipscore, checker = real(*inputs)

        def poisoned(images, prompts, metadata):  # called once an epoch
            score = clipscore(images, prompts, metadata)
            return torch.cat([score[:-1], score[-1:] * (math.nan if next(count) == 1 else 1)])

        poisoned.__dict__.update(clipscore.__dict__)
        return [poisoned, checker]

    good(here(rtdmd_rl, *flags, "--epochs", 1, "--out_dir", tmp_path / "before"))
    monkeypatch.setattr(rewards, "build", build)
    good(here(rtdmd_rl, *flags, "--epochs", 2, "--out_dir", tmp_path / "out"))
    before, after = load(tmp_path / "before/ckpt.pt"), load(tmp_path / "out/ckpt.pt")
    assert torch.equal(flat(before["generator"]), flat(after["generator"])) and not torch.equal(
        flat(before["fake"]), flat(after["fake"])
    )
    assert (
        torch.isfinite(flat(after["ema"])).all()
        and log_of(tmp_path / "out")[1]["grad_generator"] is None
    )


@pytest.mark.parametrize(
    "stage, loss", [(s, f) for s in ("cold", "rl") for f in ("fake_score_loss", "generator_loss")]
)
def test_max_skipped_updates_in_a_row_stop_the_run_and_leave_the_last_checkpoint(
    run, tmp_path, stage, loss, monkeypatch
):
    program, flags, length, _ = stage_of(run, stage)
    monkeypatch.setattr(common, "MAX_SKIPPED", 3)
    flags = [
        *flags,
        *ONE_BATCH,
        "--out_dir",
        tmp_path,
        *["--generator_every", 2][: 2 * (stage == "cold")],
    ]
    good(here(program, *flags, length, 1))
    before = {k: v for k, v in listing(tmp_path).items() if k.endswith(".pt")}
    status, _, err = here(
        program, *flags, length, 9, **{loss: nan_at(getattr(program, loss), range(99))}
    )
    assert (
        status == 1
        and err.count("\n") == 1
        and "3 updates in a row" in err
        and "the last good checkpoint is in --out_dir" in err
    )
    assert {k: v for k, v in listing(tmp_path).items() if k.endswith(".pt")} == before


# ---- numbers that are not finite, rewards that fail
def test_a_loss_that_is_not_finite_skips_the_update_even_if_its_gradient_is():
    """relu(margin - nan) has the gradient 0."""
    parameter, skipped = torch.nn.Parameter(torch.zeros(3)), {"x": 0}
    optimizer = torch.optim.AdamW([parameter])
    for loss, moved, count in ((math.nan, False, 1), (math.inf, False, 2), (1.0, True, 0)):
        parameter.grad = torch.ones(3)
        norm = cold_start.update(parameter, optimizer, skipped, "x", torch.tensor(loss))
        assert (
            (parameter != 0).all() == moved
            and skipped["x"] == count
            and math.isfinite(norm) == moved
            and not parameter.grad.any()
        )


def test_a_nan_of_the_teacher_or_of_the_fake_score_makes_the_loss_nan_and_agreement_makes_it_0():
    """Zero for nan would be no gradient, and nobody would know."""
    x, noise, back = normals(3, 2)
    spoilt, right = (
        (lambda x, t: x * torch.tensor([math.nan, 1]).view(2, 1, 1, 1)),
        (lambda x, t: x),
    )
    for teacher, fake in ((spoilt, right), (right, spoilt)):
        assert generator_loss(
            x, 0.5, full(0.7, x), noise, back, teacher, fake, 0.9
        ).isfinite().tolist() == [False, True]
    zero = torch.zeros_like(x)  # y_real = x_s exactly: 0 / 0
    assert generator_loss(
        zero, 0, full(0.7, x), zero, zero, lambda x, t: zero, lambda x, t: zero, 0.9
    ).tolist() == [0, 0]


def test_nan_latents_skip_the_updates_of_their_step_alone(run, tmp_path):
    factor = itertools.chain([math.nan], itertools.repeat(1.0))

    def spoilt(*inputs):
        return (lambda f, path: [x * f for x in path])(next(factor), rollout(*inputs))

    good(
        here(
            cold_start,
            *COLD,
            *ONE_BATCH,
            "--generator_every",
            1,
            "--out_dir",
            tmp_path / "cold",
            rollout=spoilt,
        )
    )
    good(
        here(
            rtdmd_rl,
            *RL,
            *ONE_BATCH,
            "--cold_start",
            run.cold,
            "--out_dir",
            tmp_path / "rl",
            cps_step=nan_at(rtdmd_rl.cps_step, {1}),
        )
    )
    for stage in ("cold", "rl"):
        lines, ckpt = log_of(tmp_path / stage), load(tmp_path / stage / "ckpt.pt")
        assert [line["skipped"] for line in lines] == [2] + [0] * (len(lines) - 1)
        assert all(torch.isfinite(flat(ckpt[name])).all() for name in ("generator", "fake", "ema"))


def test_a_nan_in_a_gradient_alone_skips_that_update(tmp_path):
    """d sqrt(0 x) / dx is nan where its value is 0."""
    count = itertools.count(1)

    def poisoned(x_s, *rest):
        return generator_loss(x_s, *rest) + (
            (x_s.flatten(1)[:, 0] * 0).sqrt() if next(count) == 1 else 0
        )

    good(here(cold_start, *COLD, *ONE_BATCH, "--out_dir", tmp_path, generator_loss=poisoned))
    lines = log_of(tmp_path)
    assert (
        math.isfinite(lines[1]["loss_generator"])
        and lines[1]["grad_generator"] is None
        and lines[3]["grad_generator"] > 0
    )


def bad_reward(images, prompts, metadata):
    raise RuntimeError("out\nof ideas")


bad_reward.__dict__.update(
    name="beauty", weight=1.0, differentiable=False, models=[], check=lambda prompts, metadata: None
)


def test_a_reward_that_raises_is_named_with_the_prompts(run, tmp_path, capsys, monkeypatch):
    end = ["--out_dir", tmp_path / "out"]
    monkeypatch.setattr(rewards, "build", lambda *_: [bad_reward])
    for status, _, err in (
        here(rtdmd_rl, *RL, "--cold_start", run.cold, *end),
        here(
            evaluate,
            "a circle",
            *BASE[:4],
            *["--cold_start", "", "--rtdmd", "", "--teacher", "--steps", 1],
            *["--rewards", "clipscore"],
            *end,
        ),
    ):
        assert (
            status == 1
            and err.count("\n") == 1
            and "reward beauty failed on 'a " in err
            and "RuntimeError: out of ideas" in err
        )
    for shape in ((), (3, 1), (2,)):  # the first would be broadcast to every picture

        def wrong(images, prompts, metadata):
            return torch.zeros(shape)

        wrong.__dict__.update(bad_reward.__dict__)
        with pytest.raises(SystemExit):
            rewards.guarded(wrong)(
                torch.zeros(3, 3, 8, 8), ["--x" * 1000, "b", "c", "d"][:3], [{}] * 3
            )
        assert str(shape) in (err := capsys.readouterr().err) and "'b'" in err and len(err) < 500


def test_a_reward_that_never_varies_is_warned_of_once(run, tmp_path, capsys, monkeypatch):
    def half(images, prompts, metadata):
        return torch.tensor(
            [0.3, 0.3, 0.3, 0, 1, 2]
        )  # two groups of three, of which one does not vary

    half.__dict__.update(bad_reward.__dict__)
    monkeypatch.setattr(rewards, "build", lambda *_: [half])
    good(
        here(
            rtdmd_rl,
            *BASE,
            "--epochs",
            1,
            "--prompts_per_epoch",
            2,
            "--group_size",
            3,
            "--cold_start",
            run.cold,
            "--out_dir",
            tmp_path,
        )
    )
    assert log_of(tmp_path)[0]["flat_groups"] == 0.5
    log = common.Log(SimpleNamespace(out_dir=str(tmp_path), wandb=""), 0, CPU)
    for share in 19 * [1.0] + [0.5] + 60 * [1.0]:
        log(SimpleNamespace(set_postfix=lambda *_, **__: None), 1, flat_groups=share)
        assert share != 0.5 or not capsys.readouterr().err
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_between_two_steps_is_no_part_of_either(tmp_path, monkeypatch):
    """Else its seconds are those of the next step's text."""
    clock = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    log = common.Log(SimpleNamespace(out_dir=str(tmp_path), wandb=""), 0, CPU)
    bar = SimpleNamespace(set_postfix=lambda *_, **__: None)
    for step in range(2):
        log.begin()
        clock[0] += 1
        log.lap("text")
        clock[0] += 2
        log.lap("fake")
        log(bar, 8, step=step)
        clock[0] += 5  # saves
    first, second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (first["s_text"], first["s_fake"], first["s_rest"], first["seconds"]) == (1, 2, 0, 3)
    assert (second["s_text"], second["s_fake"], second["s_rest"], second["seconds"]) == (1, 2, 5, 8)


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_the_loops_count_a_checkpoint_as_rest(stage, run, tmp_path, monkeypatch):
    program, flags, *_ = stage_of(run, stage)
    real = checkpoint.Run.save

    def slow(self, step):
        time.sleep(0.5)
        real(self, step)

    monkeypatch.setattr(checkpoint.Run, "save", slow)
    good(here(program, *flags, "--save_every", 1, "--out_dir", tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) > 1
    for line in lines[1:]:
        assert line["s_rest"] > 0.5


def test_the_signs_of_a_collapse_in_the_log_are_what_they_say(tiny_parts, run, tmp_path):
    """ema_drift = |p - ema| / |ema|; latent_std is the spread WITHIN a prompt's pictures: 0 if they are all the same, whatever the prompts are."""
    ckpt = load(run.cold / "ckpt.pt")
    difference = flat(ckpt["generator"]) - flat(ckpt["ema"])
    drift = pytest.approx((difference.norm() / flat(ckpt["ema"]).norm()).item(), rel=1e-5)
    assert (
        log_of(run.cold)[-1]["ema_drift"]
        == drift
        == cold_start.distance(flat(ckpt["generator"]), flat(ckpt["ema"]))
    )

    def by_prompt(x, v, *rest):
        return tuple(
            0 * v + v.new_tensor([i // 2 for i in range(len(x))]).view(-1, 1, 1, 1)
            if i == 0
            else part
            for i, part in enumerate(cps_step(x, v, *rest))
        )

    good(
        here(
            rtdmd_rl,
            *RL,
            *ONE_BATCH,
            "--epochs",
            1,
            "--cold_start",
            run.cold,
            "--out_dir",
            tmp_path,
            cps_step=by_prompt,
        )
    )
    assert log_of(tmp_path)[0]["latent_std"] == 0 < log_of(run.rl)[0]["latent_std"]
