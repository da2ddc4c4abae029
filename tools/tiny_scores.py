"""How good pictures of the tiny world are: what scoreboard, plots and ablations count.

    checker      share of pictures that satisfy their caption exactly, over all and for each category
    clipscore    CLIPScore, which is a reward
    judge        the same by another CLIP, on which nothing is trained
    distance, color_bits, place_bits     what becomes of all that a caption leaves open

The last three are there because a reward can be hacked by drawing one good picture for ever.
"""

import math
import os
import time

import torch

from checkpoint import find_weights
from common import checked
from model import BaseModel
from rewards import build
from sample import ADAPTERS, PRESETS, draw, load_generator
from tiny import CATEGORIES, SIZE, captions, check, detect

PRETRAINED = PRESETS["tiny"]["pretrained"]
TEACHER_CFG = PRESETS["tiny"]["teacher_cfg"]
FIRST_SEED = 10**6  # far from the seeds that sample.py begins with
NEW_SEEDS = 10**7  # of the scoring of the long run: nothing else draws from these
BATCH = 72  # pictures at once


# ---- with what -----------------------------------------------------------------------------------
def load_tiny(pretrained, device):
    """-> the tiny base model, [CLIPScore, the judge]; dies with one line where one is not there."""
    base = BaseModel(pretrained, device, SIZE)
    paths = [f"clipscore={pretrained}/clip", f"judge={pretrained}/judge"]
    clips = checked(build, "clipscore,judge", device, paths)
    return base, clips


def generator_of(base, cold_start, rtdmd=None):
    """Load the weights of stage 1 and, if it is given, stage 2 on it -> names of their adapters."""
    files = {}
    for adapter, stage in ADAPTERS.items():
        where = {"cold_start": cold_start, "rtdmd": rtdmd}[stage]
        if where:
            files[adapter] = find_weights(where, stage)
    return load_generator(base, files)


def evaluations(levels, cfg):
    """How often the transformer is evaluated for a picture; guidance takes two evaluations a step."""
    steps = len(levels) - 1
    return steps if cfg == 1 else 2 * steps


def steps_done(run):
    """How many lines the log of a run has; 0 where no weights are saved yet."""
    try:
        with open(f"{run}/log.jsonl") as log:
            return len(log.readlines()) if os.path.exists(f"{run}/generator_ema.pt") else 0
    except OSError:
        return 0


def report_captions(n):
    """n test captions of each category, equal ones side by side.

    72 is a multiple of every category's number of captions.
    """
    rows = []
    for category in CATEGORIES:
        own = [row for row in captions("test") if row["tag"] == category]
        rows += [own[i * len(own) // n] for i in range(n)]
    return rows


# ---- the numbers ---------------------------------------------------------------------------------
def mean(values):
    return sum(values) / max(1, len(values))


@torch.no_grad()
def evaluate(base, clips, rows, adapters, levels, eta, cfg=1.0, first_seed=FIRST_SEED):
    """Draw one picture for each of rows (report_captions) -> (its numbers, the pictures on the CPU).

    levels: as from cps.sigmas. clips: rewards that see pictures and prompts alone. Row i is drawn
    from first_seed + i.
    """
    latents = []
    pictures = []
    texts = []
    start = time.time()
    for first in range(0, len(rows), BATCH):
        prompts = [row["prompt"] for row in rows[first : first + BATCH]]
        seeds = range(first_seed + first, first_seed + first + len(prompts))
        v = base.velocity(adapters, base.encode(prompts), cfg)
        drawn = draw(v, seeds, base.latent_shape, levels, eta, base.device)
        texts.append(prompts)
        latents.append(drawn)
        pictures.append(base.decode(drawn))
    seconds = time.time() - start

    of_clips = {}
    for clip in clips:
        scores = []
        for batch, prompts in zip(pictures, texts):
            scores += clip(batch, prompts, None).tolist()
        of_clips[clip.name] = mean(scores)
    pictures = torch.cat(pictures)
    found = detect(pictures)
    passed = [check(things, row) for things, row in zip(found, rows)]
    numbers = {"checker": mean(passed)}
    for category in CATEGORIES:
        numbers[category] = mean([p for p, row in zip(passed, rows) if row["tag"] == category])
    numbers.update(of_clips)
    numbers.update(diversity(rows, torch.cat(latents), found))
    numbers["images_per_s"] = len(rows) / seconds
    return numbers, pictures.cpu()


def diversity(rows, latents, found):
    """What becomes of what a caption leaves open -> {"distance", "color_bits", "place_bits"}.

    Means over captions. distance: between the latents of two pictures of one caption. Bits:
    -log2 of the probability that two of them agree in the first object's colour (uniform: 2 bits) or
    in its cell of the layout (uniform: 3.17 bits). found: as from tiny.detect.
    """
    members = {}
    for i, row in enumerate(rows):
        members.setdefault(row["prompt"], []).append(i)
    distances = []
    same_color = []
    same_place = []
    for places in members.values():
        if len(places) > 1:
            distances.append(torch.pdist(latents[places].flatten(1)).mean().item())
        asked = rows[places[0]]["include"][0]
        seen = [first_of(found[i], asked["class"]) for i in places]
        seen = [thing for thing in seen if thing is not None]
        if len(seen) > 1:
            same_place.append(agreement([cell_of(thing) for thing in seen]))
            if "color" not in asked:
                same_color.append(agreement([thing.color for thing in seen]))
    return {
        "distance": mean(distances),
        "color_bits": bits(mean(same_color)),
        "place_bits": bits(mean(same_place)),
    }


def first_of(found, shape):
    """The first thing of this shape, None if there is none."""
    for thing in found:
        if thing.shape == shape:
            return thing
    return None


def cell_of(thing):
    """Which of the layout's 3 x 3 cells its centre lies in."""
    return thing.x * 3 // SIZE, thing.y * 3 // SIZE


def agreement(values):
    """The share of pairs that are equal; at least two values."""
    equal = [a == b for i, a in enumerate(values) for b in values[:i]]
    return mean(equal)


def bits(probability):
    return -math.log2(max(probability, 1e-6))
