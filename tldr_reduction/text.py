"""Captions as BLIP prepares them, and the WordPiece vocabularies they are read with.

BLIP's code: salesforce/BLIP@056a169, cited as `BLIP:`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPT = "a picture of "
PUNCTUATION = r"[.!\"()*#:;~]"


def pre_caption(text: str, max_words: int = 30) -> str:
    """Lower case, punctuation to spaces, runs of white space to one space, first words. BLIP:data/utils.py:10."""
    text = re.sub(r"\s{2,}", " ", re.sub(PUNCTUATION, " ", text.lower()))
    words = text.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


def build_vocab(captions: Iterable[str], size: int = 30_522) -> list[str]:
    """A WordPiece vocabulary of at most `size` (BERT's) pieces: whole words, the frequent first, and single characters,
    the 1000 most frequent, for all that is not in it. The prompt's words are in it, too."""
    texts = (pre_caption(caption) for caption in (PROMPT, *captions))
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    letters: Counter[str] = Counter()
    for word, count in words.items():
        letters.update(dict.fromkeys(word, count))
    characters = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:1000])
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    ranked = sorted(words, key=lambda word: (-words[word], word))
    return list(dict.fromkeys([*pieces, *PROMPT.split(), *ranked]))[:size]


class WordPiece:
    """BERT's uncased tokenizer with BLIP's two extra tokens behind it: [DEC], which starts a caption, and [ENC].

    `vocab` is a vocab.txt, or the name of a tokenizer on the Hugging Face hub (bert-base-uncased).
    """

    def __init__(self, vocab: str | Path):
        if Path(vocab).is_file():
            lines = Path(vocab).read_text(encoding="utf-8").splitlines()
            model = models.WordPiece({piece: i for i, piece in enumerate(lines)}, unk_token="[UNK]")
            self.tokenizer = Tokenizer(model)
            self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            self.tokenizer.decoder = decoders.WordPiece()
        elif str(vocab).endswith(".txt"):
            raise FileNotFoundError(f"vocabulary {vocab} does not exist: name a vocab.txt, or bert-base-uncased")
        else:
            self.tokenizer = Tokenizer.from_pretrained(str(vocab))
        self.tokenizer.no_padding()
        size = self.tokenizer.get_vocab_size(with_added_tokens=False)
        self.pad, self.cls, self.sep = (self.tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
        self.dec, self.enc = size, size + 1

    def __len__(self) -> int:
        return self.enc + 1

    def __call__(self, texts: Sequence[str], max_length: int = 30) -> tuple[Tensor, Tensor]:
        """ids (B, T), mask (B, T): [CLS] ... [SEP], cut at `max_length`, padded to the longest."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [[self.cls, *each.ids[: max_length - 2], self.sep] for each in encoded]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        return ids, (ids != self.pad).long()

    def prompt_ids(self, prompt: str = PROMPT) -> Tensor:
        """[CLS] a picture of [SEP]."""
        return self([prompt])[0][0]

    def decode(self, ids: Tensor, prompt: str = PROMPT) -> list[str]:
        """Captions of generated ids (B, T), special tokens and the prompt's characters removed."""
        special = {self.pad, self.cls, self.sep, self.dec, self.enc}
        rows = [[i for i in row if i not in special] for row in ids.tolist()]
        return [text[len(prompt) :].strip() for text in self.tokenizer.decode_batch(rows)]
