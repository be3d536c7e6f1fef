# Each target does all its own set-up: it makes .venv and installs what it needs, once.
#
#   make train                          train on real text: all GPUs, or 2 CPU ranks where there is none
#   make train ARGS="--steps 20"        ... with choices (see scripts/train_proxy.py tiny --help)
#   make test | test-gpu | lint | kernels | bench
#
#   PYTHON=python3.12                   the interpreter that .venv is made from
#   TORCH_SPEC="torch==2.11.0"          the torch to install, as arguments of pip: a version, a wheel's path, options
#   make PYTHON=python3 VENV= train     use that interpreter as it is and install nothing (an image with all packages)
#
# An interpreter that already has a torch with CUDA shares it with .venv (--system-site-packages).

PYTHON ?= python3
VENV ?= .venv
NGPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
# Without a GPU the version that the CPU tests ran on. (Where the plain version is a CUDA build, it works too, but is
# large: name a CPU build in TORCH_SPEC.)
TORCH_SPEC ?= $(if $(filter 0,$(NGPU)),torch==2.13.0,torch>=2.8,<2.14)

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
TRAIN_READY := $(if $(VENV),$(VENV)/.installed-train)
DEV_READY := $(if $(VENV),$(VENV)/.installed-dev)
BENCH_READY := $(if $(VENV),$(VENV)/.installed-bench)
RUN := runs/$(if $(filter 0,$(NGPU)),tiny,qwen3-next-proxy)-$(shell date +%Y%m%d-%H%M%S)
CHECKED := gdn_cp tests scripts

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-gpu lint kernels bench clean

train: $(TRAIN_READY)
ifeq ($(NGPU),0)
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 scripts/train_proxy.py tiny --cp 2 --out $(RUN) $(ARGS)
else
	ranks=1; while [ $$((2 * ranks)) -le $(NGPU) ]; do ranks=$$((2 * ranks)); done; \
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $$ranks scripts/train_proxy.py qwen3-next-proxy \
	  --cp $$ranks --out $(RUN) $(ARGS)
endif

test: $(DEV_READY)
	$(PY) -m pytest -n 2 -m "not gpu and not multi_gpu" $(ARGS)

test-gpu: $(DEV_READY)
	$(PY) -m pytest -m "gpu or multi_gpu" $(ARGS)

lint: $(DEV_READY)
	$(PY) -m ruff check $(CHECKED)
	$(PY) -m ruff format --check $(CHECKED)
	$(PY) -m pyright --pythonpath $(PY)

kernels: $(DEV_READY)  # registers, spills, shared memory of every Triton kernel on sm_90; needs no GPU
	$(PY) -m gdn_cp.kernels.compile_report

bench: $(BENCH_READY)
	set -e; for what in chunk decode gate; do \
	  $(PY) scripts/bench_kernels.py $$what --output benchmarks/results/$$what.json $(ARGS); done
	$(PY) scripts/plot_bench.py benchmarks/results/chunk.json benchmarks/results/decode.json

clean:
	rm -rf $(if $(VENV),$(VENV)) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed-%: pyproject.toml
	test -x $(VENV)/bin/python || { \
	  $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	    && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV); }
	$(PY) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	  || $(PY) -m pip install --quiet $(foreach part,$(TORCH_SPEC),'$(part)')
	$(PY) -m pip install --quiet --editable '.[$*]'
	touch $@
