"""Do the tests notice small faults? Plants those of tools/faults.py, says which test finds each.

    python -m tools.mutants                           # all -> out/mutants.json, out/mutants.md
    python -m tools.mutants --only "stage 2"          # those whose names contain this
    python -m tools.mutants --tests tests/test_oracle.py
    python -m tools.mutants --check                   # does the list still fit the code?

One fault at a time is planted in a copy of the repository. A child process, forked from one that
has imported torch and its like but none of our files, runs tests on the copy until the first
failure: those that the fault's group names, then CORE, then all that are quick. The
copy without a fault has to pass them before that.

Exit status: 0 if every fault was caught, 1 if one survived, 2 if the list does not fit the code or
the tests fail without a fault.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "out", "assets", "__pycache__", ".pytest_cache")

# The tests without what takes long (processes that talk to each other or are killed, the
# compiler, tables of many runs), and without the diffs of the README: they do not fit a text that
# has a fault in their place, whatever the fault does.
LEFT_OUT = (
    "signal or killed or several_processes or ablations or compiled or real_command_line"
    " or full_disk or rounding_of_the_processor or bench or hacking or flipped_bit"
    " or the_diff_of or readme"
)


# Of the tools, those that faults are planted in.
TOOLS = ("bench.py", "evaluate.py", "export.py", "random_models.py", "tiny_scores.py")
# What notices most faults in the least time.
CORE = ("tests/test_oracle.py", "tests/test_wiring.py")


class Stage(NamedTuple):
    """Tests that are run together, as arguments of pytest."""

    name: str
    arguments: list


class Outcome(NamedTuple):
    """What one run of pytest said."""

    passed: bool
    by: str  # id of the first test that failed, or what else went wrong
    reason: str  # the last line of what it said
    seconds: float


def stages_of(tests):
    """The stages to run: those tests alone, or first CORE, then the other fast tests."""
    if tests:
        return [Stage("given", tests)]
    core = [name for name in CORE if (ROOT / name).exists()]
    stages = [Stage("core", core)] if core else []
    others = [
        p for p in sorted((ROOT / "tests").glob("test_*.py")) if f"tests/{p.name}" not in core
    ]
    names = [str(path.relative_to(ROOT)) for path in others]
    stages.append(Stage("others", [*names, "-k", f"not ({LEFT_OUT})"]))
    return stages


# ------------------------------------------------------------------------------- the programs' text
def programs():
    """{path: text} of the files that faults are planted in: the root's but the tests, some tools."""
    paths = [path for path in ROOT.glob("*.py") if not path.name.startswith("test_")]
    paths += [ROOT / "tools" / name for name in TOOLS]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def misfits(faults, texts):
    """Lines that say which faults' texts do not occur as often as they declare."""
    lines = []
    for fault in faults:
        places = {n: text.count(fault.old) for n, text in texts.items() if fault.file in ("", n)}
        found = sum(places.values())
        if found != fault.count:
            where = ", ".join(name for name, times in places.items() if times) or "no file"
            lines.append(
                f"{fault.name}: {fault.old!r} occurs {found} times, not {fault.count} ({where})"
            )
        if fault.old == fault.new:
            lines.append(f"{fault.name}: changes nothing")
    if len({fault.name for fault in faults}) < len(faults):
        lines.append("two faults have the same name")
    return lines


def planted(fault, texts):
    """-> (name of the file that has the fault's text, its whole text with the fault)."""
    left = fault.which
    for name, text in texts.items():
        if fault.file not in ("", name):
            continue
        times = text.count(fault.old)
        if left >= times:
            left -= times
            continue
        start = -1
        for _ in range(left + 1):
            start = text.index(fault.old, start + 1)
        return name, text[:start] + fault.new + text[start + len(fault.old) :]
    raise ValueError(f"{fault.name}: its text is not there")


def copy_of_repository(folder):
    """The repository in folder/copy; the models in assets, which no fault touches, are a link."""
    copy = Path(folder) / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (copy / "assets").symlink_to(ROOT / "assets")
    return copy


# -------------------------------------------------------------------------------- running the tests
def import_libraries():
    """What takes seconds to import, once, before the first fork. None of it may start a thread."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401
    from peft.tuners.lora import LoraLayer  # noqa: F401
    from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel  # noqa: F401

    torch.set_num_threads(1)


class Recorder:
    """A plugin of pytest that keeps the first failure."""

    def __init__(self):
        self.first = None

    def note(self, report):
        if report.failed and self.first is None:
            lines = report.longreprtext.strip().splitlines() or [""]
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            self.first = {"by": report.nodeid, "reason": (errors or lines[-1:])[0][:200]}

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def pytest_collectreport(self, report):
        self.note(report)


def forget_the_repository():
    """The copy's tests must not find the original: neither imported already nor by its path."""
    here = [p for p in sys.path if Path(p or ".").resolve() == ROOT]
    for path in here:
        sys.path.remove(path)
    for name in [n for n in sys.modules if n == "tools" or n.startswith("tools.")]:
        del sys.modules[name]
    own = {path.stem for path in ROOT.glob("*.py")}
    loaded = own & set(sys.modules)
    assert not loaded, f"imported before the fork: {loaded}"


def child(copy, arguments, result):
    """In the forked process: run the tests, write their first failure to `result`, and end."""
    status = 70
    try:
        os.setsid()  # so that what the tests start can be ended with them
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(copy.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.chdir(copy)
        forget_the_repository()
        sys.path.insert(0, str(copy))
        # a fault of the same length within a second looks like the old file
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.argv = ["pytest"]
        import pytest

        recorder = Recorder()
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={copy}"]
        options.append(f"--basetemp={copy.parent / 'pytest'}")
        status = int(pytest.main([*options, *arguments], plugins=[recorder]))
        Path(result).write_text(json.dumps({"status": status, "first": recorder.first}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_group(pid):
    """End everything that a child has started, and the child if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def run_tests(copy, arguments, limit):
    """Fork a child for the tests on the copy, wait for it for `limit` seconds -> Outcome."""
    result = copy.parent / "result.json"
    result.unlink(missing_ok=True)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(copy, arguments, result)
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() - start > limit:
                end_group(pid)
                os.waitpid(pid, 0)
                return Outcome(False, "time limit", f"not done after {limit:.0f} s", limit)
            time.sleep(0.05)
    except BaseException:  # this process is being ended
        end_group(pid)
        raise
    seconds = time.monotonic() - start
    end_group(pid)  # what the tests may have left behind
    if not result.exists():
        return Outcome(False, "crash", "the tests' process ended without a result", seconds)
    said = json.loads(result.read_text())
    if said["status"] == 0:
        return Outcome(True, "", "", seconds)
    first = said["first"] or {"by": f"pytest's status {said['status']}", "reason": ""}
    return Outcome(False, first["by"], first["reason"], seconds)


# -------------------------------------------------------------------------- faults, several at once
worker = {}  # of a process of the pool: its copy, the programs' texts, stages with time limits


def start_worker(texts, stages, limits):
    """Give this process of the pool a copy of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = tempfile.mkdtemp(prefix="mutants_", dir=worker["folder"])
    worker.update(copy=copy_of_repository(folder), texts=texts, stages=stages, limits=limits)


def judge(fault):
    """Plant one fault, run the stages until one fails, take it out -> a line of the result."""
    copy = worker["copy"]
    name, text = planted(fault, worker["texts"])
    line = {"name": fault.name, "file": name, "old": fault.old, "new": fault.new}
    seconds = 0.0
    (copy / name).write_text(text)
    stages = list(zip(worker["stages"], worker["limits"], strict=True))
    if fault.first and worker["stages"][0].name != "given":
        stages.insert(0, (Stage("first", list(fault.first)), max(worker["limits"])))
    try:
        for stage, limit in stages:
            outcome = run_tests(copy, stage.arguments, limit)
            seconds += outcome.seconds
            if not outcome.passed:
                caught = {"stage": stage.name, "by": outcome.by, "reason": outcome.reason}
                return {**line, "result": "caught", **caught, "seconds": round(seconds, 1)}
    finally:
        (copy / name).write_text(worker["texts"][name])
    return {**line, "result": "SURVIVED", "seconds": round(seconds, 1)}


def check_without_fault(stages, folder):
    """Run the stages on the plain copy -> their time limits; ends the program if a test fails."""
    copy = copy_of_repository(folder)
    limits = []
    for stage in stages:
        outcome = run_tests(copy, stage.arguments, 3600)
        if not outcome.passed:
            print((copy.parent / "log.txt").read_text()[-3000:], file=sys.stderr)
            print(f"without a fault: {outcome.by} fails: {outcome.reason}", file=sys.stderr)
            sys.exit(2)
        print(f"without a fault: {stage.name} pass in {outcome.seconds:.0f} s", flush=True)
        limits.append(30 + 5 * outcome.seconds)  # other processes share the machine
    return limits


# ---------------------------------------------------------------------------------- what is written
def write_results(folder, summary, lines):
    """folder/mutants.json and mutants.md: all lines, the ones that survived first."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {"SURVIVED": 0, "caught": 1, "equivalent": 2}
    lines = sorted(lines, key=lambda line: order[line["result"]])
    content = {**summary, "faults": lines}
    (folder / "mutants.json").write_text(json.dumps(content, indent=1) + "\n")
    rows = ["| fault | file | result | by |", "|---|---|---|---|"]
    for line in lines:
        by = line.get("by") or line.get("why", "")
        cells = (line["name"], line["file"], line["result"], by)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = ", ".join(f"{key}: {value}" for key, value in summary.items())
    (folder / "mutants.md").write_text(f"{head}\n\n" + "\n".join(rows) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description="Plant small faults; do the tests notice?")
    add = parser.add_argument
    add("--jobs", type=int, default=2, help="faults at once, a process of one thread each")
    add(
        "--only",
        action="append",
        default=[],
        help="faults whose names contain this; may be given again",
    )
    add("--tests", nargs="+", default=[], help="run these in place of those")
    add("--check", action="store_true", help="only see whether the list fits the code")
    add("--out_dir", default=str(ROOT / "out"), help="where mutants.json and mutants.md go")
    return parser.parse_args()


def main():
    args = arguments()
    texts = programs()
    wrong = misfits(FAULTS, texts)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        print(f"{len(wrong)} faults do not fit the code: mend tools/faults.py", file=sys.stderr)
        sys.exit(2)
    chosen = [f for f in FAULTS if not args.only or any(word in f.name for word in args.only)]
    print(f"{len(chosen)} of {len(FAULTS)} faults, and all of the list fits the code", flush=True)
    if args.check or not chosen:
        sys.exit(0 if chosen else 2)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    import_libraries()
    stages = stages_of(args.tests)
    lines = []
    to_run = []
    for fault in chosen:
        if fault.equivalent and not args.only:  # by name it is run all the same: is it true?
            name, _ = planted(fault, texts)
            line = {"name": fault.name, "file": name, "old": fault.old, "new": fault.new}
            lines.append({**line, "result": "equivalent", "why": fault.equivalent})
        else:
            to_run.append(fault)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        worker["folder"] = folder
        (Path(folder) / "plain").mkdir()
        limits = check_without_fault(stages, Path(folder) / "plain")
        fork = multiprocessing.get_context("fork")
        with fork.Pool(args.jobs, start_worker, (texts, stages, limits)) as pool:
            for i, line in enumerate(pool.imap_unordered(judge, to_run), 1):
                lines.append(line)
                found = f"{line['by']} ({line['stage']})" if "by" in line else "!!!"
                place = f"{i}/{len(to_run)}"
                print(
                    f"{place} {line['seconds']:6.1f} s  {line['result']}  {line['name']}: {found}",
                    flush=True,
                )
                write_results(Path(args.out_dir), {"unfinished": place}, lines)
            pool.close()  # terminating it while a process ends can wait for ever
            pool.join()
    import torch

    survivors = [line["name"] for line in lines if line["result"] == "SURVIVED"]
    summary = {
        "planted": len(lines),
        "caught": sum(line["result"] == "caught" for line in lines),
        "survived": len(survivors),
        "equivalent": sum(line["result"] == "equivalent" for line in lines),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "jobs": args.jobs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    write_results(Path(args.out_dir), summary, lines)
    print("\n" + ", ".join(f"{key}: {value}" for key, value in summary.items()))
    print("\n".join(f"SURVIVED: {name}" for name in survivors))
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
