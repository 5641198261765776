"""TL;DR's parts, ours and those of showlab/datacentric.vlp@a488102, on the CPU in fp32.

Parts of BLIP are compared with salesforce/BLIP@056a169, a folder named BLIP beside the other clone; without it they are
skipped. The scripts for clustering and merging captions have no functions: statements from their source are run.
"""

import ast
import contextlib
import csv
import functools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.adapters import Case, Part, gradients, prefixed
from tests.parity import check_commit, import_beside, run_line
from tldr_reduction import blip, cluster, model, reduce, train
from tldr_reduction import eval as evaluation
from tldr_reduction.datasets import eval_transform
from tldr_reduction.tokenizer import pre_caption

CLONE = "showlab/datacentric.vlp", "a488102", "codebook_cluster.py"
SEP = 3

# ------------------------------------------------------------------------------------------- stand-ins for libraries


class Outputs(SimpleNamespace):
    """A model output of transformers: its fields by name and by index."""

    def __getitem__(self, index):
        return list(vars(self).values())[index]


class PreTrainedModel(nn.Module):
    """The methods of transformers 4.15's base class that their BERT uses."""

    dtype = torch.float32

    def __init__(self, config):
        super().__init__()
        self.config = config

    def init_weights(self):
        pass

    def get_head_mask(self, head_mask, layers):
        return [None] * layers

    def invert_attention_mask(self, mask):
        return (1.0 - mask[:, None, None, :].float()) * -1e9


def transformers_stub() -> dict[str, ModuleType]:
    names = ("", ".activations", ".file_utils", ".modeling_outputs", ".modeling_utils", ".utils", ".models")
    names += (".models.bert", ".models.bert.configuration_bert")
    stubs = {f"transformers{name}": ModuleType(f"transformers{name}") for name in names}
    for stub in stubs.values():
        stub.__path__ = []
    logging = SimpleNamespace(get_logger=lambda _: None, set_verbosity_error=lambda: None)
    stubs["transformers"].BertTokenizer = stubs["transformers.file_utils"].ModelOutput = object
    stubs["transformers"].logging = logging
    stubs["transformers.activations"].ACT2FN = {"gelu": F.gelu}
    for name in (
        "BaseModelOutputWithPastAndCrossAttentions", "BaseModelOutputWithPoolingAndCrossAttentions",
        "CausalLMOutputWithCrossAttentions", "MaskedLMOutput", "MultipleChoiceModelOutput",
        "NextSentencePredictorOutput", "QuestionAnsweringModelOutput", "SequenceClassifierOutput",
        "TokenClassifierOutput",
    ):  # fmt: skip
        setattr(stubs["transformers.modeling_outputs"], name, Outputs)
    utilities = stubs["transformers.modeling_utils"]
    utilities.PreTrainedModel = PreTrainedModel
    utilities.apply_chunking_to_forward = lambda function, size, dim, x: function(x)
    utilities.find_pruneable_heads_and_indices = utilities.prune_linear_layer = None
    stubs["transformers.utils"].logging = logging
    stubs["transformers.models.bert.configuration_bert"].BertConfig = SimpleNamespace
    return stubs


# ----------------------------------------------------------------------------------------------------- their modules


@functools.cache
def load(path: Path) -> SimpleNamespace:
    """TL;DR's modules from a clone, with stand-ins for what no longer installs, and k-means kept off the GPU."""
    root = Path(path).resolve()
    stubs = transformers_stub()
    if "einops" not in sys.modules:
        stubs["einops"] = ModuleType("einops")
        stubs["einops"].rearrange = lambda x, pattern: x.T if pattern == "n d -> d n" else NotImplemented
    names = [f"models.{n}" for n in ("quantize", "vit", "med", "blip", "blip_itm", "blip_pretrain_vq_compress")]
    modules = import_beside(root / "vq_compress_model", [*names, "utils"], stubs)
    data = ModuleType("data")  # missing in their clone
    data.create_dataset = data.create_sampler = data.create_loader = None
    stubs |= {"data": data, "ruamel": ModuleType("ruamel"), "ruamel.yaml": ModuleType("ruamel.yaml")}
    stubs["ruamel"].yaml = stubs["ruamel.yaml"]
    modules |= import_beside(root / "vq_compress_model", ["pretrain_vq_compress"], stubs)
    modules |= import_beside(root, ["fast_cluster"], {})
    up = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)
    up.fast_cluster.faiss = cpu = ModuleType("faiss")
    vars(cpu).update(vars(faiss))
    cpu.PCAMatrix = lambda dim, out, eigen_power: faiss.PCAMatrix(dim, out, eigen_power)  # for faiss 1.15, by position
    cpu.StandardGpuResources = lambda: None
    cpu.GpuIndexFlatConfig = SimpleNamespace
    cpu.GpuIndexFlatL2 = lambda _, dim, __: faiss.IndexFlatL2(dim)
    return up


@functools.cache
def load_blip(root: Path) -> SimpleNamespace:
    """BLIP's modules from a clone."""
    check_commit(root, "056a169")
    checkpoints = "fairscale.nn.checkpoint.checkpoint_activations"
    stubs = {checkpoints.rsplit(".", n)[0]: ModuleType("fairscale") for n in range(4)}
    stubs[checkpoints].checkpoint_wrapper = None
    stubs |= transformers_stub() | {name: ModuleType(name) for name in ("cv2", "ruamel_yaml")}
    names = [f"models.{n}" for n in ("vit", "med", "blip", "blip_pretrain", "blip_retrieval")]
    modules = import_beside(root, [*names, "data", "data.utils", "train_retrieval"], stubs)
    original = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()})
    original.train_retrieval.args = SimpleNamespace(distributed=False)
    return original


def original(up) -> SimpleNamespace:
    """BLIP's modules; the part is skipped if there is no clone beside TL;DR's."""
    root = up.root.parent / "BLIP"
    if not (root / "models/blip_pretrain.py").is_file():
        pytest.skip(f"needs {root}, a clone of salesforce/BLIP at 056a169")
    return load_blip(root)


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    yield load(path)


def statements(path: Path, first: str, last: str, **names) -> dict:
    """Run a script from the statement that starts with `first` to the one that starts with `last` -> its variables.

    What it assigns to a variable of `names` is left out.
    """
    scope, running = dict(names), False
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        source = ast.unparse(node)
        running = running or source.startswith(first)
        if running and source.partition(" = ")[0] not in names:
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)
        if running and source.startswith(last):
            return scope
    raise LookupError(f"{path} has no {first} ... {last}")


class Words:
    """A tokenizer that always returns the same ids."""

    def __init__(self, ids: Tensor, mask: Tensor, vocab: int):
        self.ids, self.mask = ids, mask
        self.bos_token_id, self.enc_token_id, self.pad_token_id = vocab - 2, vocab - 1, 0

    def __call__(self, *_, **__):
        mask = self.mask
        return SimpleNamespace(input_ids=self.ids.clone(), attention_mask=mask, to=lambda _: self())


def their_bert(med, decoder: bool, vocab: int, width: int, layers: int, heads: int, positions: int, image: int, hidden):
    settings = SimpleNamespace(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, pad_token_id=0, num_attention_heads=heads,
        intermediate_size=hidden, hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=positions, layer_norm_eps=1e-12, encoder_width=image, add_cross_attention=True,
        chunk_size_feed_forward=0, output_attentions=False, output_hidden_states=False, use_return_dict=True,
        use_cache=False,
    )  # fmt: skip
    if not decoder:
        return med.BertModel(settings, add_pooling_layer=False)
    bert = med.BertLMHeadModel(settings)
    bert.cls.predictions.decoder.weight = bert.bert.embeddings.word_embeddings.weight  # transformers ties them
    return bert


def their_model(up, kind: type, case: Case, tokenizer: Words) -> nn.Module:
    """One of their models with the weights `param/*`, without its constructor, which fixes sizes and downloads weights.

    up: the modules of TL;DR or of BLIP.
    """
    state = case.group("param/")
    network = kind.__new__(kind)
    nn.Module.__init__(network)
    network.tokenizer, network.prompt, network.negative_all_rank = tokenizer, "", False
    names = "img_size", "patch_size", "embed_dim", "depth", "num_heads"
    sizes = dict(zip(names, vision_sizes(case, state), strict=True))
    for name in dict.fromkeys(name.partition(".")[0] for name in state):
        if name.startswith("visual_encoder"):
            setattr(network, name, up.vit.VisionTransformer(**sizes))
        elif name.startswith("text_encoder"):
            setattr(network, name, their_bert(up.med, False, *text_sizes(case, state, f"{name}.")))
        elif name == "text_decoder":
            network.text_decoder = their_bert(up.med, True, *text_sizes(case, state, "text_decoder.bert."))
            if "text_encoder.embeddings.LayerNorm.bias" in state:
                tie = up.blip_pretrain.tie_encoder_decoder_weights
                tie(network.text_encoder, network.text_decoder.bert, "", "/attention")
        elif name == "quantize":
            codes = state["quantize.embedding.weight"].shape
            network.quantize = up.quantize.VectorQuantizer2(*codes, case["beta"], legacy=bool(case["legacy"]))
            network.temp = nn.Parameter(torch.tensor(0.07))  # not used, but clamped
        elif name == "temp":
            network.temp = nn.Parameter(state[name])
        elif name in state:
            network.register_buffer(name, state[name])
        else:
            setattr(network, name, nn.Linear(*state[f"{name}.weight"].shape[::-1]))
    if "image_queue" in state:
        names = "visual_encoder", "vision_proj", "text_encoder", "text_proj"
        network.model_pairs = [[getattr(network, name), getattr(network, f"{name}_m")] for name in names]
        network.queue_size, network.momentum = state["image_queue"].shape[1], case["momentum"]
        network.copy_params()
    problems = network.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys
    assert {key.rpartition(".")[2] for key in problems.missing_keys} <= {"position_ids", "temp"}
    return network


# ------------------------------------------------------------------------------------------------------ small models


def depth(state: dict, pattern: str) -> int:
    return len({m[1] for key in state if (m := re.match(pattern + r"(\d+)\.", key))})


def vision_sizes(case: Case, state: dict) -> tuple[int, ...]:
    """Side of images and patches, width, layers, heads of the case's image tower."""
    width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
    grid = round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    assert patch == case.get("patch_size", patch)
    return grid * patch, patch, width, depth(state, r"visual_encoder\.blocks\."), case["num_heads_vision"]


def text_sizes(case: Case, state: dict, prefix: str) -> tuple[int, ...]:
    """Words, width, layers, heads, positions, width of images, hidden width of the case's text tower."""
    vocab, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    layers = depth(state, re.escape(prefix) + r"encoder\.layer\.")
    positions = len(state[f"{prefix}embeddings.position_embeddings.weight"])
    image = state[f"{prefix}encoder.layer.0.crossattention.self.key.weight"].shape[1]
    hidden = len(state[f"{prefix}encoder.layer.0.intermediate.dense.weight"])
    return vocab, width, layers, case["num_heads_text"], positions, image, hidden


def our_text(sizes: tuple[int, ...]) -> blip.TextTransformer:
    """Without dropout, as the golden numbers were made."""
    return blip.TextTransformer(*sizes[:6], dropout=0.0, intermediate_size=sizes[6])


def fill(network: nn.Module, case: Case) -> nn.Module:
    """Load the weights `param/*`; those that the case lacks (BLIP's decoder in ITM cases) are not changed."""
    problems = network.load_state_dict(case.group("param/"), strict=False)
    assert not problems.unexpected_keys, problems.unexpected_keys
    return network


def our_blip(case: Case, kind: type = blip.BLIP) -> blip.BLIP:
    state = case.group("param/")
    queue = state.get("image_queue", torch.zeros(1, 8)).shape[1]
    decoder = "text_decoder.bert." if "text_decoder.cls.predictions.bias" in state else "text_encoder."
    texts = [our_text(text_sizes(case, state, prefix)) for prefix in ("text_encoder.", decoder)]
    towers = blip.VisionTransformer(*vision_sizes(case, state)), *texts[: 2 if kind is blip.BLIP else 1]
    network = kind(*towers, len(state["vision_proj.weight"]), queue, case.get("momentum", 0.995))
    network.bos_token_id = case.get("bos_token_id", network.bos_token_id)
    network.enc_token_id = case["enc_token_id"]
    return fill(network, case)


def our_captioner(case: Case) -> model.CodebookCaptioner:
    state, quantize = case.group("param/"), None
    if "quantize.embedding.weight" in state:
        codes = state["quantize.embedding.weight"].shape
        quantize = model.VectorQuantizer(*codes, case["beta"], bool(case["legacy"]))
    vision, text = blip.VisionTransformer(*vision_sizes(case, state)), text_sizes(case, state, "text_decoder.bert.")
    ids = case["bos_token_id"], case.get("sep_token_id", 102)
    return fill(model.CodebookCaptioner(vision, our_text(text), quantize, *ids), case)


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids and mask. Ours ignores in the losses what the mask hides, theirs the ids of padding."""
    pad = case.get("pad_token_id", 0)
    assert torch.equal(case["attention_mask"], (case["input_ids"] != pad).long())
    return case["image"], case["input_ids"], case["attention_mask"]


def parameter_gradients(network: nn.Module, loss: Tensor, prefix: str = "grad/") -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {prefix + name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def text_and_images(images: int, side: int, texts: int, length: int, vocab: int) -> dict:
    """Images, and token ids from [CLS] = 2 to [SEP] = 3, padded."""
    ids = torch.randint(4, vocab - 2, (texts, length))
    lengths = torch.randint(4, length + 1, (texts, 1))
    ids[:, 0] = 2
    ids.scatter_(1, lengths - 1, SEP)
    mask = (torch.arange(length) < lengths).long()
    return {"image": torch.randn(images, 3, side, side), "input_ids": ids * mask, "attention_mask": mask}


def towers(side: int, width: int, text_width: int, heads: int, vocab: int, positions: int, texts: int = 1):
    """Our image tower and text towers."""
    text = [our_text((vocab, text_width, 2, heads, positions, width, 2 * text_width)) for _ in range(texts)]
    return blip.VisionTransformer(side, 8, width, 2, heads), *text


def settings(network: nn.Module, heads: int, without: str = "$", scale: float = 0.05) -> dict:
    """The weights of a network, none of them at a special value, and what their shapes do not tell."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    state = {name: x for name, x in network.state_dict().items() if not re.match(without, name)}
    return prefixed("param/", state) | {"num_heads_vision": heads, "num_heads_text": heads, "patch_size": 8}


# ----------------------------------------------------------------------------------------------------------- quantiser


class Quantizer(Part):
    files = {"vq_legacy": dict(legacy=1), "vq_fixed": dict(legacy=0), "vq_split": dict(legacy=1, width=12, code_dim=4)}
    families = ("vq",)
    functions = "tldr_reduction.model.VectorQuantizer tldr_reduction.model.nearest_codes"
    authors = "vq_compress_model/models/quantize.py:213"
    tolerances = {"indices": (0, 0), "codes": (0, 0), "*": (0, 1e-5)}

    def inputs(self, legacy, width=8, code_dim=8):
        z, w, codes = torch.randn(3, 5, width), torch.randn(3, 5, width), torch.randn(16, code_dim)
        return {"z": z, "w": w, "param/embedding.weight": codes, "beta": 0.25, "legacy": legacy}

    def run(self, kind, case):
        weight = case["param/embedding.weight"]
        quantize, found = kind(*weight.shape, case["beta"], legacy=bool(case["legacy"])), {}
        quantize.load_state_dict(case.group("param/"))
        for what in ("loss", "total"):
            x = case.leaves("z") | {"embedding.weight": quantize.embedding.weight}
            quantize.zero_grad()
            z_q, loss, codes = quantize(x["z"])
            total = loss if what == "loss" else loss + (case["w"] * z_q).sum()
            found |= gradients(total, x, f"grad_{what}/")
            found = {name: value.clone() for name, value in found.items()}
        codes = self.codes(codes).view(len(z_q), -1)
        mse = (quantize.embedding(codes).view(z_q.shape) - case["z"]).square().mean()
        return found | {"z_q": z_q, "loss": loss, "codes": codes, "indices": codes.flatten(), "mse": mse}

    def codes(self, found):
        return found if torch.is_tensor(found) else found[2]

    our = model.VectorQuantizer

    def their(self, up):
        return up.quantize.VectorQuantizer2


class Perplexity(Part):
    files = {"vq_perplexity": {}}
    functions = "tldr_reduction.model.codebook_perplexity tldr_reduction.model.VectorQuantizer"
    authors = "vq_compress_model/models/quantize.py:84"
    tolerances = {"indices": (0, 0), "*": (0, 1e-5)}

    def inputs(self):
        return {"z_nchw": torch.randn(2, 6, 3, 3), "param/embedding.weight": torch.randn(12, 6), "beta": 0.25}

    def ours(self, case):
        b, _, h, w = case["z_nchw"].shape
        weight = case["param/embedding.weight"]
        quantize = model.VectorQuantizer(*weight.shape, case["beta"], legacy=True)
        quantize.load_state_dict(case.group("param/"))
        z_q, loss, codes = quantize(case["z_nchw"].flatten(2).transpose(1, 2))
        nchw = lambda x: x.detach().transpose(1, 2).reshape(b, -1, h, w)  # noqa: E731
        found = {"perplexity": model.codebook_perplexity(codes, len(weight)), "indices": codes, "loss": loss}
        found |= {"z_q_nchw": nchw(z_q), "entry_nchw": nchw(quantize.embedding(codes))}
        return found | {"one_hot": F.one_hot(codes.flatten(), len(weight)).float()}

    def theirs(self, up, case):
        b, _, h, w = case["z_nchw"].shape
        quantize = up.quantize.VectorQuantizer(*case["param/embedding.weight"].shape, case["beta"])
        quantize.load_state_dict(case.group("param/"))
        z_q, loss, (perplexity, one_hot, indices) = quantize(case["z_nchw"])
        entry = quantize.get_codebook_entry(indices.flatten(), (b, h, w, -1))
        found = {"perplexity": perplexity, "indices": indices.view(b, -1), "loss": loss, "one_hot": one_hot}
        return found | {"z_q_nchw": z_q, "entry_nchw": entry}


# ------------------------------------------------------------------------------------------------ towers and captioner


class Positions(Part):
    files = {"pos_embed": dict(grid=4, new=7)}
    more = {"pos_embed_smaller": dict(grid=6, new=3), "pos_embed_same": dict(grid=5, new=5)}
    functions = "tldr_reduction.blip.resize_pos_embed"
    authors = "vq_compress_model/models/vit.py:273"
    atol = 1e-5

    def inputs(self, grid, new):
        return {"pos_embed": torch.randn(1, 1 + grid * grid, 6), "new_grid": new}

    def ours(self, case):
        return {"out": blip.resize_pos_embed(case["pos_embed"], case["new_grid"])}

    def theirs(self, up, case):
        patches = case["new_grid"] ** 2
        tower = SimpleNamespace(
            patch_embed=SimpleNamespace(num_patches=patches), pos_embed=torch.zeros(1, 1 + patches, 6)
        )
        return {"out": up.vit.interpolate_pos_embed(case["pos_embed"], tower)}


TOWERS = "tldr_reduction.blip.VisionTransformer tldr_reduction.blip.TextTransformer"


class Captioner(Part):
    files = {"captioner_forward": {}}
    functions = f"tldr_reduction.model.CodebookCaptioner.forward tldr_reduction.model.CodebookCaptioner.encode {TOWERS}"
    functions += " tldr_reduction.blip.TextDecoder tldr_reduction.blip.LMHead"
    authors = "vq_compress_model/models/blip_pretrain_vq_compress.py:101"
    tolerances = {"codes": (0, 0), "grad/*": (0, 1e-5), "*": (0, 2e-5)}

    def inputs(self):
        network = model.CodebookCaptioner(*towers(32, 16, 24, 4, 40, 14), model.VectorQuantizer(32, 16))
        network.quantize.embedding.weight.data.normal_()
        found = text_and_images(3, 32, 3, 10, 40) | settings(network, 4)
        return found | {"bos_token_id": 38, "pad_token_id": 0, "beta": 0.25, "legacy": 1}

    def ours(self, case):
        network, inputs = our_captioner(case).train(), inputs_of(case)
        loss_lm, loss_emb, _ = network(*inputs)
        found = {"loss_lm": loss_lm, "loss_emb": loss_emb, **parameter_gradients(network, loss_lm + loss_emb)}
        ids = case["input_ids"].clone()
        ids[:, 0] = case["bos_token_id"]
        with torch.no_grad():
            states = network.image_states(case["image"])[0]
            found |= {"image_embeds": network.visual_encoder(case["image"]), "z_q": states}
            found |= {"codes": network.encode(case["image"])}
            texts = ids, case["attention_mask"], states
            smooth = network.text_decoder.loss(*texts, label_smoothing=0.1)
            return found | {"logits": network.text_decoder(*texts), "loss_lm_smooth0.1": smooth}

    def theirs(self, up, case):
        image, ids, mask = inputs_of(case)
        words = Words(ids, mask, case["bos_token_id"] + 2)
        network = their_model(up, up.blip_pretrain_vq_compress.BLIP_Pretrain, case, words)
        loss_lm, loss_emb = network(image, None, 0.4)
        found = {"loss_lm": loss_lm, "loss_emb": loss_emb, **parameter_gradients(network, loss_lm + loss_emb)}
        ids = ids.clone()
        ids[:, 0] = case["bos_token_id"]
        with torch.no_grad():
            embeds = network.visual_encoder(image)
            states, atts = network.quantize(embeds)[0], torch.ones(embeds.shape[:2])
            codes = network(image, None, 0.4, return_codebook=True)[2].view(len(image), -1)
            image_inputs = dict(encoder_hidden_states=states, encoder_attention_mask=atts)
            logits = network.text_decoder(ids, attention_mask=mask, **image_inputs).logits
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == case["pad_token_id"], -100).flatten()
            smooth = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=0.1)
        found |= {"image_embeds": embeds, "z_q": states, "codes": codes, "logits": logits}
        return found | {"loss_lm_smooth0.1": smooth}


class CaptionModel(Part):
    """Fine-tuning on clean captions."""

    files = {"caption_decoder": {}}
    functions = "tldr_reduction.model.CodebookCaptioner.forward"
    authors = "vq_compress_model/models/blip.py:99"
    atol = 2e-5
    unused = ("generate_*", "prompt_ids", "max_length", "min_length")  # of generation

    def inputs(self):
        network = model.CodebookCaptioner(*towers(32, 16, 24, 4, 40, 14), None)
        found = text_and_images(4, 32, 4, 10, 40) | settings(network, 4, scale=0.4)
        found["input_ids"][:, 1:4] = torch.tensor([5, 6, 7])
        found["attention_mask"][:] = found["input_ids"] != 0
        return found | {"bos_token_id": 38, "sep_token_id": SEP, "pad_token_id": 0, "prompt_length": 4}

    def ours(self, case):
        network, inputs = our_captioner(case).train(), inputs_of(case)
        loss_lm, loss_emb, _ = network(*inputs, prompt_length=case["prompt_length"])
        assert loss_emb == 0
        return {"loss_lm": loss_lm, **parameter_gradients(network, loss_lm)}

    def theirs(self, up, case):
        image, ids, mask = inputs_of(case)
        network = their_model(up, up.blip.BLIP_Decoder, case, Words(ids, mask, case["bos_token_id"] + 2))
        network.prompt_length = case["prompt_length"]
        loss = network(image, None)
        return {"loss_lm": loss, **parameter_gradients(network, loss)}


class Generation(CaptionModel):
    """Captions by greedy and beam search."""

    functions = "tldr_reduction.model.CodebookCaptioner.generate tldr_reduction.blip.beam_search"
    authors = "vq_compress_model/models/blip.py:129"
    no_live = "BLIP_Decoder.generate needs the beam search of transformers 4.15"
    atol = 0.0
    unused = ("loss_lm", "grad/*", "input_ids", "attention_mask", "pad_token_id", "prompt_length")  # of fine-tuning

    def inputs(self):
        return super().inputs() | dict.fromkeys(("prompt_ids", "max_length", "min_length"))

    def ours(self, case):
        network, found = our_captioner(case).eval(), {}
        for name in [name for name in case if name.startswith("generate_beams")]:
            sizes = int(name.removeprefix("generate_beams")), case["max_length"], case["min_length"]
            found[name] = network.generate(case["image"], case["prompt_ids"][0], *sizes)
        return found


class Matching(Part):
    files = {"itm_itc": {}}
    gradient_left = True
    functions = f"tldr_reduction.blip.BLIP.itm {TOWERS}"
    authors = "vq_compress_model/models/blip_itm.py:41"
    atol = 2e-5

    def inputs(self):
        network = blip.BLIP(*towers(32, 16, 24, 4, 40, 11, texts=2), 12, 8)
        others = r"temp|.*_m\.|.*_queue|queue_ptr|text_decoder"
        return text_and_images(4, 32, 4, 9, 40) | settings(network, 4, others) | {"enc_token_id": 39}

    @torch.no_grad()
    def run(self, made, case):
        """made(case, ids) -> (logits of matching, cosines)."""
        image, ids, mask = inputs_of(case)
        starting = ids.clone()
        starting[:, 0] = case["enc_token_id"]
        (logits, cosines), (after, _) = made(case, image, ids, mask), made(case, image, starting, mask)
        found = {"itm_logits": logits, "itm_logits_enc_token": after, "itc_sim": cosines}
        scores = {name.replace("logits", "score"): x.softmax(1)[:, 1] for name, x in found.items() if "logits" in name}
        return found | scores

    def our(self, case, *inputs):
        network = our_blip(case).eval()
        return network.itm(*inputs), network.itc(*inputs)

    def their(self, up):
        def made(case, image, ids, mask):
            words = Words(ids, mask, case["enc_token_id"] + 1)
            network = their_model(up, up.blip_itm.BLIP_ITM, case, words).eval()
            return network(image, None, "itm"), network(image, None, "itc")

        return made


class Blip(Part):
    """BLIP's losses; wrong partners are drawn, ours takes theirs."""

    files = {"blip_vlp_losses": {}}
    functions = "tldr_reduction.blip.BLIP"
    authors = "models/blip_pretrain.py:97"
    atol = 5e-5
    unused = ("neg_*",)  # drawn at random
    after = (
        *("image_queue", "text_queue", "queue_ptr", "vision_proj_m.weight", "text_proj_m.bias"),
        *("visual_encoder_m.cls_token", "text_encoder_m.embeddings.word_embeddings.weight"),
    )
    kind, losses = blip.BLIP, ("loss_ita", "loss_itm", "loss_lm")

    def inputs(self):
        network = self.network()
        found = text_and_images(4, 16, 4, 9, 30) | settings(network, 3) | {"pad_token_id": 0}
        return found | {"alpha": 0.4, "momentum": 0.995, "bos_token_id": 28, "enc_token_id": 29}

    def network(self):
        return blip.BLIP(*towers(16, 12, 12, 3, 30, 11, texts=2), 8, 16)

    def extra(self, case) -> dict:
        """Further inputs of theirs, by name."""
        return {}

    def ours(self, case):
        network, seen = our_blip(case, self.kind).train(), {}

        def spy(*arguments, contrast=network.contrast):
            loss, seen["i2t"], seen["t2i"] = contrast(*arguments)
            return loss, seen["i2t"], seen["t2i"]

        network.contrast = spy
        negatives = case["neg_image_index"], case["neg_text_index"]
        losses = network(*inputs_of(case), case["alpha"], *self.extra(case).values(), negatives=negatives)
        found = dict(zip(self.losses, losses, strict=True)) | parameter_gradients(network, sum(losses))
        found |= prefixed("after/", {name: network.state_dict()[name] for name in self.after})
        return found | self.weights(case, seen)

    def weights(self, case, seen) -> dict:
        return {f"weights_{way}": blip.negative_weights(seen[way]) for way in ("t2i", "i2t")}

    def theirs(self, up, case):
        image, ids, mask = inputs_of(case)
        weights, drawn, multinomial = [], [], torch.multinomial

        def noted(of_row, n):
            weights.append(of_row)
            drawn.append(multinomial(of_row, n))
            return drawn[-1]

        module, kind = self.module(original(up))
        network = their_model(original(up), kind, case, Words(ids, mask, case["enc_token_id"] + 1)).train()
        alone = mock.patch.object(module, "concat_all_gather", lambda x: x)
        with alone, mock.patch.object(torch, "multinomial", noted):
            losses = network(image, None, case["alpha"], **self.extra(case))
        found = dict(zip(self.losses, losses, strict=True)) | parameter_gradients(network, sum(losses))
        found |= prefixed("after/", {name: network.state_dict()[name] for name in self.after})
        found["neg_image_index"], found["neg_text_index"] = torch.cat(drawn).split(len(image))
        found["weights_t2i"], found["weights_i2t"] = torch.stack(weights).split(len(image))
        return found

    def module(self, source):
        return source.blip_pretrain, source.blip_pretrain.BLIP_Pretrain


class Retrieval(Blip):
    """Fine-tuning for retrieval. Their weights of wrong partners are from other features (detail 21)."""

    files, more = {}, {"retrieval_losses": {}}
    functions = "tldr_reduction.blip.RetrievalBLIP"
    authors = "models/blip_retrieval.py:72"
    unused = ("neg_*", "weights_*")
    only = {functions: "with wrong partners of the own process, `negative_all_rank` False"}
    after = ("image_queue", "text_queue", "idx_queue", "vision_proj_m.weight", "text_proj_m.bias")
    kind, losses = blip.RetrievalBLIP, ("loss_ita", "loss_itm")

    def network(self):
        network = blip.RetrievalBLIP(*towers(16, 12, 12, 3, 30, 11), 8, 16)
        network.idx_queue[:, :8] = torch.tensor([5, 5, 7, 9, 1, 2, 3, 5])
        network.queue_ptr[0] = 8
        return network

    def inputs(self):
        return super().inputs() | {"image_ids": torch.tensor([5, 6, 5, 7])}

    def extra(self, case):
        return {"idx": case["image_ids"]}

    def weights(self, case, seen):
        return {}

    def theirs(self, up, case):
        renamed = {name.replace("queue_ptr", "ptr_queue"): value for name, value in case.items()}
        return super().theirs(up, Case(case.path, renamed))

    def module(self, source):
        return source.blip_retrieval, source.blip_retrieval.BLIP_Retrieval


# ---------------------------------------------------------------------------------------- clusters, selection, captions


def rows_of(found: Tensor, x: Tensor) -> Tensor:
    """The row of x that each row of `found` is."""
    return torch.cdist(found, x).argmin(1)


class KMeans(Part):
    files = {"kmeans_codes": {}, "kmeans_codes_pca32": dict(n=300, length=65, dim=32, k=7)}
    families = ("kmeans_codes",)
    functions = "tldr_reduction.cluster.fit_whitening tldr_reduction.cluster.whitened"
    functions += " tldr_reduction.cluster.train_kmeans tldr_reduction.cluster.nearest"
    authors = "fast_cluster.py:35, 59"
    tolerances = {
        "features": (0, 3e-4), "*objective": (1e-4, 0), "centroids": (0, 1e-4), "dist2_to_centroid": (0, 1e-4),
    }  # fmt: skip

    def inputs(self, n=420, length=300, dim=256, k=9):
        patterns = np.random.randint(0, 256, (12, length))
        codes = patterns[np.random.randint(0, 12, n)]
        codes = np.where(np.random.rand(n, length) < 0.5, np.random.randint(0, 256, (n, length)), codes)
        return {"codes": torch.from_numpy(codes), "pca_dim": dim, "np_random_seed": 0, "k": k, "niter": 20}

    def ours(self, case):
        features, k, niter = case["features"], case["k"], case["niter"]
        own = cluster.whitened(cluster.fit_whitening(case["codes"], case["pca_dim"]), case["codes"])
        u, _, v = torch.linalg.svd(own.T.double() @ features.double())  # axes of equal length may be rotated
        seed = int(np.random.RandomState(case["np_random_seed"]).randint(1234))
        start, _ = cluster.train_kmeans(features, k, seed, niter=0)
        centroids, objective = cluster.train_kmeans(features, k, seed, niter)
        assignment, dist2 = cluster.nearest(features, centroids)
        found = {"features": own @ (u @ v).float(), "faiss_seed": seed, "init_index": rows_of(start, features)}
        found |= {"assignment": assignment, "centroids": centroids, "dist2_to_centroid": dist2}
        found |= {"objective": objective, "final_objective": objective[-1]}
        return found | {"cluster_sizes": torch.bincount(assignment, minlength=k)}

    def theirs(self, up, case):
        k, made, own = case["k"], [], up.fast_cluster.faiss

        def clustering(*sizes):
            made.append(faiss.Clustering(*sizes))
            return made[-1]

        def centroids_of(found):
            return torch.from_numpy(faiss.vector_to_array(found.centroids).reshape(k, -1).copy())

        features = np.asarray(up.fast_cluster.preprocess_features(case["codes"].numpy(), pca=case["pca_dim"]))
        np.random.seed(case["np_random_seed"])
        with mock.patch.object(own, "Clustering", clustering):
            assignment, final = up.fast_cluster.run_kmeans(features, k)
        stats, x, assignment = made[0].iteration_stats, torch.from_numpy(features), torch.tensor(assignment)
        start = faiss.Clustering(x.shape[1], k)
        start.niter, start.seed = 0, made[0].seed
        start.train(features, faiss.IndexFlatL2(x.shape[1]))
        centroids = centroids_of(made[0])
        found = {"features": x, "faiss_seed": made[0].seed, "init_index": rows_of(centroids_of(start), x)}
        found |= {"assignment": assignment, "centroids": centroids, "final_objective": final}
        found["objective"] = torch.tensor([stats.at(i).obj for i in range(stats.size())])
        found["dist2_to_centroid"] = (x - centroids[assignment]).square().sum(1)
        return found | {"cluster_sizes": torch.bincount(assignment, minlength=k)}


class Selection(Part):
    files = {"selection": {}, "selection_every4": dict(n=120, k=6, every=4)}
    families = ("selection",)
    functions = "tldr_reduction.cluster.select_fraction tldr_reduction.cluster.keep_top tldr_reduction.reduce.filtered"
    authors = "codebook_cluster.py:58-95"

    def inputs(self, n=203, k=9, every=5):
        kept = torch.from_numpy(np.sort(np.random.permutation(n)[: n // 2]))
        return {"assignment": torch.randint(0, k, (n,)), "num_clusters": k, "every_n": every, "itm_keep_index": kept}

    def ours(self, case):
        """Samples that survive the filter score 1, the others 0."""
        selected = cluster.select_fraction(case["assignment"], case["num_clusters"], 1 / case["every_n"])
        kept, rows = case["itm_keep_index"], np.arange(len(case["assignment"]))
        cfg = SimpleNamespace(itm_keep=len(kept) / len(rows))
        both = reduce.filtered(cfg, selected.numpy(), rows, np.isin(rows, kept).astype(np.float64))
        return {"selected": selected, "selected_and_itm": both}

    def theirs(self, up, case):
        assignment, kept = case["assignment"], case["itm_keep_index"].tolist()
        lists = [(assignment == c).nonzero().flatten().tolist() for c in range(case["num_clusters"])]
        rows = [{"image": str(row), "caption": ""} for row in range(len(assignment))]
        scope = statements(
            up.root / "codebook_cluster.py", "success_data = []", "for i in range(len(success_data))",
            N=case["every_n"], gallery=np.zeros((len(rows), 2)), annotation=rows, print=lambda *_: None,
            FastKmeans=SimpleNamespace(images_lists=lists), open=lambda *_: None,
            json=SimpleNamespace(load=lambda _: [rows[row] for row in kept]),
        )  # fmt: skip
        names = {"selected": "success_data", "selected_and_itm": "success_data_preserved"}
        return {name: torch.tensor([int(row["image"]) for row in scope[own]]) for name, own in names.items()}


class FirstQuarter(Part):
    """The random baseline of their code."""

    more = {"first_quarter": {}}
    functions = "tldr_reduction.reduce.select"
    only = {functions: "`--select first`"}
    authors = "random_selection.py:14"

    def inputs(self):
        return {"rows": torch.arange(104)}

    def ours(self, case):
        cfg = SimpleNamespace(select="first", keep=0.25, match=None)
        return {"kept": reduce.select(cfg, len(case["rows"]), None, None)}

    def theirs(self, up, case):
        names = dict(metadata=case["rows"].tolist())
        scope = statements(up.root / "random_selection.py", "success_data", "success_data", **names)
        return {"kept": scope["success_data"]}


class CaptionMerge(Part):
    files = {"caption_merge": {}}
    functions = "tldr_reduction.reduce.refined tldr_reduction.reduce.new_captions"
    authors = "generate_train_json_w_caption.py:33-82"
    unused = ("success_count",)  # printed by their script only
    json = True

    def inputs(self):
        """With a row of no prediction, and a prediction of no row."""
        rows = [["a man", "shard_1"], ["a dog; cat", "x_y_2"], ["tree", "3"]]
        generated = [{"image_id": row, "caption": text} for row, text in ((0, "one"), (1, "two"), (9, "no"))]
        annotations = [{"image": f"d/{key}.jpg", "caption": "old"} for key in ("2", "9", "1", "3")]
        return {"original_rows": rows, "generated": generated, "success": annotations}

    def ours(self, case):
        """By row. A row is that of the annotation whose file name, up to its first dot, is the end of its key, after
        the last "_"; an annotation without a row keeps its caption."""
        texts, keys = zip(*case["original_rows"], strict=True)
        pairs = SimpleNamespace(keys=keys, caption=texts.__getitem__)
        with tempfile.TemporaryDirectory() as folder:
            cfg = SimpleNamespace(captions="refined", predictions=f"{folder}/predictions.json")
            Path(cfg.predictions).write_text(json.dumps(case["generated"]), encoding="utf-8")
            captions, _ = reduce.new_captions(cfg, SimpleNamespace(pairs=pairs), np.arange(len(keys)))
        by_key = {key.split("_")[-1]: captions[row] for row, key in enumerate(keys)}
        found = []
        for entry in case["success"]:
            key = entry["image"].split("/")[-1].split(".")[0]
            found.append({"image": entry["image"], "caption": by_key.get(key, entry["caption"])})
        return {"expected": found}

    def theirs(self, up, case):
        with tempfile.TemporaryDirectory() as folder:
            names = {name: f"{folder}/{name}" for name in ("src_tsv_1", "src_json_1", "src_json_2")}
            rows = "\n".join("\t".join(row) for row in case["original_rows"])
            contents = rows, json.dumps(case["generated"]), json.dumps(case["success"])
            for path, content in zip(names.values(), contents, strict=True):
                Path(path).write_text(content, encoding="utf-8")
            names |= dict(reader=csv.reader, json=json, print=lambda *_: None)
            script = up.root / "generate_train_json_w_caption.py"
            scope = statements(script, "success_data = []", "for i in range(len(ann2))", **names)
        return {"expected": scope["success_data"], "success_count": scope["success_count"]}


class PreCaption(Part):
    files = {"pre_caption": {}}
    functions = "tldr_reduction.tokenizer.pre_caption"
    authors = "data/utils.py:10"

    def inputs(self):
        captions = [
            "A man; a Bicycle.",
            "  two   spaces ",
            'HELLO (World) "x" #tag: 10*2~3!',
            "a.b.c",
            "tab\tand\nline",
        ]
        captions += ["", "caf\u00e9 \u732b, isn't it?", "word " * 60, "end \n"]
        return {"json": [{"caption": text, "max_words": n} for text in captions for n in (30, 5, 50)]}

    def run(self, function, case):
        cleaned = [function(entry["caption"], entry["max_words"]) for entry in case.json]
        return {"json": [entry | {"expected": text} for entry, text in zip(case.json, cleaned, strict=True)]}

    our = staticmethod(pre_caption)

    def their(self, up):
        return original(up).utils.pre_caption


# ------------------------------------------------------------------------------------------------ schedules, evaluation


def exact(number: float) -> float:
    """Settings are stored as float32; returns 0.9 for 0.899999976."""
    return float(f"{number:.6g}")


class Schedules(Part):
    files = {"schedules": {}}
    functions = "tldr_reduction.train.warmup_step_lr tldr_reduction.train.cosine_lr tldr_reduction.train.alpha_ramp"
    authors = "vq_compress_model/utils.py:2"
    rtol = 1e-6

    def inputs(self):
        found = {"init_lr": 3e-4, "min_lr": 1e-6, "warmup_lr": 1e-6, "warmup_steps": 30, "lr_decay_rate": 0.9}
        found |= {"max_epoch": 20, "steps_per_epoch": 12, "alpha": 0.4}
        return found | {"finetune_init_lr": 1e-5, "finetune_min_lr": 0.0, "finetune_max_epoch": 5}

    def run(self, made, case):
        """made -> (rate of a step, alpha of a step, rate of an epoch of fine-tuning)."""
        cfg = {name: exact(case[name]) for name in self.inputs()}
        epochs, steps, last = (case[name] for name in ("max_epoch", "steps_per_epoch", "finetune_max_epoch"))
        (rate, alpha, tuning), grid = made(cfg), [(e, s) for e in range(epochs) for s in range(steps)]
        found = {"pretrain_lr": torch.tensor([rate(*at) for at in grid]).double().view(epochs, steps)}
        found["alpha_ramp"] = torch.tensor([alpha(*at) for at in grid]).double().view(epochs, steps)
        return found | {"finetune_lr": torch.tensor([tuning(e) for e in range(last)]).double()}

    def our(self, cfg):
        rates = [cfg[name] for name in ("init_lr", "min_lr", "warmup_lr", "warmup_steps", "lr_decay_rate")]
        ends = cfg["finetune_max_epoch"], cfg["finetune_init_lr"], cfg["finetune_min_lr"]
        return (
            lambda epoch, step: train.warmup_step_lr(epoch, step, *rates),
            lambda epoch, step: train.alpha_ramp(epoch, step, int(cfg["steps_per_epoch"]), cfg["alpha"]),
            lambda epoch: train.cosine_lr(epoch, *ends),
        )

    def their(self, up):
        def made(cfg):
            group = {"lr": 0.0}
            optimizer = SimpleNamespace(param_groups=[group])

            def rate(epoch, step):
                up.utils.step_lr_schedule(optimizer, epoch, cfg["init_lr"], cfg["min_lr"], cfg["lr_decay_rate"])
                if epoch == 0:
                    ends = cfg["warmup_lr"], cfg["init_lr"]
                    up.utils.warmup_lr_schedule(optimizer, step, cfg["warmup_steps"], *ends)
                return group["lr"]

            def alpha(epoch, step):
                names = dict(config=cfg, epoch=epoch, i=step, data_loader=range(int(cfg["steps_per_epoch"])))
                return run_line(up.pretrain_vq_compress, "alpha", **names)

            def tuning(epoch):
                ends = cfg["finetune_init_lr"], cfg["finetune_min_lr"]
                up.utils.cosine_lr_schedule(optimizer, epoch, cfg["finetune_max_epoch"], *ends)
                return group["lr"]

            return rate, alpha, tuning

        return made


class Recall(Part):
    files = {"retrieval_metrics": {}}
    functions = "tldr_reduction.eval.retrieval_recall"
    authors = "train_retrieval.py:171"
    atol = 1e-4

    def inputs(self):
        scores, owner = torch.randn(25, 125), torch.arange(125) // 5
        scores[owner, torch.arange(125)] += 2
        return {"scores_i2t": scores, "scores_t2i": scores.T + 0.5 * torch.randn(125, 25), "captions_per_image": 5}

    def run(self, function, case):
        c, texts = case["captions_per_image"], range(len(case["scores_t2i"]))
        owner = {text: text // c for text in texts}
        own = {image: [text for text in texts if owner[text] == image] for image in range(len(case["scores_i2t"]))}
        return function(case["scores_i2t"], case["scores_t2i"], owner, own)

    our = staticmethod(evaluation.retrieval_recall)

    def their(self, up):
        function = original(up).train_retrieval.itm_eval
        return lambda i2t, t2i, owner, own: function(i2t.numpy(), t2i.numpy(), owner, own)


class Rerank(Part):
    files = {"retrieval_rerank": {}}
    functions = "tldr_reduction.eval.rerank_scores"
    authors = "train_retrieval.py:69"
    atol = 2e-5

    def inputs(self):
        network = blip.BLIP(*towers(16, 12, 12, 3, 30, 10, texts=2), 8, 8)
        others = r"temp|.*_m\.|.*_queue|queue_ptr|text_decoder"
        found = text_and_images(6, 16, 12, 8, 30) | settings(network, 3, others)
        return found | {"enc_token_id": 29, "k_test": 4}

    def ours(self, case):
        network, inputs = our_blip(case).eval(), inputs_of(case)
        found = evaluation.rerank_scores(network, *inputs, case["k_test"], batch_size=3)
        for a, b in zip(found, evaluation.rerank_scores(network, *inputs, case["k_test"]), strict=True):
            torch.testing.assert_close(a, b)
        return dict(zip(("score_i2t", "score_t2i"), found, strict=True))

    def theirs(self, up, case):
        source, (image, ids, mask) = original(up), inputs_of(case)
        words = Words(ids, mask, case["enc_token_id"] + 1)
        network = their_model(source, source.blip_retrieval.BLIP_Retrieval, case, words)

        class Loader(list):
            dataset = SimpleNamespace(text=list(range(len(ids))), image=list(image))

        loader = Loader((batch, None) for batch in image.split(4))
        cfg, device = {"k_test": case["k_test"]}, torch.device("cpu")
        found = source.train_retrieval.evaluation(network, loader, device, cfg)
        return dict(zip(("score_i2t", "score_t2i"), found, strict=True))


class Views(Part):
    files = {"eval_transform": {}}
    functions = "tldr_reduction.datasets.eval_transform"
    authors = "data/__init__.py:26"
    atol = 1e-4

    def inputs(self):
        image = Image.fromarray(np.random.randint(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56, 40), Image.BICUBIC)
        return {"image_uint8_hwc": np.asarray(image).astype(np.int64), "image_size": 32}

    def run(self, made, case):
        image = Image.fromarray(case["image_uint8_hwc"].numpy().astype(np.uint8))
        return {"out": made(case["image_size"])(image)}

    our = staticmethod(eval_transform)

    def their(self, up):
        def made(size):
            data = original(up).data
            with mock.patch.object(data, "nocaps_eval", lambda transform, *_: transform):
                cfg = {"image_size": size, "image_root": "", "ann_root": "", "prompt": ""}
                return data.create_dataset("nocaps", cfg)[0]

        return made
