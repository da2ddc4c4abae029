"""A run survives: it continues to the byte after signals, kills, full disks and damaged files."""

import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel

import checkpoint
import cold_start
import common
import rtdmd_rl
from crash import crash_test, same
from helpers import (
    ADAPTERS,
    COLD,
    RL,
    ROOT,
    TINY,
    flip,
    good,
    here,
    listing,
    load,
    log_of,
    same_files,
    stage_of,
)


def test_the_checkpoint_has_one_pair_of_keys_for_each_attention_projection_that_a_block_has(run):
    """A key is for example `transformer_blocks.0.attn.to_q.lora_A.default.weight`.

    There is attn, and not SD3.5's second attention, attn2.
    """
    blocks = SD3Transformer2DModel.from_pretrained(TINY / "transformer").transformer_blocks
    expected = {
        f"transformer_blocks.{i}.attn.{name}.lora_{ab}.default.weight"
        for i, block in enumerate(blocks)
        for ab in "AB"
        for name, module in block.attn.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(expected) == (len(blocks) * 8 - 1) * 2  # the last block has no to_add_out
    for path in (run.cold / "generator_ema.pt", run.cold / "fake.pt", run.rl / "generator_ema.pt"):
        assert set(load(path)) == expected and all(
            v.dtype == torch.float32 for v in load(path).values()
        )


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    run, tmp_path, stage
):
    program, flags, length, half = stage_of(run, stage)
    one = getattr(run, stage)
    two = tmp_path / "out"
    flags = [*flags, "--out_dir", two]
    good(here(program, *flags, length, half))
    # as after a kill: a step that the checkpoint does not know, and half a line
    with open(two / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": half, "loss_fake": 9}) + '\n{"step": 3, "lo')
    good(here(program, *flags))
    assert same_files(one, two) and log_of(one) == log_of(two)
    a, b = load(one / "ckpt.pt"), load(two / "ckpt.pt")
    for name in ("G_opt", "F_opt"):
        assert all(
            torch.equal(v, b[name]["state"][i][k])
            for i, moments in a[name]["state"].items()
            for k, v in moments.items()
        )


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_kept_files_are_those_of_a_run_that_ended_there(run, tmp_path, stage):
    program, flags, length, half = stage_of(run, stage)
    good(here(program, *flags, "--keep_every", half, "--out_dir", tmp_path / "kept"))
    good(here(program, *flags, length, half, "--out_dir", tmp_path / "short"))
    for name in ("generator_ema", "fake"):
        kept = load(tmp_path / "kept" / f"{name}_{half}.pt")
        assert same(kept, load(tmp_path / "short" / f"{name}.pt"))
        last = load(tmp_path / "kept" / f"{name}.pt")
        assert same(last, load(getattr(run, stage) / f"{name}.pt"))
        # (stage 2's average of two epochs is that of one: weights count from the epoch after theirs)
        assert name == "generator_ema" or not same(kept, last)


def test_a_kept_generator_goes_with_the_fake_score_of_its_moment(tmp_path):
    for name in (
        "generator_ema.pt",
        "fake.pt",
        "generator_ema_5.pt",
        "fake_5.pt",
        "generator_ema_6.pt",
    ):
        (tmp_path / name).touch()

    def fake_of(name):
        return checkpoint.find_weights(str(tmp_path / name), "cold_start", "fake", must=False)

    assert fake_of("generator_ema.pt") == str(tmp_path / "fake.pt")
    assert fake_of("generator_ema_5.pt") == str(tmp_path / "fake_5.pt")
    assert fake_of("generator_ema_6.pt") is None


def rates_of(steps, anneal):
    """The learning rates of generator and fake score in each step, over those of the flags."""
    args = SimpleNamespace(lr=2.0, fake_lr=3.0, steps=steps, anneal=anneal)
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=1.0) for _ in range(2)]
    shares = []
    for step in range(steps):
        cold_start.set_rates(*optimizers, step, args)
        student, fake = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
        assert fake == pytest.approx(1.5 * student)
        shares.append(student / 2)
    return shares


def test_annealed_rates_fall_to_0_over_the_last_share_of_the_steps():
    assert rates_of(4, 0.0) == [1, 1, 1, 1]
    assert rates_of(4, 0.5) == [1, 1, 1, 0.5]
    assert rates_of(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_an_annealed_run_goes_on_to_the_byte_and_not_with_another_length(tmp_path):
    flags = [*COLD[:-6], "--steps", 4, "--anneal", 0.5]
    whole, cut = [*flags, "--out_dir", tmp_path / "whole"], [*flags, "--out_dir", tmp_path / "cut"]
    good(here(cold_start, *whole))
    real = cold_start.fake_score_loss

    def ask():
        os.kill(os.getpid(), signal.SIGTERM)

    here(cold_start, *cut, fake_score_loss=at_call(real, 3, ask))
    assert load(tmp_path / "cut" / "ckpt.pt")["step"] < 4
    status, _, err = here(cold_start, *cut, "--steps", 6)
    assert status == 2 and "--steps 4 -> 6" in err
    good(here(cold_start, *cut))
    assert same_files(tmp_path / "whole", tmp_path / "cut")


# ---- it survives
# Kill it anywhere: signals, crashes, full disks, damaged files.
# The crash test is a program of its own, too: crash.py.
@pytest.fixture
def small_state(tmp_path):
    """-> save(step): a `Run` in tmp_path saves a state every number of which is `step`."""

    def state(step):
        parameter = torch.nn.Parameter(torch.full((6,), float(step)))
        optimizer = torch.optim.AdamW([parameter])
        return {
            "generator": parameter,
            "fake": parameter,
            "ema": parameter,
            "G_opt": optimizer,
            "F_opt": optimizer,
            "shapes": {"key": torch.Size((3, 2))},
        }

    def save(step):
        # without a model, and without looking at what is there
        run = object.__new__(checkpoint.Run)
        run.args = SimpleNamespace(out_dir=str(tmp_path), lr=1e-3, save_every=8, keep_every=0)
        run.state = state(step)
        run.content = {}
        run.made_with = {}
        run.saved_at = time.time()
        run.save(step)

    return save


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` or `except OSError` of the programs sees it."""


def test_killed_at_any_call_while_saving_a_whole_checkpoint_is_left_and_no_mixture(
    small_state, tmp_path, monkeypatch, capsys
):
    """Save step 1, 2, then 3 and die at the n-th write, flush or rename, for every n.

    What the same command reads is step 2 or 3, whole; the two adapters are of one step, or stage 2
    refuses them. When nobody dies: step 3, and step 2 behind it.
    """
    save = small_state
    for n in itertools.count():
        for path in tmp_path.iterdir():
            path.unlink()
        save(1)
        save(2)
        calls = []

        def mortal(call, half=False):
            def wrapped(*inputs, **options):
                calls.append(call)
                if len(calls) == n + 1:
                    if half and os.path.isfile(inputs[0]):  # it is being written
                        os.truncate(inputs[0], os.path.getsize(inputs[0]) // 2)
                    raise Killed
                return call(*inputs, **options)

            return wrapped

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(common, "sync", mortal(common.sync, half=True))
            patch.setattr(os, "replace", mortal(os.replace))
            save(3)
        path = next(tmp_path / f for f in ("ckpt.pt", "ckpt.prev.pt") if (tmp_path / f).exists())
        saved = checkpoint.read(str(path), "checkpoint")
        assert saved["step"] in (2, 3) and all(
            (saved[name][0] == saved["step"]).all() for name in ("generator", "fake", "ema")
        )
        generator, fake = (
            checkpoint.read(f"{tmp_path}/{f}", "adapter")["key"][0, 0].item() for f in ADAPTERS
        )
        try:
            checkpoint.find_weights(str(tmp_path), "cold_start")
            assert generator == fake and generator in (2, 3)
        except SystemExit:
            assert (generator, fake) == (
                3,
                2,
            ) and "the command of that run goes on" in capsys.readouterr().err
        if len(calls) == n:  # nobody died
            break
    assert (
        n == 8 and saved["step"] == generator == 3 and load(tmp_path / "ckpt.prev.pt")["step"] == 2
    )  # 3 flushes, 4 renames, 1 directory


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(
    small_state, tmp_path, capsys
):
    """Every byte of a small one, and every bit of its table of contents.

    torch.load alone takes wrong weights, steps and flags for right: it does not look at the checksums.
    """
    small_state(7)
    path = tmp_path / "ckpt.pt"
    whole = load(path)
    content = path.read_bytes()
    noticed = 0
    missed_by_torch = 0
    directory = content.index(b"PK\x01\x02")
    bits = [(place, place % 8) for place in range(directory)]
    bits += [(place, bit) for place in range(directory, len(content)) for bit in range(8)]
    for place, bit in bits:
        path.write_bytes(content)
        flip(path, place, bit)
        try:
            assert same(checkpoint.read(str(path), "checkpoint"), whole), place
        except SystemExit:
            noticed += 1
            with contextlib.suppress(Exception):
                missed_by_torch += not same(load(path), whole)
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == noticed > 500
        and all("damaged" in line for line in errors)
        and missed_by_torch > 50
    )


def test_an_entry_that_is_marked_as_a_directory_is_refused(small_state, tmp_path, capsys):
    """torch.load reads nothing of it, without an error, and its tensor holds what was in memory."""
    small_state(7)
    path = tmp_path / "ckpt.pt"
    marked = tmp_path / "marked.pt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(marked, "w") as archive:
        for entry in whole.infolist():
            content = whole.read(entry)
            if "/data/" in entry.filename:
                entry.external_attr |= 0x10
            archive.writestr(entry, content)
    with pytest.raises(SystemExit):
        checkpoint.read(str(marked), "checkpoint")
    assert "an entry is marked as a directory" in capsys.readouterr().err


def test_a_damaged_byte_in_each_part_of_a_real_checkpoint_is_refused_and_the_one_before_it_goes_on(
    run, tmp_path
):
    """Each tensor, the flags, the optimisers.

    The message offers ckpt.prev.pt, and doing as it says ends in the bytes of a whole run.
    """
    path = Path(shutil.copy(run.cold / "ckpt.pt", tmp_path))
    parts = [part for part in zipfile.ZipFile(path).infolist() if part.file_size]
    for part in [part for part in parts if "/data/" not in part.filename] + parts[
        :: len(parts) // 8
    ]:
        header = path.read_bytes()[part.header_offset :][:30]
        place = (
            part.header_offset
            + 30
            + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            + part.file_size // 2
        )
        flip(path, place)
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
            checkpoint.read(str(path), "checkpoint", "; HINT")
        assert "damaged" in err.getvalue() and err.getvalue().endswith("; HINT\n")
        flip(path, place)
    flags = [*COLD, "--out_dir", tmp_path / "run", "--save_every", 1]
    good(here(cold_start, *flags, "--steps", 3))
    flip(tmp_path / "run/ckpt.pt", os.path.getsize(tmp_path / "run/ckpt.pt") // 2)
    status, _, err = here(cold_start, *flags)
    assert (
        status == 2
        and err.count("\n") == 1
        and f"delete {tmp_path}/run/ckpt.pt to go on from the one before it" in err
    )
    (tmp_path / "run/ckpt.pt").unlink()
    status, out, _ = here(cold_start, *flags)
    assert (
        status == 0
        and "ckpt.prev.pt, step 2" in out
        and same_files(tmp_path / "run", run.cold)
        and log_of(tmp_path / "run") == log_of(run.cold)
    )


def test_other_content_under_the_same_name_is_refused(run, tmp_path):
    """Prompts, and for stage 2 stage 1's weights: the flags are the same, the files behind them are not."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na square\n")
    flags = [*COLD, "--steps", 1, "--prompts", prompts, "--out_dir", tmp_path / "cold"]
    good(here(cold_start, *flags))
    good(
        here(
            rtdmd_rl,
            *RL,
            "--epochs",
            1,
            "--cold_start",
            tmp_path / "cold",
            "--out_dir",
            tmp_path / "rl",
        )
    )
    prompts.write_text("a circle\na triangle\n")
    status, _, err = here(cold_start, *flags)
    assert status == 2 and err.count("\n") == 1 and "--prompts content" in err
    shutil.copy(run.cold / "generator_ema.pt", tmp_path / "cold/generator_ema.pt")
    status, _, err = here(
        rtdmd_rl, *RL, "--cold_start", tmp_path / "cold", "--out_dir", tmp_path / "rl"
    )
    assert status == 2 and err.count("\n") == 1 and "cold_start content" in err


def test_other_packages_or_another_number_of_processes_are_told_when_a_run_goes_on(
    run, tmp_path, monkeypatch
):
    shutil.copytree(run.cold, tmp_path / "out")
    monkeypatch.setattr(
        checkpoint,
        "version",
        lambda name: (
            "9.9" if name == "peft" else __import__("importlib.metadata").metadata.version(name)
        ),
    )
    ckpt = load(run.cold / "ckpt.pt")
    ckpt["made_with"]["processes"] = 8
    torch.save(ckpt, tmp_path / "out/ckpt.pt")
    status, out, _ = here(cold_start, *COLD, "--out_dir", tmp_path / "out")
    assert (
        status == 0
        and "-> 9.9, processes 8 -> 1): the same results up to rounding" in out
        and "torch" not in out
    )


# ---- signals and dying processes
def at_call(function, n, action):
    """`function`, doing `action` before its n-th call"""
    count = itertools.count(1)
    return lambda *inputs: (action() if next(count) == n else None, function(*inputs))[1]


@pytest.mark.parametrize("stage, name", [("cold", "SIGTERM"), ("rl", "SIGINT")])
def test_a_signal_finishes_the_step_saves_and_exits_with_status_0(run, tmp_path, stage, name):
    """In the middle of the first step, twice, as torchrun passes them on.

    The same command then ends in the bytes of an uninterrupted run.
    """
    program, flags, *_ = stage_of(run, stage)

    def ask():
        return [os.kill(os.getpid(), getattr(signal, name)) for _ in range(2)]

    status, out, err = here(
        program,
        *flags,
        "--out_dir",
        tmp_path,
        fake_score_loss=at_call(program.fake_score_loss, 1, ask),
    )
    assert (
        status == 0
        and "saved after 1 of" in out
        and "the same command goes on" in out
        and "done" not in out
        and load(tmp_path / "ckpt.pt")["step"] == 1
    )
    good(here(program, *flags, "--out_dir", tmp_path))
    assert same_files(tmp_path, getattr(run, stage)) and log_of(tmp_path) == log_of(
        getattr(run, stage)
    )


def two_ranks(out_dir, *flags):
    """torchrun with two endless ranks that have taken two steps -> (its Popen, [pid of rank 0, of 1])"""
    command = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        "cold_start.py",
        *COLD[:-6],
        "--steps",
        10000,
        *flags,
    ]
    job = subprocess.Popen(
        [*map(str, command), "--out_dir", str(out_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out_dir / "log.jsonl"
    until = time.time() + 60

    def two_steps_are_logged():
        return log.exists() and log.read_bytes().count(b"\n") >= 2

    while not two_steps_are_logged() and time.time() < until:
        time.sleep(0.1)
    pids = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return job, sorted(
        map(int, pids),
        key=lambda pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1][:1],
    )


def test_a_signal_to_one_rank_of_two_ends_both_at_the_same_step_with_status_0(tmp_path):
    job, (_, second) = two_ranks(tmp_path)
    os.kill(second, signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    step = load(tmp_path / "ckpt.pt")["step"]
    assert (
        job.returncode == 0
        and "Traceback" not in err
        and f"saved after {step} of" in out
        and len(log_of(tmp_path)) == step
    )
    flags = [*COLD[:-6], "--steps", step + 1, "--out_dir", tmp_path]
    status, out, _ = here(cold_start, *flags)  # alone from here on
    assert status == 0 and "processes 2 -> 1" in out


def test_a_killed_rank_ends_the_job_within_a_minute_and_its_checkpoint_is_whole(tmp_path):
    job, pids = two_ranks(tmp_path, "--save_every", 1)
    os.kill(pids[1], signal.SIGKILL)
    start = time.time()
    _, err = job.communicate(timeout=60)
    assert (
        job.returncode != 0
        and time.time() - start < 60
        and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    )
    assert "cold_start.py: error: lost the other processes" in err
    assert any(
        checkpoint.read(str(tmp_path / f), "checkpoint")["step"] >= 1
        for f in ("ckpt.pt", "ckpt.prev.pt")
        if (tmp_path / f).exists()
    )


def test_a_checkpoint_is_saved_after_so_many_minutes_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint.Run, "save", lambda run, step: saved.append(step))
    monkeypatch.setattr(checkpoint, "SAVE_MINUTES", 1e-9)
    good(here(cold_start, *COLD, "--steps", 3, "--out_dir", tmp_path))
    assert saved == [1, 2, 3]
    # two minutes since the last one; every 8 steps; the last step
    for minutes, steps in ((1, [1, 8, 9]), (20, [8, 9])):
        run = object.__new__(checkpoint.Run)
        run.args = SimpleNamespace(save_every=8, keep_every=0)
        run.saved_at = time.time() - 120
        monkeypatch.setattr(checkpoint, "SAVE_MINUTES", minutes)
        saved.clear()
        for step in range(1, 10):
            run.save_or_stop(step, 9)
        assert saved == steps


# ---- full disks
@pytest.mark.parametrize(
    "limit, name",
    [
        (50, "log.jsonl"),
        (300_000, "generator_ema.pt"),
        (1_000_000, "ckpt.pt"),
    ],
)
def test_a_full_disk_while_writing_loses_nothing_that_was_saved(run, tmp_path, limit, name):
    """The kernel refuses to let a file grow beyond the limit, in the middle of a write.

    One line, status 1; the old files are untouched and of one step, nothing half-written is left,
    and the same command ends in the same bytes as a run without the accident.
    """
    flags = [*COLD, "--out_dir", tmp_path / "out"]
    good(here(cold_start, *flags, "--steps", 2))
    (tmp_path / "out/log.jsonl").write_text("")  # or the limit would be met at once
    before = listing(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        status, _, err = here(cold_start, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        status == 1
        and err.count("\n") == 1
        and f"cannot write {tmp_path}/out/{name}" in err
        and "the same command goes on" in err
    )
    assert {k: v for k, v in listing(tmp_path / "out").items() if "log" not in k} == {
        k: v for k, v in before.items() if "log" not in k
    }
    good(here(cold_start, *flags))
    assert same_files(tmp_path / "out", run.cold)


def test_too_small_a_disk_is_met_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    status, _, err = here(cold_start, *COLD, "--out_dir", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "GB free" in err and not listing(tmp_path)


def test_killed_runs_resume_and_end_in_the_bytes_of_a_run_that_nobody_killed(run, tmp_path):
    report, identical = crash_test(3, run, tmp_path, seed=1)
    assert identical, "\n".join(report)


# ---- the same command, and the settings that travel with the weights
def weights_of(folder):
    """{name: bytes} of all that is trained."""
    return {path: content for path, content in listing(folder).items() if path.endswith(".pt")}


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_the_same_command_on_a_finished_run_ends_at_once_and_changes_no_weights(
    run, tmp_path, stage
):
    program, flags, *_ = stage_of(run, stage)
    out = shutil.copytree(getattr(run, stage), tmp_path / "out")
    before, log = weights_of(out), (out / "log.jsonl").read_bytes()

    def never(*inputs):
        raise AssertionError("a step was taken")

    status, said, err = here(program, *flags, "--out_dir", out, fake_score_loss=never)
    assert status == 0, err
    assert "going on from" in said
    assert len(before) == 3
    assert weights_of(out) == before
    assert (out / "log.jsonl").read_bytes() == log


def test_a_run_goes_on_under_other_names_of_the_same_files(run, tmp_path, monkeypatch):
    """A moved clone, a link, a relative path: of what is named the content decides."""
    clone = shutil.copytree(TINY, tmp_path / "clone")
    cold = shutil.copytree(run.cold, tmp_path / "cold")
    moved = ["--pretrained", os.path.relpath(clone)]
    moved += ["--prompts", clone / "../clone/prompts_train.jsonl"]
    flags = [*COLD, *moved, "--out_dir", cold, "--steps", 5]
    status, said, err = here(cold_start, *flags)
    assert status == 0, err
    assert "going on from" in said
    assert len(log_of(cold)) == 5
    one = tmp_path / "one"
    good(here(rtdmd_rl, *RL, "--epochs", 1, "--cold_start", run.cold, "--out_dir", one))
    (tmp_path / "link").symlink_to(run.cold)
    moved += ["--cold_start", tmp_path / "link"]
    # behind the flag, what the preset names
    moved_clip = [f"clipscore={clone}/clip"]
    monkeypatch.setitem(rtdmd_rl.PRESETS["tiny"], "reward_path", moved_clip)
    status, said, err = here(rtdmd_rl, *RL, *moved, "--out_dir", one)
    assert status == 0, err
    assert "going on from" in said
    assert same_files(one, run.rl)


def test_another_model_of_a_reward_is_not_the_run_that_was_begun(run, tmp_path):
    clip = shutil.copytree(TINY / "clip", tmp_path / "clip")
    flags = [*RL, "--cold_start", run.cold, "--out_dir", tmp_path / "out"]
    flags += ["--epochs", 1, "--reward_path", f"clipscore={clip}"]
    good(here(rtdmd_rl, *flags))
    with open(clip / "config.json", "a") as file:
        file.write(" ")
    status, _, err = here(rtdmd_rl, *flags)
    assert status == 2
    assert "--reward_path content" in err


def test_a_held_out_reward_may_come_with_its_path_when_a_run_goes_on(run, tmp_path):
    flags = [*RL, "--cold_start", run.cold, "--out_dir", tmp_path]
    good(here(rtdmd_rl, *flags, "--epochs", 1))
    judge = ["--eval_rewards", "judge", "--reward_path", f"judge={TINY}/judge"]
    good(here(rtdmd_rl, *flags, *judge))
    assert len(log_of(tmp_path)) == 2


@pytest.fixture(scope="module")
def other_cold(tmp_path_factory):
    """Stage 1 with three steps, other eta, cfg and resolution than the preset's."""
    out = tmp_path_factory.mktemp("other") / "cold"
    flags = [*COLD, "--steps", 1, "--num_steps", 3, "--eta", 0.7, "--cfg", 3, "--resolution", 40]
    good(here(cold_start, *flags, "--lora_alpha", 16, "--out_dir", out))
    return out


def stage_2(monkeypatch, *flags):
    """-> the flags of stage 2 as a dict."""
    monkeypatch.setattr(sys, "argv", ["rtdmd_rl.py", *map(str, [*RL, *flags])])
    return vars(rtdmd_rl.arguments())


def test_stage_2_takes_the_settings_of_its_stage_1(other_cold, monkeypatch, capsys, tmp_path):
    args = stage_2(monkeypatch, "--cold_start", other_cold)
    found = [args[name] for name in ("num_steps", "eta", "cfg", "resolution", "pretrained")]
    assert found == [3, 0.7, 3, 40, str(TINY)]
    assert capsys.readouterr().err == ""
    # they reach the run, and what it leaves to the next program
    flags = [*RL, "--epochs", 1, "--cold_start", other_cold, "--out_dir", tmp_path / "rl"]
    flags += ["--rewards", "clipscore"]  # the checker reads 32 pixels alone
    good(here(rtdmd_rl, *flags))
    left = checkpoint.settings_of(str(tmp_path / "rl/generator_ema.pt"))
    assert (left["program"], left["num_steps"], left["eta"]) == ("rtdmd_rl.py", 3, 0.7)
    assert (left["cfg"], left["resolution"], left["lora_alpha"]) == (3, 40, 64)


def test_a_flag_that_contradicts_stage_1_is_obeyed_and_said(other_cold, monkeypatch, capsys):
    more = ["--num_steps", 4, "--eta=0.9", "--cfg", 3]
    args = stage_2(monkeypatch, "--cold_start", other_cold, *more)
    assert [args[name] for name in ("num_steps", "eta", "cfg", "resolution")] == [4, 0.9, 3, 40]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert "--num_steps 4 is used" in notes[0]
    assert "made with num_steps 3" in notes[0]
    assert "--eta 0.9 is used" in notes[1]


def test_settings_of_another_machine_leave_the_preset_its_base_model(
    other_cold, monkeypatch, tmp_path
):
    out = shutil.copytree(other_cold, tmp_path / "cold")
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "pretrained": "/nowhere/tiny"}))
    args = stage_2(monkeypatch, "--cold_start", out)
    assert args["pretrained"] == str(TINY)
    assert args["num_steps"] == 3


def test_alpha_is_in_the_settings_where_the_checkpoint_is_gone(other_cold, tmp_path):
    """16, where 64 is what would be assumed; with neither file nothing says it."""
    out = shutil.copytree(other_cold, tmp_path / "cold")
    path = str(out / "generator_ema.pt")
    (out / "ckpt.pt").unlink()
    alpha = checkpoint.read_adapter(path).alpha
    assert alpha.value == 16
    assert alpha.source == str(out / "settings.json")
    (out / "settings.json").unlink()
    assert checkpoint.read_adapter(path).alpha is None


@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_the_parts_of_a_step_add_up_to_its_seconds(run, stage):
    parts = "text rollout fake rewards anchor last_step policy rest"
    if stage == "cold":
        parts = "text rollout fake generator rest"
    expected = {f"s_{part}" for part in parts.split()}
    lines = (getattr(run, stage) / "log.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        seconds = {name: value for name, value in line.items() if name.startswith("s_")}
        if stage == "cold" and line["step"] % 2 == 0:
            assert set(seconds) == expected - {"s_generator"}
        else:
            assert set(seconds) == expected
        assert min(seconds.values()) >= 0
        assert sum(seconds.values()) == pytest.approx(line["seconds"], abs=6e-4)
