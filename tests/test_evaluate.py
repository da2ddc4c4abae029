"""tools.evaluate: pictures of student and teacher scored side by side, means with standard errors."""

import json
import math
import os
import re
import shlex

import pytest
import torch

import rewards
import sample
from gaussian import close
from helpers import BASE, TINY, good, here, listing, same_files, want
from small_rewards import one_reward
from tools import evaluate


def test_standard_errors_are_those_of_the_prompts_means():
    # prompts 1.5 and 4.5: std 2.12 / sqrt 2
    assert evaluate.mean_and_error([1.0, 2, 3, 6], ["a", "a", "b", "b"]) == pytest.approx((3, 1.5))
    assert evaluate.mean_and_error([1.0, 3], ["a", "a"]) == pytest.approx((2, 1))
    mean, error = evaluate.mean_and_error([1.0], ["a"])
    assert mean == 1
    assert math.isnan(error)
    assert evaluate.with_error(mean, error) == "1.0000"


def test_teacher_and_student_are_evaluated_side_by_side_on_the_same_prompts_and_seeds(
    run, tmp_path, monkeypatch
):
    """All rewards see the same pictures.

    geneval's verdict is replaced by one that can be foretold; its metadata is looked up.
    """
    rows = [
        {"prompt": f"a {c} {s}", "tag": tag, "include": [want("car", color=c)]}
        for c, s, tag in (
            ("red", "circle", "colors"),
            ("blue", "square", "colors"),
            ("green", "circle", "counting"),
        )
    ]
    prompts = tmp_path / "prompts.txt"
    metadata = tmp_path / "metadata.jsonl"
    prompts.write_text("".join(row["prompt"] + "\n" for row in rows[::-1]))
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def verdict(images, prompts, metadata):
        seen.append(images)
        right = [m["tag"] == "colors" and "red" in p for p, m in zip(prompts, metadata)]
        return torch.tensor(right).float()

    monkeypatch.setitem(rewards.REWARDS, "geneval", (lambda *_: verdict, False, ""))
    flags = [*BASE[:4], "--cold_start", run.cold, "--rtdmd", run.rl]
    flags += ["--prompts", prompts, "--metadata", metadata, "--num_images", 2, "--batch_size", 4]
    flags += ["--rewards", "clipscore,geneval", "--reward_path", f"clipscore={TINY}/clip"]
    status, out, err = here(evaluate, *flags, "--compare", "--out_dir", tmp_path / "out")
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["tag"], line["seed"], line["geneval"]) for line in lines] == [
        (row["prompt"], row["tag"], 2 * i + j, float("red" in row["prompt"]))
        for i, row in enumerate(rows[::-1])
        for j in (0, 1)
    ]
    clipscore = one_reward("clipscore", f"clipscore={TINY}/clip")
    texts = [line["prompt"] for line in lines]
    teachers = [line["teacher"] for line in lines]
    for images, written in zip(torch.cat(seen).split(6), (lines, teachers), strict=True):
        scores = torch.tensor([line["clipscore"] for line in written])
        close(clipscore(images, texts, [{}] * 6), scores, 1e-5)
    differences = [line["clipscore"] - line["teacher"]["clipscore"] for line in lines]
    assert max(map(abs, differences)) > 0.01
    assert "student - teacher" in out
    assert f"{sum(differences) / 6:.4f} +- " in out
    assert re.search(r"geneval colors +0\.5000 \+- 0\.5000", out)
    assert re.search(r"geneval counting +0\.0000", out)
    assert re.search(r"geneval, categories +0\.2500 +0\.2500 +0\.0000", out)
    assert re.search(r"geneval +0\.3333 \+- 0\.3333", out)
    # the pictures are those of sample.py: the student's, and with --teacher the teacher's
    names = [line["image"] for line in lines]
    weights = flags[: flags.index("--prompts")]
    weights += ["--prompts", prompts, "--num_images", 2, "--batch_size", 4, "--out_dir"]
    good(here(sample, *weights, tmp_path / "student"))
    good(here(sample, *weights, tmp_path / "teacher", "--teacher"))
    assert same_files(tmp_path / "student", tmp_path / "out", names)
    assert same_files(tmp_path / "teacher", tmp_path / "out/teacher", names)
    good(here(evaluate, *flags, "--teacher", "--out_dir", tmp_path / "alone"))
    first = json.loads((tmp_path / "alone/scores.jsonl").read_text().splitlines()[0])
    assert first["drawn_by"] == "teacher"
    assert first["clipscore"] == pytest.approx(teachers[0]["clipscore"], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("cat", "--rewards"),
        ("--rewards checker", "nothing to draw"),
        ("cat --rewards beauty", "clipscore"),
        ("cat --rewards checker:2", "names alone"),
        ("cat --teacher --rewards checker", "checker"),
        ("cat --rewards checker --compare --teacher", "--compare"),
        ("cat --rewards checker --reward_dtype int8", "int8"),
        ("--rewards checker --metadata {t}/none.jsonl", "none.jsonl"),
        ("--rewards checker --prompts {t}/plain.txt --metadata {t}/none.jsonl", "none.jsonl"),
        ("--rewards checker --prompts {t}/plain.txt --metadata {t}/m.jsonl", "line 3 ('a cat')"),
        ("'red circle' --rewards checker --cold_start {t}/none", "none"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_drawn(tmp_path, flags, message):
    (tmp_path / "plain.txt").write_text("a red circle\n\na cat\n")
    (tmp_path / "m.jsonl").write_text('{"prompt": "a red circle"}\n')
    flags = shlex.split(flags.format(t=tmp_path))
    nothing = [*BASE[:4], "--cold_start", "", "--rtdmd", "", "--out_dir", tmp_path / "out"]
    status, _, err = here(evaluate, *nothing, *flags)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert listing(tmp_path / "out") == {}


def test_a_file_where_the_teachers_pictures_would_go_is_left_alone(tmp_path):
    (tmp_path / "teacher").write_text("mine")
    nothing = [*BASE[:4], "--cold_start", "", "--rtdmd", "", "--out_dir", tmp_path]
    status, _, err = here(evaluate, *nothing, "a red circle", "--rewards", "checker", "--compare")
    assert status == 2
    assert err.count("\n") == 1
    assert f"{tmp_path}/teacher" in err
    assert os.listdir(tmp_path) == ["teacher"]
