"""What a run does where something fails, and what its log says.

Numbers that are not finite, rewards that raise or never vary. The log's seconds, and the signs of a
collapse in it.
"""

import itertools
import math
import subprocess
import sys
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
    ROOT,
    TINY,
    flat,
    good,
    here,
    lines_of,
    listing,
    load,
    log_of,
    on_a_gpu,
    stage_of,
)
from tools import evaluate


# ---- runs with a number that is not finite -------------------------------------------------------
def nan_at(loss, calls):
    """`loss` with NaN in place of its result at these calls of it.

    Of several results the first is spoilt.
    """
    count = itertools.count()

    def poisoned(*inputs):
        result = loss(*inputs)
        factor = math.nan if next(count) in calls else 1.0
        if isinstance(result, tuple):
            first, *others = result
            return (first * factor, *others)
        return result * factor

    return poisoned


def test_a_nan_in_stage_1_skips_that_update_alone(tmp_path):
    flags = [*COLD, *ONE_BATCH, "--generator_every", 1]
    one_step = ["--steps", 1, "--out_dir", tmp_path / "before"]
    two_steps = ["--steps", 2, "--out_dir", tmp_path / "out"]
    nan_in_the_second = nan_at(cold_start.fake_score_loss, {1})
    good(here(cold_start, *flags, *one_step))
    good(here(cold_start, *flags, *two_steps, fake_score_loss=nan_in_the_second))
    before = load(tmp_path / "before/ckpt.pt")
    after = load(tmp_path / "out/ckpt.pt")
    updates_of_fake = {int(state["step"]) for state in after["F_opt"]["state"].values()}
    assert torch.equal(flat(before["fake"]), flat(after["fake"]))
    assert updates_of_fake == {1}
    assert torch.isfinite(flat(after["generator"])).all()
    assert not torch.equal(flat(before["generator"]), flat(after["generator"]))
    assert log_of(tmp_path / "out")[1]["grad_fake"] is None


def test_skipped_updates_are_counted_in_the_log(tmp_path):
    flags = [*COLD, *ONE_BATCH, "--out_dir", tmp_path]
    nan_in_two = nan_at(cold_start.fake_score_loss, {1, 3})
    good(here(cold_start, *flags, fake_score_loss=nan_in_two))
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 1, 0, 1]


def test_a_nan_reward_of_one_picture_in_stage_2_skips_that_update_alone(run, tmp_path, monkeypatch):
    """Through the batch's standard deviation it would be everyone's advantage."""
    flags = [*RL, *ONE_BATCH, "--cold_start", run.cold]
    real = rewards.build
    epochs = itertools.count()

    def build(*inputs):
        clipscore, checker = real(*inputs)
        look = clipscore.look

        def poisoned(images, text):  # called once an epoch
            score = look(images, text)
            factor = math.nan if next(epochs) == 1 else 1
            return torch.cat([score[:-1], score[-1:] * factor])

        clipscore.look = poisoned
        return [clipscore, checker]

    good(here(rtdmd_rl, *flags, "--epochs", 1, "--out_dir", tmp_path / "before"))
    monkeypatch.setattr(rewards, "build", build)
    good(here(rtdmd_rl, *flags, "--epochs", 2, "--out_dir", tmp_path / "out"))
    before = load(tmp_path / "before/ckpt.pt")
    after = load(tmp_path / "out/ckpt.pt")
    assert torch.equal(flat(before["generator"]), flat(after["generator"]))
    assert not torch.equal(flat(before["fake"]), flat(after["fake"]))
    assert torch.isfinite(flat(after["ema"])).all()
    assert log_of(tmp_path / "out")[1]["grad_generator"] is None


@pytest.mark.parametrize(
    "stage, loss",
    [
        ("cold", "fake_score_loss"),
        ("cold", "generator_loss"),
        ("rl", "fake_score_loss"),
        ("rl", "generator_loss"),
    ],
)
def test_max_skipped_updates_in_a_row_stop_the_run_and_leave_the_last_checkpoint(
    run, tmp_path, stage, loss, monkeypatch
):
    def checkpoints():
        files = listing(tmp_path)
        return {path: content for path, content in files.items() if path.endswith(".pt")}

    program, flags, length, _ = stage_of(run, stage)
    monkeypatch.setattr(common, "MAX_SKIPPED", 3)
    flags = [*flags, *ONE_BATCH, "--out_dir", tmp_path]
    if stage == "cold":
        flags += ["--generator_every", 2]
    good(here(program, *flags, length, 1))
    before = checkpoints()
    always_nan = nan_at(getattr(program, loss), range(99))
    status, _, err = here(program, *flags, length, 9, **{loss: always_nan})
    assert status == 1
    assert err.count("\n") == 1
    assert "3 updates in a row" in err
    assert "the last good checkpoint is in --out_dir" in err
    assert checkpoints() == before


# ---- losses that are not finite ------------------------------------------------------------------
def test_a_loss_that_is_not_finite_skips_the_update_even_if_its_gradient_is():
    """relu(margin - nan) has the gradient 0."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    skipped = {"x": 0}
    cases = [
        # loss, whether the parameter moves, skipped updates in a row
        (math.nan, False, 1),
        (math.inf, False, 2),
        (1.0, True, 0),
    ]
    for loss, moved, count in cases:
        parameter.grad = torch.ones(3)
        norm = cold_start.update(parameter, optimizer, skipped, "x", torch.tensor(loss))
        assert (parameter != 0).all() == moved
        assert skipped["x"] == count
        assert math.isfinite(norm) == moved
        assert not parameter.grad.any()


def test_a_nan_of_the_teacher_or_of_the_fake_score_makes_the_loss_nan_and_agreement_makes_it_0():
    """Zero for nan would be no gradient, and nobody would know."""
    x, noise, noise_back = normals(3, 2)
    s = 0.5
    t = full(0.7, x)
    eta = 0.9

    def right(x, t):
        return x

    def spoilt(x, t):
        """NaN for the first picture."""
        return x * torch.tensor([math.nan, 1]).view(2, 1, 1, 1)

    for teacher, fake in ((spoilt, right), (right, spoilt)):
        loss = generator_loss(x, s, t, noise, noise_back, teacher, fake, eta)
        assert loss.isfinite().tolist() == [False, True]

    zero = torch.zeros_like(x)

    def nothing(x, t):
        return zero

    # y_real = x_s exactly: 0 / 0
    loss = generator_loss(zero, 0, t, zero, zero, nothing, nothing, eta)
    assert loss.tolist() == [0, 0]


def test_nan_latents_skip_the_updates_of_their_step_alone(run, tmp_path):
    factors = itertools.chain([math.nan], itertools.repeat(1.0))

    def spoilt(*inputs):
        factor = next(factors)
        return [x * factor for x in rollout(*inputs)]

    cold_flags = [*COLD, *ONE_BATCH, "--generator_every", 1, "--out_dir", tmp_path / "cold"]
    rl_flags = [*RL, *ONE_BATCH, "--cold_start", run.cold, "--out_dir", tmp_path / "rl"]
    spoilt_step = nan_at(rtdmd_rl.cps_step, {1})
    good(here(cold_start, *cold_flags, rollout=spoilt))
    good(here(rtdmd_rl, *rl_flags, cps_step=spoilt_step))
    for stage in ("cold", "rl"):
        lines = log_of(tmp_path / stage)
        saved = load(tmp_path / stage / "ckpt.pt")
        skipped = [line["skipped"] for line in lines]
        assert skipped == [2] + [0] * (len(lines) - 1)
        for name in ("generator", "fake", "ema"):
            assert torch.isfinite(flat(saved[name])).all()


def test_a_nan_in_a_gradient_alone_skips_that_update(tmp_path):
    """d sqrt(0 x) / dx is nan where its value is 0."""
    count = itertools.count(1)

    def poisoned(x_s, *rest):
        loss = generator_loss(x_s, *rest)
        if next(count) == 1:
            first_numbers = x_s.flatten(1)[:, 0]
            loss = loss + (first_numbers * 0).sqrt()
        return loss

    good(here(cold_start, *COLD, *ONE_BATCH, "--out_dir", tmp_path, generator_loss=poisoned))
    lines = log_of(tmp_path)
    assert math.isfinite(lines[1]["loss_generator"])
    assert lines[1]["grad_generator"] is None
    assert lines[3]["grad_generator"] > 0


# ---- rewards -------------------------------------------------------------------------------------
def check_nothing(prompts, metadata):
    return None


def as_reward(function):
    """`function` with what rewards.py hangs on a reward."""
    function.name = "beauty"
    function.weight = 1.0
    function.differentiable = False
    function.models = []
    function.check = check_nothing
    return function


def bad_reward(images, prompts, metadata):
    raise RuntimeError("out\nof ideas")


as_reward(bad_reward)


@pytest.mark.parametrize("part, where", [("read", " on 'a "), ("look", ":")])
def test_a_differentiable_reward_that_raises_is_named_too(part, where, run, tmp_path, monkeypatch):
    def read(prompts, metadata):
        return torch.zeros(len(prompts), 1)

    def look(images, text):
        return images.mean((1, 2, 3))

    def broken(*inputs):
        raise RuntimeError("out\nof ideas")

    def load(path, device, dtype, clip_l):
        return rewards.in_two_parts(**{"read": read, "look": look, part: broken})

    monkeypatch.setitem(rewards.REWARDS, "clipscore", (load, True, ""))
    flags = [*RL, "--cold_start", run.cold, "--rewards", "clipscore"]
    status, _, err = here(rtdmd_rl, *flags, "--out_dir", tmp_path)
    assert status == 1
    (line,) = err.strip().splitlines()
    assert f"reward clipscore failed{where}" in line
    assert line.endswith("RuntimeError: out of ideas")


def in_place(images, text):
    return images.mul_(2).mean((1, 2, 3))


@pytest.mark.parametrize(
    "look, said",
    [
        (lambda images, text: images.detach().mean((1, 2, 3)), "no gradient"),
        (in_place, "changes the pictures in place"),
        (lambda images, text: images.detach().mean((1, 2, 3)).numpy(), "no tensor, but ndarray"),
    ],
)
def test_a_look_that_is_not_as_it_must_be_ends_the_run(look, said, capsys):
    function = rewards.in_two_parts(look)
    as_reward(function).differentiable = True
    images = torch.zeros(2, 3, 8, 8, requires_grad=True) + 0
    with pytest.raises(SystemExit) as ended:
        rewards.guarded(function).look(images, torch.zeros(2, 0))
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "reward beauty failed: ValueError: it" in err
    assert said in err


@pytest.mark.parametrize("text", [[0.0, 0.0], torch.zeros(1, 4)])
def test_a_read_that_gives_no_row_for_each_prompt_ends_the_run(text, capsys):
    function = rewards.in_two_parts(lambda images, text: images, read=lambda *_: text)
    as_reward(function).differentiable = True
    with pytest.raises(SystemExit) as ended:
        rewards.guarded(function).read(["a circle", "a square"], [{}] * 2)
    assert ended.value.code == 1
    assert "a row for each of 2 prompts" in capsys.readouterr().err


def test_scores_without_gradient_are_fine_where_none_is_asked_for():
    function = rewards.in_two_parts(lambda images, text: images.mean((1, 2, 3)))
    as_reward(function).differentiable = True
    images = torch.zeros(2, 3, 8, 8, requires_grad=True) + 0
    with torch.no_grad():
        scores = rewards.guarded(function).look(images, torch.zeros(2, 0))
    assert not scores.requires_grad


def test_scores_that_are_not_finite_are_noted_once(run, tmp_path, monkeypatch):
    """An epoch with one leaves the generator as it is, which nothing else on the screen would say."""

    @as_reward
    def nan(images, prompts, metadata):
        return torch.full((len(images),), math.nan)

    monkeypatch.setattr(rewards, "build", lambda *_: [nan])
    _, _, err = here(rtdmd_rl, *RL, "--cold_start", run.cold, "--out_dir", tmp_path)
    assert err.count("reward_beauty is nan") == 1
    assert len(log_of(tmp_path)) == 2


def test_a_reward_that_cannot_be_recorded_is_told_what_to_do(capsys, monkeypatch):
    def look(images, text):
        raise RuntimeError("operation not permitted when stream is capturing")

    function = rewards.in_two_parts(look)
    as_reward(function).differentiable = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SystemExit) as ended:
        rewards.guarded(function).look(torch.zeros(1, 3, 8, 8), torch.zeros(1, 0))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "reward beauty failed: RuntimeError: operation not permitted" in line
    assert ".item()" in line
    assert "--graphs 0" in line


# A user's reward that takes a value to Python: stage 2 with it.
WAITING = """
import rewards
import rtdmd_rl

def look(images, text):
    return images.mean((1, 2, 3)) * images.max().item()

rewards.REWARDS["waiting"] = (lambda *_: rewards.in_two_parts(look), True, "")
rtdmd_rl.main()
"""


@on_a_gpu
@pytest.mark.parametrize("graphs", [0, 1])
def test_on_a_gpu_a_reward_that_waits_for_it_ends_in_one_line_or_is_not_recorded(graphs, tmp_path):
    stage_1 = TINY / "adapters/cold_start"
    flags = [*RL, "--device", "cuda", "--cold_start", stage_1, "--rewards", "waiting"]
    flags += ["--graphs", graphs, "--out_dir", tmp_path]
    command = [sys.executable, "-c", WAITING, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if not graphs:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "reward waiting failed" in done.stderr
    assert "--graphs 0" in done.stderr


def test_a_differentiable_reward_that_is_not_of_two_parts_is_refused(monkeypatch):
    def load(path, device, dtype, clip_l):
        return brightness

    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    monkeypatch.setitem(rewards.REWARDS, "judge", (load, True, ""))
    with pytest.raises(ValueError, match="reward judge .*in_two_parts"):
        rewards.build("judge", "cpu")


def test_a_reward_without_room_asks_for_fewer_pictures(run, tmp_path, monkeypatch):
    """When it is tried how many fit, fewer are taken; in training one line says so."""

    @as_reward
    def large(images, prompts, metadata):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rewards, "build", lambda *_: [large])
    (guarded,) = rewards.build_for([], "clipscore", "cpu")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        guarded(torch.zeros(1, 3, 8, 8), ["a circle"], [{}])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        here(rtdmd_rl, *RL, "--cold_start", run.cold, "--out_dir", tmp_path)


def test_a_reward_whose_model_finds_no_room_is_not_to_be_downloaded_again(
    tmp_path, capsys, monkeypatch
):
    def loader(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")

    monkeypatch.setitem(rewards.REWARDS, "clipscore", (loader, True, "a/b"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")  # the other GPUs may have had room
    with pytest.raises(SystemExit) as ended:
        rewards.build("clipscore", "cpu", [f"clipscore={tmp_path}"])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.count("\n") == 1
    assert "reward clipscore: no room for it on the GPU" in err
    assert "--low_memory" in err
    assert "download" not in err


def test_a_reward_that_raises_is_named_with_the_prompts(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rewards, "build", lambda *_: [bad_reward])
    out_dir = ["--out_dir", tmp_path / "out"]
    teacher = ["--cold_start", "", "--rtdmd", "", "--teacher", "--steps", 1]
    evaluation = ["a circle", *BASE[:4], *teacher, "--rewards", "clipscore", *out_dir]
    of_stage_2 = here(rtdmd_rl, *RL, "--cold_start", run.cold, *out_dir)
    of_evaluate = here(evaluate, *evaluation)
    for status, _, err in (of_stage_2, of_evaluate):
        assert status == 1
        assert err.count("\n") == 1
        assert "reward beauty failed on 'a " in err
        assert "RuntimeError: out of ideas" in err

    images = torch.zeros(3, 3, 8, 8)
    prompts = ["--x" * 1000, "b", "c"]
    metadata = [{}] * 3
    for shape in ((), (3, 1), (2,)):  # the first would be broadcast to every picture

        def wrong(images, prompts, metadata):
            return torch.zeros(shape)

        guarded = rewards.guarded(as_reward(wrong))
        with pytest.raises(SystemExit):
            guarded(images, prompts, metadata)
        err = capsys.readouterr().err
        assert str(shape) in err
        assert "'b'" in err
        assert len(err) < 500


class SilentBar:
    """A progress bar that shows nothing."""

    def set_postfix(self, *_, **__):
        pass


def log_in(folder):
    """A log that begins in this folder."""
    args = SimpleNamespace(out_dir=str(folder), wandb="")
    return common.Log(args, 0, CPU)


def test_a_reward_that_never_varies_is_warned_of_once(run, tmp_path, capsys, monkeypatch):
    @as_reward
    def half(images, prompts, metadata):
        # two groups of three, of which one does not vary
        return torch.tensor([0.3, 0.3, 0.3, 0, 1, 2])

    monkeypatch.setattr(rewards, "build", lambda *_: [half])
    flags = [*BASE, "--epochs", 1, "--prompts_per_epoch", 2, "--group_size", 3]
    good(here(rtdmd_rl, *flags, "--cold_start", run.cold, "--out_dir", tmp_path))
    assert log_of(tmp_path)[0]["flat_groups"] == 0.5

    log = log_in(tmp_path)
    bar = SilentBar()
    for share in 19 * [1.0] + [0.5] + 60 * [1.0]:
        log(bar, 1, flat_groups=share)
        if share == 0.5:
            assert not capsys.readouterr().err
    assert capsys.readouterr().err.count("\n") == 1


# ---- the log -------------------------------------------------------------------------------------
def test_a_checkpoint_between_two_steps_is_no_part_of_either(tmp_path, monkeypatch):
    """Else its seconds are those of the next step's text."""
    clock = [0.0]

    def wait(seconds):
        clock[0] += seconds

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    log = log_in(tmp_path)
    bar = SilentBar()
    for step in range(2):
        log.begin()
        wait(1)
        log.lap("text")
        wait(2)
        log.lap("fake")
        log(bar, 8, step=step)
        wait(5)  # saves
    names = ("s_text", "s_fake", "s_rest", "seconds")
    first, second = lines_of(tmp_path)
    assert [first[name] for name in names] == [1, 2, 0, 3]
    assert [second[name] for name in names] == [1, 2, 5, 8]


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_the_loops_count_a_checkpoint_as_rest(stage, run, tmp_path, monkeypatch):
    program, flags, *_ = stage_of(run, stage)
    real = checkpoint.Run.save

    def slow(self, step):
        time.sleep(0.5)
        real(self, step)

    monkeypatch.setattr(checkpoint.Run, "save", slow)
    good(here(program, *flags, "--save_every", 1, "--out_dir", tmp_path))
    lines = lines_of(tmp_path)
    assert len(lines) > 1
    for line in lines[1:]:
        assert line["s_rest"] > 0.5


def test_the_signs_of_a_collapse_in_the_log_are_what_they_say(tiny_parts, run, tmp_path):
    """ema_drift = |p - ema| / |ema|.

    latent_std is the spread WITHIN a prompt's pictures. It is 0 if they are all the same, whatever
    the prompts are.
    """
    saved = load(run.cold / "ckpt.pt")
    generator = flat(saved["generator"])
    ema = flat(saved["ema"])
    relative = (generator - ema).norm() / ema.norm()
    drift = pytest.approx(relative.item(), rel=1e-5)
    assert log_of(run.cold)[-1]["ema_drift"] == drift
    assert cold_start.distance(generator, ema) == drift

    def by_prompt(x, v, *rest):
        """A step whose pictures all are the number of their prompt."""
        _, *others = cps_step(x, v, *rest)
        prompt_numbers = v.new_tensor([i // 2 for i in range(len(x))])
        pictures = 0 * v + prompt_numbers.view(-1, 1, 1, 1)
        return (pictures, *others)

    flags = [*RL, *ONE_BATCH, "--epochs", 1, "--cold_start", run.cold, "--out_dir", tmp_path]
    good(here(rtdmd_rl, *flags, cps_step=by_prompt))
    assert log_of(tmp_path)[0]["latent_std"] == 0
    assert log_of(run.rl)[0]["latent_std"] > 0
