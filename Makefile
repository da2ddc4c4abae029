# make tiny: the whole paper on this machine: stage 1, stage 2, pictures, scoreboard. Called again, it goes on.
# make long: five seeds of a long run on a GPU, with error bars.
# make ablations: the paper's tables 3 and 4 at this scale. make smoke: one minute of tests. make test: all of them.
PYTHON ?= python3
RUN ?= out/tiny
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
# One process a GPU; on a CPU two processes of one thread do half as much again as one of two threads.
COUNT = import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count()))
PROCESSES = $(eval PROCESSES := $(shell .venv/bin/python -c "$(COUNT)"))$(PROCESSES)
THREADS = $(if $(filter 1,$(PROCESSES)),2,1)
TORCHRUN = OMP_NUM_THREADS=$(THREADS) .venv/bin/torchrun --standalone --nproc_per_node=$(PROCESSES)

tiny: .venv/plots
	$(TORCHRUN) cold_start.py --preset tiny --out_dir $(RUN)/cold_start
	$(TORCHRUN) rtdmd_rl.py --preset tiny --cold_start $(RUN)/cold_start --out_dir $(RUN)/rtdmd
	.venv/bin/python sample.py "a red circle and a blue square" --preset tiny --cold_start $(RUN)/cold_start --rtdmd $(RUN)/rtdmd --num_images 8 --out_dir $(RUN)/samples
	.venv/bin/python -m tools.scoreboard $(RUN)

ablations: .venv/done
	.venv/bin/python -m tools.ablations

long: .venv/done
	.venv/bin/python -m tools.long --jobs 5

smoke: .venv/dev
	.venv/bin/python -m pytest -q test_smoke.py

test: .venv/dev
	.venv/bin/python -m pytest -q -n 2 test_smoke.py tests

lint: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

clean:
	rm -rf out .venv __pycache__

# ---- what has to be installed: for the programs, for report.png, for work on this repository
.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/plots: .venv/done requirements-dev.txt  # of that list matplotlib alone
	$(PIP) -c requirements-dev.txt matplotlib
	touch $@

.venv/dev: .venv/done requirements-dev.txt requirements-dev-nodeps.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-dev-nodeps.txt
	touch $@

.DEFAULT_GOAL = tiny
.PHONY: tiny long ablations smoke test lint clean
