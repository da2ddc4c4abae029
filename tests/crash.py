"""The crash test: runs are killed at any moment and begun again.

They are compared to the byte with one that nobody killed.

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
    """Equal, dtypes and the order of keys included."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, list)):
        if type(a) is not type(b) or len(a) != len(b):
            return False
        if isinstance(a, dict):
            return all(map(same, a.items(), b.items()))
        return all(map(same, a, b))
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return a == b


def mortal(call, moment, calls):
    """`call`, in which the process kills itself at the moment (n, how); None: it never does.

    calls: counts the calls of all mortal functions together.
    """

    def wrapped(path, *rest):
        if moment is None:
            return call(path, *rest)
        n, how = moment
        if next(calls) != n:
            return call(path, *rest)
        if how == "half" and path.endswith(".tmp"):
            os.truncate(path, os.path.getsize(path) // 2)
        if how == "after":
            call(path, *rest)
        return os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def in_a_fork(program, flags, output, moment=None):
    """program.main() in a forked process (importing takes longer than the run) -> its pid.

    moment (n, how): it kills itself at the n-th flush or rename, "half" a file written, or "before"
    or "after" the call.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = open(file, "w", buffering=1, closefd=False)
        calls = itertools.count(1)
        common.sync = mortal(common.sync, moment, calls)
        os.replace = mortal(os.replace, moment, calls)
        sys.argv = [program.__name__ + ".py", *map(str, flags)]
        program.main()
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        os._exit(status)


def left_in(out):
    """What a killed run has left: steps logged and saved, and files that are not finished."""
    files = []
    if out.exists():
        files = sorted(path.name for path in out.iterdir() if path.is_file())
    logged = 0
    if "log.jsonl" in files:
        logged = len((out / "log.jsonl").read_bytes().splitlines())
    saved = 0
    checkpoints = [name for name in ("ckpt.pt", "ckpt.prev.pt") if name in files]
    if checkpoints:
        saved = load(out / checkpoints[0])["step"]
    unfinished = " ".join(name for name in files if name.endswith(".tmp"))
    return f" logged {logged}  saved {saved}  {unfinished}"


def ends_identical(out, whole):
    """Do two runs agree in all their results, and in the optimisers?"""
    if not same_files(out, whole) or log_of(out) != log_of(whole):
        return False
    ours = load(out / "ckpt.pt")
    theirs = load(whole / "ckpt.pt")
    return all(same(ours[key], theirs[key]) for key in ("generator", "G_opt", "F_opt", "step"))


def crash_test(kills, run, folder, seed=0):
    """`kills` SIGKILLs spread over runs of both stages that save after every step.

    Half of them come at a random time, half while saving. Every run goes on until it ends, and is
    compared with one that nobody killed, in run.cold and run.rl.
    -> lines of a report, all identical?
    """
    rng = random.Random(seed)
    output = folder / "output.txt"
    report = []
    ends = []
    number = 0  # of kills
    at_random_times = 0
    while number < kills:
        stage = ("cold", "rl")[len(ends) % 2]
        program, flags, *_ = stage_of(run, stage)
        whole = getattr(run, stage)
        out = folder / f"{stage}{len(ends)}"
        flags = [*flags, "--save_every", 1, "--out_dir", out]
        left = min(rng.randint(2, 4), kills - number)
        start = time.time()
        while True:
            moment = None
            if left and rng.random() < 0.5:
                n = rng.randint(1, 9 * len(log_of(whole)))
                moment = (n, rng.choice(("half", "before", "after")))
            begun = time.time()
            pid = in_a_fork(program, flags, output, moment)
            if left and not moment:
                time.sleep(rng.uniform(0.2, 2.5))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, output.read_text()
                break
            number += 1
            left -= 1
            if moment:
                when = f"call {moment[0]}, {moment[1]}"
            else:
                when = f"after {time.time() - begun:.2f} s"
                at_random_times += 1
            report.append(f"{number:4d}  {out.name:6s} {when:18s}{left_in(out)}")
        ends.append(ends_identical(out, whole))
        verdict = "identical" if ends[-1] else "DIFFERENT"
        report.append(f"      {out.name:6s} ended {verdict} ({time.time() - start:.0f} s)")
    report.append(
        f"{number} kills, {at_random_times} at a random time and {number - at_random_times} while "
        f"saving; {sum(ends)} of {len(ends)} runs ended identical to the run that nobody killed "
        "(generator_ema.pt, fake.pt, log.jsonl, optimisers)"
    )
    return report, all(ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Kills runs, goes on with them, and compares the bytes"
    )
    parser.add_argument("--crash", type=int, required=True, metavar="N", help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="when they come")
    args = parser.parse_args()
    # As in the forks: more threads add in another order, and so round otherwise.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        whole = SimpleNamespace(cold=Path(folder) / "cold", rl=Path(folder) / "rl")
        for stage in ("cold", "rl"):
            program, flags, *_ = stage_of(whole, stage)
            good(shell(program, *flags, "--out_dir", getattr(whole, stage)))
        report, identical = crash_test(args.crash, whole, Path(folder), args.seed)
    print("\n".join(report) + f", {time.time() - begun:.0f} s")
    sys.exit(not identical)
