"""--generator_pretrained: a second frozen transformer under the student's adapters."""

import json
from types import SimpleNamespace

import pytest
import torch

import cold_start
import rtdmd_rl
import sample
from checkpoint import BASES, settings_of, take_settings
from helpers import CPU, TINY, good, here, load, load_both, same_files, shell, tiny_base
from pictures import as_saved, read_picture
from test_backbones import ONE, SEEDS, TWO, distance, pipeline
from tools import evaluate, export

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def own(places, tmp_path_factory):
    """A klein of which everything is another one: only its transformer is to be used."""
    pipe = pipeline(places["klein"])
    g = torch.Generator().manual_seed(1)
    for p in pipe.transformer.parameters():
        p.data += 0.3 * p.std().nan_to_num() * torch.randn(p.shape, generator=g)
    pipe.vae.bn.running_mean += 0.5
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    folder = tmp_path_factory.mktemp("own")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def combined(places, own, tmp_path_factory):
    """What the student is drawn with, as one pipeline: the teacher's with the other transformer."""
    pipe = pipeline(places["klein"])
    pipe.transformer = pipeline(own).transformer
    folder = tmp_path_factory.mktemp("combined")
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(places, own, tmp_path_factory):
    """Both stages with a generator that has a base of its own."""
    out = tmp_path_factory.mktemp("trained")
    place = ["--pretrained", places["klein"], "--cfg", 3.5]
    good(here(cold_start, *ONE, *place, "--generator_pretrained", own, "--out_dir", out / "cold"))
    good(here(rtdmd_rl, *TWO, "--cold_start", out / "cold", "--out_dir", out / "rl"))
    return out


def velocity_of(base, adapters, cfg=1.0):
    x = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    return base.velocity(adapters, base.encode([PROMPT]), cfg)(x, 0.7)


def drawn(base, adapters, levels, eta, cfg=1.0):
    """The first picture of sample.py's own loop, as a file has it."""
    v = base.velocity(adapters, base.encode([PROMPT]), cfg)
    latents = sample.draw(v, SEEDS[:1], base.latent_shape, levels, eta, CPU)
    return as_saved(base.decode(latents))[0]


def test_the_student_stands_on_its_own_base_and_the_other_roles_on_the_teachers(places, own):
    base = tiny_base(places["klein"], generator_pretrained=own)
    for name in ("generator", "fake"):
        base.add_adapter(name, 4, 8, 0)  # B is 0: they change nothing yet
    teacher = velocity_of(tiny_base(places["klein"]), [])
    generator = velocity_of(tiny_base(own), [])
    assert (teacher - generator).abs().max() > 1e-2
    assert torch.equal(velocity_of(base, ["generator"]), generator)
    assert torch.equal(velocity_of(base, ["fake"]), teacher)
    assert torch.equal(velocity_of(base, []), teacher)
    guided = velocity_of(tiny_base(places["klein"]), [], 3.5)
    assert torch.equal(velocity_of(base, [], 3.5), guided)
    assert base.generator.pipe.vae is base.pipe.vae  # all but the transformer is there once


def test_an_adapter_acts_and_learns_in_its_own_transformer_alone(places, own):
    base = tiny_base(places["klein"], generator_pretrained=own)
    for name in ("generator", "fake"):
        base.add_adapter(name, 4, 8, 0)
    student, fake = base.train_only("generator", "fake")
    trained = [
        sum(p.numel() for p in transformer.parameters() if p.requires_grad)
        for transformer in base.transformers()
    ]
    assert trained == [fake.numel(), student.numel()]
    velocity_of(base, ["generator"]).square().sum().backward()
    assert student.grad.norm() > 0
    assert not fake.grad.any()
    before = velocity_of(base, ["fake"])
    student.data += 0.1
    assert torch.equal(velocity_of(base, ["fake"]), before)


@pytest.mark.parametrize("more", [[], ["--low_memory"]])
def test_the_teachers_own_base_given_twice_trains_the_same(more, places, tmp_path):
    """Two copies of one transformer in place of one that plays all roles: to the byte."""
    place = ["--pretrained", places["klein"], "--cfg", 3.5, *more]
    for name, flags in (("one", []), ("two", ["--generator_pretrained", places["klein"]])):
        out = tmp_path / name
        good(here(cold_start, *ONE, *place, *flags, "--out_dir", out / "cold"))
        stage_2 = [*TWO, *more, "--cold_start", out / "cold", "--out_dir", out / "rl"]
        good(here(rtdmd_rl, *stage_2))
    for stage in ("cold", "rl"):
        assert same_files(tmp_path / "one" / stage, tmp_path / "two" / stage)


def test_two_processes_train_the_same_adapters(trained, places, own, tmp_path):
    place = ["--pretrained", places["klein"], "--cfg", 3.5, "--generator_pretrained", own]
    good(shell(cold_start, *ONE, *place, "--cache_text", "--out_dir", tmp_path, processes=2))
    for name in ("generator_ema.pt", "fake.pt"):
        assert distance(tmp_path, trained / "cold", name) < 1e-2


def test_stage_2_takes_it_from_stage_1_and_a_run_does_not_go_on_with_another(trained, places, own):
    settings = json.loads((trained / "rl/settings.json").read_text())
    assert settings["generator_pretrained"] == own
    flags = [*TWO, "--cold_start", trained / "cold", "--out_dir", trained / "rl"]
    for another in (places["klein"], ""):
        status, _, err = here(rtdmd_rl, *flags, "--generator_pretrained", another)
        assert status == 2
        assert "pretrained or cold_start content" in err


def test_pictures_are_drawn_on_the_generators_base_and_the_teachers_on_its_own(
    trained, places, combined, tmp_path
):
    both = ["--cold_start", trained / "cold", "--rtdmd", trained / "rl", "--device", "cpu"]
    flags = [PROMPT, "--seed", SEEDS[0], *both, "--out_dir", tmp_path]
    good(here(sample, *flags))
    good(here(sample, *flags, "--teacher", "--steps", 3))
    base = tiny_base(combined)
    adapters = load_both(base, trained / "cold", trained / "rl")
    student = drawn(base, adapters, base.sigmas(4), 0.9)
    base = tiny_base(places["klein"])
    teacher = drawn(base, [], sample.teacher_levels(base, 3), 0.0, 3.5)
    for number, picture in enumerate((student, teacher)):
        found, _ = read_picture(tmp_path / f"{number:05d}.png")
        assert (found - picture).abs().max() < 0.5 / 255
    assert (student - teacher).abs().max() > 0.1


def test_tools_evaluate_compares_with_the_teachers_own_pictures(
    trained, places, combined, tmp_path
):
    flags = [
        PROMPT,
        "--seed",
        SEEDS[0],
        "--cold_start",
        trained / "cold",
        "--rtdmd",
        "",
        "--compare",
    ]
    flags += ["--device", "cpu", "--rewards", "clipscore", "--out_dir", tmp_path]
    good(here(evaluate, *flags, "--reward_path", f"clipscore={TINY}/clip"))
    base = tiny_base(places["klein"])
    expected = drawn(base, [], sample.teacher_levels(base, 50), 0.0, 3.5)
    found, _ = read_picture(tmp_path / "teacher/00000.png")
    assert (found - expected).abs().max() < 0.5 / 255
    base = tiny_base(combined)
    adapters = load_both(base, trained / "cold", "")
    expected = drawn(base, adapters, base.sigmas(4), 0.9)
    found, _ = read_picture(tmp_path / "00000.png")
    assert (found - expected).abs().max() < 0.5 / 255


def test_another_kind_of_pipeline_is_refused_in_one_line(places, tmp_path):
    flags = [*ONE, "--pretrained", places["klein"], "--generator_pretrained", places["flux1"]]
    status, _, err = here(cold_start, *flags, "--out_dir", tmp_path)
    assert status == 2
    assert err.count("\n") == 1
    assert f"--generator_pretrained {places['flux1']}" in err
    assert "it is a FluxPipeline, and --pretrained is a Flux2KleinPipeline" in err


def test_a_transformer_of_other_shapes_is_refused_in_one_line(places, tmp_path):
    """Before the first step, and not when the first checkpoint is written."""
    pipe = pipeline(places["klein"])
    pipe.transformer = type(pipe.transformer).from_config(
        {**pipe.transformer.config, "num_single_layers": 1}
    )
    pipe.save_pretrained(tmp_path / "other")
    flags = [*ONE, "--pretrained", places["klein"]]
    flags += ["--generator_pretrained", tmp_path / "other", "--out_dir", tmp_path / "out"]
    status, _, err = here(cold_start, *flags)
    assert status == 2
    assert err.count("\n") == 1
    assert "has other shapes than that of --pretrained" in err


def taken(settings, folder, capsys):
    """What settings.json makes of a preset's generator_pretrained -> (it, what is said)."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(settings))
    args = SimpleNamespace(pretrained="", generator_pretrained="the/presets")
    take_settings(args, str(folder / "generator_ema.pt"), BASES)
    return args.generator_pretrained, capsys.readouterr().err


def test_the_settings_of_a_run_decide_whether_the_generator_has_a_base_of_its_own(tmp_path, capsys):
    old = {"pretrained": "owner/base"}  # of before there was such a thing
    assert taken(old, tmp_path / "old", capsys) == ("", "")
    shared = {**old, "generator_pretrained": ""}
    assert taken(shared, tmp_path / "shared", capsys) == ("", "")
    other = {**old, "generator_pretrained": "owner/other"}
    assert taken(other, tmp_path / "other", capsys) == ("owner/other", "")
    unnamed = {**old, "generator_pretrained": None}
    assert taken(unnamed, tmp_path / "unnamed", capsys) == ("the/presets", "")


def test_an_export_draws_on_the_generators_base_and_names_both_where_they_are_public(
    trained, places, own, tmp_path, monkeypatch
):
    flags = [tmp_path / "out", "--cold_start", trained / "cold", "--rtdmd", trained / "rl"]
    good(here(export, *flags, "--device", "cpu"))
    pipe = pipeline(own)
    pipe.load_lora_weights(tmp_path / "out")  # raises where a matrix has no place
    for stage in ("cold_start", "rtdmd"):
        settings = settings_of(str(tmp_path / "out" / stage / "generator_ema.pt"))
        assert settings["pretrained"] is None
        assert settings["generator_pretrained"] is None
    exported = ["--cold_start", tmp_path / "out", "--rtdmd", "", "--device", "cpu"]
    place = ["--pretrained", places["klein"], "--out_dir", tmp_path / "pictures"]
    status, _, err = here(sample, PROMPT, *exported, *place)
    assert status == 0
    assert "does not name: --generator_pretrained does" in err
    monkeypatch.setattr(
        "sys.argv", ["export.py", str(tmp_path / "new"), "--preset", "klein4b", "--rtdmd", ""]
    )
    args = sample.settled(export.arguments(), {})
    settings = export.sampling_settings(args)
    assert settings["pretrained"] == "black-forest-labs/FLUX.2-klein-base-4B"
    assert settings["generator_pretrained"] == "black-forest-labs/FLUX.2-klein-4B"
    assert export.public_name(args) == "black-forest-labs/FLUX.2-klein-4B"


def test_a_merged_export_is_a_base_of_its_own(trained, own, tmp_path):
    flags = ["--cold_start", trained / "cold", "--rtdmd", trained / "rl", "--device", "cpu"]
    good(here(export, tmp_path / "merged", "--merged", *flags))
    good(here(sample, PROMPT, "--seed", SEEDS[0], *flags, "--out_dir", tmp_path / "apart"))
    none = ["--cold_start", "", "--rtdmd", "", "--device", "cpu"]
    # with a preset that has a generator of its own, which this base replaces
    place = ["--preset", "klein4b", "--pretrained", tmp_path / "merged"]
    good(here(sample, PROMPT, "--seed", SEEDS[0], *place, *none, "--out_dir", tmp_path / "whole"))
    one, _ = read_picture(tmp_path / "apart/00000.png")
    other, _ = read_picture(tmp_path / "whole/00000.png")
    assert (one - other).abs().max() < 1.5 / 255


def test_the_adapters_of_a_run_differ_from_those_on_a_shared_base(trained, places, tmp_path):
    """The flag changes what is learnt: the comparison to the byte above can fail."""
    place = ["--pretrained", places["klein"], "--cfg", 3.5]
    good(here(cold_start, *ONE, *place, "--out_dir", tmp_path))
    shared = load(tmp_path / "fake.pt")
    apart = load(trained / "cold/fake.pt")
    assert any(not torch.equal(shared[key], apart[key]) for key in shared)
