"""Plumbing of both stages: flags, processes, random numbers, the optimiser's step, the log, files.

How a program speaks and ends is here, too: a user's mistake is one line and exit status 2.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import sysconfig
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


def is_rank_0():
    """Whether this process is the one that speaks, under torchrun and alone."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here():
    """Whether this process is the first one on its machine, under torchrun and alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def die(message, status=2, local=False):
    """End the program with one line on stderr and no traceback.

    Exit status 2 is for bad input, 1 for a failure under way. Under torchrun the first process of each
    machine speaks, since a file may be missing on one of them; all do if the trouble is `local`, one
    rank's alone. Raises SystemExit.
    """
    if stop["ending"]:  # a signal's SystemExit, of which somebody else's code has made an error
        sys.exit(stop["ending"])
    if local or is_first_here():
        program = os.path.basename(sys.argv[0])
        one_line = " ".join(str(message).split())
        print(f"{program}: error: {one_line}", file=sys.stderr, flush=True)
    sys.exit(status)


def note(message):
    """One line on stderr about something a user should know; rank 0 only."""
    if is_rank_0():
        one_line = " ".join(str(message).split())
        say(f"note: {one_line}", sys.stderr)


def say(line, stream=None):
    """Print a line, to stdout by default. A terminal or a pipe that has gone is no reason to stop."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # Nor shall it be one later: what is written there from now on is lost.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


LONGEST = 200  # characters of somebody else's message


def first_line(error):
    """What an exception says first."""
    text = str(error).strip() or repr(error)
    return cut(text.splitlines()[0])


def shortened(error):
    """What an exception says, as one line of whole words."""
    return cut(" ".join(str(error).split()) or repr(error))


def causes(error):
    """An exception and those that it came from."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def cut(text):
    if len(text) <= LONGEST:
        return text
    return text[:LONGEST].rsplit(" ", 1)[0] + " ..."


def checked(function, *inputs):
    """function(*inputs), its ValueError (which says what to do in one line) turned into `die`."""
    try:
        return function(*inputs)
    except ValueError as e:
        die(e)


# ---- flags ---------------------------------------------------------------------------------------
FROM_1 = (
    "batch_size", "steps", "epochs", "num_steps", "generator_every", "resolution",
    "lora_rank", "save_every", "prompts_per_epoch", "ema_every", "num_images", "eval_every",
    "repeat", "gpus",
)  # fmt: skip
# Flags that are paths; a ~ at their beginning is the user's home directory.
PLACES = {
    "out_dir", "pretrained", "generator_pretrained", "prompts", "metadata", "cold_start", "rtdmd",
    "eval_prompts", "start_from", "scores", "like",
}  # fmt: skip
RANGES = {
    "eta": (0, 1),
    "consistency_share": (0, 1),
    "ema": (0, 1),
    "anneal": (0, 1),
    "seed": (0, 2**63 - 1),
    "group_size": (2, 10**6),
    **dict.fromkeys(FROM_1, (1, 10**9)),
}


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, no abbreviations, and defaults shown in --help."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        die(message)


def parse(parser, presets=None, paper=None):
    """Parse the command line -> its values.

    The values of the preset that is asked for become defaults and, with --paper, those of `paper`.
    Every number must lie in its range (from 0, where RANGES has none); dies where one does not.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.error = die
    early.add_argument("--preset", default=parser.get_default("preset"))
    early.add_argument("--paper", action="store_true")
    asked, _ = early.parse_known_args()
    parser.set_defaults(**(presets or {}).get(asked.preset, {}))
    if asked.paper and paper:
        parser.set_defaults(**paper)
    args = parser.parse_args()
    for name in PLACES & set(vars(args)):  # no shell does it behind an equals sign
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if getattr(args, "reward_path", None):
        pairs = [pair.partition("=") for pair in args.reward_path]
        args.reward_path = [name + sign + os.path.expanduser(path) for name, sign, path in pairs]
    for name, value in vars(args).items():
        if not in_range(name, value):
            low, high = RANGES.get(name, (0, math.inf))
            die(f"--{name} must lie in [{low}, {high}], got {value}")
    if not args.out_dir:
        die("--out_dir must not be empty")
    if getattr(args, "low_memory", False):
        args.cache_text = True
    return args


def in_range(name, value):
    """Whether a flag may have this value: numbers have ranges, and nan and infinity lie in none."""
    low, high = RANGES.get(name, (0, math.inf))
    return not isinstance(value, (int, float)) or (low <= value <= high and value != math.inf)


def resolution(text):
    """The value of --resolution: 512 for a square, "768x512" for height x width."""
    words = text.lower().split("x")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side like 512 nor like 768x512")
    if len(words) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has more than height x width")
    height, width = int(words[0]), int(words[-1])
    return height if height == width else f"{height}x{width}"


def sides(size):
    """A value of --resolution -> (height, width)"""
    height, _, width = str(size).partition("x")
    return int(height), int(width or height)


def share(text):
    """The value of a flag that is a share of something: .25 or 1/4, above 0 and at most 1."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share like .25 or 1/4, above 0, at most 1"
        )
    return value


def flags_given():
    """The names of the flags on the command line."""
    words = [word.split("=")[0] for word in sys.argv[1:]]
    return {word[2:] for word in words if word.startswith("--")}


# ---- processes -----------------------------------------------------------------------------------
stop = {
    "asked": False,  # a signal came to this process
    "agreed": False,  # all processes know of one (`update`)
    "ending": 0,  # the exit status, once a signal ends this process at once
}


def setup(args, training=True):
    """Device, output directory and process group -> (device, rank, world size).

    Dies where a run could not end well.
    """
    explain_full_memory(args)
    rank, world, local_rank = place_among_processes()
    device = chosen_device(args, local_rank)
    make_out_dir(args.out_dir, "samples" if training else "", rank)
    if training and rank == 0:
        lock(args.out_dir)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            die(
                f"a process for GPU {device.index}, but this machine has {count}: "
                "give torchrun a smaller --nproc_per_node",
                local=True,
            )
        torch.cuda.set_device(device)
    if device.type == "cuda" and getattr(args, "compile", 0):
        check_compiler()
        keep_compiled_code()
    if training:
        end_on_signals("stopped by a signal before the first step: nothing is lost")
        meet("nccl" if device.type == "cuda" else "gloo")
    else:
        end_on_signals("stopped by a signal")
    return device, rank, world


def place_among_processes():
    """(rank, world size, rank on this machine), from torchrun; dies where they do not fit."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    said = {name: os.environ.get(name, default) for name, default in defaults.items()}
    try:
        rank, world, local_rank = map(int, said.values())
        fits = 0 <= rank < world and local_rank >= 0
    except ValueError:
        fits = False
    if not fits:
        words = " ".join(f"{name}={said[name]}" for name in said if name in os.environ)
        die(f"the environment says {words}: unset these, or start with torchrun", local=True)
    return rank, world, local_rank


def explain_full_memory(args):
    """From now on one more line follows the traceback where a GPU's memory is full: what to do."""
    if hasattr(args, "micro_batch"):
        remedy = "give --low_memory, or --micro_batch and fewer than now (at least 1)"
    elif hasattr(args, "batch_size"):
        remedy = "give a smaller --batch_size"
    else:
        return

    def explain(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        # By its words: the recording of a graph hides it behind an error of its own.
        if any("out of memory" in str(e) for e in causes(error)):
            program = os.path.basename(sys.argv[0])
            print(f"{program}: the GPU's memory is full: {remedy}", file=sys.stderr, flush=True)

    sys.excepthook = explain


def meet(backend):
    """Let the processes know each other, if there are several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    except (RuntimeError, ValueError) as e:  # one of them has ended before all had met
        die(f"lost the other processes ({first_line(e)})", status=1, local=True)


def chosen_device(args, local_rank):
    """--device as a torch.device; "auto" is the best there is. Dies where it is not there."""
    has_mps = torch.backends.mps.is_available()
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        die(
            "no CUDA GPU found; to try everything on this machine: --preset tiny, "
            "or insist with --device cpu"
        )
    there = False
    with contextlib.suppress(RuntimeError):  # no device of that name
        index = (local_rank,) if name == "cuda" else ()
        device = torch.device(name, *index)
        there = device.type in ("cuda", "cpu") or (device.type == "mps" and has_mps)
    if not there:
        die(f"--device must be cuda, cpu, mps or auto, and be there; got {args.device!r}")
    return device


def make_out_dir(out_dir, subfolder, rank):
    """Make it; dies where nothing can be written into it. What stays empty is removed at the end."""
    try:
        for folder in missing_folders(os.path.join(out_dir, subfolder)):
            os.makedirs(folder, exist_ok=True)
            if rank == 0:  # another one may end before this one has begun to write
                atexit.register(remove_empty, folder)
        probe = f"{out_dir}/.write_test_{rank}"
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as e:
        die(f"cannot write to --out_dir {out_dir}: {e.strerror}")


held = {"lock": None}  # a file descriptor of the folder that this process trains into


def lock(folder):
    """Let no other process train into this folder until this one ends; dies where one does already."""
    unlock()
    if fcntl is None:
        return
    held["lock"] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(
            f"another run is writing to --out_dir {folder}: let it end, or choose another",
            local=True,
        )
    except OSError:  # a file system that has no locks
        pass


def unlock():
    """Let others train into the folder again, where this process was the one that did."""
    if held["lock"] is not None:
        os.close(held["lock"])
    held["lock"] = None


def missing_folders(folder):
    """This folder and those around it, as far as they are not there, the outermost first."""
    folder = os.path.abspath(folder)
    missing = []
    while not os.path.isdir(folder):
        missing.insert(0, folder)
        folder = os.path.dirname(folder)
    return missing


def remove_empty(folder):
    """Remove a folder if nothing is in it: a command that was refused leaves none."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def check_compiler():
    """Die where what torch.compile needs on a GPU is not there: Triton, a C compiler, Python's headers."""
    if importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    elif not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        missing = "a C compiler (gcc or clang; CC names another)"
    elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        missing = "Python.h (the package python3-dev)"
    else:
        return
    die(f"--compile needs {missing}, which is not on this machine: install it, or give --compile 0")


def keep_compiled_code():
    """Let the compiler keep its code where it survives a restart, beside what the hub was asked for.

    PyTorch's own place is in /tmp. TORCHINDUCTOR_CACHE_DIR names another.
    """
    place = os.path.join(HF_HOME, "compiled")
    place = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", place)
    if is_rank_0():
        known = "is" if os.path.isdir(place) and os.listdir(place) else "will be"
        say(
            f"compiled code {known} in {place}; what is not there yet is compiled in the first steps, "
            "which takes minutes"
        )


SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
]


def end_on_signals(words):
    """From now on a signal ends the program at once, with one line."""

    def end(number, frame):
        if is_first_here():
            write_now(f"\n{os.path.basename(sys.argv[0])}: {words}\n")
        stop["ending"] = 128 + number
        sys.exit(stop["ending"])

    stop.update(asked=False, agreed=False, ending=0)
    on_signals(end)


def on_signals(handler):
    """Let the handler have all of SIGNALS. Under nohup the terminal's end stays ignored.

    Ctrl-C is listened to in any case: a shell's background jobs ignore it, and may still be sent it.
    """
    for number in SIGNALS:
        by_nohup = number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN
        if not by_nohup:
            signal.signal(number, handler)


def write_now(text):
    """Write to stderr, if it is still there, from a signal's handler: print may be at work just now."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def listen_to_signals():
    """After a signal the step under way is finished, then `save_or_stop` saves and ends the run.

    A second one changes nothing: torchrun passes on what the terminal sent to its children, too.
    """

    def ask(number, frame):
        if is_rank_0() and not stop["asked"]:
            write_now("\nstopping: the step under way is finished and saved first\n")
        stop["asked"] = True

    on_signals(ask)


def shard(n, rank, world):
    """This rank's rows of a batch of n; sizes differ by one at most where world does not divide n."""
    return slice(rank * n // world, (rank + 1) * n // world)


ROOM_USED = 0.95  # of what a GPU has free, by the passes; the rest is for moments, NCCL and scraps
ON_A_CPU = 4  # pictures at once where there is no GPU whose memory could be looked at
# All but cuDNN. PyTorch (2.11) finds cuDNN's plan for the backward pass of attention by the layout of q, k
# and v alone. Where the output's gradient lies in memory otherwise than in the pass that the plan was made
# for, it is read wrongly: a wrong gradient without an error, or an illegal access. Compiled blocks lay it
# out otherwise than plain ones.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def micro_batch(args, n_mine, device, recorded, compiled, rest=lambda n: None):
    """How many pictures a pass takes at once: what --micro_batch asks for or, for 0, what this GPU holds.

    n_mine: pictures of this process, which is never exceeded. recorded(n), rest(n): what needs the most
    memory with n pictures, of that which is recorded as CUDA graphs, and of what is not. Both are tried
    with one and with two pictures, not compiled; gradients are left behind. compiled: the memory of
    what is recorded, compiled, over that of the same when it is tried. Says what it has chosen.
    """
    if args.micro_batch or n_mine <= 1:
        return args.micro_batch or 1
    if device.type != "cuda":
        return min(n_mine, ON_A_CPU)
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(NOT_CUDNN):
        of_recorded = peak(recorded, 1), peak(recorded, 2)
        of_rest = peak(rest, 1), peak(rest, 2)

    def needed(n):
        kept = along_a_line(*of_recorded, n)
        more = along_a_line(*of_rest, n)
        # With --low_memory the blocks' inputs are kept, compiled or not.
        if args.compile and not args.low_memory:
            kept *= compiled
        # Graphs keep their memory, so that the rest comes on top of it.
        return kept + more if args.graphs else max(kept, more)

    free, _ = torch.cuda.mem_get_info()
    fitting = 1
    while fitting < n_mine and needed(fitting + 1) <= ROOM_USED * free:
        fitting += 1
    chosen = even_part(n_mine, fitting)
    if is_rank_0():
        gib = needed(chosen) / 2**30
        amount = f"about {gib:.1f}" if gib < math.inf else "more than all"
        say(
            f"micro-batches of {chosen} pictures: {amount} of the {free / 2**30:.1f} GiB that are free "
            "(--micro_batch)"
        )
    return chosen


def peak(function, n):
    """Bytes of GPU memory that function(n) needs while it runs; infinitely many where it finds no room."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        function(n)
        most = torch.cuda.max_memory_allocated() - before
    except torch.cuda.OutOfMemoryError:
        most = math.inf
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def along_a_line(at_1, at_2, n):
    """The value at n on the line through those at 1 and 2, which may be infinite."""
    if n == 1:
        return at_1
    if at_2 == math.inf:
        return math.inf
    return at_1 + (n - 1) * (at_2 - at_1)


def even_part(n, most):
    """The size of micro-batches of n pictures, at most `most`.

    A divisor of n above most/2, if there is one: passes are compiled once for each size, and a divisor
    leaves no smaller one at the end. Else the smallest size that needs no more micro-batches.
    """
    if n <= most:
        return n
    for size in range(most, most // 2, -1):
        if n % size == 0:
            return size
    count = math.ceil(n / most)
    return math.ceil(n / count)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sum (or another op) over ranks, in place; nothing to do for one process."""
    if dist.is_initialized():
        try:
            dist.all_reduce(tensor, op)
        except RuntimeError as e:
            # another rank has died; torchrun ends this one too, if it does not end by itself
            die(
                f"lost the other processes ({first_line(e)}); the same command goes on from the last checkpoint",
                status=1,
                local=True,
            )
    return tensor


def gather(thing):
    """What every rank has -> a list of them all, on every rank."""
    if not dist.is_initialized():
        return [thing]
    of_all = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(of_all, thing)
    except RuntimeError as e:
        die(f"lost the other processes ({first_line(e)}); the same command goes on", 1, local=True)
    return of_all


# ---- random numbers and order of prompts: functions of (seed, step), so there is no state to save --
def seeded_rng(device, *key):
    """A random generator seeded by its key, e.g. (seed, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def data_order(length, first, count, seed):
    """Places first ... first+count-1 of an endless sequence of shuffled passes over `length` prompts."""
    places = []
    for i in range(first, first + count):
        one_pass = shuffled(length, f"{seed}/pass/{i // length}")
        places.append(one_pass[i % length])
    return places


@functools.lru_cache(2)
def shuffled(length, key):
    """A permutation of range(length)."""
    return random.Random(key).sample(range(length), length)


class StepRandom:
    """The random numbers of one step, drawn for the whole batch; tensors hold this rank's rows.

    So a run is the same on any number of ranks, and a resumed one needs no generator's state.
    """

    def __init__(self, seed, step, n_pictures, my_rows, shape, device):
        self.scalars = random.Random(f"{seed}/{step}")  # the same on all ranks
        self.tensors = seeded_rng(device, seed, step)
        self.n_pictures = n_pictures
        self.my_rows = my_rows
        self.shape = shape
        self.device = device

    def normal(self):
        size = (self.n_pictures, *self.shape)
        return torch.randn(size, generator=self.tensors, device=self.device)[self.my_rows]

    def uniform(self):
        size = (self.n_pictures,)
        return torch.rand(size, generator=self.tensors, device=self.device)[self.my_rows]

    def some(self, share, micro_batches):
        """A random share of the batch -> for each of these slices of this rank's rows, which of them.

        Every picture is in it with a probability of exactly `share`. The chosen ones lie evenly apart, so
        that micro-batches have equally many, to one. A tensor of places within the slice each.
        """
        start = self.scalars.random()
        offset = self.my_rows.start
        chosen = []
        for b in micro_batches:
            rows = range(offset + b.start, min(offset + b.stop, self.my_rows.stop))
            places = [row - rows.start for row in spread(rows, share, start)]
            chosen.append(torch.tensor(places, dtype=torch.long, device=self.device))
        return chosen


def spread(rows, share, start):
    """Those of these rows that belong to a share of all, evenly apart; start in [0,1) moves them."""
    found = []
    for row in rows:
        if math.floor((row + 1) * share + start) > math.floor(row * share + start):
            found.append(row)
    return found


# ---- the optimiser's step ------------------------------------------------------------------------
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm
MAX_SKIPPED = 20  # after so many updates in a row that are not finite, a run ends


def update(weights, optimizer, skipped, name, loss):
    """One optimiser step on the gradient summed over ranks, clipped -> its norm.

    weights: one flat parameter, whose .grad is 0 afterwards. loss: a scalar, this rank's share. If norm
    or loss is not finite nothing changes but skipped[name], and nan is returned; MAX_SKIPPED of them in
    a row end the run.
    """
    # One all-reduce for all: the gradient, the loss, and whether a signal came to any rank, so
    # that all stop after the same step.
    extra = torch.stack([loss, torch.full_like(loss, stop["asked"])])
    summed = all_reduce(torch.cat([weights.grad, extra]))
    norm, loss, asked = torch.stack([summed[:-2].norm(), *summed[-2:]]).tolist()
    stop["agreed"] |= asked > 0
    finite = math.isfinite(norm) and math.isfinite(loss)
    skipped[name] = 0 if finite else skipped[name] + 1
    if finite:
        torch.mul(summed[:-2], min(1, MAX_GRAD_NORM / (norm + 1e-6)), out=weights.grad)
        optimizer.step()
    elif skipped[name] >= MAX_SKIPPED:
        die(
            f"{skipped[name]} updates in a row of the {name} adapter were not finite; "
            "the last good checkpoint is in --out_dir, if one was saved",
            status=1,
        )
    weights.grad.zero_()
    return norm if finite else math.nan


def distance(weights, ema):
    """How far the weights have run from their average: |weights - ema| / |ema|."""
    return ((weights.detach() - ema).norm() / ema.norm()).item()


class Sums:
    """Numbers that are summed over micro-batches and then over ranks, by name.

    They are named beforehand: a rank without pictures adds nothing, and takes part all the same.
    """

    def __init__(self, device, *names):
        self.of = {name: torch.zeros((), device=device) for name in names}

    def add(self, **numbers):
        for name, number in numbers.items():
            self.of[name] += number

    def __getitem__(self, name):
        """This rank's sum."""
        return self.of[name]

    def over_ranks(self, change=lambda sums: sums):
        """-> {name: the sum over all ranks, after `change`, a function of a tensor}"""
        sums = all_reduce(torch.stack(list(self.of.values())))
        return dict(zip(self.of, change(sums).tolist()))


# ---- the log -------------------------------------------------------------------------------------
class Log:
    """A line a step in out_dir/log.jsonl, and the same numbers in the progress bar; rank 0 only.

    start: the step that the run begins with; the lines of later ones, of a run that went on after its
    last checkpoint, are dropped.
    """

    FLAT_EPOCHS = 20  # after so many without any difference in scores there is a warning

    def __init__(self, args, start, device):
        self.path = f"{args.out_dir}/log.jsonl"
        self.silent = not is_rank_0()
        if self.silent:
            return
        if start > 0 and os.path.exists(self.path):
            self.forget_from(start)
        self.file = open(self.path, "ab" if start > 0 else "wb", buffering=0)
        self.board = wandb_board(args, start) if args.wandb else None
        self.flat_epochs = 0
        self.on_gpu = device.type == "cuda"
        self.laps = []
        self.clock = time.perf_counter()
        self.mark = self.now()

    def forget_from(self, start):
        """Drop the lines that came after the checkpoint."""
        try:
            with open(self.path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            kept = "".join(line for line in lines if json.loads(line)["step"] < start)
        except (ValueError, KeyError, TypeError):
            die(f"{self.path} is damaged; move it away to go on")
        write_atomically({self.path: kept.encode()})

    def now(self):
        """A moment; on a GPU by its own clock, for which nothing has to wait."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self):
        """A step begins: previews and checkpoints of the one before are no part of it."""
        if not self.silent:
            self.mark = self.now()

    def lap(self, part):
        """The time since the last lap, or `begin`, went to this part of the step.

        Parts may come again.
        """
        if not self.silent:
            self.laps.append((part, self.now()))

    def seconds_of_parts(self):
        """{"s_<part>": seconds} of the laps so far; they begin anew."""
        seconds = {}
        before = self.mark
        if self.on_gpu:
            torch.cuda.synchronize()
        for part, moment in self.laps:
            took = before.elapsed_time(moment) / 1000 if self.on_gpu else moment - before
            seconds[f"s_{part}"] = seconds.get(f"s_{part}", 0) + took
            before = moment
        self.laps = []
        return {name: round(took, 4) for name, took in seconds.items()}

    def __call__(self, bar, images, **numbers):
        """Write one step's numbers. images: how many pictures it was, for the speed."""
        if self.silent:
            return
        self.warn_of_flat_groups(numbers)
        line = {}
        for name, value in numbers.items():
            missing = isinstance(value, float) and not math.isfinite(value)  # JSON knows no nan
            line[name] = None if missing else value
        line["skipped"] = sum(v is None for k, v in line.items() if k.startswith("grad_"))
        parts = self.seconds_of_parts()
        now = time.perf_counter()
        line["seconds"] = round(now - self.clock, 4)
        line["images_per_s"] = round(images / (now - self.clock), 2)
        if torch.cuda.is_available():
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.clock = now
        shown = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
        bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
        # what the parts leave of the whole: previews, checkpoints and held-out rewards of the step before
        parts["s_rest"] = round(max(0.0, line["seconds"] - sum(parts.values())), 4)
        line.update(parts)
        try:
            rest = (json.dumps(line) + "\n").encode()
            while rest:  # a disk that has room for half of it takes that half without an error
                rest = rest[self.file.write(rest) :]
        except OSError as e:
            die(
                f"cannot write {self.path} ({e.strerror}); make room: the same command goes on from "
                "the last checkpoint",
                status=1,
            )
        if self.board:
            self.board.log(line, step=line["step"])

    def show(self, picture, step):
        """Hand a picture file to Weights & Biases, too."""
        if not self.silent and self.board:
            import wandb

            self.board.log({"samples": wandb.Image(picture)}, step=step)

    def warn_of_flat_groups(self, numbers):
        flat = numbers.get("flat_groups") == 1
        self.flat_epochs = self.flat_epochs + 1 if flat else 0
        if self.flat_epochs == self.FLAT_EPOCHS:
            say(
                f"warning: {self.FLAT_EPOCHS} epochs in a row all pictures of a prompt scored the "
                "same: SubGRPO learns nothing",
                sys.stderr,
            )


def wandb_board(args, start):
    """A run of Weights & Biases; dies with what to do where that cannot be.

    Its id lies in out_dir, so that a run that goes on does so there, too.
    """
    path = f"{args.out_dir}/wandb_id"
    if start == 0 or not os.path.exists(path):
        write_atomically({path: uuid.uuid4().hex[:8].encode()})
    with open(path) as file:
        run_id = file.read()
    try:
        import wandb

        return wandb.init(
            project=args.wandb,
            id=run_id,
            resume="allow",
            name=os.path.basename(args.out_dir),
            dir=args.out_dir,
            config=vars(args),
        )
    except Exception as e:  # not installed, not logged in, no network
        die(
            f"--wandb {args.wandb}: {first_line(e)}; pip install wandb, wandb login, or leave it out: "
            "log.jsonl has the same numbers"
        )


# ---- files ---------------------------------------------------------------------------------------
def sync(path):
    """Flush a file, or a directory's list of names, to disk."""
    mode = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR  # Windows flushes no read-only ones
    descriptor = os.open(path, mode)
    os.fsync(descriptor)
    os.close(descriptor)


def reserve(path, n_bytes):
    """Make a file of this size, or keep one that is there; raises OSError where the disk has no room."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "rb+") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            return
        file.seek(0, os.SEEK_END)  # macOS and Windows: what is written has its room
        missing = n_bytes - file.tell()
        while missing > 0:
            missing -= file.write(bytes(min(missing, 2**24)))


def as_bytes(save, *inputs, **options):
    """What save(*inputs, file, **options) writes.

    In memory first: on a full disk torch.save fails in a way that cannot be caught.
    """
    buffer = io.BytesIO()
    save(*inputs, buffer, **options)
    return buffer.getbuffer()


def write_atomically(files):
    """files {path: bytes}: all are on disk under a temporary name before the first is renamed.

    A kill leaves old files or new ones, never half of one; a full disk leaves the old ones, and
    ends the program with one line, as a directory in a file's place does. What was ckpt.pt becomes
    ckpt.prev.pt.
    """
    for path in files:
        for name in (path, path + ".tmp"):
            if os.path.isdir(name):
                die(f"cannot write {name}: a directory of that name is there; move it away")
    try:
        for path, content in files.items():
            with open(path + ".tmp", "wb") as file:
                file.write(content)
            sync(path + ".tmp")
    except OSError as e:
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(name + ".tmp")
        die(
            f"cannot write {path} ({e.strerror}); make room: what was saved before is intact, "
            "and the same command goes on from there",
            status=1,
        )
    for path in files:
        if path.endswith("/ckpt.pt") and os.path.exists(path):
            os.replace(path, path[:-3] + ".prev.pt")
        os.replace(path + ".tmp", path)
    with contextlib.suppress(OSError):  # some network file systems cannot
        sync(os.path.dirname(path) or ".")
