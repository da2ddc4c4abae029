"""Prompts of every kind are read, and the built-in ones have GenEval's form."""

import json
from collections import Counter

import rewards
import sample
import tiny
from helpers import BASE, TINY, good, here
from prompts import geneval_prompts, load_prompts
from tools import evaluate


def test_the_built_in_prompts_come_in_genevals_six_categories_with_genevals_metadata():
    rows = geneval_prompts(1200)
    assert rows == geneval_prompts(1200) and rows != geneval_prompts(1200, seed=1)
    assert sorted(Counter(r["metadata"]["tag"] for r in rows).items()) == sorted(
        (tag, 200) for tag in tiny.CATEGORIES
    )
    for row in rows:
        tag = row["metadata"]["tag"]
        include = row["metadata"]["include"]
        words = row["prompt"].split()
        assert row["prompt"].startswith("a photo of ")
        assert row["metadata"]["prompt"] == row["prompt"]
        assert (
            len(include)
            == len({o["class"] for o in include})
            == (2 if tag in ("two_object", "position", "color_attr") else 1)
        )
        for o in include:
            assert o["class"] in rewards.COCO and (
                tag == "counting" or o["count"] == 1 and o["class"] in row["prompt"]
            )
            assert ("color" in o) == (tag in ("colors", "color_attr")) and o.get(
                "color", "red"
            ) in rewards.COLORS
        assert [o["position"][1] for o in include if "position" in o] == [0] * (tag == "position")
        if tag == "counting":
            n = include[0]["count"]
            assert words[3] == tiny.NUMBERS[n] and row["metadata"]["exclude"] == [
                {"class": include[0]["class"], "count": n + 1}
            ]
        assert not [
            (a, b)
            for a, b in zip(words, words[1:])
            if a in ("a", "an") and (b[0] in "aeiou") != (a == "an")
        ]


# ---- prompts
def test_prompts_of_every_kind_are_read_and_what_is_cut_off_is_counted(tmp_path, capfd):
    """BOM, CRLF, blank lines, 10 000 characters, duplicates, emoji, right-to-left, what looks like a flag.

    All are drawn. One line each says how many are too long (tiny tokenizers know their world's words
    and spell out all others) and how many are repeated. There is no other line: diffusers would print
    the text that is cut off.
    """
    prompts = [
        "a red circle",
        "--seed",
        "-1",
        "🟥🔵 🏳️‍🌈",
        "دائرة حمراء",
        "a blue square " * 714 + "a",
        "a red circle",
        "x" * 10000,
    ]
    (tmp_path / "p.txt").write_bytes(("\ufeff" + "\r\n\r\n \r\n".join(prompts)).encode())
    (tmp_path / "p.jsonl").write_bytes(
        ("\ufeff" + "\r\n".join(json.dumps({"prompt": p}) for p in prompts)).encode()
    )
    assert [row["prompt"] for row in load_prompts(str(tmp_path / "p.txt"))] == prompts
    teacher = [*BASE[:4], "--cold_start", "", "--rtdmd", "", "--teacher", "--steps", 1]
    scored = ["--rewards", "clipscore", "--reward_path", f"clipscore={TINY}/clip"]
    drawn = ["--prompts", tmp_path / "p.jsonl", "--out_dir", tmp_path / "out"]
    status, _, err = here(evaluate, *teacher, *drawn, *scored)
    assert status == 0
    assert len(list((tmp_path / "out").glob("0*.png"))) == len(prompts)
    assert capfd.readouterr().err == ""
    assert err.splitlines() == [
        "note: 4 of 8 prompts are longer than CLIP's 10 or T5's 8 tokens: the rest is not read",
        "note: 1 of 8 prompts are repeated: each counts",
    ]
    assert [
        json.loads(line)["prompt"]
        for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()
    ] == prompts
    good(here(sample, *teacher, "--out_dir", tmp_path / "flag", "--", "--a red circle"))
