# make install  the project's virtual environment in .venv, with exactly requirements.txt
# make demo     compress SmolLM2-135M-Instruct from nothing and talk to both
# make test     all tests
# make fmt lint clean
# make wheel    a wheel for this kind of machine, into dist/
#
# PYTHON=/path/to/python3.12 make install   uses that Python; any Python from 3.11 on will do.

PYTHON =
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
COMPILED = $(wildcard src/subbit/packed/kernels/*.cpp src/subbit/packed/kernels/b3/*.h src/subbit/binarize/*.cpp)
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install demo test wheel fmt lint clean

install: $(STAMP)

$(STAMP): requirements.txt pyproject.toml $(COMPILED)
	@set -e; \
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(PYTHON) python3.11 python3.12 python3.13 python3 none; do \
	  if [ "$$python" = none ]; then \
	    echo "error: no Python 3.11 or newer was found; name one with: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  if "$$python" -c "$$new_enough" >/dev/null 2>&1; then break; fi; \
	  if [ "$$python" = "$(PYTHON)" ]; then \
	    echo "error: PYTHON=$(PYTHON) is not a Python 3.11 or newer" >&2; \
	    exit 1; \
	  fi; \
	done; \
	if ! $(BIN)/python -c "import pip; $$new_enough" >/dev/null 2>&1; then \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  rm -rf $(VENV); \
	  "$$python" -m venv $(VENV); \
	fi; \
	echo "installing the pinned packages into $(VENV) (a few minutes the first time)"; \
	$(PIP) install --quiet -r requirements.txt; \
	$(PIP) install --quiet --no-deps -e .; \
	touch $(STAMP); \
	echo "installed; try: $(BIN)/subbit --help"

demo: install
	@$(BIN)/python -m subbit.demo

# One torch thread for each worker: the tests are small, and more threads only get in each other's way.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -m slow || [ $$? -eq 5 ]

wheel: install
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis
	rm -f src/subbit/packed/kernels/_b3*.so src/subbit/binarize/_descent*.so
	find src tests benchmarks \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
