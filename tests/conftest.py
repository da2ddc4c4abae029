"""What has to be so before any test imports torch, then the fixtures that several files share.

There is no network, one thread and no GPU, and the programs can be imported. The few tests of a GPU
are asked for: ON_A_GPU=1 python -m pytest tests -k on_a_gpu
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
if "ON_A_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

pytest.register_assert_rewrite("helpers", "gaussian", "small_rewards", "crash")

import cold_start
import rtdmd_rl
from helpers import BASE, COLD, RL, TINY, shell, tiny_args, tiny_base
from small_backbones import flux1, klein


@pytest.fixture(scope="module")
def tiny_parts():
    """(flags of the preset, the tiny base model)"""
    return tiny_args(), tiny_base()


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """{name: directory of a small pipeline}, one of each family and a FLUX.1 like schnell"""
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "sd3": str(TINY),
        "flux1": flux1(folder / "flux1"),
        "schnell": flux1(folder / "schnell", guidance=False),
        "klein": klein(folder / "klein"),
    }


# ---- stage 1 -> stage 2 -> sample
@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Both stages and sample.py as a user runs them: three command lines."""
    t = tmp_path_factory.mktemp("run")
    results = [
        shell(cold_start, *COLD, "--out_dir", t / "cold"),
        shell(rtdmd_rl, *RL, "--cold_start", t / "cold", "--out_dir", t / "rl"),
        shell(
            SimpleNamespace(__name__="sample"),
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
        ),
    ]
    return SimpleNamespace(cold=t / "cold", rl=t / "rl", pictures=t / "pictures", results=results)
