# TinyCLIP; arms: {random, inherited} x {contrastive, affinity}; then learned masks, random channels, one stage or two
TINYCLIP_ARMS_core = random-contrastive random-affinity inherited-contrastive inherited-affinity
TINYCLIP_ARMS_all  = $(TINYCLIP_ARMS_core) random-channels auto auto-half auto-oneshot auto-progressive
TINYCLIP_MINUTES_core = 12
TINYCLIP_MINUTES_all  = 24
tinyclip-seed      = $(lastword $(subst -seed, ,$*))
tinyclip-teacher   = runs/tinyclip/teacher-seed$(tinyclip-seed)
tinyclip-from      = --teacher $(tinyclip-teacher) --init $(tinyclip-teacher)
tinyclip/teacher               = emoji-teacher
tinyclip/random-contrastive    = emoji-contrastive --init None
tinyclip/random-affinity       = emoji --teacher $(tinyclip-teacher) --init None
tinyclip/inherited-contrastive = emoji-contrastive --init $(tinyclip-teacher)
tinyclip/inherited-affinity    = emoji $(tinyclip-from)
tinyclip/random-channels       = emoji $(tinyclip-from) --inherit random
tinyclip/auto                  = emoji-auto $(tinyclip-from)
# one stage to a quarter, or two of half as many steps each, by way of a half
tinyclip/auto-oneshot          = emoji-auto $(tinyclip-from) --steps 400 --prune-step 160 --sparsity-warmup 80 --target-sparsity 0.75
tinyclip-half                  = --steps 200 --prune-step 80 --sparsity-warmup 40 --mask-lr 0.3 --lambda-lr -0.3
tinyclip/auto-half             = emoji-auto $(tinyclip-from) $(tinyclip-half) --target-sparsity 0.5
tinyclip/auto-progressive      = emoji-auto --teacher $(tinyclip-teacher) --init runs/tinyclip/auto-half-seed$(tinyclip-seed) \
                                 $(tinyclip-half) --start-sparsity 0.5 --target-sparsity 0.75
TINYCLIP_ARMS = $(or $(TINYCLIP_ARMS_$(ARMS)),$(ARMS))
tinyclip-runs = $(foreach seed,$(SEEDS),$(foreach arm,$(1),runs/tinyclip/$(arm)-seed$(seed)))

# The teachers first, since all other arms need them; second stages last. One thread for each run side by side.
reproduce-tinyclip: $(VENV)/.installed-tinyclip data
	$(if $(filter-out $(TINYCLIP_ARMS_all),$(TINYCLIP_ARMS)),$(error ARMS is core, all, or some of: $(TINYCLIP_ARMS_all)))
	OMP_NUM_THREADS=$(if $(word 2,$(SEEDS)),$(THREADS),$(CORES)) $(MAKE) --no-print-directory -j $(JOBS) $(call tinyclip-runs,teacher)
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(call tinyclip-runs,$(filter-out auto-progressive,$(TINYCLIP_ARMS)))
	$(if $(filter auto-progressive,$(TINYCLIP_ARMS)),OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(call tinyclip-runs,auto-progressive))
	$(PY) -m tinyclip.eval $(call tinyclip-runs,teacher $(TINYCLIP_ARMS)) --report $(or $(RESULTS),runs/tinyclip/results.json)

runs/tinyclip/%: FORCE
	$(PY) -m tinyclip.train $(tinyclip/$(firstword $(subst -seed, ,$*))) --seed $(tinyclip-seed) --out $@
