"""One minute, `make smoke`: the three commands, and five identities of the paper. More in tests/."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import pytest
import torch
from torch.testing import assert_close

from cold_start import generator_loss
from cps import ambient_target, cps_step, log_prob, renoise, sigmas
from rtdmd_rl import policy_loss

TINY = "--preset tiny --device cpu"
STAGE_1 = f"{TINY} --batch_size 5 --micro_batch 3 --generator_every 2 --lr 1e-5 --fake_lr 1e-5"
STAGE_2 = f"{TINY} --epochs 2 --prompts_per_epoch 5 --group_size 2 --micro_batch 3"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2"
ADAPTERS = ("generator_ema.pt", "fake.pt")


def run(command):
    """A command line as a user types it."""
    assert subprocess.call([sys.executable, *command.split()], cwd=Path(__file__).parent) == 0


def log_of(folder):
    """Losses and norms of gradients, a dictionary a step."""
    steps = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: x for k, x in step.items() if k.startswith(("loss", "grad"))} for step in steps]


def moved(folder):
    """The B of both adapters, which begin at 0, in one vector."""
    files = [torch.load(folder / name, weights_only=True) for name in ADAPTERS]
    return torch.cat([p.flatten() for file in files for name, p in file.items() if "_B" in name])


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """Stage 1 on one process, never interrupted."""
    folder = tmp_path_factory.mktemp("cold")
    run(f"cold_start.py {STAGE_1} --steps 4 --out_dir {folder}")
    return folder


def test_three_commands_go_from_the_teacher_to_pictures(cold, tmp_path):
    run(f"rtdmd_rl.py {STAGE_2} --cold_start {cold} --out_dir {tmp_path}/rl")
    run(f"sample.py circle {TINY} --cold_start {cold} --rtdmd {tmp_path}/rl --out_dir {tmp_path}")
    assert len(log_of(tmp_path / "rl")) == 2
    assert (tmp_path / "00000.png").is_file()


def test_the_same_command_continues_a_run_that_was_stopped(cold, tmp_path):
    run(f"cold_start.py {STAGE_1} --steps 2 --out_dir {tmp_path}")
    half = (tmp_path / "log.jsonl").read_text()
    run(f"cold_start.py {STAGE_1} --steps 4 --out_dir {tmp_path}")
    assert (tmp_path / "log.jsonl").read_text().startswith(half)  # continued, not begun anew
    assert log_of(tmp_path) == log_of(cold)
    for name in ADAPTERS:
        assert (tmp_path / name).read_bytes() == (cold / name).read_bytes()


def test_two_processes_train_what_one_does(cold, tmp_path):
    run(f"{TORCHRUN} cold_start.py {STAGE_1} --steps 4 --out_dir {tmp_path}")
    for one, two in zip(log_of(cold), log_of(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
    difference = moved(tmp_path) - moved(cold)
    assert difference.abs().max() < 1e-5
    assert difference.norm() < 0.01 * moved(cold).norm()


# From here on the paper: noise levels s < t; everything else is drawn.
s, t = 0.5, 0.8
torch.manual_seed(0)
x0, x_s, eps, n, m, v_fake, v_teacher = torch.randn(7, 3, 4, 8, 8, dtype=torch.float64)


def test_the_levels_are_an_even_grid_that_is_shifted_once():
    assert sigmas() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("eta", (0, 0.5, 0.9, 1))
def test_a_step_keeps_signal_and_noise_on_schedule_eq_19_to_21(eta):
    _, mean, std = cps_step((1 - t) * x0 + t * eps, eps - x0, t, s, eta)
    kept = (mean - (1 - s) * x0) / eps  # s cos(eta pi / 2)
    assert_close(kept**2 + std**2, torch.full_like(kept, s**2))


def test_the_fake_scores_target_is_the_velocity_of_the_kernels_score_eq_2():
    x_t = renoise(x_s, s, t, n)
    target, sig = ambient_target(x_s, s, t, n)
    score = -n / sig
    assert_close(target, -(x_t + t * score) / (1 - t))
    assert_close(ambient_target(x0, 0.0, t, n)[0], n - x0)


def test_the_generators_gradient_is_the_difference_of_two_steps_by_its_size_eq_9():
    x = x_s.clone().requires_grad_()
    loss = generator_loss(x, s, t, n, m, lambda *_: v_teacher, lambda *_: v_fake, eta=0.9)
    loss.sum().backward()
    x_t = renoise(x_s, s, t, n)
    y_teacher, _, _ = cps_step(x_t, v_teacher, t, s, 0.9, m)
    y_fake, _, _ = cps_step(x_t, v_fake, t, s, 0.9, m)
    size = (x_s - y_teacher).abs().mean((1, 2, 3), keepdim=True)
    assert_close(x.grad, (y_fake - y_teacher) / size / x_s[0].numel())


def test_the_policys_gradient_is_minus_advantage_times_grad_log_p_at_ratio_1_eq_14():
    x, mean, std = cps_step(x_s, v_fake, t, s, 0.9, n)
    log_p = log_prob(x, mean.requires_grad_(), std)
    (grad_log_p,) = torch.autograd.grad(log_p.sum(), mean, retain_graph=True)
    advantage = torch.tensor([2.0, -1.0, 0.0])
    policy_loss(log_p, log_p.detach(), advantage).sum().backward()
    assert_close(mean.grad, -advantage.view(-1, 1, 1, 1) * grad_log_p)
