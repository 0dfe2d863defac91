# Everything a developer or CI runs. A target that needs the environment makes it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8080
MODEL_ID ?=
ARGS ?=
PROTO := text_generation_proto/v1/generate.proto

.PHONY: install clients schemathesis run test test-slow test-faults soak fuzz test-gpu check fmt lint types proto proto-check bench bench-gpu docker-lint clean

# One stamp for the whole environment: rebuilt when what it is made from changes.
$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, $(PYTHON) is %d.%d: name another with PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the rest into $(VENV), once: minutes, and without a word while pip works"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

# The old client of TGI's users wants other versions of our dependencies: it has an environment of its own.
$(VENV)/clients/.installed: .ci/constraints-clients.txt
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet --constraint $< text-generation
	touch $@

clients: $(VENV)/clients/.installed

$(VENV)/schemathesis/.installed: .ci/constraints-schemathesis.txt
	$(PYTHON) -m venv $(VENV)/schemathesis
	$(VENV)/schemathesis/bin/python -m pip install --quiet --constraint $< schemathesis
	touch $@

schemathesis: $(VENV)/schemathesis/.installed

run: install
	@$(BIN)/text-generation-launcher --port $(PORT) $(if $(MODEL_ID),--model-id "$(MODEL_ID)") $(ARGS)

# Two at a time, file by file, each computing on one thread: threads that wait for one another are slow beside others.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: install clients
	$(PYTEST)

test-slow: install clients schemathesis
	$(PYTEST) -m slow

# Real signals, broken connections, hostile models: every fault of docs/reliability.md, and its table anew.
FAULTS := build/faults.jsonl

test-faults: install
	@mkdir -p $(dir $(FAULTS)); rm -f $(FAULTS)
	FAULTS_TABLE=$(FAULTS) $(PYTEST) -m fault
	$(BIN)/python tests/faults/table.py --results $(FAULTS) --output docs/reliability.md

# Load, bad input, clients that leave and shards that are killed, all at once, for SOAK_MINUTES.
SOAK_MINUTES ?= 30

soak: install
	$(BIN)/python tests/faults/soak.py --minutes $(SOAK_MINUTES)

# Bodies that nobody would send, of every route.
fuzz: install
	$(BIN)/python tests/faults/fuzz.py --bodies 100000

# The gate, the quick ones first.
check: lint types proto-check test

fmt: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

proto: install
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/$(PROTO)

# The generated files are checked in: regenerate beside them and compare.
proto-check: install
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out="$$fresh" --pyi_out="$$fresh" --grpc_python_out="$$fresh" proto/$(PROTO); \
	for file in "$$fresh"/text_generation_proto/v1/*; do \
		cmp "$$file" "proto/text_generation_proto/v1/$$(basename "$$file")" || { echo "stale: run 'make proto'"; exit 1; }; \
	done; echo "proto-check: generated files are up to date"

# Against vLLM for CPU and transformers serve, in environments of their own; minutes on a quiet machine. BENCH holds
# what is made for it (a random model, the peers) and is kept between runs.
BENCH ?= .bench
BENCH_SERVERS ?= ours,vllm,vllm-all-cores,transformers,llama.cpp

$(BENCH)/model: $(VENV)/.installed
	$(BIN)/python tests/bench/make_model.py --output $@

$(BENCH)/peers: $(VENV)/.installed
	$(BIN)/python tests/bench/make_peers.py --output $@

bench: install $(BENCH)/model $(BENCH)/peers
	$(BIN)/python tests/bench/compare.py --model $(BENCH)/model --peers $(BENCH)/peers --servers $(BENCH_SERVERS) \
		--concurrency 1,8,32 --prompt-tokens 128 --output-tokens 64 --rounds 3 --output docs/
	$(BIN)/python tests/bench/router_bench.py --model $(BENCH)/model

# Everything that is promised of a GPU, on one: minutes, and 16 GB for a model.
bench-gpu: install
	$(BIN)/python tests/bench/gpu_bench.py --work $(BENCH)/gpu --output docs/ $(ARGS)

test-gpu: install
	$(BIN)/python -m pytest -m gpu

docker-lint: install
	$(BIN)/hadolint docker/Dockerfile

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
