"""What is on disk: adapter files, in every layout that a user may have, and the checkpoints of a run.

`find_weights` turns what a user names (a run, a release's checkpoint-N, an export, a peft
directory, a file, a hub repository) into the path of one file; `read_adapter` turns that file into
an `AdapterFile`. Nothing here knows the model: lora.load_adapter puts an `AdapterFile` into a
transformer.

The published format is a flat state dict with keys as peft names them on the bare transformer, such
as `transformer_blocks.0.attn.to_q.lora_A.default.weight`. It says neither rank (the shapes do) nor
alpha.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
import torch.distributed as dist

from common import (
    all_reduce,
    as_bytes,
    die,
    first_line,
    flags_given,
    in_range,
    is_rank_0,
    listen_to_signals,
    note,
    say,
    stop,
    sync,
    write_atomically,
)
from hub import files_on_hub, in_words, is_hub_id

# File names in the order in which they are preferred. {stage}.safetensors is of an export of ours,
# and comes before the folder {stage}/ of the same export because it needs no alpha. generator.pt is
# the release's generator before averaging: better than nothing, and said.
GENERATOR_NAMES = (
    "generator_ema.pt",
    "generator_ema.safetensors",
    "{stage}.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "generator.pt",
    "generator.safetensors",
)
FAKE_NAMES = ("fake.pt", "fake_score_net.pt", "fake.safetensors", "fake_score_net.safetensors")
ROLE_NAMES = {"generator": GENERATOR_NAMES, "fake": FAKE_NAMES}
CONFIG_NAME = "adapter_config.json"
SETTINGS_NAME = "settings.json"
BESIDE = (CONFIG_NAME, SETTINGS_NAME)  # what says how weights are used

# What DDP, torch.compile, peft's own model class and diffusers' pipelines put before a module's
# name.
PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "transformer.")
ADAPTER_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")
KEPT_GENERATOR = re.compile(r"generator_ema_(\d+)\.pt")  # of --keep_every


# ---- find: from what the user names to one file -------------------------------------------------
def find_weights(where, stage, role="generator", must=True, quiet=False):
    """Path of the adapter file that `where` means.

    where: a file, a directory in one of the known layouts, or a hub repository owner/name. stage:
    "cold_start" or "rtdmd". role: "generator", or "fake", which is looked for beside the generator
    alone and, for a kept generator_ema_N.pt, under the same N, so that the two are of one moment.
    quiet: without the notes, where they were printed before. Returns None, or with `must` dies with
    one line, where there is none.
    """
    place = where
    if not os.path.exists(where) and is_hub_id(where):
        place = download(where, (stage,), quiet)
    path = place if os.path.isfile(place) else search(place, stage, quiet)
    if path is not None:
        refuse_mixed(os.path.dirname(path))
        if role == "fake":
            kept = KEPT_GENERATOR.fullmatch(os.path.basename(path))
            names = (f"fake_{kept[1]}.pt",) if kept else FAKE_NAMES
            path = first_file(os.path.dirname(path), names)
        elif os.path.splitext(os.path.basename(path))[0] == "generator" and not quiet:
            note(f"{path} is taken, which is the generator before averaging")
    if path is not None:
        refuse_other_stage(path, stage)
    elif must:
        die(f"{where or repr(where)}: {what_is_there(place)}; {what_was_sought(stage, role)}")
    return path


def search(place, stage, quiet):
    """The generator's file in a directory, its {stage}/ or its last checkpoint-N, or None."""
    if not os.path.isdir(place):
        return None
    names = [name.format(stage=stage) for name in GENERATOR_NAMES]
    for folder in (place, os.path.join(place, stage)):
        path = first_file(folder, names)
        if path is not None:
            return path
    for folder in (place, os.path.join(place, stage)):
        checkpoints = checkpoint_folders(folder)
        if checkpoints:
            # The largest N whatever it holds: an older one in its place would go unnoticed.
            if len(checkpoints) > 1 and not quiet:
                last = os.path.basename(checkpoints[-1])
                note(f"{folder}: {last} is taken, the last of {len(checkpoints)}")
            return first_file(checkpoints[-1], names)
    return None


def first_file(folder, names):
    """Path of the first of these names that is a file in the folder, or None."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    return None


def checkpoint_folders(folder):
    """Paths of the folders checkpoint-N in a folder, by N."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if CHECKPOINT_FOLDER.fullmatch(name)]
    names.sort(key=lambda name: int(name.rpartition("-")[2]))
    return [os.path.join(folder, name) for name in names]


def refuse_mixed(folder):
    """Die where a kill came between the two renames of `Run.save`: files of two steps."""
    fake_waits = os.path.exists(os.path.join(folder, "fake.pt.tmp"))
    generator_waits = os.path.exists(os.path.join(folder, "generator_ema.pt.tmp"))
    if fake_waits and not generator_waits:
        die(
            f"{folder}: killed between renaming its two files, which are now of different steps; "
            "the command of that run goes on from its checkpoint"
        )


def refuse_other_stage(path, stage):
    """Die where settings.json says that these weights are of the other stage."""
    program = settings_of(path).get("program")
    other = {"cold_start": "rtdmd_rl.py", "rtdmd": "cold_start.py"}[stage]
    if program == other:
        flag = "--rtdmd" if stage == "cold_start" else "--cold_start"
        die(f"{path} was trained by {program}: it goes with {flag}, not with --{stage}")


def what_is_there(place):
    """What a place holds, for the message that it does not hold what was looked for."""
    if not os.path.exists(place):
        return "no such file or directory"
    return "holds " + few_of(sorted(os.listdir(place)))


def few_of(names, most=8):
    """The first few of many names as one string."""
    if not names:
        return "nothing"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def what_was_sought(stage, role="generator"):
    """What was looked for, and what a user can do."""
    names = ", ".join(name.format(stage=stage) for name in ROLE_NAMES[role])
    number = {"cold_start": 1, "rtdmd": 2}[stage]
    return (
        f"looked for {names}, there and in {stage}/ and checkpoint-N/. Run stage {number} first, "
        "or name a directory, an adapter file or a hub repository (sample.py: '' leaves it out)"
    )


def download(where, stages, quiet=False):
    """The local folder with a hub repository's adapter files of these stages.

    Offline it is the hub's cache. A download is announced, and only what `find_weights` could take
    is fetched. Dies with one line where there is no such repository, no permission, no network and
    nothing cached, or nothing to take.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    try:
        names = files_on_hub(where)
        if names is None:
            return snapshot_download(where, local_files_only=True)
        allowed = {name for stage in stages for name in takeable(names, stage)}
        wanted = [name for name in names if name in allowed]
        if not any(name.endswith((".pt", ".safetensors", ".bin")) for name in wanted):
            die(f"{where}, a hub repository, holds {few_of(names)}; {what_was_sought(stages[0])}")
        new = [name for name in wanted if not isinstance(try_to_load_from_cache(where, name), str)]
        if new and not quiet:
            note(f"downloading {few_of(new)} from huggingface.co/{where}")
        return snapshot_download(where, allow_patterns=wanted)
    except Exception as e:
        die(f"{where}: nothing of that name on this machine; {in_words(e, where)}")


def takeable(names, stage):
    """The files of a repository that `find_weights` may look at: of checkpoint-N the last alone."""
    known = {name.format(stage=stage) for name in (*GENERATOR_NAMES, *FAKE_NAMES, *BESIDE)}
    folders = ["", f"{stage}/"]
    for folder in list(folders):
        inside = [name[len(folder) :].split("/")[0] for name in names if name.startswith(folder)]
        numbers = [int(m[1]) for m in map(CHECKPOINT_FOLDER.fullmatch, inside) if m]
        if numbers:
            folders.append(f"{folder}checkpoint-{max(numbers)}/")
    allowed = {folder + name for folder in folders for name in known}
    return [name for name in names if name in allowed]


# ---- read: from a file to matrices ---------------------------------------------------------------
@dataclass(frozen=True)
class Alpha:
    """What the products B A are scaled by, alpha / rank, and who says so."""

    value: float | None  # None: each module's own rank, so that the product counts as it is
    source: str
    of_modules: dict = field(default_factory=dict)  # peft's alpha_pattern: exceptions by module
    rslora: bool = False  # peft's rank-stabilised variant divides by the root of the rank

    def of(self, module, rank):
        """The alpha of one module, such that alpha / rank is the factor, whatever the variant."""
        alpha = pattern_value(self.of_modules, module, rank if self.value is None else self.value)
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def __str__(self):
        text = "the rank" if self.value is None else f"{self.value:g}"
        text += " (rslora)" if self.rslora else ""
        text += " and others for some modules" if self.of_modules else ""
        return text


@dataclass(frozen=True)
class AdapterFile:
    """One LoRA as a file holds it: {module: (A [rank, in], B [out, rank])} in the file's dtype."""

    path: str
    weights: dict
    alpha: Alpha | None  # None: neither the file nor anything beside it says it

    @property
    def ranks(self):
        """{module: rank}"""
        return {module: len(A) for module, (A, _) in self.weights.items()}

    @property
    def usual_rank(self):
        """The rank of most of its modules."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    def published(self):
        """The tensors under the keys of the published format."""
        tensors = {}
        for module, (A, B) in self.weights.items():
            tensors[f"{module}.lora_A.default.weight"] = A
            tensors[f"{module}.lora_B.default.weight"] = B
        return tensors


DIRECTORY = 0x10  # among an entry's attributes in a zip archive


def read(path, what, hint=""):
    """torch.load of tensors and plain values alone, with the checksums verified, as it does not.

    Dies with one line, to which `hint` is added, where the file is missing, damaged or foreign.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
                # torch reads nothing of an entry that is marked so, and leaves its tensor to chance
                if any(entry.external_attr & DIRECTORY for entry in archive.infolist()):
                    raise ValueError("an entry is marked as a directory")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{what} {path}: no such file")
    except Exception as e:  # torch raises a dozen different ones for a damaged or foreign file
        die(f"{what} {path}: damaged, or not a file of tensors ({first_line(e)}){hint}")


def read_tensors(path):
    """What an adapter file holds -> (its content, its metadata: {} but for .safetensors)."""
    if not path.endswith(".safetensors"):
        return read(path, "adapter"), {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            return tensors, file.metadata() or {}
    except Exception as e:  # foreign, cut short, missing
        die(f"adapter {path}: damaged, or not a file of tensors ({first_line(e)})")


def read_adapter(path):
    """An adapter file of any of the known kinds -> AdapterFile.

    Dies with one line that names what is wrong: a key that is no LoRA matrix, two adapters in one
    file, A without B, shapes that disagree, numbers that are not finite.
    """
    content, metadata = read_tensors(path)
    if not isinstance(content, dict) or not any(".lora_" in str(key) for key in content):
        example = "transformer_blocks.0.attn.to_q.lora_A.weight"
        die(f"{path}: holds no adapter: not one key is like {example}")
    sides = {"A": {}, "B": {}}
    seen_adapters = set()
    in_diffusers_format = True
    for key, tensor in content.items():
        match = ADAPTER_KEY.fullmatch(str(key))
        if match is None or not torch.is_tensor(tensor) or not tensor.is_floating_point():
            die(f"{path}: {key} is no LoRA matrix (lora_A or lora_B); nothing of the file is taken")
        side, adapter = match["side"], match["adapter"]
        module, foreign_prefix = bare_name(match["module"])
        if module in sides[side]:
            names = " and ".join(sorted(str(name) for name in {*seen_adapters, adapter}))
            die(f"{path}: holds lora_{side} of {module} twice (adapters: {names}); keep one")
        sides[side][module] = tensor
        seen_adapters.add(adapter)
        in_diffusers_format &= foreign_prefix.endswith("transformer.") and adapter is None
    weights = paired(path, sides["A"], sides["B"])
    return AdapterFile(path, weights, alpha_of(path, weights, metadata, in_diffusers_format))


def bare_name(module):
    """A module's name without what wrappers put before it -> (name, what was cut off)."""
    name = module
    cut = True
    while cut:
        cut = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                cut = True
    prefix = module[: len(module) - len(name)]
    # torch.compile of single blocks leaves its mark in the middle
    return name.replace("._orig_mod.", "."), prefix


def paired(path, A_of, B_of):
    """{module: (A, B)}; dies where they are not pairs of finite matrices that can be multiplied."""
    for side, has, lacks in (("A", A_of, B_of), ("B", B_of, A_of)):
        for module in has:
            if module not in lacks:
                other = "B" if side == "A" else "A"
                die(f"{path}: {module} has its lora_{side} and no lora_{other}")
    for module, A in A_of.items():
        B = B_of[module]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
            shapes = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
            die(f"{path}: {module}: {shapes} are not [rank, in] and [out, rank]")
        if not (A.float().isfinite().all() and B.float().isfinite().all()):
            die(f"{path}: {module} holds numbers that are not finite; that run went wrong")
    return {module: (A, B_of[module]) for module, A in A_of.items()}


# ---- alpha: what the weights do not say ----------------------------------------------------------
def alpha_of(path, weights, metadata, in_diffusers_format):
    """The alpha that the file or something beside it says, or None.

    In this order: the file's metadata, adapter_config.json beside it, diffusers' own format,
    settings.json and ckpt.pt of the run that made it. A file in diffusers' format without metadata
    means alpha = rank: its writers put alpha into B, as every export of ours does. Dies where what
    says it is damaged or contradicts the file.
    """
    folder = os.path.dirname(path)
    if "lora_adapter_metadata" in metadata:
        config = json_or_die(metadata["lora_adapter_metadata"], f"{path}: its metadata")
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        return alpha_of_config(path, weights, config, "its metadata")
    if "lora_alpha" in metadata:
        config = {"lora_alpha": metadata["lora_alpha"]}
        return alpha_of_config(path, weights, config, "its metadata")
    config_path = os.path.join(folder, CONFIG_NAME)
    if os.path.exists(config_path):
        config = read_json(config_path)
        return alpha_of_config(path, weights, config, config_path)
    if in_diffusers_format:
        return Alpha(None, "diffusers' format, in which alpha is part of B")
    settings = settings_of(path)
    if "lora_alpha" in settings:
        config = {"lora_alpha": settings["lora_alpha"]}
        return alpha_of_config(path, weights, config, os.path.join(folder, SETTINGS_NAME))
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        # A damaged or foreign ckpt.pt is no reason to refuse the weights beside it.
        checkpoint_path = os.path.join(folder, name)
        with contextlib.suppress(Exception):
            # mapped, not read: of hundreds of megabytes one number is wanted
            saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
            return Alpha(float(saved["flags"]["lora_alpha"]), checkpoint_path)
    return None


def read_json(path):
    """The JSON object in a file; dies where it cannot be read or is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as e:
        die(f"{path}: cannot be read ({e.strerror})")
    return json_or_die(text, path)


def json_or_die(text, what):
    """A JSON object; dies where it is none."""
    try:
        content = json.loads(text)
    except ValueError as e:
        die(f"{what} is damaged: {e}")
    if not isinstance(content, dict):
        die(f"{what} is no JSON object")
    return content


def alpha_of_config(path, weights, config, source):
    """Alpha of peft's configuration; dies where that is of another kind of adapter or rank."""
    try:
        alpha = float(config["lora_alpha"])
        patterns = {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
        rank_of = {key: int(value) for key, value in (config.get("rank_pattern") or {}).items()}
        rank = config.get("r")
        for pattern in (*patterns, *rank_of):
            re.compile(pattern)
    except (AttributeError, KeyError, TypeError, ValueError, re.error):
        die(f"{path}: {source} does not say a usable lora_alpha")
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        die(f"{path}: {source} says that this is no plain LoRA")
    for module, (A, _) in weights.items():
        said = pattern_value(rank_of, module, rank)
        if said is not None and said != len(A):
            die(f"{path}: {module} has rank {len(A)}, but {source} says {said}")
    return Alpha(alpha, source, patterns, bool(config.get("use_rslora")))


def pattern_value(patterns, module, default):
    """The value of the first of peft's patterns that matches a module's name, or the default."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def settled_alpha(file, given, assumed):
    """The alpha to use: the user's, else what is said in or beside the file, else `assumed`.

    Says in one line where the user contradicts them, where they differ from what is usual, and
    where nothing is known.
    """
    known = file.alpha
    if given is not None:
        chosen = Alpha(given, "--lora_alpha", rslora=known is not None and known.rslora)
        differs = known is not None and any(
            known.of(module, rank) != chosen.of(module, rank) for module, rank in file.ranks.items()
        )
        if differs:
            note(f"{file.path}: --lora_alpha {given:g} is used, though {known.source} says {known}")
        return chosen
    if known is None:
        note(
            f"{file.path} does not say its alpha, nor does anything beside it: "
            f"{assumed:g} is assumed (--lora_alpha)"
        )
        return Alpha(assumed, "assumed")
    if known.value != assumed or known.rslora or known.of_modules:
        note(f"{file.path}: alpha is {known}, says {known.source}")
    return known


# ---- the settings of a run, which travel with its weights ----------------------------------------
# What has to be known of a run to draw from its weights, to train on, or to share them.
SETTINGS = (
    "pretrained", "generator_pretrained", "resolution", "num_steps", "eta", "cfg", "gamma", "lora_rank",
    "lora_alpha", "variant", "seed", "consistency_share", "reuse_rollouts", "generator_every",
)  # fmt: skip
BASES = ("pretrained", "generator_pretrained")
# Those that are the defaults of whatever uses the weights.
SAMPLING = {
    "pretrained": (str,),
    "generator_pretrained": (str,),
    "resolution": (int, str),
    "num_steps": (int,),
    "eta": (int, float),
    "cfg": (int, float),
}


def write_settings(args, run_id, origin):
    """Put the run's settings beside its weights; rank 0 only.

    run_id: a hash of all that decides the result. Stage 2's settings name that of its stage 1, too.
    origin: what `Run.begin_with` says of the run whose weights it began with, or None.
    """
    if not is_rank_0():
        return
    settings = {"program": os.path.basename(sys.argv[0]), "run_id": run_id}
    settings["command"] = shlex.join(sys.argv)
    if origin:
        settings["started_from"] = origin
    if hasattr(args, "cold_start"):
        stage_1 = find_weights(args.cold_start, "cold_start", must=False, quiet=True)
        settings["cold_start_id"] = settings_of(stage_1).get("run_id") if stage_1 else None
    for name in SETTINGS:
        if hasattr(args, name):  # the last two are stage 1's alone
            settings[name] = getattr(args, name)
    for name in BASES:
        if os.path.isdir(settings[name]):  # found again from any directory, and never on the hub
            settings[name] = os.path.abspath(settings[name])
    content = json.dumps(settings, indent=1) + "\n"
    write_atomically({os.path.join(args.out_dir, SETTINGS_NAME): content.encode()})


def settings_of(path):
    """The settings that lie beside a file of weights; {} where none do, dies where they are damaged."""
    settings_path = os.path.join(os.path.dirname(path), SETTINGS_NAME)
    if not os.path.exists(settings_path):
        return {}
    return read_json(settings_path)


def check_pair(cold_start, rtdmd):
    """Die where stage 2's weights were trained on another stage 1 than these, as far as settings say."""
    wanted = settings_of(rtdmd).get("cold_start_id")
    found = settings_of(cold_start).get("run_id")
    if None not in (wanted, found) and wanted != found:
        die(
            f"{rtdmd} was trained on another stage 1 than {cold_start}: give both, --cold_start and "
            "--rtdmd, of one training ('' leaves stage 2 out)"
        )


def take_settings(args, path, names=SAMPLING, called=None):
    """Let the settings beside a file of weights be the defaults of args.

    A flag on the command line wins, and a note says so where it contradicts them. called: {setting: the
    attribute of args that it goes to}, where that has another name. A base model that is a directory
    of another machine is left out.
    """
    settings = settings_of(path)
    for name in names:
        value = settings.get(name)
        if name == "generator_pretrained" and settings:
            value = generators_own(args, path, settings)
        if value is None:
            continue
        if not may_be(name, value):
            die(f"{path}: {SETTINGS_NAME} beside it says {name} {value!r}, which cannot be")
        if name in BASES and os.path.isabs(value) and not os.path.isdir(value):
            if name not in flags_given():
                note(
                    f"{path} was made with the base model {value}, which is not here: "
                    f"{getattr(args, name) or args.pretrained} is used (--{name})"
                )
            continue
        attribute = (called or {}).get(name, name)
        if attribute not in flags_given():
            setattr(args, attribute, value)
        elif getattr(args, attribute) != value:
            given = getattr(args, attribute)
            note(f"--{attribute} {given} is used, though {path} was made with {name} {value}")


def generators_own(args, path, settings):
    """The generator's own base model; "" where all roles share one, None where it has no name.

    The second says so, unless a flag or a preset names it.
    """
    value = settings.get("generator_pretrained", "")  # a run of before there was such a thing: ""
    if value is None and not args.generator_pretrained:  # an export names no directory of its maker
        note(
            f"{path} was made on a base model of the generator's own, which it does not name: "
            "--generator_pretrained does"
        )
    return value


def may_be(name, value):
    """Whether a setting has a type and a range that it may have."""
    if name == "resolution" and isinstance(value, str):
        return re.fullmatch(r"[1-9]\d*x[1-9]\d*", value) is not None
    return type(value) in SAMPLING[name] and in_range(name, value)


# ---- the checkpoints of a run --------------------------------------------------------------------
SAVE_MINUTES = 20  # without a checkpoint
# Flags that may change when a run goes on: the result is the same, but for its length. Of paths it is
# the content that counts, see `content_of`.
FREE = {
    "out_dir", "device", "micro_batch", "steps", "epochs", "cache_text", "preset", "paper",
    *BASES, "cold_start", "prompts", "reward_path", "sample_every", "save_every",
    "keep_every", "start_from", "eval_rewards", "eval_every", "eval_prompts", "compile", "graphs", "wandb",
    "low_memory",
}  # fmt: skip


class Run:
    """The checkpoints of a run in out_dir: where it begins, and saving it.

    state {name: flat tensor of weights, or optimiser; "shapes": {key in the published format: shape of
    its part of the weights}} is all that has to be saved: random numbers and the order of prompts are
    functions of (seed, step). reward_files: of the rewards that are trained on, as from `files_of`.

    A checkpoint that is there is put into state, and `start` is the step to go on with. Dies if it is
    damaged, or of another program, model, prompts or flags; and in any case if the disk has no room.
    """

    def __init__(self, args, state, rows, transformers, reward_files=None):
        self.args = args
        self.state = state
        self.saved_at = time.time()
        paths = []
        for name in ("ckpt.pt", "ckpt.prev.pt"):
            if os.path.exists(f"{args.out_dir}/{name}"):
                paths.append(f"{args.out_dir}/{name}")
        if not paths:
            check_nothing_is_lost(args.out_dir)
        check_room(args.out_dir, state, len(paths))
        self.content = content_of(rows, transformers)
        if reward_files is not None:
            self.content["reward_path content"] = hashed(reward_files)
        device = transformers[0].device
        self.made_with = made_with(device)
        agree_on_a_checkpoint(args.out_dir, bool(paths), device)
        self.start = self.load(paths) if paths else 0
        if self.start == 0:
            origin = self.begin_with(args.start_from) if args.start_from else None
            identity = decisive(self.flags())
            if origin:
                identity["start_from"] = [origin["run_id"], origin["step"]]
            write_settings(args, hashed(identity), origin)
        listen_to_signals()

    def flags(self):
        """What must be the same when the run goes on: flags, and hashes of what they name."""
        return {**vars(self.args), **self.content}

    def load(self, paths):
        """Put the first of the checkpoints into state -> the step to go on with."""
        hint = f"; delete {paths[0]} to go on from the one before it" if paths[1:] else ""
        saved = self.read_own(paths[0], hint)
        changed = self.changes(saved["flags"])
        if changed:
            die(
                f"{paths[0]} was made with other flags ({', '.join(changed)}): repeat them, or choose "
                f"another --out_dir; --start_from {self.args.out_dir} begins that one with these weights, "
                "if model, rank and alpha are the same"
            )
        for name, thing in self.state.items():
            if hasattr(thing, "load_state_dict"):
                thing.load_state_dict(saved[name])
            elif name != "shapes":
                thing.data.copy_(joined(saved[name]))
        say_what_changed(paths[0], saved["step"], saved["made_with"], self.made_with)
        return saved["step"]

    def read_own(self, path, hint=""):
        """The content of a checkpoint; dies where it is of another program or version."""
        saved = read(path, "checkpoint", hint)
        flags = saved.get("flags") if isinstance(saved, dict) and "step" in saved else None
        if not isinstance(flags, dict) or set(flags) - FREE != set(self.flags()) - FREE:
            die(f"{path} is not a checkpoint of this program, or of another version of it{hint}")
        return saved

    def changes(self, flags):
        """["--name old -> new"] of all that decides the result and differs from a checkpoint's flags."""
        changed = []
        for name, value in decisive(self.flags()).items():
            if flags[name] != value:
                changed.append(f"--{name} {flags[name]} -> {value}")
        return changed

    def begin_with(self, folder):
        """Put the weights of another run's checkpoint into state, and nothing else of it.

        The optimisers begin anew, and so do the steps. -> what is known of that run. Dies where it is
        of another program, model, stage 1, rank or alpha.
        """
        path = os.path.join(folder, "ckpt.pt")
        saved = self.read_own(path)
        flags = saved["flags"]
        for name in ("lora_rank", "lora_alpha", "pretrained or cold_start content"):
            if flags[name] != self.flags()[name]:
                die(f"--start_from {folder}: its {name} is {flags[name]}, not {self.flags()[name]}")
        for name in ("generator", "fake", "ema"):
            self.state[name].data.copy_(joined(saved[name]))
        changed = self.changes(flags)
        note(
            f"begins with the weights of {folder} after {saved['step']} steps; "
            f"other flags than there: {', '.join(changed) or 'none'}"
        )
        its = settings_of(path)
        known = {name: its.get(name) for name in ("command", "run_id")}
        return {**known, "step": saved["step"], "changed": changed}

    def save_or_stop(self, step, last):
        """Save if it is time to. After a signal also say how to go on, and exit with status 0.

        The signals are SIGTERM, SIGINT and SIGHUP; all ranks stop at the same step.
        """
        stopping = stop["agreed"] and step < last
        overdue = time.time() - self.saved_at > 60 * SAVE_MINUTES
        kept = self.is_kept(step)
        if step % self.args.save_every == 0 or step == last or kept or stopping or overdue:
            self.save(step)
            self.saved_at = time.time()
        if stopping:
            if is_rank_0():
                say(
                    f"stopped by a signal and saved after {step} of {last}; the same command goes on"
                )
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.exit(0)

    def is_kept(self, step):
        """Whether the files of this step stay, as --keep_every asks."""
        return self.args.keep_every > 0 and step % self.args.keep_every == 0

    def matrices(self, weights):
        """A flat tensor of weights -> a list of its matrices, on the CPU, each with its own memory."""
        shapes = self.state["shapes"].values()
        parts = weights.detach().cpu().split([math.prod(shape) for shape in shapes])
        return [part.view(shape).clone() for part, shape in zip(parts, shapes)]

    def save(self, step):
        """Write generator_ema.pt and fake.pt (flat, published format) and ckpt.pt; rank 0 only.

        Where they are kept, the two stay as generator_ema_<step>.pt and fake_<step>.pt, too.
        """
        if not is_rank_0():
            return
        out_dir = self.args.out_dir
        content = {}
        for name, thing in self.state.items():
            if hasattr(thing, "state_dict"):
                content[name] = thing.state_dict()
            elif name != "shapes":
                content[name] = self.matrices(thing)
        keys = list(self.state["shapes"])
        files = {
            "generator_ema.pt": dict(zip(keys, content["ema"])),
            "fake.pt": dict(zip(keys, content["fake"])),
            "ckpt.pt": {
                **content, "step": step, "flags": self.flags(), "made_with": self.made_with,
            },
        }  # fmt: skip
        if self.is_kept(step):
            files[f"generator_ema_{step}.pt"] = files["generator_ema.pt"]
            files[f"fake_{step}.pt"] = files["fake.pt"]
        if os.path.exists(f"{out_dir}/log.jsonl"):
            sync(f"{out_dir}/log.jsonl")  # it must not be behind the checkpoint
        written = {}
        for name, thing in files.items():
            written[f"{out_dir}/{name}"] = as_bytes(torch.save, thing)
        write_atomically(written)


def decisive(flags):
    """Those of a run's flags that decide its result; --steps too, where rates fall to 0 by the end."""
    free = FREE - {"steps"} if flags.get("anneal") else FREE
    return {name: value for name, value in flags.items() if name not in free}


def joined(matrices):
    """A list of matrices -> one flat tensor of all."""
    return torch.cat([matrix.flatten() for matrix in matrices])


def check_nothing_is_lost(out_dir):
    """Die where a new run would replace weights: of an export, or of a run whose checkpoint is gone.

    And where it could not write: a directory has the name of one of its files.
    """
    names = os.listdir(out_dir)
    for name in ("log.jsonl", "generator_ema.pt", "fake.pt", "ckpt.pt", SETTINGS_NAME):
        if os.path.isdir(os.path.join(out_dir, name)):
            die(f"--out_dir {out_dir}: {name} is a directory there; move it away")
    weights = [name for name in names if name.endswith((".safetensors", "generator_ema.pt"))]
    # Of a run that was stopped while it first saved there is ckpt.pt.tmp.
    begun = any(name.startswith("ckpt") for name in names)
    if weights and not begun:
        die(
            f"--out_dir {out_dir} holds {weights[0]} and no ckpt.pt to go on from: choose another, "
            "or move it away"
        )


def check_room(out_dir, state, checkpoints):
    """Die where the disk has no room for what will be saved. checkpoints: how many are there."""
    # 3 lists of weights and 4 of moments in ckpt.pt, 2 beside it: 9 in all, under temporary names
    # and once more for ckpt.prev.pt
    lists = (3 - checkpoints) * 9
    need = lists * 4 * state["generator"].numel()
    room = shutil.disk_usage(out_dir).free
    if room < need:
        die(
            f"--out_dir {out_dir} has {room / 1e9:.2f} GB free, the checkpoints need "
            f"{need / 1e9:.2f}"
        )


def content_of(rows, transformers):
    """{what: hash} of the frozen weights and the prompts: what the flags do not show."""
    frozen = []
    for transformer in transformers:
        frozen += frozen_content(transformer)
    return {"pretrained or cold_start content": hashed(frozen), "prompts content": hashed(rows)}


def frozen_content(transformer):
    """[(name, numbers)] of all that is not trained: the first 64 of each, as bf16 rounds them."""
    found = []
    for name, p in transformer.named_parameters():
        if not p.requires_grad:
            found.append((name, p.flatten()[:64].bfloat16().tolist()))
    return found


def hashed(content):
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def hash_of_file(path):
    """A short hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)
    return digest.hexdigest()[:12]


def files_of(reward_paths):
    """[reward, [[file, bytes], ...]] of each NAME=PATH: a moved model is the same one."""
    found = []
    for pair in reward_paths:
        name, _, path = pair.partition("=")
        sizes = []
        for folder, _, names in os.walk(path):
            for file in names:
                full = os.path.join(folder, file)
                sizes.append([os.path.relpath(full, path), os.path.getsize(full)])
        if os.path.isfile(path):
            sizes.append(["", os.path.getsize(path)])
        found.append([name, sorted(sizes)])
    return found


def made_with(device):
    """{package or machine: version or kind}, to say what has changed when a run goes on."""
    versions = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return {**versions, "device": device.type, "processes": processes}


def agree_on_a_checkpoint(out_dir, found, device):
    """Die where some processes see a checkpoint and some do not."""
    least, most = (
        all_reduce(torch.tensor(float(found), device=device), op).item()
        for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)
    )
    if least != most:
        die(
            f"some processes see a checkpoint in --out_dir {out_dir} and some do not: it must lie "
            "on a file system that all machines share"
        )


def say_what_changed(path, step, before, now):
    """One line on stdout: where the run goes on, and which versions and machines differ."""
    if not is_rank_0():
        return
    changed = []
    for name, value in now.items():
        if before.get(name) != value:
            changed.append(f"{name} {before.get(name)} -> {value}")
    line = f"going on from {path}, step {step}"
    if changed:
        line += f"; changed since ({', '.join(changed)}): the same results up to rounding"
    if before.get("device") != now["device"]:
        line += ", but for the random numbers, which are each device's own"
    say(line)
