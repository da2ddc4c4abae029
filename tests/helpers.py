"""What several test files need: command lines, their flags and files, small adapters.

Most runs call a program's `main()` in this process (importing torch and diffusers takes longer than the run); enough of
them are real command lines, and the two are compared to the byte, that the difference cannot hide anything.
"""

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cold_start
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

BASE = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0]

COLD = [*BASE, "--steps", 4, "--batch_size", 5, "--micro_batch", 3, "--generator_every", 2]

RL = [
    *BASE,
    "--epochs",
    2,
    "--prompts_per_epoch",
    5,
    "--group_size",
    2,
    "--micro_batch",
    3,
]  # 10 = 5 + 5 = 3 + 3 + 4: split groups

ADAPTERS = ("generator_ema.pt", "fake.pt")


def flags_of(module, *flags):
    """What a command line means, as a dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main", *flags])
        return vars(module.arguments())


# ------------------------------------------------------------------------------------------------------------------ helpers
def shell(program, *flags, processes=1):
    """A real command line -> (exit status, stdout, stderr); with processes > 1 under torchrun."""
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
    command = map(str, [*start, *script, *flags])
    done = subprocess.run(list(command), cwd=ROOT, capture_output=True, text=True, timeout=120)
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
    """The same command line in this process -> (exit status, stdout, stderr). replace: names of the program's module to replace."""
    out, err, status, handlers = (
        io.StringIO(),
        io.StringIO(),
        0,
        {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)},
    )
    with (
        unswapped(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(
            sys, "argv", [program.__name__.removeprefix("tools.") + ".py", *map(str, flags)]
        )
        for name, value in replace.items():
            patch.setattr(program, name, value)
        try:
            program.main()
        except SystemExit as e:
            status = e.code
        finally:
            [signal.signal(*handler) for handler in handlers.items()]
    return status, out.getvalue(), err.getvalue()


def good(result):
    assert result[0] == 0, result


def log_of(out_dir, *without):
    """log.jsonl as a list of dicts, less the numbers that measure time."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if k not in ("seconds", "images_per_s", "peak_gib", *without) and not k.startswith("s_")
        }
        for line in lines
    ]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def flat(tensors):
    return torch.cat(
        [t.detach().flatten() for t in (tensors.values() if isinstance(tensors, dict) else tensors)]
    )


def same_files(one, two, names=ADAPTERS):
    return all((one / f).read_bytes() == (two / f).read_bytes() for f in names)


def listing(folder):
    return (
        {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if folder.is_dir()
        else {}
    )


def stage_of(run, stage):
    return (
        (cold_start, COLD, "--steps", 2)
        if stage == "cold"
        else (rtdmd_rl, [*RL, "--cold_start", run.cold], "--epochs", 1)
    )


def tiny_args(**more):
    return SimpleNamespace(
        **{**cold_start.PRESETS["tiny"], "lora_rank": 32, "lora_alpha": 64, "seed": 0, **more}
    )


def tiny_base(pretrained=TINY, resolution=32, **more):
    """The tiny base model on the CPU."""
    return BaseModel(str(pretrained), CPU, resolution, **more)


def backbone_of(transformer):
    """A bare transformer of Stable Diffusion 3 as `model.play` takes it."""
    backbone = object.__new__(StableDiffusion3)
    backbone.pipe = SimpleNamespace(transformer=transformer)
    return backbone


def watch_attention(monkeypatch):
    """-> {layout of q, k and v: layouts of the output's gradient}, filled in by the backward passes that follow."""
    layouts = {}
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        output = attention(query, key, value, *args, **options)
        if output.requires_grad:
            inputs = (query, key, value)
            layout = tuple((x.shape, x.stride()) for x in inputs)
            seen = layouts.setdefault(layout, set())
            output.register_hook(lambda gradient: seen.add(gradient.stride()))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return layouts


def load_both(base, cold, rl, lora_alpha=None):
    """Stack what --cold_start and --rtdmd name on the base ('' leaves one out) -> names of the adapters."""
    args = SimpleNamespace(cold_start=str(cold), rtdmd=str(rl), teacher=False)
    return sample.load_generator(base, sample.generator_files(args), lora_alpha)


def random_adapter(path, seed, rank=32, pretrained=TINY):
    """A file in the published format with random A and B, so that the adapter visibly does something -> its content"""
    base, g = tiny_base(pretrained), torch.Generator().manual_seed(seed)
    base.add_adapter("x", rank, 64, 0)
    weights = {k: torch.randn(p.shape, generator=g) * 0.05 for k, p in base.adapter("x").items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


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


ONE_BATCH = ["--micro_batch", 10]  # one call of a loss an update


def want(name="cat", count=1, **more):
    return {"class": name, "count": count, **more}
