"""Draw pictures: 4 CPS steps, no guidance, stage 1's and stage 2's adapters stacked on the base.

    python sample.py "a red circle and a blue square" --preset tiny
    python sample.py "a photo of two cats" --num_images 8      # out/cold_start and out/rtdmd on SD3.5-M
    python sample.py "a photo of two cats" --cold_start Harahan/SD35M-RTDMD --rtdmd Harahan/SD35M-RTDMD
    python sample.py "a photo of two cats" --teacher           # the base, as diffusers draws it
    python sample.py --like out/samples/00003.png              # that picture again

Each picture has its own seed (seed + its index), so that but for rounding it does not depend on the
batch size. Base model, resolution, steps and eta are those that the adapters were trained with: a
run's settings lie beside its weights. What it takes to draw a picture again stands as text in its PNG.
"""

import argparse
import os
import re
import time

import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from attention import joined_in
from checkpoint import (
    BASES,
    check_pair,
    find_weights,
    frozen_content,
    hash_of_file,
    hashed,
    take_settings,
)
from common import (
    Parser,
    checked,
    die,
    end_on_signals,
    first_line,
    flags_given,
    note,
    parse,
    resolution,
    say,
    setup,
)
from cps import rollout
from hub import DEFAULT_PLACES
from model import BaseModel, graphed
from pictures import as_saved, read_picture, save_grid, save_pictures
from prompts import load_prompts
from text import WholeBatches, note_prompts

SD35M = "stabilityai/stable-diffusion-3.5-medium"
SD3M = "stabilityai/stable-diffusion-3-medium-diffusers"
TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets/tiny")
# What is drawn with where neither a flag nor the settings of a run say otherwise.
PRESETS = {
    "sd35m": dict(pretrained=SD35M, teacher_cfg=4.5),
    "sd3m": dict(pretrained=SD3M, resolution=1024, teacher_cfg=7.0),
    "flux1": dict(pretrained="black-forest-labs/FLUX.1-dev", teacher_cfg=3.5),
    "klein4b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-4B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-4B",
        teacher_cfg=4.0,
    ),
    "klein9b": dict(
        pretrained="black-forest-labs/FLUX.2-klein-base-9B",
        generator_pretrained="black-forest-labs/FLUX.2-klein-9B",
        teacher_cfg=4.0,
    ),
    "tiny": dict(
        pretrained=TINY,
        cold_start=f"{TINY}/adapters/cold_start",
        rtdmd=f"{TINY}/adapters/rtdmd",
        resolution=32,
        teacher_cfg=2.0,
        device="auto",
    ),
}
# The adapters under which the stages' weights are loaded: both at once, one beside the other.
ADAPTERS = {"cold_generator": "cold_start", "generator": "rtdmd"}
MOST_IN_GRID = 64


# ---- flags ---------------------------------------------------------------------------------------
def flags(description):
    """A parser with the flags that say what is drawn with what; tools.evaluate adds its own."""
    parser = Parser(description)
    add = parser.add_argument
    # what to draw
    add("prompt", nargs="?", default="", help="what to draw")
    add("--prompts", default="", help="file: a prompt a line, JSON lines or a JSON list")
    add("--num_images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    # with what
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--pretrained", help="diffusers directory or hub id of the base model")
    add("--generator_pretrained", default="", metavar="DIR", help="the generator's own base model")
    places = "a run's out_dir, an export, a file or a hub repository"
    for stage, number in (("cold_start", 1), ("rtdmd", 2)):
        text = f"weights of stage {number}: {places}; '' leaves them out"
        add(f"--{stage}", default=DEFAULT_PLACES[stage], help=text)
    add("--lora_alpha", type=float, help="alpha of the adapters, whatever their files say")
    add("--teacher", action="store_true", help="the base alone: 50 Euler steps with guidance")
    # how
    add("--steps", type=int, default=4, help="sampling steps; teacher: 50")
    add("--eta", type=float, default=0.9, help="new noise of a step, 0 to 1; teacher: 0, Euler")
    add("--cfg", type=float, default=1.0, help="guidance scale, 1 is none; teacher: its run's")
    add("--resolution", type=resolution, default=512, help="side, or height x width as 768x512")
    # the machine
    add("--batch_size", type=int, default=8, help="pictures at once; changes rounding alone")
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add("--compile", type=int, choices=(0, 1), default=0, help="minutes once, then fast")
    add("--out_dir", default="out/samples", help="where grid.png and the pictures go")
    parser.set_defaults(like="")
    return parser


def arguments():
    parser = flags("Draw pictures with the 4-step generator, or with its teacher.")
    parser.add_argument("--like", default="", metavar="PNG", help="draw this picture of ours again")
    args = parse(parser, PRESETS)
    if args.like:
        known = like(args.like)
        twice = sorted(flags_given() & {*known, "prompts", "num_images"})
        if args.prompt or twice:
            die(f"--like says all of a picture: leave out {', '.join(twice) or 'the prompt'}")
        for name, value in known.items():
            setattr(args, name, value)
    check_prompt(args)
    return args


def check_prompt(args):
    """Die where there is nothing to draw."""
    if not (args.prompts or args.prompt.strip()):
        die("nothing to draw: give a prompt, or --prompts FILE")
    if args.prompts and args.prompt.strip():
        die(f"a prompt and a file of prompts, {args.prompts}: give one of them")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        die("the prompt is not UTF-8 text")


def rows_to_draw(args, metadata=""):
    """[{"prompt", "metadata"}] of each picture; those of one prompt follow each other."""
    if args.prompts:
        rows = checked(load_prompts, args.prompts, metadata)
    else:
        rows = [{"prompt": args.prompt, "metadata": {}}]
    return [row for row in rows for _ in range(args.num_images)]


def settled(args, files):
    """A copy of args in which the run's settings stand where no flag was given.

    files: as from generator_files; what counts are the settings beside the last of them.
    """
    names = ("resolution", "num_steps", "eta", "cfg")
    called = {"num_steps": "steps", "cfg": "teacher_cfg"}  # a run's cfg is its teacher's
    if args.like:  # the picture says all else
        names = ()
    elif args.teacher:
        args = as_teacher(args, flags_given())
        names = ("resolution", "cfg")
        called = {}
    args = argparse.Namespace(**vars(args))
    if files:
        take_settings(args, list(files.values())[-1], (*BASES, *names), called)
    elif not args.teacher and not args.like:  # adapters that are merged into the base
        if "pretrained" in flags_given() and "generator_pretrained" not in flags_given():
            args.generator_pretrained = ""  # a preset's, which belongs to the preset's base
        take_settings(args, os.path.join(args.pretrained, "model_index.json"), names, called)
    return args


def as_teacher(args, but_for=()):
    """A copy of args with the teacher's steps, eta and cfg, but for those named."""
    usual = {"teacher": True, "steps": 50, "eta": 0.0, "cfg": args.teacher_cfg}
    changes = {name: value for name, value in usual.items() if name not in but_for}
    return argparse.Namespace(**{**vars(args), **changes})


# ---- the generator -------------------------------------------------------------------------------
def generator_files(args):
    """{adapter: path of its file}, of --cold_start and --rtdmd; stage 1 comes first.

    Dies where one is not there, or where they are not of one training. The teacher, which needs no
    more than their settings, does without.
    """
    files = {}
    for adapter, stage in ADAPTERS.items():
        where = getattr(args, stage)
        path = find_weights(where, stage, must=not args.teacher) if where else None
        if path is not None:
            files[adapter] = path
    if len(files) == 2:
        check_pair(*files.values())
    return files


def load_generator(base, files, lora_alpha=None):
    """Stack the adapters of these files on the base -> their names, for `base.velocity`.

    Stage 2 was trained on top of stage 1: loaded in its place, stage 1 would be lost.
    """
    for adapter, path in files.items():
        base.load_adapter(adapter, path, lora_alpha)
    for transformer in base.transformers():
        transformer.requires_grad_(False)
    return list(files)


def fix_adapters(base, adapters):
    """Put the adapters of each matrix together once, rounded, and not in every pass."""
    transformer = base.backbone_of(adapters).pipe.transformer
    dtype = transformer.dtype  # diffusers looks through all modules for it
    for product in [*transformer.lora_layers, *joined_in(transformer)]:
        if product.present(adapters):
            pair = [matrix.to(dtype) for matrix in product.pair(adapters)]
            product.fixed = {tuple(adapters): pair}


def teacher_levels(base, steps):
    """Noise levels of a teacher's picture -> a list of steps + 1 floats, the last one 0.

    What the student is compared with is what a user's pipeline makes of the base, so the levels are
    those of the scheduler that the base comes with, and not `cps.sigmas`: diffusers shifts the end of
    its grid twice, so that 50 steps end in .121, .067, .009, 0 and not in .161, .111, .058, 0. The
    pipeline's scheduler itself is left as it is. Raises ValueError where it has no such grid.
    """
    scheduler = type(base.pipe.scheduler).from_config(base.pipe.scheduler.config)
    scheduler.set_timesteps(**base.backbone.timesteps(steps))
    return scheduler.sigmas.tolist()


# ---- the sampler ---------------------------------------------------------------------------------
@torch.no_grad()
def draw(v, seeds, shape, levels, eta, device):
    """One latent a seed -> [B,C,h,w] float32. v: a velocity function; levels: as from cps.sigmas."""
    return integrate(v, noise_of(seeds, shape, levels, eta, device), levels, eta)


def noise_of(seeds, shape, levels, eta, device):
    """Starting noise and that of the stochastic steps -> [B,K,C,h,w], or [B,1,C,h,w] for eta 0.

    Picture i's comes from seeds[i] alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = (len(seeds), *shape)
    noise = []
    for _ in range(len(levels) - 1 if eta > 0 else 1):
        noise.append(randn_tensor(size, generator=generators, dtype=torch.float32))
    return torch.stack(noise, 1).to(device)


def integrate(v, noise, levels, eta):
    """Along all steps of `rollout` (Eq. 8, 19-21) from noise as of `noise_of` to latents [B,C,h,w].

    A step for which there is no noise adds none.
    """
    start, *later = noise.unbind(1)
    steps = len(levels) - 1
    none = torch.zeros_like(start)
    return rollout(v, start, levels, steps, eta, [*later, *[none] * steps])[-1]


def load_base(args, device, has_teacher=False):
    """The base model that the flags name. has_teacher: it draws as student and as teacher."""
    base = BaseModel(
        args.pretrained,
        device,
        args.resolution,
        compile=bool(args.compile) and device.type == "cuda",
        generator_pretrained="" if args.teacher else args.generator_pretrained,
        has_teacher=has_teacher,
    )
    # so that a picture does not depend on the other prompts of its batch
    base.encode = WholeBatches(base.backbone.text)
    return base


def levels_of(base, args):
    """The noise levels of the student or, with --teacher, of its own scheduler."""
    if args.teacher:
        return checked(teacher_levels, base, args.steps)
    return base.sigmas(args.steps)


def renderer(base, adapters, args):
    """-> (noise levels, a function of noise and text that gives pictures [B,3,H,W]).

    With --compile on a GPU the function is recorded, and knows one batch size.
    """
    levels = levels_of(base, args)
    fix_adapters(base, adapters)

    @torch.no_grad()
    def render(noise, *text):
        v = base.velocity(adapters, text, args.cfg)
        return base.decode(integrate(v, noise, levels, args.eta))

    (render,) = graphed(bool(args.compile), base.device, render)
    return levels, render


def draw_all(base, adapters, rows, args, origin, first_number=0, share=(0, 1), look=None):
    """Draw the rows into args.out_dir, each with what it takes to draw it again as text in its PNG.

    origin: as from `origin_of`. Files are numbered from first_number on. share: (rank, processes); a
    batch is drawn by one of them. look(pictures [B,3,H,W] as the files have them, place of the first,
    their rows) is called with each batch; with it a batch that is there already is read, not drawn.
    """
    levels, render = renderer(base, adapters, args)
    recorded = bool(args.compile) and base.device.type == "cuda"
    batch_size = min(args.batch_size, len(rows))
    places = range(0, len(rows), batch_size)[share[0] :: share[1]]
    for first in tqdm(places, desc="batches", disable=None if share[0] == 0 else True):
        batch = rows[first : first + batch_size]
        # a recorded pass knows one batch size
        at_once = batch_size if recorded else len(batch)
        paths = [picture_path(args, first_number + first + i) for i in range(len(batch))]
        texts = []
        for i, row in enumerate(batch):
            own = {"prompt": row["prompt"], "seed": args.seed + first + i, "at once": at_once}
            texts.append({**origin, **own})
        pictures = read_all(paths, texts) if look is not None else None
        if pictures is None:
            prompts = [row["prompt"] for row in batch]
            prompts += prompts[-1:] * (at_once - len(batch))
            pictures = draw_batch(base, render, levels, prompts, args.seed + first, args)
            save_pictures(pictures, paths, texts)
        if look is not None:
            look(pictures[: len(batch)].to(base.device), first, batch)


def draw_batch(base, render, levels, prompts, seed, args):
    """One picture for each prompt, from seed, seed + 1 and so on -> as files have them [B,3,H,W].

    Dies where they are not finite: a file would have a black one, and that a score.
    """
    seeds = range(seed, seed + len(prompts))
    noise = noise_of(seeds, base.latent_shape, levels, args.eta, base.device)
    pictures = render(noise, *base.encode(prompts))
    if not pictures.isfinite().all():
        reason = "they come from --pretrained, the adapters and --lora_alpha"
        die(f"pictures are not finite: {reason}", status=1, local=True)
    return as_saved(pictures)


def picture_path(args, number):
    return f"{args.out_dir}/{number:05d}.png"


def read_all(paths, texts):
    """The pictures of these files [B,3,H,W], or None unless all are there with these texts."""
    pictures = []
    for path, text in zip(paths, texts):
        try:
            picture, its_text = read_picture(path)
        except (OSError, ValueError):  # not there, or damaged
            return None
        if its_text != {name: str(value) for name, value in text.items()}:
            return None
        pictures.append(picture)
    return torch.stack(pictures)


def save_first(args, first_number, count):
    """grid.png: the first ones of `count` pictures."""
    shown = range(first_number, first_number + min(count, MOST_IN_GRID))
    pictures = torch.stack([read_picture(picture_path(args, number))[0] for number in shown])
    columns = min(8, max(4, args.num_images))
    save_grid(pictures, f"{args.out_dir}/grid.png", columns)


def next_number(out_dir):
    """The number of the first picture of a call: those of earlier calls stay."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    numbers = [int(name[:-4]) for name in names if re.fullmatch(r"\d{5,}\.png", name)]
    return max(numbers, default=-1) + 1


# ---- the same picture again ----------------------------------------------------------------------
def origin_of(base, files, args):
    """{name: value} of all but prompt and seed that decides a picture; no path is among it.

    base: without adapters yet.
    """
    adapters = []
    for adapter, path in files.items():
        adapters.append(f"{ADAPTERS[adapter]} {hash_of_file(path)}")
    pipe = base.pipe
    encoders = [getattr(pipe, name) for name in base.backbone.encoders]
    who = base.backbone if args.teacher else base.generator
    parts = (who.pipe.transformer, pipe.vae, *encoders)
    content = [frozen_content(part) for part in parts if part is not None]
    return {
        "base": hashed([content, dict(pipe.scheduler.config)]),
        "adapters": ", ".join(adapters),
        "alpha": "" if args.lora_alpha is None else args.lora_alpha,
        "drawn by": "teacher" if args.teacher else "student",
        "device": base.device.type,
        "steps": args.steps,
        "eta": float(args.eta),
        "shift": base.backbone.shift(args.steps),
        "sampler": content_of_sampler(levels_of(base, args), float(args.eta)),
        "guidance": float(args.cfg),
        "resolution": args.resolution,
    }


def content_of_sampler(levels, eta):
    """A short hash of what the sampler does, for one who changes cps.py: where it takes a few numbers."""
    x = torch.linspace(-1, 1, 7, dtype=torch.float64).view(1, 1, 1, 7)
    noise = torch.stack([x.roll(k, 3) for k in range(len(levels))], 1)
    end = integrate(lambda x, level: level + x.sin(), noise, levels, eta)
    return hashed([round(number, 4) for number in end.flatten().tolist()])


def like(path):
    """The flags that draw a picture of ours again, from the text in its PNG -> {name: value}."""
    try:
        _, text = read_picture(path)
        return {
            "prompt": text["prompt"],
            "seed": int(text["seed"]),
            "teacher": text["drawn by"] == "teacher",
            "steps": int(text["steps"]),
            "eta": float(text["eta"]),
            "cfg": float(text["guidance"]),
            "resolution": resolution(text["resolution"]),
            "lora_alpha": float(text["alpha"]) if text["alpha"] else None,
            "batch_size": int(text["at once"]),
        }
    except (KeyError, ValueError, argparse.ArgumentTypeError):
        die(f"--like {path}: is no picture of sample.py or tools.evaluate")
    except OSError as e:
        die(f"--like {path}: cannot be read ({first_line(e)})")


def draw_like(base, adapters, args, origin, number):
    """The picture of --like once more; dies where base or adapters are not those it was drawn with."""
    old, text = read_picture(args.like)
    if text.get("sampler", origin["sampler"]) != origin["sampler"]:  # older pictures do not say it
        die(f"--like {args.like}: was drawn by another sampler: cps.py or the noise levels changed")
    for name, value in origin.items():
        if name != "sampler" and text.get(name) != str(value):
            die(
                f"--like {args.like}: was drawn with {name} {text.get(name) or 'none'}, and here it is "
                f"{value or 'none'}; name the right ones with --pretrained, --generator_pretrained, "
                "--cold_start and --rtdmd"
            )
    levels, render = renderer(base, adapters, args)
    # as many at once as then: sums of other shapes are rounded otherwise
    prompts = [args.prompt] * args.batch_size
    picture = draw_batch(base, render, levels, prompts, args.seed, args)[0]
    path = picture_path(args, number)
    save_pictures([picture], [path], [text])
    if not torch.equal(picture, old):
        note(
            f"{path} is not the same to the last bit: another machine, other versions, or --compile"
        )
    say(f"{args.like} again -> {path}")


def main():
    args = arguments()
    rows = rows_to_draw(args)
    device, _, _ = setup(args, training=False)
    end_on_signals("stopped by a signal; what is drawn is there")
    files = generator_files(args)
    args = settled(args, files)
    base = load_base(args, device)
    if args.teacher:
        files = {}
    origin = origin_of(base, files, args)
    adapters = load_generator(base, files, args.lora_alpha)
    note_prompts(base, rows[:: args.num_images])  # each once, however many pictures it gets
    number = next_number(args.out_dir)
    start = time.time()
    if args.like:
        draw_like(base, adapters, args, origin, number)
        return
    draw_all(base, adapters, rows, args, origin, number)
    save_first(args, number, len(rows))
    say(
        f"{len(rows)} picture{'s' * (len(rows) > 1)} in {time.time() - start:.1f} s -> "
        f"{picture_path(args, number)}{' and on' * (len(rows) > 1)}, {args.out_dir}/grid.png"
    )


if __name__ == "__main__":
    main()
