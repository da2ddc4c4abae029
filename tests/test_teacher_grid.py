"""The teacher is drawn as a user's pipeline draws the base; the student keeps its levels."""

import shutil
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import cps
import model
import sample
from helpers import TINY, tiny_base
from tools import evaluate

PROMPT = "a red circle above a blue square"
SEED = 9
GUIDANCE = 2.0
STUDENT_LEVELS = [1.0, 0.9, 0.75, 0.5, 0.0]


@pytest.fixture(autouse=True)
def one_thread():
    """Pictures are compared to 1e-5: the order of additions must not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def draw_with_sample(monkeypatch, tmp_path):
    """-> draw(*flags): what sample.py's main hands to the decoder, the latents of each batch."""

    def draw(*flags):
        batches = []
        true_decode = model.BaseModel.decode

        def recording_decode(base, latents):
            batches.append(latents)
            return true_decode(base, latents)

        command = ["sample.py", PROMPT, "--preset", "tiny", "--device", "cpu", "--seed", str(SEED)]
        command += ["--cold_start", "", "--rtdmd", "", "--out_dir", str(tmp_path / "pictures")]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command + list(flags))
            patch.setattr(model.BaseModel, "decode", recording_decode)
            sample.main()
        return batches

    return draw


def latents_of_diffusers(steps):
    """The same prompt and noise through a pipeline that this repository has not touched."""
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    return pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=noise,
        height=32,
        width=32,
        max_sequence_length=8,
        output_type="latent",
    ).images


def largest_difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("steps", [50, 10])
def test_the_teachers_picture_is_that_of_a_diffusers_pipeline(steps, draw_with_sample, monkeypatch):
    reference = latents_of_diffusers(steps)
    (ours,) = draw_with_sample("--teacher", "--steps", str(steps))
    assert largest_difference(ours, reference) < 1e-5

    # Would the comparison notice the student's grid? It would: the pictures are far apart.
    monkeypatch.setattr(sample, "teacher_levels", lambda base, steps: cps.sigmas(steps))
    (on_student_grid,) = draw_with_sample("--teacher", "--steps", str(steps))
    assert largest_difference(on_student_grid, reference) > 1e-3


def test_the_teacher_has_the_shift_of_its_own_scheduler():
    base = tiny_base()
    shift_one = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shift_one.set_timesteps(50)
    base.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert sample.teacher_levels(base, 50) == shift_one.sigmas.tolist()


def test_the_last_levels_of_fifty_steps_at_shift_3():
    levels = sample.teacher_levels(tiny_base(), 50)
    assert len(levels) == 51
    assert levels[0] == 1
    assert levels[-4:] == pytest.approx([0.121, 0.067, 0.009, 0], abs=5e-4)
    assert cps.sigmas(50)[-4:] == pytest.approx([0.161, 0.111, 0.058, 0], abs=5e-4)


def test_no_state_leaks_between_calls_nor_into_the_pipeline():
    base = tiny_base()
    timesteps = base.pipe.scheduler.timesteps.clone()
    first = sample.teacher_levels(base, 50)
    sample.teacher_levels(base, 10)
    assert sample.teacher_levels(base, 50) == first
    assert torch.equal(base.pipe.scheduler.timesteps, timesteps)


def levels_of_a_run(program, monkeypatch, tmp_path, *flags):
    """-> {"student" or "teacher": the noise levels that the program's main integrates over}"""
    used = {}

    def record(v, noise, levels, eta):
        who = "teacher" if eta == 0 else "student"
        used[who] = levels
        return noise[0]

    command = ["program.py", PROMPT, "--preset", "tiny", "--device", "cpu", *flags]
    command += ["--cold_start", "", "--rtdmd", "", "--out_dir", str(tmp_path / "pictures")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(sample, "integrate", record)
        program.main()
    return used


def test_the_students_levels_are_its_own(monkeypatch, tmp_path):
    used = levels_of_a_run(sample, monkeypatch, tmp_path)
    assert used == {"student": pytest.approx(STUDENT_LEVELS)}


def test_the_students_shift_is_the_bases(monkeypatch, tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path / "tiny/scheduler")
    flags = ["--pretrained", str(tmp_path / "tiny")]
    used = levels_of_a_run(sample, monkeypatch, tmp_path, *flags)
    assert used["student"] == pytest.approx(cps.sigmas(4, 2.0))


def test_compare_draws_each_on_its_own_grid(monkeypatch, tmp_path):
    flags = ["--compare", "--rewards", "clipscore", "--reward_path", f"clipscore={TINY}/clip"]
    used = levels_of_a_run(evaluate, monkeypatch, tmp_path, *flags)
    assert used["student"] == pytest.approx(STUDENT_LEVELS)
    assert used["teacher"] == sample.teacher_levels(tiny_base(), 50)
