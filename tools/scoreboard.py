"""The scoreboard of a tiny run: what `make tiny` ends with.

    python -m tools.scoreboard out/tiny     # -> report.json, report.png and a table
    python -m tools.scoreboard --grids      # the teacher alone, on diffusers' noise levels and on ours

Teacher, AC-DMD and RTDMD draw the same captions from the same seeds. For what is counted see
tiny_scores.py.
"""

import json
import os
from typing import NamedTuple

import torch

from checkpoint import settings_of
from common import Parser, checked, die, note, setup, write_atomically
from cps import sigmas
from sample import teacher_levels
from tools import plots
from tools.tiny_scores import (
    FIRST_SEED,
    PRETRAINED,
    TEACHER_CFG,
    evaluate,
    evaluations,
    generator_of,
    load_tiny,
    report_captions,
)

SHOWN = 12  # pictures of each row in report.png, two of a category


class Line(NamedTuple):
    """A line of the scoreboard: who draws, and how."""

    name: str
    adapters: list
    levels: list
    eta: float
    cfg: float
    minutes: float  # how long the training of this stage took

    def start(self):
        """The first columns."""
        steps = len(self.levels) - 1
        return {"name": self.name, "steps": steps, "NFE": evaluations(self.levels, self.cfg)}


def arguments():
    parser = Parser("The scoreboard of a run of the tiny preset.")
    add = parser.add_argument
    add("run", nargs="?", default="out/tiny", help="a tiny run: cold_start/ and rtdmd/ in it")
    add("--grids", action="store_true", help="the teacher on two grids of noise levels; no run")
    add("--pretrained", default=PRETRAINED, help="the pipeline that the run was made with")
    add("--pictures", type=int, default=72, help="pictures of each of the six categories")
    add("--device", default="auto", help="cuda, cpu, mps, or auto: the best there is")
    args = parser.parse_args()
    if args.pictures < 1:
        die(f"--pictures must be positive, got {args.pictures}")
    args.out_dir = "." if args.grids else args.run
    return args


# ---- the run -------------------------------------------------------------------------------------
def finished_log(stage):
    """The log of a finished stage; dies where there is none."""
    log = plots.read_log(stage) if os.path.exists(f"{stage}/generator_ema.pt") else []
    if not log:
        die(f"{stage}/ holds no finished run; make tiny makes one")
    return log


def minutes_of(log):
    return sum(line["seconds"] for line in log) / 60


def scoreboard(run, pretrained, n, device):
    """Draw and score n pictures a category -> run/report.json, run/report.png, a table on screen."""
    logs = {stage: finished_log(f"{run}/{stage}") for stage in ("cold_start", "rtdmd")}
    base, clips = load_tiny(pretrained, device)
    stacked = generator_of(base, f"{run}/cold_start", f"{run}/rtdmd")
    settings = settings_of(f"{run}/rtdmd/generator_ema.pt")
    eta = settings.get("eta", 0.9)
    # The reference: what a user's pipeline draws with; and the student's levels for the teacher, too:
    # what distillation adds shows at equal levels.
    many = teacher_levels(base, 50)
    few = base.sigmas(settings.get("num_steps", 4))
    lines = [
        Line("teacher", [], many, 0.0, TEACHER_CFG, 0),
        Line("teacher", [], few, 0.0, TEACHER_CFG, 0),
        Line("teacher, no CFG", [], few, 0.0, 1.0, 0),
        Line("AC-DMD", stacked[:1], few, eta, 1.0, minutes_of(logs["cold_start"])),
        Line("RTDMD", stacked, few, eta, 1.0, minutes_of(logs["rtdmd"])),
    ]
    rows = report_captions(n)
    shown = [(i * len(rows) // SHOWN + i % 3) % len(rows) for i in range(SHOWN)]
    table = []
    sheet = {}
    for line in lines:
        numbers, pictures = evaluate(
            base, clips, rows, line.adapters, line.levels, line.eta, line.cfg
        )
        table.append({**line.start(), **numbers, "train_minutes": line.minutes})
        if line.adapters or line.cfg != 1:  # without guidance the teacher draws next to nothing
            steps = len(line.levels) - 1
            title = f"{line.name}, {steps} steps\n{100 * numbers['checker']:.0f} % right"
            sheet[title] = pictures[shown]
    content = {
        "machine": machine_name(device),
        "torch": torch.__version__,
        "pictures_per_row": len(rows),
        "first_seed": FIRST_SEED,
        "rows": table,
    }
    write_atomically({f"{run}/report.json": json.dumps(content, indent=1).encode()})
    print(markdown(table), flush=True)
    if plots.pyplot is None:
        note(f"no {run}/report.png: {plots.MISSING}")
    else:
        plots.draw_report(sheet, [rows[i]["prompt"] for i in shown], logs, f"{run}/report.png")


def teacher_grids(pretrained, n, device):
    """The scoreboard's guided teacher on diffusers' noise levels and on ours: what a grid is worth."""
    base, clips = load_tiny(pretrained, device)
    rows = report_captions(n)
    table = []
    for steps in (50, 4):
        for name, levels in (("diffusers'", teacher_levels(base, steps)), ("our", sigmas(steps))):
            line = Line(f"teacher, {name} grid", [], levels, 0.0, TEACHER_CFG, 0)
            numbers, _ = evaluate(base, clips, rows, [], levels, 0.0, TEACHER_CFG)
            table.append({**line.start(), **numbers})
    print(f"{len(rows)} pictures a row, {machine_name(device)}, torch {torch.__version__}\n")
    print(markdown(table), flush=True)


# ---- what is shown -------------------------------------------------------------------------------
def markdown(rows):
    """Dicts with the same keys -> a table in markdown; numbers have three digits."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_name(device):
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores"


def main():
    args = arguments()
    if args.grids:
        device, _, _ = setup(args, training=False)
        checked(teacher_grids, args.pretrained, args.pictures, device)
        return
    for stage in ("cold_start", "rtdmd"):  # before anything is made or loaded
        finished_log(f"{args.run}/{stage}")
    device, _, _ = setup(args, training=False)
    checked(scoreboard, args.run, args.pretrained, args.pictures, device)


if __name__ == "__main__":
    main()
