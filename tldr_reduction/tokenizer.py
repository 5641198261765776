"""Captions as BLIP prepares them, and their tokenizers: WordPiece for the captioner and BLIP, open_clip's for CLIP.

BLIP's code: salesforce/BLIP@056a169, cited as `B:`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from shared import checkpoints
from shared.errors import UserError
from shared.index import fingerprint
from tldr_reduction.config import Common, read_lines

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPT = "a picture of "
PUNCTUATION = r"[.!\"()*#:;~]"
SCORED_LENGTH = 35  # tokens of a caption in retrieval and matching; B:train_retrieval.py:87, B:models/blip_itm.py:46


def pre_caption(text: str, max_words: int = 30) -> str:
    """Lower-case a caption, replace punctuation and runs of white space by one space, and keep the first `max_words`
    words. B:data/utils.py:10."""
    text = re.sub(r"\s{2,}", " ", re.sub(PUNCTUATION, " ", text.lower()))
    words = text.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


def not_on_hub(what: str, error: Exception, instead: str) -> UserError:
    """The error for a user if `what` is not local and not on the Hugging Face hub; `instead` names an alternative."""
    why = checkpoints.one_line(error, 120)
    return UserError(f"{what}, and the Hugging Face hub does not give it ({why}); {instead} will do, too")


class WordPiece:
    """BERT's uncased tokenizer with BLIP's two extra tokens, whose ids follow the vocabulary: [DEC], which starts a
    caption, and [ENC], which starts a text to match with an image.

    `vocab` is a vocab.txt, a folder with one or with a tokenizer.json, or the name of a tokenizer on the Hugging Face
    hub (bert-base-uncased).
    """

    def __init__(self, vocab: str | Path):
        folder = Path(vocab)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            vocab = folder / "vocab.txt"
        if (folder / "tokenizer.json").is_file():
            try:
                self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # what tokenizers raises
                raise UserError(f"{folder}/tokenizer.json is damaged ({checkpoints.one_line(error, 120)})") from error
        elif Path(vocab).is_file():
            lines = read_lines(vocab, "vocabulary")
            model = models.WordPiece({piece: i for i, piece in enumerate(lines)}, unk_token="[UNK]")
            self.tokenizer = Tokenizer(model)
            self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            self.tokenizer.decoder = decoders.WordPiece()
        elif str(vocab).endswith(".txt"):
            raise UserError(f"vocabulary {vocab} does not exist: name a vocab.txt, or bert-base-uncased")
        else:
            try:
                self.tokenizer = Tokenizer.from_pretrained(str(vocab))
            except Exception as error:  # the hub and the network raise all kinds
                instead = "a vocab.txt or a folder with tokenizer.json"
                raise not_on_hub(f"vocabulary {vocab} is no file", error, instead) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        size = self.tokenizer.get_vocab_size(with_added_tokens=False)
        self.pad, unk, self.cls, self.sep = map(self.tokenizer.token_to_id, SPECIAL[:4])
        self.dec, self.enc = size, size + 1
        last = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
        if self.pad != 0 or None in (unk, self.cls, self.sep) or last >= size:
            raise UserError(
                f"vocabulary {vocab} is not BERT's or one like it: it should begin with [PAD], have [UNK], [CLS] and "
                "[SEP], and have no piece twice"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the pieces in the order of their ids."""
        ids = self.tokenizer.get_vocab(with_added_tokens=False)
        return fingerprint("\n".join(sorted(ids, key=ids.get)).encode())

    def __len__(self) -> int:
        return self.enc + 1

    def __call__(self, texts: Sequence[str], max_length: int = 30) -> tuple[Tensor, Tensor]:
        """Tokenize texts to ids (B, T) and mask (B, T): [CLS] ... [SEP], cut to at most `max_length` tokens including
        these two, and padded to the longest."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [[self.cls, *each.ids[: max_length - 2], self.sep] for each in encoded]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        return ids, (ids != self.pad).long()

    def prompt_ids(self, prompt: str = PROMPT) -> Tensor:
        """Ids (P,) of a prompt: [CLS] a picture of [SEP]."""
        return self([prompt])[0][0]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with the two extra tokens in transformers' layout; it adds [CLS] and [SEP] to texts."""
        from transformers import PreTrainedTokenizerFast

        own = Tokenizer.from_str(self.tokenizer.to_str())
        special = [("[CLS]", self.cls), ("[SEP]", self.sep)]
        own.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
        names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        fast = PreTrainedTokenizerFast(tokenizer_object=own, **names)
        fast.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        fast.save_pretrained(folder)

    def decode(self, ids: Tensor, prompt: str = PROMPT) -> list[str]:
        """Decode generated ids (B, T) to captions, without special tokens and without the prompt, which is cut off by
        its number of characters."""
        special = {self.pad, self.cls, self.sep, self.dec, self.enc}
        rows = [[i for i in row if i not in special] for row in ids.tolist()]
        return [text[len(prompt) :].strip() for text in self.tokenizer.decode_batch(rows)]


def tokenizer_of(cfg: Common) -> WordPiece | open_clip.SimpleTokenizer:
    """The tokenizer of a run: open_clip's for a clip, else WordPiece."""
    if cfg.stage != "clip":
        return WordPiece(cfg.vocab)
    length = open_clip.get_model_config(cfg.clip_model)["text_cfg"]["context_length"]
    return open_clip.get_tokenizer(cfg.clip_model, context_length=length)


def eval_tokenizer(tokenizer: WordPiece | open_clip.SimpleTokenizer, cfg: Common) -> Callable[[Sequence[str]], Tensor]:
    """Return a function texts -> ids (B, T) for evaluation: texts are prepared as in training, but BLIP's are cut at
    `SCORED_LENGTH` tokens."""

    def tokens(texts: Sequence[str]) -> Tensor:
        texts = [pre_caption(text) for text in texts]
        return tokenizer(texts) if cfg.stage == "clip" else tokenizer(texts, min(SCORED_LENGTH, cfg.max_positions))[0]

    return tokens


def save_tokenizer(folder: str | Path) -> None:
    """Write open_clip's tokenizer in transformers' layout; it lower-cases captions and removes `PUNCTUATION`.

    The end token is also the padding: open_clip reads the features at its first occurrence, and attention is causal, so
    later ones have no effect.
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
