# NMTune; arms: encoders pre-trained at five ratios of label noise, small CLIPs at two (ARMS=all: five) of caption noise
NMTUNE_ARMS_core = sup-00 sup-05 sup-10 sup-20 sup-30 clip-00 clip-30
NMTUNE_ARMS_all  = sup-00 sup-05 sup-10 sup-20 sup-30 clip-00 clip-05 clip-10 clip-20 clip-30
NMTUNE_MINUTES_core = 13
NMTUNE_MINUTES_all  = 20
NMTUNE_ARMS = $(or $(NMTUNE_ARMS_$(ARMS)),$(ARMS))
NMTUNE_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(NMTUNE_ARMS),runs/nmtune/$(arm)-seed$(seed)))

# Of each encoder: pre-training at its noise ratio, then every head on its frozen features, five tuning seeds each.
reproduce-nmtune: $(VENV)/.installed-nmtune data
	$(if $(filter-out $(NMTUNE_ARMS_all),$(NMTUNE_ARMS)),$(error ARMS is core, all, or some of: $(NMTUNE_ARMS_all)))
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(NMTUNE_RUNS)
	$(PY) -m nmtune.eval $(NMTUNE_RUNS) --report $(or $(RESULTS),runs/nmtune/results.json)

runs/nmtune/%: FORCE
	$(PY) -m nmtune.pretrain emoji-$(firstword $(subst -seed, ,$*)) --seed $(lastword $(subst -seed, ,$*)) --out $@
	$(PY) -m nmtune.study --encoder $@
