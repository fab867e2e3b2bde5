# Each target sets up what it needs, alone, from nothing but Python 3.10+, pip and make.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip
RUN := $(VENV)/bin/python
# What `wheel` and `bench` build, and what the quicker `demo`, `test` and `mutate` do with.
LIGER_AOT_ARCHS ?= 80,90,100f,120f
TEST_ARCHS := 80,90

.PHONY: demo test wheel bench mutate sweep clean

# torch is installed first and pinned here: the newest build of a registry would bring gigabytes, also as somebody's dependency.
$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --group test
	touch $@

# install,ARCHS: build the wheel with what the environment holds, so that only what changed is compiled, and install it.
define install
	rm -rf dist
	LIGER_AOT_ARCHS=$(1) $(PIP) wheel --verbose --no-build-isolation --no-deps --wheel-dir dist .
	$(PIP) install --quiet --force-reinstall --no-deps dist/*.whl
endef

demo: $(VENV)/ready
	$(call install,90)
	cd dist && ../$(RUN) -m liger_aot demo --out ../out

test: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

wheel: $(VENV)/ready
	$(call install,$(LIGER_AOT_ARCHS))
	ls -l dist

bench: $(VENV)/ready
	$(call install,$(LIGER_AOT_ARCHS))
	$(RUN) benchmarks/run.py --out out/bench.json

mutate: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	$(RUN) tests/mutate.py

sweep: $(VENV)/ready
	$(call install,$(TEST_ARCHS))
	OMP_NUM_THREADS=1 $(RUN) tests/sweep.py

clean:
	rm -rf build dist out $(VENV)
