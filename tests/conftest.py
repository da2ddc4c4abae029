import os
import sys
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
