"""Draw pictures: 4 CPS steps, no guidance, stage 1's and stage 2's adapters stacked on the base.

    python sample.py "a red circle above a blue square" --preset tiny
    python sample.py "a photo of two cats" --num_images 8      # out/cold_start and out/rtdmd on SD3.5-M
    python sample.py "a photo of two cats" --cold_start Harahan/SD35M-RTDMD --rtdmd Harahan/SD35M-RTDMD
    python sample.py "a photo of two cats" --teacher           # the base, as diffusers draws it

Each picture has its own seed (seed + its index), so that it does not depend on the batch size. Base
model, resolution, steps and eta are those that the adapters were trained with: a run's settings lie
beside its weights.
"""

import argparse
import os
import time

import torch
from diffusers.utils.torch_utils import randn_tensor

from checkpoint import DEFAULT_PLACES, check_pair, find_weights, take_settings
from common import Parser, checked, die, flags_given, parse, setup
from cps import rollout, sigmas
from model import StableDiffusion3, graphed, note_prompts, save_grid
from prompts import load_prompts

SD35M = "stabilityai/stable-diffusion-3.5-medium"
SD3M = "stabilityai/stable-diffusion-3-medium-diffusers"
TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets/tiny")
# What is drawn with where neither a flag nor the settings of a run say otherwise.
PRESETS = {
    "sd35m": dict(pretrained=SD35M, teacher_cfg=4.5),
    "sd3m": dict(pretrained=SD3M, resolution=1024, teacher_cfg=7.0),
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
    add("--prompts", default="", help='file with a prompt a line, or jsonl with "prompt"')
    add("--num_images", type=int, default=1, help="pictures of each prompt")
    add("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    # with what
    add("--preset", choices=list(PRESETS), default="sd35m", help="set of default flags")
    add("--pretrained", help="diffusers directory or hub id of the base model")
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
    add("--resolution", type=int, default=512, help="height and width in pixels")
    # the machine
    add("--batch_size", type=int, default=8, help="pictures at once; does not change them")
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add("--compile", type=int, choices=(0, 1), default=0, help="minutes once, then fast")
    add("--out_dir", default="out/samples", help="where grid.png and the pictures go")
    return parser


def arguments():
    args = parse(flags("Draw pictures with the 4-step generator, or with its teacher."), PRESETS)
    check_prompt(args)
    return args


def check_prompt(args):
    """Die where there is nothing to draw."""
    if not (args.prompts or args.prompt.strip()):
        die("nothing to draw: give a prompt, or --prompts FILE")
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
    names = ("pretrained", "resolution", "num_steps", "eta", "cfg")
    called = {"num_steps": "steps", "cfg": "teacher_cfg"}  # a run's cfg is its teacher's
    if args.teacher:
        args = as_teacher(args, flags_given())
        names = ("pretrained", "resolution", "cfg")
        called = {}
    else:
        args = argparse.Namespace(**vars(args))
    for path in list(files.values())[-1:]:
        take_settings(args, path, names, called)
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
    base.transformer.requires_grad_(False)
    return list(files)


def fix_adapters(transformer, adapters):
    """Put the adapters of each matrix together once, rounded, and not in every pass."""
    for layer in transformer.lora_layers:
        if layer.present(adapters):
            pair = [matrix.to(transformer.dtype) for matrix in layer.pair(adapters)]
            layer.fixed = {tuple(adapters): pair}


def teacher_levels(base, steps):
    """Noise levels of a teacher's picture -> a list of steps + 1 floats, the last one 0.

    What the student is compared with is what a user's pipeline makes of the base, so the levels are
    those of the scheduler that the base comes with, and not `cps.sigmas`: diffusers shifts the end of
    its grid twice, so that 50 steps end in .121, .067, .009, 0 and not in .161, .111, .058, 0. The
    pipeline's scheduler itself is left as it is. Raises ValueError where it has no such grid.
    """
    scheduler = type(base.pipe.scheduler).from_config(base.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


# ---- the sampler ---------------------------------------------------------------------------------
@torch.no_grad()
def draw(v, seeds, shape, levels, eta, device):
    """One latent a seed -> [B,C,h,w] float32. v: a velocity function; levels: as from cps.sigmas."""
    return integrate(v, noise_of(seeds, shape, levels, eta, device), levels, eta)


def noise_of(seeds, shape, levels, eta, device):
    """Starting noise and that of the stochastic steps -> [K,B,C,h,w], or [1,B,C,h,w] for eta 0.

    Picture i's comes from seeds[i] alone.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = (len(seeds), *shape)
    noise = []
    for _ in range(len(levels) - 1 if eta > 0 else 1):
        noise.append(randn_tensor(size, generator=generators, dtype=torch.float32))
    return torch.stack(noise).to(device)


def integrate(v, noise, levels, eta):
    """From noise[0] along all steps of `rollout` (Eq. 8, 19-21) to the latents [B,C,h,w].

    A step for which there is no noise adds none.
    """
    steps = len(levels) - 1
    none = torch.zeros_like(noise[0])
    return rollout(v, noise[0], levels, steps, eta, [*noise[1:], *[none] * steps])[-1]


def load_base(args, device):
    """The base model that the flags name."""
    compiled = bool(args.compile) and device.type == "cuda"
    return StableDiffusion3(args.pretrained, device, args.resolution, compile=compiled)


def renderer(base, adapters, args):
    """-> (noise levels, a function of noise and text that gives pictures [B,3,H,W]).

    With --compile on a GPU the function is recorded, and knows one batch size.
    """
    if args.teacher:
        levels = checked(teacher_levels, base, args.steps)
    else:
        levels = sigmas(args.steps, base.shift)
    fix_adapters(base.transformer, adapters)

    @torch.no_grad()
    def render(noise, *text):
        v = base.velocity(adapters, text, args.cfg)
        return base.decode(integrate(v, noise, levels, args.eta))

    (render,) = graphed(bool(args.compile), base.device, render)
    return levels, render


def draw_all(base, adapters, rows, args, look=None):
    """Draw every row into args.out_dir: 00000.png and so on, and grid.png with the first ones.

    look(pictures [B,3,H,W], their rows) is called with each batch.
    """
    device = base.device
    levels, render = renderer(base, adapters, args)
    recorded = bool(args.compile) and device.type == "cuda"
    os.makedirs(args.out_dir, exist_ok=True)
    batch_size = min(args.batch_size, len(rows))
    shown = []
    start = time.time()
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        prompts = [row["prompt"] for row in batch]
        if recorded:  # a recorded pass knows one batch size
            prompts += prompts[-1:] * (batch_size - len(batch))
        seeds = range(args.seed + first, args.seed + first + len(prompts))
        noise = noise_of(seeds, base.latent_shape, levels, args.eta, device)
        pictures = render(noise, *base.encode(prompts))[: len(batch)]
        if look is not None:
            look(pictures, batch)
        for i, picture in enumerate(pictures, first):
            save_grid(picture[None], f"{args.out_dir}/{i:05d}.png")
        shown += list(pictures[: MOST_IN_GRID - len(shown)].cpu())
    columns = min(8, max(4, args.num_images))
    save_grid(torch.stack(shown), f"{args.out_dir}/grid.png", columns)
    print(f"{len(rows)} pictures in {time.time() - start:.1f} s -> {args.out_dir}/grid.png")


def main():
    args = arguments()
    rows = rows_to_draw(args)
    device, _, _ = setup(args, training=False)
    files = generator_files(args)
    args = settled(args, files)
    base = load_base(args, device)
    adapters = [] if args.teacher else load_generator(base, files, args.lora_alpha)
    note_prompts(base, rows[:: args.num_images])  # each once, however many pictures it gets
    draw_all(base, adapters, rows, args)


if __name__ == "__main__":
    main()
