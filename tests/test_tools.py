"""What measures and draws: scoreboard, plots, ablations, fake_quality, bench."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import cold_start
import cps
import rewards
import rtdmd_rl
import sample
import tiny
from checkpoint import settings_of
from gaussian import close
from helpers import BASE, CPU, ROOT, TINY, Code, good, here, listing, load, tiny_base
from small_backbones import flux1, klein
from tools import ablations, bench, children, fake_quality, long, plots, scoreboard, tiny_scores

ON_CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def tiny_run(run, tmp_path_factory):
    """A directory as `make tiny` leaves it; stage 2 still goes on."""
    folder = tmp_path_factory.mktemp("tiny_run")
    shutil.copytree(run.cold, folder / "cold_start")
    shutil.copytree(run.rl, folder / "rtdmd")
    with open(folder / "rtdmd/log.jsonl", "a") as log:
        log.write('{"step": 2, "re')
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots draws, not written to disk but kept: {name of the file: figure}."""
    kept = {}
    monkeypatch.setattr(
        plots, "save", lambda figure, path: kept.update({path.split("/")[-1]: figure})
    )
    yield kept
    pyplot.close("all")


def refused(program, *flags):
    """The one line with which a program refuses its flags."""
    status, _, err = here(program, *flags)
    assert status == 2
    assert err.count("\n") == 1
    return err


# ---- the scoreboard ------------------------------------------------------------------------------
def test_the_scoreboard_of_a_run(tiny_run):
    status, out, err = here(scoreboard, tiny_run, *ON_CPU, "--pictures", 1)
    assert status == 0, err
    who = [line.split(" | ")[0] for line in out.splitlines()[2:7]]
    assert who == ["| teacher", "| teacher", "| teacher, no CFG", "| AC-DMD", "| RTDMD"]
    result = json.loads((tiny_run / "report.json").read_text())
    assert result["pictures_per_row"] == 6
    assert [row["NFE"] for row in result["rows"]] == [100, 8, 4, 4, 4]
    for row in result["rows"]:
        assert 0 <= row["checker"] <= 1
        assert -1 <= row["judge"] <= 1


def test_the_scoreboards_picture_has_a_hundred_pixels_for_each_picture(tiny_run):
    width, height = Image.open(tiny_run / "report.png").size
    assert width >= scoreboard.SHOWN * 100
    assert height >= 4 * 100


def test_the_scoreboard_does_without_matplotlib_and_says_so(tiny_run, monkeypatch, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run/report.png").unlink(missing_ok=True)
    monkeypatch.setattr(plots, "pyplot", None)
    status, _, err = here(scoreboard, tmp_path / "run", *ON_CPU, "--pictures", 1)
    assert status == 0
    assert "matplotlib is missing: pip install" in err
    assert (tmp_path / "run/report.json").exists()
    assert not (tmp_path / "run/report.png").exists()


def test_the_scoreboards_lines_have_the_levels_that_their_legend_says(tiny_run, monkeypatch):
    """50 steps on diffusers' grid; 4 at the student's levels, to show what distillation adds."""
    drawn = []

    def record(base, clips, rows, adapters, levels, eta, cfg=1.0):
        drawn.append((adapters, levels, eta, cfg))
        return {"checker": 0.0}, torch.zeros(len(rows), 3, 32, 32)

    monkeypatch.setattr(scoreboard, "evaluate", record)
    monkeypatch.setattr(scoreboard, "write_atomically", lambda files: None)
    monkeypatch.setattr(plots, "draw_report", lambda *_: None)
    scoreboard.scoreboard(str(tiny_run), str(TINY), 3, CPU)
    adapters, levels, etas, guidances = zip(*drawn, strict=True)
    assert adapters == ([], [], [], ["cold_generator"], ["cold_generator", "generator"])
    assert levels[0] == sample.teacher_levels(tiny_base(), 50)
    for others in levels[1:]:
        assert others == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert etas == (0.0, 0.0, 0.0, 0.9, 0.9)
    assert guidances == (2.0, 2.0, 1.0, 1.0, 1.0)


def test_the_teachers_grids_are_compared_without_a_run():
    status, out, err = here(scoreboard, "--grids", *ON_CPU, "--pictures", 1)
    assert status == 0, err
    names = re.findall(r"^\| (teacher, .*? grid) \| (\d+)", out, re.M)
    expected = [(f"teacher, {grid} grid", n) for n in ("50", "4") for grid in ("diffusers'", "our")]
    assert names == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{t} --pictures 0", "--pictures must be positive"),
        ("{t}/none", "cold_start/ holds no finished run"),
        ("{t}/bad_log", "no readable log.jsonl"),
        ("{t}/code", "not a file of tensors"),
        ("{t}/code --pretrained {t}/none/dir", "none/dir"),
    ],
)
def test_the_scoreboard_refuses_what_is_no_run(flags, message, tmp_path):
    line = json.dumps(line_of(0, 1)).encode() + b"\n"
    for name, content in {"bad_log": b"not json\n", "code": line}.items():
        for stage in ("cold_start", "rtdmd"):
            folder = tmp_path / name / stage
            folder.mkdir(parents=True)
            (folder / "log.jsonl").write_bytes(content)
            torch.save(Code(tmp_path / "proof"), folder / "generator_ema.pt")
    words = shlex.split(flags.format(t=tmp_path))
    assert message in refused(scoreboard, *words, *ON_CPU)
    assert not (tmp_path / "proof").exists()
    assert not list(tmp_path.rglob("report.*"))


# ---- the numbers of the tiny world ---------------------------------------------------------------
def test_the_captions_are_the_same_for_any_number_of_pictures():
    rows = tiny_scores.report_captions(72)
    assert [row["tag"] for row in rows[::72]] == tiny.CATEGORIES
    for count in Counter(row["prompt"] for row in rows).values():
        assert count % 72 == 0 or 72 % count == 0
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in tiny.captions("test")}


def test_pictures_have_seeds_of_their_own_and_their_own_captions(monkeypatch):
    """More pictures than a batch holds: the second batch does not repeat the first."""
    drawn = []
    judged = []

    def draw(v, seeds, shape, levels, eta, device):
        drawn.extend(seeds)
        return torch.zeros(len(seeds), *shape)

    def judge(images, texts, metadata):
        judged.extend(texts)
        return torch.zeros(len(images))

    judge.name = "judge"
    monkeypatch.setattr(tiny_scores, "draw", draw)
    monkeypatch.setattr(tiny_scores, "BATCH", 4)
    rows = tiny_scores.report_captions(1)
    numbers, pictures = tiny_scores.evaluate(tiny_base(), [judge], rows, [], cps.sigmas(), 0.9)
    first = tiny_scores.FIRST_SEED
    assert drawn == list(range(first, first + 6))
    assert judged == [row["prompt"] for row in rows]
    assert len(pictures) == 6
    assert numbers["judge"] == 0


def test_diversity_is_the_distance_and_the_bits_of_what_a_caption_leaves_open():
    """One caption: four pictures in the four colours in four cells, and the same picture four times."""
    rows = [{"prompt": "a circle", "include": [{"class": "circle", "count": 1}]}] * 4
    places = ((5, 5), (16, 5), (5, 16), (28, 28))
    differ = [
        [tiny.Found("circle", color, x, y, 1.0)] for color, (x, y) in zip(tiny.COLORS, places)
    ]
    numbers = tiny_scores.diversity(rows, torch.eye(4), differ)
    assert numbers["distance"] == pytest.approx(2**0.5)
    assert numbers["color_bits"] > 10  # no two agree: -log2 of the 1e-6 that guards it
    assert numbers["place_bits"] > 10

    alike = tiny_scores.diversity(rows, torch.ones(4, 2), [differ[0]] * 4)
    assert alike == {"distance": 0, "color_bits": 0, "place_bits": 0}

    half = [differ[0], differ[0], differ[1], differ[1]]  # 2 of 6 pairs agree
    numbers = tiny_scores.diversity(rows, torch.eye(4), half)
    assert numbers["color_bits"] == pytest.approx(math.log2(3))


# ---- curves --------------------------------------------------------------------------------------
def test_smoothing_keeps_lines_but_for_their_ends_and_short_curves():
    line = [2.0 * i + 1 for i in range(100)]
    assert plots.smooth(line)[2:-2] == pytest.approx(line[2:-2])
    assert plots.smooth(line)[0] == pytest.approx((1 + 3 + 5) / 3)
    few = [3.0, 1.0, 2.0]
    assert plots.smooth(few) == few


def test_smoothing_takes_the_mean_of_a_twentieth():
    spike = [0.0] * 40 + [1.0] + [0.0] * 39
    assert plots.smooth(spike)[37:44] == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0])


def test_curves_have_a_panel_a_number_and_a_colour_a_run(tiny_run, tmp_path, figures):
    runs = [tiny_run / "cold_start", tiny_run / "rtdmd"]
    good(here(plots, "curves", *runs, "--out_dir", tmp_path))
    figure = figures["curves.png"]
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    logged = set()
    for run in runs:
        logged.update(plots.names_of(plots.read_log(run)))
    assert set(panels) == logged
    for axes in panels.values():
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
    assert panels["seconds"].get_ylabel() == "seconds a step"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [str(run) for run in runs]
    raw, smooth = panels["loss_consistency"].lines[:2]
    values = [line["loss_consistency"] for line in plots.read_log(runs[0])]
    assert list(raw.get_ydata()) == values
    assert list(smooth.get_ydata()) == plots.smooth(values)
    assert raw.get_alpha() < 0.5


def test_curves_are_a_picture_in_the_first_run(tiny_run):
    good(here(plots, "curves", tiny_run / "rtdmd"))
    assert Image.open(tiny_run / "rtdmd/curves.png").format == "PNG"


def test_without_matplotlib_one_line_says_how_to_get_it(tiny_run, monkeypatch):
    monkeypatch.setattr(plots, "pyplot", None)
    assert "pip install" in refused(plots, "curves", tiny_run / "rtdmd")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "required"),
        ("scatter {t}", "scatter"),
        ("curves", "RUN"),
        ("curves {t}/none", "no readable log.jsonl"),
        ("figures {t} {t}", "one tiny run"),
        ("hacking {t}", "stages 2"),
    ],
)
def test_plots_refuses_in_one_line(flags, message, tmp_path):
    assert message in refused(plots, *shlex.split(flags.format(t=tmp_path)), "--out_dir", tmp_path)
    assert listing(tmp_path) == {}


# ---- the figures of the README -------------------------------------------------------------------
def test_the_velocity_of_two_modes_is_what_eq_2_says():
    t = 0.6
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    std = ((1 - t) ** 2 * plots.TAU**2 + t**2) ** 0.5
    modes = [torch.distributions.Normal((1 - t) * m, std).log_prob(x) for m in (-1, 1)]
    log_density = torch.stack(modes).logsumexp(0)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    close(plots.exact_velocity(x, t), (-x - t * score) / (1 - t), 1e-6)
    close(plots.density(x, t), log_density.detach().exp() / 2, 1e-6)


def test_the_figures_and_their_numbers(tiny_run, monkeypatch, figures, tmp_path):
    monkeypatch.setattr(plots, "captions", lambda *_: tiny.captions("train")[:5])
    status, out, err = here(plots, "figures", tiny_run, *ON_CPU, "--out_dir", tmp_path)
    assert status == 0, err
    assert set(figures) == {"sampler.png", "subinterval.png", "subgrpo.png"}
    assert out.count("std within a group") == 4
    assert out.count("correlation of start and end") == 4

    number = r"([\d.]+)"
    stds = f"std exact {number}, printed {number}, true {number}"
    line = f"t = {number}: {stds}; of the noise in it {number}, {number}, {number}"
    found = [tuple(map(float, match)) for match in re.findall(line, out)]
    assert [t for t, *_ in found] == [0.55, 0.75, 0.95]
    for t, exact, printed, true, noise_exact, noise_printed, noise_true in found:
        a = (1 - t) / 0.5
        b = (t - 0.5) / 0.5
        data = (1 - t) ** 2 * (1 + plots.TAU**2)
        right = (data + t**2) ** 0.5
        wrong = a**2 * 0.25 + b**2  # App. B's variance of the noise, worked out by hand
        assert (exact, true) == pytest.approx((right, right), abs=0.003)
        assert printed == pytest.approx((data + wrong) ** 0.5, abs=0.003)
        assert (noise_exact, noise_true) == pytest.approx((t, t), abs=0.003)
        assert noise_printed == pytest.approx(wrong**0.5, abs=0.003)


@pytest.fixture
def two_stages_2(run, tmp_path):
    """Copies of a stage 2: one whose adapter is 0, and one of which it is large."""
    for name, scale in (("nothing", 0), ("much", 300)):
        shutil.copytree(run.rl, tmp_path / name)
        weights = load(run.rl / "generator_ema.pt")
        for key in weights:
            if "lora_B" in key:
                weights[key] *= scale
        torch.save(weights, tmp_path / name / "generator_ema.pt")
    return [tmp_path / "nothing", tmp_path / "much"]


def test_the_figure_of_hacking(tiny_run, two_stages_2, figures, tmp_path):
    """An adapter that is 0 gives the cold start's pictures and numbers, a trained one others."""
    flags = [*ON_CPU, "--pictures", 9, "--out_dir", tmp_path]
    status, out, err = here(plots, "hacking", tiny_run, *two_stages_2, *flags)
    assert status == 0, err
    numbers = dict(line.split(": ") for line in out.splitlines())
    assert list(numbers) == ["cold start", "nothing", "much"]
    assert numbers["nothing"] == numbers["cold start"]
    assert numbers["much"] != numbers["cold start"]
    score = r"-?\d\.\d{3}"
    line = rf"CLIPScore {score}, checker [\d.]+ %, judge {score}, colour bits [\d.]+"
    for found in numbers.values():
        assert re.fullmatch(line, found)
    pictures = [axes.images[0].get_array().tobytes() for axes in figures["hacking.png"].axes]
    columns = len(pictures) // 3
    cold = pictures[:columns]
    assert pictures[columns : 2 * columns] == cold
    assert pictures[2 * columns :] != cold


def test_hacking_is_of_one_stage_1(tiny_run, two_stages_2, tmp_path):
    path = two_stages_2[1] / "ckpt.pt"
    checkpoint = load(path)
    checkpoint["flags"]["pretrained or cold_start content"] = "another"
    torch.save(checkpoint, path)
    line = refused(plots, "hacking", tiny_run, *two_stages_2, *ON_CPU, "--out_dir", tmp_path)
    assert "one and the same stage 1" in line


# ---- ablations -----------------------------------------------------------------------------------
SIZES = ["--steps", 2, "--epochs", 1, "--batch_size", 8, "--pictures", 1, *ON_CPU]
PROGRAMS = {"cold_start.py": cold_start, "rtdmd_rl.py": rtdmd_rl, "fake_quality.py": fake_quality}
ROWS = [(table, row) for table, rows in ablations.TABLES.items() for row in rows]


def module_of(command):
    """-> (the module that a command line runs, its flags)"""
    _, program, *flags = command
    return PROGRAMS[program.split("/")[-1]], flags


@pytest.mark.parametrize("table, row", ROWS, ids=[f"{table} {row.name}" for table, row in ROWS])
def test_every_rows_command_parses(table, row, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ablations.py", table, *map(str, SIZES)])
    args = ablations.arguments()
    module, flags = module_of(ablations.command(args, row, seed=1))
    monkeypatch.setattr(module, "find_weights", lambda *_, **__: "", raising=False)
    monkeypatch.setattr(sys, "argv", ["main", *flags])
    found = module.arguments()
    assert found.seed == 1
    words = iter(shlex.split(row.flags))
    for word in words:
        if word != "--decay":
            value = getattr(found, word.removeprefix("--"))
            assert value == type(value)(next(words))


class InThisThread:
    """In place of the pool: importing torch in a process takes longer than the runs below."""

    def __init__(self, jobs):
        pass

    def map(self, function, rows):
        return map(function, rows)

    def shutdown(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """Ablations' processes run here, in turn; -> the commands that were run."""
    commands = []

    def run(command, log_path, environment):
        commands.append(command)
        module, flags = module_of(command)
        status, out, err = here(module, *flags)
        with open(log_path, "a") as log:
            log.write(out + err)
        return status

    rows = ablations.TABLES
    few = {"table3": rows["table3"][:2], "table4": rows["table4"][:2], "fake": rows["fake"][:2]}
    monkeypatch.setattr(ablations, "TABLES", few)
    few_claims = {"table3": ablations.CLAIMS["table3"][:1]}
    monkeypatch.setattr(ablations, "CLAIMS", few_claims)
    monkeypatch.setattr(children, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(children, "run", run)
    return commands


def cells_of(path):
    """The rows of a table in markdown, below its head."""
    lines = path.read_text().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ablations_at_a_size_of_nothing(in_this_process, tmp_path):
    where = ["--out_dir", tmp_path]
    good(here(ablations, *SIZES, *where, "--seeds", 1))
    # two rows of stage 1 (one is the cold start, too), one of stage 2, the reference, two of fake
    assert len(in_this_process) == 6
    for table, rows in ablations.TABLES.items():
        cells = cells_of(tmp_path / f"{table}.md")
        assert [row[0] for row in cells] == [row.name for row in rows]
        assert {row[1] for row in cells} == {"1"}
        for row in cells:
            assert "" not in row[:-1]

    # A second call trains nothing, a second seed itself alone.
    before = listing(tmp_path / "runs")
    good(here(ablations, *SIZES, *where, "--seeds", 1))
    assert len(in_this_process) == 6
    assert listing(tmp_path / "runs") == before
    good(here(ablations, *SIZES, *where, "--seeds", 2))
    new = in_this_process[6:]
    assert len(new) == 5  # one reference is enough
    assert {command[command.index("--seed") + 1] for command in new} == {"1"}
    assert {row[1] for row in cells_of(tmp_path / "table4.md")} == {"2"}
    assert "| consistency helps |" in (tmp_path / "table3.md").read_text()

    assert "another size" in refused(ablations, *SIZES, *where, "--steps", 3)


def test_a_run_that_fails_costs_its_own_row(in_this_process, tmp_path, monkeypatch):
    broken = ablations.Row("broken", "cold_start.py", "--lr five")
    rows = [*ablations.TABLES["table3"], broken]
    monkeypatch.setitem(ablations.TABLES, "table3", rows)
    status, _, err = here(ablations, "table3", *SIZES, "--seeds", 1, "--out_dir", tmp_path)
    assert status == 0
    assert "broken, seed 0: failed, see" in err
    assert [row[1] for row in cells_of(tmp_path / "table3.md")] == ["1", "1", "0"]
    assert "'five'" in (tmp_path / "runs/cold_start_lr_five_seed0.log").read_text()


def test_a_cell_is_the_mean_and_its_standard_error():
    assert ablations.cell([]) == ""
    assert ablations.cell([0.5]) == "0.5"
    assert ablations.cell([1.0, 3.0]) == "2 ± 1"  # standard deviation 1.41, over 2 ** .5


def test_a_verdict_is_the_paired_t_test():
    # mean 2, standard error .316: 2.78 of them are .88
    assert ablations.verdict([1.0, 2.0, 2.0, 2.0, 3.0]) == "+2 ± 0.32: holds"
    assert ablations.verdict([-1.0, -2.0, -2.0, -2.0, -3.0]) == "-2 ± 0.32: fails"
    # mean 1, deviation 2, so the interval is 1 +- t * 2 / sqrt(n): n = 18 is the first without zero
    spread = [-1.0, 3.0, -1.0, 3.0, 1.0]
    assert ablations.verdict(spread) == "+1 ± 0.89: not resolved (18 seeds)"
    assert ablations.verdict([1.0]) == "one seed"
    assert "1 000 seeds or more" in ablations.verdict([1.0, -1.0])


@pytest.mark.parametrize("n, exact", [(2, 12.706), (5, 2.776), (11, 2.228), (21, 2.086)])
def test_students_t(n, exact):
    assert ablations.student(n) == pytest.approx(exact, abs=0.025)


@pytest.mark.parametrize("table", ablations.CLAIMS)
def test_every_claim_is_about_rows_of_its_table(table):
    names = [row.name for row in ablations.TABLES[table]]
    for claim in ablations.CLAIMS[table]:
        assert {claim.better, claim.worse} <= set(names), claim


def test_a_claim_compares_equal_seeds():
    def row(name, *checkers):
        seeds = {str(i): {"checker": c} for i, c in enumerate(checkers) if c is not None}
        return {"name": name, "seeds": seeds}

    claim = ablations.Claim("a before b", "a", "b", ("checker",))
    content = {"table": "table3", "rows": [row("a", 0.9, 0.5, 0.6), row("b", None, 0.4, 0.5)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.CLAIMS, "table3", [claim])
        line = ablations.claims_of(content).splitlines()[2]
    assert line.startswith("| a before b | +10 ±")


def test_jobs_take_the_gpus_in_turn(monkeypatch, tmp_path):
    seen = []

    def run(command, log_path, environment):
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        return 1

    monkeypatch.setattr(children, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["ablations.py", "students", *SIZES, "--out_dir", tmp_path, "--jobs", 4, "--seeds", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    args = ablations.arguments()
    (tmp_path / "runs").mkdir()
    ablations.run_all(args, torch.device("cuda"))
    assert set(seen) == {"0", "1"}
    assert len(seen) == 8  # K = 1, 2, 4 and where stage 2 starts, of two seeds each
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen.clear()
    ablations.run_all(args, torch.device("cpu"))
    assert set(seen) == {None}


def test_an_ablation_that_is_stopped_begins_no_other_run(tmp_path, monkeypatch):
    """A signal ends the main thread; those that wait for their turn must not have it."""
    begun = []

    def train(args, row, seed, gpu):
        begun.append(row)
        raise SystemExit(143)

    monkeypatch.setattr(ablations, "train", train)
    words = ["ablations.py", "students", *SIZES, "--out_dir", tmp_path, "--jobs", 1, "--seeds", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit, match="143"):
        ablations.run_all(ablations.arguments(), torch.device("cpu"))
    assert len(begun) <= 2  # the one after it may have begun by then


def test_children_end_with_the_program_that_began_them(tmp_path):
    """A signal to it alone, which its children do not get."""
    sleep = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    log = tmp_path / "log"

    def ended_by_a_signal():
        with children.workers(1) as pool:
            results = [pool.submit(children.run, sleep, log, os.environ) for _ in range(2)]
            while not log.exists() or not log.read_text():
                time.sleep(0.05)
            try:
                raise SystemExit(143)
            finally:
                ended.extend(results)

    ended = []
    with pytest.raises(SystemExit):
        ended_by_a_signal()
    first, second = ended
    assert first.result() == -signal.SIGTERM
    assert second.cancelled()
    assert not children.running


@pytest.mark.parametrize(
    "flags, message",
    [("table5", "table5"), ("--seeds 0", "positive"), ("--out_dir {t}/file/out", "file/out")],
)
def test_ablations_refuses_in_one_line(flags, message, tmp_path):
    (tmp_path / "file").touch()
    words = shlex.split(flags.format(t=tmp_path))
    assert message in refused(ablations, "--out_dir", tmp_path / "out", *words, *ON_CPU)


def test_fake_quality_is_0_for_the_same_training_and_not_for_another(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_quality, "NOISE_BATCHES", 4)
    flags = ["--cold_start", run.cold, "--batch_size", 4, *ON_CPU]
    long = ["--updates", 3, "--decay", "--stream", "reference"]
    good(here(fake_quality, *flags, *long, "--out_dir", tmp_path / "reference"))
    found = {}
    for name, training in {"same": long, "teacher": ["--updates", 0]}.items():
        where = ["--reference", tmp_path / "reference", "--out_dir", tmp_path / name]
        good(here(fake_quality, *flags, *training, *where))
        found[name] = json.loads((tmp_path / name / "numbers.json").read_text())
    noise = {name: numbers.pop("gradient noise") for name, numbers in found.items()}
    assert list(found["same"]) == ["s = 0.9", "s = 0.75", "s = 0.5", "s = 0"]
    assert set(found["same"].values()) == {0.0}
    assert min(found["teacher"].values()) > 0
    assert min(noise.values()) > 10
    more = ["--updates", 0, "--gamma", 5, "--consistency_share", 0.25]
    where = ["--reference", tmp_path / "reference", "--out_dir", tmp_path / "share"]
    good(here(fake_quality, *flags, *more, *where))
    shared = json.loads((tmp_path / "share/numbers.json").read_text())["gradient noise"]
    more[-1] = 1
    good(here(fake_quality, *flags, *more, *where))
    assert shared != json.loads((tmp_path / "share/numbers.json").read_text())["gradient noise"]


# ---- bench ---------------------------------------------------------------------------------------
def line_of(step, seconds, **more):
    return {"step": step, "seconds": seconds, "images_per_s": 8 / seconds, **more}


def test_the_speed_of_a_log():
    log = [line_of(0, 100.0, s_fake=90.0)]  # compiles
    log += [line_of(i, 2.0, s_fake=1.0, peak_gib=3.0) for i in range(1, 4)]
    log += [line_of(4, 6.0, s_fake=1.0, s_generator=4.0, peak_gib=5.0)]
    speed = bench.speed_of(bench.steps_of(log, 1))
    assert speed["steps"] == 4
    assert speed["pictures a step"] == 8
    assert speed["s, mean"] == 3
    assert speed["s, median"] == 2
    assert speed["s, 90 %"] == 6
    assert speed["pictures / s"] == pytest.approx(32 / 12)
    assert speed["peak GiB"] == 5
    assert speed["s_fake"] == 1
    assert speed["s_generator"] == 1  # of all steps, in most of which it is 0


def test_the_first_steps_are_left_out():
    log = [{"step": i} for i in range(100)]
    assert bench.steps_of(log, None)[0]["step"] == 20
    assert bench.steps_of(log[:10], None)[0]["step"] == 3
    assert bench.steps_of(log, 7)[0]["step"] == 7


def test_the_forwards_of_a_picture_counted_by_hand():
    settings = {"num_steps": 4, "cfg": 4.5}
    stage_1 = [{"step": i} for i in range(9)] + [{"step": 9, "loss_generator": 1.0}]
    # rollout 2.5, fake 3 with gradient, a tenth of: student 1 with gradient, teacher 2, fake 1
    assert bench.forwards_of(settings, stage_1) == pytest.approx(2.5 + 6 + 0.1 * (2 + 2 + 1))
    assert bench.forwards_of({**settings, "gamma": 0}, stage_1) == pytest.approx(2.5 + 2 + 0.5)
    by_input = bench.forwards_of(settings, stage_1, guided_by_input=True)
    assert by_input == pytest.approx(2.5 + 6 + 0.1 * (2 + 1 + 1))
    third = {**settings, "consistency_share": 1 / 3}
    assert bench.forwards_of(third, stage_1) == pytest.approx(2.5 + 2 * (1 + 2 / 3) + 0.5)
    # roll-outs of all 4 steps before steps 0, 4 and 8
    reused = {**third, "reuse_rollouts": True, "generator_every": 10}
    assert bench.forwards_of(reused, stage_1) == pytest.approx(1.2 + 2 * (1 + 2 / 3) + 0.5)
    stage_2 = [{"step": 0, "S": [0, 2], "loss_dm": 1.0, "loss_det": 1.0, "loss_policy": 1e-8}]
    assert bench.forwards_of(settings, stage_2) == 4 + 6 + 3 + 2 + 2 * 2
    policy_alone = [{**stage_2[0], "loss_dm": 0.0, "loss_det": 0.0}]
    assert bench.forwards_of(settings, policy_alone) == 4 + 6 + 2 * 2


# A CPU's attention is not counted: in each block two products of all tokens with all. SD3: 34 x 34 in
# 3 blocks, and in the one with a second attention 16 x 16 of the picture alone; 96 channels. FLUX:
# 4 blocks and 64 channels.
PLACES = {
    "sd3": (lambda _: str(TINY), 4 * 96 * (3 * 34**2 + 16**2)),
    "flux1": (flux1, 4 * 64 * 4 * (8 * 8 + 8) ** 2),
    "klein": (klein, 4 * 64 * 4 * (8 * 8 + 512) ** 2),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_operations_of_a_forward_are_those_of_the_real_one(name, tmp_path):
    write, attention = PLACES[name]
    place = write(tmp_path)
    base = tiny_base(place)
    text = base.encode(["a circle"])
    x = torch.zeros(1, *base.latent_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        base.velocity([], text)(x, 0.5)
    assert bench.forward_flops(bench.shapes_of(place, 32)) == counter.get_total_flops() + attention


@pytest.mark.parametrize("guidance, teacher", [(True, 1), (False, 2)])
def test_the_operations_of_a_run_are_those_of_its_family(guidance, teacher, tmp_path, monkeypatch):
    """FLUX.1-dev's teacher is guided by an input, FLUX.1-schnell's by a second pass."""
    place = flux1(tmp_path, guidance=guidance)
    settings = {"pretrained": place, "resolution": 32, "num_steps": 4, "cfg": 3.5}
    monkeypatch.setattr(bench, "settings_of", lambda _: settings)
    work = bench.work_of("a run", {"pictures / s": 3}, [{"loss_generator": 1.0}], gpus=2)
    tflop = bench.forward_flops(bench.shapes_of(place, 32)) / 1e12
    assert work["forwards a picture"] == 2.5 + 6 + 2 + teacher + 1
    assert work["TFLOP a forward"] == tflop
    assert work["TFLOP/s a GPU"] == pytest.approx(work["forwards a picture"] * tflop * 3 / 2)


def test_a_base_without_t5_has_its_operations_too(tmp_path):
    """It is given zeros in place of T5's tokens, as many as the limit allows."""
    place = shutil.copytree(TINY, tmp_path / "base")
    index = json.loads((place / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(place / name)
        index[name] = [None, None]
    (place / "model_index.json").write_text(json.dumps(index))
    backbone = bench.shapes_of(str(place), 32)
    embeds, pooled = tiny_base(place).encode(["a circle"])
    assert backbone.text_shapes() == (embeds.shape[1:], pooled.shape[1:])
    assert embeds.shape[1] == 10 + 128


def test_bench_reads_a_run(run):
    status, out, err = here(bench, run.rl, "--skip", 1, "--json")
    assert status == 0, err
    numbers = json.loads(out)
    assert numbers["steps"] == 1
    assert numbers["pictures a step"] == 10
    assert numbers["forwards a picture"] == 19
    parts = [value for name, value in numbers.items() if name.startswith("s_")]
    assert sum(parts) == pytest.approx(numbers["s, mean"], abs=0.002)
    assert "share of it" not in numbers  # which takes a GPU


def test_a_runs_settings_say_what_its_work_depends_on(run):
    """Else bench counts the roll-outs and the consistency of a run that does with less."""
    settings = settings_of(f"{run.cold}/log.jsonl")
    (line, *_) = plots.read_log(str(run.cold))
    usual = bench.forwards_of(settings, [line])
    assert settings["consistency_share"] == 1
    assert settings["reuse_rollouts"] is False
    fewer = bench.forwards_of({**settings, "reuse_rollouts": True, "generator_every": 10}, [line])
    assert fewer == pytest.approx(usual - 2.5 + 1.2)


def test_bench_does_without_a_base_model_that_is_gone(monkeypatch):
    settings = {"pretrained": "/not/here", "resolution": 32, "num_steps": 4, "cfg": 1.0}
    monkeypatch.setattr(bench, "settings_of", lambda _: settings)
    assert bench.work_of("a run", {}, [], gpus=1) == {}
    del settings["pretrained"]  # of another program
    assert bench.work_of("a run", {}, [], gpus=1) == {}


def test_bench_says_where_too_few_steps_are_there(run):
    assert "--skip fewer" in refused(bench, run.rl)


def test_bench_times_a_picture(run):
    weights = ["--cold_start", run.cold, "--rtdmd", run.rl]
    flags = ["picture", "a circle", *BASE[:4], *weights, "--repeat", 1]
    status, out, err = here(bench, *flags)
    assert status == 0, err
    numbers = dict(re.findall(r"^(\S.*?)  +(\S+)$", out, re.M))
    assert list(numbers)[:2] == ["batch", "steps"]
    assert float(numbers["s, draw and decode"]) > 0
    assert float(numbers["pictures / s"]) > 0


def test_bench_times_each_reward_by_itself(monkeypatch):
    """With new prompts in each call, since texts are kept; with the gradient of those that have one."""
    seen = {"soft": [], "hard": []}
    passed = [0.0]

    def scorer(name, seconds):
        def score(images, prompts, metadata):
            passed[0] += seconds
            seen[name].append((images.requires_grad, len(images), tuple(prompts)))
            return images.mean((1, 2, 3))

        return score

    def in_two_parts(score):
        just_read = []

        def read(prompts, metadata):
            just_read[:] = prompts
            return rewards.read_nothing(prompts, metadata)

        return rewards.in_two_parts(lambda images, text: score(images, just_read, []), read=read)

    soft = in_two_parts(scorer("soft", 0.5))
    hard = scorer("hard", 2.0)
    monkeypatch.setattr(bench, "clock", lambda device: passed[0])
    monkeypatch.setitem(rewards.REWARDS, "soft", (lambda *_: soft, True, ""))
    monkeypatch.setitem(rewards.REWARDS, "hard", (lambda *_: hard, False, ""))
    flags = ["--rewards", "soft,hard", "--resolution", "16x8", "--batch_size", 3, "--repeat", 2]
    status, out, err = here(bench, "rewards", *flags, "--device", "cpu")
    assert status == 0, err
    numbers = {name: float(value) for name, value in re.findall(r"^(\S.*?)  +(\S+)$", out, re.M)}
    assert numbers == {"soft, s": 0.5, "hard, s": 2.0}
    for name, with_gradient in (("soft", True), ("hard", False)):
        assert [call[:2] for call in seen[name]] == [(with_gradient, 3)] * 4
        assert len({call[2] for call in seen[name]}) == 4


# ---- tools.long: which kept file is scored, and the table
def log_with(rewards, spreads):
    """A log of stage 2 with one reward and one latent_std for each 500 epochs."""
    lines = []
    for reward, spread in zip(rewards, spreads):
        line = {"reward_clipscore": 0.5, "reward_checker": reward, "latent_std": spread}
        lines += [line] * long.KEEP_EVERY
    return lines


@pytest.mark.parametrize(
    "rewards, spreads, epoch",
    [
        ((0.7, 0.8, 0.9), (0.4, 0.4, 0.39), 1500),  # the best reward
        ((0.7, 0.9, 0.8), (0.4, 0.4, 0.4), 1000),
        ((0.7, 0.8, 0.9), (0.4, 0.4, 0.37), 1000),  # but not after the spread has fallen
        ((0.7, 0.8, 0.9), (0.4, 0.3, 0.3), 500),  # the first is never left out
    ],
)
def test_the_file_that_is_scored_is_chosen_by_training_rewards_and_spread(rewards, spreads, epoch):
    assert long.chosen(log_with(rewards, spreads), [1000, 500, 1500]) == epoch


def test_the_long_runs_rewards_are_weighed_as_in_training():
    flags = long.STAGE_2.split()
    given = flags[flags.index("--rewards") + 1]
    assert given == ",".join(f"{name[7:]}:{weight}" for name, weight in long.WEIGHTS.items())


def test_only_kept_files_within_the_run_are_looked_at(tmp_path):
    for name in (
        "generator_ema.pt",
        "generator_ema_500.pt",
        "generator_ema_1000.pt",
        "fake_500.pt",
    ):
        (tmp_path / name).touch()
    assert long.kept_epochs(tmp_path, 999) == [500]
    with pytest.raises(SystemExit):
        long.kept_epochs(tmp_path, 499)


def test_the_long_runs_table_has_mean_and_deviation():
    numbers = [{"checker": 0.8, "judge": 0.5}, {"checker": 0.9, "judge": 0.7}]
    assert long.table_of({"a": numbers}).splitlines()[-1] == "| a | 85 ± 7.1 | 0.6 ± 0.14 |"


@pytest.mark.parametrize("flag", ["--seeds", "--pictures", "--jobs", "--epochs"])
def test_the_long_run_needs_positive_numbers(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["long.py", flag, "0"])
    with pytest.raises(SystemExit) as end:
        long.arguments()
    assert end.value.code == 2
    assert f"{flag} must" in capsys.readouterr().err


def test_kept_files_are_a_row_each(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run.cold, folder / "cold_start")
    shutil.copytree(run.rl, folder / "rtdmd")
    for step in (2, 10):
        source = folder / "rtdmd/generator_ema.pt"
        shutil.copy(source, folder / f"rtdmd/generator_ema_{step}.pt")
    rows = []
    monkeypatch.setattr(plots, "picture_sheet", lambda _, sheet, *__: rows.extend(sheet))
    good(here(plots, "kept", folder, *ON_CPU, "--out_dir", tmp_path))
    assert (tmp_path / "kept.png").exists()
    assert [row.split("\n") for row in rows] == [
        ["cold_start", "at the end"],
        ["rtdmd", "after 2"],
        ["rtdmd", "after 10"],
        ["rtdmd", "at the end"],
    ]
    assert "holds no cold_start/" in refused(plots, "kept", tmp_path / "none", *ON_CPU)


def test_the_first_figures_captions_are_of_the_tiny_world():
    known = {row["prompt"] for split in ("train", "test") for row in tiny.captions(split)}
    assert set(plots.FRONT_CAPTIONS) <= known


def test_the_first_figure_is_drawn_from_a_run_and_the_long_runs_numbers(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run.cold, folder / "cold_start")
    shutil.copytree(run.rl, folder / "rtdmd")
    flags = ["front", folder, "--pictures", 1, "--out_dir", tmp_path, *ON_CPU]
    status, _, err = here(plots, *flags)
    assert status == 2 and "long.json is not there" in err
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "assets/results/long.json", tmp_path / "results")
    status, _, err = here(plots, *flags)
    assert status == 2 and "students.json is not there" in err
    shutil.copy(ROOT / "assets/results/students.json", tmp_path / "results")
    good(here(plots, *flags))
    width, height = Image.open(tmp_path / "front.png").size
    assert width >= 6 * 96 and height >= 3 * 96
    curves = json.loads((tmp_path / "results/steps.json").read_text())["curves"]
    guided, plain = curves.values()
    assert [point["evaluations"] for point in plain] == [1, 2, 4, 8, 16, 50]
    assert [point["evaluations"] for point in guided] == [2, 4, 8, 16, 32, 100]


def test_the_long_run_scores_the_chosen_files_of_finished_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(long, "GUIDANCE", (1.0, 2.0))
    for seed in "01":
        shutil.copytree(run.cold, tmp_path / seed / "cold_start")
        shutil.copytree(run.rl, tmp_path / seed / "rtdmd")
        here_is = tmp_path / seed / "rtdmd"
        shutil.copy(here_is / "generator_ema.pt", here_is / "generator_ema_500.pt")
        for stage, lines in (("cold_start", 3000), ("rtdmd", 500)):
            text = json.dumps(line_of(0, 1, **log_with([0.5], [0.4])[0])) + "\n"
            (tmp_path / seed / stage / "log.jsonl").write_text(lines * text)
    # Nothing is trained: the logs are as long as the runs.
    monkeypatch.setattr(children, "run", None)
    good(here(long, tmp_path, "--seeds", 2, "--epochs", 500, "--pictures", 1, *ON_CPU))
    content = json.loads((tmp_path / "long.json").read_text())
    assert content["chosen"] == {"0": 500, "1": 500} and content["pictures_a_row"] == 6
    names = [name.split(",")[0] for name in content["rows"]]
    assert names == ["teacher", "teacher", "AC-DMD", "RTDMD"]
    first, second = content["rows"]["AC-DMD, 4 steps"]
    assert first != second  # the same weights, other pictures


def test_a_training_of_the_long_run_that_fails_ends_it_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        long.train(SimpleNamespace(run=str(tmp_path), epochs=1, device="nonsense"), 0)
    assert end.value.code == 1
    assert "cold_start.py ended early" in capfd.readouterr().err
