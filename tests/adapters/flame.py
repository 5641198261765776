"""FLAME's parts, ours and those of MIV-XJTU/FLAME@4d2b9a9, on the CPU in fp32.

Their text encoder runs on today's transformers, with adapters: it expects blocks that return tuples instead of tensors,
and tokenizers with `batch_encode_plus`. It embeds one caption at a time, or captions of equal length, since in padded
batches its facets attend to each other (detail 4 of the README). Retrieval with several captions is that of
LAION-AI/CLIP_benchmark@48de38c, a clone beside theirs.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from flame import config, llm, model, train, zeroshot
from flame import eval as evaluation
from shared.clip import open_clip_config
from shared.zeroshot import retrieval_ranks
from tests.adapters import Case, Part, gradients, leaf, prefixed, seeded
from tests.parity import check_commit, import_beside, run_block, unit

CLONE = "MIV-XJTU/FLAME", "4d2b9a9", "src/open_clip/multiprompteol_embeddings.py"
BENCHMARK = "LAION-AI/CLIP_benchmark", "48de38c", "clip_benchmark/metrics/zeroshot_retrieval.py"


# ----------------------------------------------------------------------------------------------------- their modules


@functools.cache
def load(path: Path) -> SimpleNamespace:
    """The authors' modules from a clone."""
    root = path / "src"
    names = [f"open_clip.{n}" for n in ("model", "loss", "multiprompteol_embeddings", "transform")]
    names += ["open_clip.zero_shot_classifier"]
    names += [f"training.{n}" for n in ("scheduler", "train", "main", "zero_shot")]
    stubs = {"training.data": ModuleType("training.data")}  # needs pandas and wids
    stubs["training.data"].get_data = None
    modules = import_beside(root, names, stubs)
    up = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)
    up.zero_shot.float = lambda x: float(np.asarray(x).item())  # numpy 2 refuses arrays of shape (1,)
    up.zero_shot.tqdm = lambda batches, **_: batches
    return up


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    yield load(path)


def function_of(file: Path, name: str, **scope):
    """A function of one of their files that cannot be imported, with `scope` in place of the file's globals."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    exec(compile(ast.Module([found], []), str(file), "exec"), scope)
    return scope[name]


def flags(**changed) -> SimpleNamespace:
    """Their flags, with the values of their command where the scale allows."""
    cfg = config.Config()
    return SimpleNamespace(**{
        **dict(model="FLAME", train_data="shards", trace=False, precision="fp32", device="cpu", rank=0, local_rank=0),
        **dict(world_size=1, horovod=False, wd=cfg.weight_decay, lr=cfg.lr, beta1=cfg.beta1, beta2=cfg.beta2),
        **dict(eps=cfg.eps, warmup=cfg.warmup, epochs=1, lr_scheduler="cosine", skip_scheduler=False, accum_freq=1),
        **dict(distill=False, siglip=False, mp_sigmoid=True, grad_clip_norm=None, log_every_n_steps=100, wandb=False),
        **changed,
    })  # fmt: skip


def optimizer_block(up, network, args) -> dict:
    """Variables of the block of their main() that makes the optimizer."""
    return run_block(up.main, "args.train_data or args.dataset_type == 'synthetic'", args=args, model=network)


def their_steps(up, network, loader, args) -> tuple[list, list]:
    """Train with their loop, optimizer, schedule and loss, as their main() makes them -> (losses, learning rates).

    loader: iterable of (images, texts), with num_batches and num_samples of an epoch.
    """

    class Loader:
        num_batches, num_samples = loader.num_batches, loader.num_samples

        def __iter__(self):
            return ((0, 0, images, 0, texts) for images, texts in loader)

    data = {"train": SimpleNamespace(dataloader=Loader(), set_epoch=lambda _: None)}
    made = optimizer_block(up, network, args)
    made |= run_block(up.main, "'train' in data and optimizer is not None", data=data, **made)
    losses, rates, their_loss = [], [], up.main.create_loss(args)

    def loss(**inputs):
        found = their_loss(**inputs)
        losses.append(found["contrastive_loss"].item())
        return found

    def schedule(step):
        rates.append(made["scheduler"](step))

    for epoch in range(args.epochs):
        up.train.train_one_epoch(network, data, loss, epoch, made["optimizer"], None, schedule, None, args)
    return losses, rates


# ------------------------------------------------------------------------------------------------------------- texts

SEPARATOR, QUOTE = 5, 6  # the tokens before the first facet and at the end of each
CAPTIONS = [
    "a cat",
    'a "big" dog, running , fast',
    "what is it?",
    "a long caption . It has sentences , and commas",
    "ends with.",
]


class Batch(SimpleNamespace):
    def to(self, device):
        return self


def padded(rows: list[Tensor], after: int = 0) -> Batch:
    """Ids, padded on the left; `after`: how many are those of facets."""
    size = max(map(len, rows))
    ids = torch.stack([F.pad(x, (size - len(x), 0)) for x in rows])
    real = torch.stack([F.pad(torch.ones_like(x), (size - len(x), 0)) for x in rows])
    return Batch(input_ids=ids, attention_mask=real, after=after)


class Ids:
    """A tokenizer for their encoder whose prompts are batches of ids, one a call."""

    pad_token_id, batch = 0, Batch(input_ids=torch.zeros(1, 1, dtype=torch.long), after=0)

    def __init__(self, batches: list[Batch]):
        self.batches = iter(batches)

    def batch_decode(self, rows, skip_special_tokens):
        return [""] * len(rows)

    def batch_encode_plus(self, texts, **_):
        self.batch = next(self.batches)
        return self.batch

    def __call__(self, texts, **_):
        """Their encoder asks so for the token before the first facet, the tenth from the end."""
        return Batch(input_ids=self.batch.input_ids[:1, -self.batch.after - 1].expand(1, 10))


class Words:
    """A tokenizer whose tokens are words with the space before them; `<s>` is the start token; pads on the left."""

    bos_token_id, pad_token_id = 1, 0

    def __init__(self):
        self.pieces = ["<pad>", "<s>"]

    def ids(self, text: str, bos: bool) -> list[int]:
        pieces = []
        for part in re.split(r"(<s>)", text):
            pieces += [part] if part == "<s>" else re.findall(r':"| ?\w+| ?[^\w\s]|\s', part)
        self.pieces += [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        return [1] * bos + [self.pieces.index(piece) for piece in pieces]

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        if return_tensors is not None:
            return self.batch_encode_plus(text)
        if isinstance(text, str):
            return {"input_ids": self.ids(text, add_special_tokens)}
        return {"input_ids": [self.ids(each, add_special_tokens) for each in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.pieces[int(i)] for i in ids if int(i) > 1)

    def batch_decode(self, rows, skip_special_tokens=True):
        return [self.decode(row) for row in rows]

    def batch_encode_plus(self, texts, **_):
        return padded([torch.tensor(self.ids(text, True)) for text in texts])


WORDS = Words()  # one, because its vocabulary grows with what it reads


def their_encoder(up, lm: nn.Module, tokenizer, layer: int):
    """Their text encoder on a language model, whose block passes tuples to its hooks."""
    whole = SimpleNamespace(model=lm, lm_head=None)
    encoder = up.multiprompteol_embeddings.MultiPromptEOLEmbeddingsLLM(whole, layer=str(layer), tokenizer=tokenizer)
    block = lm.layers[layer - 1]
    register = type(block).register_forward_hook

    def as_tuple(hook):
        for key in list(block._forward_hooks):  # their code never removes hooks
            del block._forward_hooks[key]
        return register(block, lambda module, inputs, output: hook(module, inputs, (output,)))

    block.register_forward_hook = as_tuple
    return encoder


def encoded(encoder, count: int, facets: int, template: str = "", infer: bool = False) -> Tensor:
    """Their states of the next batch of `count` prompts."""
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        return encoder(torch.ones(count, 1), "short", facets > 1, template, facets, infer)


def lm_inputs(vocabulary: int = 552) -> dict:
    """A random language model of four blocks, of which the third is read."""
    sizes = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=10000.0, rms_norm_eps=1e-5)
    state = LlamaModel(LlamaConfig(**sizes, initializer_range=0.3)).state_dict()  # states of about size 1
    return {**prefixed("cfg/", sizes), "layers": torch.tensor([3]), **prefixed("param/", state)}


def language_model(case: Case) -> LlamaModel:
    """The case's language model; Llama's blocks equal Mistral's."""
    settings = {name.removeprefix("cfg/"): case[name] for name in case if name.startswith("cfg/")}
    lm = LlamaModel(LlamaConfig(**settings, attention_bias=False, tie_word_embeddings=False))
    lm.load_state_dict(case.group("param/"))
    return lm.eval()


def llm_of(case: Case, **options) -> llm.FrozenLLM:
    found = llm.FrozenLLM(language_model(case), WORDS, **options)
    assert [found.block is block for block in found.lm.layers].index(True) + 1 == case["layers"].item()
    return found


def numbered(case: dict, name: str) -> list[Tensor]:
    """name_0, name_1, ..."""
    return [case[f"{name}_{i}"] for i in range(len(case)) if f"{name}_{i}" in case]


def prompt_ids(prefix: int, lens: list[int]) -> Tensor:
    """Random ids of a prefix and of facets of these lengths."""
    ids = torch.randint(10, 552, (prefix + sum(lens),))
    ids[prefix - 1] = SEPARATOR
    ids[prefix - 1 + torch.tensor(lens).cumsum(0)] = QUOTE
    return ids


def facet_alone(block, lm, ids: Tensor, lens: list[int], k: int, gapped: bool = True) -> Tensor:
    """A causal pass of the library over prefix and facet k, at their positions in the whole sequence, or with positions
    that restart at the facet."""
    prefix = len(ids) - sum(lens)
    start = prefix + sum(lens[:k])
    places = torch.cat([torch.arange(prefix), torch.arange(start, start + lens[k])])[None]
    positions, states = places if gapped else torch.arange(prefix + lens[k])[None], []

    def keep(block, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handle = block.register_forward_hook(keep)
    with torch.no_grad():
        lm(input_ids=ids[places], attention_mask=torch.ones_like(places), position_ids=positions)
    handle.remove()
    return states[0]


class CaptionClean(Part):
    files = {"caption_clean": {}}
    functions = "flame.llm.clean_caption"
    authors = "src/open_clip/multiprompteol_embeddings.py:46"

    def inputs(self):
        captions = ["a cat", "a cat.", "what is it?", 'she said "hi"', '"open"', "", " space ", "two??", 'and "why?"']
        return {"json": [{"in": caption} for caption in [*captions, "\u65e5\u672c\u8a9e\u3002", "a\nb", "?", '"', "'"]]}

    def run(self, function, case):
        return {"json": [{"in": each["in"], "out": function(each["in"])} for each in case["json"]]}

    our = staticmethod(llm.clean_caption)

    def their(self, up):
        """In brackets, so that the strip of the whole prompt does not touch the caption."""

        class Stop(Exception):
            pass

        def cleaned(caption):
            prompts = []

            def read(texts, **_):
                prompts.extend(texts)
                raise Stop

            tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda *_, **__: [caption], batch_encode_plus=read)
            empty = SimpleNamespace(model=nn.Identity(), lm_head=None)
            encoder = up.multiprompteol_embeddings.MultiPromptEOLEmbeddingsLLM(empty, tokenizer=tokenizer)
            with contextlib.suppress(Stop):
                encoder(torch.ones(1, 1), template="[*sent_0*]")
            return prompts[0][1:-1]

        return cleaned


class Fingerprints(Part):
    """Of the authors' prompts; ours have as many facets. `read_prompts` reads a clone's, in `theirs`."""

    files = {"template_fingerprints": {}}
    authors = "src/training/embed_cc3m_mask.py:224"
    json = True

    def inputs(self):
        return {}

    def ours(self, case):
        facets = dict(zip(("raw", "short", "long"), llm.OURS, strict=True))
        known = {name: {"sha256": llm.FINGERPRINTS[name], "closers": len(facets[name].facets)} for name in case}
        return {name: case[name] | known[name] for name in case}

    def theirs(self, up, case):
        file = up.root / "training/embed_cc3m_mask.py"
        llm.read_prompts(file)  # or UserError: it compares fingerprints
        names = {"raw": "raw_templates", "short": "short_template", "long": "long_template"}
        nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Assign)]
        written = {ast.unparse(node.targets[0]): node.value for node in nodes}
        found = {}
        for name, target in names.items():
            value = ast.literal_eval(written[target])
            text = value[0] if isinstance(value, list) else value
            text = text.replace("_", " ").replace("*sent 0*", "CAPTION").strip()
            digest = hashlib.sha256(text.encode()).hexdigest()
            counts = {"chars": len(text), "words": len(text.split()), "closers": text.count(':"')}
            found[name] = {"sha256": digest} | counts
        return found


class Places(nn.Module):
    """A language model whose states are positions, and which keeps the mask that it gets."""

    base_model = property(lambda self: self)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        nn.init.eye_(self.layers[0].weight)
        nn.init.zeros_(self.layers[0].bias)
        sizes = SimpleNamespace(num_hidden_layers=2, num_attention_heads=1)
        self.config = SimpleNamespace(get_text_config=lambda: sizes, **vars(sizes))

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        self.mask, self.positions = attention_mask[:, 0], position_ids[0]
        return self.layers[0](position_ids[..., None].float())


class FacetMask(Part):
    files = {"facet_mask_k3": dict(lens=[11, 14, 17]), "facet_mask_k7": dict(lens=[11, 14, 17, 12, 15, 13, 9])}
    families = ("facet_mask",)
    functions = "flame.llm.facet_decoupled_mask flame.llm.FrozenLLM.encode_ids"
    authors = "src/open_clip/multiprompteol_embeddings.py:76-114"

    def inputs(self, lens):
        return {"prefix_len": torch.tensor([9, 16, 26]), "facet_lens": torch.tensor(lens)}

    def run(self, encode, case):
        """encode(prefix length, facets' lengths) -> (visible, read positions, positions)."""
        lens, found, readout = case["facet_lens"].tolist(), {}, []
        for i, prefix in enumerate(case["prefix_len"].tolist()):
            found[f"mask_{i}"], ends, found["position_ids"] = encode(prefix, lens)
            readout.append(ends)
        return found | {"readout": torch.stack(readout)}

    def our(self, prefix, lens):
        lm = Places()
        ids = prompt_ids(prefix, lens)[None]
        ends = llm.FrozenLLM(lm, None).encode_ids(ids, torch.ones_like(ids), lens)
        return (lm.mask[0] == 0).long(), ends[0, :, 0].long(), lm.positions

    def their(self, up):
        def encode(prefix, lens):
            lm, masks = LlamaModel(LlamaConfig(vocab_size=552, hidden_size=8, num_attention_heads=2)), []

            def places(input_ids, attention_mask):
                masks.append(attention_mask)
                return torch.arange(input_ids.shape[1])[None, :, None]

            ids = prompt_ids(prefix, lens)
            encoder = their_encoder(up, lm, Ids([padded([ids], sum(lens))]), 1)
            encoder.forward_hook = places
            ends = encoded(encoder, 1, len(lens))
            return (masks[0][0, 0] == 0).long(), ends[0, :, 0], torch.arange(len(ids))  # the library's positions

        return encode


class FacetHidden(Part):
    files = {"facet_hidden_k3": dict(lens=[11, 14, 17]), "facet_hidden_k7": dict(lens=[11, 14, 17, 12, 15, 13, 9])}
    families = ("facet_hidden",)
    functions = "flame.llm.FrozenLLM.encode_ids"
    authors = "src/open_clip/multiprompteol_embeddings.py:34-156"
    tolerances = {"embeds_l2": (0, 1e-5), "*": (0, 1e-4)}
    unused = ("separate_contiguous",)  # what a facet's state is not: that of a pass whose positions restart

    def inputs(self, lens):
        prefixes = [9, 16, 26]
        x = {f"input_ids_{i}": prompt_ids(prefix, lens) for i, prefix in enumerate(prefixes)}
        return {**lm_inputs(), **x, "prefix_len": torch.tensor(prefixes), "facet_lens": torch.tensor(lens)}

    def ours(self, case):
        ids, lens = numbered(case, "input_ids"), case["facet_lens"].tolist()
        assert [len(x) - sum(lens) for x in ids] == case["prefix_len"].tolist()
        batch = padded(ids)
        hidden = llm_of(case).encode_ids(batch.input_ids, batch.attention_mask, lens)
        found = {"embeds": hidden, "embeds_l2": F.normalize(hidden, dim=-1), "infer_mean_0": hidden[0].mean(0)}
        return found | {"separate_gapped": hidden}

    def theirs(self, up, case):
        ids, lens = numbered(case, "input_ids"), case["facet_lens"].tolist()
        layer, lm, k = case["layers"].item(), language_model(case), len(case["facet_lens"])
        encoder = their_encoder(up, lm, Ids([padded([x], sum(lens)) for x in [*ids, ids[0]]]), layer)
        hidden = torch.cat([encoded(encoder, 1, k) for _ in ids])
        found = {"embeds": hidden, "embeds_l2": F.normalize(hidden, dim=-1)}
        found["infer_mean_0"] = encoded(encoder, 1, k, infer=True)[0]
        lm = language_model(case)
        for name, gapped in (("separate_gapped", True), ("separate_contiguous", False)):
            rows = [[facet_alone(lm.layers[layer - 1], lm, x, lens, i, gapped) for i in range(k)] for x in ids]
            found[name] = torch.stack([torch.stack(row) for row in rows])
        return found


class UpstreamPadded(Part):
    """Their mask of padded batches, which ours deliberately is not: padding can be seen (detail 4 of the README)."""

    files = {name.replace("facet_hidden", "upstream_padded"): options for name, options in FacetHidden.files.items()}
    families = ("upstream_padded",)
    functions = "flame.llm.FrozenLLM.encode_ids"
    authors = "src/open_clip/multiprompteol_embeddings.py:76-114"
    tolerances = {"visible": (0, 0), "*": (0, 1e-4)}

    def inputs(self, lens):
        batch = padded(numbered(seeded(lambda: FacetHidden().inputs(lens)), "input_ids"))
        return {"input_ids": batch.input_ids, "attention_mask_2d": batch.attention_mask}

    def unpadded(self, case):
        """The case of the same prompts without padding, which has the language model; None without its file."""
        name = case.path.name.replace("upstream_padded", "facet_hidden")
        if case.fresh:
            options = self.files[case.path.stem]
            return FacetHidden().case(name, seeded(lambda: FacetHidden().inputs(**options)))
        path = case.path.with_name(name)
        return Case(path) if path.is_file() else None

    def ours(self, case):
        """Theirs, with ours where both agree: among real tokens, and in rows without padding."""
        ids, real, visible = case["input_ids"], case["attention_mask_2d"].bool(), case["visible"].clone()
        beside = self.unpadded(case)
        if beside is None:
            return {"visible": visible}
        lens, full = beside["facet_lens"].tolist(), real.all(1)
        among = real[:, :, None] & real[:, None, :]
        outside = real[:, :, None] & ~real[:, None, :]
        assert all(seen[leak].any() for seen, leak, whole in zip(visible, outside, full, strict=True) if not whole)
        mask = llm.facet_decoupled_mask(real.long(), lens)[:, 0]
        assert not mask[outside].any()
        visible[among] = mask[among].long()
        hidden = llm_of(beside).encode_ids(ids, real.long(), lens)
        gap = (F.normalize(hidden, dim=-1) - F.normalize(case["embeds"], dim=-1)).abs().amax((1, 2))
        assert (gap[~full] > 1e-2).all()
        return {"visible": visible, "embeds": torch.where(full[:, None, None], hidden, case["embeds"])}

    def theirs(self, up, case):
        beside, masks = self.unpadded(case), []
        batch = Batch(input_ids=case["input_ids"], attention_mask=case["attention_mask_2d"])
        batch.after = int(beside["facet_lens"].sum())
        encoder = their_encoder(up, language_model(beside), Ids([batch]), beside["layers"].item())
        forward = encoder.forward_hook

        def noted(input_ids, attention_mask):
            masks.append(attention_mask)
            return forward(input_ids=input_ids, attention_mask=attention_mask)

        encoder.forward_hook = noted
        hidden = encoded(encoder, len(batch.input_ids), len(beside["facet_lens"]))
        return {"visible": (masks[0][:, 0] == 0).long(), "embeds": hidden}


class SinglePrompt(Part):
    files = {"single_prompt_hidden": {}}
    functions = "flame.llm.FrozenLLM.encode_ids"
    authors = "src/open_clip/multiprompteol_embeddings.py:127"
    atol = 1e-4

    def inputs(self):
        batch = padded([prompt_ids(n, [5]) for n in (20, 41, 33)])
        return {**lm_inputs(), "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def run(self, encode, case):
        """encode(batches) -> their states."""
        ids, real = case["input_ids"], case["attention_mask"]
        alone = [padded([x[m.bool()]]) for x, m in zip(ids, real, strict=True)]
        batches = [Batch(input_ids=ids, attention_mask=real), *alone]
        together, *apart = encode(case, batches)
        return {"embeds": together, "embeds_alone": torch.cat(apart)}

    def our(self, case, batches):
        encoder = llm_of(case)
        return [encoder.encode_ids(batch.input_ids, batch.attention_mask)[:, 0] for batch in batches]

    def their(self, up):
        def encode(case, batches):
            encoder = their_encoder(up, language_model(case), Ids(batches), case["layers"].item())
            return [encoded(encoder, len(batch.input_ids), 1) for batch in batches]

        return encode


class Texts(Part):
    """Captions through clean-up, prompt, mask and readout; ours in one batch. Our prompts, in the authors' notation."""

    more = {"texts_raw": dict(prompt=0), "texts_short": dict(prompt=1), "texts_long": dict(prompt=2)}
    functions = "flame.llm.Prompt flame.llm.FrozenLLM.encode_ids"
    authors = "src/open_clip/multiprompteol_embeddings.py:34"
    atol = 1e-4

    def inputs(self, prompt):
        return {**lm_inputs(300), "prompt": prompt, "json": CAPTIONS}

    def ours(self, case):
        hidden = llm_of(case)(case["json"], llm.OURS[case["prompt"]])
        return {"embeds": hidden, "mean": hidden.mean(1)}

    def theirs(self, up, case):
        prompt = llm.OURS[case["prompt"]]
        encoder = their_encoder(up, language_model(case), WORDS, case["layers"].item())
        template, facets, found = llm.render(prompt, "*sent_0*").replace(" ", "_"), len(prompt.facets), []
        for infer in (False, True):
            rows = []
            for caption in case["json"]:
                ids = torch.tensor([WORDS.ids(caption, True)])
                with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                    rows.append(encoder(ids, "short", facets > 1, template, facets, infer))
            found.append(torch.cat(rows))
        return {"embeds": found[0].view(len(found[0]), facets, -1), "mean": found[1]}


class EmbedBank(Part):
    """Three captions an image, as ids of whole prompts."""

    files = {"embed_bank": {}}
    functions = "flame.llm.embed_captions"
    authors = "src/training/embed_cc3m_mask.py:198"
    atol = 1e-5
    kinds = {"raw": [1], "short": [11, 14, 17], "long": [11, 14, 17, 12, 15, 13, 9]}

    def inputs(self):
        x = {f"ids_{kind}_{i}": prompt_ids(12 + 7 * i, lens) for kind, lens in self.kinds.items() for i in range(2)}
        lens = {f"facet_lens_{kind}": torch.tensor(self.kinds[kind]) for kind in ("short", "long")}
        return {**lm_inputs(), **x, **lens}

    def ours(self, case):
        encoder, names = llm_of(case), [str(i) for i in range(len(numbered(case, "ids_raw")))]
        lens = {3: case["facet_lens_short"].tolist(), 7: case["facet_lens_long"].tolist()}
        kinds = dict(zip((1, 3, 7), self.kinds, strict=True))

        def lookup(captions, prompt):
            k = len(prompt.facets)
            batch = padded([case[f"ids_{kinds[k]}_{caption}"] for caption in captions])
            return encoder.encode_ids(batch.input_ids, batch.attention_mask, lens.get(k, [1]))

        bank = llm.embed_captions(lookup, names, names, names)
        torch.testing.assert_close(bank.half().float(), bank, rtol=1e-3, atol=1e-4)  # as stored
        return {"bank": bank}

    def theirs(self, up, case):
        """Their script's function, with captions and files in memory."""
        count = len(numbered(case, "ids_raw"))
        after = {"raw": 0} | {kind: int(case[f"facet_lens_{kind}"].sum()) for kind in ("short", "long")}
        batches = [padded([case[f"ids_{kind}_{i}"]], after[kind]) for i in range(count) for kind in self.kinds]
        encoder = their_encoder(up, language_model(case), Ids(batches), case["layers"].item())
        network = SimpleNamespace(text=encoder, embedding_method="multiprompteol")
        network.encode_text = functools.partial(up.model.CustomTextCLIP.encode_text, network)
        captions = json.dumps([{"__key__": f"{i}", "minicpm": ""} for i in range(count)])
        embed = function_of(
            up.root / "training/embed_cc3m_mask.py", "embed", json=json, torch=torch, F=F, logging=logging,
            os=SimpleNamespace(path=os.path, makedirs=lambda *_, **__: None), is_master=lambda _: False,
            open=lambda *_: io.StringIO(captions),
        )  # fmt: skip

        class Loader(list):
            num_batches = count

        saved = []
        with (
            mock.patch.object(torch, "save", lambda bank, path: saved.append(bank)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            embed(network, None, Loader(([f"{i}"], None, [""]) for i in range(count)), None)
        return {"bank": torch.stack(saved)}


class DrawnFacets(Part):
    more = {"drawn_facets": {}}
    functions = "flame.train.sample_facets"
    authors = "src/training/data.py:409"

    def inputs(self):
        return {"bank": torch.randn(11, 4)}

    def ours(self, case):
        return {"facets": train.sample_facets(case["bank"])}

    def theirs(self, up, case):
        load_feature = function_of(up.root / "training/data.py", "load_feature", torch=torch)
        with mock.patch.object(torch, "load", lambda *_, **__: case["bank"]):
            sample = dict.fromkeys(("key", "url", "image", "text"), "")
            return {"facets": load_feature(sample)["feature"]}


# ------------------------------------------------------------------------------------------------------- image tower


def tower(shapes: dict[str, torch.Size], patch: int, heads: int = 1, image_size: tuple[int, ...] = ()) -> model.FLAME:
    """A model whose weights have these shapes, for square images unless their size (H, W) is given."""
    visual = {k.removeprefix("visual."): v for k, v in shapes.items() if k.startswith("visual.")}
    width, output_dim = visual["proj"]
    image_size = image_size or patch * math.isqrt(visual["positional_embedding"][0] - 1)
    vision = VisionTransformer(
        image_size=image_size, patch_size=patch, width=width,
        layers=1 + max(int(m[1]) for k in visual if (m := re.match(r"transformer\.resblocks\.(\d+)\.", k))),
        heads=heads, mlp_ratio=visual["transformer.resblocks.0.mlp.c_fc.weight"][0] / width, output_dim=output_dim,
        pool_type="avg",
    )  # fmt: skip
    return model.FLAME(vision, width, shapes["mm.3.weight"][0], shapes["mm.0.weight"][0])


def tower_of(case: Case) -> model.FLAME:
    """Our model with weights `param/*`."""
    state = case.group("param/")
    shapes, images = {name: value.shape for name, value in state.items()}, case.get("image", case.get("images"))
    network = tower(shapes, case["patch_size"], case["heads"], tuple(images.shape[-2:]))
    network.load_state_dict(state)
    return network


def tiny() -> model.FLAME:
    """A model of two layers for images of 24 pixels, in patches of 8."""
    sizes = dict(image_size=24, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=4.0, output_dim=16)
    return model.FLAME(VisionTransformer(**sizes, pool_type="avg"), 32, 20)


def like(up, ours: model.FLAME) -> nn.Module:
    """Their model of our model's sizes and weights, without a language model, which training does not use."""
    vit, width = ours.visual, ours.mm[0].in_features
    block = vit.transformer.resblocks[0]
    sizes = dict(image_size=vit.image_size, patch_size=vit.patch_size[0], width=width, pool_type="avg")
    sizes |= dict(layers=len(vit.transformer.resblocks), head_width=width // block.attn.num_heads)
    sizes |= dict(mlp_ratio=block.mlp.c_fc.out_features / width)
    projector = dict(mm_projector=True, width=width, mlp_depth=2, projector_dim=ours.mm[2].out_features)

    class WithoutText(up.model.CustomTextCLIP):
        output_dict = True

        def __init__(self):
            nn.Module.__init__(self)
            self.visual = up.model._build_vision_tower(vit.proj.shape[1], sizes)
            self.mm = up.model._build_mm_projector(projector)
            self.logit_scale, self.logit_bias = copy.deepcopy(ours.logit_scale), copy.deepcopy(ours.logit_bias)

    theirs = WithoutText()
    theirs.load_state_dict(ours.state_dict())
    return theirs


class ImageTower(Part):
    files = {"image_tower": {}}
    functions = "flame.model.FLAME"
    authors = "src/open_clip/model.py:191,442"
    tolerances = {"grad*": (1e-4, 1e-6), "*": (0, 1e-5)}
    # sizes of weights, which are those of `param/*`
    unused = ("layers", "width", "projector_dim", "hidden_dim")

    def inputs(self):
        sizes = dict(patch_size=8, heads=4, layers=2, width=32, projector_dim=20, hidden_dim=4096)
        x = {"image": torch.randn(3, 3, 24, 24), "cotangent": torch.randn(3, 20)}
        return {**x, **sizes, **prefixed("param/", tiny().state_dict())}

    def run(self, made, case):
        """made(case) -> (model, its tokens of images)."""
        (network, tokens), image = made(case), leaf(case["image"])
        found = {"tokens": tokens(image), "pooled": network.encode_image(image)}
        found["visual_only"] = network.encode_image(image, visual_only=True)
        found["projected_cls"] = network.mm(found["tokens"])[:, 0]
        found["embeds"] = network.encode_image(image, normalize=True)
        (found["embeds"] * case["cotangent"]).sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        return found | {"grad_image": image.grad} | prefixed("grad/", grads)

    def our(self, case):
        network = tower_of(case)  # gives patch tokens only: upstream maps the class token, and drops it
        return network, lambda image: torch.cat([case["tokens"][:, :1], network.patch_tokens(image)], dim=1)

    def their(self, up):
        def made(case):
            network = like(up, tower_of(case))
            return network, network.visual.get_features

        return made


class Groups(Part):
    """Names with and without weight decay, and shapes, of the image side of published models."""

    files = {"param_groups": {}}
    functions = "flame.train.parameter_groups flame.model.image_tower"
    authors = "src/training/main.py:315"
    json = True

    def inputs(self):
        return {}

    def run(self, made, case):
        """made(model) -> (model, its optimizer's groups)."""
        found = {}
        for name in list(case) or ("B-16", "L-14"):
            with torch.device("meta"):
                if name in ("B-16", "L-14"):
                    network = model.FLAME(*model.image_tower(open_clip_config(f"ViT-{name}")), 5120)
                else:
                    shapes = case[name]["shapes"]
                    network = tower(shapes, shapes["visual.conv1.weight"][-1])
                network, (plain, decayed) = made(network)
            assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.5)
            names = {id(p): n for n, p in network.named_parameters()}
            found[name] = {
                "decay": [names[id(p)] for p in decayed["params"]],
                "no_decay": [names[id(p)] for p in plain["params"]],
                "shapes": {n: list(p.shape) for n, p in network.named_parameters()},
                "num_params_visual": sum(p.numel() for p in network.visual.parameters()),
                "num_params_mm": sum(p.numel() for p in network.mm.parameters()),
            }
        return found

    def our(self, network):
        return network, train.parameter_groups(network, 0.5)

    def their(self, up):
        def made(network):
            theirs = like(up, network)
            return theirs, optimizer_block(up, theirs, flags(wd=0.5))["optimizer"].param_groups

        return made


class EvaluationView(Part):
    files = {"val_preprocess": {}}
    functions = "flame.zeroshot.eval_transform"
    authors = "src/open_clip/transform.py:274"
    atol = 1e-6

    def inputs(self):
        return {"image_uint8": torch.randint(0, 256, (70, 97, 3)), "size": 48}

    def run(self, made, case):
        return {"output": made(case["size"])(Image.fromarray(case["image_uint8"].numpy().astype(np.uint8)))}

    def our(self, size):
        return zeroshot.eval_transform(SimpleNamespace(visual=SimpleNamespace(image_size=(size, size))))

    def their(self, up):
        return functools.partial(up.transform.image_transform, is_train=False)


class TrainingView(EvaluationView):
    files, families = {}, ()
    more = {"training_view": {}}
    functions = "flame.train.training_view"
    authors = "src/open_clip/transform.py:307"

    def our(self, size):
        return train.training_view(size, 0.9)

    def their(self, up):
        cfg = up.transform.AugmentationCfg(scale=(0.9, 1.0))
        return functools.partial(up.transform.image_transform, is_train=True, aug_cfg=cfg)


# ------------------------------------------------------------------------------------------------ losses and training


class SigmoidLoss(Part):
    files = {"mp_sigmoid_loss_k1": dict(facets=1), "mp_sigmoid_loss_k6": dict(facets=6, n=8, width=16)}
    families = ("mp_sigmoid_loss",)
    functions = "flame.model.mp_sigmoid_loss"
    authors = "src/open_clip/loss.py:417"
    tolerances = {"loss": (1e-5, 0), "grad*": (1e-4, 1e-5)}
    scalars = {"logit_scale": 23.7, "logit_bias": -9.3}

    def inputs(self, facets, n=5, width=12):
        features = {"image_features": unit(n, width), "text_features": unit(n * facets, width)}
        return {**features, "num_facets": facets, **self.scalars}

    def run(self, function, case):
        x = case.leaves("image_features", "text_features", *self.scalars)
        assert len(x["text_features"]) == case["num_facets"] * len(x["image_features"])
        loss = function(*x.values())
        return {"loss": loss, **gradients(loss, {name.removesuffix("_features"): value for name, value in x.items()})}

    our = staticmethod(model.mp_sigmoid_loss)

    def their(self, up):
        return up.loss.MultiPositiveSigmoidLoss()


class SigLipLoss(SigmoidLoss):
    files = {"siglip_loss": dict(facets=1)}
    authors = "src/open_clip/loss.py:307"

    def their(self, up):
        return up.loss.SigLipLoss()


class NceLoss(SigmoidLoss):
    files = {"mp_nce_loss_k6": dict(facets=6, n=8, width=16)}
    families = ("mp_nce_loss",)
    functions = "flame.model.mp_nce_loss"
    authors = "src/open_clip/loss.py:548"
    scalars = {"logit_scale": 1 / 0.07}

    our = staticmethod(model.mp_nce_loss)

    def their(self, up):
        return up.loss.MultiPositiveNCELoss()


class ClipLoss(NceLoss):
    files = {"clip_loss": dict(facets=1)}
    authors = "src/open_clip/loss.py:66"

    def their(self, up):
        return up.loss.ClipLoss()


class NegativeOnly(Part):
    """What the texts of another process add to the loss."""

    files = {"mp_sigmoid_negative_only": {}}
    functions = "flame.model.mp_sigmoid_loss"
    authors = "src/open_clip/loss.py:473"
    tolerances = {"loss": (1e-5, 0), "grad*": (1e-4, 1e-6)}
    unused = ("labels_*",)  # ours are in the losses

    def inputs(self):
        features = {"image_features": unit(4, 8), "text_features": unit(12, 8)}
        return {**features, "num_facets": 3, "logit_scale": 17.0, "logit_bias": -8.0}

    def run(self, function, case):
        x = {"image": leaf(case["image_features"]), "text": leaf(case["text_features"])}
        loss = function(*x.values(), case["logit_scale"], case["logit_bias"], case["num_facets"])
        return {"loss": loss, **gradients(loss, x)}

    def our(self, image, text, scale, bias, k):
        """Gathered beside own texts that add nothing, one image at a time, whose own texts are the only other ones."""
        own = 1e3 * image.detach().repeat_interleave(k, 0)
        with mock.patch.object(model, "gather", lambda texts: torch.cat([texts, text])):
            parts = zip(image.split(1), own.split(k), strict=True)
            return torch.stack([model.mp_sigmoid_loss(*part, scale, bias) for part in parts]).mean()

    def their(self, up):
        loss = up.loss.MultiPositiveSigmoidLoss()
        return lambda image, text, scale, bias, k: loss._loss(image, text, scale, bias, negative_only=True)

    def theirs(self, up, case):
        sizes = "cpu", torch.float32, len(case["image_features"]), case["num_facets"]
        labels = up.loss.MultiPositiveSigmoidLoss().get_ground_truth
        found = {"labels_pos": labels(*sizes), "labels_neg": labels(*sizes, negative_only=True)}
        return super().theirs(up, case) | found


def of_rank(rank: int, case: dict, path: str | None) -> dict[str, Tensor]:
    """Loss and gradients of a process: ours, or with a clone's path theirs."""
    x = {name: leaf(value[rank] if value.ndim == 3 else value) for name, value in case.items()}
    if path is None:
        loss = model.mp_sigmoid_loss(*x.values())
    else:
        loss = load(Path(path)).loss.MultiPositiveSigmoidLoss(rank=rank, world_size=2)(*x.values())
    found = gradients(loss, {name.removesuffix("_features"): value for name, value in x.items()})
    return {"loss_per_rank": loss.detach(), **found}


class DistributedLoss(Part):
    files = {"mp_sigmoid_distributed_ws2": {}}
    families = ("mp_sigmoid_distributed",)
    functions = "flame.model.mp_sigmoid_loss"
    authors = "src/open_clip/loss.py:491"
    tolerances = {"loss*": (1e-5, 0), "grad*": (1e-5, 1e-7)}

    def inputs(self):
        features = {"image_features": unit(2, 4, 8), "text_features": unit(2, 12, 8)}
        return {**features, "num_facets": 3, "logit_scale": 14.0, "logit_bias": -9.0}

    def run(self, path, case):
        from scripts import in_ranks

        names = "image_features", "text_features", "logit_scale", "logit_bias"
        x = {name: torch.as_tensor(case[name]) for name in names}
        assert x["text_features"].shape[1] == case["num_facets"] * x["image_features"].shape[1]
        with tempfile.TemporaryDirectory() as folder:
            ranks = in_ranks(of_rank, len(x["image_features"]), Path(folder), x, path)
        found = {name: torch.stack([rank[name] for rank in ranks]) for name in ranks[0]}
        whole = model.mp_sigmoid_loss(*(value.flatten(0, 1) if value.ndim == 3 else value for value in x.values()))
        torch.testing.assert_close(found["loss_per_rank"].mean(), whole, rtol=1e-5, atol=0)
        return found

    our = None

    def their(self, up):
        return str(up.root.parent)


class LearningRate(Part):
    files = {"lr_schedule": {}}
    functions = "flame.train.learning_rate"
    authors = "src/training/scheduler.py:43"
    rtol, atol = 1e-6, 1e-12
    unused = ("const*", "cooldown*")  # other schedules of open_clip; the paper's runs and ours decay with a cosine

    def inputs(self):
        sizes = {"base_lr": 5e-4, "warmup": 100, "total": 1000}
        cooldown = {"cooldown_steps": 200, "cooldown_power": 1.0, "cooldown_end": 0.0}
        return {"steps": torch.arange(0, 1000, 7), **sizes, **cooldown}

    def ours(self, case):
        cfg = config.Config(lr=case["base_lr"], warmup=case["warmup"])
        return {"cosine": [train.learning_rate(cfg, step, case["total"]) for step in case["steps"].tolist()]}

    def theirs(self, up, case):
        common = SimpleNamespace(param_groups=[{}]), case["base_lr"], case["warmup"], case["total"]
        cooldown = case["cooldown_steps"], case["cooldown_power"], case["cooldown_end"]
        schedules = {"cosine": up.scheduler.cosine_lr(*common), "const": up.scheduler.const_lr(*common)}
        schedules["const_cooldown"] = up.scheduler.const_lr_cooldown(*common, *cooldown)
        return {name: [rate(step) for step in case["steps"].tolist()] for name, rate in schedules.items()}


class TrainSteps(Part):
    files = {"train_steps": {}}
    functions = "flame.train.train_step flame.train.batch_loss"
    gradient_left = True
    authors = "src/training/train.py:90, src/training/main.py:315"
    tolerances = {"losses": (1e-5, 0), "lrs": (1e-6, 0), "after/*": (0, 5e-5)}

    def inputs(self):
        x = {"images": torch.randn(3, 6, 3, 24, 24), "facets": F.normalize(torch.randn(3, 6, 3, 20), dim=-1)}
        x |= dict(base_lr=5e-4, warmup=2, total=10, weight_decay=0.5, beta1=0.9, beta2=0.95, eps=1e-8)
        return {**x, "heads": 4, "patch_size": 8, **prefixed("param/", tiny().state_dict())}

    def ours(self, case):
        network, losses = tower_of(case), []
        cfg = config.Config(
            lr=case["base_lr"], warmup=case["warmup"], weight_decay=case["weight_decay"], beta1=case["beta1"],
            beta2=case["beta2"], eps=case["eps"], precision="fp32",
        )  # fmt: skip
        optimizer = torch.optim.AdamW(train.parameter_groups(network, cfg.weight_decay), lr=cfg.lr, **cfg.adamw)
        scaler = torch.amp.GradScaler(enabled=False)
        rates = [train.learning_rate(cfg, step, case["total"]) for step in range(len(case["images"]))]
        for *batch, lr in zip(case["images"], case["facets"], rates, strict=True):
            losses.append(train.train_step(network, batch, optimizer, scaler, lr, cfg)["loss"].item())
        after = network.state_dict()
        for name, value in after.items():
            if name.endswith("in_proj_bias"):  # the key's part has no gradient but rounding, which Adam enlarges
                key = slice(len(value) // 3, 2 * len(value) // 3)
                value[key] = case[f"after/{name}"][key]
        return {"losses": losses, "lrs": rates, **prefixed("after/", after)}

    def theirs(self, up, case):
        network = like(up, tower_of(case))
        names = {"base_lr": "lr", "weight_decay": "wd"}
        settings = ("base_lr", "warmup", "weight_decay", "beta1", "beta2", "eps")
        args = flags(batch_size=case["images"].shape[1], **{names.get(name, name): case[name] for name in settings})

        class Loader(list):
            num_batches, num_samples = case["total"], case["total"] * args.batch_size

        loader = Loader(zip(case["images"], case["facets"], strict=True))
        losses, rates = their_steps(up, network, loader, args)
        return {"losses": losses, "lrs": rates, **prefixed("after/", network.state_dict())}


# -------------------------------------------------------------------------------------------------------- evaluation


class ZeroShot(Part):
    files = {"zeroshot_classifier": {}}
    functions = "flame.zeroshot.zero_shot_classifier flame.zeroshot.zero_shot"
    authors = "src/open_clip/zero_shot_classifier.py:52, src/training/zero_shot.py:17"
    tolerances = {"logits": (1e-5, 1e-4), "*": (0, 1e-6)}

    def inputs(self):
        templates, target = torch.randn(8, 5, 10) + torch.randn(8, 1, 10), torch.randint(0, 8, (40,))
        images = F.normalize(templates.mean(1)[target] + 0.5 * torch.randn(40, 10), dim=-1)
        return {"template_embeds": templates, "image_features": images, "target": target}

    def ours(self, case):
        classifier = zeroshot.zero_shot_classifier(case["template_embeds"])
        metrics = zeroshot.zero_shot(case["image_features"], case["target"], classifier)
        found = {"classifier": classifier, "logits": 100 * case["image_features"] @ classifier}
        return found | {name: metrics[name] / 100 for name in ("top1", "top5")}

    def theirs(self, up, case):
        """The text of class c in template t is "c t"."""
        embeds, features = case["template_embeds"], case["image_features"]
        names, templates = [str(i) for i in range(len(embeds))], [f"{{}} {j}" for j in range(embeds.shape[1])]

        def encode_text(ids, normalize):
            rows = embeds[ids[:, 0], ids[:, 1]]
            return F.normalize(rows, dim=-1) if normalize else rows

        def tokenizer(texts):
            return torch.tensor([list(map(int, text.split())) for text in texts])

        function = up.zero_shot_classifier.build_zero_shot_classifier
        classifier = function(SimpleNamespace(encode_text=encode_text), tokenizer, names, templates)
        batches = list(zip(features.split(15), case["target"].split(15), strict=True))
        top1, top5 = up.zero_shot.run(lambda image: {"image_features": image}, classifier, batches, flags(batch_size=1))
        return {"classifier": classifier, "logits": 100 * features @ classifier, "top1": top1, "top5": top5}


class Retrieval(Part):
    files = {"retrieval_one_caption": {}}
    functions = "flame.eval.retrieval_recall"
    authors = "src/training/train.py:378"
    atol = 1e-5
    ways = {"image_to_text": "text", "text_to_image": "image"}

    def inputs(self):
        image = unit(23, 8)
        return {"image_features": image, "text_features": F.normalize(image + 0.3 * torch.randn(23, 8), dim=-1)}

    def ours(self, case):
        image, text = case["image_features"], case["text_features"]
        index, found = torch.arange(len(text)), {}
        recall = evaluation.retrieval_recall(image, text, index, (1, 5, 10))
        for (way, kind), ranks in zip(self.ways.items(), retrieval_ranks(image, text, index), strict=True):
            found[f"{way}_mean_rank"] = ranks.double().mean() + 1
            found[f"{way}_median_rank"] = math.floor(ranks.double().quantile(0.5)) + 1
            found |= {f"{way}_R_at_{k}": recall[f"{kind}_retrieval_recall@{k}"] for k in (1, 5, 10)}
        return found | {
            f"argmax_{a}2{b}": found[f"{way}_R_at_1"] for a, b, way in zip("it", "ti", self.ways, strict=True)
        }

    def theirs(self, up, case):
        """Names with @ are theirs; the argmax is that of training/eval_urban_1k.py:123-155, which cannot be called."""
        image, text = case["image_features"], case["text_features"]
        found = up.train.get_clip_metrics(image, text, torch.tensor(100.0))
        found = {name.replace("@", "_at_"): value for name, value in found.items()}
        nearest, own = (text @ image.T), torch.arange(len(text))
        sides = {"t2i": nearest, "i2t": nearest.T}
        return found | {f"argmax_{way}": (x.argmax(1) == own).double().mean() for way, x in sides.items()}


class RetrievalOfSeveral(Part):
    files = {"retrieval_multi_caption": {}}
    functions = "flame.eval.retrieval_recall"
    authors = "B:clip_benchmark/metrics/zeroshot_retrieval.py:8"
    atol = 1e-6

    def inputs(self):
        image, ks = unit(13, 7), torch.tensor([1, 3, 5])
        text = F.normalize(image.repeat_interleave(5, 0) + 0.5 * torch.randn(65, 7), dim=-1)
        return dict(image_features=image, text_features=text, text_image_index=torch.arange(65) // 5, ks=ks)

    def run(self, function, case):
        inputs = case["image_features"], case["text_features"], case["text_image_index"]
        ks = case["ks"].tolist()
        recall = function(*inputs, ks)
        return {f"{kind}_retrieval": [recall[f"{kind}_retrieval_recall@{k}"] for k in ks] for kind in ("image", "text")}

    our = staticmethod(evaluation.retrieval_recall)

    def their(self, up):
        repository, commit, file = BENCHMARK
        root = up.root.parent.with_name("CLIP_benchmark")
        if not (root / file).is_file():
            pytest.skip(f"needs a clone of {repository} at {commit} beside the other")
        check_commit(root, commit)
        name = "zeroshot_retrieval"
        benchmark = import_beside(root / "clip_benchmark/metrics", [name], {})[name]
        benchmark.tqdm = lambda batches: batches

        def recall(image, text, owner, ks):
            """A batch of all images; the texts of each are their rows."""
            texts = [[i for i, image in enumerate(owner.tolist()) if image == row] for row in range(len(image))]
            network = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda rows: text[rows])
            return benchmark.evaluate(network, [(image, texts)], torch.tensor, "cpu", False, ks)

        return recall
