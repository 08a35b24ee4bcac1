# PYTHON=... chooses the Python: for `install`, the one that .venv is made with; for `test-gpu`, the one that runs.
.PHONY: help install demo test test-all check test-gpu clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Create .venv with pinned dependencies; quick when it is there already
	@scripts/install

demo: ## See the bug and the cure on a simulated GPU, check on the CPU, upscale a video
	@scripts/install demo
	@echo "The reported bug, put back into the engine, on a simulated accelerator:"
	@.venv/bin/anabranch check relu --device sim --dtype float16 --shape 1,3,5 --calls 16 --inject stale-stream; \
	    test $$? = 1 || { echo "make demo: the injected bug was not found" >&2; exit 1; }
	@echo "The engine as it is:"
	.venv/bin/anabranch check relu --device sim --dtype float32 --dtype float16 --shape 1,3,5 --shape 1,3,54,96 --calls 16
	.venv/bin/anabranch check relu --device cpu --dtype float32 --dtype float16 --shape 1,3,5 --shape 1,3,540,960 --calls 16
	.venv/bin/python examples/upscale_video.py --device cpu --frames 24

test: install ## Run the linters, the type checker and the tests that need no GPU
	@scripts/check
	@scripts/test

test-all: install ## Run every test that needs no GPU, the slow ones too, and write benchmarks/results/test_all.json
	@scripts/check
	@scripts/test --all

check: install ## Run the linters and the type checker only
	@scripts/check

# No virtual environment: a GPU host's own Python has the PyTorch that fits its driver.
test-gpu: ## Run the GPU tests with the Python that this host has; a skip is a failure
	PYTHONPATH=src ANABRANCH_REQUIRE_GPU=1 $(or $(PYTHON),python3) -m pytest -m gpu tests/gpu

clean: ## Remove .venv and everything that was made
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis upscaled.mp4
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +
