"""TL;DR's CLIP as an open_clip model, with a tokenizer that prepares captions as `pre_caption` does."""

from pathlib import Path

import open_clip
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from shared import export
from tldr_reduction.config import Config
from tldr_reduction.text import PUNCTUATION
from tldr_reduction.views import eval_transform


def export_model(model: nn.Module, cfg: Config, folder: str | Path) -> None:
    """Write a model of stage clip. Captions of more than `max_words` words, which training cuts, stay whole there."""
    if cfg.stage != "clip":
        raise ValueError(
            f"a run of stage {cfg.stage} cannot be exported: open_clip has no BLIP; use a run of stage clip"
        )
    config = export.named_config(cfg.clip_model)
    config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip then takes the one in the folder
    side = config["vision_cfg"]["image_size"]
    save_tokenizer(folder)
    export.write(folder, model, config, model.state_dict(), eval_transform(side), resize_mode="squash")


def save_tokenizer(folder: str | Path) -> None:
    """open_clip's byte-pair encoding of lower-cased captions without `PUNCTUATION`, in transformers' layout.

    Padding is the end token again: the first one is what is read, and attention is causal.
    """
    from transformers import PreTrainedTokenizerFast

    simple = open_clip.SimpleTokenizer()
    start, end = "<start_of_text>", "<end_of_text>"
    merges = models.BPE(simple.encoder, list(simple.bpe_ranks), end_of_word_suffix="</w>")
    tokenizer = Tokenizer(merges)
    replace = normalizers.Replace(Regex(PUNCTUATION), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), replace])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    special = [(token, simple.encoder[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end)
    fast.save_pretrained(folder)
