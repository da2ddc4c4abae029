"""Speed: of a run, from its log.jsonl, and of drawing one picture.

    python -m tools.bench out/cold_start                     # seconds and parts of a step, pictures a second
    python -m tools.bench picture "a photo of two cats"      # flags as for sample.py
    python -m tools.bench rewards --rewards clipscore,hpsv2  # each one by itself, flags as for stage 2

Nothing has to be switched on for it: every run logs the seconds of each part of its steps (s_text,
s_rollout, ...). The first steps, which compile and record, are left out. With the run's settings.json
the work of a step is known, too: forward passes of the transformer, times the operations of one. On a
GPU it is compared with the rate of a plain bf16 matrix product, measured here and now.

What counts as work is the transformer alone: one forward for each picture it is given, one more where
a gradient goes back through it (the base is frozen), nothing for what --low_memory computes again, for
the decoder and for the rewards.
"""

import json
import math
import sys
import time

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

import sample
from backbones import BACKBONES
from checkpoint import settings_of
from common import Parser, checked, die, end_on_signals, note, parse, resolution, setup, sides
from prompts import geneval_prompts
from rewards import build_for, parse_weights
from tools.plots import read_log

WITH_GRADIENT = 2  # forwards that one with a backward pass counts for


# ---- a run ---------------------------------------------------------------------------------------
def quantile(values, share):
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def steps_of(log, skip):
    """The lines that count; dies where none is left."""
    if skip is None:
        skip = max(3, len(log) // 5)
    if len(log) <= skip:
        die(f"{len(log)} steps are logged, of which the first {skip} are left out: --skip fewer")
    return log[skip:]


def speed_of(steps):
    """{what: number} over the lines of a log.

    Means are over all, so that steps with and without an update of the generator count as often as
    they come.
    """
    seconds = [line["seconds"] for line in steps]
    pictures = sum(line["images_per_s"] * line["seconds"] for line in steps)
    result = {
        "steps": len(steps),
        "pictures a step": round(pictures / len(steps)),
        "s, mean": sum(seconds) / len(steps),
        "s, median": quantile(seconds, 0.5),
        "s, 90 %": quantile(seconds, 0.9),
        "pictures / s": pictures / sum(seconds),
    }
    peaks = [line["peak_gib"] for line in steps if "peak_gib" in line]
    if peaks:
        result["peak GiB"] = max(peaks)
    for name in parts_of(steps):
        result[name] = sum(line.get(name, 0) for line in steps) / len(steps)
    return result


def parts_of(steps):
    """Names of the parts of a step, in the order in which they come."""
    names = {}
    for line in steps:
        for name in line:
            if name.startswith("s_"):
                names[name] = None
    return list(names)


# ---- how much work that is -----------------------------------------------------------------------
def forwards_of(settings, steps, guided_by_input=False):
    """Forward passes of the transformer that one picture of a step takes, on average.

    What the settings do not say is seen in the log: how often the generator is updated, the size of
    S, which terms have a weight. guided_by_input: the teacher's guidance takes no second pass.
    """
    K = settings["num_steps"]
    teacher = 1 if settings["cfg"] == 1 or guided_by_input else 2
    looked_at = 0 if settings.get("gamma") == 0 else settings.get("consistency_share", 1)
    fake = WITH_GRADIENT * (1 + 2 * looked_at)
    anchor = teacher + 1  # teacher and fake
    if "S" in steps[0]:
        M = len(steps[0]["S"])
        has_anchor = any(line["loss_dm"] for line in steps)
        has_last_step = has_anchor or any(line["loss_det"] for line in steps)
        policy = M * any(line["loss_policy"] for line in steps)
        return K + fake + anchor * has_anchor + WITH_GRADIENT * (has_last_step + policy)
    updates = sum("loss_generator" in line for line in steps) / len(steps)
    rollout = (K + 1) / 2  # k is uniform in 1..K
    if settings.get("reuse_rollouts"):  # all K steps, as often as the generator's changes ask for
        every = settings["generator_every"]
        rollout = K * math.ceil(every / K) / every
    return rollout + fake + updates * (WITH_GRADIENT + anchor)


def shapes_of(pretrained, resolution):
    """A base's backbone without weights and text encoders: its transformer and VAE are on "meta"."""
    index = DiffusionPipeline.load_config(pretrained)
    family = BACKBONES[index["_class_name"]]
    given = {**family.absent(index), **dict.fromkeys(family.encoders)}
    for name in ("transformer", "vae"):
        _, class_name = index[name]
        module = getattr(diffusers, class_name)
        config = module.load_config(pretrained, subfolder=name)
        with torch.device("meta"):
            given[name] = module.from_config(config)
    pipe = getattr(diffusers, family.pipeline).from_pretrained(pretrained, **given)
    return family(pipe, resolution)


def forward_flops(backbone):
    """Operations of one forward for one picture; the backbone's transformer is on "meta"."""
    with torch.device("meta"):
        x = torch.zeros(1, *backbone.latent_shape)
        timestep = torch.zeros(1)
        text = [torch.zeros(1, *shape) for shape in backbone.text_shapes()]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone.run(x, timestep, 1.0, *text)
    return counter.get_total_flops()


def matmul_tflops(n=8192):
    """TFLOP/s of a bf16 matrix product on this GPU."""
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    warm_up, measured = 10, 10
    for _ in range(warm_up):
        a @ b
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(measured):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return measured * 2e-9 * n**3 / begin.elapsed_time(end)


def work_of(run, speed, steps, gpus):
    """{what: number}: forwards, TFLOP/s, share of the matrix rate; {} where no settings lie there."""
    settings = settings_of(f"{run}/log.jsonl")
    if not settings.keys() >= {"pretrained", "resolution", "num_steps", "cfg"}:
        return {}  # a run of this repository has them all
    try:
        backbone = shapes_of(settings["pretrained"], settings["resolution"])
    except OSError:
        note(f"the base model {settings['pretrained']} is not here: its operations are not known")
        return {}
    forwards = forwards_of(settings, steps, backbone.guided_by_input())
    tflop = forward_flops(backbone) / 1e12
    achieved = forwards * tflop * speed["pictures / s"] / gpus
    work = {"forwards a picture": forwards, "TFLOP a forward": tflop, "TFLOP/s a GPU": achieved}
    if torch.cuda.is_available():
        work["matrix product TFLOP/s"] = matmul_tflops()
        work["share of it"] = achieved / work["matrix product TFLOP/s"]
    return work


def show(numbers):
    for name, value in numbers.items():
        print(f"{name:24s}{value:.4g}", flush=True)


def bench_run():
    parser = Parser("The speed of a run, from its log.jsonl.")
    add = parser.add_argument
    add("run", help="out_dir of cold_start.py or rtdmd_rl.py")
    add("--skip", type=int, help="first steps to leave out; default: a fifth, 3 at least")
    add("--gpus", type=int, default=1, help="how many GPUs the run had")
    add("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(out_dir=".")
    args = parse(parser)
    end_on_signals("stopped by a signal")
    steps = steps_of(read_log(args.run), args.skip)
    speed = speed_of(steps)
    numbers = {**speed, **work_of(args.run, speed, steps, args.gpus)}
    if args.json:
        print(json.dumps(numbers))
    else:
        show(numbers)


# ---- one picture ---------------------------------------------------------------------------------
def clock(device):
    """Now, when the device has done all it had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bench_picture():
    """Time one picture with everything warm; each time the prompt is new, and so its encoding."""
    parser = sample.flags("Time one picture, drawn as sample.py draws it.")
    parser.add_argument("--repeat", type=int, default=10, help="pictures that are timed")
    parser.set_defaults(batch_size=1, out_dir=".")
    args = parse(parser, sample.PRESETS)
    sample.check_prompt(args)
    device, _, _ = setup(args, training=False)
    files = sample.generator_files(args)
    args = sample.settled(args, files)
    base = sample.load_base(args, device)
    adapters = [] if args.teacher else sample.load_generator(base, files, args.lora_alpha)
    levels, render = sample.renderer(base, adapters, args)

    warm_up = 2
    times = {"s, text": [], "s, noise": [], "s, draw and decode": []}
    for i in range(warm_up + args.repeat):
        marks = [clock(device)]
        text = base.encode([f"{args.prompt} {i}"] * args.batch_size)
        marks.append(clock(device))
        seeds = range(args.seed, args.seed + args.batch_size)
        noise = sample.noise_of(seeds, base.latent_shape, levels, args.eta, device)
        marks.append(clock(device))
        render(noise, *text)
        marks.append(clock(device))
        if i >= warm_up:
            for taken, before, after in zip(times.values(), marks, marks[1:]):
                taken.append(after - before)
    medians = {name: quantile(taken, 0.5) for name, taken in times.items()}
    numbers = {"batch": args.batch_size, "steps": args.steps, **medians}
    numbers["pictures / s"] = args.batch_size / sum(medians.values())
    if device.type == "cuda":
        numbers["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    show(numbers)


# ---- rewards -------------------------------------------------------------------------------------
def bench_rewards():
    """Time each reward by itself on random pictures: scores, and with the gradient where it has one."""
    parser = Parser("Seconds and memory of each reward, forward and backward, as stage 2 calls it.")
    add = parser.add_argument
    add("--rewards", default="clipscore,pickscore,hpsv2,geneval_soft", help="name,...")
    add("--reward_path", action="append", default=[], metavar="NAME=PATH", help="a reward's model")
    add(
        "--reward_dtype", choices=("float32", "bfloat16"), default="float32", help="of their models"
    )
    add("--resolution", type=resolution, default=512, help="side, or height x width as 768x512")
    add("--batch_size", type=int, default=8, help="pictures at once")
    add("--repeat", type=int, default=10, help="calls that are timed; each has new prompts")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    parser.set_defaults(out_dir=".")
    args = parse(parser)
    device, _, _ = setup(args, training=False)
    for name in checked(parse_weights, args.rewards):
        show(speed_of_reward(name, args, device))


def speed_of_reward(name, args, device):
    """{what: number} of one reward, which is gone when this returns."""
    warm_up = 2
    rows = geneval_prompts((warm_up + args.repeat) * args.batch_size)
    pictures = torch.rand(args.batch_size, 3, *sides(args.resolution), device=device)
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    dtype = getattr(torch, args.reward_dtype)
    (reward,) = checked(build_for, rows, {name: 1.0}, device, args.reward_path, dtype)
    times = []
    for i in range(warm_up + args.repeat):
        batch = rows[i * args.batch_size : (i + 1) * args.batch_size]
        start = clock(device)
        score_once(reward, pictures, batch)
        times.append(clock(device) - start)
    numbers = {f"{name}, s": quantile(times[warm_up:], 0.5)}
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated() - before
        numbers[f"{name}, peak GiB of its own"] = own / 2**30
    return numbers


def score_once(reward, pictures, rows):
    """Scores of pictures [B,3,H,W], and their gradient where there is one."""
    pictures = pictures.detach().requires_grad_(reward.differentiable)
    prompts = [row["prompt"] for row in rows]
    scores = reward(pictures, prompts, [row["metadata"] for row in rows])
    if reward.differentiable:
        torch.autograd.grad(scores.sum(), pictures)


PARTS = {"picture": bench_picture, "rewards": bench_rewards}


def main():
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        PARTS[sys.argv.pop(1)]()
    else:
        bench_run()


if __name__ == "__main__":
    main()
