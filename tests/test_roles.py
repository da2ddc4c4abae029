"""One transformer in several roles: switching adapters, stacking them, checkpointing and compiling its blocks."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import Linear as PeftLinear
from PIL import Image

import cold_start
import lora
import model
import pictures
import sample
from cps import sigmas
from helpers import (
    BASE,
    CPU,
    TINY,
    backbone_of,
    good,
    here,
    load_both,
    random_adapter,
    tiny_base,
)


def generator_gradient(switch, checkpointing, compile=0, device=CPU):
    """Gradient of loss_G as the loops compute it: generator forward, then teacher and fake forward, then backward.
    switch: "ours", "peft" (its set_adapter), or "none": the truth, the other roles play before the generator does.
    checkpointing: "ours", "diffusers" or None."""
    g = torch.Generator().manual_seed(0)
    base = model.BaseModel(
        str(TINY), device, 32, compile=bool(compile), low_memory=checkpointing == "ours"
    )
    transformer = base.transformer
    if checkpointing == "diffusers":
        transformer.enable_gradient_checkpointing()
    for name in ("generator", "fake"):
        base.add_adapter(name, 32, 64, 0)
        for p in base.adapter(name).values():
            p.data = (torch.randn(p.shape, generator=g) * 0.05).to(device)
    parameters, _ = base.train_only("generator", "fake")
    x, noise, back = (torch.randn(2, 4, 16, 16, generator=g).to(device) for _ in range(3))
    text = base.encode(["a red circle", "two squares"])

    def role(name, cfg=1.0):
        v = base.velocity([name] if name else [], text, cfg)
        return lambda x, t: (
            v(x, t) if switch != "peft" or not name else (transformer.set_adapter(name), v(x, t))[1]
        )

    def step():
        return cold_start.cps_step(x, role("generator")(x, 0.75), 0.75, 0.5, 0.9, noise)[0]

    def loss(x_s):
        return cold_start.generator_loss(
            x_s,
            0.5,
            torch.tensor([0.6, 0.9], device=device),
            noise,
            back,
            role("", 2.0),
            role("fake"),
            0.9,
        ).sum()

    if switch == "none":
        x_s = step().detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x_s), x_s)
        step().backward(slope)
    else:
        loss(step()).backward()
    return parameters.grad.clone().cpu()


def test_role_switching_and_checkpointing_leave_the_generators_gradient_as_it_is():
    """To 1e-6 in float32. Checkpointing recomputes in backward; `load_pipeline` sees to it that this is done in the role of the forward pass."""
    truth = generator_gradient("none", None)
    assert truth.norm() > 1e-2
    for checkpointing in (None, "ours"):
        assert (generator_gradient("ours", checkpointing) - truth).abs().max() < 1e-6


@pytest.mark.parametrize("active", [[], ["one"], ["one", "two"]])
def test_our_forward_of_an_adapted_matrix_is_pefts_own(active):
    """`lora_linear` adds up all active adapters in one pair of products; values and gradients are those of peft's forward, to rounding."""
    base, g, found = tiny_base(), torch.Generator().manual_seed(0), []
    transformer, text = base.transformer, base.encode(["a red circle", "two squares"])
    for name, rank in (("one", 8), ("two", 32)):
        base.add_adapter(name, rank, 64, 0)
        for p in base.adapter(name).values():
            p.data = torch.randn(p.shape, generator=g) * 0.05
    (parameters,) = base.train_only("two")
    x = torch.randn(2, 4, 16, 16, generator=g)
    for _forward in ("ours", "peft's"):
        v = base.velocity(active, text)(x, 0.75)
        if "two" in active:
            v.square().sum().backward()
        found.append((v.detach(), parameters.grad.clone()))
        for layer in transformer.lora_layers:
            layer.__class__ = PeftLinear
        parameters.grad.zero_()
    (v, gradient), (v_peft, gradient_peft) = found
    assert (v - v_peft).abs().max() < 1e-5 * v_peft.abs().max()
    assert (gradient - gradient_peft).norm() <= 1e-5 * gradient_peft.norm() and (
        gradient.norm() > 1
    ) == ("two" in active)


@pytest.mark.parametrize("checkpointing", [None, "ours"])
def test_compiled_blocks_play_every_role_and_give_the_eager_gradient(monkeypatch, checkpointing):
    """--compile, with the compiler's front half (tracing, guards, the joint graph; the back half needs a GPU or minutes): a graph compiled
    for one role must not be used for another, nor one for the batch without guidance for the double one."""
    real, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: real(self, **options, backend=backend)
    )
    torch._dynamo.reset()
    compiled, eager = (
        generator_gradient("ours", checkpointing, compile=1),
        generator_gradient("ours", checkpointing),
    )
    assert (compiled - eager).abs().max() < 1e-6 < 1e-2 < eager.norm()
    # G, F and teacher, three kinds of block at most (first, middle, last), and a graph with gradient where G has one
    assert 6 <= len(graphs) <= 12, len(graphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a GPU")
def test_on_a_gpu_the_compiled_gradient_is_as_near_to_float32s_as_the_eager_one():
    """Both are bf16 with float32 adapters; they round at different places."""
    torch._dynamo.reset()
    truth, gpu = generator_gradient("ours", None), torch.device("cuda")
    eager, compiled = (
        (generator_gradient("ours", None, compile=c, device=gpu) - truth).norm() / truth.norm()
        for c in (0, 1)
    )
    assert 0 < compiled < 2 * eager < 0.5 and compiled != eager


def test_one_compiled_graph_serves_all_blocks_of_a_kind(monkeypatch):
    """Else SD3.5-M's 24 blocks compile one by one, for a quarter of an hour."""
    from torch._dynamo.backends.debugging import aot_eager

    for limit in ("cache_size_limit", "accumulated_cache_size_limit"):  # as `load_pipeline` does
        monkeypatch.setattr(torch._dynamo.config, limit, 1000)
    transformer, graphs = (
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0, 1, 2),
            qk_norm="rms_norm",
        ),
        [],
    )
    for name in ("one", "two"):
        lora.add_adapter(transformer, name, 4, 64, 0)
    torch._dynamo.reset()

    def backend(graph, inputs):
        return graphs.append(graph) or aot_eager(graph, inputs)

    for block in transformer.transformer_blocks:
        block.compile(dynamic=False, backend=backend)
    text = torch.randn(2, 7, 32), torch.randn(2, 32)
    for i, adapters in enumerate(
        ([], ["one"], ["one", "two"]), 1
    ):  # with a second attention, without, and the last, which drops its text
        with torch.no_grad():
            model.play(backbone_of(transformer), adapters, text)(torch.randn(2, 4, 16, 16), 0.5)
        assert len(graphs) == 3 * i
    for layer in transformer.lora_layers:  # as sample.py draws
        layer.fixed = {("one", "two"): [m.detach() for m in layer.pair(["one", "two"])]}
    with torch.no_grad():
        model.play(backbone_of(transformer), ["one", "two"], text)(torch.randn(2, 4, 16, 16), 0.5)
    assert len(graphs) == 12


@pytest.mark.parametrize(
    "switch, checkpointing", [("peft", None), ("peft", "diffusers"), ("ours", "diffusers")]
)
def test_the_usual_way_to_switch_or_to_checkpoint_loses_the_gradient_without_an_error(
    switch, checkpointing
):
    """Why this repository has its own two (peft #2832): peft's set_adapter freezes the adapters that it deactivates, and gives exactly 0;
    diffusers' checkpointing recomputes with whatever adapter is active in backward, and gives something else altogether."""
    truth, wrong = generator_gradient("none", None), generator_gradient(switch, checkpointing)
    assert wrong.norm() == 0 if switch == "peft" else (wrong - truth).norm() > 0.5 * truth.norm()


# ------------------------------------------------------------------------------------------------ stage 2 stacked on stage 1
def test_both_adapters_are_stacked_and_neither_replaces_the_other(tmp_path):
    """What sample.py draws = stage 1 merged into the base, then stage 2 added (1e-4, float32), whatever their ranks."""
    weights, picture = random_adapter(tmp_path / "one/generator_ema.pt", 1, rank=8), {}
    random_adapter(tmp_path / "two/generator_ema.pt", 2)
    for name, one, two in (
        ("both", tmp_path / "one", tmp_path / "two"),
        ("one", tmp_path / "one", ""),
        ("two", "", tmp_path / "two"),
    ):
        good(
            here(
                sample,
                "a red circle",
                *BASE[:4],
                "--cold_start",
                one,
                "--rtdmd",
                two,
                "--out_dir",
                tmp_path / name / "out",
            )
        )
        picture[name] = (
            torch.tensor(list(Image.open(tmp_path / name / "out/00000.png").tobytes())).float()
            / 255
        )
    assert all((picture["both"] - picture[name]).abs().max() > 0.1 for name in ("one", "two"))

    def latents(base, cold, rl):
        v = base.velocity(load_both(base, cold, rl), base.encode(["a red circle"]))
        return sample.draw(v, [0], (4, 16, 16), sigmas(), 0.9, CPU)

    stacked = latents(tiny_base(), tmp_path / "one", tmp_path / "two")
    base = tiny_base()
    for key in weights:
        if ".lora_A" in key:  # W + (alpha / rank) B A
            base.transformer.get_submodule(key.split(".lora_A")[0]).weight.data += (
                64 / 8 * weights[key.replace("lora_A", "lora_B")] @ weights[key]
            )
    assert (stacked - latents(base, "", tmp_path / "two")).abs().max() < 1e-4 * stacked.abs().max()
    with torch.no_grad():
        (picture,) = sample.as_saved(base.decode(stacked))
    drawn, _ = pictures.read_picture(tmp_path / "both/out/00000.png")
    assert torch.equal(drawn, picture)  # the program draws that very picture
