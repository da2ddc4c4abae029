"""The teacher is drawn as a user's pipeline draws the base; the student keeps its levels."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import cold_start
import cps
import report
import sample

TINY = Path(__file__).resolve().parent.parent / "assets/tiny"
PROMPT = "a red circle above a blue square"
SEED = 9
GUIDANCE = 2.0
STUDENT_LEVELS = [1.0, 0.9, 0.75, 0.5, 0.0]


@pytest.fixture(autouse=True)
def one_thread():
    """Pictures are compared to 1e-5: the order of additions must not depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def presets_as_they_were(monkeypatch):
    """sample.arguments writes into the table of usual values: each test has its own."""
    copies = {who: dict(values) for who, values in sample.USUAL.items()}
    monkeypatch.setattr(sample, "USUAL", copies)


@pytest.fixture
def draw_with_sample(monkeypatch, tmp_path):
    """-> draw(*flags): what sample.py's main hands to the decoder, the latents of each batch."""

    def draw(*flags):
        batches = []
        true_decode = sample.decode

        def recording_decode(pipe, latents):
            batches.append(latents)
            return true_decode(pipe, latents)

        command = ["sample.py", PROMPT, "--preset", "tiny", "--device", "cpu", "--seed", str(SEED)]
        command += ["--cold_start", "", "--rtdmd", "", "--out_dir", str(tmp_path / "pictures")]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command + list(flags))
            patch.setattr(sample, "decode", recording_decode)
            sample.main()
        return batches

    return draw


def latents_of_diffusers(steps, shift=None):
    """The same prompt and noise through a pipeline that this repository has not touched."""
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if shift is not None:
        config = pipe.scheduler.config
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
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


def plain_pipe():
    args = SimpleNamespace(**cold_start.PRESETS["tiny"])
    return cold_start.load_pipeline(args, torch.device("cpu"))


@pytest.mark.parametrize("steps", [50, 10])
def test_the_teachers_picture_is_that_of_a_diffusers_pipeline(steps, draw_with_sample, monkeypatch):
    reference = latents_of_diffusers(steps)
    (ours,) = draw_with_sample("--teacher", "--steps", str(steps))
    assert largest_difference(ours, reference) < 1e-5

    # Would the comparison notice the student's grid? It would: the pictures are far apart.
    monkeypatch.setattr(sample, "teacher_levels", lambda pipe, steps, shift=None: cps.sigmas(steps))
    (on_student_grid,) = draw_with_sample("--teacher", "--steps", str(steps))
    assert largest_difference(on_student_grid, reference) > 1e-3


def test_a_shift_that_is_given_reaches_the_teacher(draw_with_sample):
    (ours,) = draw_with_sample("--teacher", "--steps", "10", "--shift", "1.5")
    assert largest_difference(ours, latents_of_diffusers(10, shift=1.5)) < 1e-5
    assert largest_difference(ours, latents_of_diffusers(10)) > 1e-3


def test_without_a_shift_the_teacher_has_the_one_of_its_own_scheduler():
    pipe = plain_pipe()
    shift_one = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shift_one.set_timesteps(50)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert sample.teacher_levels(pipe, 50) == shift_one.sigmas.tolist()


def test_the_last_levels_of_fifty_steps_at_shift_3():
    levels = sample.teacher_levels(plain_pipe(), 50)
    assert len(levels) == 51
    assert levels[0] == 1
    assert levels[-4:] == pytest.approx([0.121, 0.067, 0.009, 0], abs=5e-4)
    assert cps.sigmas(50)[-4:] == pytest.approx([0.161, 0.111, 0.058, 0], abs=5e-4)


def test_no_state_leaks_between_calls_nor_into_the_pipeline():
    pipe = plain_pipe()
    timesteps = pipe.scheduler.timesteps.clone()
    first = sample.teacher_levels(pipe, 50)
    sample.teacher_levels(pipe, 10, shift=1.0)
    assert sample.teacher_levels(pipe, 50) == first
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert pipe.scheduler.shift == 3


def levels_of_a_run(monkeypatch, tmp_path, *flags):
    """-> {"student" or "teacher": the noise levels that sample.py's main integrates over}"""
    used = {}

    def record(v, noise, levels, eta):
        who = "teacher" if eta == 0 else "student"
        used[who] = levels
        return noise[0]

    command = ["sample.py", PROMPT, "--preset", "tiny", "--device", "cpu", *flags]
    command += ["--cold_start", "", "--rtdmd", "", "--out_dir", str(tmp_path / "pictures")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(sample, "integrate", record)
        sample.main()
    return used


def test_the_students_levels_are_its_own(monkeypatch, tmp_path):
    used = levels_of_a_run(monkeypatch, tmp_path)
    assert used == {"student": pytest.approx(STUDENT_LEVELS)}


def test_compare_draws_each_on_its_own_grid(monkeypatch, tmp_path):
    used = levels_of_a_run(monkeypatch, tmp_path, "--compare")
    assert used["student"] == pytest.approx(STUDENT_LEVELS)
    assert used["teacher"] == sample.teacher_levels(plain_pipe(), 50)


def test_compare_gives_both_the_shift_of_the_command_line(monkeypatch, tmp_path):
    used = levels_of_a_run(monkeypatch, tmp_path, "--compare", "--shift", "2")
    assert used["student"] == pytest.approx(cps.sigmas(4, 2.0))
    assert used["teacher"] == sample.teacher_levels(plain_pipe(), 50, shift=2.0)


def test_the_scoreboards_rows_have_the_levels_that_their_legend_says(monkeypatch, tmp_path):
    """50 steps on diffusers' grid; 4 at the student's levels, to show what distillation adds."""
    rows = []
    pipe = plain_pipe()

    class StopHereError(Exception):
        """Raised in place of drawing the report."""

    def record(pipe, encode, clips, captions, adapters, levels, eta, cfg=1.0):
        rows.append((levels, eta, cfg))
        return {"checker": 0.0}, torch.zeros(len(captions), 3, 32, 32)

    def enough(*inputs):
        raise StopHereError

    monkeypatch.setattr(report, "evaluate", record)
    monkeypatch.setattr(report, "read_log", lambda run: [{"step": 0, "seconds": 1.0}])
    monkeypatch.setattr(
        report, "load_tiny", lambda *_, **__: (SimpleNamespace(cfg=2.0), pipe, None, [])
    )
    monkeypatch.setattr(
        report, "load_generator", lambda pipe, args: ["cold_generator", "generator"]
    )
    monkeypatch.setattr(report, "draw_report", enough)
    with pytest.raises(StopHereError):
        report.scoreboard(str(tmp_path), TINY, 3, torch.device("cpu"))
    levels, etas, guidances = zip(*rows, strict=True)
    assert levels[0] == sample.teacher_levels(pipe, 50)
    for others in levels[1:]:
        assert others == pytest.approx(STUDENT_LEVELS)
    assert etas == (0.0, 0.0, 0.0, 0.9, 0.9)
    assert guidances == (2.0, 2.0, 1.0, 1.0, 1.0)
