"""The paper's ablation tables at tiny scale: a list of rows, a loop that runs what is missing.

    python -m tools.ablations                           # make ablations: table3, table4, fake
    python -m tools.ablations letter --jobs 7           # the paper's letter, one choice at a time

A row is a program and its flags. Each run is a process with a directory of its own in out_dir/runs;
what is there already is left alone, so that the same command goes on. Several GPUs take the runs in
turn. The tables are out_dir/TABLE.md, and on the screen; TABLE.json has every run's numbers. Under
a table stand the orderings that the paper claims (CLAIMS), each with what the runs say of it.

All rows of a table make the same number of updates on the same number of pictures, from the same
prompts in the same order, and start from the same weights (stage 2: from the same stage 1 for each
seed). Stage 2's ONLY reward is CLIPScore, the differentiable one, so that the checker, the judge and
the diversity are all held out and hacking can show in them.
"""

import json
import os
import queue
import re
import shlex
import statistics
import sys
import threading
from typing import NamedTuple

import torch

from checkpoint import settings_of
from common import Parser, die, end_on_signals, make_out_dir, note, parse, setup, write_atomically
from tiny import CATEGORIES
from tools import children
from tools.scoreboard import markdown
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


SIZES = ("steps", "epochs", "batch_size", "pictures")  # flags that have to be equal in all runs
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
    "students": [
        Row("K = 1", STAGE_1, "--num_steps 1 --anneal .5 --variant step_weight"),
        Row("K = 2", STAGE_1, "--num_steps 2 --anneal .5 --variant step_weight"),
        Row("K = 4", STAGE_1, "--anneal .5 --variant step_weight"),
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
    "students": "Stage 1 of students with so many steps, with the flags of the long run.",
    "letter": "The paper's letter, one choice at a time, the others by default.",
}


# ---- what the paper says of its tables -----------------------------------------------------------
class Claim(NamedTuple):
    """An ordering of two rows of a table: better is above worse in these measures."""

    text: str
    better: str
    worse: str
    measures: tuple = ("checker", "clipscore", "judge")


FIRST = "AC-DMD, gamma .01, eta .9"
BOTH = "SubGRPO M=2 + L_det"
CLAIMS = {
    "table3": [
        Claim("consistency helps", FIRST, "A-DMD (gamma 0)"),
        Claim("gamma .01 before .1", FIRST, "AC-DMD, gamma .1"),
        Claim("gamma .01 before .005", FIRST, "AC-DMD, gamma .005"),
        Claim("gamma .01 before .001", FIRST, "AC-DMD, gamma .001"),
        Claim("AC-DMD before DMD2", FIRST, "DMD2"),
        Claim("eta .9 before 0", FIRST, "AC-DMD, eta 0"),
        Claim("eta .9 before .5", FIRST, "AC-DMD, eta .5"),
    ],
    "table4": [
        Claim("stage 2 improves the cold start", BOTH, "cold start"),
        Claim("SubGRPO, M = 2, before GRPO", "SubGRPO M=2", "GRPO"),
        Claim("SubGRPO, M = 1, before GRPO", "SubGRPO M=1", "GRPO"),
        Claim("M = 2 before M = 1", "SubGRPO M=2", "SubGRPO M=1"),
        Claim("M = 2 before M = 1, with L_det", BOTH, "SubGRPO M=1 + L_det"),
        Claim("SubGRPO before GRPO, with L_det", BOTH, "GRPO + L_det"),
        Claim("L_det helps GRPO", "GRPO + L_det", "GRPO"),
        Claim("L_det helps M = 1", "SubGRPO M=1 + L_det", "SubGRPO M=1"),
        Claim("L_det helps M = 2", BOTH, "SubGRPO M=2"),
        Claim("SubGRPO helps L_det", BOTH, "L_det alone"),
        Claim("shared noise helps", BOTH, "the same, noise not shared"),
        Claim(
            "the anchor prevents hacking",
            BOTH,
            "SubGRPO M=2 + L_det, no DM",
            ("checker", "judge", "place_bits"),
        ),
    ],
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
    add("--jobs", type=int, default=1, help="processes at once; they share the GPUs")
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


def train(args, row, seed, gpu):
    """Run one row's program; what it prints goes to a file beside its directory."""
    out = folder(args, row, seed)
    if is_there(args, row, seed) or is_finished(args, row, out):
        return
    threads = max(1, os.cpu_count() // args.jobs)
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    status = children.run(command(args, row, seed), f"{out}.log", environment)
    state = "failed" if status else "ended"
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
    settings = settings_of(f"{out}/generator_ema.pt")
    levels = base.sigmas(settings["num_steps"])
    rows = report_captions(args.pictures)
    numbers, _ = evaluate(base, clips, rows, adapters, levels, settings["eta"])
    write_atomically({f"{out}/numbers.json": json.dumps(numbers, indent=1).encode()})
    os.remove(f"{out}/ckpt.pt")  # the run is over: its adapters are enough


def is_finished(args, row, out):
    """Whether the log of a stage has its last step."""
    last = args.steps if row.program == STAGE_1 else args.epochs
    return steps_done(out) == last


# ---- all of them ---------------------------------------------------------------------------------
def waves(args):
    """Lists of (row, seed); those of one need those of the lists before. Seed 0 of all rows first."""
    rows = [row for table in args.tables for row in TABLES[table]]
    stage_1 = [START, *(row for row in rows if row.program == STAGE_1)]
    stage_2 = [row for row in rows if row.program == STAGE_2]
    fake = [row for row in rows if row.program == FAKE]
    seeds = range(args.seeds)
    yield [(row, seed) for seed in seeds for row in without_doubles(stage_1)]
    yield [(row, seed) for seed in seeds for row in without_doubles(stage_2)]
    if fake:
        yield [(REFERENCE, 0)]
    # one reference, and one other to compare it with
    yield [(row, seed) for seed in seeds for row in fake if seed == 0 or "--decay" not in row.flags]


def without_doubles(rows):
    return list({(row.program, row.flags): row for row in rows}.values())


def run_all(args, device):
    """Run and score what is missing, args.jobs runs at once."""
    places = queue.SimpleQueue()  # a GPU's number for each job
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    for job in range(args.jobs):
        places.put(job % gpus if gpus else None)
    scoring = threading.Lock()

    def run(row_and_seed):
        gpu = places.get()
        try:
            train(args, *row_and_seed, gpu)
        finally:
            places.put(gpu)
        with scoring:
            score(args, *row_and_seed, device)

    with children.workers(args.jobs) as pool:
        for wave in waves(args):
            for _ in pool.map(run, wave):
                pass


def same_sizes(args):
    """Die where out_dir holds runs of other sizes, which would be taken for these."""
    path = f"{args.out_dir}/sizes.json"
    sizes = {name: getattr(args, name) for name in SIZES}
    if os.path.exists(path):
        with open(path) as file:
            there = json.load(file)
        if there != sizes:
            die(f"{args.out_dir} holds runs of another size, {there}: choose another --out_dir")
    write_atomically({path: json.dumps(sizes).encode()})


# ---- the tables ----------------------------------------------------------------------------------
def collected(args, table):
    """What is there of a table -> its content, as TABLE.json has it."""
    sizes = {name: getattr(args, name) for name in SIZES}
    rows = []
    for row in TABLES[table]:
        found = {}
        for seed in range(args.seeds):
            if is_there(args, row, seed):
                with open(f"{folder(args, row, seed)}/numbers.json") as file:
                    numbers = json.load(file)
                numbers.pop("images_per_s", None)
                found[str(seed)] = {name: round(value, 6) for name, value in numbers.items()}
        rows.append({"name": row.name, "flags": row.flags, "paper": row.paper, "seeds": found})
    return {"table": table, **sizes, "rows": rows}


def scaled(numbers, name):
    """One number of a run as the tables show it: the checker in %."""
    return 100 * numbers[name] if name == "checker" else numbers[name]


def cell(values):
    """Mean and standard error over seeds."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3g} ± {error:.2g}"


def table_of(content):
    """One table in markdown, with what stands below it. content: as from `collected`."""
    rows = content["rows"]
    any_numbers = next((n for row in rows for n in row["seeds"].values()), {})
    names = [name for name in any_numbers if name not in CATEGORIES]
    lines = []
    for row in rows:
        of_seeds = row["seeds"].values()
        line = {content["table"]: row["name"], "seeds": str(len(of_seeds))}
        for name in names:
            line[name.replace("_", " ")] = cell([scaled(numbers, name) for numbers in of_seeds])
        line["the paper"] = row["paper"]
        lines.append(line)
    return (
        f"{markdown(lines)}\n\n{NOTES[content['table']]} Mean ± standard error over seeds, checker "
        f"in %. {content['steps']} steps of stage 1, {content['epochs']} epochs of stage 2, "
        f"{content['batch_size']} pictures each; scored on {6 * content['pictures']} new pictures.\n"
    )


# Student's t: a mean of n values lies, in 95 % of cases, within so many standard errors.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def student(n):
    return STUDENT.get(n, 1.96 + 2.72 / (n - 1))  # beyond the table within .02


def verdict(differences):
    """What paired differences (better row less worse, a value a seed) say of a claim.

    holds or fails: zero is outside of the 95 % interval of their mean. Otherwise the number of seeds
    is said with which this difference and this spread would be outside.
    """
    n = len(differences)
    if n < 2:
        return "one seed"
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    text = f"{mean:+.2g} ± {deviation / n**0.5:.2g}"
    if abs(mean) > student(n) * deviation / n**0.5:
        return f"{text}: {'holds' if mean > 0 else 'fails'}"
    for more in range(n + 1, 1000):
        if abs(mean) > student(more) * deviation / more**0.5:
            return f"{text}: not resolved ({more} seeds)"
    return f"{text}: not resolved (1 000 seeds or more)"


def claims_of(content):
    """The claims about a table, and what its runs say, in markdown."""
    measures = ("checker", "clipscore", "judge", "place_bits")
    seeds_of = {row["name"]: row["seeds"] for row in content["rows"]}
    lines = []
    for claim in CLAIMS.get(content["table"], ()):
        better, worse = seeds_of[claim.better], seeds_of[claim.worse]
        both = [seed for seed in better if seed in worse]
        line = {"claim": claim.text}
        for name in measures:
            said = ""
            if name in claim.measures:
                said = verdict([scaled(better[s], name) - scaled(worse[s], name) for s in both])
            line[name.replace("_", " ")] = said
        lines.append(line)
    return markdown(lines) + "\n"


def main():
    args = arguments()
    device, _, _ = setup(args, training=False)
    end_on_signals("stopped; the same command goes on")
    make_out_dir(args.out_dir, "runs", 0)
    same_sizes(args)
    run_all(args, device)
    for table in args.tables:
        content = collected(args, table)
        text = table_of(content)
        if table in CLAIMS:
            text += "\n" + claims_of(content)
        path = f"{args.out_dir}/{table}"
        data = json.dumps(content, indent=1)
        write_atomically({f"{path}.md": text.encode(), f"{path}.json": data.encode()})
        print("\n" + text, flush=True)


if __name__ == "__main__":
    main()
