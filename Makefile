# Each target sets up what it needs, alone, from nothing but Python 3.11+ (demo: 3.10+), pip and make.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
RUN := $(VENV)/bin/python
# What the quicker `demo`, `test` and `mutate` do with; `wheel` and `bench` build what is shipped, or LIGER_AOT_ARCHS.
TEST_ARCHS := 90
# The flavour of `wheel` and `pack`: 12.6, 12.9 or 13.0; none for the wheel without a suffix. tools/flavour.py has the pins.
CUDA ?=

.PHONY: demo lint test floor slow wheel smoke sdist index pack bench carry gpu static plots mutate sweep docs clean

$(PIP):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"

TORCH := torch==2.13.0
# torch is installed first and pinned here: the newest build of a registry would bring gigabytes, also as somebody's dependency.
$(VENV)/demo: pyproject.toml Makefile | $(PIP)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --group demo
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(PIP) install --quiet --group docs
	touch $@

$(VENV)/ready: $(VENV)/demo
	$(PIP) install --quiet --group test
	$(PIP) install --quiet --no-deps --group sat
	touch $@

# install,ARCHS: build the wheel with what the environment holds, so that only what changed is compiled, and install it.
define install
	rm -rf build/wheel
	LIGER_AOT_CUDA= LIGER_AOT_ARCHS=$(1) $(PIP) wheel --verbose --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PIP) install --quiet --force-reinstall --no-deps build/wheel/*.whl
endef

demo: $(VENV)/demo
	$(call install,$(TEST_ARCHS))
	cd build/wheel && ../../$(RUN) -m liger_aot demo --out ../../out

lint: $(PIP)
	$(PIP) install --quiet --group lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: $(VENV)/ready lint
	$(call install,$(TEST_ARCHS))
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What `test` leaves out: it builds wheels of every flavour, and installs them in environments of their own.
slow: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

# The binder and its ways in under the oldest transformers that pyproject.toml takes, which goes with the hub's client of its
# time: both in a folder that Python looks into first. And the losses under the last TRL that took its own from Liger-Kernel.
floor: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	rm -rf build/floor build/trl
	$(PIP) install --quiet --target build/floor "huggingface_hub>=1.5,<2"
	$(PIP) install --quiet --target build/floor --no-deps transformers==5.17.0
	PYTHONPATH=$(CURDIR)/build/floor OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_bind*.py tests/test_ways_in.py
	$(PIP) install --quiet --target build/trl --no-deps trl==1.12.0
	LIGER_AOT_TRL_1_12=build/trl OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_chunked_loss_trl.py

# In isolation, with the pinned requirements alone; a folder for each flavour, so that only what changed is compiled.
wheel: $(PIP)
	LIGER_AOT_CUDA=$(CUDA) $(PIP) wheel --verbose --no-deps -C build-dir=build/cuda$(CUDA) --wheel-dir dist .
	ls -l dist

# The flavour's wheel in dist/, in an environment of its own beside torch alone, under the Python that PYTHON names.
STEP = 'import sys, torch, liger_aot; x = torch.ones(2, 8, requires_grad=True); liger_aot.rms_norm(x, (8,)).sum().backward(); \
	assert x.grad is not None and "triton" not in sys.modules'
SUFFIXED = $(wildcard dist/liger_aot-*+cu$(subst .,,$(CUDA))*.whl)
smoke:
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet $(TORCH)
	build/smoke/bin/pip install --quiet $(if $(CUDA),$(SUFFIXED),$(filter-out $(SUFFIXED),$(wildcard dist/liger_aot-*.whl)))
	cd build/smoke && bin/python -m liger_aot verify && bin/python -m liger_aot info --arch 9.0 && bin/python -c $(STEP)

sdist: $(PIP)
	$(PIP) install --quiet "build>=1.2"
	$(RUN) -m build --sdist --outdir dist .

index:
	$(PYTHON) tools/index.py dist

ifeq ($(MAKECMDGOALS)-$(ARCH),pack-)
$(error make pack: which architecture? make pack ARCH=75, or ARCH=110f CUDA=13.0)
endif
pack: $(PIP)
	LIGER_AOT_CUDA=$(CUDA) LIGER_AOT_ARCHS=$(ARCH) \
		$(PIP) wheel --verbose --no-deps -C build-dir=build/cuda$(CUDA) --wheel-dir build/pack .
	mkdir -p dist/packs
	cp build/cuda$(CUDA)/packs/sm_$(ARCH).zip dist/packs
	@echo "It is found where this is set: export LIGER_AOT_PACKS=$(CURDIR)/dist/packs"

bench: $(VENV)/ready
	$(call install,$(LIGER_AOT_ARCHS))
	$(RUN) benchmarks/run.py --wheel build/wheel/*.whl --out out/bench.json

# What `gpu` needs on a machine without a network: our wheel, Liger's, which commit it is, and kernels to choose among, for TRY.
CARRY ?= build/carry
TRY ?= 90
carry: $(VENV)/ready
	rm -rf $(CARRY)
	LIGER_AOT_CUDA=$(CUDA) $(PIP) wheel --quiet --no-deps -C build-dir=build/cuda$(CUDA) --wheel-dir $(CARRY) .
	$(PIP) download --quiet --no-deps --only-binary=:all: --dest $(CARRY) liger-kernel==0.8.5
	git describe --always --dirty --abbrev=40 --exclude '*' > $(CARRY)/commit
	$(PIP) install --quiet --force-reinstall --no-deps $(CARRY)/liger_aot-*.whl
	$(RUN) benchmarks/candidates.py $(TRY) $(CARRY)/candidates
	ls -l $(CARRY)

# All that needs a GPU, within ten minutes or GPU_SECONDS. Nothing is fetched: torch and transformers are those that PYTHON has.
GPU_OUT ?= out/gpu.json
GPU_SECONDS ?=
ONLY ?=
MATCH ?=
gpu:
	@ls $(CARRY)/liger_aot-*.whl >/dev/null 2>&1 || { echo "make gpu: no wheel of ours in $(CARRY); make carry, with a network"; exit 2; }
	rm -rf build/gpu
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target build/gpu $(CARRY)/*.whl
	PYTHONPATH=build/gpu LIGER_AOT_COMMIT=$$(cat $(CARRY)/commit) LIGER_AOT_CANDIDATES=$(CARRY)/candidates \
		$(PYTHON) benchmarks/gpu/run.py --out $(GPU_OUT) $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(MATCH),--match '$(MATCH)')

# What the machine code of all variants says; no GPU takes part.
static: $(VENV)/ready
	$(call install,$(LIGER_AOT_ARCHS))
	$(RUN) benchmarks/static.py --out out/static.json

# From the figures of benchmarks/results; without one, a prediction that says it is one.
plots: $(VENV)/demo
	$(RUN) benchmarks/pictures.py

mutate: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	$(RUN) tests/mutate.py

sweep: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	OMP_NUM_THREADS=1 $(RUN) tests/sweep.py

# Warnings are errors; the pages are in out/docs/html.
docs: $(VENV)/docs
	$(call install,90)
	$(RUN) tools/pages.py out/docs

clean:
	rm -rf build dist out $(VENV)
