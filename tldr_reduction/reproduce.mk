# TL;DR; a seed's stages: codebook captioner, the captioner on clean captions, ITM scorer; reductions; then the arms
TLDR = runs/tldr_reduction
TLDR_REDUCTION_ARMS_core = full random random-refined tldr random-steps random-refined-steps tldr-steps
TLDR_REDUCTION_ARMS_all  = $(TLDR_REDUCTION_ARMS_core) codes codes-steps full-refined generated-steps first-steps itm-steps image-steps \
	text-steps farthest-steps tldr10-steps tldr50-steps drop-random10 drop-itm10 drop-random30 drop-itm30 \
	drop-random50 drop-itm50 drop-random70 drop-itm70 blip-random-refined-steps blip-tldr-steps
TLDR_REDUCTION_MINUTES_core = 12
TLDR_REDUCTION_MINUTES_all  = 25
TLDR_seed = $(lastword $(subst -seed, ,$*))
TLDR_arm  = $(firstword $(subst -seed, ,$*))

# reductions: what python -m tldr_reduction.reduce is called with; random, first and itm keep as many pairs as tldr does
TLDR_match              = --match $(TLDR)/reduced/tldr-seed$*
tldr/reduce/tldr        =
tldr/reduce/codes       = --captions original
tldr/reduce/generated   = --captions generated
tldr/reduce/random      = --select random $(TLDR_match) --captions original
tldr/reduce/random-refined = --select random $(TLDR_match)
tldr/reduce/first       = --select first $(TLDR_match)
tldr/reduce/itm         = --select itm $(TLDR_match)
tldr/reduce/full-refined = --select all
tldr/reduce/image       = --features image
tldr/reduce/text        = --features text
tldr/reduce/farthest    = --select farthest
tldr/reduce/tldr10      = --keep 0.1
tldr/reduce/tldr50      = --keep 0.5
$(foreach p,10 30 50 70,$(foreach s,random itm,$(eval tldr/reduce/drop-$(s)$(p) = --select $(s) --captions original --keep 0.$(shell expr 100 - $(p)))))

# arms: ARM trains on reduction ARM (full: the pool); ARM-steps as many steps as the pool gives (406 of batch 128), with
# the same decay in all; blip-ARM-steps, for which there is no full data, 2,400 of batch 64. The loss of the first epochs is
# compared, so it is logged often.
tldr/steps        = --epochs 27 --lr-decay-rate 0.876 --eval-every 7
tldr/steps/tldr10 = --epochs 68 --lr-decay-rate 0.949
tldr/steps/tldr50 = --epochs 14 --lr-decay-rate 0.775
tldr/steps/blip   = --epochs 80 --lr-decay-rate 0.956 --batch-size 64 --eval-every 20
TLDR_CURVES       = full full-refined random-steps random-refined-steps codes-steps tldr-steps blip-tldr-steps
TLDR_from   = $(patsubst blip-%,%,$(patsubst %-steps,%,$(TLDR_arm)))
TLDR_data   = $(if $(filter-out full,$(TLDR_from)),--data $(TLDR)/reduced/$(TLDR_from)-seed$(TLDR_seed)/shards)
TLDR_preset = $(if $(filter blip-%,$(TLDR_arm)),emoji-blip,emoji-clip)
TLDR_budget = $(if $(filter %-steps,$(TLDR_arm)),$(or $(tldr/steps/$(if $(filter blip-%,$(TLDR_arm)),blip,$(TLDR_from))),$(tldr/steps))) \
	$(if $(filter $(TLDR_CURVES),$(TLDR_arm)),,--eval-every 0) --log-every 5

TLDR_REDUCTION_ARMS = $(or $(TLDR_REDUCTION_ARMS_$(ARMS)),$(ARMS))
TLDR_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(TLDR_REDUCTION_ARMS),$(TLDR)/$(arm)-seed$(seed)))
TLDR_REDUCTIONS = tldr $(filter-out tldr full,$(sort $(patsubst blip-%,%,$(patsubst %-steps,%,$(TLDR_REDUCTION_ARMS)))))
TLDR_MAKE = OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS)

.PHONY: reproduce-tldr-reduction reproduce-tldr_reduction
reproduce-tldr_reduction: reproduce-tldr-reduction
reproduce-tldr-reduction: $(VENV)/.installed-tldr_reduction data
	$(if $(filter-out $(TLDR_REDUCTION_ARMS_all),$(TLDR_REDUCTION_ARMS)),$(error ARMS is core, all, or some of: $(TLDR_REDUCTION_ARMS_all)))
	$(PY) -m tldr_reduction.corpus
	$(TLDR_MAKE) $(SEEDS:%=$(TLDR)/captioner-seed%)
	$(TLDR_MAKE) $(SEEDS:%=$(TLDR)/finetune-seed%) $(SEEDS:%=$(TLDR)/scorer-seed%)
	$(TLDR_MAKE) $(SEEDS:%=$(TLDR)/reduced/all-of-seed%)
	$(TLDR_MAKE) $(TLDR_RUNS)
	$(PY) -m tldr_reduction.eval $(TLDR_RUNS) --report $(or $(RESULTS),$(TLDR)/results.json)

$(TLDR)/captioner-seed%: FORCE
	$(PY) -m tldr_reduction.train emoji-captioner --seed $* --out $@
$(TLDR)/finetune-seed%: FORCE
	$(PY) -m tldr_reduction.train emoji-finetune --init $(TLDR)/captioner-seed$* --seed $* --out $@
$(TLDR)/scorer-seed%: FORCE
	$(PY) -m tldr_reduction.train emoji-scorer --init $(TLDR)/captioner-seed$* --seed $* --out $@

# one after the other: they share codes, scores and captions
$(TLDR)/reduced/all-of-seed%: FORCE
	$(foreach name,$(TLDR_REDUCTIONS),$(PY) -m tldr_reduction.reduce data/emoji_tldr/pool --keep 0.25 \
		--captioner $(TLDR)/captioner-seed$* --caption-model $(TLDR)/finetune-seed$* --scorer $(TLDR)/scorer-seed$* \
		--work $(TLDR)/work-seed$* --seed $* --out $(TLDR)/reduced/$(name)-seed$* $(tldr/reduce/$(name)) &&) true

$(TLDR)/%: FORCE
	$(PY) -m tldr_reduction.train $(TLDR_preset) $(TLDR_data) $(TLDR_budget) --seed $(TLDR_seed) --out $@
