"""What the two loops hand to their parts: noise levels, averages, ratios, prompts.

Each of these tests notices a fault of tools/faults.py that the oracle and all other tests let pass.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import cold_start
import cps
import model
import prompts
import rewards
import rtdmd_rl
import sample
from helpers import TINY, tiny_base, unswapped

COMMON = ["--preset", "tiny", "--device", "cpu", "--sample_every", "0"]
STAGE_1 = [*COMMON, "--steps", "1", "--batch_size", "2", "--generator_every", "1"]
STAGE_2 = [*COMMON, "--prompts_per_epoch", "2", "--group_size", "3", "--rewards", "clipscore"]


def run(program, *flags):
    """main() of a program with these flags, in this process."""
    torch.set_num_threads(1)
    with unswapped(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
        program.main()


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """What one step of stage 1 leaves."""
    out_dir = tmp_path_factory.mktemp("cold") / "out"
    run(cold_start, *STAGE_1, "--out_dir", out_dir)
    return out_dir


def tiny_args(**more):
    preset = cold_start.PRESETS["tiny"]
    return SimpleNamespace(**{**preset, "seed": 0, "lora_rank": 4, "lora_alpha": 8, **more})


# ---- noise levels
def levels_handed_to_rollout(monkeypatch, module):
    """-> a list that fills up with the `levels` of the module's calls of `rollout`"""
    seen = []
    real_rollout = module.rollout

    def rollout(velocity, x, levels, *rest):
        seen.append(levels)
        return real_rollout(velocity, x, levels, *rest)

    monkeypatch.setattr(module, "rollout", rollout)
    return seen


def other_shift(monkeypatch, shift=2.0):
    """From now on every base model's scheduler says this time shift."""
    real_load_pipeline = model.load_pipeline

    def load_pipeline(*inputs, **options):
        family, pipe = real_load_pipeline(*inputs, **options)
        pipe.scheduler.register_to_config(shift=shift)
        return family, pipe

    monkeypatch.setattr(model, "load_pipeline", load_pipeline)


def test_the_bases_shift_reaches_the_rollout_of_stage_1_and_its_previews(tmp_path, monkeypatch):
    other_shift(monkeypatch)
    in_the_loop = levels_handed_to_rollout(monkeypatch, cold_start)
    in_previews = levels_handed_to_rollout(monkeypatch, model)
    more = ["--sample_every", 1, "--out_dir", tmp_path / "out"]
    run(cold_start, *STAGE_1, *more)
    levels = cps.sigmas(4, 2.0)
    assert in_previews == [levels]
    (executed,) = in_the_loop  # the first k steps
    assert len(executed) > 1
    assert executed == levels[: len(executed)]


def test_the_bases_shift_reaches_the_rollout_of_stage_2(cold, tmp_path, monkeypatch):
    """Its steps are taken one by one: the levels are those that the sampler is called with."""
    seen = []
    other_shift(monkeypatch)
    real_step = rtdmd_rl.cps_step

    def cps_step(x, v, sigma, sigma_next, *rest):
        if not torch.is_grad_enabled():
            seen.append((sigma, sigma_next))
        return real_step(x, v, sigma, sigma_next, *rest)

    monkeypatch.setattr(rtdmd_rl, "cps_step", cps_step)
    more = ["--epochs", 1, "--cold_start", cold, "--out_dir", tmp_path / "out"]
    run(rtdmd_rl, *STAGE_2, *more)
    levels = cps.sigmas(4, 2.0)
    assert seen == list(zip(levels, levels[1:], strict=False))


def test_the_bases_shift_reaches_the_held_out_pictures(tmp_path, monkeypatch):
    seen = levels_handed_to_rollout(monkeypatch, rtdmd_rl)
    other_shift(monkeypatch)
    draw_held_out(tmp_path, ["a circle"])
    assert seen == [cps.sigmas(4, 2.0)]


# ---- stage 2's average
def test_stage_2_averages_the_weights_of_the_epoch_before_with_the_releases_decay(
    cold, tmp_path, monkeypatch
):
    """The decay is played by .25, at which a swap shows; a skipped update stops nothing."""
    asked, after = [], []
    real_update = rtdmd_rl.update

    def average_decay(decay, updates):
        asked.append((decay, updates))
        return 0.25

    def update(parameters, optimizer, skipped, name, loss):
        if name == "generator" and len(after) == 2:
            loss = loss * math.nan
        return real_update(parameters, optimizer, skipped, name, loss)

    def save_or_stop(run, epoch, last):
        generator = torch.cat([p.detach().flatten() for p in run.state["generator"]])
        average = torch.cat([p.flatten() for p in run.state["ema"]])
        after.append((generator, average))

    monkeypatch.setattr(rtdmd_rl, "average_decay", average_decay)
    monkeypatch.setattr(rtdmd_rl, "update", update)
    monkeypatch.setattr(checkpoint.Run, "save_or_stop", save_or_stop)
    more = ["--epochs", 4, "--ema", 0.7, "--ema_every", 2, "--cold_start", cold]
    run(rtdmd_rl, *STAGE_2, *more, "--out_dir", tmp_path / "out")
    generators, averages = zip(*after, strict=True)
    assert asked == [(0.7, 1), (0.7, 3)]  # decay, optimiser updates so far
    assert not torch.equal(generators[0], generators[1])
    assert torch.equal(generators[1], generators[2])  # skipped
    assert not torch.equal(generators[2], generators[3])
    for average in averages[:3]:  # the first one follows the weights, and is averaged with itself
        assert torch.allclose(average, generators[0], atol=1e-7)
    assert torch.allclose(averages[3], 0.25 * generators[0] + 0.75 * generators[2], atol=1e-7)


# ---- SubGRPO
def test_the_ratio_is_exactly_1_whatever_the_rollout_rounds(cold, tmp_path, monkeypatch):
    """The default: the denominator is not the rollout's, as it is with --variant rollout_log_prob."""
    logs = []
    real_log_prob, real_loss = rtdmd_rl.log_prob, rtdmd_rl.policy_loss

    def log_prob(x_next, mean, std=None):
        error = 0.0 if torch.is_grad_enabled() else 1.0
        return real_log_prob(x_next, mean, std) + error

    def policy_loss(log_p, old_log_p, *rest):
        logs.append((log_p.detach(), old_log_p))
        return real_loss(log_p, old_log_p, *rest)

    monkeypatch.setattr(rtdmd_rl, "log_prob", log_prob)
    monkeypatch.setattr(rtdmd_rl, "policy_loss", policy_loss)
    more = ["--epochs", 1, "--cold_start", cold, "--out_dir", tmp_path / "out"]
    run(rtdmd_rl, *STAGE_2, *more)
    assert len(logs) == 2
    for log_p, old_log_p in logs:
        assert torch.equal(log_p, old_log_p)


def test_an_epoch_without_any_advantage_still_learns_from_the_anchor(cold, tmp_path, monkeypatch):
    """No picture counts: 0 / 0 would be a nan, and the whole update would be skipped."""
    norms = []
    real_update = rtdmd_rl.update

    def constant(path, device, dtype, clip_l):
        return lambda images, prompts, metadata: torch.ones(len(images))

    def update(*inputs):
        norms.append(real_update(*inputs))
        return norms[-1]

    monkeypatch.setitem(rewards.REWARDS, "constant", (constant, False, ""))
    monkeypatch.setattr(rtdmd_rl, "update", update)
    more = ["--epochs", 1, "--rewards", "constant", "--cold_start", cold]
    run(rtdmd_rl, *STAGE_2, *more, "--out_dir", tmp_path / "out")
    assert len(norms) == 2
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


# ---- held-out pictures
def draw_held_out(folder, prompts):
    """-> the pictures on which rtdmd_rl.evaluate scores these prompts, drawn by the plain base"""
    args = tiny_args(micro_batch=4, num_steps=4, eta=0.9, low_memory=False)
    args.out_dir = str(folder)
    (folder / "samples").mkdir()
    seen = []

    def score(images, prompts, metadata):
        seen.append(images)
        return torch.zeros(len(images))

    score.name, score.models = "any", []
    base = tiny_base()
    for name in rtdmd_rl.STUDENT:
        base.add_adapter(name, 4, 8, 0)  # fresh ones: they change nothing
    rows = [{"prompt": prompt, "metadata": {}} for prompt in prompts]
    rtdmd_rl.evaluate(base, rows, [score], args, "eval")
    return torch.cat(seen)


def test_held_out_pictures_of_one_prompt_have_seeds_of_their_own(tmp_path):
    one, other = draw_held_out(tmp_path, ["a circle", "a circle"])
    assert (one - other).abs().max() > 0.01


def test_previews_show_the_adapters_that_they_are_asked_for(tmp_path):
    args = tiny_args(num_steps=4, eta=0.9, out_dir=str(tmp_path))
    (tmp_path / "samples").mkdir()
    base = tiny_base()
    base.add_adapter("generator", 4, 8, 0)
    for p in base.adapter("generator").values():
        torch.nn.init.constant_(p.data, 0.1)
    rows = [{"prompt": "a circle"}, {"prompt": "a red square"}]
    at_once = []
    real_decode = base.decode

    def decode(latents):
        at_once.append(len(latents))
        return real_decode(latents)

    base.decode = decode
    for name, adapters in (("base", []), ("again", []), ("generator", ["generator"])):
        model.preview(base, adapters, rows, args, name)
    assert at_once == 3 * 8 * [1]  # in the little memory that training leaves
    plain, again, generator = (
        (tmp_path / f"samples/{name}.png").read_bytes() for name in ("base", "again", "generator")
    )
    assert plain == again
    assert plain != generator


# ---- sample.py
A_CIRCLE = ["a circle", "--preset", "tiny", "--device", "cpu", "--cold_start", "", "--rtdmd", ""]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_picture_of_a_prompt_has_a_seed_of_its_own(batch_size, tmp_path, monkeypatch):
    """Whatever the batches: picture i is drawn from seed + i."""
    seeds = []
    real_noise_of = sample.noise_of

    def noise_of(these, *rest):
        seeds.extend(these)
        return real_noise_of(these, *rest)

    monkeypatch.setattr(sample, "noise_of", noise_of)
    more = ["--num_images", 3, "--seed", 5, "--batch_size", batch_size]
    run(sample, *A_CIRCLE, *more, "--out_dir", tmp_path / "out")
    assert seeds == [5, 6, 7]


def test_what_is_recorded_is_given_as_many_rows_as_pictures(tmp_path, monkeypatch):
    """So it says how many pictures its first pass had, while it compiles (model.Recorded.tell)."""
    rows = []

    def graphed(on, device, render):
        def noted(*inputs):
            rows.append(len(inputs[0]))
            return render(*inputs)

        return [noted]

    monkeypatch.setattr(sample, "graphed", graphed)
    more = ["--num_images", 3, "--batch_size", 2]
    run(sample, *A_CIRCLE, *more, "--out_dir", tmp_path / "out")
    assert rows == [2, 1]


# ---- resume
@pytest.mark.parametrize(("flag", "value"), [("--seed", 1), ("--lr", 0.5), ("--cfg", 9)])
def test_a_run_goes_on_with_its_own_flags_alone(flag, value, tmp_path, capsys):
    out_dir = tmp_path / "out"
    run(cold_start, *STAGE_1, "--out_dir", out_dir)
    before = (out_dir / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as end:
        run(cold_start, *STAGE_1, flag, value, "--out_dir", out_dir)
    assert end.value.code == 2
    assert flag in capsys.readouterr().err
    assert (out_dir / "ckpt.pt").read_bytes() == before


# ---- text, adapters, rewards
def test_cached_text_of_a_prompt_that_comes_twice(tmp_path):
    prompts = ["a circle", "a red square", "a circle", "two triangles"]
    plain = tiny_base().encode(prompts)
    base = tiny_base(cache_text=True)
    base.cache_texts(prompts, str(tmp_path / "text.bin"))
    cached = base.encode(prompts)
    for expected, found in zip(plain, cached, strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def test_each_adapter_has_a_start_of_its_own_and_always_the_same():
    def start(name, seed):
        base = tiny_base()
        base.add_adapter(name, 4, 8, seed)
        return next(iter(base.adapter(name).values()))

    assert torch.equal(start("generator", 0), start("generator", 0))
    assert not torch.equal(start("generator", 0), start("fake", 0))
    assert not torch.equal(start("generator", 0), start("generator", 1))


@pytest.mark.parametrize(
    ("name", "divisor"), [("clipscore", 100), ("pickscore", 26)], ids=["clipscore", "pickscore"]
)
def test_scores_of_a_clip_are_its_logits_over_the_releases_divisor(name, divisor, monkeypatch):
    model = SimpleNamespace(logit_scale=torch.tensor(100.0).log())
    image = torch.tensor([[0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0]])
    vit = SimpleNamespace(
        model=model,
        image_features=lambda images, pixels: image,
        text_features=lambda prompts: text,
    )
    monkeypatch.setattr(rewards, "clip", lambda *_: vit)
    loader, differentiable, _ = rewards.REWARDS[name]
    score = loader("path", "cpu", torch.float32, "clip_l")
    assert differentiable
    assert score(image, ["a circle"], [{}]).item() == pytest.approx(100 * 0.6 / divisor)


def test_clip_looks_again_at_pictures_that_changed_and_at_other_pixels_of_the_same():
    """It keeps the features of the last pictures, which several rewards ask for."""
    image_features = rewards.clip(str(TINY / "clip"), "cpu", torch.float32).image_features
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = image_features(images)
        padded = image_features(images, rewards.padded_pixels)
        assert torch.equal(image_features(images.clone()), first)
        assert torch.equal(image_features(images.clone(), rewards.padded_pixels), padded)
        assert not torch.allclose(first, padded)
        assert torch.equal(image_features(images), first)
        images.mul_(0.5)  # what is kept now is of these very pictures, as they were
        changed = image_features(images)
        assert not torch.allclose(changed, first)
        assert torch.equal(image_features(images.clone()), changed)


@pytest.mark.parametrize(
    ("read", "share"),
    [
        ("hello", 1.0),
        ("xxhelloxx", 1.0),  # it stands among other text
        ("hallo", 0.8),
        ("xhallo", 0.6),  # a letter too many before it counts
        ("hallox", 0.6),  # and one behind it
        ("ello", 0.8),
        ("", 0.0),
        ("zzzzzzzzzz", 0.0),  # not below 0
    ],
)
def test_ocrs_edit_distance_by_hand(read, share, monkeypatch):
    def engine(picture):
        return SimpleNamespace(txts=(read,) if read else None)

    package = SimpleNamespace(RapidOCR=lambda **_: engine)
    monkeypatch.setitem(sys.modules, "rapidocr", package)
    score = rewards.ocr("", "cpu", torch.float32, "")
    found = score(torch.zeros(1, 3, 8, 8), ['a sign that says "Hello"'], [{}])
    assert found.item() == pytest.approx(share)
    assert found.dtype == torch.float32


def test_the_rewards_with_a_gradient_are_those_of_the_release_and_its_like():
    with_gradient = {name for name, (_, yes, _) in rewards.REWARDS.items() if yes}
    looking_only = {"geneval", "geneval_soft", "ocr", "hpsv3", "geneval2", "checker"}
    expected = {"clipscore", "pickscore", "hpsv2", "imagereward", "aesthetic", "judge"}
    assert not with_gradient & looking_only
    assert with_gradient >= expected


def words_of(entry):
    """An "include" entry in words: a red circle, an apple."""
    words = " ".join(filter(None, (entry.get("color"), entry["class"])))
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def test_the_built_in_prompts_say_what_their_metadata_ask_for():
    for row in prompts.geneval_prompts(600):
        metadata = row["metadata"]
        include = metadata["include"]
        if metadata["tag"] == "position":
            relation, target = include[1]["position"]
            assert target == 0
            expected = f"{words_of(include[1])} {relation} {words_of(include[0])}"
        elif metadata["tag"] == "counting":
            continue  # test_prompts.py
        else:
            expected = " and ".join(words_of(entry) for entry in include)
        assert row["prompt"] == f"a photo of {expected}"


@pytest.mark.parametrize(
    ("module", "value"),
    [
        ("attn.to_q", 3.0),
        ("transformer_blocks.0.attn.to_q", 3.0),
        ("transformer_blocks.0.cross_attn.to_q", 1.0),  # only the end of a part of the name
        ("transformer_blocks.0.attn.to_q_extra", 1.0),  # only its beginning
    ],
)
def test_pefts_patterns_mean_whole_parts_of_a_modules_name(module, value):
    assert checkpoint.pattern_value({"attn.to_q": 3.0}, module, 1.0) == value
