"""The presets, the prompts that they train on, and what the pages say about both."""

import re
import signal
import sys
from pathlib import Path

import pytest

import cold_start
import rewards
import rtdmd_rl
import sample
from prompts import geneval_prompts, load_prompts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RECIPE = (ROOT / "docs/recipe.md").read_text()
REWARDS = (ROOT / "docs/rewards.md").read_text()
PROGRAMS = {"cold_start": cold_start, "rtdmd_rl": rtdmd_rl, "sample": sample}


def flags_of(program, *flags):
    """What a command line means, as a dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program}.py", *flags])
        # no run of stage 1 has to be there
        patch.setattr(rtdmd_rl, "find_weights", lambda *_, **__: "")
        args = PROGRAMS[program].arguments()
        return vars(sample.settled(args, {}) if program == "sample" else args)


# ---- presets
def test_sd3_medium_has_a_recipe_of_its_own_in_all_three_programs():
    for program in ("cold_start", "rtdmd_rl"):
        flags = flags_of(program, "--preset", "sd3m")
        assert (flags["resolution"], flags["cfg"]) == (1024, 7)
        assert flags["pretrained"] == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert (flags["prompts_per_epoch"], flags["group_size"]) == (32, 16)
    teacher = flags_of("sample", "a cat", "--preset", "sd3m", "--teacher")
    student = flags_of("sample", "a cat", "--preset", "sd3m")
    assert (teacher["resolution"], teacher["cfg"]) == (1024, 7)
    assert (student["resolution"], student["cfg"], student["steps"]) == (1024, 1, 4)
    assert "micro_batch" not in student


def test_what_sd3_mediums_recipe_does_not_name_is_as_for_sd35_medium():
    for program, own in (
        ("cold_start", {"preset", "pretrained", "resolution", "cfg"}),
        (
            "rtdmd_rl",
            {
                "preset",
                "pretrained",
                "resolution",
                "cfg",
                "prompts_per_epoch",
                "group_size",
            },
        ),
    ):
        ours, theirs = flags_of(program, "--preset", "sd3m"), flags_of(program)
        assert {name for name in ours if ours[name] != theirs[name]} == own
    assert (
        theirs["resolution"],
        theirs["cfg"],
        theirs["prompts_per_epoch"],
        theirs["group_size"],
    ) == (512, 4.5, 48, 24)


def preset_table():
    """The table of presets in docs/recipe.md -> [(program, flags of the row, the cell of each preset)]."""
    section = RECIPE.split("## The presets")[1].split("\n\nRank 32")[0]
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = lines
    presets = [name.strip("`") for name in head[1:]]
    assert presets == list(cold_start.PRESETS) == list(rtdmd_rl.PRESETS) == list(sample.PRESETS)
    for name, *cells in rows:
        program = "rtdmd_rl" if name.startswith("stage 2") else "cold_start"
        yield (
            program,
            re.findall(r"`--(\w+)`", name),
            dict(zip(presets, cells, strict=True)),
        )


def test_the_table_of_presets_says_what_the_presets_do():
    compared = 0
    for program, names, cells in preset_table():
        assert names
        for preset, cell in cells.items():
            flags = flags_of(program, "--preset", preset)
            written = cell.replace(" ", "").split("x")
            for name, value in zip(names, written, strict=True):
                assert float(value) == flags[name], (preset, name)
                compared += 1
    assert compared >= 100


def test_the_recipes_of_flux_differ_from_sd35_mediums_in_nothing_that_no_table_names():
    """docs/recipe.md: the table of presets, and that of FLUX's base models."""
    named = {name for _, names, _ in preset_table() for name in names}
    named |= {"preset", "pretrained", "generator_pretrained"}
    section = RECIPE.split("## FLUX")[1].split("\n## ")[0]
    for preset in ("flux1", "klein4b", "klein9b"):
        for program in ("cold_start", "rtdmd_rl"):
            ours, theirs = flags_of(program, "--preset", preset), flags_of(program)
            assert {name for name in ours if ours[name] != theirs[name]} <= named
            bases = [ours["pretrained"], ours["generator_pretrained"]]
            (row,) = [line for line in section.splitlines() if line.startswith(f"| `{preset}` |")]
            assert [base for base in bases if base] == re.findall(r"`(black-forest-labs/.*?)`", row)
        student = flags_of("sample", "a cat", "--preset", preset)
        teacher = flags_of("sample", "a cat", "--preset", preset, "--teacher")
        assert [student["pretrained"], student["generator_pretrained"]] == bases
        assert (student["cfg"], teacher["cfg"]) == (1, ours["cfg"])


# ---- prompts
class Started(Exception):
    """The model would be loaded now."""


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Start stage 1, up to where it would load its model -> what it said until then, on stderr."""

    def load_base(*_):
        raise Started

    def run(*flags):
        monkeypatch.setattr(
            sys,
            "argv",
            ["cold_start.py", "--device", "cpu", "--out_dir", str(tmp_path / "out"), *flags],
        )
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        with pytest.raises(Started):
            cold_start.main()
        for number, handler in before.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    monkeypatch.setattr(cold_start, "load_base", load_base)
    return run


@pytest.mark.parametrize("preset", ["sd35m", "sd3m"])
def test_stage_1_on_the_built_in_prompts_says_so_in_one_line_before_anything_is_loaded(
    start, preset
):
    (line,) = start("--preset", preset)
    assert (
        line.startswith("note: no --prompts")
        and "20000" in line
        and "GenEval" in line
        and "--prompts FILE" in line
    )
    assert "## The real recipe" in README and "The real recipe" in line


def test_stage_1_on_a_file_or_on_the_presets_own_prompts_says_nothing(start, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a castle in the sky\n")
    assert start("--prompts", str(file)) == []
    assert start("--preset", "tiny") == []
    assert len(start("--preset", "tiny", "--prompts", "")) == 1


def test_only_rank_0_says_it(monkeypatch, capsys):
    rows = geneval_prompts(6)
    args = type("args", (), {"prompts": ""})
    monkeypatch.setenv("RANK", "1")
    cold_start.note_templates(rows, args)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    cold_start.note_templates(rows, args)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_public_formats_are_read_as_they_are(tmp_path):
    """A prompt a line, as users write them, and GenEval's metadata in flow_grpo's training file."""
    text = tmp_path / "train.txt"
    text.write_bytes(
        '  a castle, by night ,\r\n\r\n"OPEN" on a sign\n{not json}\n\'caf\u00e9 \u2615\n'.encode()
    )
    rows = load_prompts(str(text))
    assert [r["prompt"] for r in rows] == [
        "a castle, by night ,",
        '"OPEN" on a sign',
        "{not json}",
        "'caf\u00e9 \u2615",
    ]
    assert [r["metadata"]["line"] for r in rows] == [1, 3, 4, 5]

    lines = (
        '{"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "tv", "count": 1, "position": ["above", 0]}],'
        ' "prompt": "a photo of a tv above a cup"}\n'
        '{"tag": "counting", "include": [{"class": "sheep", "count": 3}], "exclude": [{"class": "sheep", "count": 4}],'
        ' "prompt": "a photo of three sheep"}\n'
    )
    file = tmp_path / "train_metadata.jsonl"
    file.write_text(lines)
    rows = load_prompts(str(file))
    assert [r["prompt"] for r in rows] == ["a photo of a tv above a cup", "a photo of three sheep"]
    rewards.each([r["prompt"] for r in rows], [r["metadata"] for r in rows], rewards.geneval_wrong)
    assert (
        rows[0]["metadata"]["include"][1]["position"] == ["above", 0]
        and rows[1]["metadata"]["tag"] == "counting"
    )


def test_the_recipe_has_one_command_a_stage_with_the_public_places_of_its_prompts():
    for place in ("dataset/pickscore/train.txt", "dataset/geneval/train_metadata.jsonl"):
        assert f"https://raw.githubusercontent.com/yifan123/flow_grpo/main/{place}" in README
    for preset in ("", "--preset sd3m "):
        for program, prompts in (
            ("cold_start.py", "prompts/pickscore.txt"),
            ("rtdmd_rl.py", "prompts/geneval.jsonl"),
        ):
            command = f"    torchrun --nproc_per_node=8 {program} {preset}--prompts {prompts} "
            assert (README + RECIPE).count(command) == 1, command
    assert "--eval_rewards imagereward,geneval\n" in README
    assert re.search(
        r"tools\.evaluate .*--rewards clipscore,pickscore,hpsv2,geneval,geneval_soft", REWARDS
    )
