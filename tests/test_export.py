"""The weights elsewhere: exports for diffusers, model cards, the scheduler in pipelines, Stable Diffusion 3 Medium."""

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
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
import export
import model
import rtdmd_rl
import sample
from cps import CPSScheduler
from gaussian import LEVELS, close
from helpers import (
    BASE,
    README,
    ROOT,
    TINY,
    flags_of,
    good,
    here,
    listing,
    load,
    random_adapter,
    tiny_args,
    tiny_base,
)
from small_rewards import CPU


@pytest.mark.parametrize(
    "targets",
    [model.TARGETS, [name.removeprefix("attn.") for name in model.TARGETS]],
    ids=["ours", "model card's"],
)
def test_plain_diffusers_and_peft_load_our_file_and_compute_what_play_computes(run, targets):
    args, pipe, bare = (
        tiny_args(cold_start=str(run.cold), rtdmd=""),
        tiny_base().pipe,
        SD3Transformer2DModel.from_pretrained(TINY / "transformer"),
    )
    bare.add_adapter(
        LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=targets),
        "default",
    )
    result = bare.load_state_dict(load(run.cold / "generator_ema.pt"), strict=False)
    assert result.unexpected_keys == [] and not [
        k for k in result.missing_keys if ".attn." in k and ".lora_" in k
    ]
    x, text = (
        torch.randn(2, 4, 16, 16),
        cold_start.text_encoder(pipe, args)(["a red circle", "two squares"]),
    )
    with torch.no_grad():
        theirs = bare(
            x,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=torch.full((2,), 750.0),
            return_dict=False,
        )[0]
        ours = cold_start.play(pipe.transformer, sample.load_generator(pipe, args), text)(x, 0.75)
        base = cold_start.play(pipe.transformer, [], text)(x, 0.75)
    assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (ours - base).abs().max()


# ------------------------------------------------------------------------------------- for diffusers: --export, --export_merged, CPSScheduler
TEXTS, SEEDS = ["a red circle", "two red squares"], (3, 4)


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


def snippets(card, folder):
    """The python code of a model card or of the README, made to run here."""
    for old, new in (
        ("stabilityai/stable-diffusion-3.5-medium", str(TINY)),
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


@pytest.mark.parametrize("stages", [("cold", "rl"), ("cold",), ("rl",)], ids="+".join)
def test_diffusers_draws_from_every_export_what_our_own_loop_draws(tmp_path, stages):
    """Two files of different ranks and an alpha that is neither: LoRA in one file, as two adapters, merged; the card's code as printed."""
    for seed, (stage, rank) in enumerate({"cold": 32, "rl": 16}.items()):
        random_adapter(tmp_path / stage / "generator_ema.pt", seed, rank)
    where = {
        name: str(tmp_path / stage) if stage in stages else ""
        for name, stage in (("cold_start", "cold"), ("rtdmd", "rl"))
    }
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    good(
        here(
            sample,
            *BASE[:4],
            "--lora_alpha",
            24,
            *(x for k, v in where.items() for x in (f"--{k}", v)),
            "--export",
            lora,
            "--export_merged",
            merged,
        )
    )
    args, pipe = tiny_args(lora_alpha=24, **where), tiny_base().pipe
    v = cold_start.play(
        pipe.transformer,
        sample.load_generator(pipe, args),
        cold_start.text_encoder(pipe, args)(TEXTS),
    )
    ours = model.decode(pipe, sample.draw(v, SEEDS, pipe.latent_shape, LEVELS, 0.9, CPU))
    plain, names = {"torch": torch}, [name for name in where if where[name]]
    whole, *stacked = snippets((lora / "README.md").read_text(), lora)
    exec(whole, plain)
    assert (lora / "cps.py").read_bytes() == (ROOT / "cps.py").read_bytes() and plain[
        "pipe"
    ].scheduler.config.eta == 0.9
    close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
    assert len(stacked) == (len(stages) == 2)
    if stacked:
        for code in snippets(
            README, lora
        ):  # the README's; the second, after the first, leaves its one LoRA inactive
            exec(code, plain)
        assert plain["pipe"].get_active_adapters() == names
        close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
        exec(
            "\n".join(line for line in whole.splitlines() if "load_lora" not in line)
            + "\n"
            + stacked[0],
            plain,
        )
        close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
        plain["pipe"].set_adapters(
            "rtdmd"
        )  # what the published card's own code ends with: stage 1 is lost
        assert (drawn_by_diffusers(plain["pipe"]) - ours).abs().max() > 0.05
    exec(*snippets((merged / "README.md").read_text(), merged), plain)
    assert (
        not hasattr(plain["pipe"].transformer, "peft_config")
        and plain["pipe"].transformer.dtype == torch.float32
    )
    close(drawn_by_diffusers(plain["pipe"]), ours, 1e-3)
    for name in names:  # the published layout once more
        assert (lora / name / "generator_ema.pt").read_bytes() == (
            Path(where[name]) / "generator_ema.pt"
        ).read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_merging_into_a_bf16_base_is_done_in_float32(tmp_path):
    """As on a GPU: a bf16 base, float32 adapters, and updates that bf16 would round away."""
    random_adapter(tmp_path / "cold/generator_ema.pt", 0)
    args, pipe = (
        tiny_args(
            cold_start=str(tmp_path / "cold"),
            rtdmd="",
            export=None,
            export_merged=str(tmp_path / "merged"),
            steps=4,
            shift=3.0,
            eta=0.9,
        ),
        tiny_base().pipe,
    )
    pipe.transformer.bfloat16()
    names = sample.load_generator(pipe, args)
    lora = {
        k: p.mul_(1e-2) for k, p in export.concatenated(pipe.transformer, names).items()
    }  # B A shrinks by 1e-4
    for k, p in cold_start.adapter(pipe.transformer, names[0]).items():
        p.data.mul_(1e-2)
    base = {
        k: p.detach().float().clone()
        for k, p in pipe.transformer.named_parameters()
        if "base_layer.weight" in k
    }
    export.export(pipe, names, args, [], {})
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged/transformer").state_dict()
    for k, weight in base.items():
        name = k.removesuffix("base_layer.weight")
        update = lora[name + "lora_B.weight"] @ lora[name + "lora_A.weight"]
        close(merged[name + "weight"] - weight, update, 1e-6)
        assert (
            0 < update.abs().max() < 1e-2
            and ((weight.bfloat16() + update.bfloat16()) == weight).float().mean() > 0.2
        )


def test_a_model_card_says_how_it_was_made_and_what_it_scored(run, tmp_path):
    good(
        here(
            sample,
            "a red circle",
            *BASE[:4],
            "--cold_start",
            run.cold,
            "--rtdmd",
            run.rl,
            "--rewards",
            "checker",
            "--num_images",
            2,
            "--out_dir",
            tmp_path / "pictures",
            "--export",
            tmp_path / "lora",
        )
    )
    card, scores = (
        (tmp_path / "lora/README.md").read_text(),
        [json.loads(line)["checker"] for line in (tmp_path / "pictures/scores.jsonl").open()],
    )
    assert (
        f"| student | checker | {sum(scores) / 2:.4f} |" in card
        and "prompts_train.jsonl" in card
        and "base_model: " in card
        and "licence" in card
    )
    for program, flags in (
        (cold_start, "--steps 4"),
        (rtdmd_rl, "--epochs 2"),
        (rtdmd_rl, "--rewards clipscore:1,checker:1"),
    ):
        assert flags in card
    for line in re.findall(r"- (?:cold_start|rtdmd): .*`(.*)`", card):  # its flags are flags
        flags_of(rtdmd_rl if "--epochs" in line else cold_start, *shlex.split(line))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--export {there}", "there already"),
        ("--export_merged {there}/file", "there already"),
        ("--export {new} --export_merged {new}/", "two directories"),
        ("--export ''", "no name"),
        ("--export {new} --teacher", "--teacher"),
        ("--export {new} --cold_start '' --rtdmd ''", "one must be there"),
        ("--export {there}/file/new", "cannot write"),
        ("--export {new} --cold_start {new}", "no such file"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line_and_writes_nothing(
    run, tmp_path, flags, message
):
    (tmp_path / "there").mkdir(), (tmp_path / "there/file").write_text("mine")
    before, flags = (
        listing(tmp_path),
        shlex.split(flags.format(there=tmp_path / "there", new=tmp_path / "new")),
    )
    status, _, err = here(sample, *BASE[:4], "--cold_start", run.cold, "--rtdmd", run.rl, *flags)
    assert (
        status == 2
        and err.count("\n") == 1
        and message in err
        and listing(tmp_path) == before
        and not (tmp_path / "new").exists()
    ), err


def test_an_export_that_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "copy", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    )
    status, _, err = here(
        sample,
        *BASE[:4],
        "--cold_start",
        run.cold,
        "--rtdmd",
        run.rl,
        "--export",
        tmp_path / "lora",
    )
    assert (
        status == 1
        and err.count("\n") == 1
        and "No space left" in err
        and not list(tmp_path.iterdir())
    )


def test_the_scheduler_is_loaded_with_a_pipeline_saved_with_it_and_drives_img2img(tmp_path):
    load = lambda pipeline, where, **more: pipeline.from_pretrained(
        where, dtype=torch.float32, **more
    )
    ours = CPSScheduler.from_pretrained(TINY, subfolder="scheduler", eta=0.8)
    pipe = load(DiffusionPipeline, TINY, scheduler=ours)
    pipe.save_pretrained(tmp_path)
    again, other = (
        load(DiffusionPipeline, tmp_path),
        load(DiffusionPipeline, tmp_path, scheduler=CPSScheduler(eta=0.3)),
    )
    assert [p.scheduler.config.eta for p in (pipe, again, other)] == [0.8, 0.8, 0.3]
    close(drawn_by_diffusers(again), drawn_by_diffusers(pipe), 1e-6)
    # image to image with strength .75 is the last three of the four steps, from the picture re-noised to .9
    image = StableDiffusion3Img2ImgPipeline(**pipe.components)
    steps, step = [], ours.step
    ours.step = lambda v, t, x, **more: steps.append((t.item(), x)) or step(v, t, x, **more)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = drawn_by_diffusers(image, image=pictures, strength=0.75)
    assert result.shape == pictures.shape and [t for t, _ in steps] == pytest.approx(
        [900, 750, 500]
    )
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    normal = lambda: randn_tensor((2, 4, 16, 16), generator=generators)
    x0 = (
        pipe.vae.encode(image.image_processor.preprocess(pictures))
        .latent_dist.sample(generators)
        .sub(pipe.vae.config.shift_factor)
        * pipe.vae.config.scaling_factor
    )
    own, start = tiny_base().pipe, 0.1 * x0 + 0.9 * normal()
    v = cold_start.play(own.transformer, [], cold_start.text_encoder(own, tiny_args())(TEXTS))
    close(steps[0][1], start, 1e-4)
    close(
        result,
        model.decode(
            own, sample.integrate(v, torch.stack([start, normal(), normal()]), LEVELS[1:], 0.8)
        ).detach(),
        1e-3,
    )


def test_the_scheduler_shifts_once_where_the_shift_depends_on_the_pictures_size():
    """As Flux and its like call it: sigmas= not yet shifted, and mu; on packed latents [B,L,C]."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours, x, v = (
        CPSScheduler.from_config(theirs.config, eta=0.0),
        torch.randn(2, 5, 3),
        torch.randn(2, 5, 3),
    )
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.8)
        scheduler.set_begin_index(0)
    close(ours.sigmas, theirs.sigmas, 1e-6)
    close(ours.timesteps, theirs.timesteps, 1e-4)
    close(ours.step(v, ours.timesteps[0], x)[0], theirs.step(v, theirs.timesteps[0], x)[0], 1e-5)
    ours.set_timesteps(4, mu=0.8)
    close(ours.sigmas, theirs.sigmas, 1e-6)
    ours, euler = (
        CPSScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # without dynamic shifting mu means nothing
    ours.set_timesteps(4, mu=0.8)
    euler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])  # what the README says for users without ours
    close(ours.sigmas.tolist(), LEVELS, 1e-6)
    close(euler.sigmas.tolist(), LEVELS, 1e-6)


# ---------------------------------------------------------------------------------------------------------------- Stable Diffusion 3 Medium
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
        cold_start.add_adapter(transformer, "generator", tiny_args())
    found = cold_start.adapter(transformer, "generator")
    last = {"transformer_blocks.23.attn.to_add_out"}  # the last block drops its text stream
    modules = {
        f"transformer_blocks.{i}.{target}" for i in range(24) for target in model.TARGETS
    } - last
    assert (
        set(found) == {f"{module}.lora_{x}.default.weight" for module in modules for x in "AB"}
        and len(found) == 382
    )
    assert {tuple(p.shape) for k, p in found.items()} == {(32, 1536), (1536, 32)} and not any(
        "attn2" in k for k in found
    )


def test_both_stages_run_on_sd3_mediums_kind_of_transformer(tmp_path):
    """Four narrow blocks and its table of positions in the tiny pipeline: training, drawing, and the largest resolution that it has positions for."""
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
    assert cold_start.load_pipeline(
        tiny_args(pretrained=tmp_path / "sd3m", resolution=4 * 192), CPU
    ).latent_shape == (4, 384, 384)
    status, _, err = here(cold_start, *base, "--resolution", 4 * 193, "--out_dir", tmp_path / "no")
    assert status == 2 and "at most 768" in err
    assert all(
        flags_of(program, "--preset", "sd3m")["pretrained"]
        == "stabilityai/stable-diffusion-3-medium-diffusers"
        for program in (cold_start, rtdmd_rl)
    )
