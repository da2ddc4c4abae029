"""The three kinds of base models: our loop against diffusers' own pipelines, and both stages on each."""

import contextlib
import json

import diffusers
import pytest
import torch
import torch._inductor.config
from torch.nn.attention import SDPBackend, sdpa_kernel

import backbones
import cold_start
import rtdmd_rl
import sample
from attention import join_projections
from common import sides
from cps import CPSScheduler
from helpers import (
    CPU,
    flat,
    good,
    here,
    load,
    log_of,
    on_a_gpu,
    randomise,
    same_files,
    shell,
    tiny_base,
    watch_attention,
)
from model import BaseModel

PROMPTS = ["a red circle", "two blue squares"]
NAMES = ["sd3", "flux1", "schnell", "klein"]
SEEDS = [3, 4]


def ours(place, cfg, steps=4, eta=0.0, resolution=32):
    """The base, and the pictures of our own loop: the teacher's Euler steps, or with eta the student's."""
    base = tiny_base(place, resolution)
    v = base.velocity([], base.encode(PROMPTS), cfg)
    levels = base.sigmas(steps) if eta else sample.teacher_levels(base, steps)
    latents = sample.draw(v, SEEDS, base.latent_shape, levels, eta, CPU)
    return base, base.decode(latents)


def pipeline(place):
    pipe = diffusers.DiffusionPipeline.from_pretrained(place, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, base, cfg, steps=4, resolution=32):
    """diffusers' own pipeline from the same seeds, in a process of its own classes."""
    height, width = sides(resolution)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.scheduler.generator = generators  # only ours looks at it
    pictures = pipe(
        prompt=PROMPTS,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=generators,
        max_sequence_length=base.text_tokens,
        output_type="pt",
    ).images
    return torch.as_tensor(pictures)


# ---- attention on a GPU
def with_an_adapter(place, n, device, compile=False, joined=False):
    """A base with a random adapter -> (its velocity function, n latents, the adapter's weights)."""
    base = BaseModel(place, device, 32, compile=compile)
    if joined:
        join_projections(base.transformer)
    base.add_adapter("fake", 32, 64, seed=0)
    rng = torch.Generator().manual_seed(0)
    randomise(base.adapter("fake"), rng, device)
    (weights,) = base.train_only("fake")
    x = torch.randn(n, *base.latent_shape, generator=rng).to(device)
    return base.velocity(["fake"], base.encode(["a red circle"] * n)), x, weights


def gradient_of_an_adapter(place, n, device, compile=False, attention=None, joined=False):
    """Of a random adapter's weights, from n pictures, with all kinds of attention or that one."""
    fake, x, weights = with_an_adapter(place, n, device, compile, joined)
    # Not before: loading says whether cuDNN attends, and would undo it.
    with sdpa_kernel(attention) if attention else contextlib.nullcontext():
        v = fake(x, 0.6)
        v.square().sum().backward()
    return weights.grad


@pytest.mark.parametrize(
    "name, joined, used",
    [("sd3", False, True), ("sd3", True, True), ("flux1", False, False), ("klein", False, True)],
)
def test_cudnn_attends_where_one_layout_of_q_k_and_v_means_one_of_the_gradient(
    name, joined, used, places, monkeypatch
):
    """Its plans are found by the former alone (common.NOT_CUDNN).

    FLUX.1's two kinds of blocks would share one.
    """
    layouts = watch_attention(monkeypatch)
    gradient_of_an_adapter(places[name], 2, CPU, joined=joined)
    assert layouts and all(layouts.values())
    assert all(len(seen) == 1 for seen in layouts.values()) == used
    assert torch.backends.cuda.cudnn_sdp_enabled() == used


@on_a_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_gradient_is_that_of_attention_written_out(name, compile, places):
    """Both are in bf16."""
    # Plain and compiled blocks must not share a plan (common.NOT_CUDNN), nor then a shape.
    n = 3 if compile else 2
    device = torch.device("cuda")
    truth = gradient_of_an_adapter(places[name], n, device, attention=SDPBackend.MATH)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        got = gradient_of_an_adapter(places[name], n, device, compile)
    assert (got - truth).norm() < 0.05 * truth.norm()


@on_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_a_compiled_velocity_is_the_plain_one(name, places):
    """Without a gradient compiled blocks have GELU within its product. Both are in bf16."""
    device = torch.device("cuda")
    plain, x, _ = with_an_adapter(places[name], 2, device)
    expected = plain(x, 0.6)
    torch._dynamo.reset()
    compiled, x, _ = with_an_adapter(places[name], 2, device, compile=True)
    found = compiled(x, 0.6)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("name", NAMES)
def test_four_euler_steps_are_those_of_diffusers_own_pipeline(name, cfg, places):
    """From the same seeds: the noise that is started from is the same, too."""
    if name == "schnell" and cfg != 1:
        pytest.skip("diffusers would guide by neither")
    base, found = ours(places[name], cfg)
    expected = theirs(pipeline(places[name]), base, cfg)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


def with_our_scheduler(place, base):
    pipe = pipeline(place)
    pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)
    if base.backbone.scheduler_steps_on_tokens:
        pipe.scheduler.latent_shape = base.latent_shape
    return pipe


@pytest.mark.parametrize("resolution", [32, "48x32"])
@pytest.mark.parametrize("name", NAMES)
def test_our_scheduler_draws_in_each_pipeline_what_our_loop_draws(name, resolution, places):
    """In six steps, with the levels that the pipeline asks for and noise in the order of our loop."""
    base, found = ours(places[name], 1.0, 6, 0.9, resolution)
    pipe = with_our_scheduler(places[name], base)
    expected = theirs(pipe, base, 1.0, 6, resolution)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(base.sigmas(6), abs=1e-6)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["flux1", "klein"])
def test_without_the_latents_shape_the_pictures_are_others(name, places):
    base, found = ours(places[name], 1.0, eta=0.9)
    pipe = with_our_scheduler(places[name], base)
    pipe.scheduler.latent_shape = None
    others = theirs(pipe, base, 1.0)
    assert (found - others).abs().max() > 0.01


BREAK = {
    "time": ("run", lambda real: lambda x, t, *rest: real(x, 0.9 * t, *rest)),
    "guidance": ("run", lambda real: lambda x, t, g, *text: real(x, t, 2 * g, *text)),
    "order": ("to_vae", lambda real: lambda x: real(x.flip(1))),
    "text": (
        "run",
        lambda real: lambda x, t, g, embeds, *more: real(x, t, g, 0 * embeds, *more),
    ),
    "pooled": (
        "run",
        lambda real: lambda x, t, g, embeds, *more: real(x, t, g, embeds, *[0 * m for m in more]),
    ),
    "ids": ("places", lambda real: lambda *sizes: [1.5 * ids for ids in real(*sizes)]),
}
BROKEN = [("flux1", what) for what in BREAK]
BROKEN += [("klein", what) for what in BREAK if what not in ("pooled", "guidance")]


@pytest.mark.parametrize("name, what", BROKEN)
def test_what_differs_matters(name, what, places):
    """Each fact of a family, broken, moves the pictures: the comparison above can fail."""
    base, right = ours(places[name], 3.5)
    method, wrong = BREAK[what]
    setattr(base.backbone, method, wrong(getattr(base.backbone, method)))
    v = base.velocity([], base.encode(PROMPTS), 3.5)
    latents = sample.draw(v, SEEDS, base.latent_shape, sample.teacher_levels(base, 4), 0.0, CPU)
    assert (base.decode(latents) - right).abs().max() > 1e-3


def test_klein_whitens_its_latents(places):
    base = tiny_base(places["klein"])
    x = torch.randn(1, *base.latent_shape)
    right = base.decode(x)
    base.pipe.vae.bn.running_mean += 0.5
    assert (base.decode(x) - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_shapes_of_a_text_are_known_before_it_is_encoded(name, places):
    base = tiny_base(places[name])
    text = base.encode(["a red circle"])
    assert base.backbone.text_shapes() == tuple(tensor.shape[1:] for tensor in text)


@pytest.mark.parametrize("name, at_512", [("flux1", 1.878), ("klein", 7.619)])
def test_the_time_shift_grows_with_the_picture(name, at_512, places):
    """At 512 px, four steps: the study's numbers.

    A picture of 32 px is 8 x 8 tokens here, one of 512 px 32 x 32 there.
    """
    base = tiny_base(places[name])
    base.backbone.tokens = 32 * 32
    assert base.backbone.shift(4) == pytest.approx(at_512, abs=1e-3)
    base.backbone.tokens = 64 * 64
    assert base.backbone.shift(4) > at_512
    assert (base.backbone.shift(50) == base.backbone.shift(4)) == (name == "flux1")


def test_four_steps_of_klein_at_1024_px_leave_room(places):
    base = tiny_base(places["klein"])
    base.backbone.tokens = 64 * 64
    assert base.levels(4)[1] == pytest.approx(0.967, abs=1e-3)


def test_another_pipeline_is_refused_in_one_line_that_names_the_three(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AuraFlowPipeline"}))
    status, _, err = here(
        cold_start, "--preset", "tiny", "--device", "cpu", "--pretrained", tmp_path
    )
    assert status == 2
    assert err.count("\n") == 1
    assert "it is a AuraFlowPipeline" in err
    for name in backbones.BACKBONES:
        assert name in err


def test_the_adapted_matrices_of_klein_are_those_of_its_attention(places):
    base = tiny_base(places["klein"])
    for name in ("generator", "fake"):
        base.add_adapter(name, 4, 8, 0)
    keys = {key.split(".lora_")[0] for key in base.adapter("fake")}
    assert keys == {key.split(".lora_")[0] for key in base.adapter("generator")}
    assert {key for key in keys if key.startswith("single")} == {
        f"single_transformer_blocks.{i}.attn.{name}"
        for i in (0, 1)
        for name in ("to_qkv_mlp_proj", "to_out")
    }
    double = {key.split(".attn.")[1] for key in keys if not key.startswith("single")}
    assert double == {
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    }  # fmt: skip


# ---- both stages
FLAGS = ["--preset", "tiny", "--device", "cpu", "--sample_every", 0]
ONE = [*FLAGS, "--steps", 6, "--batch_size", 3, "--micro_batch", 2, "--generator_every", 2]
TWO = [*FLAGS, "--epochs", 3, "--prompts_per_epoch", 2, "--group_size", 2, "--micro_batch", 3]


@pytest.fixture(scope="session", params=["flux1", "klein"])
def trained(request, places, tmp_path_factory):
    """(where both stages of a family are, {stage: its program and flags})"""
    out = tmp_path_factory.mktemp(request.param)
    place = ["--pretrained", places[request.param], "--cfg", 3.5]
    commands = {
        "cold": (cold_start, *ONE, *place),
        "rl": (rtdmd_rl, *TWO, "--cold_start", out / "cold"),
    }
    for stage, command in commands.items():
        good(here(*command, "--out_dir", out / stage))
    return out, commands


both_stages = pytest.mark.parametrize("stage", ["cold", "rl"])


def distance(one, two, name):
    """How far apart the adapters of two runs are, as a share of how far they went."""
    found, expected = load(one / name), load(two / name)
    moved = [key for key in expected if ".lora_B." in key]  # they start at 0
    return (flat([found[key] - expected[key] for key in moved])).norm() / flat(
        [expected[key] for key in moved]
    ).norm()


@both_stages
def test_both_stages_train_every_adapted_matrix_that_counts(stage, trained):
    out, _ = trained
    for line in log_of(out / stage):
        assert all(value is not None for value in line.values())
    for name in ("generator_ema.pt", "fake.pt"):
        weights = load(out / stage / name)
        assert [key for key, B in weights.items() if ".lora_B." in key and not B.any()] == []


@both_stages
def test_a_stopped_run_goes_on_to_the_same_bytes(stage, trained, tmp_path):
    out, commands = trained
    program, *flags = commands[stage]
    flags += ["--out_dir", tmp_path / "run", "--save_every", 2]
    calls = []

    def stopped(*inputs):
        calls.append(inputs)
        if len(calls) > 5:  # two passes a step: amid the third step
            raise KeyboardInterrupt
        return real(*inputs)

    real = cold_start.fake_score_loss
    with pytest.raises(KeyboardInterrupt):
        here(program, *flags, fake_score_loss=stopped)
    good(here(program, *flags))
    assert same_files(out / stage, tmp_path / "run")


@both_stages
def test_low_memory_trains_the_same_adapters(stage, trained, tmp_path):
    out, commands = trained
    good(here(*commands[stage], "--low_memory", "--out_dir", tmp_path))
    for name in ("generator_ema.pt", "fake.pt"):
        assert distance(tmp_path, out / stage, name) < 1e-2


@both_stages
def test_two_processes_train_the_same_adapters(stage, trained, tmp_path):
    out, commands = trained
    good(shell(*commands[stage], "--out_dir", tmp_path, processes=2))
    for name in ("generator_ema.pt", "fake.pt"):
        assert distance(tmp_path, out / stage, name) < 1e-2


def test_a_picture_is_drawn_with_both_stages(trained, tmp_path):
    out, _ = trained
    flags = ["a red circle", "--cold_start", out / "cold", "--rtdmd", out / "rl", "--device", "cpu"]
    good(here(sample, *flags, "--out_dir", tmp_path))
    assert (tmp_path / "00000.png").exists()
    good(here(sample, *flags, "--teacher", "--steps", 3, "--out_dir", tmp_path))
    assert (tmp_path / "00001.png").exists()
