# make demo | test | check | bench | gpu | gpu-suite | gpu-kernels | install | clean
# (needs Python 3.11 or newer and nothing else; gpu needs a host with a GPU and torch)
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check bench gpu gpu-suite gpu-kernels gpu-tests gpu-rehearsal install clean

# torch is named in the same command as the rest: left to other packages' requirements it would
# come in a newer version than the one in constraints.txt.
.venv/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch -e '.[all-cpu]'
	touch $@

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/hcf run recipes/quickstart.yaml

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p hcf -p hcf_kernels -p taiji -p hcf_bench

# One process a core with one thread each is twice as fast as one process with all the threads:
# most tests are too small to share out. A file stays in one process, for its fixtures. Waiting threads
# sleep: where every core has a process, spinning ones made some tests four times as long.
test: .venv/.installed check
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

# a CPU's record: bench/results/<machine>/, rendered into bench/README.md
bench: .venv/.installed
	$(BIN)/hcf bench suite recipes/bench/cpu.yaml -o out/cpu --store
	$(BIN)/hcf bench render

# all that a GPU has to show; the parts are there one by one for a host that is lent by the minute
gpu: gpu-tests gpu-suite gpu-kernels

# they run from the sources: such a host has torch of its own and often no network to install from
GPU_OUT ?= out/gpu
GPU_BUDGET ?= 540
gpu-tests:
	PYTHONPATH=.:kernels:models:bench $(PYTHON) -m pytest -m gpu tests

gpu-suite:
	PYTHONPATH=.:kernels:models:bench $(PYTHON) -m hcf_bench gpu --out $(GPU_OUT) --budget $(GPU_BUDGET)

# every fused kernel over the shapes models ask for
gpu-kernels:
	PYTHONPATH=.:kernels:models:bench $(PYTHON) -m hcf_bench kernels --device cuda \
		--output $(GPU_OUT)/kernels --budget $(GPU_BUDGET)

gpu-rehearsal: .venv/.installed
	PYTHONPATH=.:kernels:models:bench $(BIN)/python -m hcf_bench gpu --rehearsal --out out/rehearsal

clean:
	rm -rf .venv out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
