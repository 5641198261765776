"""FLAME against the authors' code: `pytest tests/parity/test_flame.py --upstream PATH`, a clone of
MIV-XJTU/FLAME@4d2b9a9. Both sides get the same seeded inputs on the CPU in fp32; the table is printed at the end.

Their text encoder runs on today's transformers, with adapters: it expects blocks that return tuples instead of tensors,
and tokenizers with `batch_encode_plus`. It embeds one caption at a time, or captions of equal length, since in padded
batches its facets attend to each other (detail 4 of the README).
"""

import contextlib
import copy
import io
import math
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from flame import config, llm, model, train, zeroshot
from flame import eval as evaluation

from . import (  # noqa: F401  (seeded: autouse)
    Table,
    clone_of,
    import_beside,
    printed,
    race,
    run_block,
    seeded,
    trajectory,
    unit,
    with_gradients,
)

VISION = dict(image_size=24, layers=2, width=32, head_width=8, patch_size=8, pool_type="avg")


def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules from a clone."""
    root = Path(path).resolve() / "src"
    names = [f"open_clip.{n}" for n in ("model", "loss", "multiprompteol_embeddings", "transform")]
    names += ["open_clip.zero_shot_classifier", "training.scheduler", "training.train", "training.main"]
    stubs = {"training.data": ModuleType("training.data")}  # needs pandas and wids
    stubs["training.data"].get_data = None
    modules = import_beside(root, names, stubs)
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)


@pytest.fixture(scope="module")
def up(request):
    path = clone_of(request, "MIV-XJTU/FLAME", "4d2b9a9")
    return load(path)


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "FLAME, MIV-XJTU/FLAME@4d2b9a9:src/")


# ------------------------------------------------------------------------------------------------------------- texts


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
        return padded([self.ids(text, True) for text in texts])


class Batch(SimpleNamespace):
    def to(self, device):
        return self


def padded(rows: list[list[int]], pad: int = 0) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Batch(input_ids=ids, attention_mask=real)


def their_encoder(up, lm, tokenizer, layer: int):
    """Their text encoder on a language model, whose block passes tuples to its hooks."""
    encoder = up.multiprompteol_embeddings.MultiPromptEOLEmbeddingsLLM(lm, layer=str(layer), tokenizer=tokenizer)
    block = lm.model.layers[layer - 1]
    register = type(block).register_forward_hook

    def as_tuple(hook):
        for key in list(block._forward_hooks):  # their code never removes hooks
            del block._forward_hooks[key]
        return register(block, lambda module, inputs, output: hook(module, inputs, (output,)))

    block.register_forward_hook = as_tuple
    return encoder


def template_of(prompt: llm.Prompt) -> str:
    """A prompt in their notation."""
    return llm.render(prompt, "*sent_0*").replace(" ", "_")


CAPTIONS = [
    "a cat",
    'a "big" dog, running , fast',
    "what is it?",
    "a long caption . It has sentences , and commas",
    "ends with.",
]


def test_text_encoder(up, table):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    sizes["initializer_range"] = 0.3  # for states of about size 1, which an absolute tolerance suits
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes)).eval()
    tokenizer = Words()
    prompts = llm.read_prompts(up.root / "training/embed_cc3m_mask.py")
    ours, theirs = llm.FrozenLLM(lm, tokenizer), their_encoder(up, lm, tokenizer, 3)
    source = up.multiprompteol_embeddings.MultiPromptEOLEmbeddingsLLM.forward

    def encode(caption: str, prompt: llm.Prompt, infer: bool):
        ids = padded([tokenizer.ids(caption, True)]).input_ids
        several = len(prompt.facets) > 1
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            hidden = theirs(ids, "short", several, template_of(prompt), len(prompt.facets), infer)
        return hidden if infer or several else hidden[:, None]

    for name, prompt in zip(("raw", "short", "long"), prompts, strict=True):
        (a, b), seconds = race(
            lambda prompt=prompt: torch.cat([encode(caption, prompt, False) for caption in CAPTIONS]),
            lambda prompt=prompt: ours(CAPTIONS, prompt),
            2,
        )
        table.compare(
            f"clean-up, prompt, mask, readout: {name}", source, "llm.FrozenLLM", a, b, atol=1e-4, seconds=seconds,
            note="ours in one batch",
        )  # fmt: skip
    mean = torch.cat([encode(caption, prompts[2], True) for caption in CAPTIONS])
    table.compare("mean of facets", source, "llm.FrozenLLM", mean, ours(CAPTIONS, prompts[2]).mean(1), atol=1e-4)
    rows = [torch.cat([encode(caption, prompt, False) for caption in CAPTIONS]) for prompt in prompts]
    theirs_bank = F.normalize(torch.cat(rows, dim=1), dim=-1)
    ours_bank = llm.embed_captions(ours, CAPTIONS, CAPTIONS, CAPTIONS, prompts, batch_size=2)
    table.compare("bank, 11 facets", "training/embed_cc3m_mask.py:237", "llm.embed_captions", theirs_bank, ours_bank)


def test_drawing_facets(up, table):
    feature = torch.randn(11, 4)
    torch.manual_seed(3)
    theirs = feature[torch.randperm(feature.shape[0])[:6], :]
    torch.manual_seed(3)
    where = "training/data.py:409"
    table.compare("draw 6 of 11", where, "train.sample_facets", theirs, train.sample_facets(feature), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- image tower


def twins(up):
    """Their image tower and ours with the same weights."""
    visual = up.model._build_vision_tower(16, dict(VISION))
    mm = up.model._build_mm_projector(dict(mm_projector=True, width=32, mlp_depth=2, projector_dim=20))
    theirs = torch.nn.ModuleDict({"visual": visual, "mm": mm})
    tower = open_clip.transformer.VisionTransformer(
        image_size=24, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=4.0, output_dim=16, pool_type="avg"
    )
    ours = model.FLAME(tower, 32, 20)
    model.load_checkpoint(ours, {"logit_scale": torch.tensor(2.3), **theirs.state_dict()})
    return theirs, ours


def test_image_tower(up, table):
    theirs, ours = twins(up)
    images, cotangent = torch.randn(4, 3, 24, 24), torch.randn(4, 20)
    side = SimpleNamespace(visual=theirs["visual"], mm=theirs["mm"])
    encode = up.model.CustomTextCLIP.encode_image

    def gradients(function):
        def call():
            pixels = images.clone().requires_grad_()
            features = function(pixels)
            return features.detach(), torch.autograd.grad((features * cotangent).sum(), pixels)

        return call

    (a, b), seconds = race(
        gradients(lambda x: encode(side, x, normalize=True)), gradients(lambda x: ours.encode_image(x, normalize=True))
    )
    table.compare("ViT, MLP, mean, L2", encode, "model.FLAME.encode_image", a[0], b[0], gradients=(a[1], b[1]),
                  seconds=seconds)  # fmt: skip
    with torch.no_grad():
        a, b = encode(side, images, visual_only=True), ours.encode_image(images, visual_only=True)
    table.compare("patch mean for the probe", encode, "model.FLAME.encode_image", a, b)


def test_parameter_groups(up, table):
    source = (up.root / "training/main.py").read_text().splitlines()
    line = next(i for i, text in enumerate(source) if "exclude = lambda" in text)
    exclude = eval(source[line].partition("=")[2])  # a lambda of their script
    _, ours = twins(up)
    names = {id(p): name for name, p in ours.named_parameters()}
    theirs = sorted(name for name, p in ours.named_parameters() if exclude(name, p))
    mine = sorted(names[id(p)] for p in train.parameter_groups(ours, 0.5)[0]["params"])
    assert theirs == mine
    table.compare("no weight decay", f"training/main.py:{line + 1}", "train.parameter_groups", len(theirs), len(mine))


def test_image_transform(up, table):
    image = Image.fromarray(torch.randint(0, 256, (70, 97, 3), dtype=torch.uint8).numpy())
    theirs = up.transform.image_transform(48, is_train=False)(image)
    sized = SimpleNamespace(visual=SimpleNamespace(image_size=(48, 48)))
    ours = zeroshot.eval_transform(sized)(image)
    table.compare(
        "evaluation transform", up.transform.image_transform, "zeroshot.eval_transform", theirs, ours, rtol=0, atol=1e-6
    )
    cfg = up.transform.AugmentationCfg(scale=(0.9, 1.0))
    torch.manual_seed(5)
    theirs = up.transform.image_transform(48, is_train=True, aug_cfg=cfg)(image)
    torch.manual_seed(5)
    ours = train.training_view(48, 0.9)(image)
    table.compare(
        "training transform", up.transform.image_transform, "train.training_view", theirs, ours, rtol=0, atol=1e-6
    )


# ------------------------------------------------------------------------------------------------ losses and schedules


def test_losses(up, table):
    image, text, scale, bias = unit(32, 24), unit(32 * 6, 24), torch.tensor(12.0), torch.tensor(-9.0)
    cases = [
        ("multi-positive sigmoid", up.loss.MultiPositiveSigmoidLoss, model.mp_sigmoid_loss, text, True),
        ("SigLIP (K = 1)", up.loss.SigLipLoss, model.mp_sigmoid_loss, text[:32], True),
        ("multi-positive InfoNCE", up.loss.MultiPositiveNCELoss, model.mp_nce_loss, text, False),
        ("InfoNCE (K = 1)", up.loss.ClipLoss, model.mp_nce_loss, text[:32], False),
    ]
    for name, theirs, ours, texts, biased in cases:
        inputs = (image, texts, scale, bias) if biased else (image, texts, scale)
        (a, b), seconds = race(
            lambda theirs=theirs, inputs=inputs: with_gradients(theirs(), *inputs),
            lambda ours=ours, inputs=inputs: with_gradients(ours, *inputs),
        )
        table.compare(name, theirs.forward, f"model.{ours.__name__}", a[0], b[0], gradients=(a[1], b[1]),
                      seconds=seconds)  # fmt: skip
    negative = up.loss.MultiPositiveSigmoidLoss()._loss(image, text, scale, bias, negative_only=True)
    where = up.loss.MultiPositiveSigmoidLoss._loss
    matched = 1e3 * image.repeat_interleave(6, 0)  # own texts that add nothing, one image at a time
    with mock.patch.object(model, "gather", lambda texts: torch.cat([texts, text])):
        parts = zip(image.split(1), matched.split(6), strict=True)
        ours = torch.stack([model.mp_sigmoid_loss(*part, scale, bias) for part in parts]).mean()
    table.compare("texts of another process", where, "model.mp_sigmoid_loss", negative, ours)


def test_learning_rate(up, table):
    steps, optimizer = range(0, 1000, 7), SimpleNamespace(param_groups=[{}])
    adjust, cfg = up.scheduler.cosine_lr(optimizer, 5e-4, 100, 1000), config.Config(lr=5e-4, warmup=100)
    a, b = [adjust(s) for s in steps], [train.learning_rate(cfg, s, 1000) for s in steps]
    table.compare("learning rate", up.scheduler.cosine_lr, "train.learning_rate", a, b, rtol=1e-6, atol=1e-12)


def test_training_step(up, table):
    theirs, ours = twins(up)
    theirs.logit_scale = torch.nn.Parameter(torch.tensor(math.log(10)))
    theirs.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    ours.logit_scale.data.fill_(math.log(10))
    side = SimpleNamespace(visual=theirs["visual"], mm=theirs["mm"])
    options = dict(lr=5e-4, betas=(0.9, 0.95), eps=1e-4)
    optimizers = [torch.optim.AdamW(train.parameter_groups(m, 0.5), **options) for m in (theirs, ours)]
    loss, cfg = up.loss.MultiPositiveSigmoidLoss(), config.Config(precision="fp32")
    scaler = torch.amp.GradScaler(enabled=False)
    losses = ([], [])
    for _ in range(3):
        images, facets = torch.randn(6, 3, 24, 24), unit(6, 3, 20)
        optimizers[0].zero_grad()
        features = up.model.CustomTextCLIP.encode_image(side, images, normalize=True)
        value = loss(features, facets.flatten(0, 1), theirs.logit_scale.exp(), theirs.logit_bias)
        value.backward()
        optimizers[0].step()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, math.log(100))
        losses[0].append(value.item())
        losses[1].append(train.train_step(ours, (images, facets), optimizers[1], scaler, 5e-4, cfg)["loss"].item())
    table.compare("three steps: loss", "training/train.py:90", "train.train_step", *losses)
    state = theirs.state_dict()
    a, b = ({n: v for n, v in s.items() if not n.endswith("in_proj_bias")} for s in (state, ours.state_dict()))
    table.compare(
        "three steps: weights", "training/train.py:90", "train.train_step", a, {n: b[n] for n in a}, atol=5e-5
    )


def test_trajectory(up, table):
    """Their train_one_epoch, with optimizer, schedule and loss as their main() makes them, against our training step.

    Four epochs; texts are facets of the shard's captions, embedded by a random language model and drawn for each batch.
    Replaced: their model has no language model, since training does not use it; their loader `training.data`, which
    needs pandas and wids, is a list of batches.
    """
    epochs, batch_size = 4, 32
    per_epoch = trajectory.STEPS // epochs
    pairs, pixels, captions = trajectory.shard(VISION["image_size"])
    sizes = dict(
        hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    encoder = llm.FrozenLLM(LlamaForCausalLM(LlamaConfig(vocab_size=3000, **sizes)).eval(), Words())
    prompts = llm.read_prompts(up.root / "training/embed_cc3m_mask.py")
    bank = llm.embed_captions(encoder, captions, captions, captions, prompts, batch_size=64)
    rows = trajectory.orders(len(pairs), batch_size, epochs * per_epoch)
    facets = [torch.stack([train.sample_facets(bank[row]) for row in batch]) for batch in rows]
    parts, start = twins(up)
    cfg = config.Config(warmup=20, epochs=epochs, batch_size=batch_size, lr=1e-3, precision="fp32")
    args = SimpleNamespace(
        model="FLAME", train_data="shards", trace=False, precision="fp32", device="cpu", rank=0, local_rank=0,
        world_size=1, horovod=False, wd=cfg.weight_decay, lr=cfg.lr, beta1=cfg.beta1, beta2=cfg.beta2, eps=cfg.eps,
        warmup=cfg.warmup, epochs=epochs, lr_scheduler="cosine", skip_scheduler=False, accum_freq=1, distill=False,
        siglip=False, mp_sigmoid=True, grad_clip_norm=None, log_every_n_steps=100, batch_size=batch_size, wandb=False,
    )  # fmt: skip

    class WithoutText(up.model.CustomTextCLIP):
        output_dict = True

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.visual, self.mm = copy.deepcopy(parts["visual"]), copy.deepcopy(parts["mm"])
            self.logit_scale, self.logit_bias = copy.deepcopy(start.logit_scale), copy.deepcopy(start.logit_bias)

    def batches(dtype):
        return ((pixels[batch].to(dtype), texts.to(dtype)) for batch, texts in zip(rows, facets, strict=True))

    def theirs(dtype):
        network = WithoutText().to(dtype)
        loader = trajectory.Epochs(((0, 0, i, 0, t) for i, t in batches(dtype)), per_epoch, batch_size)
        everything = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
        made = run_block(up.main, "args.train_data or args.dataset_type == 'synthetic'", args=args, model=network)
        made |= run_block(up.main, "'train' in data and optimizer is not None", data=everything, **made)
        for epoch in range(epochs):
            loss, optimizer, scheduler = up.main.create_loss(args), made["optimizer"], made["scheduler"]
            up.train.train_one_epoch(network, everything, loss, epoch, optimizer, None, scheduler, None, args)

    def ours(dtype):
        network = copy.deepcopy(start).to(dtype)
        groups = train.parameter_groups(network, cfg.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw, fused=True)
        scaler = torch.amp.GradScaler(enabled=False)
        for step, batch in enumerate(batches(dtype)):
            lr = train.learning_rate(cfg, step, epochs * per_epoch)
            yield train.train_step(network, batch, adamw, scaler, lr, cfg)["loss"]

    where = f"{table.where(up.train.train_one_epoch)}, training/main.py:308"
    trajectory.compare(table, "flame", where, "train.train_step", trajectory.run(theirs, ours))


# -------------------------------------------------------------------------------------------------------- evaluation


def test_zero_shot_classifier(up, table):
    embeds, width = torch.randn(8, 5, 10), 5
    names, templates = [str(i) for i in range(8)], [f"{{}} {j}" for j in range(width)]

    def encode_text(ids, normalize=False):
        rows = embeds[ids[:, 0], ids[:, 1]]
        return F.normalize(rows, dim=-1) if normalize else rows

    def tokenizer(texts):
        return torch.tensor([list(map(int, text.split())) for text in texts])

    function = up.zero_shot_classifier.build_zero_shot_classifier
    theirs = function(SimpleNamespace(encode_text=encode_text), tokenizer, names, templates)
    table.compare("template ensemble", function, "zeroshot.zero_shot_classifier", theirs,
                  zeroshot.zero_shot_classifier(embeds), atol=1e-6)  # fmt: skip


def test_retrieval(up, table):
    image, text = unit(40, 8), unit(40, 8)
    theirs = up.train.get_clip_metrics(image, text, torch.tensor(100.0))
    ours = evaluation.retrieval_recall(image, text, torch.arange(40))
    names = {"image_to_text": "text_retrieval_recall", "text_to_image": "image_retrieval_recall"}
    for direction, name in names.items():
        a, b = ([theirs[f"{direction}_R@{k}"] for k in (1, 5, 10)], [ours[f"{name}@{k}"] for k in (1, 5, 10)])
        table.compare(f"R@1, 5, 10 {direction}", up.train.get_clip_metrics, "eval.retrieval_recall", a, b, atol=1e-6)
