"""README.md and docs/*.md: their commands parse, what they name is there, and their diffs apply and train."""

import ast
import functools
import importlib
import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cold_start import generator_loss
from gaussian import close
from helpers import BASE, ROOT, TINY, good, here, load, log_of
from tiny import CATEGORIES
from tools import ablations, long

# docs/mutants.md is written by tools.mutants.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.name != "mutants.md"
}
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*.py", "tools/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
}
MODULES = [name.removesuffix(".py") for name in SOURCES if "/" not in name]
# Of torchrun and of tests/crash.py.
FOREIGN_FLAGS = {"nproc_per_node", "nnodes", "rdzv-endpoint", "shutdown_timeout", "crash"}
FILE_ENDINGS = ("bin", "py", "pt", "png", "json", "jsonl", "safetensors")
ALL_PAGES = pytest.mark.parametrize("page", PAGES)


def prose(text):
    """A page without its blocks of code, which have tests of their own."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@functools.cache
def defined_in(module):
    """The names that a module defines at its top level, by its source."""
    names = set()
    for node in ast.parse(SOURCES[f"{module}.py"]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = (name for target in node.targets for name in ast.walk(target))
            names.update(name.id for name in targets if isinstance(name, ast.Name))
    return names


def declares_flags(name):
    return re.search(r"^def arguments\(\)", SOURCES[name], re.M)


def known_flags():
    """The flags that the programs and the tools name."""
    code = "\n".join(
        text for name, text in SOURCES.items() if not name.startswith(("tests/", "tools/faults"))
    )
    return set(re.findall(r"""["']--([a-z]\w*)["']""", code)) | FOREIGN_FLAGS


# ---- commands ------------------------------------------------------------------------------------
def commands_of(text):
    """Every command in an indented block or within backticks."""
    first_words = r"(?:python3?|\.venv/bin/python|torchrun|make|source|git|pip)"
    blocks = re.findall(rf"^    ({first_words} .*)$", text, re.M)
    inline = re.findall(rf"`({first_words} [^`]*)`", text)
    for line in [*blocks, *inline]:
        yield from " ".join(line.split()).split(" && ")


def commands():
    texts = list(PAGES.values())
    for source in SOURCES.values():
        texts.append(ast.get_docstring(ast.parse(source), clean=False) or "")
    found = {command for text in texts for command in commands_of(text)}
    return sorted(command for command in found if "tools.NAME" not in command)


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).is_file()
        return
    if "-m" in words and words[words.index("-m") + 1] in ("venv", "pytest"):
        return
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if "-m" in words:
        script = words.index("-m") + 1
        program = words[script].replace(".", "/") + ".py"
    elif script is not None:
        program = words[script]
    else:
        assert words[0] in ("source", "git", "torchrun")
        return
    assert program in SOURCES
    if not declares_flags(program):
        flags = {word[2:] for word in words if word.startswith("--")}
        assert flags - known_flags() == set()
        return
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    # no run is there whose settings would be looked up, and no hub
    monkeypatch.setattr(module, "find_weights", lambda *_, **__: "", raising=False)
    monkeypatch.setattr(module, "like", lambda path: {"prompt": "x"}, raising=False)
    monkeypatch.setattr(sys, "argv", words[script:])
    monkeypatch.chdir(tmp_path)
    module.arguments()


def test_a_newcomer_finds_how_to_begin_within_sixty_lines():
    beginning = PAGES["README.md"].splitlines()[:60]
    assert "    pip install -r requirements.txt" in beginning
    assert "    torchrun --nproc_per_node=8 cold_start.py" in beginning
    assert len(PAGES["README.md"].splitlines()) <= 250


# ---- what the pages name -------------------------------------------------------------------------
@ALL_PAGES
def test_every_link_leads_to_a_file(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert "://" in link or (folder / link).is_file(), link


def test_the_readme_links_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"], page


@ALL_PAGES
def test_every_program_is_there(page):
    for name in re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)\b", prose(PAGES[page])):
        assert name in SOURCES, name


@ALL_PAGES
def test_every_function_is_there(page):
    for module, name in re.findall(r"`(\w+)\.(\w+)", prose(PAGES[page])):
        if module in MODULES and name not in FILE_ENDINGS:
            assert name in defined_in(module), f"{module}.{name}"


@ALL_PAGES
def test_every_tool_is_there(page):
    for name in re.findall(r"\btools\.(\w+)", PAGES[page]):
        assert f"tools/{name}.py" in SOURCES, name


@ALL_PAGES
def test_every_other_name_stands_in_the_code(page):
    """Names in backticks: functions inside of functions, numbers of the log, rewards, flags' values."""
    code = "\n".join(SOURCES.values())
    known = set(re.findall(r"\w+", code))
    commands = set(re.findall(r"\w+", " ".join(commands_of(PAGES[page]))))
    for name in re.findall(r"`([a-z]\w*)`", prose(PAGES[page])):
        assert name in known | commands or f"test_{name}" in code or names_a_test(name), name


def names_a_test(name):
    """Whether this is part of exactly one test's name, as `pytest -k` takes it."""
    tests = set(re.findall(r"^def (test_\w+)", "\n".join(SOURCES.values()), re.M))
    return sum(name in test for test in tests) == 1


@ALL_PAGES
def test_every_test_is_there(page):
    named = re.findall(r"\b[Tt]ests?:? ((?:`\w+`(?:,\s+)?)+)", prose(PAGES[page]))
    names = [name for group in named for name in re.findall(r"`(\w+)`", group)]
    if page == "README.md":
        table = PAGES[page].split("## From the paper to the code")[1].split("\n| where")[0]
        names += re.findall(r"^\| [A-Z].*\| `(\w+)` \|$", table, re.M)
        assert len(names) > 20
    for name in names:
        assert names_a_test(name), name


@ALL_PAGES
def test_every_flag_is_there(page):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", PAGES[page]))
    assert named - known_flags() == set()


@ALL_PAGES
def test_every_variant_is_there(page):
    known = set(re.findall(r'^    "(\w+)":', SOURCES["variants.py"], re.M))
    for names in re.findall(r"--variant ([a-z][\w,]*)", PAGES[page]):
        assert set(names.split(",")) <= known, names


# ---- numbers and pictures ------------------------------------------------------------------------
def rows_of(text):
    """The tables of a text -> lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_laptops_scoreboard_is_the_one_in_assets():
    text = PAGES["docs/results.md"].split("<!-- table -->")[1].split("<!-- /table -->")[0]
    _, _, *written = rows_of(text)
    measured = json.loads((ROOT / "assets/report.json").read_text())["rows"]
    assert len(written) == len(measured)
    for row, numbers in zip(written, measured):
        assert row[0] == numbers["name"]
        assert row[3].strip("*") == f"{100 * numbers['checker']:.1f}"
        assert row[10] == f"{numbers['clipscore']:.3f}"


def long_rows():
    return json.loads((ROOT / "assets/results/long.json").read_text())["rows"]


def test_the_first_table_is_the_long_runs():
    _, _, *written = rows_of(PAGES["README.md"].split("## Install")[0])
    assert len(written) == 3
    for name, evaluations, *cells in written:
        of_seeds = long_rows()[name]
        assert evaluations == ("100" if "50 steps" in name else "4")
        expected = []
        for number, scale, digits in (("checker", 100, 1), ("clipscore", 1, 3), ("judge", 1, 3)):
            values = [scale * numbers[number] for numbers in of_seeds]
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            expected.append(f"{mean:.{digits}f} ± {deviation:.{digits}f}")
        assert cells == expected


def test_the_long_runs_table_is_the_one_in_assets():
    text = PAGES["docs/results.md"].split("<!-- long -->")[1].split("<!-- /long -->")[0]
    _, _, *written = rows_of(text)
    _, _, *made = rows_of(long.table_of(long_rows()))
    assert written == made


def test_the_long_runs_differences_are_those_of_assets():
    text = PAGES["docs/results.md"].split("<!-- /long -->")[1]
    (teacher,) = (rows for name, rows in long_rows().items() if "50 steps" in name)
    for name, scale, digits in (("checker", 100, 2), ("clipscore", 1, 4), ("judge", 1, 4)):
        pairs = zip(long_rows()["RTDMD, 4 steps"], teacher)
        gains = [scale * (ours[name] - theirs[name]) for ours, theirs in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        assert f"{statistics.fmean(gains):+.{digits}f} | {error:.{digits}f} |" in text


def test_the_gaps_to_the_teacher_are_those_of_assets():
    text = PAGES["docs/results.md"].split("<!-- gaps -->")[1].split("<!-- /gaps -->")[0]
    _, _, *written = rows_of(text)
    (teacher,) = (rows for name, rows in long_rows().items() if "50 steps" in name)
    assert [name for name, *_ in written] == ["AC-DMD, 4 steps", "RTDMD, 4 steps"]
    for name, *cells in written:
        expected = []
        for category in CATEGORIES:
            pairs = zip(long_rows()[name], teacher)
            gains = [100 * (ours[category] - theirs[category]) for ours, theirs in pairs]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            expected.append(f"{statistics.fmean(gains):+.1f} ± {error:.1f}")
        assert cells == expected


@pytest.mark.parametrize("table", ["students", "table3", "table4", "letter"])
def test_the_ablations_are_those_of_assets(table):
    text = PAGES["docs/results.md"].split(f"<!-- {table} -->\n")[1].split(f"<!-- /{table} -->")[0]
    content = json.loads((ROOT / f"assets/results/{table}.json").read_text())
    made = ablations.table_of(content)
    if table in ablations.CLAIMS:
        made += "\n" + ablations.claims_of(content)
    assert text == made


def test_the_curves_table_is_the_one_in_assets():
    curves = json.loads((ROOT / "assets/results/steps.json").read_text())["curves"]
    text = PAGES["docs/results.md"].split("<!-- steps -->")[1].split("<!-- /steps -->")[0]
    (_, *titles), _, *written = rows_of(text)
    assert titles == list(curves)
    of_titles = []
    for points in curves.values():
        of_titles.append({str(p["evaluations"]): f"{100 * p['checker']:.1f}" for p in points})
    for evaluations, *cells in written:
        assert cells == [numbers.get(evaluations, "") for numbers in of_titles]


def test_pictures_are_small():
    for name in ("sampler.png", "subgrpo.png", "subinterval.png"):
        assert (ROOT / "assets" / name).stat().st_size < 150_000
    assert (ROOT / "assets/hacking.png").stat().st_size < 200_000  # 96 pictures


# ---- the diffs: each is applied to a copy of the programs, which then runs
DIFFS = dict(
    re.findall(
        r"^## The ([\w-]+)[^\n]*$.*?^```diff\n(.*?)^```", PAGES["docs/change.md"], re.M | re.S
    )
)


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """The programs with one diff, as fresh modules -> {name: module}"""
    (file,) = re.findall(r"^\+\+\+ b/(.*)$", DIFFS[request.param], re.M)
    lines = DIFFS[request.param].split("@@\n", 1)[1].splitlines()
    assert len(lines) <= 10
    before = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
    after = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
    assert SOURCES[file].count(before) == 1
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / file).write_text(SOURCES[file].replace(before, after))
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


ONE_STEP = [*BASE, "--steps", 1, "--batch_size", 2, "--generator_every", 1]
ONE_EPOCH = [*BASE, "--epochs", 1, "--prompts_per_epoch", 1, "--group_size", 2]


@pytest.mark.parametrize("changed", ["sampler"], indirect=True)
def test_the_diff_of_the_sampler_keeps_the_schedule_and_trains(changed, tmp_path):
    # at level 1 x0 is -1 and eps 0; at level 0 eps is -1
    x = torch.zeros(1, 1, 1, 1)
    v = torch.ones(1, 1, 1, 1)
    _, mean, std = changed.cps.cps_step(x, v, 1.0, 0.5, 0.9)
    assert std.item() == pytest.approx(0.5 * 0.9**0.5)
    assert mean.item() == pytest.approx(-0.5)
    _, mean, _ = changed.cps.cps_step(x, -v, 0.0, 0.5, 0.9)
    # the noise's total variance is on schedule
    assert mean.item() ** 2 + std.item() ** 2 == pytest.approx(0.25)
    good(here(changed.cold_start, *ONE_STEP, "--out_dir", tmp_path / "out"))


@pytest.mark.parametrize("changed", ["reward"], indirect=True)
def test_the_diff_of_the_reward_trains_with_it(changed, run, tmp_path):
    flags = [*ONE_EPOCH, "--cold_start", run.cold, "--rewards", "colourful:1,clipscore:1"]
    good(here(changed.rtdmd_rl, *flags, "--out_dir", tmp_path / "out"))
    assert 0 < log_of(tmp_path / "out")[0]["reward_colourful"] < 1


@pytest.mark.parametrize("changed", ["backbone"], indirect=True)
def test_the_diff_of_the_backbone_trains_auraflows_transformer(changed, tmp_path):
    from diffusers import AuraFlowTransformer2DModel

    aura = tmp_path / "aura"
    shutil.copytree(TINY, aura)
    shutil.rmtree(aura / "transformer")
    AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ).save_pretrained(aura / "transformer")
    index = json.loads((TINY / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "AuraFlowTransformer2DModel"]
    (aura / "model_index.json").write_text(json.dumps(index))
    flags = [*ONE_STEP, "--pretrained", aura, "--out_dir", tmp_path / "out"]
    good(here(changed.cold_start, *flags))
    (line,) = log_of(tmp_path / "out")
    assert line["grad_fake"] > 0
    assert any("single_transformer_blocks" in key for key in load(tmp_path / "out/fake.pt"))


@pytest.mark.parametrize("changed", ["distribution-matching"], indirect=True)
def test_the_diff_of_the_distribution_matching_loss_weighs_the_steps_and_trains(changed, tmp_path):
    x = torch.randn(2, 4, 3, 3)
    s = torch.tensor([0.5, 0.9])
    t = torch.tensor([0.7, 0.95])
    noises = (torch.randn_like(x), torch.randn_like(x))
    inputs = (x, s, t, *noises, lambda x, t: x, lambda x, t: 2 * x, 0.9)
    expected = generator_loss(*inputs) * torch.tensor([4, 100])
    close(changed.cold_start.generator_loss(*inputs), expected, 1e-4)
    good(here(changed.cold_start, *ONE_STEP, "--out_dir", tmp_path / "out"))
