"""The README: its commands parse, what it names is there, and its diffs apply and train."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import cold_start
import common
import cps
import export
import model
import prompts
import report
import rewards
import rtdmd_rl
import sample
import tiny
from cold_start import generator_loss
from gaussian import close
from helpers import BASE, README, ROOT, TINY, good, here, load, log_of

MODULES = {
    module.__name__: module
    for module in (
        checkpoint,
        cold_start,
        common,
        cps,
        export,
        model,
        prompts,
        report,
        rewards,
        rtdmd_rl,
        sample,
        tiny,
    )
}

PROGRAMS = {name: MODULES[name] for name in ("cold_start", "report", "rtdmd_rl", "sample", "tiny")}


def commands():
    """Every command in the README and in the programs' docstrings, in an indented block or within backticks."""
    for text in (README, *(module.__doc__ for module in MODULES.values())):
        found = re.findall(
            r"^    ((?:python3?|torchrun|make|source|git) .*)$", text, re.M
        ) + re.findall(r"`((?:python3?|torchrun|make) [^`]*)`", text)
        yield from (part for line in found for part in " ".join(line.split()).split(" && "))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_of_the_readme_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:2] == ["python", "-m"]:
        assert (
            words[2].startswith("tools.") and (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        )
    elif script is None:
        assert words[0] in ("source", "git", "torchrun", ".venv/bin/pip") or words[:3] == [
            "python3",
            "-m",
            "venv",
        ]
    elif words[script] == "tests/crash.py":
        assert words[script + 1] == "--crash" and int(words[script + 2])
    else:
        monkeypatch.setattr(sys, "argv", words[script:])
        PROGRAMS[words[script].removesuffix(".py")].arguments()


def test_every_file_link_function_and_flag_of_the_readme_is_there(capsys, monkeypatch):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 3 and all((ROOT / link).is_file() for link in links)
    assert [
        name
        for name in re.findall(r"(?<![\w/])(\w+\.(?:py|txt))\b", README)
        if not (ROOT / name).is_file()
    ] == []
    names = [
        (MODULES[module], name)
        for module, name in re.findall(r"`(\w+)\.(\w+)", README)
        if module in MODULES and name not in ("py", "json", "png", "safetensors")
    ]
    assert (
        len(names) > 30
        and [f"{module.__name__}.{name}" for module, name in names if not hasattr(module, name)]
        == []
    )
    for module in PROGRAMS.values():
        monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
        with pytest.raises(SystemExit):
            module.arguments()
    known = set(re.findall(r"--([a-z]\w*)", capsys.readouterr().out)) | {
        "nproc_per_node",
        "nnodes",
        "rdzv-endpoint",
        "shutdown_timeout",
        "crash",
    }
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)) - known == set()
    for marker in ("table", "ablations", "performance", "cost"):
        assert README.count(f"<!-- {marker} -->") == README.count(f"<!-- /{marker} -->") == 1
    assert all(
        (ROOT / "assets" / name).stat().st_size < 150_000
        for name in ("sampler.png", "subgrpo.png", "subinterval.png")
    )
    assert (ROOT / "assets/hacking.png").stat().st_size < 200_000  # 96 pictures


# ---- the README's diffs: each is applied to a copy of the programs, which then runs
DIFFS = dict(
    re.findall(
        r"^\*The ([\w-]+)[^\n]*\*.*?```diff\n(.*?)```",
        README.split("## Change it")[1].split("\n## ")[0],
        re.M | re.S,
    )
)


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """The programs with one diff, as fresh modules -> {name: module}"""
    (file,) = re.findall(r"^\+\+\+ b/(.*)$", DIFFS[request.param], re.M)
    lines = DIFFS[request.param].split("@@\n", 1)[1].splitlines()
    before, after = (
        "".join(line[1:] + "\n" for line in lines if line[:1] not in sign) for sign in "+-"
    )
    code = (ROOT / file).read_text()
    assert len(lines) <= 10 and code.count(before) == 1
    for module in MODULES.values():
        shutil.copy(module.__file__, tmp_path)
        monkeypatch.delitem(sys.modules, module.__name__)
    (tmp_path / file).write_text(code.replace(before, after))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.syspath_prepend(tmp_path)
    modules = {
        name: importlib.import_module(name)
        for name in ("cps", "rewards", "cold_start", "rtdmd_rl", "sample")
    }
    assert all(Path(module.__file__).parent == tmp_path for module in modules.values())
    yield SimpleNamespace(**modules)
    for name in MODULES:
        sys.modules.pop(name, None)


ONE_STEP, ONE_EPOCH = (
    [*BASE, "--steps", 1, "--batch_size", 2, "--generator_every", 1],
    [*BASE, "--epochs", 1, "--prompts_per_epoch", 1, "--group_size", 2],
)


@pytest.mark.parametrize("changed", ["sampler"], indirect=True)
def test_the_diff_of_the_sampler_keeps_the_schedule_and_trains(changed, tmp_path):
    x, v = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)  # at level 1 x0 is -1 and eps 0
    _, mean, std = changed.cps.cps_step(x, v, 1.0, 0.5, 0.9)
    assert std.item() == pytest.approx(0.5 * 0.9**0.5) and mean.item() == pytest.approx(-0.5)
    _, mean, _ = changed.cps.cps_step(x, -v, 0.0, 0.5, 0.9)  # at level 0 eps is -1
    assert mean.item() ** 2 + std.item() ** 2 == pytest.approx(
        0.25
    )  # the noise's total variance is on schedule
    good(here(changed.cold_start, *ONE_STEP, "--out_dir", tmp_path / "out"))


@pytest.mark.parametrize("changed", ["reward"], indirect=True)
def test_the_diff_of_the_reward_trains_with_it(changed, run, tmp_path):
    good(
        here(
            changed.rtdmd_rl,
            *ONE_EPOCH,
            "--cold_start",
            run.cold,
            "--rewards",
            "colourful:1,clipscore:1",
            "--out_dir",
            tmp_path / "out",
        )
    )
    assert 0 < log_of(tmp_path / "out")[0]["reward_colourful"] < 1


@pytest.mark.parametrize("changed", ["backbone"], indirect=True)
def test_the_diff_of_the_backbone_trains_auraflows_transformer(changed, tmp_path):
    from diffusers import AuraFlowTransformer2DModel

    shutil.copytree(TINY, tmp_path / "aura")
    shutil.rmtree(tmp_path / "aura/transformer")
    AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ).save_pretrained(tmp_path / "aura/transformer")
    index = json.loads((TINY / "model_index.json").read_text())
    (tmp_path / "aura/model_index.json").write_text(
        json.dumps({**index, "transformer": ["diffusers", "AuraFlowTransformer2DModel"]})
    )
    good(
        here(
            changed.cold_start,
            *ONE_STEP,
            "--pretrained",
            tmp_path / "aura",
            "--out_dir",
            tmp_path / "out",
        )
    )
    (line,) = log_of(tmp_path / "out")
    assert line["grad_fake"] > 0 and any(
        "single_transformer_blocks" in k for k in load(tmp_path / "out/fake.pt")
    )


@pytest.mark.parametrize("changed", ["distribution-matching"], indirect=True)
def test_the_diff_of_the_distribution_matching_loss_weighs_the_steps_and_trains(changed, tmp_path):
    x, s, t = torch.randn(2, 4, 3, 3), torch.tensor([0.5, 0.9]), torch.tensor([0.7, 0.95])
    inputs = (
        x,
        s,
        t,
        torch.randn_like(x),
        torch.randn_like(x),
        lambda x, t: x,
        lambda x, t: 2 * x,
        0.9,
    )
    close(
        changed.cold_start.generator_loss(*inputs),
        generator_loss(*inputs) * torch.tensor([4, 100]),
        1e-4,
    )
    good(here(changed.cold_start, *ONE_STEP, "--out_dir", tmp_path / "out"))
