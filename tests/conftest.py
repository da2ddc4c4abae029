"""Before any test imports torch: no network, one thread, no GPU; and the programs can be imported. Then the fixtures
that several files share.
"""

import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

pytest.register_assert_rewrite("helpers", "gaussian", "small_rewards", "crash")

import cold_start
import rtdmd_rl
import sample
from helpers import BASE, COLD, RL, TINY, shell


@pytest.fixture(scope="module")
def tiny_parts():
    args = types.SimpleNamespace(**cold_start.PRESETS["tiny"])
    return args, cold_start.load_pipeline(args, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------- stage 1 -> stage 2 -> sample
@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Both stages and sample.py as a user runs them: three command lines."""
    t = tmp_path_factory.mktemp("run")
    results = [
        shell(cold_start, *COLD, "--out_dir", t / "cold"),
        shell(rtdmd_rl, *RL, "--cold_start", t / "cold", "--out_dir", t / "rl"),
        shell(
            sample,
            "a red circle",
            *BASE[:4],
            "--num_images",
            3,
            "--cold_start",
            t / "cold",
            "--rtdmd",
            t / "rl",
            "--out_dir",
            t / "pictures",
            "--rewards",
            "clipscore,checker",
            "--reward_path",
            f"clipscore={TINY}/clip",
        ),
    ]
    return SimpleNamespace(cold=t / "cold", rl=t / "rl", pictures=t / "pictures", results=results)
