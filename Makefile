# make demo, make test: each makes .venv if absent, installs, and runs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test check slurm ray faults distributed

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "error: Python %d.%d found; 3.11 to 3.13 is needed (make PYTHON=python3.12 ...)" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Train both families at four sizes, score every run, measure generation, open the report.
demo: setup
	$(BIN)/python -m experiments.train experiment=demo
	$(BIN)/python -m experiments.evaluate suite=demo
	$(BIN)/python -m experiments.benchmark bench=generate suite=demo n_threads=1
	$(BIN)/python -m analysis.report suite=demo

# The quick tests first, then the slow ones (those that start processes); two files at a time, a thread each.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A sweep on a real SLURM of one node: as root, after apt-get install slurmctld slurmd slurm-client munge.
slurm: setup
	$(BIN)/python -m pytest -s tests/cluster/slurm_proof.py

# A sweep on a real Ray of this machine.
ray: setup
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -s tests/cluster/ray_proof.py

# Trainings killed fifty times for each family, in every part of their work: minutes.
faults: setup
	$(BIN)/python -m pytest -s tests/faults/*_proof.py tests/faults/*/*_proof.py

# Several gloo processes of this machine against one, over 50 steps; every way to start them.
distributed: setup
	$(BIN)/python -m pytest -s tests/distributed/ranks_proof.py
