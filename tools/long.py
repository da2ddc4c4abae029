"""The long run on the tiny model: both stages for several seeds, then one scoring of them all.

    python -m tools.long                       # make long; trains what is missing, then scores
    python -m tools.long out/long --jobs 5     # five seeds at once on one GPU

The same command goes on after an interruption. Which of a run's kept files is scored is decided by
`chosen`, from the log of its training alone. The pictures of the scoring have seeds that nothing else
uses; the teacher's guidance is chosen on other ones. The result is RUN/long.json and a table.
"""

import json
import os
import statistics
import sys

from checkpoint import KEPT_GENERATOR
from common import Parser, die, end_on_signals, note, parse, setup, write_atomically
from sample import teacher_levels
from tiny import CATEGORIES
from tools import children
from tools.plots import read_log
from tools.scoreboard import machine_name, markdown
from tools.tiny_scores import (
    FIRST_SEED,
    NEW_SEEDS,
    PRETRAINED,
    evaluate,
    generator_of,
    load_tiny,
    report_captions,
    steps_done,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = 3000  # of stage 1
STAGE_1 = (
    f"--batch_size 256 --micro_batch 256 --steps {STEPS} --anneal .5 --variant step_weight "
    "--sample_every 0 --save_every 1000"
)
STAGE_2 = (
    "--prompts_per_epoch 32 --micro_batch 256 --rewards clipscore:1,checker:2 --dm_weight 1.2 "
    "--variant drawn_step --sample_every 0 --save_every 1000"
)
WEIGHTS = {"reward_clipscore": 1, "reward_checker": 2}  # as in STAGE_2
KEEP_EVERY = 500
LEAST_SPREAD = 0.95  # of latent_std at the start
GUIDANCE = (1.5, 2.0, 2.5, 3.0)  # the teacher's; the best by the checker is its row


def arguments():
    parser = Parser("Both stages of the tiny model for several seeds, and one scoring.")
    add = parser.add_argument
    add("run", nargs="?", default="out/long", help="where the runs are, a folder a seed")
    add("--seeds", type=int, default=5, help="how many: 0, 1, ...")
    add("--epochs", type=int, default=4500, help="of stage 2")
    add("--pictures", type=int, default=216, help="scored of each of the six categories, a row")
    add("--jobs", type=int, default=1, help="seeds at once; they share one GPU")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    parser.set_defaults(preset="tiny", out_dir=".")
    args = parse(parser)
    for name in ("seeds", "pictures", "jobs", "epochs"):
        if getattr(args, name) < 1:
            die(f"--{name} must be positive, got {getattr(args, name)}")
    args.out_dir = args.run
    return args


# ---- training ------------------------------------------------------------------------------------
def train(args, seed):
    """Both stages of one seed, each unless it is there; dies where one fails."""
    cold, rl = f"{args.run}/{seed}/cold_start", f"{args.run}/{seed}/rtdmd"
    start = f"--cold_start {cold} --epochs {args.epochs} --keep_every {KEEP_EVERY}"
    for program, out, length, flags in (
        ("cold_start.py", cold, STEPS, STAGE_1),
        ("rtdmd_rl.py", rl, args.epochs, f"{STAGE_2} {start}"),
    ):
        if steps_done(out) >= length:
            continue
        os.makedirs(out, exist_ok=True)
        command = [sys.executable, f"{ROOT}/{program}", "--preset", "tiny", *flags.split()]
        command += ["--seed", str(seed), "--device", args.device, "--out_dir", out]
        status = children.run(command, f"{out}.log", {**os.environ, "OMP_NUM_THREADS": "1"})
        if status or steps_done(out) < length:
            die(
                f"seed {seed}: {program} ended early, see {out}.log; the same command goes on",
                status=1,
            )
        note(f"seed {seed}: {program} done")


# ---- the rule ------------------------------------------------------------------------------------
def chosen(log, kept):
    """Which of the kept epochs is scored: the one with the best training reward before it.

    log: of stage 2; kept: numbers of epochs. What counts is the mean weighed reward of the epochs
    since the last kept one. Epochs are left out at which latent_std, over those same epochs, is below
    LEAST_SPREAD of what it was before the first kept one; the first is never left out.
    """

    def mean_of(name, end):
        return statistics.fmean(line[name] for line in log[max(0, end - KEEP_EVERY) : end])

    kept = sorted(kept)
    spread = mean_of("latent_std", kept[0])
    good = [end for end in kept if mean_of("latent_std", end) >= LEAST_SPREAD * spread]

    def reward(end):
        return sum(weight * mean_of(name, end) for name, weight in WEIGHTS.items())

    return max(good, key=reward)


def kept_epochs(folder, last):
    """Numbers of the kept files of a run, up to the last epoch."""
    found = [KEPT_GENERATOR.fullmatch(name) for name in os.listdir(folder)]
    epochs = [int(match[1]) for match in found if match and int(match[1]) <= last]
    if not epochs:
        die(f"{folder} holds no generator_ema_N.pt up to epoch {last}")
    return epochs


# ---- scoring -------------------------------------------------------------------------------------
def best_guidance(base, clips, rows):
    """-> (the teacher's best guidance, {guidance: its numbers}), by the checker, on the usual seeds."""
    levels = teacher_levels(base, 50)
    of_each = {}
    for cfg in GUIDANCE:
        of_each[cfg], _ = evaluate(base, clips, rows, [], levels, 0.0, cfg, FIRST_SEED)
    return max(GUIDANCE, key=lambda cfg: of_each[cfg]["checker"]), of_each


def score(args, device):
    """Everyone's pictures of the same captions and new seeds -> RUN/long.json, and its table."""
    rows = report_captions(args.pictures)
    base, clips = load_tiny(PRETRAINED, device)
    cfg, guidance = best_guidance(base, clips, rows)
    few = base.sigmas(4)
    content = {
        "machine": machine_name(device),
        "pictures_a_row": len(rows),
        "guidance": guidance,
        "chosen": {},
        "rows": {},
    }
    for seed in range(args.seeds):
        folder = f"{args.run}/{seed}"
        epoch = chosen(
            read_log(f"{folder}/rtdmd")[: args.epochs],
            kept_epochs(f"{folder}/rtdmd", args.epochs),
        )
        content["chosen"][seed] = epoch
        base, clips = load_tiny(PRETRAINED, device)
        stacked = generator_of(
            base, f"{folder}/cold_start", f"{folder}/rtdmd/generator_ema_{epoch}.pt"
        )
        for name, adapters, levels, eta, scale in (
            (f"teacher, 50 steps, guidance {cfg:g}", [], teacher_levels(base, 50), 0.0, cfg),
            (f"teacher, 4 steps, guidance {cfg:g}", [], few, 0.0, cfg),
            ("AC-DMD, 4 steps", stacked[:1], few, 0.9, 1.0),
            ("RTDMD, 4 steps", stacked, few, 0.9, 1.0),
        ):
            first = NEW_SEEDS + 10**5 * seed  # other pictures for each run
            numbers, _ = evaluate(base, clips, rows, adapters, levels, eta, scale, first)
            del numbers["images_per_s"]
            content["rows"].setdefault(name, []).append(numbers)
        note(f"seed {seed}: epoch {epoch} is scored")
    write_atomically({f"{args.run}/long.json": json.dumps(content, indent=1).encode()})
    print(table_of(content["rows"]))


def table_of(rows):
    """Mean and standard deviation over seeds, in markdown; the checker in %."""
    names = [name for name in next(iter(rows.values()))[0] if name not in CATEGORIES]
    lines = []
    for title, of_seeds in rows.items():
        line = {"": title}
        for name in names:
            scale = 100 if name == "checker" else 1
            values = [scale * numbers[name] for numbers in of_seeds]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            line[name] = f"{statistics.fmean(values):.4g} ± {deviation:.2g}"
        lines.append(line)
    return markdown(lines)


def main():
    args = arguments()
    device, _, _ = setup(args, training=False)
    end_on_signals("stopped; the same command goes on")
    with children.workers(args.jobs) as pool:
        for _ in pool.map(lambda seed: train(args, seed), range(args.seeds)):
            pass
    score(args, device)


if __name__ == "__main__":
    main()
