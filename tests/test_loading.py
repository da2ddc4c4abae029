"""Adapter files as users have them: which are found, which are taken, and that what is taken does
what it says.

Almost every test compares the FUNCTION, the velocity that a small transformer computes, with merged
weights W + alpha / rank B A or with plain peft: numbers in the right place under a wrong alpha
would not show.
"""

import argparse
import ast
import copy
import functools
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import checkpoint
import cps
import lora as lora_module
import model
import rtdmd_rl
import sample
from helpers import backbone_of, small_transformer
from tools import export

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore::UserWarning:peft"
)
ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets/tiny"
RANK = 4
X = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
TEXT = (torch.ones(2, 7, 32), torch.ones(2, 32))


# ---- helpers ------------------------------------------------------------------------------------
@functools.cache
def base():
    """A transformer of SD3.5's kind, three small blocks, the first with a second attention."""
    torch.manual_seed(0)
    return small_transformer(3, (0,)).requires_grad_(False)


def fresh():
    transformer = copy.deepcopy(base())
    transformer.lora_layers = []
    return transformer


def matrices(*endings):
    """Names of the small transformer's matrices that end so."""
    named = base().named_modules()
    return [name for name, m in named if isinstance(m, torch.nn.Linear) and name.endswith(endings)]


USUAL = matrices(*("." + target for target in lora_module.TARGETS))


def random_lora(seed=0, rank=RANK, modules=None, dtype=torch.float32):
    """{module: (A, B)} that visibly does something. rank: one, or {module: rank}."""
    g = torch.Generator().manual_seed(seed)
    lora = {}
    for module in modules or USUAL:
        r = rank[module] if isinstance(rank, dict) else rank
        linear = base().get_submodule(module)
        A = torch.randn(r, linear.in_features, generator=g) * 0.3
        B = torch.randn(linear.out_features, r, generator=g) * 0.3
        lora[module] = (A.to(dtype), B.to(dtype))
    return lora


def tensors_of(lora, prefix="", adapter="default"):
    """The state dict of a file."""
    middle = f".{adapter}" if adapter else ""
    tensors = {}
    for module, (A, B) in lora.items():
        tensors[f"{prefix}{module}.lora_A{middle}.weight"] = A
        tensors[f"{prefix}{module}.lora_B{middle}.weight"] = B
    return tensors


def write(path, content, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path, metadata)
    else:
        torch.save(content, path)
    return path


def velocity(transformer, *names):
    with torch.no_grad():
        return model.play(backbone_of(transformer), list(names), TEXT)(X, 0.75)


def merged(*loras):
    """The velocity with W + alpha / rank B A for each (lora, alpha)."""
    transformer = fresh()
    for lora, alpha in loras:
        for module, (A, B) in lora.items():
            transformer.get_submodule(module).weight.data += (
                alpha / len(A) * (B.float() @ A.float())
            )
    return velocity(transformer)


def small_base():
    """What of a base model its adapters need, around a fresh small transformer."""
    transformer = fresh()
    load_adapter = functools.partial(lora_module.load_adapter, transformer)
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3")
    backbone = backbone_of(transformer)
    backbone.shift = lambda num_steps: 3.0
    return SimpleNamespace(
        transformer=transformer,
        transformers=lambda: [transformer],
        load_adapter=load_adapter,
        backbone=backbone,
        generator=backbone,
        sigmas=functools.partial(cps.sigmas, shift=3.0),
        device=torch.device("cpu"),
        pipe=SimpleNamespace(**dict.fromkeys(parts), scheduler=SimpleNamespace(config={})),
    )


def files_of(cold_start, rtdmd):
    """The files that --cold_start and --rtdmd name."""
    names = SimpleNamespace(cold_start=str(cold_start), rtdmd=str(rtdmd), teacher=False)
    return sample.generator_files(names)


def loaded(cold_start="", rtdmd="", lora_alpha=None):
    """The velocity as sample.py draws with what --cold_start and --rtdmd name."""
    base = small_base()
    names = sample.load_generator(base, files_of(cold_start, rtdmd), lora_alpha)
    return velocity(base.transformer, *names)


def same(one, two):
    """To float32's rounding, and not because both did nothing."""
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())
    assert (two - velocity(fresh())).abs().max() > 0.02 * two.abs().max()


def differ(one, two):
    assert (one - two).abs().max() > 0.01 * two.abs().max()


def program(main, *flags):
    """A program's main in this process -> exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *map(str, flags)])
        try:
            main()
        except SystemExit as e:
            return e.code
    return 0


def one_line(capsys):
    """What was printed to stderr, which must be one line."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    return err


# ---- one file: prefixes, names, precision, format
PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "base_model.model.module._orig_mod.",
    "transformer.",
    "base_model.model.transformer.",
)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ["default", None, "student"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_file_does_the_same_under_every_prefix_name_precision_and_format(
    tmp_path, prefix, adapter, dtype, suffix
):
    lora = random_lora(dtype=dtype)
    path = write(tmp_path / f"generator_ema{suffix}", tensors_of(lora, prefix, adapter))
    # diffusers' own files have that prefix and no adapter's name, and alpha inside of B
    alpha = RANK if prefix.endswith("transformer.") and adapter is None else 64
    same(loaded(path), merged((lora, alpha)))


def test_blocks_that_were_compiled_one_by_one_leave_their_mark_in_the_middle(tmp_path):
    lora = random_lora()
    tensors = {k.replace(".attn.", "._orig_mod.attn."): v for k, v in tensors_of(lora).items()}
    same(loaded(write(tmp_path / "a.pt", tensors)), merged((lora, 64)))


@pytest.mark.parametrize(
    "modules",
    [
        USUAL[:3],
        [*USUAL, *matrices(".attn2.to_q", ".attn2.to_out.0")],
        matrices(".attn2.to_v", ".ff.net.2", "proj_out"),
    ],
    ids=["fewer", "attn2 too", "others"],
)
def test_modules_and_ranks_are_the_files(tmp_path, modules, capsys):
    ranks = {module: 1 + i % 5 for i, module in enumerate(modules)}
    lora = random_lora(rank=ranks, modules=modules)
    same(loaded(write(tmp_path / "a.pt", tensors_of(lora)), lora_alpha=6), merged((lora, 6)))
    left_out = [module for module in USUAL if module not in modules]
    said = capsys.readouterr().err
    assert said.count("\n") == bool(left_out)
    if left_out:
        assert (
            f"leaves {len(left_out)} of the usual {len(USUAL)} as they are, first: {left_out[0]}"
            in said
        )


# ---- alpha
def test_alpha_that_nothing_says_is_assumed_and_said(tmp_path, capsys):
    lora = random_lora()
    same(loaded(write(tmp_path / "a.pt", tensors_of(lora))), merged((lora, 64)))
    line = one_line(capsys)
    assert "does not say its alpha" in line and "64 is assumed" in line


def alpha_in_ckpt(folder, lora):
    torch.save({"flags": {"lora_alpha": 24.0}, "step": 3}, folder / "ckpt.pt")


def alpha_in_config(folder, lora):
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 24}))


def alpha_in_metadata(folder, lora):
    config = {"transformer.r": RANK, "transformer.lora_alpha": 24}
    write(
        folder / "generator_ema.safetensors",
        tensors_of(lora),
        {"lora_adapter_metadata": json.dumps(config)},
    )
    (folder / "generator_ema.pt").unlink()


def alpha_in_plain_metadata(folder, lora):
    write(folder / "generator_ema.safetensors", tensors_of(lora), {"lora_alpha": "24"})
    (folder / "generator_ema.pt").unlink()


def test_alpha_inside_B_is_not_applied_again_because_a_run_lies_beside_the_file(tmp_path, capsys):
    """A file in diffusers' own format, put into the folder of a run that trained with alpha 24."""
    lora = random_lora()
    alpha_in_ckpt(tmp_path, lora)
    content = tensors_of(lora, prefix="transformer.", adapter="")
    path = write(tmp_path / "pytorch_lora_weights.safetensors", content)
    same(loaded(path), merged((lora, RANK)))


@pytest.mark.parametrize(
    "say", [alpha_in_ckpt, alpha_in_config, alpha_in_metadata, alpha_in_plain_metadata]
)
def test_alpha_is_taken_from_where_it_is_said_unless_the_flag_says_another(tmp_path, capsys, say):
    lora = random_lora()
    write(tmp_path / "generator_ema.pt", tensors_of(lora))
    say(tmp_path, lora)
    same(loaded(tmp_path), merged((lora, 24)))
    assert "alpha is 24" in one_line(capsys)
    same(loaded(tmp_path, lora_alpha=48), merged((lora, 48)))
    line = one_line(capsys)
    assert "--lora_alpha 48 is used, though" in line and "says 24" in line
    same(loaded(tmp_path, lora_alpha=24), merged((lora, 24)))
    assert capsys.readouterr().err == ""


def test_metadata_comes_before_a_configuration_and_that_before_a_checkpoint(tmp_path):
    lora = random_lora()
    write(tmp_path / "generator_ema.pt", tensors_of(lora))
    torch.save({"flags": {"lora_alpha": 8.0}}, tmp_path / "ckpt.pt")
    same(loaded(tmp_path), merged((lora, 8)))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    same(loaded(tmp_path), merged((lora, 16)))
    path = write(tmp_path / "a.safetensors", tensors_of(lora), {"lora_alpha": "32"})
    same(loaded(path), merged((lora, 32)))


def test_a_damaged_checkpoint_beside_whole_weights_only_loses_the_alpha(tmp_path, capsys):
    lora = random_lora()
    write(tmp_path / "generator_ema.pt", tensors_of(lora))
    (tmp_path / "ckpt.pt").write_bytes(b"PK\3\4 no archive")
    same(loaded(tmp_path), merged((lora, 64)))
    assert "64 is assumed" in one_line(capsys)


def test_the_two_stages_keep_their_own_alphas(tmp_path):
    one, two = random_lora(1, rank=2), random_lora(2, rank=8)
    for name, lora, alpha in (("one", one, 8.0), ("two", two, 48.0)):
        write(tmp_path / name / "generator_ema.pt", tensors_of(lora))
        torch.save({"flags": {"lora_alpha": alpha}}, tmp_path / name / "ckpt.pt")
    same(loaded(tmp_path / "one", tmp_path / "two"), merged((one, 8), (two, 48)))


@pytest.mark.parametrize("safe", [True, False], ids=[".safetensors", ".bin"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 3}, "alpha_pattern": {"1.attn.to_k": 5}},
        {"target_modules": ["to_q", "to_k", "to_out.0"]},
    ],
    ids=["plain", "rslora", "patterns", "short names"],
)
def test_what_peft_saves_computes_here_what_it_computes_in_peft(tmp_path, options, safe, capsys):
    """peft's own directory, with its variants and patterns; the truth is peft's own forward."""
    config = {"r": RANK, "lora_alpha": 20, "target_modules": list(lora_module.TARGETS), **options}
    in_peft = peft.get_peft_model(copy.deepcopy(base()), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(0)
    for name, p in in_peft.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.3
    with torch.no_grad():
        inputs = {
            "encoder_hidden_states": TEXT[0],
            "pooled_projections": TEXT[1],
            "timestep": torch.full((2,), 750.0),
        }
        theirs = in_peft(X, **inputs, return_dict=False)[0]
    in_peft.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if not safe:  # as older versions of peft wrote it
        torch.save(load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
    same(loaded(tmp_path), theirs)
    assert "assumed" not in capsys.readouterr().err


# ---- layouts
# name: files, what the user names, stage, the file that is meant, the fake score's file
LAYOUTS = {
    "run": (["generator_ema.pt", "fake.pt"], ".", "cold_start", "generator_ema.pt", "fake.pt"),
    "release's names": (
        ["generator.pt", "generator_ema.pt", "fake_score_net.pt"],
        ".",
        "cold_start",
        "generator_ema.pt",
        "fake_score_net.pt",
    ),
    "safetensors": (
        ["generator_ema.safetensors", "fake_score_net.safetensors"],
        ".",
        "rtdmd",
        "generator_ema.safetensors",
        "fake_score_net.safetensors",
    ),
    "the average in another format": (
        ["generator.pt", "generator_ema.safetensors"],
        ".",
        "rtdmd",
        "generator_ema.safetensors",
        None,
    ),
    "not averaged": (
        ["generator.pt", "fake_score_net.pt"],
        ".",
        "rtdmd",
        "generator.pt",
        "fake_score_net.pt",
    ),
    "repository": (
        ["cold_start/generator_ema.pt", "cold_start/fake.pt", "rtdmd/generator_ema.pt"],
        ".",
        "cold_start",
        "cold_start/generator_ema.pt",
        "cold_start/fake.pt",
    ),
    "repository, stage 2": (
        ["cold_start/generator_ema.pt", "cold_start/fake.pt", "rtdmd/generator_ema.pt"],
        ".",
        "rtdmd",
        "rtdmd/generator_ema.pt",
        None,
    ),
    "export": (
        ["pytorch_lora_weights.safetensors", "cold_start.safetensors", "rtdmd.safetensors"],
        ".",
        "rtdmd",
        "rtdmd.safetensors",
        None,
    ),
    "checkpoints": (
        [
            "checkpoint-900/generator_ema.pt",
            "checkpoint-1000/generator_ema.pt",
            "checkpoint-1000/fake_score_net.pt",
            "checkpoint-last/generator_ema.pt",
        ],
        ".",
        "cold_start",
        "checkpoint-1000/generator_ema.pt",
        "checkpoint-1000/fake_score_net.pt",
    ),
    "one checkpoint of several": (
        [
            "checkpoint-900/generator_ema.pt",
            "checkpoint-1000/generator_ema.pt",
            "checkpoint-1000/fake.pt",
        ],
        "checkpoint-900",
        "cold_start",
        "checkpoint-900/generator_ema.pt",
        None,
    ),
    "checkpoints in a stage's folder": (
        ["rtdmd/checkpoint-5/generator_ema.pt"],
        ".",
        "rtdmd",
        "rtdmd/checkpoint-5/generator_ema.pt",
        None,
    ),
    "the file": (
        ["a/mine.pt", "a/generator_ema.pt", "a/fake.pt"],
        "a/mine.pt",
        "cold_start",
        "a/mine.pt",
        "a/fake.pt",
    ),
    "a safetensors file": (
        ["a/mine.safetensors"],
        "a/mine.safetensors",
        "rtdmd",
        "a/mine.safetensors",
        None,
    ),
    "the fake score elsewhere": (
        ["cold_start/generator_ema.pt", "fake.pt"],
        ".",
        "cold_start",
        "cold_start/generator_ema.pt",
        None,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found_and_the_fake_score_beside_its_generator(tmp_path, name, capsys):
    files, where, stage, generator, fake = LAYOUTS[name]
    loras = {}
    for seed, file in enumerate(files):
        loras[file] = random_lora(seed)
        write(tmp_path / file, tensors_of(loras[file]))
    same(loaded(**{stage: tmp_path / where}, lora_alpha=8), merged((loras[generator], 8)))
    said = capsys.readouterr().err
    assert ("checkpoint-1000 is taken, the last of 2" in said) == (name == "checkpoints")
    assert ("before averaging" in said) == (name == "not averaged")
    found = checkpoint.find_weights(str(tmp_path / where), stage, "fake", must=False, quiet=True)
    assert found is None if fake is None else Path(found) == tmp_path / fake
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "files, where, words",
    [
        ([], ".", ["holds nothing", "generator_ema.pt", "cold_start.safetensors", "checkpoint-N"]),
        (
            ["rtdmd.safetensors", "notes.txt"],
            ".",
            ["holds notes.txt, rtdmd.safetensors", "looked for generator_ema.pt"],
        ),
        (["pytorch_lora_weights.safetensors"], ".", ["holds pytorch_lora_weights.safetensors"]),
        (["checkpoint-1/generator_ema.pt", "checkpoint-2/optimizer.pt"], ".", ["checkpoint-2"]),
        (["fake.pt"], ".", ["holds fake.pt"]),
        (
            [],
            "nowhere/at/all",
            ["nowhere/at/all", "no such file or directory", "Run stage 1 first"],
        ),
    ],
    ids=["empty", "other stage", "both in one", "last checkpoint without", "fake alone", "nowhere"],
)
def test_where_nothing_is_found_one_line_says_what_is_there_and_what_was_looked_for(
    tmp_path, capsys, files, where, words
):
    for file in files:
        write(tmp_path / file, tensors_of(random_lora()))
    with pytest.raises(SystemExit) as end:
        checkpoint.find_weights(str(tmp_path / where), "cold_start", quiet=True)
    line = one_line(capsys)
    assert end.value.code == 2 and all(word in line for word in words), line


# ---- wrong files
class Code:
    """A pickle that runs code when it is loaded: it creates a file."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return open, (self.proof, "w")


def wrong_files():
    """name: (content of generator_ema.pt, words of the one line)"""
    lora = random_lora()
    first = USUAL[0]
    good = tensors_of(lora)
    A, B = f"{first}.lora_A.default.weight", f"{first}.lora_B.default.weight"
    in_, out = lora[first][0].shape[1], lora[first][1].shape[0]

    def changed(**more):
        return {**good, **more}

    without_B = {k: v for k, v in good.items() if k != B}
    without_A = {k: v for k, v in good.items() if k != A}
    return {
        "no dict": ([1], ["holds no adapter"]),
        "empty": ({}, ["holds no adapter"]),
        "a whole model": ({"proj_out.weight": torch.ones(2)}, ["holds no adapter"]),
        "B lost": (without_B, [first, "lora_A and no lora_B"]),
        "A lost": (without_A, [first, "lora_B and no lora_A"]),
        "a stray matrix": (
            changed(**{"proj_out.weight": torch.ones(2, 2)}),
            ["proj_out.weight is no LoRA"],
        ),
        "dora": (
            changed(**{f"{first}.lora_magnitude_vector": torch.ones(2)}),
            ["lora_magnitude_vector is no LoRA"],
        ),
        "a bias": (changed(**{f"{first}.lora_B.bias": torch.ones(2)}), ["lora_B.bias is no LoRA"]),
        "a number": (changed(**{A: 3}), [A, "no LoRA"]),
        "integers": (changed(**{A: torch.ones(RANK, in_, dtype=torch.int8)}), [A, "no LoRA"]),
        "nan": (changed(**{A: torch.full((RANK, in_), math.nan)}), [first, "not finite"]),
        "infinity": (
            changed(**{B: torch.full((out, RANK), math.inf, dtype=torch.bfloat16)}),
            [first, "not finite"],
        ),
        "ranks disagree": (
            changed(**{A: torch.ones(RANK + 1, in_)}),
            [first, f"lora_A [{RANK + 1}, {in_}]"],
        ),
        "no matrix": (changed(**{A: torch.ones(RANK, in_, 1, 1)}), [first, "are not [rank, in]"]),
        "rank 0": (
            changed(**{A: torch.ones(0, in_), B: torch.ones(out, 0)}),
            [first, "are not [rank, in]"],
        ),
        "too wide": (
            changed(**{A: torch.ones(RANK, in_ + 1)}),
            [first, f"is {out} x {in_ + 1} there and {out} x {in_} in this"],
        ),
        "too high": (
            changed(**{B: torch.ones(out + 1, RANK)}),
            [first, f"is {out + 1} x {in_} there"],
        ),
        "another model's": (
            changed(**tensors_of({"transformer_blocks.77.attn.to_q": lora[first]})),
            [f"1 of its {len(lora) + 1} modules", "transformer_blocks.77.attn.to_q"],
        ),
        "text encoder's": (
            changed(**tensors_of({"text_encoder.layers.0.q_proj": lora[first]})),
            ["text_encoder.layers.0"],
        ),
        "not a matrix of the model": (
            changed(**tensors_of({"pos_embed.proj": lora[first]})),
            ["pos_embed.proj"],
        ),
        "two adapters": (
            {**good, **tensors_of(lora, adapter="fake")},
            ["twice", "default and fake"],
        ),
        "two prefixes": ({**good, **tensors_of(lora, "module.")}, ["twice"]),
    }


WRONG = wrong_files()


def refused(folder, out, capsys, words):
    """sample.py, given that folder: status 2, one line with these words, no file written."""
    base = small_base()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "BaseModel", lambda *_, **__: base)
        flags = ["a circle", "--preset", "tiny", "--device", "cpu", "--lora_alpha", 8]
        weights = ["--rtdmd", "", "--cold_start", folder]
        status = program(sample.main, *flags, *weights, "--out_dir", out)
    line = one_line(capsys)
    assert status == 2 and all(word in line for word in words), line
    assert not [path for path in out.rglob("*") if path.is_file()]
    # nothing in part
    assert not base.transformer.lora_layers
    assert not hasattr(base.transformer, "peft_config")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_and_nothing_of_it_is_loaded(tmp_path, capsys, name):
    content, words = WRONG[name]
    path = write(tmp_path / "in/generator_ema.pt", content)
    refused(tmp_path / "in", tmp_path / "out", capsys, [str(path), *words])


def test_a_damaged_file_or_one_with_code_is_one_line(tmp_path, capsys):
    good = tensors_of(random_lora())
    whole = write(tmp_path / "whole.pt", good).read_bytes()
    path = tmp_path / "in/generator_ema.pt"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, words in (
        (flipped, ["a checksum is wrong"]),
        (whole[:3000], ["damaged"]),
        (b"", ["damaged"]),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        refused(tmp_path / "in", tmp_path / "out", capsys, [str(path), *words])
    write(path, Code(tmp_path / "proof"))
    refused(tmp_path / "in", tmp_path / "out", capsys, [str(path), "not a file of tensors"])
    path = path.rename(path.with_suffix(".safetensors"))  # a pickle under that name
    refused(tmp_path / "in", tmp_path / "out", capsys, [str(path), "not a file of tensors"])
    path.write_bytes(write(tmp_path / "whole.safetensors", good).read_bytes()[:-10])
    refused(tmp_path / "in", tmp_path / "out", capsys, [str(path), "damaged"])
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "config, words",
    [
        ('{"r": 4, "lora_alpha": ', ["adapter_config.json is damaged"]),
        ("[4, 64]", ["adapter_config.json is no JSON object"]),
        ('{"r": 4}', ["does not say a usable lora_alpha"]),
        ('{"r": 8, "lora_alpha": 64}', ["has rank 4, but", "says 8"]),
        (
            '{"r": 4, "rank_pattern": {"attn.to_k": 8}, "lora_alpha": 64}',
            ["attn.to_k has rank 4, but", "says 8"],
        ),
        ('{"r": 4, "lora_alpha": 64, "peft_type": "LOHA"}', ["no plain LoRA"]),
        ('{"r": 4, "lora_alpha": 64, "use_dora": true}', ["no plain LoRA"]),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_one_line(tmp_path, capsys, config, words):
    write(tmp_path / "in/generator_ema.pt", tensors_of(random_lora()))
    (tmp_path / "in/adapter_config.json").write_text(config)
    refused(tmp_path / "in", tmp_path / "out", capsys, words)


def test_files_of_two_steps_are_refused(tmp_path, capsys):
    write(tmp_path / "in/generator_ema.pt", tensors_of(random_lora()))
    (tmp_path / "in/fake.pt.tmp").touch()
    refused(
        tmp_path / "in",
        tmp_path / "out",
        capsys,
        ["different steps", "goes on from its checkpoint"],
    )
    refused(tmp_path / "in/generator_ema.pt", tmp_path / "out", capsys, ["different steps"])


# ---- several adapters at once
def test_adapters_of_different_modules_are_stacked_and_each_matrix_has_those_it_has(tmp_path):
    one = random_lora(1, rank=2, modules=USUAL[::2])
    two = random_lora(
        2,
        rank={m: 1 + i % 3 for i, m in enumerate([*USUAL[1:], *matrices(".attn2.to_q")])},
        modules=[*USUAL[1:], *matrices(".attn2.to_q")],
    )
    for name, lora in (("one", one), ("two", two)):
        write(tmp_path / name / "generator_ema.pt", tensors_of(lora))
    both = loaded(tmp_path / "one", tmp_path / "two", lora_alpha=6)
    same(both, merged((one, 6), (two, 6)))
    differ(both, merged((two, 6)))
    # one role alone, and none, on matrices that carry both
    base = small_base()
    first, second = sample.load_generator(base, files_of(tmp_path / "one", tmp_path / "two"), 6)
    same(velocity(base.transformer, first), merged((one, 6)))
    same(velocity(base.transformer, second), merged((two, 6)))
    assert torch.equal(velocity(base.transformer), velocity(fresh()))


def test_adapters_of_different_modules_and_ranks_are_exported_as_one(tmp_path):
    """diffusers' own loader is the witness."""
    one = random_lora(1, rank=2, modules=USUAL[::2])
    two = random_lora(2, rank={m: 1 + i % 3 for i, m in enumerate(USUAL[1:])}, modules=USUAL[1:])
    pipe = SimpleNamespace(
        transformer=fresh(), save_lora_weights=StableDiffusion3Pipeline.save_lora_weights
    )
    for name, lora, alpha in (("one", one, 6), ("two", two, 9)):
        lora_module.load_adapter(
            pipe.transformer,
            name,
            str(write(tmp_path / f"{name}.pt", tensors_of(lora))),
            given_alpha=alpha,
        )
    export.save_for_diffusers(pipe, str(tmp_path), ["one", "two"])
    exported = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert (
        len({min(t.shape) for t in exported.values()}) == 1
    )  # one rank: older loaders know no other kind
    truth = merged((one, 6), (two, 9))
    theirs = copy.deepcopy(base())
    theirs.load_lora_adapter(
        str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    same(velocity_of_plain(theirs), truth)
    # the same without metadata, as older versions of ours wrote it
    theirs = copy.deepcopy(base())
    theirs.load_lora_adapter(dict(exported), prefix="transformer")
    same(velocity_of_plain(theirs), truth)


def velocity_of_plain(transformer):
    """Without anything of ours."""
    with torch.no_grad():
        inputs = {
            "encoder_hidden_states": TEXT[0],
            "pooled_projections": TEXT[1],
            "timestep": torch.full((2,), 750.0),
        }
        return transformer(X, **inputs, return_dict=False)[0]


# ---- exported, then loaded
def write_export(cold_start, rtdmd, folder):
    """What tools.export writes of these two."""
    base = small_base()
    save = StableDiffusion3Pipeline.save_lora_weights
    base.pipe = SimpleNamespace(
        transformer=base.transformer,
        save_lora_weights=save,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    base.text_tokens = 8
    args = argparse.Namespace(
        merged=False,
        pretrained="owner/base",
        generator_pretrained="",
        teacher=False,
        base_model="",
        scores="",
        steps=4,
        eta=0.9,
        resolution=32,
        teacher_cfg=2.0,
    )
    files = files_of(cold_start, rtdmd)
    sample.load_generator(base, files)
    folder.mkdir()
    export.export(base, files, args, str(folder))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two stages with ranks and alphas of their own, exported -> folder, runs, the truth."""
    t = tmp_path_factory.mktemp("exported")
    one, two = (
        random_lora(1, rank=2),
        random_lora(2, rank=8, modules=USUAL[:5], dtype=torch.bfloat16),
    )
    for name, lora, alpha in (("cold_start", one, 8.0), ("rtdmd", two, 24.0)):
        write(t / "runs" / name / "generator_ema.pt", tensors_of(lora))
        torch.save({"flags": {"lora_alpha": alpha}}, t / "runs" / name / "ckpt.pt")
    write_export(t / "runs/cold_start", t / "runs", t / "out")
    return SimpleNamespace(
        folder=t / "out", runs=t / "runs", one=one, two=two, truth=merged((one, 8), (two, 24))
    )


def test_an_export_is_taken_as_it_is_with_its_alphas(exported, capsys):
    same(loaded(exported.folder, exported.folder), exported.truth)
    same(
        loaded(exported.folder / "cold_start.safetensors", exported.folder / "rtdmd.safetensors"),
        exported.truth,
    )
    same(loaded(exported.folder / "cold_start", exported.folder / "rtdmd"), exported.truth)
    same(loaded(exported.folder / "pytorch_lora_weights.safetensors"), exported.truth)
    assert "assumed" not in capsys.readouterr().err
    for name in ("cold_start", "rtdmd"):
        file, source = (
            exported.folder / name / "generator_ema.pt",
            exported.runs / name / "generator_ema.pt",
        )
        assert file.read_bytes() == source.read_bytes()


def test_an_exported_file_says_its_alpha_itself(exported):
    for name in ("cold_start", "rtdmd", "pytorch_lora_weights"):
        file = checkpoint.read_adapter(str(exported.folder / f"{name}.safetensors"))
        assert file.alpha.value == file.usual_rank and file.alpha.source == "its metadata"


@pytest.mark.parametrize(
    "name, prefix, adapter",
    [("a.pt", "module.", "default"), ("a.safetensors", "", "default"), ("a.bin", "", None)],
)
def test_an_export_has_the_published_layout(tmp_path, name, prefix, adapter):
    """Ranks and alphas that differ between modules, too."""
    ranks = {module: 2 + i % 2 for i, module in enumerate(USUAL)}
    lora = random_lora(rank=ranks)
    write(tmp_path / "in" / name, tensors_of(lora, prefix, adapter))
    config = {"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 20}}
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config))
    alphas = {module: 20 if module.endswith("attn.to_q") else 8 for module in USUAL}
    truth = merged(*(({module: lora[module]}, alphas[module]) for module in USUAL))
    same(loaded(tmp_path / "in" / name), truth)
    write_export(tmp_path / "in" / name, "", tmp_path / "out")
    published = tmp_path / "out/cold_start/generator_ema.pt"
    assert zipfile.is_zipfile(published)  # torch.save's format, whose checksums are verified
    content = torch.load(published, weights_only=True)
    assert set(content) == set(tensors_of(lora))
    same(loaded(tmp_path / "out"), truth)
    same(loaded(tmp_path / "out/cold_start"), truth)
    written = json.loads((tmp_path / "out/cold_start/adapter_config.json").read_text())
    patterns = written["rank_pattern"]
    assert {module: patterns.get(module, written["r"]) for module in USUAL} == ranks


def test_an_export_made_before_alpha_was_written_into_it_is_taken_too(exported, tmp_path):
    for name in ("cold_start", "rtdmd"):
        save_file(
            load_file(exported.folder / f"{name}.safetensors"), tmp_path / f"{name}.safetensors"
        )
        (tmp_path / name).mkdir()
        shutil.copy(exported.folder / name / "generator_ema.pt", tmp_path / name)
    same(loaded(tmp_path, tmp_path), exported.truth)


def test_an_export_of_an_export_is_the_same(exported, tmp_path):
    write_export(exported.folder, exported.folder / "rtdmd", tmp_path / "out")
    same(loaded(tmp_path / "out", tmp_path / "out"), exported.truth)
    same(loaded(tmp_path / "out/cold_start", tmp_path / "out/rtdmd"), exported.truth)


# ---- stage 2 on any of these
def test_stage_2_freezes_stage_1_as_its_files_are_and_trains_what_its_flags_say(
    tmp_path, monkeypatch, capsys
):
    """Stage 1: rank 2, a few modules, alpha 8, the release's names. The new adapters: 32 and 64."""
    plain = SD3Transformer2DModel.from_pretrained(TINY / "transformer")
    modules = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.1.ff.net.2",
    ]
    g = torch.Generator().manual_seed(0)
    loras = {}
    for file in ("generator_ema.pt", "fake_score_net.pt"):
        loras[file] = {}
        for module in modules:
            linear = plain.get_submodule(module)
            A = torch.randn(2, linear.in_features, generator=g) * 0.3
            loras[file][module] = (A, torch.randn(linear.out_features, 2, generator=g) * 0.1)
        write(tmp_path / "checkpoint-7" / file, tensors_of(loras[file], "module."))
    (tmp_path / "checkpoint-7/adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    bases = []

    def load_base(*inputs):
        bases.append(model.load_base(*inputs))
        return bases[-1]

    monkeypatch.setattr(rtdmd_rl, "load_base", load_base)
    flags = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0, "--rewards", "checker"]
    flags += ["--epochs", 1, "--prompts_per_epoch", 1, "--group_size", 2]
    assert (
        program(rtdmd_rl.main, *flags, "--cold_start", tmp_path, "--out_dir", tmp_path / "out") == 0
    )
    assert "has no fake" not in capsys.readouterr().out
    transformer = bases[0].transformer
    embeds = (
        torch.ones(2, 8, plain.config.joint_attention_dim),
        torch.ones(2, plain.config.pooled_projection_dim),
    )
    for name, file in (("cold_generator", "generator_ema.pt"), ("cold_fake", "fake_score_net.pt")):
        merged_one = copy.deepcopy(plain)
        for module, (A, B) in loras[file].items():
            merged_one.get_submodule(module).weight.data += 8 / 2 * B @ A
        merged_one.lora_layers = []
        with torch.no_grad():
            ours = model.play(backbone_of(transformer), [name], embeds)(X, 0.75)
            truth = model.play(backbone_of(merged_one), [], embeds)(X, 0.75)
            untouched = model.play(backbone_of(transformer), [], embeds)(X, 0.75)
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
        differ(ours, untouched)
        assert all(not p.requires_grad for p in lora_module.adapter(transformer, name).values())
    new = torch.load(tmp_path / "out/generator_ema.pt", weights_only=True)
    usual = [
        n
        for n, m in plain.named_modules()
        if isinstance(m, torch.nn.Linear)
        and n.endswith(tuple("." + t for t in lora_module.TARGETS))
    ]
    assert {key.partition(".lora_")[0] for key in new} == set(usual)
    assert {tensor.shape[0] for key, tensor in new.items() if "lora_A" in key} == {32}
    assert transformer.get_submodule(usual[0]).scaling["generator"] == 2


# ---- the hub: only where the user names it
@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository -> its record of calls; the machine is an empty folder."""
    monkeypatch.chdir(tmp_path)
    record = SimpleNamespace(
        asked=[], fetched=[], files=["cold_start/generator_ema.pt"], error=None
    )
    lora = random_lora()

    def model_info(self, repo, timeout):
        record.asked.append(repo)
        if record.error:
            raise record.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in record.files])

    def snapshot_download(repo, allow_patterns=None, local_files_only=False):
        record.fetched.append((repo, allow_patterns, local_files_only))
        for name in record.files:
            write(tmp_path / "hub" / name, tensors_of(lora))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    record.truth = merged((lora, 8))
    return record


@pytest.mark.parametrize(
    "main, flags",
    [
        (sample.main, ["a circle", "--preset", "sd35m"]),
        (sample.main, ["a circle", "--preset", "sd35m", "--cold_start", ""]),
        (rtdmd_rl.main, ["--preset", "tiny"]),
    ],
    ids=["both stages", "stage 2", "training"],
)
def test_a_default_is_never_looked_up_on_the_hub(hub, capsys, main, flags):
    assert program(main, *flags, "--device", "cpu", "--out_dir", "made") == 2
    line = one_line(capsys)
    assert "no such file or directory" in line and "out/" in line and hub.asked == hub.fetched == []


@pytest.mark.parametrize(
    "where", ["./runs/mine", "a/b/c", "runs/mine/", "mine", "/runs/mine", "~/mine", "../runs"]
)
def test_what_can_only_be_a_path_is_never_looked_up_on_the_hub(hub, capsys, where):
    with pytest.raises(SystemExit):
        checkpoint.find_weights(where, "cold_start")
    assert "no such file or directory" in one_line(capsys) and hub.asked == []


def test_what_says_how_weights_are_used_is_fetched_with_them(hub):
    """settings.json: else a repository's steps and eta would silently be the defaults."""
    here = ["rtdmd/generator_ema.pt", "rtdmd/settings.json", "rtdmd/adapter_config.json"]
    hub.files = [*here, "rtdmd/log.jsonl", "settings.json", "README.md"]
    assert checkpoint.takeable(hub.files, "rtdmd") == [*here, "settings.json"]


def test_a_folder_here_comes_before_a_repository_of_its_name(hub, tmp_path):
    lora = random_lora(5)
    write(tmp_path / "owner/name/generator_ema.pt", tensors_of(lora))
    same(loaded("owner/name", lora_alpha=8), merged((lora, 8)))
    assert hub.asked == []


def test_an_empty_name_is_not_this_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "generator_ema.pt", tensors_of(random_lora()))
    with pytest.raises(SystemExit):
        checkpoint.find_weights("", "cold_start")
    assert "'': no such file or directory" in one_line(capsys)


def test_a_repository_that_the_user_names_is_downloaded_and_that_is_said(hub, capsys):
    hub.files = [
        "README.md",
        "cold_start/generator_ema.pt",
        "cold_start/ckpt.pt",
        "rtdmd/generator_ema.pt",
    ]
    hub.files += ["cold_start/checkpoint-9/fake.pt", "cold_start/checkpoint-10/fake.pt"]
    same(loaded("owner/name", lora_alpha=8), hub.truth)
    assert hub.fetched == [
        ("owner/name", ["cold_start/generator_ema.pt", "cold_start/checkpoint-10/fake.pt"], False)
    ]
    line = one_line(capsys)
    assert (
        "downloading cold_start/generator_ema.pt, cold_start/checkpoint-10/fake.pt "
        "from huggingface.co/owner/name" in line
    )


def test_what_is_in_the_cache_is_not_announced_as_a_download(hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/some/file")
    same(loaded("owner/name", lora_alpha=8), hub.truth)
    assert capsys.readouterr().err == ""


def response(kind, message):
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def test_a_repository_that_cannot_be_had_is_one_line(hub, capsys, monkeypatch):
    gated = response(GatedRepoError, "403 long story")
    missing = response(RepositoryNotFoundError, "404 long story")
    for error, words in (
        (gated, ["owner/name is gated", "hf auth login"]),
        (missing, ["owner/name", "no such repository"]),
    ):
        hub.error = error
        with pytest.raises(SystemExit) as end:
            checkpoint.find_weights("owner/name", "cold_start")
        line = one_line(capsys)
        assert end.value.code == 2 and all(word in line for word in words), line
    hub.error, hub.files = None, ["README.md", "model.bin.index.json"]
    with pytest.raises(SystemExit):
        checkpoint.find_weights("owner/name", "cold_start")
    assert "holds README.md, model.bin.index.json" in one_line(capsys) and hub.fetched == []

    def refuse(repo, **_):
        raise gated

    hub.files = ["cold_start/generator_ema.pt"]  # a list that anyone may read, of files that not
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SystemExit) as end:
        checkpoint.find_weights("owner/name", "cold_start", quiet=True)
    assert "owner/name is gated" in one_line(capsys) and end.value.code == 2


def test_offline_the_cache_is_used_and_its_lack_is_one_line(tmp_path, capsys, monkeypatch):
    """The real library, HF_HUB_OFFLINE=1 as the tests set it, and a cache made by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        checkpoint.find_weights("owner/name", "rtdmd")
    assert "hub cannot be asked" in one_line(capsys)
    lora = random_lora()
    repo = tmp_path / "cache/models--owner--name"
    write(repo / "snapshots" / ("a" * 40) / "rtdmd/generator_ema.pt", tensors_of(lora))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("a" * 40)
    same(loaded(rtdmd="owner/name", lora_alpha=8), merged((lora, 8)))
    assert capsys.readouterr().err == ""


# ---- python -m tools.inspect_adapter
def inspected(where):
    command = [sys.executable, "-m", "tools.inspect_adapter", str(where)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def published_like(std, largest_B):
    """A file as the published ones are described, at a narrow width."""
    modules = [
        f"transformer_blocks.{i}.{target}" for i in range(24) for target in lora_module.TARGETS
    ]
    modules.remove("transformer_blocks.23.attn.to_add_out")
    g = torch.Generator().manual_seed(0)
    lora = {}
    for module in modules:
        A = std * torch.randn(32, 40, generator=g)
        B = largest_B * (2 * torch.rand(40, 32, generator=g) - 1)
        lora[module] = (A.bfloat16(), B.bfloat16())
    return lora


def test_inspect_says_of_every_file_what_it_holds_and_whether_the_published_ones_do(tmp_path):
    write(tmp_path / "cold_start/generator_ema.pt", tensors_of(published_like(1 / 32, 0.01)))
    write(tmp_path / "rtdmd/generator_ema.pt", tensors_of(published_like(1.0, 0.001)))
    status, out, err = inspected(tmp_path)
    assert status == 0 and err == ""
    blocks = out.split(str(tmp_path))[1:]
    assert [block.splitlines()[0] for block in blocks] == [
        "/cold_start/generator_ema.pt",
        "/rtdmd/generator_ema.pt",
    ]
    for block in blocks:
        assert (
            block.count("as expected of the published files") == 6
            and "published files:" not in block
        )
        assert "191 (382 tensors)" in block and "alpha         not said" in block
    # each number wrong by itself
    lora = published_like(0.3, 0.1)
    lora["transformer_blocks.0.attn2.to_q"] = tuple(
        m.float() for m in lora["transformer_blocks.0.attn.to_q"]
    )
    lora["transformer_blocks.0.attn.to_q"] = (
        torch.ones(2, 40).bfloat16(),
        torch.zeros(40, 2).bfloat16(),
    )
    write(tmp_path / "other/rtdmd/generator.pt", tensors_of(lora))
    (tmp_path / "other/rtdmd/adapter_config.json").write_text(json.dumps({"lora_alpha": 24}))
    status, out, err = inspected(tmp_path / "other")
    assert (
        status == 0
        and err == ""
        and "as expected" not in out
        and out.count("published files:") == 6
    )
    for words in (
        "192 (384 tensors)",
        "attn, attn2",
        "2 (1 modules), 32 (191 modules)",
        "bfloat16, float32",
        "about 0.001 (rtdmd)",
        "alpha         24, says",
    ):
        assert words in out, out


def test_inspect_measures_what_is_there(tmp_path, capsys):
    from tools import inspect_adapter

    lora = random_lora()
    lora[USUAL[2]][1][3, 1] = -7.5
    found = inspect_adapter.measured(
        checkpoint.read_adapter(str(write(tmp_path / "a.pt", tensors_of(lora))))
    )
    A = torch.cat([A.flatten() for A, _ in lora.values()])
    assert found["std_A"] == pytest.approx(A.std().item(), rel=1e-5) and found["largest_B"] == 7.5
    # the stage decides which B is expected: what fits stage 1 does not fit stage 2
    verdicts = {
        stage: inspect_adapter.largest_verdict({"largest_B": 0.011}, stage)[0]
        for stage in ("cold_start", "rtdmd", None)
    }
    assert verdicts == {"cold_start": True, "rtdmd": False, None: True}


@pytest.mark.parametrize(
    "std, stage, agrees",
    [
        (1.0, "rtdmd", True),
        (1 / 32, "rtdmd", False),
        (1 / 32, "cold_start", True),
        (1.0, "cold_start", False),
        (1.0, None, True),
        (1 / 32, None, True),
        (0.3, None, False),
    ],
)
def test_inspect_tells_by_stage_which_start_of_A_is_the_releases(std, stage, agrees):
    from tools import inspect_adapter

    assert inspect_adapter.std_verdict({"std_A": std}, 32, stage)[0] is agrees


def test_inspect_finds_all_that_a_folder_has_and_refuses_in_one_line(tmp_path):
    files = [
        "checkpoint-2/generator.pt",
        "checkpoint-2/generator_ema.pt",
        "checkpoint-2/fake_score_net.pt",
        "checkpoint-10/generator_ema.pt",
        "fake.pt",
    ]
    for file in files:
        write(tmp_path / file, tensors_of(random_lora()))
    out = inspected(tmp_path)[1]
    assert sorted(line for line in out.splitlines() if line.startswith(str(tmp_path))) == sorted(
        str(tmp_path / file) for file in files
    )
    (tmp_path / "empty").mkdir()
    for where, words in (
        (tmp_path / "empty", "holds nothing"),
        (tmp_path / "nowhere", "no such file or directory"),
    ):
        status, out, err = inspected(where)
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err


def test_inspect_takes_a_repository_with_one_stage_alone(hub, capsys):
    from tools import inspect_adapter

    paths = inspect_adapter.adapter_files("owner/name")
    assert [Path(path).parts[-3:] for path in paths] == [("hub", "cold_start", "generator_ema.pt")]
    assert hub.fetched == [("owner/name", ["cold_start/generator_ema.pt"], False)]
    assert "downloading" in one_line(capsys)


# ---- who imports whom
def imported(path):
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_common_and_checkpoint_are_below_everything_else_and_nothing_imports_tools():
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert imported(ROOT / "common.py") & ours == set()
    assert imported(ROOT / "checkpoint.py") & ours == {"common", "hub"}
    assert not [
        path.name
        for path in ROOT.glob("*.py")
        if path.name != "test_smoke.py" and "tools" in imported(path)
    ]


# ---- stage 2's weights belong to one stage 1
def test_stage_2_names_its_stage_1_and_another_one_is_refused(run, tmp_path, capsys):
    cold, rl = (json.loads((where / "settings.json").read_text()) for where in (run.cold, run.rl))
    assert rl["cold_start_id"] == cold["run_id"] != rl["run_id"]
    shutil.copytree(run.cold, tmp_path / "other")
    (tmp_path / "other/settings.json").write_text(json.dumps({**cold, "run_id": "another"}))
    names = SimpleNamespace(cold_start=str(run.cold), rtdmd=str(run.rl), teacher=False)
    assert len(sample.generator_files(names)) == 2
    names.cold_start = str(tmp_path / "other")
    with pytest.raises(SystemExit) as end:
        sample.generator_files(names)
    assert end.value.code == 2
    assert "trained on another stage 1" in capsys.readouterr().err


@pytest.mark.parametrize("lacks", ["cold_start_id", "run_id", "file"])
def test_weights_that_do_not_say_their_run_are_taken(run, tmp_path, lacks):
    for name, where in (("cold", run.cold), ("rl", run.rl)):
        shutil.copytree(where, tmp_path / name)
        settings = json.loads((where / "settings.json").read_text())
        settings.pop(lacks, None)
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    if lacks == "file":
        (tmp_path / "cold/settings.json").unlink()
    names = SimpleNamespace(
        cold_start=str(tmp_path / "cold"), rtdmd=str(tmp_path / "rl"), teacher=False
    )
    assert len(sample.generator_files(names)) == 2


def test_the_tiny_presets_weights_lie_in_the_repository_and_belong_together():
    preset = SimpleNamespace(**sample.PRESETS["tiny"], teacher=False)
    files = sample.generator_files(preset)
    settings = [
        json.loads(Path(path).with_name("settings.json").read_text()) for path in files.values()
    ]
    assert settings[1]["cold_start_id"] == settings[0]["run_id"]
    for each in settings:
        assert "/" not in each.get("pretrained", "")  # no path of the machine that trained them
