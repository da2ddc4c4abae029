# make tiny: the whole paper on this machine (stage 1, stage 2, sampling, scoreboard).  make smoke: one minute of tests.  make test: all of them.
# make ablations: the paper's tables 3 and 4 at this scale.  All set up .venv themselves.
PYTHON ?= python3
RUN ?= out/tiny
# one process a GPU; on a CPU two processes of one thread do half as much again as one of two threads
PROCESSES = $(eval PROCESSES := $(shell .venv/bin/python -c "import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count()))"))$(PROCESSES)
LAUNCH = OMP_NUM_THREADS=$(if $(filter 1,$(PROCESSES)),2,1) .venv/bin/torchrun --standalone --nproc_per_node=$(PROCESSES)

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

tiny: .venv/done
	$(LAUNCH) cold_start.py --preset tiny --resume --out_dir $(RUN)/cold_start
	$(LAUNCH) rtdmd_rl.py --preset tiny --resume --cold_start $(RUN)/cold_start --out_dir $(RUN)/rtdmd
	.venv/bin/python sample.py "a red circle and a blue square" --preset tiny --cold_start $(RUN)/cold_start --rtdmd $(RUN)/rtdmd --num_images 8 --out_dir $(RUN)/samples
	.venv/bin/python report.py $(RUN)

ablations: .venv/done
	.venv/bin/python report.py --ablations

.venv/optional: .venv/done  # the lines of requirements.txt that begin with "#   " and "#-  "
	sed -n 's/^#   //p' requirements.txt > $@.txt && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r $@.txt
	sed -n 's/^#-  //p' requirements.txt > $@.txt && .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $@.txt
	touch $@

smoke: .venv/done
	.venv/bin/python -m pytest -q test_smoke.py

test: .venv/optional
	.venv/bin/python -m pytest -q -n 2 test_smoke.py tests

lint: .venv/done
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

clean:
	rm -rf out .venv __pycache__

.PHONY: tiny ablations smoke test lint clean
