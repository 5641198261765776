# Attentive Mask CLIP; arms: CLIP, masking rules without SSL, A-CLIP, its half-size EMA view, SLIP
ATTENTIVE_MASK_CLIP_ARMS_core = clip random attentive aclip
ATTENTIVE_MASK_CLIP_ARMS_all  = $(ATTENTIVE_MASK_CLIP_ARMS_core) high-drop aclip-eff slip
attentive_mask_clip/clip      = emoji-clip
attentive_mask_clip/random    = emoji --mask random --views 1 --no-ssl
attentive_mask_clip/attentive = emoji --views 1 --no-ssl
attentive_mask_clip/high-drop = emoji --mask high --views 1 --no-ssl
attentive_mask_clip/aclip     = emoji
attentive_mask_clip/aclip-eff = emoji --ema-image-size 20
attentive_mask_clip/slip      = emoji-slip
ATTENTIVE_MASK_CLIP_MINUTES_core = 9
ATTENTIVE_MASK_CLIP_MINUTES_all  = 18
ATTENTIVE_MASK_CLIP_ARMS = $(or $(ATTENTIVE_MASK_CLIP_ARMS_$(ARMS)),$(ARMS))
ATTENTIVE_MASK_CLIP_RUNS = $(foreach seed,$(SEEDS),$(foreach arm,$(ATTENTIVE_MASK_CLIP_ARMS),runs/attentive_mask_clip/$(arm)-seed$(seed)))

.PHONY: reproduce-attentive-mask-clip reproduce-attentive_mask_clip
reproduce-attentive_mask_clip: reproduce-attentive-mask-clip
reproduce-attentive-mask-clip: $(VENV)/.installed-base data
	$(if $(filter-out $(ATTENTIVE_MASK_CLIP_ARMS_all),$(ATTENTIVE_MASK_CLIP_ARMS)),$(error ARMS is core, all, or some of: $(ATTENTIVE_MASK_CLIP_ARMS_all)))
	$(PY) -m attentive_mask_clip.timing --out runs/attentive_mask_clip/step_times.json
	OMP_NUM_THREADS=$(THREADS) $(MAKE) --no-print-directory -j $(JOBS) $(ATTENTIVE_MASK_CLIP_RUNS)
	$(PY) -m attentive_mask_clip.eval $(ATTENTIVE_MASK_CLIP_RUNS) --times runs/attentive_mask_clip/step_times.json --report $(or $(RESULTS),runs/attentive_mask_clip/results.json)

runs/attentive_mask_clip/%: FORCE
	$(PY) -m attentive_mask_clip.train $(attentive_mask_clip/$(firstword $(subst -seed, ,$*))) --seed $(lastword $(subst -seed, ,$*)) --out $@
