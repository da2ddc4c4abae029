"""The crash test: runs are killed at any moment, begun again, and compared to the byte with one that nobody killed.

Run it as `python tests/crash.py --crash 30`.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from helpers import good, load, log_of, same_files, shell, stage_of


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list)):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(
                map(
                    same,
                    a.items() if isinstance(a, dict) else a,
                    b.items() if isinstance(b, dict) else b,
                )
            )
        )
    return all(map(same, a, b)) if isinstance(a, tuple) else a == b


def in_a_fork(program, flags, output, moment=None):
    """program.main() in a forked process (importing takes longer than the run) -> its pid. moment (n, how): it kills itself at the n-th
    flush or rename, "half" a file written, or "before" or "after" the call."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        calls, file = itertools.count(1), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = open(file, "w", buffering=1, closefd=False)

        def mortal(call):
            def wrapped(path, *rest):
                mine = moment and next(calls) == moment[0]
                if mine and moment[1] == "half" and path.endswith(".tmp"):
                    os.truncate(path, os.path.getsize(path) // 2)
                result = call(path, *rest) if not mine or moment[1] == "after" else None
                return os.kill(os.getpid(), signal.SIGKILL) if mine else result

            return wrapped

        common.sync, os.replace = mortal(common.sync), mortal(os.replace)
        sys.argv = [program.__name__ + ".py", *map(str, flags)]
        program.main()
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        os._exit(status)


def crash_test(kills, run, folder, seed=0):
    """`kills` SIGKILLs spread over runs of both stages that save after every step, half of them at a random time, half while saving; every
    run goes on until it ends, and compared with one that nobody killed, in run.cold and run.rl -> lines of a report, all identical?"""
    rng, report, number, ends = random.Random(seed), [], 0, []
    while number < kills:
        stage = ("cold", "rl")[len(ends) % 2]
        program, flags, *_ = stage_of(run, stage)
        whole, out, left, start = (
            getattr(run, stage),
            folder / f"{stage}{len(ends)}",
            min(rng.randint(2, 4), kills - number),
            time.time(),
        )
        while True:
            moment = (
                (rng.randint(1, 9 * len(log_of(whole))), rng.choice(("half", "before", "after")))
                if left and rng.random() < 0.5
                else None
            )
            pid, begun = (
                in_a_fork(
                    program,
                    [*flags, "--save_every", 1, "--out_dir", out],
                    folder / "output.txt",
                    moment,
                ),
                time.time(),
            )
            if left and not moment:
                time.sleep(rng.uniform(0.2, 2.5))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, (folder / "output.txt").read_text()
                break
            number, left = number + 1, left - 1
            files = sorted(p.name for p in out.iterdir() if p.is_file()) if out.exists() else []
            ckpt = next((f for f in ("ckpt.pt", "ckpt.prev.pt") if f in files), None)
            report.append(
                f"{number:4d}  {out.name:6s} {f'call {moment[0]}, {moment[1]}' if moment else f'after {time.time() - begun:.2f} s':18s}"
                f" logged {len((out / 'log.jsonl').read_bytes().splitlines()) if 'log.jsonl' in files else 0}"
                f"  saved {load(out / ckpt)['step'] if ckpt else 0}  {' '.join(f for f in files if f.endswith('.tmp'))}"
            )
        a, b = load(out / "ckpt.pt"), load(whole / "ckpt.pt")
        ends.append(
            same_files(out, whole)
            and log_of(out) == log_of(whole)
            and all(same(a[k], b[k]) for k in ("generator", "G_opt", "F_opt", "step"))
        )
        report.append(
            f"      {out.name:6s} ended {'identical' if ends[-1] else 'DIFFERENT'} ({time.time() - start:.0f} s)"
        )
    times = sum(" s " in line and "after" in line for line in report)
    report.append(
        f"{number} kills, {times} at a random time and {number - times} while saving; {sum(ends)} of {len(ends)} runs ended identical "
        "to the run that nobody killed (generator_ema.pt, fake.pt, log.jsonl, optimisers)"
    )
    return report, all(ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Kills runs, goes on with them, and compares the bytes"
    )
    parser.add_argument("--crash", type=int, required=True, metavar="N", help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="when they come")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun, whole = (
            time.time(),
            SimpleNamespace(cold=Path(folder) / "cold", rl=Path(folder) / "rl"),
        )
        for stage in ("cold", "rl"):
            program, flags, *_ = stage_of(whole, stage)
            good(shell(program, *flags, "--out_dir", getattr(whole, stage)))
        report, identical = crash_test(args.crash, whole, Path(folder), args.seed)
    print("\n".join(report) + f", {time.time() - begun:.0f} s")
    sys.exit(not identical)
