# Two commands: `make quickstart` runs the whole loop on this machine, `make test` runs the tests. Both set up first.
.DEFAULT_GOAL := help
LOCK ?= $(if $(wildcard /proc/driver/nvidia/version),cuda,cpu)
export LOCK
.PHONY: help setup quickstart test test-slow test-groups test-engines lint types lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make .venv from the lock; nothing to do in under a second when it is there
	@requirements/setup.sh

quickstart: setup ## one whole Montessori-Instruct iteration on a real model; the same command continues it
	@.venv/bin/python jobs/full_loop.py --config configs/quickstart$(if $(filter cuda,$(LOCK)),_gpu).yaml

test: setup ## tests in under 15 minutes on 2 cores, one small loop on the real model among them
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 --dist worksteal
	.venv/bin/python -m pytest -m "slow and loop"

test-slow: setup ## kill and resume, several nodes, in half an hour on 2 cores
	.venv/bin/python -m pytest -m "slow and not loop" tests/cluster/test_kill_and_resume.py tests/cluster/test_jobs.py

test-groups: setup ## scoring groups that share, join, fail and come back; 28 disturbances on several raylets: 15 minutes
	.venv/bin/python -m pytest -m slow tests/cluster/test_scoring.py tests/cluster/test_disturbances.py

test-engines: setup ## the other slow tests: training, tuning, the teacher pool and arms of a comparison on their real engines
	.venv/bin/python -m pytest -m "slow and not loop" --ignore tests/cluster

lint: setup ## ruff, formatting included
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup ## mypy, strict
	.venv/bin/mypy montessori_ray jobs

lock: setup ## resolve requirements/*.in into the locks again
	@requirements/lock.sh

clean: ## remove the environment and the quickstart's run
	rm -rf .venv runs/quickstart runs/quickstart_gpu
