"""What knows neither model nor method: how a program speaks and ends, flags, processes, random numbers, the optimiser's step, the log."""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def is_rank_0():
    """Whether this process is the one that speaks, under torchrun and alone."""
    return os.environ.get("RANK", "0") == "0"


def die(message, status=2, local=False):
    """End the program with one line on stderr and no traceback.

    Exit status 2 is for bad input, 1 for a failure under way. Under torchrun only rank 0 speaks,
    unless the trouble is `local`: one rank's alone. Raises SystemExit.
    """
    if local or is_rank_0():
        program = os.path.basename(sys.argv[0])
        one_line = " ".join(str(message).split())
        print(f"{program}: error: {one_line}", file=sys.stderr, flush=True)
    sys.exit(status)


def note(message):
    """One line on stderr about something a user should know; rank 0 only."""
    if is_rank_0():
        one_line = " ".join(str(message).split())
        print(f"note: {one_line}", file=sys.stderr, flush=True)


def checked(function, *inputs):
    """function(*inputs), its ValueError (which says what to do in one line) turned into `die`."""
    try:
        return function(*inputs)
    except ValueError as e:
        die(e)


RANGES = {"eta": (0, 1), "ema": (0, 1), "lora_init_std": (1e-6, 1e6), "shift": (.01, 100), "seed": (0, 2 ** 63 - 1), "group_size": (2, 10 ** 6), **dict.fromkeys((
    "batch_size", "micro_batch", "steps", "epochs", "num_steps", "generator_every", "resolution", "lora_rank", "save_every", "prompts_per_epoch",
    "ema_every", "max_sequence_length", "max_skipped", "num_images", "eval_every", "eval_images"), (1, 10 ** 9))}


stop = {"asked": False, "agreed": False}  # a signal has come to this process; all processes know of one (see `update`)


def parse(parser):
    """Parse the command line; every number must lie in its range (not negative, where RANGES has none), or die."""
    parser.set_defaults(**parser.preset)
    args = parser.parse_args()
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (0, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:  # also nan
            die(f"--{name} must lie in [{low}, {high}], got {value}")
    if not args.out_dir:
        die("--out_dir must not be empty")
    if getattr(args, "low_memory", False):
        args.gradient_checkpointing = args.cache_text = args.offload_rewards = True
        args.micro_batch = min(args.micro_batch, 4)
    if getattr(args, "bench", 0) and hasattr(args, "save_every"):  # the stages: an endless run that `stopwatch` ends
        args.out_dir, args.resume, args.steps, args.epochs = f"{args.out_dir}/bench_{os.getppid()}", False, 10 ** 9, 10 ** 9
    return args


def make_parser(description, presets, out_dir, paper):
    """Parser with the flags that stage 1 and stage 2 share; the values of the preset, and with --paper those of `paper`, become defaults
    -> (parser, parser.add_argument)"""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="sd35m")
    first.add_argument("--paper", action="store_true")
    first.error = die
    early = first.parse_known_args()[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.error, parser.preset, add = die, {**presets.get(early.preset, {}), **(paper if early.paper else {})}, parser.add_argument
    add("--preset", choices=list(presets), default="sd35m", help="set of default flags")
    add("--paper", action="store_true", help="default flags by the paper's letter wherever the authors' release differs from it: "
        + ", ".join(f"--{k} {v}" for k, v in paper.items()))
    add("--pretrained", help="diffusers directory or hub id of the Stable Diffusion 3 model")
    add("--out_dir", default=out_dir, help="where checkpoints, log.jsonl and samples/ go")
    add("--prompts", default="", help="file with a prompt a line, or jsonl with \"prompt\"; default: the preset's own prompts")
    add("--seed", type=int, default=0, help="one seed, one result")
    add("--device", default="cuda", help="cuda, cpu, mps, or auto: the best there is")
    add("--resume", action="store_true", help="continue the run in out_dir; if there is none, start one")
    add("--resolution", type=int, default=512, help="height and width of the pictures in pixels")
    add("--max_sequence_length", type=int, default=128, help="T5 tokens of a prompt")
    add("--num_steps", type=int, default=4, help="sampling steps K of the generator")
    add("--shift", type=float, default=3.0, help="SD3 time shift of the sampling grid")
    add("--eta", type=float, default=.9, help="stochasticity of CPS steps: 0 Euler, 1 consistency-model sampler")
    add("--cfg", type=float, default=4.5, help="guidance scale of the teacher")
    add("--gamma", type=float, default=.01, help="weight of the fake score's consistency loss; 0 is A-DMD")
    add("--renoise_std", choices=("exact", "printed"), default="exact", help="std of the sub-interval kernel: exact, or (t-s)/(1-s) as App. B "
        "prints it, which gives the wrong marginal and a biased fake score (the tests prove it); the fake target is then Eq. 2 of that kernel's score")
    add("--consistency_times", choices=("near", "steps"), default="near", help="near: t' = the re-noise time, t'' up to 0.2 below it; steps: the paper's "
        "t' = t_k, t'' = t_{k+1}, read as from the generator's own state x_{t_k} to its next level (0 where that is 0)")
    add("--dm_gradient", choices=("transition", "score"), default="transition", help="AC-DMD's gradient: difference of two CPS transitions over "
        "their mean size, or the paper's difference of scores, read as the KL's own gradient, summed over elements")
    add("--lora_rank", type=int, default=32, help="rank of the adapters")
    add("--lora_alpha", type=float, default=64, help="alpha of the new adapters; their product is scaled by alpha / rank")
    add("--adapter_dtype", choices=("float32", "bfloat16"), default="float32", help="precision of adapters, gradients, Adam's moments and "
        "average; bfloat16 is the release's, in which updates below half a step of bf16 are lost")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--max_skipped", type=int, default=20, help="stop after so many updates in a row with a loss or gradient that is not finite")
    add("--gradient_checkpointing", action="store_true", help="trade a third of the speed for most of the activations' memory")
    add("--cache_text", action="store_true", help="encode all prompts once, before training, into a file in out_dir, and free the text encoders")
    add("--low_memory", action="store_true", help="for a 24 GB card: --gradient_checkpointing, --cache_text, --offload_rewards, decoding "
        "picture by picture, --micro_batch 4 at most")
    add("--compile", type=int, choices=(0, 1), help="compile each transformer block and the decoder; 1 on a GPU unless said, else 0")
    add("--graphs", type=int, choices=(0, 1), default=1, help="on a GPU: record each pass as a CUDA graph and replay it")
    add("--wandb", default="", metavar="PROJECT", help="send the numbers of log.jsonl to Weights & Biases, too (pip install wandb)")
    add("--bench", type=int, default=0, help="measure so many steps after a warm-up, print one JSON line, and stop; nothing is saved")
    add("--sample_every", type=int, default=500, help="save a picture grid every so many steps; 0: never")
    add("--save_every", type=int, default=500, help="save a checkpoint every so many steps")
    add("--save_minutes", type=float, default=20, help="and after so many minutes without one; 0: never")
    return parser, add


def setup(args, training=True):
    """Device, output directory and process group -> (device, rank, world size); dies where a run could not end well."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        die("no CUDA GPU found; to try everything on this machine: --preset tiny, or insist with --device cpu")
    try:
        device = torch.device(args.device, local) if args.device == "cuda" else torch.device(args.device)
        there = device.type in ("cuda", "cpu") or device.type == "mps" and torch.backends.mps.is_available()
    except RuntimeError:
        there = False
    if not there:
        die(f"--device must be cuda, cpu, mps or auto, and be there; got {args.device!r}")
    if training and not args.resume and any(os.path.exists(f"{args.out_dir}/{name}") for name in ("ckpt.pt", "ckpt.prev.pt")):
        die(f"{args.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir")
    try:
        os.makedirs(f"{args.out_dir}/samples" if training else args.out_dir, exist_ok=True)
        test = f"{args.out_dir}/.write_test_{rank}"
        open(test, "w").close(), os.remove(test)
    except OSError as e:
        die(f"cannot write to --out_dir {args.out_dir}: {e.strerror}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            die(f"a process for GPU {device.index}, but this machine has {torch.cuda.device_count()}: give torchrun a smaller --nproc_per_node", local=True)
        torch.cuda.set_device(device)
    if training:  # the step under way is finished, then save_or_stop. A second signal changes nothing: torchrun passes on what the terminal sent too
        stop.update(asked=False, agreed=False)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: stop.update(asked=True))
    if training and world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return device, rank, world


def generator(device, *key):
    """A random generator seeded by its key, e.g. (seed, step): stateless, so that resuming needs nothing but the step."""
    return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


def shard(n, rank, world):
    """This rank's rows of a batch of n; sizes differ by one at most where world does not divide n."""
    return slice(rank * n // world, (rank + 1) * n // world)


def data_order(length, first, count, seed):
    """Places first ... first+count-1 of an endless sequence of shuffled passes over `length` prompts."""
    return [shuffled(length, f"{seed}/pass/{i // length}")[i % length] for i in range(first, first + count)]


@functools.lru_cache(2)
def shuffled(length, key):
    """A permutation of range(length)."""
    return random.Random(key).sample(range(length), length)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sum (or another op) over ranks, in place; nothing to do for one process."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor, op)
        except RuntimeError as e:  # another rank has died; torchrun ends this one too, if it does not end by itself
            die(f"lost the other processes ({str(e).splitlines()[0][:120]}); go on from the last checkpoint with --resume", status=1, local=True)
    return tensor


def update(parameters, optimizer, args, skipped, name, loss):
    """One optimiser step on gradients summed over ranks in one flat all-reduce -> gradient norm. If that or the loss is not finite,
    nothing changes but skipped[name], and nan is returned; args.max_skipped of them in a row end the run."""
    grads = [p.grad for p in parameters]
    flat = all_reduce(torch.cat([*map(torch.flatten, grads), torch.stack([loss, torch.full_like(loss, stop["asked"])])]))  # so ranks agree on when to stop
    norm, loss, asked = torch.stack([flat[:-2].norm(), *flat[-2:]]).tolist()
    stop["agreed"] |= asked > 0
    finite = math.isfinite(norm) and math.isfinite(loss)
    skipped[name] = 0 if finite else skipped[name] + 1
    if finite:
        flat *= min(1, args.max_grad_norm / (norm + 1e-6))
        torch._foreach_copy_(grads, [g.view_as(p) for p, g in zip(parameters, flat[:-2].split([p.numel() for p in parameters]))])
        optimizer.step()
    elif skipped[name] >= args.max_skipped:
        die(f"{skipped[name]} updates in a row of the {name} adapter were not finite; the last good checkpoint is in {args.out_dir}", status=1)
    torch._foreach_zero_(grads)
    return norm if finite else math.nan


def distance(parameters, ema):
    """How far the weights have run from their average: |p - ema| / |ema|, over all together."""
    norm = lambda tensors: torch.stack(torch._foreach_norm(tensors)).norm()
    return (norm(torch._foreach_sub([p.detach() for p in parameters], ema)) / norm(ema)).item()


def guarded(reward):
    """The same reward, but one that raises, or whose scores are not one a picture, ends the run with its name and the prompts."""
    @functools.wraps(reward)
    def call(images, prompts, metadata):
        try:
            scores = reward(images, prompts, metadata)
            if scores.shape != (len(images),):
                raise ValueError(f"it gave scores of shape {tuple(scores.shape)} for {len(images)} pictures")
            return scores
        except Exception as e:
            each = dict.fromkeys(repr(prompt[:80]) for prompt in prompts)
            die(f"reward {reward.name} failed on {', '.join(list(each)[:9])}: {type(e).__name__}: {str(e)[:200]}", status=1, local=True)
    return call


def make_log(args):
    """-> log(bar, images, **numbers): a line in out_dir/log.jsonl and the same numbers in the progress bar; rank 0 only."""
    if os.environ.get("RANK", "0") != "0":
        return lambda *_, **__: None
    path, last, flat = f"{args.out_dir}/log.jsonl", [time.time()], [0]
    if args.resume and os.path.exists(path):  # forget what came after the checkpoint
        try:
            with open(path, encoding="utf-8") as f:
                write_atomically({path: "".join(line for line in f if line.endswith("\n") and json.loads(line)["step"] < args.start).encode()})
        except (ValueError, KeyError, TypeError):
            die(f"{path} is damaged; move it away to go on")
    file, board = open(path, "ab" if args.resume else "wb", buffering=0), None
    if args.wandb:
        try:
            import wandb
            board = wandb.init(project=args.wandb, name=os.path.basename(args.out_dir), dir=args.out_dir, config=vars(args))
        except Exception as e:  # not installed, not logged in, no network
            die(f"--wandb {args.wandb}: {str(e).splitlines()[0][:200]}; pip install wandb, wandb login, or leave it out: log.jsonl has the same numbers")

    def log(bar, images, **numbers):
        now, peak = time.time(), torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0
        speed = {"seconds": round(now - last[0], 4), "images_per_s": round(images / (now - last[0]), 2), **({"peak_gib": round(peak, 2)} if peak else {})}
        last[0], flat[0] = now, flat[0] + 1 if numbers.get("flat_groups") == 1 else 0
        if flat[0] == 20:
            print("warning: 20 epochs in a row all pictures of a prompt scored the same: SubGRPO learns nothing", file=sys.stderr, flush=True)
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}  # JSON knows no nan
        numbers["skipped"] = sum(v is None for k, v in numbers.items() if k.startswith("grad_"))
        try:
            file.write((json.dumps({**numbers, **speed}) + "\n").encode())
        except OSError as e:
            die(f"cannot write {path} ({e.strerror}); make room, and go on from the last checkpoint with --resume", status=1)
        if board:
            board.log({**numbers, **speed}, step=numbers["step"])
        bar.set_postfix({k: f"{v:.3g}" for k, v in {**numbers, **speed}.items() if k != "step" and isinstance(v, (int, float))}, refresh=False)
    return log


def sync(path):
    """Flush a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor), os.close(descriptor)


def as_bytes(save, *inputs, **options):
    """What save(*inputs, file, **options) writes. In memory first: on a full disk torch.save fails in a way that cannot be caught."""
    save(*inputs, buffer := io.BytesIO(), **options)
    return buffer.getbuffer()


def write_atomically(files):
    """files {path: bytes}: all are on disk under a temporary name before the first is renamed. A kill leaves old files or new ones,
    never half of one; a full disk leaves the old ones. What was ckpt.pt becomes ckpt.prev.pt."""
    try:
        for path, content in files.items():
            with open(path + ".tmp", "wb") as f:
                f.write(content)
            sync(path + ".tmp")
    except OSError as e:
        [os.remove(path + ".tmp") for path in files if os.path.exists(path + ".tmp")]
        die(f"cannot write {path} ({e.strerror}); make room: what was saved before is intact, and a run goes on with --resume", status=1)
    for path in files:
        if path.endswith("/ckpt.pt") and os.path.exists(path):
            os.replace(path, path[:-3] + ".prev.pt")
        os.replace(path + ".tmp", path)
    with contextlib.suppress(OSError):  # some network file systems cannot
        sync(os.path.dirname(path) or ".")
