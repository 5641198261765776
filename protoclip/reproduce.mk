# ProtoCLIP; arms: CLIP, CLIP with the other augmentation, + prototypes, + back translation, + external teacher
PROTOCLIP_ARMS_core = clip clip-light-aug proto-no-pbt proto-pbt protoclip
PROTOCLIP_ARMS_all  = $(PROTOCLIP_ARMS_core) clip-equal-time
protoclip/clip             = emoji-clip
protoclip/clip-light-aug   = emoji-clip --augmentation light
protoclip/clip-equal-time  = emoji-clip --episodes 58
protoclip/proto-no-pbt     = emoji --w-external 0 --no-back-translate
protoclip/proto-pbt        = emoji --w-external 0
protoclip/protoclip        = emoji
PROTOCLIP_MINUTES_core = 12
PROTOCLIP_MINUTES_all  = 14
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
