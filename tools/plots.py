"""Curves of any run and the pictures of the README, with matplotlib (requirements-dev.txt).

    python -m tools.plots curves out/cold_start out/rtdmd     # every number of their log.jsonl
    python -m tools.plots figures out/tiny --out_dir assets   # sampler.png, subinterval.png, subgrpo.png
    python -m tools.plots hacking out/tiny out/tiny/rtdmd out/hacked --out_dir assets
    python -m tools.plots kept out/tiny                       # kept.png: a row a kept file (--keep_every)
    python -m tools.plots front assets/tiny/adapters --out_dir assets   # front.png

curves: a panel a number, a colour a run -> curves.png in the first run's directory. hacking: several
stages 2 on one stage 1, side by side. front: with the numbers of results/long.json (tools.long), of
results/students.json (tools.ablations students) and of the teacher in results/steps.json, which is
measured where it is not there. report.png is drawn by tools/scoreboard.
"""

import json
import math
import os
from types import SimpleNamespace

import torch

import rtdmd_rl
import variants
from checkpoint import KEPT_GENERATOR, read, settings_of
from common import (
    Parser,
    as_bytes,
    checked,
    die,
    end_on_signals,
    make_out_dir,
    seeded_rng,
    setup,
    write_atomically,
)
from cps import renoise, rollout, sigmas
from sample import draw, teacher_levels
from tiny import captions
from tools.tiny_scores import (
    NEW_SEEDS,
    PRETRAINED,
    evaluate,
    evaluations,
    generator_of,
    load_tiny,
    report_captions,
)

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
except ImportError:
    pyplot = None
MISSING = "matplotlib is missing: pip install -c requirements-dev.txt matplotlib"

COLORS = ["#285ac8", "#d24628", "#1e9650", "#963caa", "#dca014", "#5a5a5a"]
DOTS = 100  # an inch
CELL = 1.0  # inches a side of a small picture, with its border
TEXT = 1.7  # inches for the words beside a row of pictures


# ---- logs ----------------------------------------------------------------------------------------
IN_EVERY_LINE = ("step", "seconds", "images_per_s")


def read_log(run):
    """The lines of run/log.jsonl; half a line at the end, of a run that still goes on, is left out.

    Dies where it is no log of ours.
    """
    try:
        with open(f"{run}/log.jsonl", encoding="utf-8") as file:
            log = [json.loads(line) for line in file if line.endswith("\n")]
        for number, line in enumerate(log, start=1):
            numbers = line if isinstance(line, dict) else {}
            for name in IN_EVERY_LINE:
                if not isinstance(numbers.get(name), (int, float)):
                    raise ValueError(f"line {number} has no number of the name {name}")
    except (OSError, ValueError) as e:
        die(f"{run}: no readable log.jsonl, which cold_start.py and rtdmd_rl.py make ({e})")
    return log


def points_of(log, name):
    """-> (steps, values) of one number, where it is one."""
    points = []
    for line in log:
        value = line.get(name)
        if isinstance(value, (int, float)):
            points.append((line["step"], value))
    steps, values = zip(*points) if points else ((), ())
    return list(steps), list(values)


def names_of(log):
    """The names of all numbers in a log, in the order in which they come."""
    names = {}
    for line in log:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                names[name] = None
    return list(names)


def smooth(values):
    """Means over a twentieth of the curve around each point; single steps are noise."""
    reach = len(values) // 40
    means = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


UNITS = {
    "seconds": "seconds a step",
    "images_per_s": "pictures / second",
    "peak_gib": "GiB",
    "k": "sampling step",
    "skipped": "updates",
    "flat_groups": "share of prompts",
    "drift_clipped": "share of pictures",
    "drift_max": "|ratio - 1|",
    "latent_std": "latent units",
    "ema_drift": "relative distance",
}
KINDS = {  # by the beginning of the name
    "s_": "seconds a step",
    "loss_": "loss",
    "grad_": "gradient norm",
    "slope_": "gradient norm",
    "reward_": "mean score",
    "eval_": "mean score, held out",
}


def unit_of(name):
    """What stands at the vertical axis of a number of log.jsonl."""
    if name in UNITS:
        return UNITS[name]
    for beginning, unit in KINDS.items():
        if name.startswith(beginning):
            return unit
    return name.replace("_", " ")


# ---- drawing -------------------------------------------------------------------------------------
def new_figure(width, height):
    """A white figure of so many inches; dies where matplotlib is missing."""
    if pyplot is None:
        die(MISSING)
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.figure(figsize=(width, height), dpi=DOTS)


def save(figure, path):
    write_atomically({path: as_bytes(figure.savefig, format="png")})
    pyplot.close(figure)


def curve(axes, steps, values, color, label=None):
    """A faint raw curve and a strong smooth one; few points are marked."""
    marker = "." if len(values) < 40 else ""
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=color, marker=marker, label=label)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))


def draw_curves(runs, path):
    """Every number of the runs' logs over the steps: a panel a number, a colour a run -> path."""
    logs = {run: read_log(run) for run in runs}
    names = list(dict.fromkeys(name for log in logs.values() for name in names_of(log)))
    if not names:
        die(f"{', '.join(runs)}: their logs hold no numbers yet")
    columns = 3
    lines = -(-len(names) // columns)
    figure = new_figure(4.2 * columns, 2.6 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(grid, names):
        for i, (run, log) in enumerate(logs.items()):
            curve(axes, *points_of(log, name), COLORS[i % len(COLORS)], label=run)
        axes.set_title(name)
        axes.set_ylabel(unit_of(name))
        axes.set_xlabel("step")
    for axes in grid[len(names) :]:
        axes.axis("off")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=len(runs), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (2.6 * lines + 0.4)))
    save(figure, path)
    print(path)


def show_picture(axes, picture):
    """A picture [3,H,W] in [0,1], large pixels left as they are."""
    axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.axis("off")


def wrapped(prompt, words_a_line=2):
    words = prompt.split()
    lines = [words[i : i + words_a_line] for i in range(0, len(words), words_a_line)]
    return "\n".join(" ".join(line) for line in lines)


def picture_sheet(figure, rows, top, headings=()):
    """Rows of pictures {title: [N,3,H,W]} into a figure, `top` inches below its upper edge.

    headings: what stands above each column. Each picture has CELL inches, each title TEXT.
    """
    width, height = figure.get_size_inches()
    for i, (title, pictures) in enumerate(rows.items()):
        bottom = height - top - (i + 1) * CELL
        figure.text(0.05 / width, (bottom + CELL / 2) / height, title, va="center")
        for j, picture in enumerate(pictures):
            left = TEXT + j * CELL
            side = 0.97 * CELL
            place = (left / width, bottom / height, side / width, side / height)
            show_picture(figure.add_axes(place), picture)
    y = 1 - (top - 0.08) / height
    for j, heading in enumerate(headings):
        x = (TEXT + (j + 0.5) * CELL) / width
        figure.text(x, y, wrapped(heading), ha="center", va="bottom", fontsize=8)


def draw_report(rows, prompts, logs, path):
    """The same captions and seeds down the rows, and below them the curves of both stages -> path."""
    names = [("cold_start", "loss_generator")]
    for name in names_of(logs["rtdmd"]):
        if name.startswith("reward_") or name == "latent_std":
            names.append(("rtdmd", name))
    head, foot = 0.8, 2.4  # inches for the captions and for the curves
    width = TEXT + len(prompts) * CELL + 0.1
    height = head + len(rows) * CELL + foot
    figure = new_figure(width, height)
    picture_sheet(figure, rows, head, prompts)
    each = width / len(names)
    for i, (stage, name) in enumerate(names):
        place = ((i * each + 0.7) / width, 0.5 / height, (each - 0.9) / width, 1.4 / height)
        axes = figure.add_axes(place)
        curve(axes, *points_of(logs[stage], name), COLORS[i % len(COLORS)])
        axes.set_title(f"{stage}: {name}")
        axes.set_ylabel(unit_of(name))
        axes.set_xlabel("step" if stage == "cold_start" else "epoch")
    save(figure, path)


# ---- figures of the README: the sampler in a world of two modes ---------------------------------
MODES = torch.tensor([-1.0, 1.0])
TAU = 0.15  # standard deviation of the data around each mode


def exact_velocity(x, t):
    """The velocity at level t of the data, MODES with standard deviation TAU, in closed form.

    v = (x - E[x0 | x]) / t. x [N] -> [N].
    """
    variance = (1 - t) ** 2 * TAU**2 + t**2
    off = x[:, None] - (1 - t) * MODES
    weights = (-(off**2) / (2 * variance)).softmax(1)
    mean = (weights * (MODES + (1 - t) * TAU**2 / variance * off)).sum(1)
    return (x - mean) / t


def density(x, t):
    """Of the data's marginal at level t. x [N] -> [N]."""
    variance = (1 - t) ** 2 * TAU**2 + t**2
    off = x[:, None] - (1 - t) * MODES
    bell = (-(off**2) / (2 * variance)).exp().mean(1)
    return bell / math.sqrt(2 * math.pi * variance)


def draw_sampler(path):
    """Four-step paths with the exact velocity, a panel an eta -> path, and the numbers on screen."""
    n = 10000
    levels = sigmas()
    figure = new_figure(12, 3)
    panels = figure.subplots(1, 4, sharey=True)
    for axes, eta in zip(panels, (0, 0.5, 0.9, 1)):
        rng = torch.Generator().manual_seed(0)
        start = torch.randn(n, generator=rng)
        noise = (torch.randn(n, generator=rng) for _ in range(4))
        states = torch.stack(rollout(exact_velocity, start, levels, 4, eta, noise), 1)
        end = states[:, -1]
        lost = (end.abs() < 0.5).float().mean().item()
        title = f"eta {eta}: {100 * lost:.0f} % between the modes"
        correlation = torch.corrcoef(torch.stack([states[:, 0], end]))[0, 1]
        print(
            f"{title}; std {end.std():.3f} (data {(1 + TAU**2) ** 0.5:.3f}); "
            f"correlation of start and end {correlation:.2f}"
        )
        some = states[:24].T.numpy()
        axes.plot(levels, some, color=COLORS[0], alpha=0.5, linewidth=0.8)
        axes.invert_xaxis()
        axes.set_title(title)
        axes.set_xlabel("noise level t")
    panels[0].set_ylabel("x_t")
    figure.tight_layout()
    save(figure, path)


def draw_subinterval(path):
    """x_s of s = .5 re-noised to t in that world, with both std -> path, and the numbers on screen."""
    n = 200000
    s = sigmas()[3]
    names = ("exact", "printed", "true")
    rng = torch.Generator().manual_seed(0)
    mode = MODES[torch.randint(2, (n,), generator=rng)]
    x0 = mode + TAU * torch.randn(n, generator=rng)
    x_s = (1 - s) * x0 + s * torch.randn(n, generator=rng)
    noise = torch.randn(n, generator=rng)
    figure = new_figure(12, 3)
    noise_panel, *density_panels = figure.subplots(1, 4)
    times = [s + (1 - s) * i / 20 for i in range(21)]
    stds = []
    for i, t in enumerate(times):
        exact = renoise(x_s, s, t, noise)
        printed = renoise_as_printed(x_s, s, t, noise)
        clean = (1 - t) * x0
        of_noise = [(x_t - clean).std().item() for x_t in (exact, printed)]
        stds.append((*of_noise, t))
        if i in (2, 10, 18):  # near the beginning, in the middle, near the end of [s, 1]
            axes = density_panels.pop(0)
            true_std = ((1 - t) ** 2 * (1 + TAU**2) + t**2) ** 0.5
            found = (exact.std().item(), printed.std().item(), true_std)
            labels = [f"{name} {std:.3f}" for name, std in zip(names, found)]
            draw_density(axes, exact, printed, t, labels)
            noises = ", ".join(f"{std:.3f}" for std in stds[-1])
            print(f"t = {t:g}: std {', '.join(labels)}; of the noise in it {noises}")
    for name, color, values in zip(names, COLORS, zip(*stds)):
        noise_panel.plot(times, values, color=color, label=name)
    noise_panel.set_title("noise in x_t")
    noise_panel.set_xlabel("noise level t")
    noise_panel.set_ylabel("standard deviation")
    noise_panel.legend(frameon=False)
    figure.tight_layout()
    save(figure, path)


def renoise_as_printed(x_s, s, t, noise):
    """App. B's kernel, with std (t-s)/(1-s)."""
    a, std = variants.sub_interval(s, t)
    return a * x_s + std * noise


def draw_density(axes, exact, printed, t, labels):
    """Histograms of two re-noised samples and the true marginal's density."""
    x = torch.linspace(-3, 3, 200)
    edges = torch.linspace(-3, 3, 31)
    width = (edges[1] - edges[0]).item()
    for values, color, label in zip((exact, printed), COLORS, labels):
        heights = torch.histc(values, 30, -3, 3) / len(values) / width
        axes.stairs(heights.numpy(), edges.numpy(), color=color, label=label)
    heights = density(x, t)
    axes.plot(x.numpy(), heights.numpy(), color=COLORS[2], label=labels[2])
    axes.set_title(f"t = {t:g}, standard deviation:")
    axes.set_xlabel("x_t")
    axes.set_ylabel("density")
    axes.set_ylim(0, 2.1 * heights.max().item())
    axes.legend(frameon=False, loc="upper center")


# ---- figures of the README: pictures of a run ----------------------------------------------------
SUBSETS = [(0, 1), (0, 2), (1, 2), (0, 1, 2)]  # the last one is plain GRPO


@torch.no_grad()
def draw_subsets(run, pretrained, path, device):
    """Eight pictures of one caption by the run's generator, a row for each subset S -> path.

    The steps outside of S share their noise. The standard deviations on screen are means over a
    quarter of the training captions.
    """
    group = 8
    levels = sigmas()
    base, _ = load_tiny(pretrained, device)
    adapters = generator_of(base, f"{run}/cold_start", f"{run}/rtdmd")
    prompts = [row["prompt"] for row in captions("train")[::4] for _ in range(group)]
    v = base.velocity(adapters, base.encode(prompts))
    shape = (len(prompts), *base.latent_shape)

    def normal(key):
        return torch.randn(shape, generator=seeded_rng("cpu", "figures", key)).to(device)

    def shared(key):
        draw = SimpleNamespace(shape=base.latent_shape, device=device)
        return rtdmd_rl.shared_noise(draw, prompts, 0, 0, key)

    rows = {}
    for S in SUBSETS:
        noise = [normal(k) if k in S else shared(k) for k in range(3)]
        noise.append(torch.zeros_like(noise[0]))
        x0 = rollout(v, normal("start"), levels, 4, 0.9, noise)[-1]
        spread = x0.unflatten(0, (-1, group)).std(1).mean()
        title = f"S = {{{', '.join(str(k + 1) for k in S)}}}"
        if len(S) == 3:
            title += " (GRPO)"
        count = len(prompts) // group
        print(f"{title}: std within a group {spread:.3f}, mean over {count} captions")
        rows[f"{title}\nstd {spread:.2f}"] = base.decode(x0[:group])
    figure = new_figure(TEXT + group * CELL + 0.05, len(rows) * CELL + 0.05)
    picture_sheet(figure, rows, 0.02)
    save(figure, path)


@torch.no_grad()
def draw_hacking(run, stages_2, pretrained, n, path, device):
    """What stages 2 made of one cold start -> path, and the numbers of each on screen.

    Pictures are the scoreboard's of three captions that leave the colour open; the numbers are over
    all its captions, n pictures a category. Dies where the stages 2 were not trained on one and the
    same stage 1; that it was this run's is not checked.
    """
    starts = set()
    for stage in stages_2:
        flags = read(f"{stage}/ckpt.pt", "checkpoint")["flags"]
        starts.add(flags["pretrained or cold_start content"])
    if len(starts) > 1:
        die(f"{' '.join(stages_2)}: were not trained on one and the same stage 1")
    rows = report_captions(n)
    shown = []
    for prompt in ("a circle", "a square and a triangle", "three triangles"):
        shown += [i for i, row in enumerate(rows) if row["prompt"] == prompt][:4]
    sheet = {}
    for stage in ("", *stages_2):
        base, clips = load_tiny(pretrained, device)
        adapters = generator_of(base, f"{run}/cold_start", stage)
        numbers, pictures = evaluate(base, clips, rows, adapters, sigmas(), 0.9)
        name = os.path.basename(os.path.abspath(stage)) if stage else "cold start"
        lines = (
            f"CLIPScore {numbers['clipscore']:.3f}",
            f"checker {100 * numbers['checker']:.1f} %",
            f"judge {numbers['judge']:.3f}",
            f"colour bits {numbers['color_bits']:.2f}",
        )
        print(f"{name}: {', '.join(lines)}")
        sheet["\n".join((name, *lines))] = pictures[shown]
    head = 0.7
    figure = new_figure(TEXT + len(shown) * CELL + 0.05, head + len(sheet) * CELL + 0.05)
    picture_sheet(figure, sheet, head, [rows[i]["prompt"] for i in shown])
    save(figure, path)


@torch.no_grad()
def draw_kept(run, pretrained, path, device):
    """How the pictures of six captions changed over both stages of a tiny run -> path.

    A row is a kept file (--keep_every) or a stage's last one; the seeds are the same in all.
    """
    rows = {}
    stage_1 = f"{run}/cold_start"
    for stage in ("cold_start", "rtdmd"):
        folder = f"{run}/{stage}"
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found = [match for match in map(KEPT_GENERATOR.fullmatch, names) if match]
        files = [(f"after {m[1]}", m[0]) for m in sorted(found, key=lambda m: int(m[1]))]
        if "generator_ema.pt" in names:
            files.append(("at the end", "generator_ema.pt"))
        for when, name in files:
            base, _ = load_tiny(pretrained, device)
            weights = f"{folder}/{name}"
            of_both = (weights,) if stage == "cold_start" else (stage_1, weights)
            adapters = generator_of(base, *of_both)
            settings = settings_of(weights)
            levels = base.sigmas(settings.get("num_steps", 4))
            eta = settings.get("eta", 0.9)
            rows[f"{stage}\n{when}"] = six_pictures(base, adapters, levels, eta)
    if not rows:
        die(f"{run}: holds no cold_start/ or rtdmd/ with weights")
    head = 0.8
    width = TEXT + len(FRONT_CAPTIONS) * CELL + 0.05
    figure = new_figure(width, head + len(rows) * CELL + 0.05)
    picture_sheet(figure, rows, head, FRONT_CAPTIONS)
    save(figure, path)
    print(path)


# ---- the first picture of the README -------------------------------------------------------------
FRONT_CAPTIONS = (
    "a circle above a square",
    "a green triangle",
    "two circles",
    "a square left of a triangle",
    "a blue circle and a green square",
    "three triangles",
)
FRONT_CFG = 1.5  # the teacher's best guidance in results/long.json
TEACHER_STEPS = (1, 2, 4, 8, 16, 50)


@torch.no_grad()
def draw_front(run, pretrained, n, out_dir, device):
    """Teacher, AC-DMD and RTDMD on the same captions and seeds; below, quality over evaluations.

    run: holds cold_start/ and rtdmd/. n: pictures a category for the teacher's numbers, where
    out_dir/results/steps.json is not there.
    """
    long_run = json_of(f"{out_dir}/results/long.json")["rows"]
    students = json_of(f"{out_dir}/results/students.json")["rows"]
    base, clips = load_tiny(pretrained, device)
    path = f"{out_dir}/results/steps.json"
    if not os.path.exists(path):
        measure_teacher(base, clips, n, path)
    teacher = json_of(path)["curves"]
    stacked = generator_of(base, f"{run}/cold_start", f"{run}/rtdmd")
    sheet = {}
    for name, adapters, levels, eta, cfg in (
        ("teacher, 50 steps\n100 evaluations", [], teacher_levels(base, 50), 0.0, FRONT_CFG),
        ("AC-DMD, 4 steps\n4 evaluations", stacked[:1], base.sigmas(4), 0.9, 1.0),
        ("RTDMD, 4 steps\n4 evaluations", stacked, base.sigmas(4), 0.9, 1.0),
    ):
        sheet[name] = six_pictures(base, adapters, levels, eta, cfg)
    head, foot = 0.8, 3.0
    width = TEXT + len(FRONT_CAPTIONS) * CELL + 0.1
    height = head + len(sheet) * CELL + foot
    figure = new_figure(width, height)
    picture_sheet(figure, sheet, head, FRONT_CAPTIONS)
    for i, (name, label) in enumerate(
        (("checker", "right pictures, %"), ("clipscore", "CLIPScore"), ("judge", "held-out judge"))
    ):
        each = width / 3
        place = ((i * each + 0.65) / width, 0.5 / height, (each - 0.75) / width, 2.1 / height)
        axes = figure.add_axes(place)
        draw_quality(axes, name, teacher, students, long_run)
        axes.set_ylabel(label)
        if name == "checker":
            axes.legend(frameon=False, fontsize=7, loc="lower right")
    save(figure, f"{out_dir}/front.png")


def six_pictures(base, adapters, levels, eta, cfg=1.0):
    """One picture for each of FRONT_CAPTIONS, from seeds 0 to 5 -> [6,3,H,W]"""
    v = base.velocity(adapters, base.encode(list(FRONT_CAPTIONS)), cfg)
    seeds = range(len(FRONT_CAPTIONS))
    return base.decode(draw(v, seeds, base.latent_shape, levels, eta, base.device))


def json_of(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def measure_teacher(base, clips, n, path):
    """The teacher's numbers with and without guidance, by steps, on the student's noise levels -> path."""
    curves = {}
    rows = report_captions(n)
    for title, cfg in (
        (f"teacher, guidance {FRONT_CFG:g}", FRONT_CFG),
        ("teacher, no guidance", 1.0),
    ):
        curves[title] = []
        for steps in TEACHER_STEPS:
            levels = base.sigmas(steps)
            numbers, _ = evaluate(base, clips, rows, [], levels, 0.0, cfg, NEW_SEEDS)
            del numbers["images_per_s"]
            point = {"steps": steps, "evaluations": evaluations(levels, cfg), **numbers}
            curves[title].append(point)
    content = {"pictures_a_point": len(rows), "curves": curves}
    write_atomically({path: json.dumps(content, indent=1).encode()})


def draw_quality(axes, name, teacher, students, long_run):
    """One number over evaluations of the transformer a picture; means and deviations over seeds.

    teacher: {title: points}, as in steps.json; students: the rows of K = 1, 2, 4; long_run: {title:
    numbers of the seeds}.
    """
    scale = 100 if name == "checker" else 1

    def of_seeds(numbers):
        return torch.tensor([scale * of_seed[name] for of_seed in numbers])

    for (title, points), color in zip(teacher.items(), COLORS[::5]):
        x = [point["evaluations"] for point in points]
        y = [scale * point[name] for point in points]
        axes.plot(x, y, color=color, marker=".", label=title)

    runs = [of_seeds(row["seeds"].values()) for row in students]
    x = [int(row["name"].removeprefix("K = ")) for row in students]
    y = [values.mean() for values in runs]
    errors = [values.std() for values in runs]
    axes.errorbar(x, y, errors, color=COLORS[2], marker=".", label="AC-DMD, 1 000 steps")

    for title, color in (("AC-DMD, 4 steps", COLORS[2]), ("RTDMD, 4 steps", COLORS[1])):
        values = of_seeds(long_run[title])
        label = f"{title.split(',')[0]}, long run"
        axes.errorbar(
            [4], values.mean(), values.std(), color=color, marker="o", linestyle="", label=label
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("evaluations a picture")


# ---- the command line ----------------------------------------------------------------------------
def arguments():
    parser = Parser("Curves of runs, and the pictures of the README.")
    add = parser.add_argument
    choices = ("curves", "figures", "hacking", "kept", "front")
    add("what", choices=choices, help="what to draw")
    add("runs", nargs="+", metavar="RUN", help="curves: any runs; else a tiny run, then stages 2")
    add("--out_dir", help="where the pictures go; default: the first run")
    add("--pretrained", default=PRETRAINED, help="the pipeline that the run was made with")
    add("--pictures", type=int, help="of each of the six categories; hacking: 72, front: 216")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    args = parser.parse_args()
    if args.what in ("figures", "kept", "front") and len(args.runs) != 1:
        die(f"{args.what} takes the directory of one tiny run")
    if args.what == "hacking" and len(args.runs) < 2:
        die("hacking takes the directory of a tiny run and stages 2 that were trained on it")
    if args.pictures is None:
        args.pictures = 216 if args.what == "front" else 72
    if args.pictures < 1:
        die(f"--pictures must be positive, got {args.pictures}")
    args.out_dir = args.out_dir or args.runs[0]
    return args


def main():
    args = arguments()
    if args.what == "curves":
        end_on_signals("stopped by a signal")
        make_out_dir(args.out_dir, "", 0)
        draw_curves(args.runs, f"{args.out_dir}/curves.png")
        return
    run, *stages_2 = args.runs
    device, _, _ = setup(args, training=False)
    if args.what == "hacking":
        path = f"{args.out_dir}/hacking.png"
        checked(draw_hacking, run, stages_2, args.pretrained, args.pictures, path, device)
        return
    if args.what == "kept":
        checked(draw_kept, run, args.pretrained, f"{args.out_dir}/kept.png", device)
        return
    if args.what == "front":
        for name, maker in (("long", "make long"), ("students", "tools.ablations students")):
            if not os.path.exists(f"{args.out_dir}/results/{name}.json"):
                die(
                    f"{args.out_dir}/results/{name}.json is not there; {maker} leaves one in its run"
                )
        checked(draw_front, run, args.pretrained, args.pictures, args.out_dir, device)
        return
    draw_sampler(f"{args.out_dir}/sampler.png")
    draw_subinterval(f"{args.out_dir}/subinterval.png")
    draw_subsets(run, args.pretrained, f"{args.out_dir}/subgrpo.png", device)


if __name__ == "__main__":
    main()
