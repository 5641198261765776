# Concept frequency; arms: Zipf frequencies, equal ones, Zipf with its ranks given to other concepts.
# RESULTS=<clone of the authors' repository> re-derives the paper's figures as well (a .json file is where to write results
# to, as in the other folders; with both, name the clone as UPSTREAM).
CONCEPT_FREQUENCY_ARMS_core = zipf uniform reassigned
CONCEPT_FREQUENCY_ARMS_all  = $(CONCEPT_FREQUENCY_ARMS_core)
CONCEPT_FREQUENCY_MINUTES_core = 6
CONCEPT_FREQUENCY_MINUTES_all  = 6
concept_frequency/zipf        = emoji
concept_frequency/uniform     = emoji-uniform
concept_frequency/reassigned  = emoji-reassigned
CONCEPT_FREQUENCY_ARMS   = $(or $(CONCEPT_FREQUENCY_ARMS_$(ARMS)),$(ARMS))
CONCEPT_FREQUENCY_RUNS   = $(foreach seed,$(SEEDS),$(foreach arm,$(CONCEPT_FREQUENCY_ARMS),runs/concept_frequency/$(arm)-seed$(seed)))
CONCEPT_FREQUENCY_CLONE  = $(or $(filter-out %.json,$(RESULTS)),$(UPSTREAM))
CONCEPT_FREQUENCY_REPLAY = runs/concept_frequency/replay

.PHONY: reproduce-concept-frequency reproduce-concept_frequency
reproduce-concept_frequency: reproduce-concept-frequency
reproduce-concept-frequency: $(VENV)/.installed-concept_frequency data
	$(if $(filter-out $(CONCEPT_FREQUENCY_ARMS_all),$(CONCEPT_FREQUENCY_ARMS)),$(error ARMS is core, all, or some of: $(CONCEPT_FREQUENCY_ARMS_all)))
	$(if $(CONCEPT_FREQUENCY_CLONE),$(PY) -m concept_frequency.replay $(CONCEPT_FREQUENCY_CLONE) --out $(CONCEPT_FREQUENCY_REPLAY))
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(CONCEPT_FREQUENCY_RUNS)
	$(PY) -m concept_frequency.eval $(CONCEPT_FREQUENCY_RUNS) --report $(or $(filter %.json,$(RESULTS)),runs/concept_frequency/results.json) \
		$(if $(CONCEPT_FREQUENCY_CLONE),--replay $(CONCEPT_FREQUENCY_REPLAY)/results.json)

runs/concept_frequency/%: FORCE
	$(PY) -m concept_frequency.train $(concept_frequency/$(firstword $(subst -seed, ,$*))) --seed $(lastword $(subst -seed, ,$*)) --out $@
