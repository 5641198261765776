# Two commands: `make reproduce-<folder>` and `make test`. Everything they need is installed into .venv on first use.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
SEEDS  ?= 0
ARMS   ?= core
CORES  := $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
JOBS   ?= $(shell $(PYTHON) -c 'print(min($(CORES), 4))')
THREADS = $(shell $(PYTHON) -c 'print(max($(CORES) // $(JOBS), 1))')
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help data test reproduce-protoclip readme clean FORCE
.SECONDARY:

help:
	@echo 'make reproduce-protoclip          train the arms on the embedded corpus, print the claims table (SEEDS="0 1 2", ARMS=all, RESULTS=file)'
	@echo 'make test                         install and run all tests, offline after installation'
	@echo 'make parity-protoclip UPSTREAM=~/src/protoclip    our functions against the authors'"'"' clone'
	@echo 'make bench-protoclip [UPSTREAM=...]               speed as ratios, on the same inputs in one process'
	@echo 'make data                         build the embedded emoji corpus in data/emoji'

# ---- installation: base + one extra per folder
$(PY):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-base: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-base
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

data: $(VENV)/.installed-base
	$(PY) -m shared.emoji --out data/emoji

# ---- ProtoCLIP; arms: CLIP, CLIP with the other augmentation, + prototypes, + back translation, + external teacher
PROTOCLIP_ARMS_core = clip clip-light-aug proto-no-pbt proto-pbt protoclip
PROTOCLIP_ARMS_all  = $(PROTOCLIP_ARMS_core) clip-equal-time
protoclip/clip             = emoji-clip
protoclip/clip-light-aug   = emoji-clip --augmentation light
protoclip/clip-equal-time  = emoji-clip --episodes 58
protoclip/proto-no-pbt     = emoji --w-external 0 --no-back-translate
protoclip/proto-pbt        = emoji --w-external 0
protoclip/protoclip        = emoji
PROTOCLIP_ARMS = $(or $(PROTOCLIP_ARMS_$(ARMS)),$(ARMS))
PROTOCLIP_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(PROTOCLIP_ARMS),runs/protoclip/$(arm)-seed$(seed)))

# Runs of one thread side by side use the cores better than one run of many threads, half of whose time is decoding.
reproduce-protoclip: $(VENV)/.installed-protoclip data
	$(if $(filter-out $(PROTOCLIP_ARMS_all),$(PROTOCLIP_ARMS)),$(error ARMS is core, all, or some of: $(PROTOCLIP_ARMS_all)))
	$(PY) -m protoclip.teacher minilm
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(PROTOCLIP_RUNS)
	$(PY) -m protoclip.eval $(PROTOCLIP_RUNS) --report $(or $(RESULTS),runs/protoclip/results.json)

runs/protoclip/%: FORCE
	$(PY) -m protoclip.train $(protoclip/$(firstword $(subst -seed, ,$*))) --seed $(lastword $(subst -seed, ,$*)) --out $@

# ---- checks
test: $(VENV)/.installed-protoclip,test data
	$(PY) -m protoclip.teacher minilm
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m pytest -q

parity-%: $(VENV)/.installed-%,test
	@test -n "$(UPSTREAM)" || { echo 'say where the clone of the authors'"'"' repository is: make $@ UPSTREAM=PATH'; exit 2; }
	$(PY) -m pytest -q -s tests/parity/test_$*.py --upstream $(UPSTREAM)

bench-%: $(VENV)/.installed-%,test
	$(PY) -m tests.bench.$* $(if $(UPSTREAM),--upstream $(UPSTREAM))

clean:
	rm -rf runs data

readme: $(VENV)/.installed-protoclip
	$(PY) -m shared.report protoclip
