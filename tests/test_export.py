"""The weights elsewhere: exports for diffusers, model cards, the scheduler in pipelines, SD3 Medium."""

import contextlib
import errno
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig

import cold_start
import lora
import rtdmd_rl
import sample
from cps import CPSScheduler
from gaussian import LEVELS, close
from helpers import (
    BASE,
    CPU,
    README,
    ROOT,
    TINY,
    flags_of,
    good,
    here,
    listing,
    load,
    load_both,
    random_adapter,
    tiny_base,
    wait_for,
)
from tools import evaluate, export


@pytest.mark.parametrize(
    "targets",
    [lora.TARGETS, [name.removeprefix("attn.") for name in lora.TARGETS]],
    ids=["ours", "model card's"],
)
def test_plain_diffusers_and_peft_load_our_file_and_compute_what_we_compute(run, targets):
    base = tiny_base()
    bare = SD3Transformer2DModel.from_pretrained(TINY / "transformer")
    config = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=targets)
    bare.add_adapter(config, "default")
    result = bare.load_state_dict(load(run.cold / "generator_ema.pt"), strict=False)
    assert result.unexpected_keys == []
    assert [k for k in result.missing_keys if ".attn." in k and ".lora_" in k] == []
    x = torch.randn(2, 4, 16, 16)
    text = base.encode(["a red circle", "two squares"])
    with torch.no_grad():
        theirs = bare(
            x,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=torch.full((2,), 750.0),
            return_dict=False,
        )[0]
        ours = base.velocity(load_both(base, run.cold, ""), text)(x, 0.75)
        without = base.velocity([], text)(x, 0.75)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - without).abs().max() > 1e-3


# ---- for diffusers: tools.export, CPSScheduler
TEXTS = ["a red circle", "two red squares"]
SEEDS = (3, 4)


def drawn_by_diffusers(pipe, **more):
    """Pictures [2,3,32,32] of TEXTS from SEEDS by any diffusers pipeline whose scheduler is ours."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(
        TEXTS,
        num_inference_steps=4,
        guidance_scale=1.0,
        height=32,
        width=32,
        max_sequence_length=8,
        generator=pipe.scheduler.generator,
        output_type="pt",
        **more,
    ).images


def drawn_by_us(base, names):
    v = base.velocity(names, base.encode(TEXTS))
    with torch.no_grad():
        return base.decode(sample.draw(v, SEEDS, base.latent_shape, LEVELS, 0.9, CPU))


def snippets(card, folder, base=TINY):
    """The python code of a model card or of a page, made to run here."""
    for old, new in (
        ("stabilityai/stable-diffusion-3.5-medium", str(base)),
        ('"BASE"', repr(str(base))),
        ("height=512", "height=32"),
        ("width=512", "width=32"),
        ("max_sequence_length=128", "max_sequence_length=8"),
        ("lora_dir", str(folder)),
        ('.to("cuda")', ""),
        ("bfloat16", "float32"),
        ('"DIR"', repr(str(folder))),
        ("a photo of a cat", "a circle"),
    ):
        card = card.replace(old, new)
    return re.findall(r"```python\n(.*?)```", card, re.S)


def run_snippet(code, names=None):
    """Run it -> the names that it has defined, `pipe` and `image` among them."""
    names = {"torch": torch} if names is None else names
    exec(code, names)
    return names


EXPORT = BASE[:4]
PAGES = README + "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("stages", [("cold", "rl"), ("cold",), ("rl",)], ids="+".join)
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_diffusers_draws_from_every_export_what_our_own_loop_draws(tmp_path, stages):
    """Two files of different ranks and an alpha that is neither, exported in all three ways.

    They are LoRA in one file, two adapters, and merged; the card's code runs as printed.
    """
    random_adapter(tmp_path / "cold/generator_ema.pt", 0, 32)
    random_adapter(tmp_path / "rl/generator_ema.pt", 1, 16)
    where = {}
    for flag, stage in (("cold_start", "cold"), ("rtdmd", "rl")):
        where[flag] = str(tmp_path / stage) if stage in stages else ""
    weights = ["--cold_start", where["cold_start"], "--rtdmd", where["rtdmd"], "--lora_alpha", 24]
    lora = tmp_path / "lora"
    merged = tmp_path / "merged"
    good(here(export, *EXPORT, *weights, lora))
    good(here(export, *EXPORT, *weights, "--merged", merged))
    assert not list(tmp_path.glob("*.tmp"))
    assert (lora / "cps.py").read_bytes() == (ROOT / "cps.py").read_bytes()
    names = [name for name in where if where[name]]
    for name in names:  # the published layout once more
        ours = (lora / name / "generator_ema.pt").read_bytes()
        assert ours == (Path(where[name]) / "generator_ema.pt").read_bytes()
    base = tiny_base()
    ours = drawn_by_us(base, load_both(base, *where.values(), lora_alpha=24))

    whole, *stacked = snippets((lora / "README.md").read_text(), lora)
    plain = run_snippet(whole)
    assert plain["pipe"].scheduler.config.eta == 0.9
    close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
    assert len(stacked) == (len(stages) == 2)
    if stacked:
        # the pages' code; the second, after the first, leaves its one LoRA inactive
        for code in snippets(PAGES, lora):
            if "load_lora_weights" in code:
                run_snippet(code, plain)
        assert plain["pipe"].get_active_adapters() == names
        close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
        without_lora = [line for line in whole.splitlines() if "load_lora" not in line]
        pipe = run_snippet("\n".join(without_lora) + "\n" + stacked[0])["pipe"]
        assert pipe.get_active_adapters() == names
        close(drawn_by_diffusers(pipe), ours, 1e-3)
        pipe.set_adapters("rtdmd")  # what the published card's own code ends with: stage 1 is lost
        assert (drawn_by_diffusers(pipe) - ours).abs().max() > 0.05

    (code,) = snippets((merged / "README.md").read_text(), merged)
    pipe = run_snippet(code)["pipe"]
    assert not hasattr(pipe.transformer, "peft_config")
    assert pipe.transformer.dtype == torch.float32
    close(drawn_by_diffusers(pipe), ours, 1e-3)


def drawn_by_card(code):
    """The picture [3,H,W] of a card's code, in floats and not in a PNG's 256 values."""
    as_floats = code.replace("image = pipe(", 'image = pipe(output_type="pt", prompt=')
    return torch.as_tensor(run_snippet(as_floats)["image"])


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("name", ["sd3", "flux1", "schnell", "klein"])
def test_the_cards_code_draws_for_every_family_what_our_own_loop_draws(name, places, tmp_path):
    """Of no square: from one LoRA, from two, merged; and our loop from the published layout."""
    random_adapter(tmp_path / "cold/generator_ema.pt", 0, 4, places[name])
    random_adapter(tmp_path / "rl/generator_ema.pt", 1, 2, places[name])
    stages = [tmp_path / "cold", tmp_path / "rl"]

    def drawn_by_ours(base, adapters):
        v = base.velocity(adapters, base.encode(["a circle"]))
        latents = sample.draw(v, [0], base.latent_shape, base.sigmas(4), 0.9, CPU)
        return base.decode(latents)[0]

    base = tiny_base(places[name], "48x32")
    ours = drawn_by_ours(base, load_both(base, *stages))
    assert (drawn_by_ours(base, []) - ours).abs().max() > 0.01

    flags = ["--pretrained", places[name], "--resolution", "48x32"]
    flags += ["--cold_start", stages[0], "--rtdmd", stages[1]]
    good(here(export, *EXPORT, *flags, tmp_path / "lora"))
    good(here(export, *EXPORT, *flags, "--merged", tmp_path / "merged"))
    card = (tmp_path / "lora/README.md").read_text()
    one, two = snippets(card, tmp_path / "lora", places[name])
    (merged,) = snippets((tmp_path / "merged/README.md").read_text(), tmp_path / "merged")
    (line,) = [line for line in one.splitlines() if "load_lora_weights" in line]
    for code in (one, one.replace(line, two), merged):
        close(drawn_by_card(code), ours, 1e-5)
    again = tiny_base(places[name], "48x32")
    close(drawn_by_ours(again, load_both(again, tmp_path / "lora", tmp_path / "lora")), ours, 1e-5)

    # what the card says of the levels that the base's own scheduler uses
    theirs = sample.teacher_levels(base, 4)
    same = theirs == pytest.approx(base.sigmas(4), abs=1e-6)
    assert f"uses {'the same' if same else 'others'}, and no noise" in card


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("merged", [False, True], ids=["LoRA", "merged"])
def test_the_cards_code_runs_as_printed_for_a_base_without_t5_and_draws_the_same_twice(
    tmp_path, merged
):
    shutil.copytree(TINY, tmp_path / "tiny")
    index = json.loads((TINY / "model_index.json").read_text())
    index.update(text_encoder_3=[None, None], tokenizer_3=[None, None])
    (tmp_path / "tiny/model_index.json").write_text(json.dumps(index))
    random_adapter(tmp_path / "cold/generator_ema.pt", 0)
    flags = ["--pretrained", tmp_path / "tiny", "--cold_start", tmp_path / "cold", "--rtdmd", ""]
    how = ["--merged"] if merged else []
    good(here(export, *EXPORT, *flags, *how, tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    (code,) = snippets(card, tmp_path / "out", tmp_path / "tiny")
    first, second = (run_snippet(code)["image"] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_merging_into_a_bf16_base_is_done_in_float32(tmp_path):
    """As on a GPU: a bf16 base, float32 adapters, and updates that bf16 would round away."""
    random_adapter(tmp_path / "cold/generator_ema.pt", 0)
    base = tiny_base()
    transformer = base.transformer.bfloat16()
    (name,) = load_both(base, tmp_path / "cold", "")
    for p in base.adapter(name).values():
        p.data.mul_(1e-2)  # B A shrinks by 1e-4
    lora = export.concatenated(transformer, [name])
    before = {}
    for key, p in transformer.named_parameters():
        if "base_layer.weight" in key:
            before[key.removesuffix("base_layer.weight")] = p.detach().float().clone()
    export.write_merged(base, {name: ""}, str(tmp_path / "merged"))
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged/transformer").state_dict()
    for module, weight in before.items():
        update = lora[module + "lora_B.weight"] @ lora[module + "lora_A.weight"]
        close(merged[module + "weight"] - weight, update, 1e-6)
        assert 0 < update.abs().max() < 1e-2
        lost = (weight.bfloat16() + update.bfloat16()) == weight
        assert lost.float().mean() > 0.2


def test_a_model_card_says_how_it_was_made_and_what_it_scored(run, tmp_path):
    weights = ["--cold_start", run.cold, "--rtdmd", run.rl]
    pictures = ["--num_images", 2, "--rewards", "checker", "--out_dir", tmp_path / "pictures"]
    good(here(evaluate, "a red circle", *BASE[:4], *weights, *pictures))
    scores = tmp_path / "pictures/scores.jsonl"
    good(here(export, *EXPORT, *weights, "--scores", scores, tmp_path / "lora"))
    card = (tmp_path / "lora/README.md").read_text()
    mean = sum(json.loads(line)["checker"] for line in scores.open()) / 2
    assert f"| student | checker | {mean:.4f} +- " in card
    assert "prompts_train.jsonl" in card
    assert "licence" in card
    for flags in ("--steps 4", "--epochs 2", "--rewards clipscore:1,checker:1"):
        assert flags in card
    for line in re.findall(r"- (?:cold_start|rtdmd): .*`(.*)`", card):  # its flags are flags
        if "--epochs" in line:
            flags_of(rtdmd_rl, *shlex.split(line), "--cold_start", str(run.cold))
        else:
            flags_of(cold_start, *shlex.split(line))


def test_no_path_of_this_machine_is_exported(run, tmp_path):
    """The base is a directory here: it is left out, or has the name that is given."""
    weights = ["--cold_start", run.cold, "--rtdmd", run.rl]
    named = ["--base_model", "owner/name"]
    good(here(export, *EXPORT, *weights, tmp_path / "lora"))
    good(here(export, *EXPORT, *weights, *named, tmp_path / "named"))
    good(here(export, *EXPORT, *weights, "--merged", tmp_path / "merged"))
    for folder in ("lora", "named", "merged"):
        for path in (tmp_path / folder).rglob("*"):
            if path.suffix in (".md", ".json"):
                text = path.read_text()
                assert str(ROOT) not in text
                assert str(tmp_path) not in text
    assert "base_model: " not in (tmp_path / "lora/README.md").read_text()
    card = (tmp_path / "named/README.md").read_text()
    assert "base_model: owner/name" in card
    assert '"owner/name"' in card
    assert json.loads((tmp_path / "named/settings.json").read_text())["pretrained"] == "owner/name"


def test_settings_travel_with_the_weights(run, tmp_path):
    """From the run to the picture, to the export, to a picture from it; a flag is obeyed and said."""
    run_dir = tmp_path / "cold"
    shutil.copytree(run.cold, run_dir)
    settings = json.loads((run_dir / "settings.json").read_text())
    settings.update(num_steps=3, eta=0.5, cfg=1.5)
    (run_dir / "settings.json").write_text(json.dumps(settings))

    def settled(*flags):
        """-> what would be drawn with, and what is said of it"""
        err = io.StringIO()
        command = ["sample.py", "cat", "--preset", "tiny", "--rtdmd", "", *map(str, flags)]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", command)
            args = sample.arguments()
            args = sample.settled(args, sample.generator_files(args))
        return (args.steps, args.eta, args.cfg), err.getvalue()

    good(here(export, *EXPORT, "--cold_start", run_dir, "--rtdmd", "", tmp_path / "lora"))
    for place in (run_dir, tmp_path / "lora", tmp_path / "lora/cold_start"):
        assert settled("--cold_start", place) == ((3, 0.5, 1.0), "")
        values, said = settled("--cold_start", place, "--steps", 2)
        assert values == (2, 0.5, 1.0)
        assert said.count("\n") == 1
        assert "--steps 2 is used" in said
        assert settled("--cold_start", place, "--teacher") == ((50, 0.0, 1.5), "")
        assert settled("--cold_start", place, "--teacher", "--cfg", 1.5)[0] == (50, 0.0, 1.5)
    assert settled("--cold_start", "") == ((4, 0.9, 1.0), "")
    assert settled("--cold_start", "", "--teacher") == ((50, 0.0, 2.0), "")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{there}", "there already"),
        ("--merged {there}/file", "there already"),
        ("''", "--out_dir must not be empty"),
        ("", "DIR"),
        ("{new} --teacher", "--teacher"),
        ("{new} --cold_start '' --rtdmd ''", "nothing to export"),
        ("{there}/file/new", "cannot write"),
        ("{new} --cold_start {new}", "no such file"),
        ("{new} --base_model /a/path", "hub id"),
        ("{new} --scores {there}/file", "cannot be read"),
        ("{new} --scores {new}", "No such file"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line_and_writes_nothing(
    run, tmp_path, flags, message
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    before = listing(tmp_path)
    flags = shlex.split(flags.format(there=tmp_path / "there", new=tmp_path / "new"))
    status, _, err = here(export, *EXPORT, "--cold_start", run.cold, "--rtdmd", run.rl, *flags)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert listing(tmp_path) == before
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.tmp").exists()


def test_an_export_that_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copy", mock.Mock(side_effect=full))
    weights = ["--cold_start", run.cold, "--rtdmd", run.rl]
    status, _, err = here(export, *EXPORT, *weights, tmp_path / "lora")
    assert status == 1
    assert err.count("\n") == 1
    assert "No space left" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_leaves_nothing(number, run, tmp_path):
    flags = [*EXPORT, "--cold_start", run.cold, "--rtdmd", run.rl, "--merged", tmp_path / "new"]
    command = [sys.executable, "-m", "tools.export", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "new.tmp")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped by a signal" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_scheduler_is_loaded_with_a_pipeline_saved_with_it_and_drives_img2img(tmp_path):
    def load(pipeline, where, **more):
        return pipeline.from_pretrained(where, dtype=torch.float32, **more)

    ours = CPSScheduler.from_pretrained(TINY, subfolder="scheduler", eta=0.8)
    pipe = load(DiffusionPipeline, TINY, scheduler=ours)
    pipe.save_pretrained(tmp_path)
    again = load(DiffusionPipeline, tmp_path)
    other = load(DiffusionPipeline, tmp_path, scheduler=CPSScheduler(eta=0.3))
    assert [p.scheduler.config.eta for p in (pipe, again, other)] == [0.8, 0.8, 0.3]
    close(drawn_by_diffusers(again), drawn_by_diffusers(pipe), 1e-6)

    # Image to image with strength .75 is the last three of the four steps, from the picture re-noised
    # to .9.
    image = StableDiffusion3Img2ImgPipeline(**pipe.components)
    times = []
    states = []
    step = ours.step

    def noted_step(v, t, x, **more):
        times.append(t.item())
        states.append(x)
        return step(v, t, x, **more)

    ours.step = noted_step
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = drawn_by_diffusers(image, image=pictures, strength=0.75)
    assert result.shape == pictures.shape
    assert times == pytest.approx([900, 750, 500])
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def normal():
        return randn_tensor((2, 4, 16, 16), generator=generators)

    encoded = pipe.vae.encode(image.image_processor.preprocess(pictures))
    latents = encoded.latent_dist.sample(generators)
    x0 = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    own = tiny_base()
    start = 0.1 * x0 + 0.9 * normal()
    close(states[0], start, 1e-4)
    noise = torch.stack([start, normal(), normal()], 1)
    with torch.no_grad():
        v = own.velocity([], own.encode(TEXTS))
        close(result, own.decode(sample.integrate(v, noise, LEVELS[1:], 0.8)), 1e-3)


def test_the_scheduler_shifts_once_where_the_shift_depends_on_the_pictures_size():
    """As Flux and its like call it: sigmas= not yet shifted, and mu; on packed latents [B,L,C]."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = CPSScheduler.from_config(theirs.config, eta=0.0)
    x = torch.randn(2, 5, 3)
    v = torch.randn(2, 5, 3)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.8)
        scheduler.set_begin_index(0)
    close(ours.sigmas, theirs.sigmas, 1e-6)
    close(ours.timesteps, theirs.timesteps, 1e-4)
    x_ours = ours.step(v, ours.timesteps[0], x)[0]
    x_theirs = theirs.step(v, theirs.timesteps[0], x)[0]
    close(x_ours, x_theirs, 1e-5)
    ours.set_timesteps(4, mu=0.8)
    close(ours.sigmas, theirs.sigmas, 1e-6)
    # Without dynamic shifting mu means nothing.
    ours = CPSScheduler()
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours.set_timesteps(4, mu=0.8)
    euler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])  # what the README says for users without ours
    close(ours.sigmas.tolist(), LEVELS, 1e-6)
    close(euler.sigmas.tolist(), LEVELS, 1e-6)


# ---- Stable Diffusion 3 Medium
SD3M = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)


def test_the_adapters_fit_sd3_medium():
    """Its true architecture, without weights: no second attention and no norm of queries and keys."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD3M)
        assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 2028
        lora.add_adapter(transformer, "generator", 32, 64, seed=0)
    found = lora.adapter(transformer, "generator")
    last = {"transformer_blocks.23.attn.to_add_out"}  # the last block drops its text stream
    modules = {
        f"transformer_blocks.{i}.{target}" for i in range(24) for target in lora.TARGETS
    } - last
    assert (
        set(found) == {f"{module}.lora_{x}.default.weight" for module in modules for x in "AB"}
        and len(found) == 382
    )
    assert {tuple(p.shape) for k, p in found.items()} == {(32, 1536), (1536, 32)} and not any(
        "attn2" in k for k in found
    )


def test_both_stages_run_on_sd3_mediums_kind_of_transformer(tmp_path):
    """Four narrow blocks and its table of positions in the tiny pipeline: training and drawing.

    At the largest resolution that it has positions for, too.
    """
    small = dict(
        SD3M,
        num_layers=4,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pooled_projection_dim=128,
        sample_size=16,
    )
    shutil.copytree(TINY, tmp_path / "sd3m")
    shutil.rmtree(tmp_path / "sd3m/transformer")
    torch.manual_seed(0)
    SD3Transformer2DModel(**small).save_pretrained(tmp_path / "sd3m/transformer")
    base = [*BASE, "--pretrained", tmp_path / "sd3m"]
    good(
        here(
            cold_start,
            *base,
            "--steps",
            1,
            "--batch_size",
            2,
            "--generator_every",
            1,
            "--out_dir",
            tmp_path / "cold",
        )
    )
    good(
        here(
            rtdmd_rl,
            *base,
            "--epochs",
            1,
            "--prompts_per_epoch",
            1,
            "--group_size",
            2,
            "--cold_start",
            tmp_path / "cold",
            "--out_dir",
            tmp_path / "rl",
        )
    )
    good(
        here(
            sample,
            "a circle",
            *base[:4],
            *base[6:],
            "--cold_start",
            tmp_path / "cold",
            "--rtdmd",
            tmp_path / "rl",
            "--out_dir",
            tmp_path / "pictures",
        )
    )
    assert tiny_base(tmp_path / "sd3m", resolution=4 * 192).latent_shape == (4, 384, 384)
    status, _, err = here(cold_start, *base, "--resolution", 4 * 193, "--out_dir", tmp_path / "no")
    assert status == 2 and "at most 768" in err


def test_an_export_says_how_to_publish_it_and_what_it_does_not_name(run, tmp_path):
    flags = ["--preset", "tiny", "--cold_start", run.cold, "--rtdmd", run.rl, "--device", "cpu"]
    status, out, err = here(export, tmp_path / "one", *flags)
    assert status == 0, err
    assert f"hf upload OWNER/NAME {tmp_path / 'one'}" in out
    assert "--base_model ID does" in err
    status, out, err = here(export, tmp_path / "two", *flags, "--base_model", "owner/base")
    assert status == 0
    assert "--base_model" not in err
    card = (tmp_path / "two/README.md").read_text()
    front = card.split("---")[1]
    for line in ("license_name: stabilityai-ai-community", "base_model: owner/base"):
        assert line in front.splitlines()


HUB = "https://huggingface.co/"
LICENCES = [
    ("sd3", "owner/finetune", "stabilityai-ai-community"),
    ("flux1", "black-forest-labs/FLUX.1-dev", "flux-1-dev-non-commercial-license"),
    ("flux1", "black-forest-labs/FLUX.1-schnell", "apache-2.0"),
    ("flux1", "owner/finetune", ""),
    ("klein", "black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
    ("klein", "black-forest-labs/FLUX.2-klein-base-9B", "flux-non-commercial-license"),
    ("klein", "owner/finetune", ""),
]


@pytest.mark.parametrize("name, hub_id, licence", LICENCES)
def test_a_card_names_the_licence_of_its_base_where_that_is_known(name, hub_id, licence, places):
    args = SimpleNamespace(
        base_model=hub_id, merged=True, scores="", steps=4, eta=0.9, resolution=32
    )
    card = export.model_card(tiny_base(places[name]), {}, args)
    front = card.split("---")[1].splitlines()
    assert f"base_model: {hub_id}" in front
    has_own_page = licence not in ("", "apache-2.0")
    assert ("license: apache-2.0" if licence == "apache-2.0" else "license: other") in front
    assert (f"license_name: {licence}" in front) == has_own_page
    links = [line for line in front if line.startswith(f"license_link: {HUB}")]
    assert len(links) == has_own_page
    if has_own_page and name != "sd3":
        assert links == [f"license_link: {HUB}{hub_id}/blob/main/LICENSE.md"]
    text = " ".join(card.split("## Licence")[1].split())
    called = f", `{licence}`" if licence else ""
    assert f"derive from `{hub_id}` and fall under its licence{called}." in text
