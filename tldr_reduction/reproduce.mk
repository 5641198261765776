# TL;DR; a seed's stages: codebook captioner, the captioner on clean captions, ITM scorer; reductions; then the arms
TLDR = runs/tldr_reduction
TLDR_ARMS_core = full random random-refined tldr random-steps random-refined-steps tldr-steps
TLDR_ARMS_all  = $(TLDR_ARMS_core) codes codes-steps full-refined generated-steps first-steps itm-steps image-steps \
	text-steps farthest-steps tldr10-steps tldr50-steps drop-random10 drop-itm10 drop-random30 drop-itm30 \
	drop-random50 drop-itm50 drop-random70 drop-itm70 blip-random-refined blip-tldr

# reductions: what python -m tldr_reduction.reduce is called with; random, first and itm keep as many pairs as tldr does
tldr/reduce/tldr        =
tldr/reduce/codes       = --captions original
tldr/reduce/generated   = --captions generated
tldr/reduce/random      = --select random --match $(TLDR)/reduced/tldr-seed$* --captions original
tldr/reduce/random-refined = --select random --match $(TLDR)/reduced/tldr-seed$*
tldr/reduce/first       = --select first --match $(TLDR)/reduced/tldr-seed$*
tldr/reduce/itm         = --select itm --match $(TLDR)/reduced/tldr-seed$*
tldr/reduce/all         = --select all
tldr/reduce/image       = --features image
tldr/reduce/text        = --features text
tldr/reduce/farthest    = --select farthest
tldr/reduce/tldr10      = --keep 0.1
tldr/reduce/tldr50      = --keep 0.5
$(foreach p,10 30 50 70,$(foreach s,random itm,$(eval tldr/reduce/drop-$(s)$(p) = --select $(s) --captions original --keep 0.$(shell expr 100 - $(p)))))

# arms: reduction (none: the pool), preset and flags; -steps: as many steps as the whole pool gives, with the same decay
TLDR_STEPS = --epochs 76 --lr-decay-rate 0.967
tldr/arm/full           = emoji-clip
tldr/arm/full-refined   = emoji-clip
tldr/from/full-refined  = all
$(foreach arm,random random-refined tldr codes,$(eval tldr/from/$(arm) = $(arm))$(eval tldr/arm/$(arm) = emoji-clip))
$(foreach arm,random random-refined tldr codes generated first itm image text farthest,$(eval tldr/from/$(arm)-steps = $(arm))$(eval tldr/arm/$(arm)-steps = emoji-clip $(TLDR_STEPS)))
$(foreach p,10 30 50 70,$(foreach s,random itm,$(eval tldr/from/drop-$(s)$(p) = drop-$(s)$(p))$(eval tldr/arm/drop-$(s)$(p) = emoji-clip)))
tldr/from/tldr10-steps  = tldr10
tldr/arm/tldr10-steps   = emoji-clip --epochs 190 --lr-decay-rate 0.987
tldr/from/tldr50-steps  = tldr50
tldr/arm/tldr50-steps   = emoji-clip --epochs 39 --lr-decay-rate 0.937
tldr/from/blip-random-refined = random-refined
tldr/arm/blip-random-refined  = emoji-blip
tldr/from/blip-tldr     = tldr
tldr/arm/blip-tldr      = emoji-blip

TLDR_ARMS = $(or $(TLDR_ARMS_$(ARMS)),$(ARMS))
TLDR_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(TLDR_ARMS),$(TLDR)/$(arm)-seed$(seed)))
TLDR_REDUCTIONS = tldr $(filter-out tldr,$(sort $(foreach arm,$(TLDR_ARMS),$(tldr/from/$(arm)))))

.PHONY: reproduce-tldr-reduction reproduce-tldr_reduction
reproduce-tldr_reduction: reproduce-tldr-reduction
reproduce-tldr-reduction: $(VENV)/.installed-tldr_reduction data
	$(if $(filter-out $(TLDR_ARMS_all),$(TLDR_ARMS)),$(error ARMS is core, all, or some of: $(TLDR_ARMS_all)))
	$(PY) -m tldr_reduction.corpus
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(foreach seed,$(SEEDS),$(TLDR)/finetune-seed$(seed) $(TLDR)/scorer-seed$(seed))
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(SEEDS:%=$(TLDR)/reduced/all-of-seed%)
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(TLDR_RUNS)
	$(PY) -m tldr_reduction.eval $(TLDR_RUNS) --report $(or $(RESULTS),$(TLDR)/results.json)

$(TLDR)/finetune-seed%: FORCE
	$(PY) -m tldr_reduction.train emoji-captioner --seed $* --out $(TLDR)/captioner-seed$*
	$(PY) -m tldr_reduction.train emoji-finetune --init $(TLDR)/captioner-seed$* --seed $* --out $@
$(TLDR)/scorer-seed%: FORCE
	$(PY) -m tldr_reduction.train emoji-scorer --seed $* --out $@

# one after the other: they share codes, scores and captions
$(TLDR)/reduced/all-of-seed%: FORCE
	$(foreach name,$(TLDR_REDUCTIONS),$(PY) -m tldr_reduction.reduce data/emoji_tldr/pool --keep 0.25 \
		--captioner $(TLDR)/captioner-seed$* --caption-model $(TLDR)/finetune-seed$* --scorer $(TLDR)/scorer-seed$* \
		--work $(TLDR)/work-seed$* --seed $* --out $(TLDR)/reduced/$(name)-seed$* $(tldr/reduce/$(name)) &&) true

# ARM-seedN trains ARM's preset on its reduction of seed N
TLDR_arm = $(firstword $(subst -seed, ,$*))
TLDR_from = $(tldr/from/$(TLDR_arm))
$(TLDR)/%: FORCE
	$(PY) -m tldr_reduction.train $(tldr/arm/$(TLDR_arm)) $(if $(TLDR_from),--data $(TLDR)/reduced/$(TLDR_from)-seed$(lastword $(subst -seed, ,$*))/shards) \
		--seed $(lastword $(subst -seed, ,$*)) --out $@
