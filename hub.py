"""The hub: asked once what a repository holds; and what to do, in one line, where it cannot be had.

Nothing is looked up there but what a user, or a preset, names as owner/name. A directory is looked at
like the repository that it may be a copy of.
"""

import errno
import os
import re

import torch
from huggingface_hub import try_to_load_from_cache

from common import causes, first_line, note, shortened

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Where the stages write unless told otherwise. These two are never taken for a hub repository:
# whoever registered an owner named `out` would otherwise decide what is drawn in an empty folder.
DEFAULT_PLACES = {"cold_start": "out/cold_start", "rtdmd": "out/rtdmd"}
PATIENCE = 10  # seconds that the hub has for its answer


def is_hub_id(where):
    """Whether a name that is no path here may be looked up on the hub: never a default."""
    return HUB_ID.fullmatch(where) is not None and where not in DEFAULT_PLACES.values()


def files_on_hub(where):
    """The names of a repository's files, or None where the hub cannot be asked.

    Then nothing else in this process asks it, and the cache is all there is: a library would try each
    file again and again. Raises what huggingface_hub raises where there is no such repository, or no
    permission (`in_words`).
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        info = HfApi().model_info(where, timeout=PATIENCE)
        return [file.rfilename for file in info.siblings or ()]
    except (RepositoryNotFoundError, HFValidationError):  # GatedRepoError is one of the first, too
        raise
    except HfHubHTTPError as e:
        status = e.response.status_code
        if 400 <= status < 500 and status not in (
            408,
            429,
        ):  # asking again, or later, does not help
            raise
        reason = f"it answers {status}"
    except OfflineModeIsEnabled:
        return None  # as the user asked
    except Exception as e:  # no network, in one of many ways
        reason = first_line(e)
    if not constants.HF_HUB_OFFLINE:
        note(f"the hub cannot be asked ({reason}): its cache on this machine is used")
        constants.HF_HUB_OFFLINE = True
    return None


def in_words(error, where):
    """What went wrong with the files of `where`, a path or a repository, and what to do: one line.

    error: an exception of any of the libraries; the one that it came from decides.
    """
    from huggingface_hub import errors

    chain = list(causes(error))
    kinds = [type(e) for e in chain]

    def among(*classes):
        return any(issubclass(kind, classes) for kind in kinds)

    if among(errors.GatedRepoError):
        return f"{where} is gated: accept the licence on huggingface.co/{where}, then hf auth login"
    if among(errors.RepositoryNotFoundError):
        return f"no such repository on the hub; if {where} is private: hf auth login"
    if among(torch.cuda.OutOfMemoryError):
        return f"no room on the GPU ({shortened(error)})"
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return "the disk is full; HF_HOME moves the hub's cache"
    if among(errors.RemoteEntryNotFoundError):
        return f"the repository lacks a file ({shortened(error)})"
    if among(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return f"the hub cannot be asked, and its cache has no whole copy of {where}"
    return shortened(error)


# ---- a directory, or a repository ----------------------------------------------------------------
def files_at(where):
    """The names of all files of a directory or a hub repository; None where they are not known."""
    if os.path.isdir(where):
        return files_under(where)
    names = files_on_hub(where)
    return files_in_cache(where) if names is None else names


def files_under(folder):
    """The names of all files in a directory, as a hub repository would list them."""
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    return found


def files_in_cache(repository):
    """The names of a repository's files that the hub's cache has, or None where it has none."""
    index = try_to_load_from_cache(repository, "model_index.json")
    return files_under(os.path.dirname(index)) if isinstance(index, str) else None


def variant_of(names):
    """ "fp16" for a base whose transformer is there in that variant alone, else None.

    names: of its files, as from `files_under`; None where they are not known.
    """
    weights = [
        name for name in names or () if re.match(r"transformer[/\\].*\.(safetensors|bin)", name)
    ]
    if weights and all(re.search(r"\.fp16[.-]", name) for name in weights):
        return "fp16"
    return None
