"""Troubles that users of such software run into: other platforms, other formats, one directory for all."""

import argparse
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cold_start
import common
import cps
import model
import pictures
import rtdmd_rl
import sample
from cps import cps_step
from helpers import (
    BASE,
    COLD,
    RL,
    ROOT,
    TINY,
    flags_of,
    good,
    here,
    load,
    log_of,
    on_a_gpu,
    same_files,
    shell,
    wait_for,
    watch_text,
)
from prompts import load_prompts
from rewards import quoted
from tools import evaluate

DRAW = ["a red circle", *BASE[:4]]
ONE_STEP = [*BASE, "--steps", 1, "--batch_size", 2, "--generator_every", 1]


# ---- prompts in any format -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, text, prompts",
    [
        ("a.json", '["a red circle", "a blue square"]', ["a red circle", "a blue square"]),
        ("a.json", '[{"prompt": "x", "tag": "y"}, "z"]', ["x", "z"]),
        ("a.json", '{"prompt": "one"}', ["one"]),
        ("a.txt", '{"prompt": "x"}\n\n{"prompt": "y"}\n', ["x", "y"]),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"}\n', ["x", "y"]),
        ("a.jsonl", '"x"\n{"prompt": "y"}\n', ["x", "y"]),
        ("a.txt", '"a quoted prompt"\n42\n[a] b\n', ['"a quoted prompt"', "42", "[a] b"]),
    ],
)
def test_prompts_are_understood_wherever_they_come_from(name, text, prompts, tmp_path):
    (tmp_path / name).write_text(text)
    assert [row["prompt"] for row in load_prompts(str(tmp_path / name))] == prompts


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.txt", 'a cat\n{"prompt": "x"}\n', "line 2"),
        ("a.txt", 'a cat\n["x", "y"]\n', "line 2"),
        ("a.json", '["x", 5]', "entry 2"),
        ("a.json", '["x", ', "is no JSON"),
        ("a.json", "[]", "is empty"),
        ("a.csv", "x,y", "a table is not read"),
        ("a.parquet", "x", "a table is not read"),
    ],
)
def test_a_line_of_another_format_is_refused_by_number(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("a '90s diner, the owners' neon sign says \"OPEN LATE\"", "OPEN LATE"),
        ("rock 'n' roll poster that says \"LIVE\"", "LIVE"),
        ("rock 'n' roll says 'X'", "X"),
        ("a '90s sign says 'GO'", "GO"),
        ("the dogs' sign: 'OK'", "OK"),
        ("a sign \u201cHI\u201d", "HI"),
        ("ein Schild \u201eHallo\u201c", "Hallo"),
        ("un panneau \u00abBonjour\u00bb", "Bonjour"),
        ("et skilt \u00bbHej\u00ab", "Hej"),
        ("\u300c\u958b\u5e97\u300d", "\u958b\u5e97"),
        ("the dog's own bowl", None),
    ],
)
def test_the_text_to_be_written_is_found_in_any_quotation_marks(prompt, text):
    assert quoted(prompt) == text


# ---- platforms -----------------------------------------------------------------------------------
def test_a_system_without_fallocate_and_sighup_trains(tmp_path, monkeypatch):
    """As macOS has no posix_fallocate, and Windows no SIGHUP."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(common, "SIGNALS", [signal.SIGTERM, signal.SIGINT])
    good(here(cold_start, *ONE_STEP, "--cache_text", "--out_dir", tmp_path / "out"))
    source = (ROOT / "common.py").read_text()
    assert "signal.SIGHUP" not in source  # only by name, where it is there


def test_a_reserved_file_has_its_size_and_keeps_its_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for with_fallocate in (True, False):
        if not with_fallocate:
            monkeypatch.delattr(os, "posix_fallocate")
        path.write_bytes(b"abc")
        common.reserve(str(path), 2**24 + 5)
        assert path.stat().st_size == 2**24 + 5
        assert path.read_bytes()[:3] == b"abc"


@pytest.mark.parametrize("missing", ["triton", "gcc", "Python.h"])
def test_what_the_compiler_needs_is_looked_for_before_the_model_is_loaded(
    missing, monkeypatch, capsys
):
    there = {name: name != missing for name in ("triton", "gcc", "Python.h")}
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: there["triton"] or None)
    monkeypatch.setattr(common.shutil, "which", lambda name: there["gcc"] or None)
    monkeypatch.setattr(common.os.path, "exists", lambda path: there["Python.h"])
    with pytest.raises(SystemExit) as end:
        common.check_compiler()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert missing in err
    assert "--compile 0" in err


def test_a_home_directory_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--preset", "tiny", "--reward_path", "judge=~/a=b"]
    paths = flags_of(rtdmd_rl, *flags, "--cold_start", str(TINY / "adapters/cold_start"))[
        "reward_path"
    ]
    assert paths[-1] == f"judge={tmp_path}/a=b"
    good(here(cold_start, *ONE_STEP, "--out_dir=~/run"))
    assert (tmp_path / "run/generator_ema.pt").exists()


# ---- several machines ----------------------------------------------------------------------------
def test_die_speaks_once_a_machine(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "16")
    for rank, local_rank, speaks in (("0", "0", 1), ("1", "1", 0), ("8", "0", 1), ("9", "1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            common.die("something")
        assert capsys.readouterr().err.count("something") == speaks


@pytest.mark.parametrize(
    "said",
    [
        {"WORLD_SIZE": ""},
        {"RANK": "1"},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"LOCAL_RANK": "-1"},
    ],
    ids=str,
)
def test_left_over_variables_of_a_cluster_are_refused(said, tmp_path, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    status, _, err = here(cold_start, *ONE_STEP, "--out_dir", tmp_path / "run")
    assert status == 2
    (line,) = err.splitlines()
    assert all(f"{name}={value}" in line for name, value in said.items())
    assert "torchrun" in line
    assert not (tmp_path / "run").exists()


def test_a_left_over_local_rank_does_not_silence_errors(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        common.die("something")
    assert "something" in capsys.readouterr().err


# ---- one directory, two runs ---------------------------------------------------------------------
@pytest.mark.skipif(common.fcntl is None, reason="no locks here")
def test_two_runs_cannot_train_into_one_directory(tmp_path):
    (tmp_path / "run").mkdir()
    common.lock(tmp_path / "run")
    try:
        status, _, err = shell(cold_start, *ONE_STEP, "--out_dir", tmp_path / "run")
    finally:
        common.unlock()
    assert status == 2
    assert "another run is writing to --out_dir" in err
    assert list((tmp_path / "run").iterdir()) == []
    status, _, err = shell(cold_start, *ONE_STEP, "--out_dir", tmp_path / "run")
    assert status == 0, err


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "flock", flock)
    good(here(cold_start, *ONE_STEP, "--out_dir", tmp_path))


@pytest.mark.parametrize("name", ["generator_ema.pt", "pytorch_lora_weights.safetensors"])
def test_a_new_run_does_not_replace_weights_that_it_did_not_make(name, tmp_path):
    (tmp_path / name).write_bytes(b"somebody's")
    status, _, err = here(cold_start, *ONE_STEP, "--out_dir", tmp_path)
    assert status == 2
    assert f"holds {name} and no ckpt.pt" in err
    assert (tmp_path / name).read_bytes() == b"somebody's"
    assert not (tmp_path / "settings.json").exists()
    (tmp_path / "ckpt.pt.tmp").write_bytes(b"killed while first saving")
    good(here(cold_start, *ONE_STEP, "--out_dir", tmp_path))


# ---- a terminal that goes ------------------------------------------------------------------------
def test_a_run_whose_terminal_went_finishes_saves_and_ends_well(tmp_path):
    """As when ssh breaks: stdout and stderr are a terminal that is closed, and SIGHUP comes."""
    pty = pytest.importorskip("pty")
    ours, its = pty.openpty()
    flags = [*BASE, "--steps", 100000, "--batch_size", 2, "--out_dir", tmp_path]
    command = [sys.executable, str(ROOT / "cold_start.py"), *map(str, flags)]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where these tests run under nohup, too
    run = subprocess.Popen(command, stdin=its, stdout=its, stderr=its)
    signal.signal(signal.SIGHUP, before)
    os.close(its)
    log = tmp_path / "log.jsonl"
    end = time.time() + 300
    try:
        while not log.exists() or log.read_bytes().count(b"\n") < 2:
            assert run.poll() is None
            assert time.time() < end
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 2**16)
        os.close(ours)
        run.send_signal(signal.SIGHUP)
        assert run.wait(120) == 0
    finally:
        run.kill()
    assert (tmp_path / "ckpt.pt").exists()


def test_a_pipe_that_nobody_reads_is_no_reason_to_stop(tmp_path):
    flags = [*ONE_STEP, "--out_dir", tmp_path]
    command = [sys.executable, str(ROOT / "cold_start.py"), *map(str, flags)]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, timeout=120)
    os.close(writes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt.pt").exists()


# ---- a GPU's memory ------------------------------------------------------------------------------
FULL = "torch.cuda.OutOfMemoryError('CUDA out of memory')"
OTHER = "RuntimeError('the recording failed')"


def said_of(program, flags, error, out_dir):
    """The last line of stderr of a program whose roll-out raises that error."""
    code = (
        f"import sys, torch, {program}\n"
        "def rollout(*inputs, **more):\n"
        f"    raise {error}\n"
        f"{program}.rollout = rollout\n"
        f"sys.argv[0] = '{program}.py'\n"
        f"{program}.main()\n"
    )
    command = [sys.executable, "-c", code, *map(str, flags), "--out_dir", str(out_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "program, flags, error, remedy",
    [
        ("cold_start", ONE_STEP, FULL, "give --low_memory, or --micro_batch"),
        ("cold_start", ONE_STEP, f"{OTHER} from {FULL}", "give --low_memory, or --micro_batch"),
        ("sample", DRAW, FULL, "give a smaller --batch_size"),
    ],
)
def test_a_full_gpu_is_said_in_the_last_line_with_what_to_do(
    program, flags, error, remedy, tmp_path
):
    """The traceback stays, since it tells which pass was too large."""
    last = said_of(program, flags, error, tmp_path)
    assert last.startswith(f"{program}.py: the GPU's memory is full: {remedy}")


def test_another_error_ends_with_its_own_words(tmp_path):
    assert said_of("cold_start", ONE_STEP, OTHER, tmp_path) == "RuntimeError: the recording failed"


# ---- signals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_texts_are_encoded_ends_the_program_at_once(name, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle {i}\n" for i in range(200000)))
    flags = [*ONE_STEP, "--prompts", prompts, "--cache_text", "--out_dir", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "cold_start.py", *map(str, flags)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "out/text.bin")
    time.sleep(1)
    start = time.time()
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert time.time() - start < 20
    assert process.returncode == 128 + getattr(signal, name)
    assert "stopped by a signal before the first step" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("listen", [common.listen_to_signals, lambda: common.end_on_signals("")])
def test_under_nohup_the_terminals_end_stays_ignored(listen):
    before = {number: signal.getsignal(number) for number in common.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
        assert callable(signal.getsignal(signal.SIGINT))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_other_code_makes_of_a_signal_is_not_told_as_bad_input(monkeypatch, capsys):
    """A SystemExit within a library's import comes out as "initialization failed"."""
    monkeypatch.setitem(common.stop, "ending", 143)
    with pytest.raises(SystemExit, match="143"):
        common.die("--pretrained there: cannot be loaded: initialization failed")
    assert capsys.readouterr().err == ""


# ---- one directory for several calls -------------------------------------------------------------
@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two calls into one directory -> it."""
    folder = tmp_path_factory.mktemp("drawn")
    good(here(sample, *DRAW, "--num_images", 3, "--out_dir", folder))
    flags = ["--num_images", 2, "--seed", 7, "--steps", 3, "--eta", 0.5, "--resolution", "32x48"]
    good(here(sample, "two bl\u00fce squares", *BASE[:4], *flags, "--out_dir", folder))
    return folder


def test_a_second_call_leaves_the_pictures_of_the_first(drawn):
    names = sorted(path.name for path in drawn.glob("*.png"))
    assert names == [*(f"{i:05d}.png" for i in range(5)), "grid.png"]
    assert Image.open(drawn / "00004.png").size == (48, 32)


def test_numbers_go_on_beyond_five_digits(tmp_path):
    for name in ("00007.png", "100000.png", "grid.png", "1.png"):
        (tmp_path / name).touch()
    assert sample.next_number(str(tmp_path)) == 100001
    assert sample.next_number(str(tmp_path / "none")) == 0


@pytest.mark.parametrize("name", ["grid.png", "grid.png.tmp"])
def test_a_directory_where_the_grid_would_go_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    status, _, err = here(sample, *DRAW, "--out_dir", tmp_path)
    assert status == 2
    assert err.endswith(f"{name}: a directory of that name is there; move it away\n")
    assert (tmp_path / "00000.png").exists()


def test_a_picture_carries_what_it_takes_to_draw_it_again(drawn):
    _, text = pictures.read_picture(drawn / "00004.png")
    assert text["prompt"] == "two bl\u00fce squares"
    expected = {"seed": "8", "steps": "3", "eta": "0.5", "resolution": "32x48", "guidance": "1.0"}
    assert {name: text[name] for name in expected} == expected
    assert not any(os.sep in value for value in text.values())


@pytest.mark.parametrize("number", range(5))
def test_like_draws_a_picture_again_to_the_byte(number, drawn, tmp_path):
    path = drawn / f"{number:05d}.png"
    good(here(sample, "--like", path, *BASE[:4], "--out_dir", tmp_path))
    assert (tmp_path / "00000.png").read_bytes() == path.read_bytes()


@on_a_gpu
def test_on_a_gpu_like_draws_a_picture_again_to_the_byte(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    flags = ["--preset", "tiny", "--device", "cuda"]
    good(here(sample, "--prompts", tmp_path / "prompts.txt", *flags, "--out_dir", tmp_path / "one"))
    path = tmp_path / "one/00002.png"
    good(here(sample, "--like", path, *flags, "--out_dir", tmp_path / "two"))
    assert (tmp_path / "two/00000.png").read_bytes() == path.read_bytes()


def test_like_reads_the_prompt_as_often_as_there_were_pictures_at_once(
    drawn, tmp_path, monkeypatch
):
    """The encoders' sums of another number of prompts may be rounded otherwise."""
    read = watch_text(monkeypatch)
    good(here(sample, "--like", drawn / "00004.png", *BASE[:4], "--out_dir", tmp_path))
    assert read == [["two bl\u00fce squares"] * 2]


@pytest.mark.parametrize("program", [sample, evaluate])
def test_pictures_that_are_not_finite_are_not_written(program, tmp_path, monkeypatch):
    """Nor are they scored: as a file such a picture is black."""
    decode = model.BaseModel.decode
    monkeypatch.setattr(model.BaseModel, "decode", lambda *inputs: decode(*inputs) * torch.nan)
    flags = [*SCORE, "a red circle"] if program is evaluate else DRAW
    status, _, err = here(program, *flags, "--out_dir", tmp_path)
    assert status == 1
    assert "pictures are not finite" in err
    assert not list(tmp_path.glob("*.png"))


def test_like_draws_the_teachers_pictures_too(tmp_path):
    flags = [*DRAW, "--teacher", "--steps", 2, "--num_images", 2]
    good(here(sample, *flags, "--out_dir", tmp_path / "one"))
    path = tmp_path / "one/00001.png"
    good(here(sample, "--like", path, *BASE[:4], "--out_dir", tmp_path / "two"))
    assert (tmp_path / "two/00000.png").read_bytes() == path.read_bytes()


def of_another_step(x, v, s, t, eta, noise):
    x_next, mean, std = cps_step(x, v, s, t, eta, noise)
    return x_next + 0.01, mean, std


def test_like_refuses_another_sampler(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(cps, "cps_step", of_another_step)
    status, _, err = here(sample, "--like", drawn / "00000.png", *BASE[:4], "--out_dir", tmp_path)
    assert status == 2
    assert "drawn by another sampler" in err
    assert not list(tmp_path.glob("*.png"))


def test_like_takes_pictures_of_before_the_sampler_was_in_them(drawn, tmp_path):
    picture, text = pictures.read_picture(drawn / "00000.png")
    del text["sampler"]
    pictures.save_pictures([picture], [str(tmp_path / "old.png")], [text])
    good(here(sample, "--like", tmp_path / "old.png", *BASE[:4], "--out_dir", tmp_path / "out"))
    again, _ = pictures.read_picture(tmp_path / "out/00000.png")
    assert torch.equal(again, picture)


def test_like_refuses_other_weights_and_other_pictures(drawn, tmp_path):
    like = ["--like", drawn / "00000.png", *BASE[:4], "--out_dir", tmp_path]
    status, _, err = here(sample, *like, "--rtdmd", "")
    assert status == 2
    assert "was drawn with adapters cold_start" in err
    status, _, err = here(sample, "--like", drawn / "grid.png", *like[2:])
    assert status == 2
    assert "is no picture of sample.py" in err
    status, _, err = here(sample, "--like", tmp_path / "none.png", *like[2:])
    assert status == 2
    assert "cannot be read" in err
    whole = (drawn / "00000.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zeros.png").write_bytes(whole[:-60] + bytes(60))
    for name in ("half.png", "zeros.png"):
        status, _, err = here(sample, "--like", tmp_path / name, *like[2:])
        assert status == 2
        assert len(err.strip().splitlines()) == 1
        (tmp_path / name).unlink()
    for more in (["a prompt"], ["--steps", 3], ["--num_images", 2]):
        status, _, err = here(sample, *more, *like)
        assert status == 2
        assert "leave out" in err
    assert not list(tmp_path.glob("*.png"))


def test_kept_files_drawn_again_give_the_runs_own_pictures(tmp_path):
    flags = [*BASE[:4], "--steps", 2, "--batch_size", 4, "--generator_every", 1, "--lr", 0.01]
    run = ["--sample_every", 1, "--keep_every", 1, "--ema", 0, "--out_dir", tmp_path / "run"]
    good(here(cold_start, *flags, *run))
    rows = load_prompts(cold_start.PRESETS["tiny"]["prompts"])
    for step in (1, 2):
        base = model.BaseModel(str(TINY), torch.device("cpu"), 32)
        base.load_adapter("generator", str(tmp_path / f"run/generator_ema_{step}.pt"))
        args = argparse.Namespace(num_steps=4, eta=0.9, seed=0, out_dir=str(tmp_path))
        (tmp_path / "samples").mkdir(exist_ok=True)
        model.preview(base, ["generator"], rows, args, "again")
        again = (tmp_path / "samples/again.png").read_bytes()
        assert again == (tmp_path / f"run/samples/step_{step}.png").read_bytes()


# ---- evaluation ----------------------------------------------------------------------------------
SCORE = [
    *BASE[:4], "--rewards", "clipscore", "--reward_path", f"clipscore={TINY}/clip",
    "--num_images", 3, "--batch_size", 4,
]  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A finished evaluation -> (flags, its directory)"""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "prompts.txt").write_text("a red circle\na blue square\ntwo circles\n")
    flags = [*SCORE, "--prompts", folder / "prompts.txt"]
    good(here(evaluate, *flags, "--out_dir", folder / "out"))
    return flags, folder / "out"


def test_several_processes_give_the_scores_of_one(scored, tmp_path):
    flags, one = scored
    status, out, err = shell(evaluate, *flags, "--out_dir", tmp_path, processes=2)
    assert status == 0, err
    assert (tmp_path / "scores.jsonl").read_bytes() == (one / "scores.jsonl").read_bytes()
    names = [f"{i:05d}.png" for i in range(9)]
    assert same_files(tmp_path, one, [*names, "grid.png"])
    assert out.count("clipscore") == 1


def test_an_evaluation_draws_what_is_missing(scored, tmp_path, monkeypatch):
    flags, one = scored
    shutil.copytree(one, tmp_path / "out")
    (tmp_path / "out/00005.png").write_bytes(b"half a picture")  # of the second batch of three
    calls = []
    draw_batch = sample.draw_batch

    def counted(*inputs):
        calls.append(1)
        return draw_batch(*inputs)

    monkeypatch.setattr(sample, "draw_batch", counted)
    good(here(evaluate, *flags, "--out_dir", tmp_path / "out"))
    assert len(calls) == 1
    assert same_files(tmp_path / "out", one, ["scores.jsonl", "00005.png", "grid.png"])
    # another seed is another picture
    good(here(evaluate, *flags, "--seed", 1, "--out_dir", tmp_path / "out"))
    assert len(calls) == 4
    # and so is another sampler's
    monkeypatch.setattr(cps, "cps_step", of_another_step)
    good(here(evaluate, *flags, "--seed", 1, "--out_dir", tmp_path / "out"))
    assert len(calls) == 7


# ---- a new run from another one's weights --------------------------------------------------------
@pytest.mark.parametrize("stage", ["cold", "rl"])
def test_a_run_may_begin_with_another_ones_weights(stage, run, tmp_path):
    source = run.cold if stage == "cold" else run.rl
    if stage == "cold":
        program, flags = cold_start, [*COLD, "--lr", 0, "--fake_lr", 0, "--steps", 1]
    else:
        program, flags = rtdmd_rl, [*RL, "--cold_start", run.cold, "--lr", 0, "--fake_lr", 0]
        flags += ["--epochs", 1]
    out = tmp_path / "out"
    status, _, err = here(program, *flags, "--start_from", source, "--out_dir", out)
    assert status == 0, err
    assert "begins with the weights of" in err
    assert "--lr" in err
    before, after = load(source / "ckpt.pt"), load(out / "ckpt.pt")
    for name in ("generator", "fake"):
        assert all(map(torch.equal, before[name], after[name]))
    if stage == "cold":  # its average goes on from the other run's
        expected = torch._foreach_lerp(before["ema"], before["generator"], 1 - 0.99)
        assert all(map(torch.allclose, expected, after["ema"]))
        assert not all(map(torch.equal, before["ema"], before["generator"]))
    assert after["step"] == 1
    settings = json.loads((out / "settings.json").read_text())
    origin = settings["started_from"]
    assert origin["run_id"] == json.loads((source / "settings.json").read_text())["run_id"]
    assert origin["step"] == before["step"]
    assert settings["command"].startswith(f"{program.__name__}.py")
    good(here(program, *flags, "--out_dir", tmp_path / "without"))
    without = json.loads((tmp_path / "without/settings.json").read_text())
    assert len({settings["run_id"], origin["run_id"], without["run_id"]}) == 3
    assert [line["step"] for line in log_of(out)] == [0]


def test_a_run_that_began_so_goes_on_to_the_byte(run, tmp_path):
    flags = [*COLD, "--start_from", run.cold, "--lr", 1e-4]
    good(here(cold_start, *flags, "--out_dir", tmp_path / "whole"))
    good(here(cold_start, *flags, "--steps", 2, "--out_dir", tmp_path / "parts"))
    good(here(cold_start, *flags, "--out_dir", tmp_path / "parts"))
    assert same_files(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lora_rank", 8], "its lora_rank is 32, not 8"),
        (["--lora_alpha", 8], "its lora_alpha is 64"),
        (["--start_from", "/nowhere"], "no such file"),
    ],
)
def test_weights_that_do_not_fit_are_refused(flags, words, run, tmp_path):
    words_before = [*COLD, "--start_from", run.cold]
    status, _, err = here(cold_start, *words_before, *flags, "--out_dir", tmp_path / "out")
    assert status == 2
    assert words in err
    assert not (tmp_path / "out/settings.json").exists()


def test_other_flags_are_refused_with_the_way_to_go_on(run, tmp_path):
    shutil.copytree(run.cold, tmp_path / "run")
    status, _, err = here(cold_start, *COLD, "--lr", 0.5, "--out_dir", tmp_path / "run")
    assert status == 2
    assert "--start_from" in err


# ---- height x width ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, value", [("512", 512), ("512x512", 512), ("768x512", "768x512"), ("32X48", "32x48")]
)
def test_resolutions(text, value):
    assert common.resolution(text) == value
    height, width = common.sides(value)
    assert (height, width) == tuple(
        int(side) for side in (text.lower() + "x" + text).split("x")[:2]
    )


@pytest.mark.parametrize("text", ["", "x", "512x", "x512", "1x2x3", "-32", "3.5", "0x32", "a"])
def test_a_resolution_that_is_none(text, tmp_path):
    flags = [f"--resolution={text}", "--out_dir", tmp_path / "out"]
    status, _, err = here(cold_start, *ONE_STEP, *flags)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_not_square_keep_their_shape(tmp_path):
    """Training, its previews, the settings, drawing, and stage 2."""
    flags = [*ONE_STEP, "--sample_every", 1, "--resolution", "32x48"]
    good(here(cold_start, *flags, "--out_dir", tmp_path / "cold"))
    assert Image.open(tmp_path / "cold/samples/step_1.png").size == (8 * 64, 43)
    draw = [*DRAW, "--cold_start", tmp_path / "cold", "--rtdmd", "", "--out_dir", tmp_path / "s"]
    good(here(sample, *draw))
    assert Image.open(tmp_path / "s/00000.png").size == (48, 32)
    flags = [*BASE, "--epochs", 1, "--prompts_per_epoch", 1, "--group_size", 2]
    flags += ["--cold_start", tmp_path / "cold", "--rewards", "clipscore"]
    good(here(rtdmd_rl, *flags, "--out_dir", tmp_path / "rl"))
    assert json.loads((tmp_path / "rl/settings.json").read_text())["resolution"] == "32x48"


# ---- Weights & Biases ----------------------------------------------------------------------------
def test_a_run_that_goes_on_does_so_on_the_board_with_its_pictures(tmp_path, monkeypatch):
    calls = []
    logged = []
    board = SimpleNamespace(log=lambda line, step: logged.append((step, line)))

    def init(**options):
        calls.append(options)
        return board

    fake = SimpleNamespace(init=init, Image=lambda path: f"picture {path}")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = [*ONE_STEP, "--sample_every", 1, "--wandb", "project", "--out_dir", tmp_path / "out"]
    good(here(cold_start, *flags))
    good(here(cold_start, *flags, "--steps", 2))
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[0]["resume"] == "allow"
    pictures = [line["samples"] for _, line in logged if "samples" in line]
    assert [os.path.basename(picture) for picture in pictures] == ["step_1.png", "step_2.png"]
    # a new run in another place is another one
    good(here(cold_start, *flags[:-1], tmp_path / "other"))
    assert calls[2]["id"] != calls[0]["id"]


# ---- adapters that are merged into the base ------------------------------------------------------
def test_a_merged_base_draws_with_its_settings(tmp_path):
    shutil.copytree(TINY, tmp_path / "merged", ignore=shutil.ignore_patterns("adapters"))
    settings = {"num_steps": 2, "eta": 0.5, "resolution": 32, "pretrained": None, "cfg": 2.0}
    (tmp_path / "merged/settings.json").write_text(json.dumps(settings))
    flags = ["--pretrained", tmp_path / "merged", "--cold_start", "", "--rtdmd", ""]
    good(here(sample, *DRAW, *flags, "--out_dir", tmp_path / "out"))
    _, text = pictures.read_picture(tmp_path / "out/00000.png")
    assert (text["steps"], text["eta"]) == ("2", "0.5")


def test_a_file_missing_on_one_of_two_machines_is_said_there(tmp_path):
    """Two simulated nodes; the second has no prompts."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for node, name in enumerate(("prompts.txt", "missing.txt")):
        torchrun = [
            Path(sys.executable).with_name("torchrun"), "--nnodes=2", "--nproc_per_node=1",
            f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
        ]  # fmt: skip
        flags = [*ONE_STEP, "--prompts", tmp_path / name, "--out_dir", tmp_path / "out"]
        command = map(str, [*torchrun, "cold_start.py", *flags])
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(list(command), cwd=ROOT, **options))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "cold_start.py: error: cannot read --prompts" in outputs[1]
    assert "cold_start.py: error: lost the other processes" in outputs[0]
    assert not (tmp_path / "out/ckpt.pt").exists()


# ---- what a newcomer met -------------------------------------------------------------------------
def test_weights_of_the_other_stage_are_refused(run, tmp_path):
    for flag, folder, program in (
        ("--cold_start", run.rl, "rtdmd_rl.py"),
        ("--rtdmd", run.cold, "cold_start.py"),
    ):
        other = {"--cold_start": "--rtdmd", "--rtdmd": "--cold_start"}[flag]
        status, _, err = here(sample, *DRAW, flag, folder, other, "", "--out_dir", tmp_path / "out")
        assert status == 2
        assert f"was trained by {program}" in err
        assert other in err


def test_like_finds_the_base_that_the_run_was_made_with(run, tmp_path):
    weights = ["--device", "cpu", "--cold_start", run.cold, "--rtdmd", run.rl]
    good(here(sample, "a red circle", *weights, "--out_dir", tmp_path))
    good(here(sample, "--like", tmp_path / "00000.png", *weights, "--out_dir", tmp_path))
    one, two = ((tmp_path / name).read_bytes() for name in ("00000.png", "00001.png"))
    assert one == two


def test_a_refused_command_leaves_no_folder(tmp_path):
    flags = [*ONE_STEP, "--prompts", tmp_path / "missing.txt", "--out_dir", tmp_path / "out"]
    status, _, _ = shell(cold_start, *flags)
    assert status == 2
    assert not (tmp_path / "out").exists()


def test_an_entry_of_a_list_is_named_as_one(tmp_path, run):
    (tmp_path / "p.json").write_text('["a circle", "a cat"]')
    flags = [*BASE, "--epochs", 1, "--cold_start", run.cold, "--prompts", tmp_path / "p.json"]
    status, _, err = here(rtdmd_rl, *flags, "--out_dir", tmp_path / "out")
    assert status == 2
    assert "entry 2 ('a cat')" in err
    assert "leave it out of the rewards" in err


def test_a_signal_ends_an_evaluation_with_one_line(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    flags = [*SCORE[:-4], "--num_images", 4000, "--prompts", tmp_path / "p.txt"]
    flags += ["--out_dir", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.evaluate", *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "out/00010.png")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "the same command draws and scores what is missing" in err
    assert "Traceback" not in err


def test_pictures_that_are_not_scored_are_said(scored, tmp_path):
    flags, one = scored
    shutil.copytree(one, tmp_path / "out")
    status, _, err = here(evaluate, *flags, "--num_images", 1, "--out_dir", tmp_path / "out")
    assert status == 0
    assert "holds 6 pictures of an earlier call" in err


def test_a_few_step_generator_as_the_teacher_is_said(tmp_path):
    shutil.copytree(TINY, tmp_path / "merged", ignore=shutil.ignore_patterns("adapters"))
    (tmp_path / "merged/settings.json").write_text("{}")
    flags = [*ONE_STEP, "--pretrained", tmp_path / "merged", "--out_dir", tmp_path / "out"]
    status, _, err = here(cold_start, *flags)
    assert status == 0
    assert "is a few-step generator" in err
