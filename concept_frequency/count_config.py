"""Every setting of the count, presets of the paper's corpora, and what is refused. `count.py` counts."""

import dataclasses
from typing import Literal

CAPTION_BYTES = 2_000  # of a caption in a part under way: text, noun set, postings
DOC_BYTES = 100_000  # of a caption inside spaCy


@dataclasses.dataclass
class Config:
    """What is counted, in what, and how."""

    data: tuple[str, ...] = ()
    """Captions: .tar shards (img2dataset layout), .parquet, .tsv or .txt (one a line), folders of them, or URLs; braces
    {00000..00331} expand."""
    concepts: tuple[str, ...] = ()
    """Lists of concepts: folders with classnames.txt, .txt (one a line), .json. Each gets its own files of counts."""
    out: str = "runs/count"
    """Folder of the parts and of the counts."""
    corpus: str = "corpus"
    """The corpus' name in the names of files."""
    caption_column: str = "caption"
    """Column of the captions: a name in parquet, a number from 0 in tsv."""
    also: str = ""
    """Rows without a caption or without this column are dropped before they are numbered (LAION's url, upstream)."""

    spacy: str = "en_core_web_lg"
    """Pipeline that tags captions; `python -m spacy download NAME` installs one."""
    query_spacy: str = "en_core_web_sm"
    """Pipeline that lemmatises the words of concepts, one by one."""
    exact: bool = True
    """Leave out named entities alone, which nothing here reads. Without: the parser, too, which is faster still and can
    change a noun only where the parser calls it an auxiliary."""
    lemmatize: bool = True
    """Without: words of concepts as they are, in lower case (upstream's method `lowercased`)."""
    casefold: bool = False
    """Index nouns in lower case. Without, as upstream, `Eagles` in a title is never found."""
    last_token: bool = True
    """Of a concept's word of several tokens only the last counts, as upstream: `t-shirt` is searched as `shirt`."""
    clean_terms: bool = False
    """Delete from concepts' terms what is deleted from nouns, so that `crème` can match. Upstream does not."""
    unknown: Literal["drop", "zero"] = "drop"
    """A term that no caption has is dropped (upstream: `unicorn dog` counts as `dog`), or makes the count zero."""

    label_column: str = ""
    """Parquet column that names what the image shows: the image side, where labels are at hand."""
    tagger: str = ""
    """Image side by a tagger, on .tar shards: clip, ram++ or package.module:function. None: captions alone."""
    model: str = "ViT-B-16"
    """open_clip model of the CLIP tagger, or of RAM++'s descriptions."""
    pretrained: str = "openai"
    """Its weights: open_clip's tag, or a file."""
    checkpoint: str = ""
    """RAM++'s weights."""
    descriptions: str = ""
    """JSON {concept: texts}, or the authors' list of such; none: `a photo of a {c}.`"""
    average: bool = True
    """One averaged vector a concept, as the authors. Without: RAM++'s own weights of each description."""
    threshold: float = 0.7
    """A concept is in an image if its probability is above (compared in half precision, as upstream)."""
    images: tuple[str, ...] = ()
    """Image shards, where captions come from other files; `ids` then says which row of the captions an image is."""
    ids: Literal["row", "cc3m", "cc12m", "yfcc15m", "synthci30m", "laion400m", "laion_aesthetics"] = "row"
    """row: image and caption are in one shard. Else as `sample_id` says; captions are then numbered over all files."""
    keep: str = ""
    """Similarity control: .npy of the ids that are kept; counts of the images among them are added."""
    size: int | None = None
    """Size of the corpus for the misalignment degree; None: the number of captions counted."""

    workers: int = 0
    """Processes on this machine; 0: one a core."""
    address: str = ""
    """Ray cluster: `auto`, `HOST:PORT`, `ray://HOST:PORT`, or `local` for Ray on this machine; the extra `ray`."""
    memory: int = 256
    """MiB a worker may use for captions and postings, beside its spaCy pipeline: the size of parts and batches. A
    tar is not cut."""
    merge: bool = False
    """Also write one index of all captions, index.npz; it must fit in memory (8 bytes a posting)."""
    strict: bool = False
    """Stop at the first broken sample instead of counting it and going on."""

    @property
    def part_captions(self) -> int:
        return max(self.memory * 2**20 // CAPTION_BYTES, 1)

    @property
    def batch_captions(self) -> int:
        return min(max(self.memory * 2**20 // 4 // DOC_BYTES, 1), 5000)


PRESETS = {
    "shards": ("image-text shards in img2dataset layout", Config()),
    "cc3m": ("CC-3M: tsv (caption, url)", Config(corpus="cc3m", caption_column="0", size=3_318_333)),
    "cc12m": ("CC-12M: tsv (url, caption)", Config(corpus="cc12m", caption_column="1", size=12_423_374)),
    "yfcc15m": ("YFCC-15M: tsv (url, caption)", Config(corpus="yfcc15m", caption_column="1", size=14_825_236)),
    "laion400m": (
        "LAION-400M: parquet (caption, url)",
        Config(corpus="laion400m", caption_column="caption", also="url", size=414_080_000),
    ),
    "laion2b": ("LAION-2B: parquet (TEXT, URL)", Config(corpus="laion2b", caption_column="TEXT", also="URL")),
    "laion-aesthetics": ("LAION-Aesthetics shards", Config(corpus="laion_aesthetics", size=161_100_000)),
    "synthci30m": ("SynthCI-30M shards", Config(corpus="synthci30m")),
    "emoji": (
        "the embedded corpus, names of its evaluation set",
        Config(
            data=("data/emoji/train",), concepts=("data/emoji/eval/names_ood",), corpus="emoji", spacy="en_core_web_sm"
        ),
    ),
}


def check(cfg: Config) -> None:
    if not cfg.data:
        raise ValueError(
            "--data is missing: it takes captions, e.g. --data 'cc3m/{00000..00331}.tar' or 'part-*.parquet'"
        )
    if not cfg.concepts:
        raise ValueError("--concepts is missing: name lists of concepts (.txt, .json, or a folder with classnames.txt)")
    if cfg.memory < 1:
        raise ValueError(f"--memory is at least 1 MiB, not {cfg.memory}")
    if not 0 <= cfg.threshold <= 1:
        raise ValueError(f"--threshold is a probability, not {cfg.threshold}")
    if cfg.tagger and cfg.label_column:
        raise ValueError("--tagger and --label-column are two ways to the same thing: name one")
    if cfg.images and not cfg.tagger:
        raise ValueError("--images needs a --tagger")
    if bool(cfg.images) != (cfg.ids != "row"):
        raise ValueError("--images and --ids belong together: image shards, and which row of the captions an image is")
