"""The paper's ablation tables at tiny scale: a list of rows, a loop that runs what is missing.

    python -m tools.ablations                           # make ablations: table3, table4, fake
    python -m tools.ablations letter --jobs 7           # the paper's letter, one choice at a time

A row is a program and its flags. Each run is a process with a directory of its own in out_dir/runs;
what is there already is left alone, so that the same command goes on. The tables are out_dir/TABLE.md,
and on the screen.

All rows of a table make the same number of updates on the same number of pictures, from the same
prompts in the same order, and start from the same weights (stage 2: from the same stage 1 for each
seed). Stage 2's ONLY reward is CLIPScore, the differentiable one, so that the checker, the judge and
the diversity are all held out and hacking can show in them.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from checkpoint import settings_of
from common import Parser, die, make_out_dir, note, parse, setup, write_atomically
from tiny import CATEGORIES
from tools.tiny_scores import (
    PRETRAINED,
    evaluate,
    generator_of,
    load_tiny,
    report_captions,
    steps_done,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- the rows ------------------------------------------------------------------------------------
class Row(NamedTuple):
    """One row of a table: what is run, and the paper's CLIPScore / PickScore / HPSv2 on SD3.5-M."""

    name: str
    program: str
    flags: str = ""
    paper: str = ""


STAGE_1 = "cold_start.py"
STAGE_2 = "rtdmd_rl.py"
FAKE = "tools/fake_quality.py"
START = Row("stage 1", STAGE_1)  # where all stages 2 begin
REFERENCE = Row("a long training", FAKE, "--decay --stream reference")  # of seed 0 alone

TABLES = {
    "table3": [
        Row("AC-DMD, gamma .01, eta .9", STAGE_1, "", ".2843 / 23.5690 / .3456"),
        Row("A-DMD (gamma 0)", STAGE_1, "--gamma 0", ".2753 / 22.0116 / .3188"),
        Row("AC-DMD, gamma .1", STAGE_1, "--gamma .1", ".2846 / 23.2105 / .3362"),
        Row("AC-DMD, gamma .005", STAGE_1, "--gamma .005", ".2837 / 22.8546 / .3324"),
        Row("AC-DMD, gamma .001", STAGE_1, "--gamma .001", ".2831 / 22.2378 / .3294"),
        Row("DMD2", STAGE_1, "--variant dmd2 --gamma 0", "as A-DMD, eta 1 (Fig. 5)"),
        Row("AC-DMD, eta 0", STAGE_1, "--eta 0", "worse (Fig. 5)"),
        Row("AC-DMD, eta .5", STAGE_1, "--eta .5", "worse (Fig. 5)"),
        Row("AC-DMD, eta 1", STAGE_1, "--eta 1", "alike (Fig. 5)"),
    ],
    "table4": [
        Row("cold start", STAGE_1, "", ".2822 / 22.5056 / .2942"),
        Row("GRPO", STAGE_2, "--subset 3 --det_weight 0", ".2759 / 23.3064 / .3268"),
        Row("GRPO + L_det", STAGE_2, "--subset 3"),
        Row("SubGRPO M=1", STAGE_2, "--subset 1 --det_weight 0", ".2798 / 23.3272 / .3332"),
        Row("SubGRPO M=1 + L_det", STAGE_2, "--subset 1", ".2802 / 23.4156 / .3318"),
        Row("SubGRPO M=2", STAGE_2, "--det_weight 0", ".2839 / 23.4520 / .3459"),
        Row("SubGRPO M=2 + L_det", STAGE_2, "", ".2843 / 23.5690 / .3456"),
        Row("the same, noise not shared", STAGE_2, "--variant free_noise"),
        Row("the same, L_det five times as strong", STAGE_2, "--det_weight 1"),
        Row("L_det alone", STAGE_2, "--policy_weight 0"),
        Row("SubGRPO M=2 + L_det, no DM", STAGE_2, "--dm_weight 0"),
    ],
    "fake": [
        Row("the teacher, where it starts", FAKE, "--updates 0"),
        Row("gamma 0", FAKE, "--gamma 0"),
        Row("gamma .001", FAKE, "--gamma .001"),
        Row("gamma .01", FAKE, "--gamma .01"),
        Row("gamma .1", FAKE, "--gamma .1"),
        Row("another long training", FAKE, "--decay --stream 'reference again'"),
    ],
    "letter": [
        Row("stage 1 by default", STAGE_1),
        Row("printed_std", STAGE_1, "--variant printed_std"),
        Row("step_consistency", STAGE_1, "--variant step_consistency"),
        Row("score_gradient", STAGE_1, "--variant score_gradient"),
        Row("stage 2 by default", STAGE_2),
        Row("gaussian_log_prob", STAGE_2, "--variant gaussian_log_prob"),
        Row("group_std", STAGE_2, "--variant group_std"),
        Row("subset_factor", STAGE_2, "--variant subset_factor"),
        Row("drawn_step", STAGE_2, "--variant drawn_step"),
    ],
}
NOTES = {
    "table3": "Stage 1 alone, 4 evaluations, drawn with the eta of its training. (The paper's Table 3 "
    "is the result of both stages.)",
    "table4": "Stage 2 from the cold start with the same seed; its one reward is CLIPScore. Policy "
    "passes an epoch: M (GRPO: 3).",
    "fake": "Relative rms error in % of the fake velocity at noise levels t > s, after half as many "
    "steps as stage 1 in the other tables, against that of a long training (ten times the steps, rate "
    "decayed to 0), on new pictures of one frozen generator, the cold start of seed 0.",
    "letter": "The paper's letter, one choice at a time, the others by default.",
}


def arguments():
    parser = Parser("Ablation tables at tiny scale.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    add("--out_dir", default="out/ablations", help="what is in there is not run again")
    add("--seeds", type=int, default=3, help="runs of each row")
    add("--steps", type=int, default=200, help="steps of stage 1, half as many generator updates")
    add("--epochs", type=int, default=90, help="epochs of stage 2")
    add("--batch_size", type=int, default=128, help="pictures a step; an epoch: in groups of 8")
    add("--pictures", type=int, default=216, help="pictures scored of each of the six categories")
    add("--jobs", type=int, default=1, help="processes at once; they share one GPU")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    parser.set_defaults(preset="tiny")
    args = parse(parser)
    args.tables = args.tables or ["table3", "table4", "fake"]
    for table in args.tables:
        if table not in TABLES:
            die(f"there is no table {table}, but {', '.join(TABLES)}")
    for name in ("seeds", "pictures", "jobs"):
        if getattr(args, name) < 1:
            die(f"--{name} must be positive")
    return args


# ---- one run -------------------------------------------------------------------------------------
def folder(args, row, seed):
    """The directory of a run; rows with the same program and flags share it."""
    name = re.sub("[^a-z0-9._]+", "_", f"{row.program.removesuffix('.py')} {row.flags}")
    return f"{args.out_dir}/runs/{name.strip('_')}_seed{seed}"


def command(args, row, seed):
    """The command line of a run."""
    start = folder(args, START, seed)
    if row.program == STAGE_1:
        size = (
            f"--steps {args.steps} --batch_size {args.batch_size} --micro_batch {args.batch_size}"
        )
    elif row.program == STAGE_2:
        prompts = max(1, args.batch_size // 8)
        size = (
            f"--epochs {args.epochs} --prompts_per_epoch {prompts} --micro_batch {args.batch_size}"
        )
        size += f" --rewards clipscore:1 --lr 3.2e-5 --cold_start {shlex.quote(start)}"
    else:
        updates = 5 * args.steps if "--decay" in row.flags else -(-args.steps // 2)
        start = folder(args, START, 0)
        size = (
            f"--updates {updates} --batch_size {args.batch_size} --cold_start {shlex.quote(start)}"
        )
        if row != REFERENCE:
            size += f" --reference {shlex.quote(folder(args, REFERENCE, 0))}"
    if row.program != FAKE:
        size += " --preset tiny --sample_every 0"
    where = ["--seed", str(seed), "--device", args.device, "--out_dir", folder(args, row, seed)]
    program = os.path.join(ROOT, row.program)
    return [sys.executable, program, *shlex.split(size), *shlex.split(row.flags), *where]


def is_there(args, row, seed):
    name = "fake.pt" if row == REFERENCE else "numbers.json"
    return os.path.exists(f"{folder(args, row, seed)}/{name}")


def train(args, row, seed):
    """Run one row's program; what it prints goes to a file beside its directory."""
    out = folder(args, row, seed)
    if is_there(args, row, seed):
        return
    threads = max(1, os.cpu_count() // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ROOT}
    with open(f"{out}.log", "w") as log:
        done = subprocess.run(
            command(args, row, seed), env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    state = "failed" if done.returncode else "done"
    note(f"{row.name}, seed {seed}: {state}, see {out}.log")


def score(args, row, seed, device):
    """Draw and score the pictures of a finished run of a stage -> its numbers.json."""
    out = folder(args, row, seed)
    if row.program == FAKE or is_there(args, row, seed) or not is_finished(args, row, out):
        return
    base, clips = load_tiny(PRETRAINED, device)
    if row.program == STAGE_1:
        adapters = generator_of(base, out)
    else:
        adapters = generator_of(base, folder(args, START, seed), out)
    eta = settings_of(f"{out}/generator_ema.pt")["eta"]
    rows = report_captions(args.pictures)
    numbers, _ = evaluate(base, clips, rows, adapters, base.levels(4), eta)
    write_atomically({f"{out}/numbers.json": json.dumps(numbers, indent=1).encode()})
    os.remove(f"{out}/ckpt.pt")  # the run is over: its adapters are enough


def is_finished(args, row, out):
    """Whether the log of a stage has its last step."""
    last = args.steps if row.program == STAGE_1 else args.epochs
    return steps_done(out) == last


# ---- all of them ---------------------------------------------------------------------------------
def waves(args, seed):
    """Lists of rows; those of one need those of the lists before."""
    rows = [row for table in args.tables for row in TABLES[table]]
    stage_1 = [START, *(row for row in rows if row.program == STAGE_1)]
    stage_2 = [row for row in rows if row.program == STAGE_2]
    fake = [row for row in rows if row.program == FAKE]
    if seed > 0:  # one reference, and one other to compare it with
        fake = [row for row in fake if "--decay" not in row.flags]
    reference = [REFERENCE] if fake and seed == 0 else []
    return [without_doubles(wave) for wave in (stage_1, stage_2, reference, fake)]


def without_doubles(rows):
    return list({(row.program, row.flags): row for row in rows}.values())


def run_all(args, device):
    """Run and score what is missing: seed 0 of all rows, then seed 1, and so on."""
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for seed in range(args.seeds):
            for wave in waves(args, seed):
                for _ in pool.map(lambda row, seed=seed: train(args, row, seed), wave):
                    pass
                for row in wave:
                    score(args, row, seed, device)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        die("stopped; the same command goes on", status=1)


def same_sizes(args):
    """Die where out_dir holds runs of other sizes, which would be taken for these."""
    path = f"{args.out_dir}/sizes.json"
    sizes = {name: getattr(args, name) for name in ("steps", "epochs", "batch_size", "pictures")}
    if os.path.exists(path):
        with open(path) as file:
            there = json.load(file)
        if there != sizes:
            die(f"{args.out_dir} holds runs of another size, {there}: choose another --out_dir")
    write_atomically({path: json.dumps(sizes).encode()})


# ---- the tables ----------------------------------------------------------------------------------
def numbers_of(args, row):
    """{seed: numbers} of the runs of a row that are there."""
    found = {}
    for seed in range(args.seeds):
        if is_there(args, row, seed):
            with open(f"{folder(args, row, seed)}/numbers.json") as file:
                found[seed] = json.load(file)
    return found


def cell(values):
    """Mean and standard error over seeds."""
    values = torch.tensor(values, dtype=torch.float64)
    if len(values) == 0:
        return ""
    if len(values) == 1:
        return f"{values.item():.3g}"
    return f"{values.mean():.3g} +- {values.std() / len(values) ** 0.5:.2g}"


def table_of(args, table):
    """One table in markdown, with what stands below it."""
    rows = TABLES[table]
    of_rows = [numbers_of(args, row) for row in rows]
    first = of_rows[0]
    any_numbers = next((n for found in of_rows for n in found.values()), {})
    names = [name for name in any_numbers if name not in (*CATEGORIES, "images_per_s")]
    paired = "clipscore" in names
    head = [table, "seeds", *(name.replace("_", " ") for name in names)]
    if paired:
        head.append("CLIPScore less the first row's, same seed")
    head.append("the paper")
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row, found in zip(rows, of_rows):
        cells = [row.name, str(len(found))]
        for name in names:
            scale = 100 if name == "checker" else 1
            cells.append(cell([scale * numbers[name] for numbers in found.values()]))
        if paired:
            both = [seed for seed in found if seed in first]
            gains = [found[seed]["clipscore"] - first[seed]["clipscore"] for seed in both]
            cells.append(cell(gains))
        lines.append(" | ".join([*cells, row.paper]))
    table_lines = "\n".join(f"| {line} |" for line in lines)
    return (
        f"{table_lines}\n\n{NOTES[table]} Mean +- standard error over seeds, checker in %. "
        f"{args.steps} steps of stage 1, {args.epochs} epochs of stage 2, {args.batch_size} pictures "
        f"each; scored on {6 * args.pictures} new pictures.\n"
    )


def main():
    args = arguments()
    device, _, _ = setup(args, training=False)
    make_out_dir(args.out_dir, "runs", 0)
    same_sizes(args)
    run_all(args, device)
    for table in args.tables:
        text = table_of(args, table)
        write_atomically({f"{args.out_dir}/{table}.md": text.encode()})
        print("\n" + text, flush=True)


if __name__ == "__main__":
    main()
