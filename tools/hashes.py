"""What a refactoring must not change: the bytes that short CPU runs of all three programs leave.

    python -m tools.hashes            # prints a line a file; compare with those of another commit

Four steps of stage 1, two epochs of stage 2 and one picture at tiny size: by the default recipe and by
--paper, in one process and in two. On one machine the same commit gives the same lines.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "images_per_s", "peak_gib")
COMMON = ["--preset", "tiny", "--device", "cpu", "--sample_every", "0"]
COLD = [
    *COMMON,
    "--steps",
    "4",
    "--batch_size",
    "6",
    "--micro_batch",
    "2",
    "--generator_every",
    "2",
]
RL = [
    *COMMON,
    "--epochs",
    "2",
    "--prompts_per_epoch",
    "3",
    "--group_size",
    "4",
    "--micro_batch",
    "2",
]


def run(program, flags, processes=1):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(ROOT / program), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def numbers_of(log):
    """A log.jsonl without what measures time."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [
        {k: v for k, v in sorted(line.items()) if k not in TIMES and not k.startswith("s_")}
        for line in lines
    ]
    return json.dumps(kept).encode()


def main():
    with tempfile.TemporaryDirectory() as folder:
        for recipe in ([], ["--paper"]):
            for processes in (1, 2):
                name = f"{recipe[0].strip('-') if recipe else 'default'}, {processes} process(es)"
                out = Path(folder) / name
                run("cold_start.py", [*COLD, *recipe, "--out_dir", out / "cold"], processes)
                stage_2 = [*RL, *recipe, "--cold_start", out / "cold", "--out_dir", out / "rl"]
                run("rtdmd_rl.py", stage_2, processes)
                weights = ["--cold_start", out / "cold", "--rtdmd", out / "rl"]
                picture = ["a red circle", *COMMON[:4], *weights, "--out_dir", out / "drawn"]
                run("sample.py", picture)
                for stage in ("cold", "rl"):
                    for file in ("generator_ema.pt", "fake.pt"):
                        print(
                            f"{name:24} {stage:4} {file:18} {digest((out / stage / file).read_bytes())}"
                        )
                    print(
                        f"{name:24} {stage:4} {'log.jsonl':18} {digest(numbers_of(out / stage / 'log.jsonl'))}"
                    )
                print(
                    f"{name:24} {'':4} {'00000.png':18} {digest((out / 'drawn/00000.png').read_bytes())}"
                )


if __name__ == "__main__":
    main()
