"""What was achieved: scoreboard, diversity, figures, ablations, held-out prompts."""

import copy
import json
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cold_start
import report
import rewards
import rtdmd_rl
import sample
import tiny
from gaussian import close
from helpers import (
    BASE,
    CPU,
    README,
    RL,
    TINY,
    good,
    here,
    listing,
    load,
    log_of,
    same_files,
    shell,
    tiny_args,
    tiny_base,
)


@pytest.fixture
def quick(tiny_parts, monkeypatch):
    """Loading the tiny model takes longer than the runs below: it is loaded once."""
    for module in (cold_start, rtdmd_rl, report):
        monkeypatch.setattr(module, "load_pipeline", lambda *_: copy.deepcopy(tiny_parts[1]))
    clips = rewards.build(
        "clipscore,judge", torch.device("cpu"), [f"clipscore={TINY}/clip", f"judge={TINY}/judge"]
    )
    monkeypatch.setattr(report, "build", lambda *_: clips)
    monkeypatch.setattr(rtdmd_rl, "build", lambda *_: clips[:1])


ABLATIONS = "--ablations table3,table4,fake --device cpu --jobs 1 --steps 1 --epochs 1 --batch 4 --pictures 1 --seeds".split()


def test_all_ablations_at_a_size_of_nothing(quick, tmp_path, monkeypatch):
    """The whole command with one step a run: every row of every table has its numbers, from files; a second call trains nothing, a second
    seed only itself, a failed run costs its own rows; sizes do not mix."""
    where = ["--out_dir", tmp_path]
    good(here(report, *ABLATIONS, 1, *where))
    files = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*_seed0.json")}
    assert {f["run"] for f in files.values()} == {
        run for t in ("table3", "table4", "fake") for run, _ in report.TABLES[t].values()
    } | {"reference"}
    for table in ("table3", "table4", "fake"):
        head, _, *rows, last = [
            line.split(" | ")
            for line in (tmp_path / f"{table}.md").read_text().split("\n\n")[0].splitlines() + [""]
        ]
        assert [row[0].strip("| ") for row in rows] == list(report.TABLES[table]) and all(
            len(row) == len(head) and "" not in row[:-1] for row in rows
        )
    row = (tmp_path / "table4.md").read_text().splitlines()[3].split(" | ")
    assert row[0] == "| GRPO" and row[1:3] == [
        f"{100 * files['2_subset_3_det_weight_0_seed0']['numbers']['checker']:.3g}",
        f"{files['2_subset_3_det_weight_0_seed0']['numbers']['clipscore']:.3g}",
    ]
    before, trained = listing(tmp_path), []
    monkeypatch.setattr(
        report,
        "train_and_score",
        lambda args, run, seed, device: (
            trained.append((run, seed))
            or (files["fake_0_seed0"]["numbers"] if run[0] in "fr" else files["1_seed0"]["numbers"])
            if run != "2 --subset 1"
            else 1 / 0
        ),
    )
    good(here(report, *ABLATIONS, 1, *where))
    assert trained == [] and listing(tmp_path) == before
    status, _, err = here(report, *ABLATIONS, 2, *where)
    assert (
        status == 0
        and {seed for _, seed in trained} == {1}
        and trained[0] == ("1", 1)
        and len(trained) == len(files) - 3
    )
    assert err.count("failed") == 1 and "2 --subset 1, seed 1: failed" in err
    assert (
        "2 seeds" in (tmp_path / "table3.md").read_text()
        and "1 seeds" in (tmp_path / "table4.md").read_text()
    )  # balanced, or not at all
    status, _, err = here(report, *ABLATIONS, 1, *where, "--batch", 2)
    assert status == 2 and err.count("\n") == 1 and "another size" in err


def test_several_processes_share_the_list_of_runs_and_stop_in_time(tmp_path):
    """Real processes: no run twice, nothing half-written, and 0.05 minutes are over before anything could be trained."""
    status, out, err = shell(
        report,
        "--ablations",
        "table3",
        *ABLATIONS[2:],
        1,
        "--jobs",
        2,
        "--minutes",
        0.05,
        "--out_dir",
        tmp_path,
    )
    assert (
        status == 0
        and "9 runs, 2 at a time on cpu" in out
        and "0 seeds" in (tmp_path / "table3.md").read_text()
    ), err
    finished = list(tmp_path.glob("*.json"))
    assert all(json.loads(p.read_text()) for p in finished)


def test_the_scoreboard_and_the_curves_of_a_run(run, quick, tmp_path):
    for stage in ("cold_start", "rtdmd"):
        shutil.copytree(run.cold if stage == "cold_start" else run.rl, tmp_path / stage)
    with open(tmp_path / "rtdmd/log.jsonl", "a") as f:
        f.write('{"step": 2, "re')  # a run that is still going on
    status, out, err = here(report, tmp_path, "--device", "cpu", "--pictures", 1)
    assert status == 0 and [line.split(" | ")[0] for line in out.splitlines()[2:7]] == [
        "| teacher",
        "| teacher",
        "| teacher, no CFG",
        "| AC-DMD",
        "| RTDMD",
    ], err
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["pictures_per_row"] == 6 and [row["NFE"] for row in result["rows"]] == [
        100,
        8,
        4,
        4,
        4,
    ]
    assert all(0 <= row["checker"] <= 1 and -1 <= row["judge"] <= 1 for row in result["rows"])
    good(here(report, "--curves", tmp_path / "cold_start", tmp_path / "rtdmd"))
    curves = Image.open(tmp_path / "cold_start/curves.png")
    used = {color for _, color in curves.convert("RGB").getcolors(10**6)}
    assert (
        Image.open(tmp_path / "report.png").size == (130 + 18 * 66, 60 + 5 * 66 + 200)
        and set(report.PALETTE[:2]) <= used
    )


def test_the_figures_of_the_readme(run, quick, tmp_path, monkeypatch):
    x, t = (
        torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_(),
        0.6,
    )  # first: is the velocity of two modes what Eq. 2 says?
    density = torch.stack(
        [
            torch.distributions.Normal(
                (1 - t) * m, ((1 - t) ** 2 * 0.15**2 + t**2) ** 0.5
            ).log_prob(x)
            for m in (-1, 1)
        ]
    ).logsumexp(0)
    (score,) = torch.autograd.grad(density.sum(), x)
    close(report.exact_velocity(x.detach(), t), (-x - t * score).detach() / (1 - t), 1e-6)
    (
        shutil.copytree(run.cold, tmp_path / "run/cold_start"),
        shutil.copytree(run.rl, tmp_path / "run/rtdmd"),
    )
    monkeypatch.setattr(report, "captions", lambda *_: tiny.captions("train")[:5])
    status, out, err = here(
        report, tmp_path / "run", "--device", "cpu", "--figures", tmp_path / "new/figures"
    )
    assert (
        status == 0
        and out.count("std within a group") == 4
        and "correlation of start and end" in out
    ), err
    assert {p.name for p in (tmp_path / "new/figures").iterdir()} == {
        "sampler.png",
        "subgrpo.png",
        "subinterval.png",
    } and not (tmp_path / "run/report.json").exists()
    measured = re.findall(
        r"t = ([\d.]+): std exact ([\d.]+), printed ([\d.]+), true ([\d.]+); of the noise in it ([\d.]+), ([\d.]+), ([\d.]+)",
        out,
    )
    assert [float(line[0]) for line in measured] == [0.55, 0.75, 0.95]
    for t, exact, printed, true, *noise in [
        map(float, line) for line in measured
    ]:  # the true marginal, and App. B's, worked out by hand
        a, b, data = (1 - t) / 0.5, (t - 0.5) / 0.5, 1 + 0.15**2
        assert (exact, true, noise[0], noise[2]) == pytest.approx(
            (((1 - t) ** 2 * data + t**2) ** 0.5,) * 2 + (t, t), abs=0.003
        )
        assert (printed, noise[1]) == pytest.approx(
            (((1 - t) ** 2 * data + a**2 * 0.25 + b**2) ** 0.5, (a**2 * 0.25 + b**2) ** 0.5),
            abs=0.003,
        )
        assert all(
            f".{1000 * x:.0f}" in README.split("### App. B, D")[1].split("###")[0]
            for x in (exact, printed, true)
        )
    picture = Image.open(tmp_path / "new/figures/subinterval.png").convert("RGB")
    for i in range(4):  # every panel has its curves, of which the true one may hide the exact one
        used = {
            color
            for _, color in picture.crop((250 * i + 46, 70, 250 * i + 248, 240)).getcolors(10**6)
        }
        assert used >= set(report.PALETTE[1:3]) and (i == 0 or report.PALETTE[0] in used)
    assert here(report, "--figures", tmp_path / "none")[0] == 2 and not (tmp_path / "none").exists()


def test_the_figure_of_hacking(run, quick, tmp_path):
    """A row for the cold start and one for each run: one whose adapter is 0 gives the cold start's pictures and numbers, a trained one others."""
    shutil.copytree(run.cold, tmp_path / "run/cold_start")
    for name, scale in (("nothing", 0), ("much", 300)):
        shutil.copytree(run.rl, tmp_path / name)
        torch.save(
            {
                k: v * scale if "lora_B" in k else v
                for k, v in load(run.rl / "generator_ema.pt").items()
            },
            tmp_path / name / "generator_ema.pt",
        )
    flags = [
        tmp_path / "run",
        "--device",
        "cpu",
        "--pictures",
        9,
        "--figures",
        tmp_path,
        "--runs",
        tmp_path / "nothing",
        tmp_path / "much",
    ]
    status, out, err = here(report, *flags)
    assert status == 0 and not (tmp_path / "sampler.png").exists(), err
    rows = dict(line.split(": ") for line in out.splitlines())
    assert (
        list(rows) == ["cold start", "nothing", "much"]
        and rows["nothing"] == rows["cold start"] != rows["much"]
    )
    assert all(
        re.fullmatch(
            r"CLIPScore -?\d\.\d{3}, checker [\d.]+ %, judge -?\d\.\d{3}, colour bits [\d.]+", row
        )
        for row in rows.values()
    )
    picture = Image.open(tmp_path / "hacking.png").convert("RGB")
    first, nothing, much = (
        picture.crop((0, y + 19, picture.width, y + 59)).tobytes() for y in (28, 92, 156)
    )
    assert picture.size == (988, 28 + 3 * 64) and first == nothing != much
    assert all(
        len(set(picture.crop((x, 47, x + 38, 85)).tobytes())) > 20 for x in (0, 334, 668)
    )  # pictures of each caption
    ckpt = load(tmp_path / "much/ckpt.pt")
    ckpt["flags"]["pretrained or cold_start content"] = "another"
    torch.save(ckpt, tmp_path / "much/ckpt.pt")
    status, _, err = here(report, *flags)
    assert status == 2 and "one and the same stage 1" in err and err.count("\n") == 1


def test_the_scoreboards_captions_are_the_same_for_any_number_of_pictures():
    rows = report.report_captions(72)
    assert [r["tag"] for r in rows[::72]] == tiny.CATEGORIES and all(
        n % 72 == 0 or 72 % n == 0 for n in Counter(r["prompt"] for r in rows).values()
    )
    assert {r["prompt"] for r in rows} == {r["prompt"] for r in tiny.captions("test")}


def test_diversity_is_2_bits_of_colour_and_the_distance_where_all_differs():
    """One caption, four pictures in the four colours in four cells, and the same picture four times."""
    row, cells = (
        {"prompt": "a circle", "include": [{"class": "circle", "count": 1}]},
        ((5, 5), (16, 5), (5, 16), (28, 28)),
    )
    differ = [[("circle", color, x, y, 1.0)] for color, (x, y) in zip(tiny.COLORS, cells)]
    distance, colors, places = report.diversity([row] * 4, torch.eye(4), differ)
    assert (
        distance == pytest.approx(2**0.5) and colors > 10 and places > 10
    )  # no two agree: -log2 of the 1e-6 that guards it
    assert report.diversity([row] * 4, torch.ones(4, 2), [differ[0]] * 4) == (0, 0, 0)
    half = [differ[0], differ[0], differ[1], differ[1]]
    assert report.diversity([row] * 4, torch.eye(4), half)[1] == pytest.approx(
        math.log2(3)
    )  # 2 of 6 pairs agree


def test_the_scoreboards_rows_have_the_levels_that_their_legend_says(monkeypatch, tmp_path):
    """50 steps on diffusers' grid; 4 at the student's levels, to show what distillation adds."""
    rows = []
    pipe = tiny_base().pipe

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
        assert others == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert etas == (0.0, 0.0, 0.0, 0.9, 0.9)
    assert guidances == (2.0, 2.0, 1.0, 1.0, 1.0)


# ---- held-out prompts, while training
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
            "--eval_images",
            7,
            "--eval_every",
            2,
            "--offload_rewards",
            "--out_dir",
            tmp_path,
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
    pipe, rows, judge = (
        tiny_base().pipe,
        tiny.captions()[:7],
        rewards.build("judge", CPU, [f"judge={TINY}/judge"]),
    )
    (tmp_path / "samples").mkdir()

    def evaluate(micro_batch=3, rank=None):
        args = tiny_args(
            micro_batch=micro_batch,
            num_steps=4,
            shift=3.0,
            eta=0.9,
            offload_rewards=False,
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
        return rtdmd_rl.evaluate(
            pipe, [], cold_start.text_encoder(pipe, args), rows_with, judge, args, "eval"
        )["eval_judge"]

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
