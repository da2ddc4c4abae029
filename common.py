"""What knows neither model nor method: how a program ends on a user's mistake, how it speaks."""

import os
import sys


def is_rank_0():
    """Whether this process is the one that speaks, under torchrun and alone."""
    return os.environ.get("RANK", "0") == "0"


def die(message, status=2, local=False):
    """End the program with one line on stderr and no traceback.

    Exit status 2 is for bad input, 1 for a failure under way. Under torchrun only rank 0 speaks,
    unless the trouble is `local`: one rank's alone. Raises SystemExit.
    """
    if local or is_rank_0():
        program = os.path.basename(sys.argv[0])
        one_line = " ".join(str(message).split())
        print(f"{program}: error: {one_line}", file=sys.stderr, flush=True)
    sys.exit(status)


def note(message):
    """One line on stderr about something a user should know; rank 0 only."""
    if is_rank_0():
        one_line = " ".join(str(message).split())
        print(f"note: {one_line}", file=sys.stderr, flush=True)


def checked(function, *inputs):
    """function(*inputs), its ValueError (which says what to do in one line) turned into `die`."""
    try:
        return function(*inputs)
    except ValueError as e:
        die(e)
