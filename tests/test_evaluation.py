"""Held-out rewards and prompts, scored while stage 2 trains."""

from types import SimpleNamespace

import pytest

import rewards
import rtdmd_rl
import tiny
from helpers import (
    BASE,
    CPU,
    RL,
    TINY,
    good,
    here,
    log_of,
    same_files,
    tiny_args,
    tiny_base,
)


def test_held_out_rewards_are_logged_and_do_not_touch_the_run(run, tmp_path):
    flags = [
        *RL,
        "--cold_start",
        run.cold,
        "--eval_rewards",
        "judge,checker",
        "--reward_path",
        f"clipscore={TINY}/clip",
        "--reward_path",
        f"judge={TINY}/judge",
    ]
    good(
        here(
            rtdmd_rl,
            *flags,
            "--eval_every",
            2,
            "--out_dir",
            tmp_path,
            EVAL_IMAGES=7,
        )
    )
    assert same_files(tmp_path, run.rl)
    for line in log_of(tmp_path):  # after the first epoch and after every second
        assert -1 <= line["eval_judge"] <= 1 and line["eval_checker"] * 7 == pytest.approx(
            round(line["eval_checker"] * 7), abs=1e-5
        )
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"eval_1.png", "eval_2.png"}


def test_held_out_pictures_are_always_the_same_whatever_the_micro_batch_and_the_ranks(
    tmp_path, monkeypatch
):
    base, rows = tiny_base(), tiny.captions()[:7]
    judge = rewards.build("judge", CPU, [f"judge={TINY}/judge"])
    (tmp_path / "samples").mkdir()

    def evaluate(micro_batch=3, rank=None):
        args = tiny_args(
            micro_batch=micro_batch,
            num_steps=4,
            eta=0.9,
            low_memory=False,
            out_dir=str(tmp_path),
        )
        monkeypatch.setattr(
            rtdmd_rl,
            "dist",
            SimpleNamespace(
                is_initialized=lambda: rank is not None,
                get_rank=lambda: rank,
                get_world_size=lambda: 2,
            ),
        )
        rows_with = [{"prompt": row["prompt"], "metadata": row} for row in rows]
        return rtdmd_rl.evaluate(base, rows_with, judge, args, "eval")["eval_judge"]

    monkeypatch.setattr(rtdmd_rl, "all_reduce", lambda tensor: tensor)
    whole = evaluate()
    assert whole == evaluate() and abs(whole) > 0.01
    assert evaluate(rank=0) + evaluate(rank=1) == pytest.approx(whole, abs=1e-5) and evaluate(
        2
    ) == pytest.approx(whole, abs=1e-5)


def test_rewards_for_evaluation_refuse_bad_input_before_anything_is_drawn(run, tmp_path):
    (tmp_path / "plain.txt").write_text("a red circle\n\na cat\n")
    for program, flags, message in (
        (rtdmd_rl, ["--eval_rewards", "beauty"], "unknown reward 'beauty'"),
        (rtdmd_rl, ["--eval_rewards", "judge"], "judge"),
        (
            rtdmd_rl,
            ["--eval_rewards", "checker", "--eval_prompts", tmp_path / "plain.txt"],
            "'a cat'",
        ),
        (rtdmd_rl, ["--eval_every", 0], "--eval_every"),
        (rtdmd_rl, ["--reward_dtype", "int8"], "int8"),
    ):
        status, _, err = here(
            program,
            *BASE[:4],
            *(["--cold_start", run.cold] if program is rtdmd_rl else []),
            *flags,
            "--out_dir",
            tmp_path / "out",
        )
        assert status == 2 and err.count("\n") == 1 and message in err, err
