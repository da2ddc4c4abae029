"""Everything that a user may get wrong is refused in one line, with status 2 and nothing written."""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import cold_start
import rtdmd_rl
import sample
from helpers import (
    BASE,
    TINY,
    Code,
    flip,
    here,
    listing,
    load,
    random_adapter,
    shell,
    tiny_base,
)
from tools import ablations, bench, make_tiny, plots, scoreboard


def test_a_finetune_that_comes_without_t5_is_taken(run, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "tiny", copy_function=os.symlink)
    index = json.loads((TINY / "model_index.json").read_text())
    (tmp_path / "tiny/model_index.json").unlink()
    (tmp_path / "tiny/model_index.json").write_text(
        json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    base = tiny_base(tmp_path / "tiny")
    cold_start.note_prompts(base, [{"prompt": "a circle " * 50}, {"prompt": "a circle"}])
    embeds, pooled = base.encode(["a circle"])
    assert (
        base.pipe.text_encoder_3 is None
        and torch.isfinite(embeds).all()
        and "1 of 2 prompts are longer" in capsys.readouterr().err
    )


@pytest.fixture(scope="session")
def bad(run, tmp_path_factory):
    """A folder of everything that may be wrong -> {name in braces below: path}"""
    t = tmp_path_factory.mktemp("bad")
    code, script = Code(t / "proof"), f"open({str(t / 'proof')!r}, 'w')\n".encode()
    texts = {
        "empty.txt": b"",
        "blank.txt": b"\n \r\n\n",
        "binary.txt": bytes(range(256)),
        "utf16.txt": "a cat\n".encode("utf-16"),
        "json.jsonl": b'{"prompt": "a cat"}\n{"prompt": \n',
        "noprompt.jsonl": b'{"prompt": "a"}\n\n{"text": "b"}\n',
        "emptyprompt.jsonl": b'{"prompt": "  "}\n',
        "number.jsonl": b'{"prompt": 7}\n',
        "array.jsonl": b'["a cat"]\n',
        "file": b"",
        "surrogate.jsonl": b'{"prompt": "a \\ud800"}\n',
        "foreign.txt": b"a photo of a cat\n",
        "include.jsonl": b'{"prompt": "a", "include": 5}\n',
    }
    for name, content in texts.items():
        (t / name).write_bytes(content)
    torch.save(code, t / "prompts.txt")
    weights = random_adapter(t / "good/generator_ema.pt", 0)
    (t / "good/adapter_config.json").write_text(
        '{"r": 32, "lora_alpha": 64}'
    )  # else its alpha would be assumed, and a line say so
    first = next(iter(weights))

    def changed(value):
        return {**weights, first: value}

    for name, content in {
        "nokeys": {"net." + k: v for k, v in weights.items()},
        "half": dict(list(weights.items())[:9]),
        "list": [1],
        "code": code,
        "shape": changed(torch.zeros(32, 3)),
        "notensor": changed(3),
        "nan": changed(weights[first] * math.nan),
    }.items():
        (t / name).mkdir()
        for file in ("generator_ema.pt", "ckpt.pt"):
            torch.save(content, t / name / file)
    shutil.copytree(run.cold, t / "truncated")
    for file in ("generator_ema.pt", "ckpt.pt"):
        os.truncate(t / "truncated" / file, 5000)
    for name, file in (
        ("code_prev", "ckpt.prev.pt"),
        ("code_log", "log.jsonl"),
    ):  # the checkpoint beside it is whole
        shutil.copytree(run.cold, t / name)
        torch.save(code, t / name / file)
    (t / "code_prev/ckpt.pt").unlink()
    (t / "old").mkdir()
    ckpt = load(run.cold / "ckpt.pt")
    del ckpt["flags"]["eta"]
    torch.save(ckpt, t / "old/ckpt.pt")
    shutil.copytree(run.cold, t / "flipped")
    shutil.copy(run.cold / "ckpt.pt", t / "flipped/ckpt.prev.pt")
    flip(t / "flipped/ckpt.pt", os.path.getsize(run.cold / "ckpt.pt") // 2)
    flip(t / "flipped/generator_ema.pt", os.path.getsize(run.cold / "generator_ema.pt") // 2)
    line = b'{"step": 1, "seconds": 1, "images_per_s": 1}\n'
    logs = {"report_log": b"not json\n", "report_code": line, "report_line": b'{"seconds": 1}\n'}
    logs["report_null"] = b'{"step": 1, "seconds": null, "images_per_s": 1}\n'
    for name, content in logs.items():
        for stage in ("cold_start", "rtdmd"):
            (t / name / stage).mkdir(parents=True)
            (t / name / stage / "log.jsonl").write_bytes(content)
            torch.save(code, t / name / stage / "generator_ema.pt")
    for name, content in {
        "settings_json": "{",
        "settings_list": "[]",
        "settings_word": '{"num_steps": "four"}',
        "settings_range": '{"eta": 7}',
        "settings_path": '{"pretrained": 3}',
    }.items():
        shutil.copytree(t / "good", t / name)
        (t / name / "settings.json").write_text(content)
    shutil.copytree(t / "good", t / "mixed")
    (t / "mixed/fake.pt.tmp").touch()
    shutil.copytree(t / "good", t / "fakecode")
    torch.save(code, t / "fakecode/fake.pt")

    def pipeline(name, files):  # assets/tiny with some files replaced, or removed (None)
        shutil.copytree(TINY, t / name, copy_function=os.symlink)
        for file, content in files.items():
            (t / name / file).unlink(missing_ok=True)
            if isinstance(content, Code):
                torch.save(content, t / name / file)
            elif content is not None:
                (t / name / file).write_bytes(content)

    model, index = "diffusion_pytorch_model", json.loads((TINY / "model_index.json").read_text())
    pipeline(
        "halfmodel",
        {
            f"transformer/{model}.safetensors": (
                TINY / f"transformer/{model}.safetensors"
            ).read_bytes()[:10000]
        },
    )
    pipeline("noindex", {"model_index.json": b"{"})
    pipeline("code_safe", {f"transformer/{model}.safetensors": code})
    pipeline(
        "code_dit", {f"transformer/{model}.safetensors": None, f"transformer/{model}.bin": code}
    )
    pipeline("code_vae", {f"vae/{model}.safetensors": None, f"vae/{model}.bin": code})
    pipeline(
        "code_text",
        {"text_encoder/model.safetensors": None, "text_encoder/pytorch_model.bin": code},
    )
    pipeline("code_clip", {"clip/model.safetensors": None, "clip/pytorch_model.bin": code})
    pipeline(
        "code_pipe",
        {
            "mine.py": script,
            "model_index.json": json.dumps({**index, "_class_name": ["mine", "Mine"]}).encode(),
        },
    )
    pipeline(
        "code_part",
        {
            "transformer/mine.py": script,
            "model_index.json": json.dumps({**index, "transformer": ["mine", "Mine"]}).encode(),
        },
    )
    return {
        **{p.stem: p for p in t.iterdir()},
        "t": t,
        "cold": run.cold,
        "rl": run.rl,
        "tiny": TINY,
    }


C, R, S, T = cold_start, rtdmd_rl, sample, make_tiny
B, A, P, N = scoreboard, ablations, plots, bench

SAME = "--batch_size 5 --generator_every 2"  # as the run in {cold}

INPUTS = [  # program, flags, what the one line says
    (P, "curves {report_line}/rtdmd", "line 1 has no number of the name step"),
    (N, "{report_line}/rtdmd", "line 1 has no number of the name step"),
    (N, "{array}", "no readable log.jsonl"),
    (N, "{report_null}/rtdmd", "line 1 has no number of the name seconds"),
    (N, "{cold} --gpus 0", "--gpus must lie in"),
    (N, "{cold} --skip -2", "--skip must lie in"),
    (C, "--stepz 4", "--stepz"),
    (C, "--step 4", "--step 4"),
    (C, "--steps four", "'four'"),
    (C, "--preset sd9", "'sd9'"),
    (C, "stray", "stray"),
    (C, "--prompts {t}/none.txt", "none.txt: No such file"),
    (C, "--prompts {t}", "directory"),
    (C, "--prompts {empty}", "empty"),
    (C, "--prompts {blank}", "empty"),
    (C, "--prompts {binary}", "not UTF-8"),
    (C, "--prompts {utf16}", "not UTF-8"),
    (C, "--prompts {prompts}", "not UTF-8"),
    (C, "--prompts {json}", "json.jsonl, line 2"),
    (C, "--prompts {noprompt}", "line 3"),
    (C, "--prompts {emptyprompt}", "line 1"),
    (C, "--prompts {number}", "line 1"),
    (C, "--prompts {array}", "line 1"),
    (C, "--pretrained {t}/none/dir", "none/dir"),
    (C, "--pretrained nobody/nothing", "nobody/nothing"),
    (C, "--pretrained {tiny}/clip", "tiny/clip"),
    (C, "--pretrained {halfmodel}", "halfmodel"),
    (C, "--pretrained {noindex}", "noindex"),
    (C, "--pretrained {code_safe}", "code_safe"),
    (C, "--pretrained {code_dit}", "code_dit"),
    (C, "--pretrained {code_vae}", "code_vae"),
    (C, "--pretrained {code_pipe}", "custom code"),
    (C, "--pretrained {code_part}", "custom code"),
    (C, "--resolution 33", "divisible by 8"),
    (C, "--resolution 0", "--resolution"),
    (C, "--batch_size 0", "--batch_size"),
    (C, "--micro_batch -1", "--micro_batch"),
    (C, "--steps 0", "--steps"),
    (C, "--generator_every 0", "--generator_every"),
    (C, "--lora_rank 0", "--lora_rank"),
    (C, "--save_every 0", "--save_every"),
    (C, "--num_steps 0", "--num_steps"),
    (C, "--eta 1.1", "--eta"),
    (C, "--eta nan", "--eta"),
    (C, "--device cuda --preset sd35m", "--preset tiny"),
    (R, "--device cuda --preset sd35m", "--preset tiny"),
    (C, "--device toaster", "toaster"),
    (C, "--out_dir {file}/out", "--out_dir"),
    (R, "--out_dir {file}/out", "--out_dir"),
    (C, "--out_dir {cold}", "made with other flags"),
    (R, "--out_dir {rl}", "made with other flags"),
    (C, "--resume", "--resume"),
    (R, "--resume", "--resume"),
    (C, f"--out_dir {{cold}} {SAME} --lr 5e-4", "(--lr 0.001 -> 0.0005)"),
    (
        R,
        "--out_dir {rl} --cold_start {cold} --prompts_per_epoch 5 --gamma .5",
        "(--gamma 0.01 -> 0.5)",
    ),
    (C, f"--out_dir {{cold}} {SAME} --variant dmd2", "(--variant -> dmd2)"),
    (C, "--variant nonsense", "--variant nonsense: stage 1 knows printed_std"),
    (C, "--variant printed_std,group_std", "--variant group_std: stage 1 knows"),
    (R, "--variant dmd2", "--variant dmd2: stage 2 knows"),
    (R, "--cold_start {settings_json}", "settings.json is damaged"),
    (R, "--cold_start {settings_list}", "settings.json is no JSON object"),
    (R, "--cold_start {settings_word}", "num_steps 'four'"),
    (R, "--cold_start {settings_range}", "eta 7"),
    (R, "--cold_start {settings_path}", "pretrained 3"),
    (C, "--out_dir {truncated}", "damaged"),
    (C, "--out_dir {code}", "not a file of tensors"),
    (R, "--out_dir {code}", "not a file of tensors"),
    (R, "--cold_start {t}/none/dir", "stage 1"),
    (R, "--cold_start nobody/nothing", "nobody/nothing"),
    (R, "--cold_start {shape}", "x 3 there"),
    (R, "--cold_start {nokeys}", "23 of its 23 modules"),
    (R, "--cold_start {half}", "lora_A and no lora_B"),
    (R, "--cold_start {list}", "holds no adapter"),
    (R, "--cold_start {truncated}", "damaged"),
    (R, "--cold_start {code}", "not a file of tensors"),
    (R, "--cold_start {fakecode}", "fake.pt"),
    (R, "--rewards beauty", "clipscore"),
    (R, "--rewards clipscore:much", "'much'"),
    (R, "--rewards ,", "unknown"),
    (R, "--rewards pickscore", "pickscore"),
    (R, "--rewards judge", "judge"),
    (R, "--reward_path clipscore={t}/none", "no such file"),
    (R, "--reward_path clipscore", "name=DIRECTORY"),
    (R, "--eval_rewards judge:2", "names alone"),
    (R, "--subset 0", "--subset"),
    (R, "--subset 4", "--subset"),
    (R, "--num_steps 1", "--policy_weight 0"),
    (R, "--lr inf", "--lr must lie in"),
    (R, "--prompts {empty}", "empty"),
    (S, "", "prompt"),
    (S, "'  '", "prompt"),
    (S, "cat dog", "dog"),
    (S, "cat --prompts {empty}", "a prompt and a file of prompts"),
    (S, "cat --cfg inf", "--cfg must lie in"),
    (S, "cat --stepz 4", "--stepz"),
    (S, "--prompts {empty}", "empty"),
    (S, "cat --steps 0", "--steps"),
    (S, "cat --num_images 0", "--num_images"),
    (S, "cat --eta 2", "--eta"),
    (S, "cat --resolution 20", "divisible"),
    (S, "cat --device cuda --preset sd35m", "--preset tiny"),
    (S, "cat --out_dir {file}/out", "--out_dir"),
    (S, "cat --cold_start {t}/none/dir", "none/dir"),
    (S, "cat --rtdmd {t}/none/dir", "none/dir"),
    (S, "cat --cold_start {nokeys}", "23 of its 23 modules"),
    (S, "cat --rtdmd {half}", "lora_A and no lora_B"),
    (S, "cat --cold_start {list}", "holds no adapter"),
    (S, "cat --cold_start {truncated}", "damaged"),
    (S, "cat --cold_start {code}", "not a file of tensors"),
    (S, "cat --rtdmd {code}", "not a file of tensors"),
    (S, "cat --pretrained {halfmodel}", "halfmodel"),
    (C, "--preset", "--preset"),
    (C, "--variant nonsense", "stage 1 knows"),
    (C, "--variant gaussian_log_prob", "stage 1 knows"),
    (R, "--variant dmd2", "stage 2 knows"),
    (C, "--lr nan", "--lr"),
    (C, "--gamma nan", "--gamma"),
    (C, "--ema 2", "--ema"),
    (C, "--device mps", "mps"),
    (C, "--resolution 2048", "--resolution"),
    (C, "--prompts {surrogate}", "line 1"),
    (C, "--pretrained {code_text}", "code_text"),
    (C, "--out_dir {nokeys}", "ckpt.pt"),
    (C, "--out_dir {list}", "ckpt.pt"),
    (R, "--cold_start {notensor}", "generator_ema.pt"),
    (R, "--cold_start {nan}", "generator_ema.pt"),
    (R, "--reward_path clipscore={code_clip}/clip", "clipscore"),
    (R, "--rewards checker:nan", "number"),
    (R, "--group_size 0", "--group_size"),
    (R, "--prompts_per_epoch 0", "--prompts_per_epoch"),
    (R, "--ema_every 0", "--ema_every"),
    (R, "--epochs 0", "--epochs"),
    (R, "--prompts {foreign}", "checker"),
    (R, "--prompts {include}", "include"),
    (S, "cat --seed 99999999999999999999", "--seed"),
    (S, "cat --cold_start {nan}", "generator_ema.pt"),
    (R, "--cold_start ''", "generator_ema.pt"),
    (C, "--device meta", "meta"),
    (C, "--num_steps 18", "--num_steps"),
    (R, "--eta 0", "--eta"),
    (R, "--rewards clipscore,clipscore:2", "twice"),
    (C, "--out_dir {cold} --lora_rank 16", "--lora_rank 32 -> 16"),
    (C, "--out_dir {rl}", "another version"),
    (R, "--out_dir {cold}", "another version"),
    (C, f"--out_dir {{old}} {SAME}", "another version"),
    (C, "--out_dir {code_prev}", "ckpt.prev.pt: damaged"),
    (C, f"--out_dir {{code_log}} {SAME}", "log.jsonl is damaged"),
    (C, f"--out_dir {{flipped}} {SAME}", "flipped/ckpt.pt to go on from the one before it"),
    (R, "--cold_start {flipped}", "a checksum is wrong"),
    (S, "cat --cold_start {flipped}", "a checksum is wrong"),
    (R, "--cold_start {mixed}", "different steps"),
    (S, "cat --cold_start {mixed}", "different steps"),
    (T, "--stepz 4", "--stepz"),
    (T, "stray", "stray"),
    (T, "--seed four", "'four'"),
    (T, "--seed -1", "--seed"),
    (T, "--seed 99999999999999999999", "--seed"),
    (T, "--device toaster", "toaster"),
    (T, "--device cuda", "CUDA"),
    (T, "--device mps", "mps"),
    (T, "--device meta", "meta"),
    (T, "--out_dir ''", "--out_dir"),
    (T, "--out_dir {file}/out", "--out_dir"),
    (T, "--random sd35m {file}/out", "file/out"),
    (T, "--random sd35m ''", "must not be empty"),
    (T, "--random sd99 out", "knows sd35m"),
    (B, "{t} --pictures 0", "positive"),
    (B, "{t}/none", "cold_start/ holds no finished run"),
    (B, "{good}", "no finished run"),
    (B, "{report_log}", "no readable log.jsonl"),
    (B, "{report_code}", "not a file of tensors"),
    (B, "{report_code} --pretrained {t}/none/dir", "none/dir"),
    (B, "{report_code} --pretrained {code_dit}", "code_dit"),
    (A, "table5", "table5"),
    (A, "--seeds 0", "positive"),
    (A, "--out_dir {file}/out", "file/out"),
    (P, "", "what"),
    (P, "curves {t}/none", "log.jsonl"),
    (P, "figures {t} {t}", "one tiny run"),
    (P, "hacking {t}", "stages 2"),
]

SHORT = {
    C: "--sample_every 0 --steps 1 --batch_size 2",
    R: "--sample_every 0 --epochs 1 --prompts_per_epoch 1 --group_size 2 --cold_start {good}",
    S: "--cold_start {good} --rtdmd ''",
    T: "",
    B: "",
    A: "",
    P: "",
    N: "",
}  # should an input be taken after all, then at least not for long


def refused(run_it, program, flags, message, bad, tmp_path):
    """One line on stderr that says what is wrong, exit status 2, no file written, no code in a file run."""
    flags = [
        *([] if program is N else BASE[2 * (program in (T, B, A, P)) : 4]),
        *([] if program in (B, N) else ["--out_dir", tmp_path / "out"]),
        *shlex.split(f"{SHORT[program]} {flags}".format(**bad)),
    ]
    out = tmp_path / "out"
    if "--out_dir" in flags:
        out = Path(flags[-flags[::-1].index("--out_dir")])
    before = listing(out)
    status, _, err = run_it(program, *flags)
    assert (
        status == 2
        and err.count("\n") == 1
        and err.startswith(f"{program.__name__.removeprefix('tools.')}.py: error: ")
        and message in err
    ), err
    assert listing(out) == before and not (bad["t"] / "proof").exists()


@pytest.mark.parametrize(
    "program, flags, message", [pytest.param(*x, id=f"{x[0].__name__} {x[1]}") for x in INPUTS]
)
def test_bad_input_is_refused_in_one_line_with_status_2_and_nothing_written(
    bad, tmp_path, program, flags, message
):
    refused(here, program, flags, message, bad, tmp_path)


@pytest.mark.parametrize(
    "program, flags, message",
    [
        (C, "--stepz 4", "--stepz"),
        (R, "--cold_start {code}", "not a file of"),
        (T, "--device toaster", "toaster"),
    ],
)
def test_a_real_command_line_is_refused_in_the_same_way(bad, tmp_path, program, flags, message):
    refused(shell, program, flags, message, bad, tmp_path)


def test_a_refused_command_leaves_none_of_the_folders_that_it_made(run, tmp_path):
    """And those that were there, also where they are empty."""
    (tmp_path / "mine").mkdir()
    flags = [*BASE, "--cold_start", run.cold, "--rewards", "judge"]
    status, _, err = shell(rtdmd_rl, *flags, "--out_dir", tmp_path / "mine/a/b")
    assert status == 2
    assert "judge" in err
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("name", ["log.jsonl", "fake.pt", "settings.json"])
def test_a_directory_with_the_name_of_a_runs_file_is_found_before_training(name, tmp_path):
    (tmp_path / name).mkdir()
    flags = [*BASE, *SHORT[C].split(), "--out_dir", tmp_path]
    status, _, err = here(cold_start, *flags)
    assert status == 2
    assert err.count("\n") == 1
    assert f"{name} is a directory" in err
