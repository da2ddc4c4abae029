"""Trainings as child processes, several at once. They end with the program that began them."""

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor

running = set()


def run(command, log_path, environment):
    """Run a command, what it prints appended to a file -> its exit status."""
    with open(log_path, "a") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    running.add(child)
    try:
        return child.wait()
    finally:
        running.discard(child)


@contextlib.contextmanager
def workers(count):
    """Threads for so many children at once. After an error or a signal all end, and none begins."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:  # a signal's SystemExit, too
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(running):
            child.terminate()  # a training saves what it has
        raise
    finally:
        pool.shutdown()
