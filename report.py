"""What a run achieved: the scoreboard of the tiny world, the curves of any run, and the paper's ablation tables at tiny scale.

    python report.py out/tiny                           # what `make tiny` ends with: the same captions and seeds through teacher-50,
                                                        # teacher-4, AC-DMD and RTDMD -> report.json, report.png and a table
    python report.py --curves out/cold_start out/rtdmd  # every number of their log.jsonl, a colour a run -> out/cold_start/curves.png
    python report.py --grids                            # the teacher alone, with diffusers' noise levels and with ours
    python report.py out/tiny --figures assets          # the pictures in the README, but for the one of hacking:
    python report.py out/tiny --figures assets --runs out/tiny/rtdmd out/tiny/hacked      # several stage 2 on one stage 1, side by side
    python report.py --ablations                        # make ablations: Tables 3 and 4 and the fake score's quality -> out/ablations
    python report.py --ablations --jobs 7 --minutes 20     # the same on one GPU and 16 cores, and an end to it

The numbers (for all of these): checker, the share of pictures that satisfy their caption exactly; CLIPScore, which is a reward; the
judge, a CLIP that nothing is trained on; and `diversity`, since a reward can be hacked by drawing one good picture for ever.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import sys
import time
import traceback
from types import SimpleNamespace

import torch

import cold_start
import rtdmd_rl
from checkpoint import read
from cold_start import HERE, PRESETS, fake_score_loss, renoise_time
from common import as_bytes, checked, die, generator, setup, write_atomically
from cps import renoise, rollout, sigmas
from model import (
    adapter,
    add_adapter,
    decode,
    graphed,
    load_adapter,
    load_pipeline,
    play,
    set_adapters,
    text_encoder,
    train_only,
)
from prompts import load_prompts
from rewards import build
from sample import draw, load_generator, teacher_levels
from tiny import CATEGORIES, SIZE, captions, check, detect

FIRST_SEED, BATCH = (
    10**6,
    72,
)  # pictures of a report: far from the seeds of samples; so many at once


# ------------------------------------------------------------------------------------------------------- 1. the scoreboard
def report_captions(n):
    """n test captions of each category, equal ones side by side; 72 is a multiple of every category's number of captions."""
    own = {tag: [r for r in captions("test") if r["tag"] == tag] for tag in CATEGORIES}
    return [own[tag][i * len(own[tag]) // n] for tag in CATEGORIES for i in range(n)]


def diversity(rows, latents, found):
    """What becomes of what a caption leaves open -> (distance, colour bits, place bits), means over captions: distance between the
    latents of two pictures of one caption; -log2 P(two of them agree in the first object's colour: uniform is 2 bits; in its cell of
    the layout: uniform is 3.17 bits)."""
    members, distance, color, place = {}, [], [], []
    for i, row in enumerate(rows):
        members.setdefault(row["prompt"], []).append(i)
    for index in members.values():
        first = rows[index[0]]["include"][0]
        distance += [torch.pdist(latents[index].flatten(1)).mean().item()] if len(index) > 1 else []
        seen = [
            o
            for o in (next((o for o in found[i] if o[0] == first["class"]), None) for i in index)
            if o
        ]
        pairs = [(a, b) for j, a in enumerate(seen) for b in seen[:j]]
        if pairs:
            cell = lambda o: (o[2] * 3 // SIZE, o[3] * 3 // SIZE)
            place.append(sum(cell(a) == cell(b) for a, b in pairs) / len(pairs))
            color += (
                [sum(a[1] == b[1] for a, b in pairs) / len(pairs)] if "color" not in first else []
            )
    bits = lambda agree: -math.log2(max(sum(agree) / max(1, len(agree)), 1e-6))
    return sum(distance) / max(1, len(distance)), bits(color), bits(place)


@torch.no_grad()
def evaluate(pipe, encode, clips, rows, adapters, levels, eta, cfg=1.0):
    """Draw one picture for each of rows (report_captions) -> (its numbers as a dict, the pictures on the CPU)."""
    latents, pictures, scores, start = [], [], [[] for _ in clips], time.time()
    batches = [
        (
            [r["prompt"] for r in rows[i : i + BATCH]],
            range(FIRST_SEED + i, FIRST_SEED + min(i + BATCH, len(rows))),
        )
        for i in range(0, len(rows), BATCH)
    ]
    for texts, seeds in batches:
        v = play(pipe.transformer, adapters, encode(texts), encode([""]) if cfg != 1 else None, cfg)
        latents.append(draw(v, seeds, pipe.latent_shape, levels, eta, pipe.transformer.device))
        pictures.append(decode(pipe, latents[-1]))
    seconds = time.time() - start
    for score, clip in zip(scores, clips):
        for images, (texts, _) in zip(pictures, batches):
            score += clip(images, texts, None).tolist()
    pictures, latents, mean = torch.cat(pictures), torch.cat(latents), lambda x: sum(x) / len(x)
    found = detect(pictures)
    passed = [check(objects, row) for objects, row in zip(found, rows)]
    distance, color_bits, place_bits = diversity(rows, latents, found)
    return {
        "checker": mean(passed),
        **{tag: mean([p for p, r in zip(passed, rows) if r["tag"] == tag]) for tag in CATEGORIES},
        **{clip.name: mean(score) for clip, score in zip(clips, scores)},
        "distance": distance,
        "color_bits": color_bits,
        "place_bits": place_bits,
        "images_per_s": len(rows) / seconds,
    }, pictures.cpu()


def load_tiny(pretrained, device, **more):
    """-> (flags, pipeline, text encoder, [CLIPScore, judge]) of the tiny model, for `evaluate`"""
    args = SimpleNamespace(
        **{
            **PRESETS["tiny"],
            "pretrained": pretrained,
            "seed": 0,
            "lora_rank": 32,
            "lora_alpha": None,
            **more,
        }
    )
    pipe = load_pipeline(args, device)
    clips = build(
        "clipscore,judge", device, [f"clipscore={pretrained}/clip", f"judge={pretrained}/judge"]
    )
    return args, pipe, text_encoder(pipe, args), clips


def scoreboard(run, pretrained, n, device):
    """run/cold_start and run/rtdmd on the test captions and new seeds, n pictures a category -> run/report.json, report.png, a table."""
    logs = {stage: read_log(f"{run}/{stage}") for stage in ("cold_start", "rtdmd")}
    args, pipe, encode, clips = load_tiny(
        pretrained, device, cold_start=f"{run}/cold_start", rtdmd=f"{run}/rtdmd"
    )
    stacked, rows, table, sheet = load_generator(pipe, args), report_captions(n), [], []
    many = teacher_levels(pipe, 50)  # the reference: what a user's pipeline draws
    few = sigmas(
        4
    )  # the student's, for the teacher too: what distillation adds shows at equal levels
    shown = [(i * len(rows) // 18 + i % 3) % len(rows) for i in range(18)]
    for name, adapters, cfg, levels, eta, stage in (
        ("teacher", [], args.cfg, many, 0.0, None),
        ("teacher", [], args.cfg, few, 0.0, None),
        ("teacher, no CFG", [], 1.0, few, 0.0, None),
        ("AC-DMD", stacked[:1], 1.0, few, 0.9, "cold_start"),
        ("RTDMD", stacked, 1.0, few, 0.9, "rtdmd"),
    ):
        numbers, pictures = evaluate(pipe, encode, clips, rows, adapters, levels, eta, cfg)
        table.append(
            {
                **row_start(name, levels, cfg),
                **numbers,
                "train_minutes": sum(line["seconds"] for line in logs[stage]) / 60 if stage else 0,
            }
        )
        sheet += [
            (f"{name}\n{len(levels) - 1} steps: {100 * numbers['checker']:.0f} %", pictures[shown])
        ]
    machine = machine_name(device)
    with open(f"{run}/report.json", "w") as f:
        json.dump(
            {
                "machine": machine,
                "torch": torch.__version__,
                "pictures_per_row": len(rows),
                "first_seed": FIRST_SEED,
                "rows": table,
            },
            f,
            indent=1,
        )
    print_table(table)
    draw_report(sheet, [rows[i]["prompt"] for i in shown], logs, f"{run}/report.png")


def row_start(name, levels, cfg):
    """The first columns of a row of the scoreboard; guidance takes two evaluations of the transformer a step."""
    steps = len(levels) - 1
    return {"name": name, "steps": steps, "NFE": steps * (1 if cfg == 1 else 2)}


def print_table(rows):
    """Dicts with the same keys, as a table in markdown."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        cells = [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def machine_name(device):
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores"


def teacher_grids(pretrained, n, device):
    """The scoreboard's guided teacher, its captions and seeds, with diffusers' noise levels and with ours: what the grid is worth."""
    args, pipe, encode, clips = load_tiny(pretrained, device)
    rows = report_captions(n)
    table = []
    for steps in (50, 4):
        for grid, levels in (("diffusers'", teacher_levels(pipe, steps)), ("our", sigmas(steps))):
            numbers, _ = evaluate(pipe, encode, clips, rows, [], levels, 0.0, args.cfg)
            table.append({**row_start(f"teacher, {grid} grid", levels, args.cfg), **numbers})
    print(f"{len(rows)} pictures a row, {machine_name(device)}, torch {torch.__version__}\n")
    print_table(table)


# --------------------------------------------------------------------------------------- what sample.py --rewards and --compare print
def mean_and_error(scores, prompts):
    """Mean and its standard error; pictures of one prompt are not independent, so the prompts' means are the samples if there are several."""
    groups = {}
    for score, prompt in zip(scores, prompts):
        groups.setdefault(prompt, []).append(score)
    samples = torch.tensor(
        [sum(g) / len(g) for g in groups.values()] if len(groups) > 1 else scores,
        dtype=torch.float64,
    )
    return samples.mean().item(), samples.std().item() / math.sqrt(len(samples)) if len(
        samples
    ) > 1 else math.nan


def write_scores(rows, seed, results, path):
    """results {who: {reward: [score of each row]}} -> a .jsonl with a line a picture; on screen the means, GenEval's by category too."""
    (first, own), *others = results.items()
    tags, prompts = [row["metadata"].get("tag") for row in rows], [row["prompt"] for row in rows]
    lines = [
        {
            "image": f"{i:05d}.png",
            "prompt": prompts[i],
            **({"tag": tags[i]} if tags[i] else {}),
            "seed": seed + i,
            **{r: s[i] for r, s in own.items()},
            **{who: {r: s[i] for r, s in theirs.items()} for who, theirs in others},
        }
        for i in range(len(rows))
    ]
    write_atomically({path: "".join(json.dumps(line) + "\n" for line in lines).encode()})
    by_category = ("geneval", "geneval_soft")
    width = 28  # of the first column, in which "geneval_soft single_object" is the longest
    if others:
        print(
            " " * width
            + "".join(
                f"{title:22s}" for who, _ in others for title in (first, who, f"{first} - {who}")
            )
        )
    for name in own:
        columns, means = (
            [own[name]]
            + [
                c
                for _, theirs in others
                for c in (theirs[name], [a - b for a, b in zip(own[name], theirs[name])])
            ],
            [],
        )
        for tag in (None, *(sorted(set(tags)) if name in by_category and None not in tags else ())):
            here = [i for i in range(len(rows)) if tag in (None, tags[i])]
            means.append(
                [mean_and_error([c[i] for i in here], [prompts[i] for i in here]) for c in columns]
            )
            print(
                f"{f'{name} {tag or str()}':{width}s}"
                + "".join(f"{f'{m:.4f} +- {e:.4f}':22s}" for m, e in means[-1]).rstrip()
            )
        if len(means) > 1:  # this is what GenEval calls its score
            print(
                f"{f'{name}, categories':{width}s}"
                + "".join(
                    f"{sum(m for m, _ in c[1:]) / (len(c) - 1):<22.4f}" for c in zip(*means)
                ).rstrip()
            )


# -------------------------------------------------------------------------------------------------------------- 2. pictures
PALETTE = [
    (40, 90, 200),
    (210, 70, 40),
    (30, 150, 80),
    (150, 60, 170),
    (220, 160, 20),
    (90, 90, 90),
]


def read_log(run):
    """The lines of run/log.jsonl; half a line at the end, of a run that is still going on, is left out."""
    try:
        with open(f"{run}/log.jsonl") as f:
            return [json.loads(line) for line in f if line.endswith("\n")]
    except (OSError, ValueError) as e:
        die(
            f"{run}: holds no readable log.jsonl ({e}); a run of cold_start.py or rtdmd_rl.py makes one"
        )


def panel(pen, x, y, width, height, title, curves):
    """One set of axes with its top left corner at x, y. curves: for each run the [(step, value), ...] of one number; means over at most
    60 pieces are drawn, since single steps are noise."""
    from PIL import ImageFont

    font, small = ImageFont.load_default(14), ImageFont.load_default(9)
    means = lambda points: [
        tuple(sum(v) / len(piece) for v in zip(*piece))
        for piece in (
            points[i * len(points) // 60 : (i + 1) * len(points) // 60] for i in range(60)
        )
        if piece
    ]
    curves = [means(points) for points in curves]
    steps, values = zip(*[point for points in curves for point in points])
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    place = lambda s, v: (
        x + 46 + (width - 60) * (s - left) / max(right - left, 1e-9),
        y + height - 8 - (height - 34) * (v - low) / max(high - low, 1e-9),
    )
    pen.text((x + 46, y), title, "black", font)
    (
        pen.text((x, y + 20), f"{high:.3g}", "black", small),
        pen.text((x, y + height - 14), f"{low:.3g}", "black", small),
    )
    for points, color in zip(curves, PALETTE * len(curves)):
        pen.line([place(*point) for point in points], fill=color, width=2)


def paste(image, pictures, x, y, cell=66):
    """Pictures [N,3,h,w] side by side into image, the first at x, y and one every `cell` pixels."""
    from PIL import Image

    for j, picture in enumerate((pictures.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()):
        image.paste(
            Image.fromarray(picture).resize((cell - 2, cell - 2), Image.BICUBIC), (x + j * cell, y)
        )


def draw_report(sheet, prompts, logs, path):
    """The same captions and seeds down the rows, and below them the curves of both stages."""
    from PIL import Image, ImageDraw, ImageFont

    font, small, left, top, cell = (
        ImageFont.load_default(14),
        ImageFont.load_default(9),
        130,
        60,
        66,
    )
    image = Image.new("RGB", (left + 18 * cell, top + len(sheet) * cell + 200), "white")
    pen = ImageDraw.Draw(image)
    for j, prompt in enumerate(prompts):
        words = prompt.split()
        pen.text(
            (left + j * cell, 4),
            "\n".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2)),
            "black",
            small,
        )
    for i, (title, pictures) in enumerate(sheet):
        pen.text((4, top + i * cell + 14), title, "black", font)
        paste(image, pictures, left, top + i * cell, cell)
    curves = [("cold_start", "loss_generator")] + [
        ("rtdmd", k) for k in logs["rtdmd"][0] if k.startswith("reward_") or k == "latent_std"
    ]
    for c, (stage, key) in enumerate(curves):
        points = [(line["step"], line[key]) for line in logs[stage] if line.get(key)] or [(0, 0)]
        panel(
            pen,
            4 + c * image.width // len(curves),
            image.height - 190,
            image.width // len(curves),
            186,
            f"{stage}: {key}",
            [points],
        )
    image.save(path)


def draw_curves(runs, path):
    """Every number of the runs' logs over the steps, a panel a number, a colour a run."""
    from PIL import Image, ImageDraw

    logs = [read_log(run) for run in runs]
    keys = list(
        dict.fromkeys(
            k
            for log in logs
            for line in log
            for k, v in line.items()
            if isinstance(v, (int, float)) and k != "step"
        )
    )
    if not keys:
        die(f"{', '.join(runs)}: their logs hold no numbers yet")
    width, height, top = 360, 190, 20 + 16 * len(runs)
    image = Image.new("RGB", (3 * width, top + height * -(-len(keys) // 3)), "white")
    pen = ImageDraw.Draw(image)
    for i, (run, color) in enumerate(zip(runs, PALETTE * len(runs))):
        pen.text((10, 8 + 16 * i), run, color)
    for i, key in enumerate(keys):
        curves = [
            [(line["step"], line[key]) for line in log if isinstance(line.get(key), (int, float))]
            for log in logs
        ]
        panel(pen, i % 3 * width + 6, top + i // 3 * height, width - 12, height - 10, key, curves)
    write_atomically({path: as_bytes(image.save, format="png")})
    print(path)


# ----------------------------------------------------------------------------------------------------- 3. figures of the README
def exact_velocity(x, t, tau=0.15):
    """The velocity at level t of the data +-1 with standard deviation tau, in closed form: v = (x - E[x0 | x]) / t. x [N] -> [N]."""
    modes, var = torch.tensor([-1.0, 1.0]), (1 - t) ** 2 * tau**2 + t**2
    off = x[:, None] - (1 - t) * modes
    mean = ((-(off**2) / (2 * var)).softmax(1) * (modes + (1 - t) * tau**2 / var * off)).sum(1)
    return (x - mean) / t


@torch.no_grad()
def figures(run, pretrained, folder, device):
    """Three pictures into folder, and their numbers on the screen. sampler.png: 4-step paths for four eta, with the exact velocity of a
    world of two modes. subinterval.png: in that world, x_s of s = .5 re-noised to t, with both std. subgrpo.png: eight pictures of a caption
    ("a circle") by the run's generator, a row for each S; the steps outside of it share their noise."""
    from PIL import Image, ImageDraw, ImageFont

    font, levels, N = ImageFont.load_default(14), sigmas(), 10000
    image = Image.new("RGB", (1000, 240), "white")
    for i, eta in enumerate((0, 0.5, 0.9, 1)):
        g = torch.Generator().manual_seed(0)
        path = rollout(
            exact_velocity,
            torch.randn(N, generator=g),
            levels,
            4,
            eta,
            (torch.randn(N, generator=g) for _ in range(4)),
        )
        path, end = torch.stack(path, 1), path[-1]
        lost = (end.abs() < 0.5).float().mean().item()
        title = f"eta {eta}: {100 * lost:.0f} % between the modes"
        panel(
            ImageDraw.Draw(image),
            250 * i,
            8,
            248,
            220,
            title,
            [[(-t, x) for t, x in zip(levels, line)] for line in path[:48].tolist()],
        )
        correlation = torch.corrcoef(torch.stack([path[:, 0], end]))[0, 1]
        print(
            f"{title}; std {end.std():.3f} (data {(1 + 0.15**2) ** 0.5:.3f}); correlation of start and end {correlation:.2f}"
        )
    write_atomically({f"{folder}/sampler.png": as_bytes(image.save, format="png")})

    image, small, g, N, s = (
        Image.new("RGB", (1000, 240), "white"),
        ImageFont.load_default(11),
        torch.Generator().manual_seed(0),
        200000,
        levels[3],
    )
    modes, x, edges, pen = (
        torch.tensor([-1.0, 1.0]),
        torch.linspace(-3, 3, 60),
        torch.linspace(-3, 3, 31),
        ImageDraw.Draw(image),
    )
    x0 = modes[torch.randint(2, (N,), generator=g)] + 0.15 * torch.randn(N, generator=g)
    x_s, noise, of_noise = (
        (1 - s) * x0 + s * torch.randn(N, generator=g),
        torch.randn(N, generator=g),
        [[], [], []],
    )
    for i in range(21):
        t = s + (1 - s) * i / 20
        x_t, var = (
            [renoise(x_s, s, t, noise, std) for std in ("exact", "printed")],
            (1 - t) ** 2 * 0.15**2 + t**2,
        )
        for points, std in zip(of_noise, [*((y - (1 - t) * x0).std().item() for y in x_t), t]):
            points.append((t, std))
        if i in (2, 10, 18):  # near the beginning, in the middle, near the end of [s, 1]
            bars = [(torch.histc(y, 30, -3, 3) / N / 0.2).repeat_interleave(2) for y in x_t]
            density = (-((x[:, None] - (1 - t) * modes) ** 2) / (2 * var)).exp().mean(1) / (
                2 * math.pi * var
            ) ** 0.5
            curves = [
                *(zip(edges.repeat_interleave(2)[1:-1].tolist(), y.tolist()) for y in bars),
                zip(x.tolist(), density.tolist()),
            ]
            panel(
                pen,
                250 + i // 8 * 250,
                8,
                248,
                220,
                f"t = {t:g}, standard deviation",
                [list(curve) for curve in curves],
            )
            found = [
                f"{name} {std:.3f}"
                for name, std in zip(
                    ("exact", "printed", "true"),
                    [*(y.std().item() for y in x_t), ((1 - t) ** 2 + var) ** 0.5],
                )
            ]
            for j, text in enumerate(found):
                pen.text((298 + i // 8 * 250, 28 + 13 * j), text, PALETTE[j], small)
            print(
                f"t = {t:g}: std {', '.join(found)}; of the noise in it {', '.join(f'{points[-1][1]:.3f}' for points in of_noise)}"
            )
    panel(pen, 0, 8, 248, 220, f"noise in x_t, t = {s:g} to 1", of_noise)
    write_atomically({f"{folder}/subinterval.png": as_bytes(image.save, format="png")})

    args, pipe, encode, _ = load_tiny(
        pretrained, device, cold_start=f"{run}/cold_start", rtdmd=f"{run}/rtdmd"
    )
    adapters, prompts = (
        load_generator(pipe, args),
        [row["prompt"] for row in captions("train")[::4] for _ in range(8)],
    )
    rows, v = [(0, 1), (0, 2), (1, 2), (0, 1, 2)], play(pipe.transformer, adapters, encode(prompts))
    image = Image.new("RGB", (150 + 8 * 66, len(rows) * 66), "white")
    normal = lambda k: torch.randn(
        len(prompts), *pipe.latent_shape, generator=generator("cpu", "figures", k)
    ).to(device)
    for i, S in enumerate(rows):
        noise = [
            normal(k)
            if k in S
            else rtdmd_rl.shared_noise(pipe.latent_shape, prompts, device, 0, 0, k)
            for k in range(3)
        ]
        x0 = rollout(v, normal("start"), levels, 4, 0.9, [*noise, torch.zeros_like(noise[0])])[-1]
        title = f"S = {{{', '.join(str(k + 1) for k in S)}}}" + (" (GRPO)" if len(S) == 3 else "")
        std = x0.unflatten(0, (-1, 8)).std(1).mean()
        print(f"{title}: std within a group {std:.3f}, mean over {len(prompts) // 8} captions")
        ImageDraw.Draw(image).text((6, i * 66 + 14), f"{title}\nstd {std:.2f}", "black", font)
        paste(image, decode(pipe, x0[:8]), 150, i * 66)
    write_atomically({f"{folder}/subgrpo.png": as_bytes(image.save, format="png")})


@torch.no_grad()
def hacking(run, runs, pretrained, n, folder, device):
    """The scoreboard's pictures of three captions that leave the colour open, by run's cold start and by the stages 2 that were trained on
    it, with the numbers of each over all captions, n pictures a category -> folder/hacking.png. Not checked: that it was run's stage 1."""
    from PIL import Image, ImageDraw, ImageFont

    starts = {
        read(f"{stage}/ckpt.pt", "checkpoint")["flags"]["pretrained or cold_start content"]
        for stage in runs
    }
    if len(starts) > 1:
        die(f"--runs {' '.join(runs)}: were not trained on one and the same stage 1")
    rows, font, cell, height = report_captions(n), ImageFont.load_default(14), 40, 64
    image = Image.new("RGB", (24 * cell + 28, 28 + height * (1 + len(runs))), "white")
    pen, shown = ImageDraw.Draw(image), {}
    for j, prompt in enumerate(("a circle", "a square and a triangle", "three triangles")):
        shown[j * (8 * cell + 14)] = [k for k, row in enumerate(rows) if row["prompt"] == prompt][
            :8
        ]
        pen.text((j * (8 * cell + 14), 2), f'"{prompt}"', "black", font)
    for i, stage in enumerate(["", *runs]):
        args, pipe, encode, clips = load_tiny(
            pretrained, device, cold_start=f"{run}/cold_start", rtdmd=stage
        )
        numbers, pictures = evaluate(
            pipe, encode, clips, rows, load_generator(pipe, args), sigmas(), 0.9
        )
        title = (
            f"{os.path.basename(os.path.abspath(stage)) if stage else 'cold start'}: CLIPScore {numbers['clipscore']:.3f}, checker "
            f"{100 * numbers['checker']:.1f} %, judge {numbers['judge']:.3f}, colour bits {numbers['color_bits']:.2f}"
        )
        print(title)
        pen.text((0, 28 + i * height), title, PALETTE[0], font)
        for x, index in shown.items():
            paste(image, pictures[index], x, 47 + i * height, cell)
    write_atomically({f"{folder}/hacking.png": as_bytes(image.save, format="png")})


# ------------------------------------------------------------------------------------------------------------- 4. ablations
# Chosen before any result was seen, but for L_det's weight (the preset's) and its row with five times as much. All rows
# of a table make the same number of updates on the same number of pictures, from the same prompts in the same order, and start from the
# same weights (stage 2: from the same stage 1 for each seed). Stage 2's ONLY reward is CLIPScore, the differentiable one, so that the
# checker, the judge and the diversity are all held out and hacking can show in them.
TABLES = {  # table: {row: (run, the paper's CLIPScore / PickScore / HPSv2 on SD3.5-M, DrawBench)}; a run in two tables is made once
    "table3": {
        "AC-DMD, gamma .01, eta .9": ("1", ".2843 / 23.5690 / .3456"),
        "A-DMD (gamma 0)": ("1 --gamma 0", ".2753 / 22.0116 / .3188"),
        "AC-DMD, gamma .1": ("1 --gamma .1", ".2846 / 23.2105 / .3362"),
        "AC-DMD, gamma .005": ("1 --gamma .005", ".2837 / 22.8546 / .3324"),
        "AC-DMD, gamma .001": ("1 --gamma .001", ".2831 / 22.2378 / .3294"),
        "DMD2-style": ("1 --dmd2 --gamma 0", "as A-DMD, eta 1 (Fig. 5)"),
        "AC-DMD, eta 0": ("1 --eta 0", "worse (Fig. 5)"),
        "AC-DMD, eta .5": ("1 --eta .5", "worse (Fig. 5)"),
        "AC-DMD, eta 1": ("1 --eta 1", "alike (Fig. 5)"),
    },
    "table4": {
        "cold start": ("1", ".2822 / 22.5056 / .2942"),
        "GRPO": ("2 --subset 3 --det_weight 0", ".2759 / 23.3064 / .3268"),
        "GRPO + L_det": ("2 --subset 3", ""),
        "SubGRPO M=1": ("2 --subset 1 --det_weight 0", ".2798 / 23.3272 / .3332"),
        "SubGRPO M=1 + L_det": ("2 --subset 1", ".2802 / 23.4156 / .3318"),
        "SubGRPO M=2": ("2 --det_weight 0", ".2839 / 23.4520 / .3459"),
        "SubGRPO M=2 + L_det": ("2", ".2843 / 23.5690 / .3456"),
        "the same, L_det five times as strong": ("2 --det_weight 1", ""),
        "L_det alone": ("2 --policy_weight 0", ""),
        "SubGRPO M=2 + L_det, no DM": ("2 --dm_weight 0", ""),
    },
    "fake": {
        "the teacher, where F starts": ("fake start", ""),
        **{f"gamma {g}": (f"fake {g}", "") for g in ("0", ".001", ".01", ".1")},
        "another reference": ("reference again", ""),
    },
    "letter": {
        "stage 1 by default": ("1", ""),
        **{
            f"--{f}": (f"1 --{f}", "")
            for f in ("renoise_std printed", "consistency_times steps", "dm_gradient score")
        },
        "stage 2 by default": ("2", ""),
        **{
            f"--{f}": (f"2 --{f}", "")
            for f in ("log_prob gaussian", "advantage_std group", "dm_steps drawn")
        },
    },
}
NOTES = {
    "table3": "Stage 1 alone, 4 evaluations, drawn with the eta of its training. (The paper's Table 3 is the result of both stages.)",
    "table4": "Stage 2 from the cold start with the same seed; its one reward is CLIPScore. Policy passes an epoch: M (GRPO: 3).",
    "fake": "Relative rms error in % of the fake velocity at noise levels t > s, after half as many steps as stage 1 in the other tables, against that "
    "of a long training (ten times the steps, rate decayed to 0), on new pictures of one frozen generator, the cold start of seed 0.",
    "letter": "The paper's letter, one choice at a time, the others by default.",
}


def all_runs(args):
    """Every run that the tables need, as (run, seed, what must be there before), in the order wanted: seed 0 of all rows, then seed 1 ..."""
    wanted = [run for table in args.ablations for run, _ in TABLES[table].values()]
    wanted = list(dict.fromkeys(["1", *["reference"] * ("fake start" in wanted), *wanted]))
    needs = lambda run, seed: {
        "2": [("1", seed)],
        "f": [("reference", 0)],
        "r": [("1", 0)] if run == "reference" else [("reference", 0)],
    }.get(run[0], [])
    return [
        (run, seed, needs(run, seed))
        for seed in range(args.seeds)
        for run in wanted
        if seed == 0 or run[0] != "r"
    ]


def place(args, run, seed, end=""):
    return f"{args.out_dir}/{'' if end == '.json' else 'runs/'}{re.sub('[^a-z0-9._]+', '_', run)}_seed{seed}{end}"


def train_and_score(args, run, seed, device):
    """One run -> its numbers."""
    out, cold = place(args, run, seed), place(args, "1", seed)
    if run.startswith(("fake", "reference")):
        return fake_quality(args, run, seed, device, out)
    sizes = {
        "1": f"--steps {args.steps} --batch_size {args.batch} --micro_batch {args.batch} --save_every {args.steps}",
        "2": f"--epochs {args.epochs} --prompts_per_epoch {max(1, args.batch // 8)} --micro_batch {args.batch} --save_every {args.epochs} "
        f"--rewards clipscore:1 --lr 3.2e-5 --cold_start {shlex.quote(cold)}",
    }[run[0]]
    program = cold_start if run[0] == "1" else rtdmd_rl
    sys.argv = [
        program.__name__ + ".py",
        *shlex.split(
            f"--preset tiny --device {device} --seed {seed} --sample_every 0 --resume {sizes} {run[1:]}"
        ),
        "--out_dir",
        out,
    ]
    program.main()  # in this process: importing torch takes longer than many of the runs
    flags = read(f"{out}/ckpt.pt", "checkpoint")["flags"]
    where = dict(cold_start=out, rtdmd="") if run[0] == "1" else dict(cold_start=cold, rtdmd=out)
    tiny, pipe, encode, clips = load_tiny(
        PRESETS["tiny"]["pretrained"], torch.device(device), lora_alpha=flags["lora_alpha"], **where
    )
    numbers, _ = evaluate(
        pipe,
        encode,
        clips,
        report_captions(args.pictures),
        load_generator(pipe, tiny),
        sigmas(),
        flags["eta"],
    )
    os.remove(f"{out}/ckpt.pt")
    return numbers


def fake_quality(args, run, seed, device, out):
    """Train F on a frozen generator (seed 0's cold start) with one gamma -> {noise level s: relative rms error in % against the reference}."""
    device, reference = torch.device(device), place(args, "reference", 0) + "/fake.pt"
    tiny, pipe, encode, _ = load_tiny(
        PRESETS["tiny"]["pretrained"],
        device,
        seed=seed,
        cold_start=place(args, "1", 0),
        rtdmd="",
        lora_alpha=64,
    )
    frozen, transformer, levels, rows = (
        load_generator(pipe, tiny),
        pipe.transformer,
        sigmas(),
        load_prompts(PRESETS["tiny"]["prompts"]),
    )
    add_adapter(transformer, "fake", tiny)
    (parameters,) = train_only(transformer, "fake")
    gamma, steps = {
        "reference": (0, 5 * args.steps),
        "reference again": (0, 5 * args.steps),
        "fake start": (0, 0),
    }.get(run) or (float(run[5:]), -(-args.steps // 2))
    optimizer = torch.optim.AdamW(parameters, lr=tiny.fake_lr, weight_decay=0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps) if run[0] == "r" else 1.0
    )

    def samples(
        *key,
    ):  # -> text and the generator's path of a batch, times and noises to compare at
        g, k = generator(device, *key), random.Random(repr(key)).randint(1, 4)
        normal = lambda: torch.randn(args.batch, *pipe.latent_shape, generator=g, device=device)
        text = encode(
            [
                rows[random.Random(f"{key}/{i}").randrange(len(rows))]["prompt"]
                for i in range(args.batch)
            ]
        )
        with torch.no_grad():
            x_s = rollout(
                play(transformer, frozen, text),
                normal(),
                levels,
                k if key[0] != "test" else 4,
                0.9,
                [normal() for _ in range(4)],
            )
        t, back = (torch.rand(args.batch, generator=g, device=device) for _ in range(2))
        return text, x_s, k, t, (1 + (200 * back).floor()) / 1000, normal

    def fake_pass(x_s, s, t, noise, back, noise1, noise2, *text):
        loss = fake_score_loss(
            play(transformer, ["fake"], text), x_s, s, t, noise, back, noise1, noise2, gamma, 0.9
        )[0].mean()
        loss.backward()
        return loss.detach()

    (fake_pass,) = graphed(True, device, fake_pass)
    for step in range(steps):
        text, path, k, u, back, normal = samples("train", run if run[0] == "r" else "", seed, step)
        fake_pass(
            path[k],
            torch.full_like(u, levels[k]),
            renoise_time(levels[k], u),
            normal(),
            back,
            normal(),
            normal(),
            *text,
        )
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), rate.step(), optimizer.zero_grad(set_to_none=False)
    if run == "reference":
        os.makedirs(out, exist_ok=True)
        torch.save(
            {k: p.detach().cpu() for k, p in adapter(transformer, "fake").items()}, out + "/fake.pt"
        )
    load_adapter(transformer, "reference", reference, given_alpha=tiny.lora_alpha)
    error, size = torch.zeros(5), torch.zeros(5)
    with torch.no_grad():
        for i in range(4):
            text, path, _, u, _, normal = samples("test", i)
            for k in range(1, 5):
                t = renoise_time(levels[k], u)
                x_t = renoise(path[k], levels[k], t, normal())
                v, exact = (
                    play(transformer, [name], text)(x_t, t) for name in ("fake", "reference")
                )
                error[k] += (v - exact).square().mean().item()
                size[k] += exact.square().mean().item()
    return {f"s = {levels[k]:g}": 100 * math.sqrt(error[k] / size[k]) for k in range(1, 5)}


def worker(args, device, end):
    """Take one run after the other from the common list. A claim is a file, so any number of processes may share the list. No run is
    started that would end too late, by the time that the last one of its kind took."""
    torch.set_num_threads(1)  # two processes of one thread do more than one process of two
    runs = [
        r
        for r in all_runs(args)
        if not args.cpu_jobs or args.device == "cpu" or (device == "cpu") == r[0].startswith("fake")
    ]
    took, has = {}, lambda run, seed, end: os.path.exists(place(args, run, seed, end))
    while True:
        left = [
            r
            for r in runs
            if not has(*r[:2], ".claim")
            and not has(*r[:2], ".json")  # in this order: a claim goes when the result is there
            and not any(has(*n, ".failed") for n in [r[:2], *r[2]])
        ]
        left = [r for r in left if time.time() + took.get(r[0][0], 0) < end]
        ready = [r for r in left if all(has(*need, ".json") for need in r[2])]
        if not left:
            return
        try:
            run, seed, _ = ready[0]
            os.close(os.open(place(args, run, seed, ".claim"), os.O_CREAT | os.O_EXCL))
        except (
            IndexError,
            FileExistsError,
        ):  # what they need is still being made; another process was quicker
            time.sleep(0.2)
            continue
        start, numbers = time.time(), None
        with (
            open(place(args, run, seed, ".log"), "w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                numbers = train_and_score(args, run, seed, device)
            except (Exception, SystemExit) as e:
                if isinstance(e, SystemExit) and not e.code:
                    return  # stopped by a signal, and saved
                traceback.print_exc()
        if numbers is None:
            os.rename(place(args, run, seed, ".claim"), place(args, run, seed, ".failed"))
            print(
                f"{run}, seed {seed}: failed, see {place(args, run, seed, '.log')}",
                file=sys.stderr,
                flush=True,
            )
            continue
        took[run[0]] = time.time() - start
        content = {
            "run": run,
            "seed": seed,
            "device": device,
            "seconds": took[run[0]],
            "numbers": numbers,
        }
        write_atomically({place(args, run, seed, ".json"): json.dumps(content, indent=1).encode()})
        os.remove(place(args, run, seed, ".claim"))
        print(f"{run}, seed {seed}: {took[run[0]]:.0f} s on {device}", flush=True)


def write_tables(args):
    """Means +- standard deviations over the seeds that every row of a table has -> out_dir/TABLE.md, and on the screen."""

    def numbers(run, seed):
        with contextlib.suppress(OSError), open(place(args, run, seed, ".json")) as f:
            return json.load(f)["numbers"]

    def cell(values):
        mean, std = (
            sum(values) / max(1, len(values)),
            torch.tensor(values).std().item() if len(values) > 1 else 0,
        )
        return "" if not values else f"{mean:.3g} +- {std:.2g}" if std else f"{mean:.3g}"

    for table in args.ablations:
        rows = {
            row: {s: n for s in range(args.seeds) if (n := numbers(run, s))}
            for row, (run, _) in TABLES[table].items()
        }
        seeds = [
            s
            for s in range(args.seeds)
            if all(s in found or TABLES[table][row][0][0] == "r" for row, found in rows.items())
        ]
        rows = {row: [found[s] for s in seeds if s in found] for row, found in rows.items()}
        first = next(iter(rows.values()))
        names = [n for n in (first or [{}])[0] if n not in (*CATEGORIES, "images_per_s")]
        paired = ["CLIPScore less the first row's, same seed"] if "clipscore" in names else []
        lines = [
            "| "
            + " | ".join([table, *(n.replace("_", " ") for n in names), *paired, "the paper"])
            + " |",
            "|---" * (len(names) + len(paired) + 2) + "|",
        ]
        for row, found in rows.items():
            cells = [
                cell([n[name] * (100 if name == "checker" else 1) for n in found]) for name in names
            ]
            cells += [
                cell([n["clipscore"] - f["clipscore"] for n, f in zip(found, first)])
                for _ in paired
            ]
            lines.append("| " + " | ".join([row, *cells, TABLES[table][row][1]]) + " |")
        text = (
            "\n".join(lines)
            + f"\n\n{NOTES[table]} {len(seeds)} seeds, mean +- their standard deviation, checker in %. {args.steps} steps of stage 1, "
            f"{args.epochs} epochs of stage 2, {args.batch} pictures each; scored on {6 * args.pictures} new pictures.\n"
        )
        write_atomically({f"{args.out_dir}/{table}.md": text.encode()})
        print("\n" + text, flush=True)


def ablations(args):
    """Run what is missing in out_dir with --jobs processes, until all is there or the time is up; then write the tables."""
    setup(args, training=False)
    end, path = time.time() + 60 * args.minutes, f"{args.out_dir}/sizes.json"
    sizes = {k: getattr(args, k) for k in ("steps", "epochs", "batch", "pictures")}
    os.makedirs(f"{args.out_dir}/runs", exist_ok=True)
    if os.path.exists(path) and json.load(open(path)) != sizes:
        die(
            f"{args.out_dir} holds runs of another size, {json.load(open(path))}: repeat those flags, or choose another --out_dir"
        )
    write_atomically({path: json.dumps(sizes).encode()})
    for name in os.listdir(f"{args.out_dir}/runs"):
        if name.endswith((".claim", ".failed")):  # of processes that are no more
            os.remove(f"{args.out_dir}/runs/{name}")
    print(
        f"{len(all_runs(args))} runs, {args.jobs} at a time on {args.device}"
        + f" and {args.cpu_jobs} on the CPU" * (args.cpu_jobs > 0),
        flush=True,
    )
    if args.jobs + args.cpu_jobs == 1:
        worker(args, args.device, end)
    else:
        spawn = multiprocessing.get_context("spawn").Process
        workers = [
            spawn(target=worker, args=(args, device, end), daemon=True)
            for device in [args.device] * args.jobs + ["cpu"] * args.cpu_jobs
        ]
        for w in workers:
            w.start()
        with contextlib.suppress(KeyboardInterrupt):  # stopped: what is finished counts
            for w in workers:
                w.join(min(1e6, max(0, end - time.time())))
        for w in workers:
            w.kill()
    write_tables(args)


# ------------------------------------------------------------------------------------------------------------ 5. speed
def stopwatch(args, transformer, images, warm_up, evaluated):
    """What --bench of the two stages does -> part(name): the time since the last call went to `name`; "step" ends a step. After warm_up
    steps, which compile and record, args.bench are measured, one line of JSON is printed, and the program ends. evaluated: the stage's count.

    TFLOP/s count the transformer alone: one forward for each picture it was given, one more where a gradient goes back through it (the
    base is frozen), nothing for recomputed activations, the decoder or the rewards.
    """
    from torch.utils.flop_counter import FlopCounterMode

    cuda, marks, state, begin = transformer.device.type == "cuda", [], {}, time.time()
    between = (lambda a, b: a.elapsed_time(b) / 1000) if cuda else (lambda a, b: b - a)

    def remember(module, inputs, kwargs, output):
        state["example"] = {
            k: v[:1].clone() if torch.is_tensor(v) else v for k, v in kwargs.items()
        }
        hook.remove()

    hook = transformer.register_forward_hook(remember, with_kwargs=True)

    def part(name):
        event = torch.cuda.Event(enable_timing=True) if cuda else time.time()
        if cuda:
            event.record()
        marks.append((name, event))
        if name != "step":
            return
        ends = [event for name, event in marks if name == "step"]
        if "warm" not in state and len(ends) == warm_up:
            del marks[:-1]
            state.update(warm=time.time() - begin, evaluated=evaluated[0])
        elif "warm" in state and len(ends) == args.bench + 1:
            if cuda:
                torch.cuda.synchronize()
            seconds, parts, forwards = (
                [between(a, b) for a, b in zip(ends, ends[1:])],
                {},
                (evaluated[0] - state["evaluated"]) / args.bench,
            )
            for (_, a), (name, b) in zip(marks, marks[1:]):
                parts[name] = parts.get(name, 0) + between(a, b) / args.bench
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                FlopCounterMode(display=False) as flops,
                torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda),
            ):
                set_adapters(transformer, []), transformer(**state["example"])
            mean, rate = sum(seconds) / args.bench, matmul_rate() if cuda else math.nan
            achieved = forwards * flops.get_total_flops() / mean / 1e12
            quantile = lambda q: sorted(seconds)[min(len(seconds) - 1, int(q * len(seconds)))]
            result = {
                "program": os.path.basename(sys.argv[0]),
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "images": images,
                "s_mean": mean,
                "s_median": quantile(0.5),
                "s_p90": quantile(0.9),
                "images_per_s": images / mean,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
                "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
                "forwards": forwards,
                "tflop_per_forward": flops.get_total_flops() / 1e12,
                "tflops": achieved,
                "matmul_tflops": rate,
                "share": achieved / rate,
                "compile_s": state["warm"] - warm_up * mean,
                "parts": parts,
            }
            if os.environ.get("RANK", "0") == "0":
                shutil.rmtree(args.out_dir, ignore_errors=True)
                print(
                    json.dumps(
                        {
                            k: float(f"{v:.4g}") if isinstance(v, float) else v
                            for k, v in result.items()
                        }
                    ),
                    flush=True,
                )
            sys.exit(0)

    return part


def bench(args, inputs_of, render, prompts, device):
    """What --bench of sample.py does: time args.bench batches after two to warm up; every prompt is new, so that its encoding is measured too. One line of JSON."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    times, clock = [], lambda: (wait(), time.time())[1]
    for n in range(-2, args.bench):
        t0, _ = clock(), inputs_of([f"{prompt} {n}" for prompt in prompts])
        t1, inputs = (
            clock(),
            inputs_of([f"{prompt} {n}" for prompt in prompts]),
        )  # known by now: noise and a look-up
        t2, _ = clock(), render(*inputs)
        times.append((t1 - t0, t2 - t1, clock() - t2))
    text, noise, rest = (sorted(t)[args.bench // 2] for t in zip(*times[2:]))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    print(
        json.dumps(
            {
                "program": "sample.py",
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "batch": len(prompts),
                "steps": args.steps,
                "text_and_noise_s": text,
                "noise_s": noise,
                "draw_and_decode_s": rest,
                "images_per_s": len(prompts) / (noise + rest),
                "peak_gib": peak,
            }
        ),
        flush=True,
    )


def matmul_rate(n=8192):
    """TFLOP/s of a bf16 matrix product on this GPU, the ceiling that `stopwatch` compares with."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for event in events:
        a @ b, event.record()
    torch.cuda.synchronize()
    return 2e-9 * n**3 * 10 / events[10].elapsed_time(events[20])


def arguments():
    parser = argparse.ArgumentParser(
        description="Scoreboard, curves and ablation tables.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error, add, gpu = die, parser.add_argument, torch.cuda.is_available()
    add(
        "run", nargs="?", help="directory of a tiny run with cold_start/ and rtdmd/: its scoreboard"
    )
    add(
        "--curves",
        nargs="+",
        metavar="RUN",
        help="draw the curves of these runs' log.jsonl into the first one's curves.png",
    )
    add(
        "--grids",
        action="store_true",
        help="compare the tiny teacher's pictures on diffusers' noise levels and on ours; needs no run",
    )
    add(
        "--figures",
        metavar="DIR",
        help="draw the README's figures into DIR instead, with the weights of `run`",
    )
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="and only hacking.png: the cold start of `run` and these stages 2 on it",
    )
    add(
        "--ablations",
        nargs="?",
        const="table3,table4,fake",
        metavar="TABLES",
        help=f"make these tables, of {', '.join(TABLES)}",
    )
    add(
        "--out_dir",
        default="out/ablations",
        help="of the ablations; a second call goes on where the first one stopped",
    )
    add(
        "--pretrained",
        default=f"{HERE}/assets/tiny",
        help="the pipeline that the run was made with",
    )
    add("--device", default="cuda" if gpu else "cpu", help="cuda or cpu")
    add(
        "--pictures",
        type=int,
        help="pictures of each of the six categories (default: scoreboard 72, ablations 216)",
    )
    add("--seeds", type=int, default=3, help="runs of each row")
    add("--steps", type=int, default=200, help="steps of stage 1, half as many generator updates")
    add("--epochs", type=int, default=90, help="epochs of stage 2")
    add(
        "--batch",
        type=int,
        default=128,
        help="pictures of a step and of an epoch, there in groups of 8",
    )
    add(
        "--jobs",
        type=int,
        default=7 if gpu else os.cpu_count(),
        help="processes at once; they share one GPU",
    )
    add(
        "--cpu_jobs",
        type=int,
        default=0,
        help="so many more on the CPU, for the fake table (no table is split between two kinds of machine)",
    )
    add(
        "--minutes",
        type=float,
        default=1e6,
        help="when to end: what is finished by then counts, and the rest is for the next call",
    )
    args = parser.parse_args()
    args.pictures = args.pictures or (216 if args.ablations else 72)
    if (args.run is not None) + (args.curves is not None) + (
        args.ablations is not None
    ) + args.grids != 1:
        die("give one of: the directory of a tiny run, --curves RUN..., --ablations, --grids")
    if args.runs and not (args.run and args.figures):
        die(
            "--runs draws a figure: give the directory of their stage 1's run and --figures DIR, too"
        )
    if (
        not min(
            args.pictures,
            args.seeds,
            args.steps,
            args.epochs,
            args.batch,
            args.jobs,
            args.cpu_jobs + 1,
            args.minutes,
        )
        > 0
    ):
        die(
            "--pictures, --seeds, --steps, --epochs, --batch, --jobs and --minutes must be positive"
        )
    if args.ablations is not None:
        args.ablations = args.ablations.split(",")
        if set(args.ablations) - set(TABLES):
            die(f"--ablations takes {', '.join(TABLES)}, got {','.join(args.ablations)}")
    return args


def main():
    args = arguments()
    if args.ablations is not None:
        ablations(args)
    elif args.curves:
        draw_curves(args.curves, f"{args.curves[0]}/curves.png")
    elif args.grids:
        args.out_dir = "."  # nothing is written
        device, *_ = setup(args, training=False)
        checked(teacher_grids, args.pretrained, args.pictures, device)
    else:
        for stage in (f"{args.run}/cold_start", *(args.runs or [f"{args.run}/rtdmd"])):
            if not os.path.exists(f"{stage}/generator_ema.pt") or not all(
                "seconds" in line for line in read_log(stage)
            ):
                die(f"{stage}/ holds no finished run; make tiny makes one")
        args.out_dir = args.figures or args.run
        device, *_ = setup(args, training=False)
        if args.runs:
            hacking(args.run, args.runs, args.pretrained, args.pictures, args.figures, device)
        elif args.figures:
            figures(args.run, args.pretrained, args.figures, device)
        else:
            checked(scoreboard, args.run, args.pretrained, args.pictures, device)


if __name__ == "__main__":
    main()
