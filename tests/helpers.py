"""What several test files need: command lines, their flags and files, small adapters.

Most runs call a program's `main()` in this process: importing torch and diffusers takes longer than
the run. Some are real command lines. The two are compared to the byte often enough that the
difference cannot hide anything.
"""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel

import cold_start
import common
import cps
import rtdmd_rl
import sample
from backbones import StableDiffusion3
from model import BaseModel

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets/tiny"
CPU = torch.device("cpu")
README = (ROOT / "README.md").read_text()

# ---- command lines -------------------------------------------------------------------------------
BASE = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0]
COLD = [*BASE, "--steps", 4, "--batch_size", 5, "--micro_batch", 3, "--generator_every", 2]
# 10 pictures = 5 + 5 = 3 + 3 + 4: groups are split.
RL = [*BASE, "--epochs", 2, "--prompts_per_epoch", 5, "--group_size", 2, "--micro_batch", 3]
ONE_BATCH = ["--micro_batch", 10]  # one call of a loss an update

ADAPTERS = ("generator_ema.pt", "fake.pt")

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a test of a GPU: ON_A_GPU=1 asks for it"
)


def flags_of(module, *flags):
    """What a command line means, as a dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main", *flags])
        return vars(module.arguments())


def shell(program, *flags, processes=1):
    """A real command line -> (exit status, stdout, stderr)

    With processes > 1 it runs under torchrun.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = [
        Path(sys.executable).with_name("torchrun"),
        f"--nproc_per_node={processes}",
        f"--master_port={port}",
    ]
    name = program.__name__
    script = ["-m", name] if name.startswith("tools.") else [f"{name}.py"]
    start = torchrun if processes > 1 else [sys.executable]
    command = [str(word) for word in (*start, *script, *flags)]
    environment = dict(os.environ)
    environment.pop("TRANSFORMERS_VERBOSITY", None)  # of tools/__init__.py, in this process
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def unswapped():
    """What --variant puts into the modules is taken out again."""
    modules = [vars(module) for module in (cps, cold_start, rtdmd_rl)]
    before = [dict(names) for names in modules]
    try:
        yield
    finally:
        for names, old in zip(modules, before):
            names.update(old)


def here(program, *flags, **replace):
    """The same command line in this process -> (exit status, stdout, stderr)

    replace: names of the program's module, and what to put there.
    """
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    script = program.__name__.removeprefix("tools.") + ".py"
    words = [script, *map(str, flags)]
    with (
        unswapped(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", words)
        for name, value in replace.items():
            patch.setattr(program, name, value)
        try:
            program.main()
        except SystemExit as e:
            status = e.code
        finally:
            common.unlock()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def good(result):
    """What `here` or `shell` returned has exit status 0."""
    assert result[0] == 0, result


def stage_of(run, stage):
    """-> (program, its flags, the flag of its length, a length)"""
    if stage == "cold":
        return cold_start, COLD, "--steps", 2
    return rtdmd_rl, [*RL, "--cold_start", run.cold], "--epochs", 1


def wait_for(path):
    """Until another process has made it."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


# ---- what a run leaves ---------------------------------------------------------------------------
def lines_of(out_dir):
    """log.jsonl as a list of dicts."""
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def log_of(out_dir, *without):
    """The same, less the numbers that measure time or memory."""
    measured = {"seconds", "images_per_s", "peak_gib", *without}
    lines = []
    for line in lines_of(out_dir):
        kept = {}
        for name, value in line.items():
            if name not in measured and not name.startswith("s_"):
                kept[name] = value
        lines.append(kept)
    return lines


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(tensors):
    """All numbers of tensors, or of a dict's, in one tensor."""
    if isinstance(tensors, dict):
        tensors = tensors.values()
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def same_files(one, two, names=ADAPTERS):
    """Whether the files of these names are equal to the byte in two folders."""
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def listing(folder):
    """{path: content} of all files below a folder"""
    if not folder.is_dir():
        return {}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


# ---- small models and adapters -------------------------------------------------------------------
def tiny_args(**more):
    """The flags of the tiny preset; `more` replaces some or adds to them."""
    flags = {
        **cold_start.PRESETS["tiny"],
        "lora_rank": 32,
        "lora_alpha": 64,
        "seed": 0,
        **more,
    }
    return SimpleNamespace(**flags)


def tiny_base(pretrained=TINY, resolution=32, **more):
    """The tiny base model on the CPU."""
    return BaseModel(str(pretrained), CPU, resolution, **more)


def small_transformer(layers, dual_layers=(), qk_norm="rms_norm"):
    """A bare transformer of SD3.5's kind; the blocks of dual_layers have a second attention.

    qk_norm: None in Stable Diffusion 3 Medium.
    """
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=dual_layers,
        qk_norm=qk_norm,
    )


def backbone_of(transformer):
    """A bare transformer of Stable Diffusion 3 as `model.play` takes it."""
    backbone = object.__new__(StableDiffusion3)
    backbone.pipe = SimpleNamespace(transformer=transformer)
    return backbone


def watch_text(monkeypatch):
    """-> a list that gets the prompts of each pass of Stable Diffusion 3's text encoders."""
    read = []
    plain = StableDiffusion3.text

    def noted(backbone, prompts):
        read.append(list(prompts))
        return plain(backbone, prompts)

    monkeypatch.setattr(StableDiffusion3, "text", noted)
    return read


def watch_attention(monkeypatch):
    """-> {layout of q, k and v: layouts of the output's gradient}

    The backward passes that follow fill it in.
    """
    layouts = {}
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        output = attention(query, key, value, *args, **options)
        if output.requires_grad:
            inputs = (query, key, value)
            layout = tuple((x.shape, x.stride()) for x in inputs)
            seen = layouts.setdefault(layout, set())

            def note_layout(gradient):
                seen.add(gradient.stride())

            output.register_hook(note_layout)
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return layouts


def load_both(base, cold, rl, lora_alpha=None):
    """Stack what --cold_start and --rtdmd name on the base -> names of the adapters

    '' leaves one out.
    """
    args = SimpleNamespace(cold_start=str(cold), rtdmd=str(rl), teacher=False)
    return sample.load_generator(base, sample.generator_files(args), lora_alpha)


def randomise(matrices, rng, device=CPU):
    """Give an adapter random A and B, so that it visibly does something."""
    for p in matrices.values():
        values = torch.randn(p.shape, generator=rng) * 0.05
        p.data = values.to(device)


def random_adapter(path, seed, rank=32, pretrained=TINY):
    """A file in the published format with random A and B -> its content"""
    base = tiny_base(pretrained)
    rng = torch.Generator().manual_seed(seed)
    base.add_adapter("x", rank, 64, 0)
    matrices = base.adapter("x")
    randomise(matrices, rng)
    weights = {key: matrix.detach() for key, matrix in matrices.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


# ---- the rest ------------------------------------------------------------------------------------
def flip(path, place, bit=0):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


class Code:
    """A pickle that runs code when it is loaded: it creates the file `proof`."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return open, (self.proof, "w")


def want(name="cat", count=1, **more):
    """What GenEval's metadata say of one kind of object."""
    return {"class": name, "count": count, **more}
