"""Before any test imports torch: no network, one thread, no GPU; and the programs can be imported."""

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
