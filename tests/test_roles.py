"""One transformer in several roles.

Switching adapters, stacking them, checkpointing and compiling its blocks.
"""

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from PIL import Image

import cold_start
import lora
import model
import pictures
import sample
from attention import join_projections
from cps import cps_step, sigmas
from helpers import (
    BASE,
    CPU,
    TINY,
    backbone_of,
    good,
    here,
    load_both,
    on_a_gpu,
    random_adapter,
    randomise,
    small_transformer,
    tiny_base,
)


def noted_backend(graphs):
    """The compiler's front half: tracing, guards, the joint graph. graphs: grows by each of them."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return backend


def generator_gradient(switch, checkpointing, compile=0, device=CPU, seed=0):
    """Gradient of loss_G as the loops compute it.

    The generator's forward comes first, then teacher's and fake's, then backward.

    switch: "ours", "peft" (its set_adapter), or "none": the truth, where the other roles play
    before the generator does. checkpointing: "ours", "diffusers" or None.
    """
    rng = torch.Generator().manual_seed(seed)
    low_memory = checkpointing == "ours"
    base = model.BaseModel(str(TINY), device, 32, compile=bool(compile), low_memory=low_memory)
    transformer = base.transformer
    if checkpointing == "diffusers":
        transformer.enable_gradient_checkpointing()
    for name in ("generator", "fake"):
        base.add_adapter(name, rank=32, alpha=64, seed=0)
        randomise(base.adapter(name), rng, device)
    parameters, _ = base.train_only("generator", "fake")

    def normal():
        return torch.randn(2, 4, 16, 16, generator=rng).to(device)

    x = normal()
    noise = normal()
    noise_back = normal()
    text = base.encode(["a red circle", "two squares"])
    eta = 0.9
    s_before = 0.75
    s = 0.5
    t = torch.tensor([0.6, 0.9], device=device)

    def role(name, cfg=1.0):
        adapters = [name] if name else []
        v = base.velocity(adapters, text, cfg)

        def velocity(x, t):
            if switch == "peft" and name:
                transformer.set_adapter(name)
            return v(x, t)

        return velocity

    def generator_step():
        v = role("generator")(x, s_before)
        x_s, _, _ = cps_step(x, v, s_before, s, eta, noise)
        return x_s

    def loss(x_s):
        teacher = role("", cfg=2.0)
        fake = role("fake")
        losses = cold_start.generator_loss(
            x_s,
            s=s,
            t=t,
            noise=noise,
            noise_back=noise_back,
            teacher=teacher,
            fake=fake,
            eta=eta,
        )
        return losses.sum()

    if switch == "none":
        x_s = generator_step().detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x_s), x_s)
        generator_step().backward(slope)
    else:
        loss(generator_step()).backward()
    return parameters.grad.clone().cpu()


def test_role_switching_and_checkpointing_leave_the_generators_gradient_as_it_is():
    """To 1e-6 in float32.

    Checkpointing recomputes in backward. `checkpoint_activations` sees to it that this is done in
    the role of the forward pass.
    """
    truth = generator_gradient("none", None)
    assert truth.norm() > 1e-2
    for checkpointing in (None, "ours"):
        gradient = generator_gradient("ours", checkpointing)
        assert (gradient - truth).abs().max() < 1e-6


@pytest.mark.parametrize("active", [[], ["one"], ["one", "two"]])
def test_our_forward_of_an_adapted_matrix_is_pefts_own(active):
    """`LoraLinear` adds up all active adapters in one pair of products.

    Values and gradients are those of peft's forward, to rounding.
    """
    base = tiny_base()
    rng = torch.Generator().manual_seed(0)
    text = base.encode(["a red circle", "two squares"])
    for name, rank in (("one", 8), ("two", 32)):
        base.add_adapter(name, rank, alpha=64, seed=0)
        randomise(base.adapter(name), rng)
    (parameters,) = base.train_only("two")
    x = torch.randn(2, 4, 16, 16, generator=rng)

    def velocity_and_gradient():
        parameters.grad.zero_()
        v = base.velocity(active, text)(x, 0.75)
        if "two" in active:
            v.square().sum().backward()
        return v.detach(), parameters.grad.clone()

    v, gradient = velocity_and_gradient()
    for layer in base.transformer.lora_layers:
        layer.__class__ = PeftLinear
    v_peft, gradient_peft = velocity_and_gradient()
    assert (v - v_peft).abs().max() < 1e-5 * v_peft.abs().max()
    assert (gradient - gradient_peft).norm() <= 1e-5 * gradient_peft.norm()
    assert (gradient.norm() > 1) == ("two" in active)


@pytest.mark.parametrize("checkpointing", [None, "ours"])
def test_compiled_blocks_play_every_role_and_give_the_eager_gradient(monkeypatch, checkpointing):
    """--compile, with the compiler's front half; the back half needs a GPU or minutes.

    A graph compiled for one role must not be used for
    another, nor one for the batch without guidance for the double one.
    """
    real_compile = torch.nn.Module.compile
    graphs = []
    backend = noted_backend(graphs)

    def compile_with_our_backend(self, **options):
        return real_compile(self, **options, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_our_backend)
    # Within a product PyTorch has the exact GELU on a CPU, .0005 away from the one by tanh.
    monkeypatch.setattr(model, "fuse_gelu", lambda transformer: None)
    torch._dynamo.reset()
    compiled = generator_gradient("ours", checkpointing, compile=1)
    eager = generator_gradient("ours", checkpointing)
    assert (compiled - eager).abs().max() < 1e-6
    assert eager.norm() > 1e-2
    # G, F and teacher have at most three kinds of block each (first, middle, last), and there is a
    # graph with gradient where G has one.
    assert 6 <= len(graphs) <= 12, len(graphs)


@on_a_gpu
def test_on_a_gpu_the_compiled_gradient_is_as_near_to_float32s_as_the_eager_one():
    """Both are bf16 with float32 adapters; they round at different places.

    Medians of three draws: random adapters can drive attention to where rounding is all. Eager, seed 0
    has an error of .33 on an H100, and of .07 where attention is written out.
    """
    torch._dynamo.reset()
    gpu = torch.device("cuda")

    def relative_error(compile):
        errors = []
        for seed in range(3):
            truth = generator_gradient("ours", None, seed=seed)
            gradient = generator_gradient("ours", None, compile=compile, device=gpu, seed=seed)
            errors.append((gradient - truth).norm() / truth.norm())
        return torch.stack(errors).median()

    eager = relative_error(compile=0)
    compiled = relative_error(compile=1)
    assert 0 < compiled < 2 * eager
    assert 2 * eager < 0.5
    assert compiled != eager


def six_blocks():
    """A bare transformer with three kinds of block.

    Blocks with a second attention, without, and the last, which drops its text.
    """
    return small_transformer(6, (0, 1, 2))


def test_one_compiled_graph_serves_all_blocks_of_a_kind(monkeypatch):
    """Else SD3.5-M's 24 blocks compile one by one, for a quarter of an hour."""
    for limit in ("cache_size_limit", "accumulated_cache_size_limit"):  # as `compile_blocks` does
        monkeypatch.setattr(torch._dynamo.config, limit, 1000)
    transformer = six_blocks()
    join_projections(transformer)  # as where blocks are compiled
    model.fuse_gelu(transformer)
    for name in ("one", "two"):
        lora.add_adapter(transformer, name, rank=4, alpha=64, seed=0)
    torch._dynamo.reset()
    graphs = []
    backend = noted_backend(graphs)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False, backend=backend)
    text = (torch.randn(2, 7, 32), torch.randn(2, 32))

    def forward(adapters):
        v = model.play(backbone_of(transformer), adapters, text)
        with torch.no_grad():
            v(torch.randn(2, 4, 16, 16), 0.5)

    # Each role has one graph for each of the three kinds of block.
    roles = ([], ["one"], ["one", "two"])
    for roles_so_far, adapters in enumerate(roles, start=1):
        forward(adapters)
        assert len(graphs) == 3 * roles_so_far

    # As sample.py draws: the pairs no longer change.
    for layer in transformer.lora_layers:
        pair = [matrix.detach() for matrix in layer.pair(["one", "two"])]
        layer.fixed = {("one", "two"): pair}
    forward(["one", "two"])
    assert len(graphs) == 12


@pytest.mark.parametrize(
    "switch, checkpointing", [("peft", None), ("peft", "diffusers"), ("ours", "diffusers")]
)
def test_the_usual_way_to_switch_or_to_checkpoint_loses_the_gradient_without_an_error(
    switch, checkpointing
):
    """Why this repository has its own two (peft #2832).

    peft's set_adapter freezes the adapters that it deactivates, and gives exactly 0. diffusers'
    checkpointing recomputes with whatever adapter is active in backward, and gives something else
    altogether.
    """
    truth = generator_gradient("none", None)
    wrong = generator_gradient(switch, checkpointing)
    if switch == "peft":
        assert wrong.norm() == 0
    else:
        assert (wrong - truth).norm() > 0.5 * truth.norm()


# -------------------------------------------------------------------------------------------------
# Stage 2 stacked on stage 1
def test_both_adapters_are_stacked_and_neither_replaces_the_other(tmp_path):
    """What sample.py draws = stage 1 merged into the base, then stage 2 added.

    To 1e-4 in float32, whatever their ranks.
    """
    prompt = "a red circle"
    stage_1 = tmp_path / "one"
    stage_2 = tmp_path / "two"
    weights = random_adapter(stage_1 / "generator_ema.pt", seed=1, rank=8)
    random_adapter(stage_2 / "generator_ema.pt", seed=2)

    drawn = {}
    for name, cold_start_dir, rtdmd_dir in (
        ("both", stage_1, stage_2),
        ("one", stage_1, ""),
        ("two", "", stage_2),
    ):
        out_dir = tmp_path / name / "out"
        flags = [*BASE[:4], "--cold_start", cold_start_dir, "--rtdmd", rtdmd_dir]
        good(here(sample, prompt, *flags, "--out_dir", out_dir))
        content = Image.open(out_dir / "00000.png").tobytes()
        drawn[name] = torch.tensor(list(content)).float() / 255
    for name in ("one", "two"):
        assert (drawn["both"] - drawn[name]).abs().max() > 0.1

    def latents(base, cold, rl):
        adapters = load_both(base, cold, rl)
        v = base.velocity(adapters, base.encode([prompt]))
        shape = (4, 16, 16)
        return sample.draw(v, [0], shape, levels=sigmas(), eta=0.9, device=CPU)

    stacked = latents(tiny_base(), stage_1, stage_2)

    # Merged: W + (alpha / rank) B A
    base = tiny_base()
    scaling = 64 / 8
    for key, A in weights.items():
        if ".lora_A" in key:
            B = weights[key.replace("lora_A", "lora_B")]
            module = base.transformer.get_submodule(key.split(".lora_A")[0])
            module.weight.data += scaling * B @ A
    merged = latents(base, "", stage_2)
    assert (stacked - merged).abs().max() < 1e-4 * stacked.abs().max()

    # The program draws that very picture.
    with torch.no_grad():
        (picture,) = sample.as_saved(base.decode(stacked))
    saved, _ = pictures.read_picture(tmp_path / "both/out/00000.png")
    assert torch.equal(saved, picture)
