"""CLIP's vocabulary is read once a process: open_clip's SimpleTokenizer takes a tenth of a second for it each time."""

import functools

from open_clip import tokenizer


@functools.cache
def share() -> None:
    """From now on, tokenizers without special tokens of their own take the vocabulary of the first one."""
    made, make = tokenizer.SimpleTokenizer(), tokenizer.SimpleTokenizer.__init__

    def shared(self, context_length: int = 77, clean: str = "lower", reduction_mask: str = "", **more) -> None:
        if more:
            return make(self, context_length=context_length, clean=clean, reduction_mask=reduction_mask, **more)
        vars(self).update(vars(made), context_length=context_length, clean_fn=tokenizer.get_clean_fn(clean))
        self.reduction_fn = tokenizer.get_reduction_mask_fn(reduction_mask) if reduction_mask else None

    tokenizer.SimpleTokenizer.__init__ = shared
