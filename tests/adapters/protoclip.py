"""ProtoCLIP's parts, ours and those of megvii-research/protoclip@fde1933, on the CPU in fp32."""

import contextlib
import csv
import functools
import importlib.util
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import faiss
import numpy as np
import open_clip
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytest import MonkeyPatch
from torch import Tensor

from protoclip import eval as evaluation
from protoclip import model, teacher, train, views
from shared import clip, corpus, data, run, zeroshot
from tests.adapters import Case, Part, gradients, leaf, prefixed
from tests.parity import import_beside, run_block, run_line, unit

CLONE = "megvii-research/protoclip", "fde1933", "src/training/clustering.py"
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 4, "head_width": 64}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
HEADS = dict(add_projection_head=True, projection_hidden_dim=40, projection_dim=16, projection_n_layers=1)
TRAIN = dict(  # their flags, with the values of their README where the scale allows
    **HEADS, PBT=True, external_teacher="teacher.npy", target_temperature=0.01, w_clip=1.0, w_proto=1.0,
    w_proto_external=1.0, infonce_warmup_epoch=0, lit_start_epoch=-1, k=6, kmeans_max_iter=20, kmeans_nredo=3,
    episode_size=37, batch_size=8, epochs=4, lr=1e-3, lr_text=-1.0, warmup=3, text_start_epoch=0, text_end_epoch=-1,
    wd=0.2, beta1=0.9, beta2=0.98, eps=1e-4, max_grad_norm=1.0, precision="fp32", device="cpu", distributed=False,
    rank=0, local_rank=0, world_size=1, horovod=False, local_loss=False, gather_with_grad=False, wandb=False,
    trace=False, train_data="data.tsv",
)  # fmt: skip


def flags(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{**TRAIN, **changed})


def heads(hidden_dim: int = 2048, projection_dim: int = 128, layers: int = 1) -> SimpleNamespace:
    return flags(projection_hidden_dim=hidden_dim, projection_dim=projection_dim, projection_n_layers=layers)


def published(up, name: str):
    """Their model of an architecture's name."""
    config = open_clip.get_model_config(name)
    return up.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], args=heads())


# ----------------------------------------------------------------------------------------------------- their modules


@functools.cache
def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules from a clone, with stand-ins for what no longer installs and K-means kept off the GPU."""
    root = Path(path).resolve() / "src"
    stubs = {name: ModuleType(name) for name in ("openTSNE", "pytorch_transformers")}
    stubs["openTSNE"].TSNE = stubs["pytorch_transformers"].RobertaModel = None
    stubs["pytorch_transformers"].RobertaTokenizer = None
    stubs = {name: stub for name, stub in stubs.items() if importlib.util.find_spec(name) is None}
    names = ["open_clip.model", "open_clip.transform", "open_clip.tokenizer", "utils.RoBERTa"]
    names += [f"training.{n}" for n in ("main", "train", "loss", "clustering", "scheduler", "data")]
    names += ["training.distributed", "training.params"]
    names += [f"training.evaluations.{n}" for n in ("zero_shot", "linear_eval", "coco_retrieval", "analyze_features")]
    modules = import_beside(root, names, stubs)
    up = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)
    kmeans = ModuleType("faiss")
    kmeans.Kmeans = lambda **options: faiss.Kmeans(**{**options, "gpu": False, "verbose": False})
    up.clustering.faiss = up.zero_shot.faiss = kmeans
    up.data.np = ModuleType("numpy")
    vars(up.data.np).update({**vars(np), "string_": np.bytes_})  # removed in numpy 2
    up.zero_shot.float = lambda x: float(np.asarray(x).item())  # numpy 2 refuses arrays of shape (1,)
    up.linear_eval.DataLoader = lambda *a, **k: torch.utils.data.DataLoader(*a, batch_size=k["batch_size"])
    return up


@contextlib.contextmanager
def on_cpu():
    """Let `.cuda()` and their unconditional CUDA autocast do nothing while their functions run."""
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.nn.Module, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.cuda.amp, "autocast", contextlib.nullcontext),
    ):
        yield


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    with on_cpu():
        yield load(path)


def optimizer_groups(up, network, args):
    """Their optimizer, built by the block of their main()."""
    scope = run_block(up.main, "args.train_data", args=args, model=network, is_master=lambda *_: False)
    return scope["optimizer"]


def their_schedule(up, args, loaders, optimizer):
    """Their schedule of learning rates, built by the block of their main()."""
    test, master = "'train' in data and optimizer is not None", lambda *_: False
    return run_block(up.main, test, args=args, data=loaders, optimizer=optimizer, is_master=master)["scheduler"]


class Loader(list):
    """Batches in memory with the interface of their loader."""

    def __init__(self, batches, samples):
        super().__init__(batches)
        self.num_batches, self.num_samples = len(batches), samples


def loaders_of(batches, samples) -> dict:
    return {"train": SimpleNamespace(dataloader=Loader(batches, samples), sampler=None)}


def their_prototypes(up, image, text, teacher_file, rows, **changed):
    """Their prototype stage on cached features: generate_labels, then the four PBT calls in a block of their main()."""
    args = flags(**changed | dict(episode_size=len(image), projection_dim=image.shape[1]))
    args.external_teacher = teacher_file and str(teacher_file)
    clustering = up.clustering.Clustering(args)
    clustering.img_feature, clustering.text_feature = image.clone(), text.clone()
    clustering.generate_labels(args.k, args)
    if args.PBT:
        run_block(up.main, "args.PBT", args=args, clustering=clustering, index_mapping=rows, start=0, profiling={})
    return clustering


class Steps(list):
    """Values of each step of their train_one_epoch. It stands in for their gradient scaler, which sees every loss."""

    def __init__(self):
        super().__init__()
        self.parts: list = []  # of the step: InfoNCE, then (prototypical loss, accuracy) by direction

    def scale(self, loss):
        (clip_loss, *pairs), self.parts = self.parts, []
        by = torch.autograd.grad(loss, [clip_loss, *(pair[0] for pair in pairs)], retain_graph=True)
        weights = [by[0].item(), *(2 * x.item() for x in by[1::2])]  # terms are means of two directions
        pairs += [(torch.zeros(()), 0.0)] * (4 - len(pairs))  # without a teacher
        self.append({"total_loss": loss.item(), "loss_clip": clip_loss.item(), "weights": weights})
        self[-1] |= {"loss_proto": [x.item() for x, _ in pairs], "acc_proto": [accuracy for _, accuracy in pairs]}
        return loss

    def step(self, optimizer):
        self[-1]["gradients"] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        self[-1]["lr_visual"], self[-1]["lr_rest"] = (optimizer.param_groups[i]["lr"] for i in (0, -1))
        optimizer.step()

    def unscale_(self, _):
        pass

    def update(self):
        pass

    def column(self, name: str) -> list:
        return [step[name] for step in self]


def their_steps(up, network, batches, clustering, args, optimizer, epoch=0, scheduler=lambda _: None):
    """Run their train_one_epoch -> (its steps, {name: what it logs of the first}). It logs every tenth."""
    steps, logged = Steps(), {}

    def recorded(loss: type) -> type:
        class Recorded(loss):
            def forward(self, *inputs, **named):
                steps.parts.append(found := super().forward(*inputs, **named))
                return found

        return Recorded

    def clip_gradients(parameters, max_norm, clip_=torch.nn.utils.clip_grad_norm_):
        steps[-1]["grad_norm"] = norm = clip_(parameters, max_norm)
        return norm

    writer = SimpleNamespace(add_scalar=lambda name, value, step: logged.setdefault(name.split("/")[1], value))
    with (
        mock.patch.object(up.train, "ClipLoss", recorded(up.loss.ClipLoss)),
        mock.patch.object(up.train, "ProtoLoss", recorded(up.loss.ProtoLoss)),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_gradients),
    ):
        loaders = loaders_of(batches, args.episode_size)
        up.train.train_one_epoch(network, loaders, epoch, optimizer, steps, scheduler, clustering, args, writer)
    return steps, logged


# ------------------------------------------------------------------------------------------------------ small models


def tiny(vision=VIT, embed_dim=24, text=TEXT) -> model.ProtoCLIP:
    """Our CLIP with heads, none of its weights at a special value."""
    network = model.ProtoCLIP(embed_dim, dict(vision), dict(text), hidden_dim=40, projection_dim=16)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim:
                parameter += 0.02 * torch.randn_like(parameter)
    return network


def twins(up, vision=VIT, embed_dim=24, text=TEXT):
    """Their CLIP and ours with the same weights."""
    ours = tiny(vision, embed_dim, text)
    theirs = up.model.CLIP(embed_dim, dict(vision), dict(text), args=flags())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def pairs(n, vision=VIT, text=TEXT):
    """Images and token ids; the end token, the largest id, is at a random position."""
    length, end = text["context_length"], text["vocab_size"] - 1
    tokens = torch.randint(1, end, (n, length)) * (torch.arange(length) < torch.randint(2, length - 1, (n, 1)))
    tokens = tokens.scatter(1, (tokens > 0).sum(1)[:, None], end)
    return torch.randn(n, 3, vision["image_size"], vision["image_size"]), tokens


def linears(state: dict[str, Tensor], prefix: str = "") -> list[Tensor]:
    """Weights of a projection head's Linear layers, in order."""
    numbers = {int(m[1]) for key in state if (m := re.fullmatch(prefix + r"(\d+)\.weight", key))}
    weights = [state[f"{prefix}{number}.weight"] for number in sorted(numbers)]
    return [weight for weight in weights if weight.ndim == 2]


def network_of(case: Case, up=None):
    """The model with weights `param/*`: ours, or with `up` theirs.

    Sizes are read from their names and shapes; numbers of attention heads are the README's: 4 (text), 16 channels per
    head (ViT), 64 channels per head (attention pool).
    """
    state = case.group("param/")

    def blocks(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern + r"\.(\d+)\.", key))})

    def transformer(prefix: str) -> dict:
        hidden, width = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
        ratio = {} if hidden == 4 * width else {"mlp_ratio": hidden / width}
        return {"width": width, "layers": blocks(rf"{prefix}transformer\.resblocks"), **ratio}

    height, side = case["images"].shape[-2:]
    if "visual.class_embedding" in state:
        vision = transformer("visual.") | {"patch_size": state["visual.conv1.weight"].shape[-1], "head_width": 16}
        vision["image_size"] = side if side == height else (height, side)
    else:
        depths = tuple(blocks(rf"visual\.layer{i}") for i in (1, 2, 3, 4))
        vision = {"layers": depths, "width": len(state["visual.conv3.weight"]), "head_width": 64, "image_size": side}
    text = transformer("") | {
        "heads": 4,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
    }
    head, embed_dim = linears(state, "text_projection_head."), state["text_projection"].shape[1]
    sizes = len(head[0]), len(head[-1]), len(head) - 1
    if up is None:
        network = model.ProtoCLIP(embed_dim, vision, text, True, True, *sizes)
    else:
        network = up.model.CLIP(embed_dim, vision, text, args=heads(*sizes))
    network.load_state_dict(state)
    return network


# ------------------------------------------------------------------------------------------------- model and losses


class ClipLoss(Part):
    files = {"clip_loss": {}}
    functions = "protoclip.model.clip_loss"
    authors = "src/training/loss.py:84"
    rtol = atol = 1e-5

    def inputs(self):
        return {"image_features": unit(8, 24), "text_features": unit(8, 24), "log_logit_scale": 2.65926}

    def run(self, function, case):
        x = case.leaves("image_features", "text_features", "log_logit_scale")
        loss = function(x["image_features"], x["text_features"], x["log_logit_scale"].exp())
        return {"loss": loss, **gradients(loss, x)}

    our = staticmethod(model.clip_loss)

    def their(self, up):
        return up.loss.ClipLoss(cache_labels=True)


class ProtoLoss(Part):
    files = {
        "proto_loss_hard": dict(temperature=-1.0, width=6),
        "proto_loss_soft": dict(temperature=0.01),
        "proto_loss_soft_warm_temperature": dict(temperature=0.1),
    }
    more = {"proto_loss_zero": dict(temperature=0.0)}
    families = ("proto_loss",)
    functions = "protoclip.model.prototypical_loss"
    authors = "src/training/loss.py:114"
    rtol = atol = 1e-5

    def inputs(self, temperature, width=16):
        centroids = unit(12, 16)
        centroids[9:] = 0  # empty clusters
        return {
            "student_features": unit(8, 16), "student_centroids": centroids, "log_logit_scale": 2.65926,
            "teacher_centroids": 0.8 * unit(12, width), "labels": torch.randint(0, 9, (8,)),
            "teacher_temperature": temperature,
        }  # fmt: skip

    def run(self, function, case):
        x = case.leaves("student_features", "log_logit_scale")
        centroids = case["student_centroids"], case["teacher_centroids"]
        scaled = x["log_logit_scale"].exp(), case["teacher_temperature"], case["labels"]
        loss, accuracy = function(x["student_features"], *centroids, *scaled)
        return {"loss": loss, "accuracy": accuracy, **gradients(loss, x)}

    def our(self, features, students, teachers, scale, temperature, labels):
        return model.prototypical_loss(features, students, scale, labels, teachers, temperature)

    def their(self, up):
        return up.loss.ProtoLoss()


class ProjectionHead(Part):
    files = {f"projection_head_{n}layer": {"n_layers": n} for n in (0, 1, 2)}
    families = ("projection_head",)
    functions = "protoclip.model.projection_head"
    authors = "src/open_clip/model.py:421"
    rtol = atol = 1e-5

    def inputs(self, n_layers):
        state = model.projection_head(24, 40, 16, n_layers).state_dict()
        state = {name: x + 0.1 * torch.rand(x.shape) if x.ndim else x for name, x in state.items()}
        x = {"x": torch.randn(9, 24), "cotangent": torch.randn(9, 16), "n_layers": n_layers}
        return x | prefixed("param/", state)

    def run(self, made, case):
        """made(embed_dim, hidden_dim, projection_dim, layers) -> a model with both heads."""
        state, x = case.group("param/"), leaf(case["x"])
        weights = linears(state)
        network = made(weights[0].shape[1], len(weights[0]), len(weights[-1]), case["n_layers"])
        head, other = network.image_projection_head, network.text_projection_head.state_dict()
        equal = all(torch.equal(value, other[name]) for name, value in head.state_dict().items())
        head.load_state_dict(state)
        found = {"heads_equal_at_init": int(equal), "out_eval": head.eval()(x), "out_train": head.train()(x)}
        found |= {f"{name}_normalized": F.normalize(out, dim=-1) for name, out in found.items() if "out" in name}
        (found["out_train_normalized"] * case["cotangent"]).sum().backward()
        buffers = {name: value for name, value in head.state_dict().items() if "running" in name}
        return found | {"grad_x": x.grad} | prefixed("buffer_after_train_forward/", buffers)

    def our(self, width, *sizes):
        return model.ProtoCLIP(width, dict(VIT), dict(TEXT), True, True, *sizes)

    def their(self, up):
        return lambda width, *sizes: up.model.CLIP(width, dict(VIT), dict(TEXT), args=heads(*sizes))


OUTPUTS = [f"{way}_features{end}" for end in ("", "_projected") for way in ("image", "text")]
OUTPUTS += ["logit_scale", "logit_scale_proto"]


class Forward(Part):
    files = {"clip_vit_forward": dict(vision=VIT), "clip_resnet_forward": dict(vision=RESNET)}
    functions = "protoclip.model.ProtoCLIP"
    authors = "src/open_clip/model.py:478"
    rtol, atol = 1e-4, 1e-5

    def inputs(self, vision):
        images, texts = pairs(5, vision)
        return {"images": images, "texts": texts, **prefixed("param/", tiny(vision).state_dict())}

    def run(self, made, case):
        network, inputs = made(case).eval(), (case["images"], case["texts"])
        found = prefixed("eval/", dict(zip(OUTPUTS, network(*inputs), strict=True)))
        found |= {"eval/encode_image": network.encode_image(inputs[0])}
        found |= {"eval/encode_text": network.encode_text(inputs[1])}
        output = network.train()(*inputs)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in output).backward()
        found |= prefixed("train/", dict(zip(OUTPUTS, output, strict=True)))
        buffers = {name: value for name, value in network.state_dict().items() if "running" in name}
        found |= prefixed("buffer_after_train_forward/", buffers)
        return found | {f"grad/{name}": parameter.grad for name, parameter in network.named_parameters()}

    our = staticmethod(network_of)

    def their(self, up):
        return functools.partial(network_of, up=up)


class Layout(Part):
    """Names and shapes of the state dict; the model is in the file's name."""

    files = {"state_dict_layout_RN50": {}}
    families = ("state_dict_layout",)
    authors = "src/open_clip/model.py:326"
    json = True

    def inputs(self):
        return {}

    def run(self, made, case):
        with torch.device("meta"):  # no memory, no initialisation: only names and shapes matter
            network = made(case.path.stem.removeprefix("state_dict_layout_"))
        return {name: list(value.shape) for name, value in network.state_dict().items()}

    our = staticmethod(model.create_model)

    def their(self, up):
        return functools.partial(published, up)


PROTOTYPES = {  # ours: theirs
    "image_labels": "img_labels",
    "text_labels": "text_labels",
    "image": "img_centroids",
    "text": "text_centroids",
    "image_from_text": "img_centroids_translated_from_text_prototypes",
    "text_from_image": "text_centroids_translated_from_image_prototypes",
    "external_labels": "external_labels",
    "image_from_external": "img_centroids_translated_from_external_prototypes",
    "text_from_external": "text_centroids_translated_from_external_prototypes",
}


def prototypes_of(case: Case, back_translate: int, external: int) -> model.Prototypes:
    """Prototypes of an episode, from their cached arrays."""
    left_out = () if back_translate else ("image_from_text", "text_from_image")
    left_out += () if external else ("external_labels", "image_from_external", "text_from_external")
    return model.Prototypes(**{own: None if own in left_out else case[name] for own, name in PROTOTYPES.items()})


def optional(number: int) -> int | None:
    """Convert their negative sentinels to None."""
    return None if number < 0 else number


def our_weights(case: Case, episode: int) -> tuple[float, float]:
    """The weights of our prototypical losses in an episode. InfoNCE has none: theirs is 1 in all published commands."""
    cfg = train.Config(infonce_warmup=case["infonce_warmup_epoch"], lit_start=optional(case["lit_start_epoch"]))
    _, cfg.w_proto, cfg.w_external = case["weights"].tolist()
    return train.loss_weights(cfg, episode)


class Stub(torch.nn.Module):
    """A model whose outputs are its parameters; the scales are logarithms."""

    def __init__(self, outputs: list[Tensor]):
        super().__init__()
        self.outputs = torch.nn.ParameterList(outputs)
        self.logit_scale, self.logit_scale_proto = self.outputs[4:]

    def forward(self, *_):
        return *(x * 1 for x in self.outputs[:4]), self.outputs[4].exp(), self.outputs[5].exp()


def stub_step(up, outputs, index, clustering, args, epoch=0):
    """A step of theirs with given outputs -> its values; gradients in the order of the outputs."""
    args.batch_size = args.episode_size = len(index)
    args.max_grad_norm = 1e9
    network = Stub(outputs)
    optimizer = torch.optim.SGD([{"params": [x]} for x in network.outputs], lr=0.0)
    batches = [(index, torch.zeros(len(index)), torch.zeros(len(index)))]
    steps, _ = their_steps(up, network, batches, clustering, args, optimizer, epoch)
    return steps[0]


class TotalLoss(Part):
    files = {
        "train_step_loss": {},
        "train_step_loss_infonce_warmup": dict(epoch=0, infonce_warmup_epoch=1),
        "train_step_loss_no_pbt": dict(use_pbt=0, use_external=0),
    }
    families = ("train_step_loss",)
    functions = "protoclip.model.protoclip_loss"
    authors = "src/training/train.py:123-186"
    rtol = atol = 1e-5
    # external_centroids: in the teacher's space, so that no loss uses them. The others: they are also in the file
    # without back translation and without a teacher; in the other files the compared losses depend on them
    unused = ("external_centroids", "external_labels", "*_translated_from_*")
    directions = {  # theirs: ours
        **{"img2text": "image_to_text", "text2img": "text_to_image"},
        **{"img2external": "image_to_external", "text2external": "text_to_external"},
    }

    def inputs(self, **changed):
        outputs = dict(zip(OUTPUTS, [*(unit(8, n) for n in (24, 24, 16, 16)), 2.65926, 2.9957323], strict=True))
        return {
            **{f"in/{name.replace('features_projected', 'projected')}": x for name, x in outputs.items()},
            "index": torch.randperm(20)[:8], "external_centroids": torch.randn(10, 6),
            **{x: torch.randint(0, 10, (20,)) if "label" in x else 0.8 * unit(10, 16) for x in PROTOTYPES.values()},
            **dict(use_pbt=1, use_external=1, target_temperature=0.01, weights=torch.ones(3), epoch=3),
            **dict(infonce_warmup_epoch=0, lit_start_epoch=-1), **changed,
        }  # fmt: skip

    def ours(self, case):
        p = prototypes_of(case, case["use_pbt"], case["use_external"])
        index, temperature = case["index"], case["target_temperature"]
        x = {name: leaf(value) for name, value in case.group("in/").items()}
        output = model.ProtoCLIPOutput(**{name: v.exp() if "scale" in name else v for name, v in x.items()})
        losses = model.protoclip_loss(output, index, p, our_weights(case, case["epoch"]), temperature)
        parts = model.protoclip_loss(output, index, p, (1, 1), temperature)  # theirs are there also with weight 0
        for_image, for_text = (p.image_from_text, p.text_from_image) if case["use_pbt"] else (p.text, p.image)
        sides = (output.image_projected, for_image), (output.text_projected, for_text)
        targets = (p.text_labels[index], p.text, temperature), (p.image_labels[index], p.image, temperature)
        scale = output.logit_scale_proto
        loss = [model.prototypical_loss(h, s, scale, *t)[0] for (h, s), t in zip(sides, targets, strict=True)]
        loss += [parts["external"]] * 2  # 0 without a teacher
        if case["use_external"]:
            sides = (output.image_projected, p.image_from_external), (output.text_projected, p.text_from_external)
            loss[2:] = [model.prototypical_loss(h, s, scale, p.external_labels[index])[0] for h, s in sides]
        found = {"total_loss": losses["loss"], "loss_clip": losses["clip"]}
        found |= {"loss_proto": parts["proto"], "loss_proto_external": parts["external"]}
        for (way, name), value in zip(self.directions.items(), loss, strict=True):
            found |= {f"loss_{way}": value, f"acc_{way}": parts.get(f"accuracy_{name}", 0.0)}
        return found | gradients(losses["loss"], x, "grad/")

    def theirs(self, up, case):
        args = flags(PBT=case["use_pbt"], target_temperature=case["target_temperature"], epochs=5)
        args.external_teacher = "teacher.npy" if case["use_external"] else None
        args.w_clip, args.w_proto, args.w_proto_external = case["weights"].tolist()
        args.infonce_warmup_epoch, args.lit_start_epoch = case["infonce_warmup_epoch"], case["lit_start_epoch"]
        outputs = case.group("in/")
        leaves = [leaf(x) for x in outputs.values()]
        step = stub_step(up, leaves, case["index"], SimpleNamespace(**case), args, case["epoch"])
        loss = step["loss_proto"]
        found = {"total_loss": step["total_loss"], "loss_clip": step["loss_clip"]}
        found |= {"loss_proto": (loss[0] + loss[1]) / 2, "loss_proto_external": (loss[2] + loss[3]) / 2}
        for i, way in enumerate(self.directions):
            found |= {f"loss_{way}": loss[i], f"acc_{way}": step["acc_proto"][i]}
        return found | {f"grad/{name}": x for name, x in zip(outputs, step["gradients"], strict=True)}


def rows_of_rank(rank: int, case: dict) -> dict[str, Tensor]:
    """One process's outputs of the model; the scales are logarithms."""
    features = "image_features", "text_features", "image_projected", "text_projected"
    x = {name: leaf(case[name][rank]) for name in features}
    return x | {name: leaf(case[name]) for name in ("log_logit_scale", "log_logit_scale_proto")}


def our_rank(rank: int, case: dict, with_grad: bool, own_rows: bool) -> dict:
    """The loss of all processes' rows; with `own_rows` of a process's own, as train.py has it."""
    x = rows_of_rank(rank, case)
    *features, scale, scale_proto = x.values()
    names = "img_labels text_labels img_centroids text_centroids img_student text_student ext_labels img_student_ext"
    prototypes = model.Prototypes(*(case[name] for name in [*names.split(), "text_student_ext"]))
    index, weights, temperature = case["index"][rank], (1, 1), case["temp"].item()
    if own_rows:
        output = model.ProtoCLIPOutput(*features, scale.exp(), scale_proto.exp())
        output = output if with_grad else model.divide_gradient(output, dist.get_world_size())
        losses = model.protoclip_loss(output, index, prototypes, weights, temperature, run.gather)
        return gradients(losses["loss"], x, "local_grad/")
    features = [run.gather(rows, with_grad) for rows in features]
    output, index = model.ProtoCLIPOutput(*features, scale.exp(), scale_proto.exp()), run.gather(index)
    losses = model.protoclip_loss(output, index, prototypes, weights, temperature)
    found = {"gathered_index": index, "total_loss": losses["loss"].detach(), "loss_clip": losses["clip"].detach()}
    pair = torch.stack([losses["proto"], losses["external"]]).detach()
    return found | {"pairs": pair} | gradients(losses["loss"], x, "local_grad/")


def their_rank(rank: int, path: str, case: dict, with_grad: bool) -> dict:
    with authors(Path(path)) as up:
        x = rows_of_rank(rank, case)
        args = flags(distributed=True, rank=rank, local_rank=rank, world_size=dist.get_world_size())
        args.gather_with_grad, args.target_temperature = with_grad, case["temp"].item()
        names = {"img_student": PROTOTYPES["image_from_text"], "text_student": PROTOTYPES["text_from_image"]}
        names |= {f"{a}_student_ext": PROTOTYPES[f"{b}_from_external"] for a, b in (("img", "image"), ("text", "text"))}
        names |= {"ext_centroids": "external_centroids", "ext_labels": "external_labels"}
        clustering = SimpleNamespace(**{names.get(name, name): value for name, value in case.items()})
        step = stub_step(up, list(x.values()), case["index"][rank], clustering, args)
        found = {name: step[name] for name in ("total_loss", "loss_clip", "loss_proto")}
        found["gathered_index"] = up.distributed.get_gathered_item(case["index"][rank], args)
    return found | {f"local_grad/{name}": g for name, g in zip(x, step["gradients"], strict=True)}


def in_ranks(function, case: Case, *arguments) -> tuple[list[dict], dict]:
    """(results of both processes, gradients stacked by process)."""
    from scripts import in_ranks as started

    with tempfile.TemporaryDirectory() as folder:
        ranks = started(function, case["world_size"], Path(folder), *arguments)
    names = [name for name in ranks[0] if name.startswith("local_grad/")]
    return ranks, {name: torch.stack([rank[name] for rank in ranks]) for name in names}


class DistributedLoss(Part):
    files = {"distributed_loss": dict(with_grad=0), "distributed_loss_gather_with_grad": dict(with_grad=1)}
    families = ("distributed_loss",)
    functions = "shared.run.gather protoclip.model.protoclip_loss"
    authors = "src/training/loss.py:15"
    rtol = atol = 1e-5

    def inputs(self, with_grad):
        x = {f"{way}_features": unit(2, 4, 16) for way in ("image", "text")}
        x |= {f"{way}_projected": unit(2, 4, 12) for way in ("image", "text")}
        for way in ("img", "text"):
            x |= {f"{way}_{what}": 0.8 * unit(9, 12) for what in ("student", "student_ext", "centroids")}
        x |= {f"{way}_labels": torch.randint(0, 9, (30,)) for way in ("img", "text", "ext")}
        x |= dict(log_logit_scale=2.65926, log_logit_scale_proto=2.9, temp=0.05)
        x |= {"index": torch.randperm(30)[:8].view(2, 4), "ext_centroids": torch.randn(9, 5)}
        return {**prefixed("in/", x), "gather_with_grad": with_grad, "world_size": 2}

    def ours(self, case):
        arguments = case.group("in/"), bool(case["gather_with_grad"])
        ranks, found = in_ranks(our_rank, case, *arguments, False)
        for name in ("gathered_index", "total_loss", "loss_clip", "pairs"):  # every rank computes the whole loss
            assert torch.equal(ranks[0][name], ranks[1][name])
            found[name] = ranks[0][name]
        # ours are means of two directions: theirs, moved by the difference of the means
        theirs = torch.as_tensor(case["loss_proto"]).view(2, 2)
        return found | {"loss_proto": (theirs + (found.pop("pairs") - theirs.mean(1))[:, None]).flatten()}

    def theirs(self, up, case):
        arguments = str(up.root.parent), case.group("in/"), bool(case["gather_with_grad"])
        ranks, found = in_ranks(their_rank, case, *arguments)
        return found | {name: value for name, value in ranks[0].items() if name not in found}


class OwnRowsLoss(DistributedLoss):
    """Features' gradients are theirs; without gradient to other ranks' features, each passes on 1/W of its own.
    Averaged over ranks, as DDP does, the temperatures' gradients are theirs, too."""

    files = DistributedLoss.files
    families = DistributedLoss.families
    functions = "protoclip.model.protoclip_loss"
    unused = ("total_loss", "loss_*", "gathered_index")  # of all rows: see above

    def ours(self, case):
        _, found = in_ranks(our_rank, case, case.group("in/"), bool(case["gather_with_grad"]), True)
        return {name: x.mean(0).expand(len(x)) if "log_" in name else x for name, x in found.items()}


# ------------------------------------------------------------------------------------------------------- prototypes


class KMeans(Part):
    files = {
        "kmeans_blobs": dict(n=160, dim=16, k=8, blobs=True),
        "kmeans_external_dim": dict(n=120, dim=6, k=8, nredo=1),
        "kmeans_random_unit": dict(n=200, dim=16, k=20),
    }
    families = ("kmeans",)
    functions = "protoclip.model.kmeans"
    authors = "src/training/clustering.py:123"
    tolerances = {"labels": (0, 0), "sq_distances": (1e-4, 1e-4), "*": (0, 1e-5)}
    unused = ("last_objective", "objective_log")  # of all runs; ours returns the best

    def inputs(self, n, dim, k, nredo=3, blobs=False):
        x = unit(k, dim)[torch.arange(n) % k] + 0.1 * torch.randn(n, dim) if blobs else unit(n, dim)
        return {"features": x, "k": k, "niter": 20, "nredo": nredo}

    def ours(self, case):
        x = case["features"]
        labels, centroids = model.kmeans(x, case["k"], case["niter"], case["nredo"])
        error = model.kmeans_error(x, labels, centroids) * len(x)
        assert abs(error / case["sq_distances"].sum() - 1) < 1e-4
        return {"labels": labels, "centroids": centroids, "sq_distances": (x - centroids[labels]).square().sum(1)}

    def theirs(self, up, case):
        args = flags(kmeans_max_iter=case["niter"], kmeans_nredo=case["nredo"])
        labels, centroids, log, distances = up.clustering.Clustering(args).kmeans(case["features"], case["k"], args)
        objectives = [float(entry["obj"]) for entry in log]
        found = {"labels": labels, "centroids": centroids, "sq_distances": distances}
        return found | {"objective_log": objectives, "last_objective": objectives[-1]}


class GenerateLabels(Part):
    files = {"generate_labels_nan": dict(n=60, dim=8, k=5)}
    more = {"generate_labels_nan_large": dict(n=900, dim=16, k=90)}
    functions = "protoclip.model.build_prototypes"
    authors = "src/training/clustering.py:105"
    tolerances = {"*_labels": (0, 0), "*": (0, 1e-5)}
    unused = ("img_feature", "text_feature")  # without NaN: compared by way of what back translation averages

    def inputs(self, n, dim, k):
        image, text = unit(n, dim), unit(n, dim)
        image[3, 2] = text[5] = torch.nan
        return {"img_feature_in": image, "text_feature_in": text, "k": k, "niter": 20, "nredo": 3}

    def ours(self, case):
        inputs, k = (case["img_feature_in"], case["text_feature_in"]), case["k"]
        p = model.build_prototypes(*inputs, k, niter=case["niter"], nredo=case["nredo"])
        cleaned = (
            (case["img_feature"], p.text_labels, p.image_from_text),
            (case["text_feature"], p.image_labels, p.text_from_image),
        )
        for x, labels, ours in cleaned:
            expected = model.prototypical_back_translation(x, labels, k)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        return {PROTOTYPES[own]: value for own, value in p._asdict().items() if value is not None}

    def theirs(self, up, case):
        options = dict(k=case["k"], kmeans_max_iter=case["niter"], kmeans_nredo=case["nredo"], external_teacher=None)
        found = their_prototypes(up, case["img_feature_in"], case["text_feature_in"], None, None, **options)
        names = [name for own, name in PROTOTYPES.items() if "external" not in own]
        return {name: getattr(found, name) for name in [*names, "img_feature", "text_feature"]}


class BackTranslation(Part):
    files = {"pbt": dict(n=60, dim=16, k=10), "pbt_extra_labels": dict(n=30, dim=8, k=6, more=7)}
    families = ("pbt",)
    more = {"pbt_large": dict(n=5000, dim=64, k=500)}
    functions = "protoclip.model.prototypical_back_translation"
    authors = "src/training/clustering.py:153"
    atol = 1e-6

    def inputs(self, n, dim, k, more=0):
        return {"student_features": unit(n, dim), "teacher_labels": torch.randint(0, k - 1, (n + more,)), "k": k}

    def ours(self, case):
        x = case["student_features"], case["teacher_labels"], case["k"]
        return {"centroids": model.prototypical_back_translation(*x)}

    def theirs(self, up, case):
        x = case["k"], case["teacher_labels"], case["student_features"]
        return {"centroids": up.clustering.Clustering(flags()).PBT(*x)}


class PCA(Part):
    files = {"pca": {}}
    functions = "protoclip.teacher.pca"
    authors = "src/utils/RoBERTa.py:30"
    atol = 1e-4

    def inputs(self):
        return {"features": torch.randn(200, 20) * torch.linspace(1, 2, 20), "dim": 5}

    def ours(self, case):
        out = teacher.pca(case["features"], case["dim"])
        return {"out": out * (out * case["out"]).sum(0).sign()}  # a component's sign is arbitrary

    def theirs(self, up, case):
        return {"out": up.RoBERTa.PCA(case["dim"], case["features"].numpy())}


# --------------------------------------------------------------------------------------------------------- training


class Episode(Part):
    """Extraction, clustering and one training pass, each of ours starting from their values."""

    files = {"episode": dict(vision=VIT)}
    more = {
        "episode_no_pbt": dict(vision=VIT, use_pbt=0, use_external=0),
        "episode_resnet": dict(vision=RESNET, lr=1e-4),
        "episode_resnet_no_pbt": dict(vision=RESNET, use_pbt=0, use_external=0),
    }
    functions = "protoclip.train.extract_features protoclip.train.train_step"
    authors = "src/training/train.py:49"
    tolerances = {
        "*labels": (0, 0), "*centroids*": (0, 1e-5), "*_feature": (0, 1e-5), "lr_*": (1e-6, 1e-10),
        "grad_step0_clipped/*": (1e-3, 1e-5), "grad_norm": (1e-3, 0), "param_after/*": (0, 5e-5),
        "acc_proto": (0, 1e-4), "*": (1e-4, 1e-7),
    }  # fmt: skip

    def tolerance(self, name, case):
        resnet = name.startswith("param_after/") and "param/visual.class_embedding" not in case
        return (0, 1e-3) if resnet else super().tolerance(name, case)

    def inputs(self, vision, **changed):
        images, texts = pairs(37, vision)
        return {
            "images": images, "texts": texts, "external": torch.randn(37, 6), "extraction_order": torch.randperm(37),
            "training_order": torch.randperm(37), "weights": torch.ones(3), "betas": torch.tensor([0.9, 0.98]),
            **dict(batch_size=8, k=6, niter=20, nredo=3, use_pbt=1, use_external=1, epoch=1, epochs=3, eps=1e-4),
            **dict(lit_start_epoch=-1, infonce_warmup_epoch=1, lr=1e-3, warmup_steps=2, weight_decay=0.5),
            **dict(max_grad_norm=10.0, target_temperature=0.01), **changed,
            **prefixed("param/", tiny(vision).state_dict()),
        }  # fmt: skip

    def batches(self, case, order):
        return [(index, case["images"][index], case["texts"][index]) for index in case[order].split(case["batch_size"])]

    def theirs(self, up, case):
        network, n = network_of(case, up), len(case["images"])
        changed = {name: case[name] for name in TRAIN if name in case}
        changed |= dict(PBT=case["use_pbt"], kmeans_max_iter=case["niter"], kmeans_nredo=case["nredo"], episode_size=n)
        changed |= dict(warmup=case["warmup_steps"], wd=case["weight_decay"])
        changed |= dict(zip(("w_clip", "w_proto", "w_proto_external"), case["weights"].tolist(), strict=True))
        changed |= dict(zip(("beta1", "beta2"), case["betas"].tolist(), strict=True))
        args = flags(**changed)
        clustering, nothing = up.clustering.Clustering(args), [None] * 3
        loaders = loaders_of(self.batches(case, "extraction_order"), n)
        up.train.feature_extraction_one_epoch(network, loaders, case["epoch"], *nothing, clustering, args)
        features = clustering.img_feature, clustering.text_feature
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/teacher.npy" if case["use_external"] else None
            np.save(f"{folder}/teacher.npy", case["external"].numpy())
            clustering = their_prototypes(up, *features, file, torch.arange(n), **changed)
        args.external_teacher = args.external_teacher if case["use_external"] else None
        found = {name: getattr(clustering, name).clone() for name in [*PROTOTYPES.values(), "external_centroids"]}
        found |= {"img_feature": features[0], "text_feature": features[1]}
        optimizer = optimizer_groups(up, network, args)
        loaders = loaders_of(self.batches(case, "training_order"), n)
        schedule = their_schedule(up, args, loaders, optimizer)
        batches = loaders["train"].dataloader
        steps, log = their_steps(up, network, batches, clustering, args, optimizer, case["epoch"], schedule)
        for name in ("total_loss", "loss_clip", "loss_proto", "acc_proto", "grad_norm", "lr_visual", "lr_rest"):
            found[name] = torch.tensor(steps.column(name), dtype=torch.float64 if "lr" in name else None)
        names = {id(p): name for name, p in network.named_parameters()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        found |= {f"grad_step0_clipped/{name}": g for name, g in zip(order, steps[0]["gradients"], strict=True)}
        found |= {f"log/{name}": log[f"feature_{name}"] for name in ("modality_gap", "std_image", "std_text")}
        return found | prefixed("param_after/", network.state_dict())

    def ours(self, case):
        network, n, pbt, external = network_of(case), len(case["images"]), case["use_pbt"], case["use_external"]
        cached = case["img_feature"], case["text_feature"]
        cfg = train.Config(
            projection_dim=cached[0].shape[1], target_temperature=case["target_temperature"], episodes=case["epochs"],
            episode_size=n, batch_size=case["batch_size"], infonce_warmup=case["infonce_warmup_epoch"],
            lit_start=optional(case["lit_start_epoch"]), lr=case["lr"], warmup=case["warmup_steps"],
            max_grad_norm=case["max_grad_norm"], precision="fp32",
        )  # fmt: skip
        features = train.extract_features(network, self.batches(case, "extraction_order"), n, cfg)
        settings = case["external"] if external else None, bool(pbt), case["niter"], case["nredo"]
        p = model.build_prototypes(*cached, case["k"], *settings)
        found = {name: getattr(p, own) for own, name in PROTOTYPES.items()}
        nothing = {name: torch.zeros_like(case[name]) for name, value in found.items() if value is None}  # as theirs
        _, centroids = model.kmeans(case["external"], case["k"], case["niter"], case["nredo"])
        centroids = centroids if external else torch.zeros_like(case["external_centroids"])
        found |= {**nothing, "external_centroids": centroids, "img_feature": features[0], "text_feature": features[1]}

        groups = train.parameter_groups(network, case["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=case["betas"].tolist(), eps=case["eps"], fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        weights, steps = our_weights(case, case["epoch"]), []
        for i, batch in enumerate(self.batches(case, "training_order")[: n // cfg.batch_size]):
            rates = train.set_learning_rates(optimizer, cfg, cfg.steps_per_episode * case["epoch"] + i)
            steps.append(rates | train.train_step(network.train(), batch, p, weights, optimizer, scaler, cfg))
            if i == 0:
                found |= {f"grad_step0_clipped/{name}": x.grad.clone() for name, x in network.named_parameters()}

        def column(name):
            return torch.tensor([torch.as_tensor(step[name]).item() for step in steps], dtype=torch.float64)

        names = {"total_loss": "loss", "loss_clip": "clip", "grad_norm": "gradient_norm"}
        names |= {"lr_visual": "lr_visual", "lr_rest": "lr_rest"}
        found |= {name: column(own) for name, own in names.items()}
        # means of two directions, moved as in DistributedLoss; what ours does not compute is left
        losses, accuracies = case["loss_proto"].double(), case["acc_proto"].double()
        for at, name in ((0, "proto"), (2, "external")):
            if weights[at // 2] and (external or not at):
                losses[:, at : at + 2] += (column(name) - losses[:, at : at + 2].mean(1))[:, None]
        for i, way in enumerate(TotalLoss.directions.values()):
            if f"accuracy_{way}" in steps[0]:
                accuracies[:, i] = column(f"accuracy_{way}")
        found |= {"loss_proto": losses, "acc_proto": accuracies}
        log = {"modality_gap": "modality_gap", "std_image": "image_feature_std", "std_text": "text_feature_std"}
        found |= {f"log/{name}": steps[0][own] for name, own in log.items()}
        return found | prefixed("param_after/", network.state_dict())


class LossWeights(Part):
    files = {"loss_weight_schedule": dict(warmup=2, lit=9)}
    more = {f"loss_weight_schedule_{w}_{lit}": dict(warmup=w, lit=lit) for w, lit in ((0, -1), (1, 5), (0, 2))}
    functions = "protoclip.train.loss_weights"
    authors = "src/training/train.py:67-85"

    def inputs(self, warmup, lit):
        values = {"infonce_warmup_epoch": warmup, "lit_start_epoch": lit, "epochs": torch.arange(10)}
        return {"weights": torch.tensor([0.5, 2.0, 0.25]), **values}

    def ours(self, case):
        of_clip = case["effective_weights"][:, 0].tolist()  # theirs: ours has no such weight
        found = [our_weights(case, episode) for episode in case["epochs"].tolist()]
        return {"effective_weights": [(w, *pair) for w, pair in zip(of_clip, found, strict=True)]}

    def theirs(self, up, case):
        found, values = [], dict(zip(("w_clip", "w_proto", "w_proto_external"), case["weights"].tolist(), strict=True))
        values |= {name: case[name] for name in ("infonce_warmup_epoch", "lit_start_epoch")}
        for epoch in case["epochs"].tolist():
            args, outputs = flags(**values), [*(leaf(unit(2, 16)) for _ in range(4)), leaf(0.0), leaf(0.0)]
            step = stub_step(up, outputs, torch.arange(2), up.clustering.Clustering(args), args, epoch)
            found.append(step["weights"])
        return {"effective_weights": found}


class LearningRates(Part):
    files = {"lr_schedule": {}}
    functions = "protoclip.train.learning_rates"
    authors = "src/training/scheduler.py:35"
    rtol, atol = 1e-6, 1e-10

    def inputs(self):
        found = {}
        rows = ((1e-3, 10, 25, 8, -1), (5e-4, 7, 10, 20, 19), (5e-4, 15625, 391, 400, 399), (5e-5, 2000, 3125, 100, 99))
        rows += ((1e-3, 0, 10, 6, 2),)
        for i, (lr, warmup, batches, epochs, lit) in enumerate(rows):
            steps = torch.arange(batches * epochs)
            steps = steps if len(steps) <= 200 else steps[:: len(steps) // 400]
            values = dict(lr=lr, warmup_steps=warmup, num_batches=batches, epochs=epochs, lit_start_epoch=lit)
            values |= dict(lr_text=-1, text_start_epoch=0, text_end_epoch=-1, steps=steps)
            found |= prefixed(f"case{i}/", values)
        return found

    def run(self, schedule, case):
        """schedule(settings) -> [(rate of the image tower, of the rest)] of its steps."""
        found = {}
        for prefix in sorted({name.partition("/")[0] + "/" for name in case}):
            names = "lr lr_text warmup_steps num_batches epochs lit_start_epoch text_start_epoch text_end_epoch steps"
            rates = schedule(SimpleNamespace(**{name: case[prefix + name] for name in names.split()}))
            visual, rest = torch.tensor(rates, dtype=torch.float64).T
            found |= {f"{prefix}lr_visual": visual, f"{prefix}lr_rest": rest}
        return found

    def our(self, s):
        options = dict(batch_size=1, episode_size=s.num_batches, warmup=s.warmup_steps)
        cfg = train.Config(**options, episodes=s.epochs, lr=s.lr, lit_start=optional(s.lit_start_epoch))
        # Their text tower may start later, end earlier and have a rate of its own: a shifted schedule of this kind
        begin, end = s.text_start_epoch, optional(s.text_end_epoch) or cfg.episodes
        lr, shift = optional(s.lr_text) or cfg.lr, cfg.steps_per_episode * begin
        text = train.Config(**options, episodes=end - begin, lr=lr)
        rest = [train.learning_rates(text, t - shift)["lr_rest"] if t >= shift else 0.0 for t in s.steps.tolist()]
        return list(zip([train.learning_rates(cfg, t)["lr_visual"] for t in s.steps.tolist()], rest, strict=True))

    def their(self, up):
        def schedule(s):
            names = "lr lr_text epochs lit_start_epoch text_start_epoch text_end_epoch"
            args = flags(warmup=s.warmup_steps, **{name: getattr(s, name) for name in names.split()})
            loader = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=s.num_batches))}
            adjust = their_schedule(up, args, loader, SimpleNamespace(param_groups=[{}, {}, {}, {}]))
            return [adjust(step) for step in s.steps.tolist()]

        return schedule


class ParameterGroups(Part):
    files = {"param_groups_RN50": dict(model="RN50")}
    more = {"param_groups_ViT-B-32": dict(model="ViT-B-32")}
    families = ("param_groups",)
    functions = "protoclip.train.parameter_groups"
    authors = "src/training/main.py:188-225"
    json = True

    def inputs(self, model):
        return {"model": model}

    def run(self, network, groups, optimizer):
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        found = [{"name": f"{kind}_decay"} for kind in ("visual_no", "visual", "rest_no", "rest")]
        for each, group in zip(found, groups, strict=True):
            each |= {"weight_decay": group["weight_decay"], "params": [names[id(p)] for p in group["params"]]}
        return {"groups": found, "optimizer": optimizer}

    def ours(self, case):
        with torch.device("meta"):
            network = model.create_model(case["model"])
        cfg = train.Config(model=case["model"])
        groups = train.parameter_groups(network, max(group["weight_decay"] for group in case["groups"]))
        optimizer = {"lr": cfg.lr, "betas": list(cfg.adamw["betas"]), "eps": cfg.adamw["eps"]}
        found = self.run(network, groups, optimizer)
        for ours, theirs in zip(found["groups"], case["groups"], strict=True):  # in their order
            ours["params"].sort(key=lambda name, order=theirs["params"]: order.index(name) if name in order else -1)
        return found

    def theirs(self, up, case):
        args = flags(wd=0.5, **up.params.get_default_params(case["model"]))
        with torch.device("meta"):
            network = published(up, case["model"])
            groups = optimizer_groups(up, network, args).param_groups
        return self.run(network, groups, {"lr": args.lr, "betas": [args.beta1, args.beta2], "eps": args.eps})


# ------------------------------------------------------------------------------------------------------------- data


class EpisodeSampling(Part):
    files = {"episode_sampling": {}}
    functions = "protoclip.train.sample_episode"
    authors = "src/training/main.py:357"

    def inputs(self):
        return {"seed": 0, "dataset_size": 90, "episode_size": 40}

    def ours(self, case):
        rng, sizes = np.random.RandomState(case["seed"]), (case["dataset_size"], case["episode_size"])
        return {"index_mapping": np.stack([train.sample_episode(*sizes, rng) for _ in case["index_mapping"]])}

    def theirs(self, up, case):
        up.main.random_seed(case["seed"])
        args, found = SimpleNamespace(dataset_size=case["dataset_size"], episode_size=case["episode_size"]), []
        for _ in range(4):
            rows = torch.arange(args.episode_size)
            run_line(up.main, "index_mapping[:]", index_mapping=rows, args=args)
            found.append(rows)
        return {"index_mapping": torch.stack(found)}


class Captions(Part):
    """Rows of a table of pictures, of which each has another colour."""

    files = {"csv_dataset": {}}
    functions = "protoclip.views.ascii_caption"
    authors = "src/training/data.py:24"
    json = True

    def inputs(self):
        titles = ["caf\u00e9 noir", "plain caption", "\u65e5\u672c", "smile \U0001f600 face", "last one"]
        rows = [{"title": title, "filepath": f"a/{i}.png"} for i, title in enumerate(titles)]
        return {"rows": rows, "dataset_size": 4, "index_mapping": [3, 0, 0, 2, 1, 3]}

    def run(self, opened, case):
        """opened(dataset_size, index_mapping) of the table pairs.tsv -> (captions, paths, [(row, image, tokens)])."""
        with tempfile.TemporaryDirectory() as folder, MonkeyPatch.context() as patch:
            patch.chdir(folder)
            with open("pairs.tsv", "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, ["title", "filepath"], delimiter="\t")
                table.writeheader()
                table.writerows(case["rows"])
            for number, row in enumerate(case["rows"]):
                Path(row["filepath"]).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2), (number // 256, number % 256, 0)).save(row["filepath"], "png")
            captions, paths, items = opened(case["dataset_size"], case["index_mapping"])
        tokens = {tuple(of.tolist()): caption for of, caption in zip(tokens_of(captions), captions, strict=True)}
        rows = [256 * image[0] + image[1] for _, image, _ in items]
        assert [index for index, _, _ in items] == list(range(len(items)))
        assert rows == case["index_mapping"]
        found = {"captions": captions, "filepaths": paths, "length": len(items)}
        return found | {"caption_of_episodic_index": [tokens[tuple(of.tolist())] for _, _, of in items]}

    def our(self, size, rows):
        found = data.open_pairs("pairs.tsv", size)
        samples = corpus.Samples(found, lambda pair: tokens_of([views.ascii_caption(pair.caption)])[0])
        view, _ = samples.number(lambda image: image.getpixel((0, 0)))
        captions = [views.ascii_caption(found.caption(row)) for row in range(len(found))]
        return captions, list(found.keys), [samples[view, (0,), i, row][:3] for i, row in enumerate(rows)]

    def their(self, up):
        def opened(size, rows):
            options = "filepath", "title", "\t", size, torch.tensor(rows)
            dataset = up.data.CsvDataset("pairs.tsv", lambda image: image.getpixel((0, 0)), *options)
            captions, paths = ([x.decode() for x in column] for column in (dataset.captions, dataset.images))
            return captions, paths, [dataset[i] for i in range(len(dataset))]

        return opened


def tokens_of(captions: list[str], context_length: int = 77) -> Tensor:
    return open_clip.get_tokenizer("RN50", context_length=context_length)(captions)


class Tokenizer(Part):
    """open_clip's tokenizer: no function of ours."""

    files = {"tokenizer": {}}
    authors = "src/open_clip/tokenizer.py:152"

    def inputs(self):
        captions = ["a photo of a cat", "  Two&amp;three   DOGS, isn't it?", "caf\u00e9 \u732b na\u00efve 1984!", ""]
        return {"json": [*captions, "smile; " * 20, "word " * 100, "dog " * 75, "dog " * 76, "heart \u2764\ufe0f"]}

    def ours(self, case):
        expected, cut = case["tokens"], case["truncated"] == 1
        tokens = tokens_of(case.json, expected.shape[1])
        assert ((tokens.argmax(1) == expected.shape[1] - 1) | ~cut).all()
        # Where a caption is cut, ours differs on purpose in one id: the last is the end token, where the tower pools
        tokens[cut, -1] = expected[cut, -1]
        encode = open_clip.get_tokenizer("RN50").encode
        truncated = [len(encode(caption)) + 2 > expected.shape[1] for caption in case.json]
        return {"tokens": tokens, "pool_position": tokens.argmax(1), "truncated": truncated}

    def theirs(self, up, case):
        tokens = up.tokenizer.tokenize(case.json)
        lengths = [len(up.tokenizer._tokenizer.encode(caption)) + 2 for caption in case.json]
        truncated = [length > tokens.shape[1] for length in lengths]
        return {"tokens": tokens, "pool_position": tokens.argmax(1), "truncated": truncated}


class Views(Part):
    files = {"image_transforms": {}}
    functions = "protoclip.views.training_view protoclip.views.whole_image"
    authors = "src/open_clip/transform.py:13"
    tolerances = {"*/eval": (0, 1e-6)}

    def inputs(self):
        found = {"image_size": 32}
        for i, (height, width) in enumerate(((40, 52), (64, 33), (32, 32))):
            coarse = np.random.randint(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            found |= {f"image{i}/rgb": np.array(image), f"image{i}/torch_seed": 41 + i}
        return found

    def run(self, made, case):
        """made(size, kind) -> a view."""
        found = {}
        for image in sorted(name.removesuffix("/rgb") for name in case if name.endswith("/rgb")):
            picture = Image.fromarray(case[f"{image}/rgb"].numpy().astype(np.uint8))
            for kind in ("eval", "train_default", "train_light"):
                torch.manual_seed(case[f"{image}/torch_seed"])
                random.seed(case[f"{image}/torch_seed"])
                found[f"{image}/{kind}"] = made(case["image_size"], kind.removeprefix("train_"))(picture)
        return found

    def our(self, size, kind):
        mean, std = clip.STATISTICS
        seeing = SimpleNamespace(visual=SimpleNamespace(image_size=size, image_mean=mean, image_std=std))
        cfg = train.Config(augmentation="light" if kind == "light" else "default")
        return views.whole_image(seeing) if kind == "eval" else views.training_view(cfg, seeing)

    def ours(self, case):
        found = super().ours(case)
        if case.fresh or (torchvision.__version__.startswith("0.28.") and PIL.__version__.startswith("13.")):
            return found
        # random views are the same only with the same libraries
        return {name: x if name.endswith("eval") else case[name] for name, x in found.items()}

    def their(self, up):
        light, view = {"light": "protoclip-light-augmentation"}, up.transform.image_transform
        return lambda size, kind: view(size, is_train=kind != "eval", augmentation=light.get(kind))


# ------------------------------------------------------------------------------------------------------- evaluation


class ZeroShot(Part):
    files = {"zero_shot": {}}
    functions = "shared.zeroshot.mean_prompts shared.zeroshot.classification_metrics"
    authors = "src/training/evaluations/zero_shot.py:17"
    rtol = atol = 1e-5

    def inputs(self):
        labels, prompts = torch.randint(0, 12, (50,)), torch.randn(12, 4, 24) + torch.randn(12, 1, 24)
        images = prompts.mean(1)[labels] + 0.8 * torch.randn(50, 24)
        return {"prompt_embeddings": prompts, "image_embeddings": images, "labels": labels}

    def ours(self, case):
        prompts, features = case["prompt_embeddings"], F.normalize(case["image_embeddings"], dim=-1)
        classifier = zeroshot.mean_prompts(prompts.flatten(0, 1), torch.full((len(prompts),), prompts.shape[1]))
        metrics = zeroshot.classification_metrics(features, case["labels"], classifier)
        found = {"classifier": classifier, "image_features": features}
        return found | {"top1": metrics["top1"], "top5": metrics["top5"]}

    def theirs(self, up, case):
        """Their functions with tables in place of the encoders: the tokens of a prompt are its class and template."""
        prompts, images, args = case["prompt_embeddings"], case["image_embeddings"], flags(batch_size=20)
        encoders = SimpleNamespace(encode_text=lambda at: prompts[at[:, 0], at[:, 1]], encode_image=lambda x: x)
        filled = [lambda c, t=t: torch.tensor([c, t]) for t in range(prompts.shape[1])]
        classifier = up.zero_shot.zero_shot_classifier(encoders, range(len(prompts)), filled, lambda x: x, args)
        batches = list(zip(images.split(20), case["labels"].split(20), strict=True))
        top1, top5, features, _ = up.zero_shot.run(encoders, classifier, batches, args)
        return {"classifier": classifier, "image_features": features, "top1": top1, "top5": top5}


def blobs(n, classes, dim):
    labels = torch.arange(n) % classes
    return torch.randn(classes, dim)[labels] + 1.5 * torch.randn(n, dim), labels


class LinearProbe(Part):
    files = {"linear_probe": {}, "linear_probe_class_sorted": dict(in_order=True)}
    families = ("linear_probe",)
    functions = "protoclip.eval.linear_probe"
    authors = "src/training/evaluations/linear_eval.py:12"
    rtol = 1e-4
    arrays = ("train_features", "train_labels", "test_features", "test_labels")

    def tolerance(self, name, case):
        one_sample = 100 / len(case["test_labels"])
        return (0, one_sample + 1e-4) if name == "best_accuracy" else (1e-4, 1e-7)

    def inputs(self, in_order=False):
        x, y = blobs(2300, 7, 12)
        order = y[:2100].argsort(stable=True) if in_order else torch.arange(2100)
        found = dict(zip(self.arrays, (x[order], y[order], x[2100:], y[2100:]), strict=True))
        return found | {"init_weight": 0.01 * torch.randn(7, 12), "init_bias": torch.zeros(7)}

    def ours(self, case):
        init = case["init_weight"], case["init_bias"]
        probe = evaluation.linear_probe(*(case[name] for name in self.arrays), init=init)
        return {"final_weight": probe["weight"], "final_bias": probe["bias"], "best_accuracy": probe["best"]}

    def theirs(self, up, case):
        weights, sgd = [], torch.optim.SGD

        def optimizer(parameters, **options):
            weights.extend(parameters := list(parameters))
            for parameter, name in zip(parameters, ("init_weight", "init_bias"), strict=True):
                parameter.data.copy_(case[name])
            return sgd(parameters, **options)

        with mock.patch.object(torch.optim, "SGD", optimizer):
            best = up.linear_eval.logistic_regression_pytorch(*(case[name].numpy() for name in self.arrays))
        return {"final_weight": weights[0], "final_bias": weights[1], "best_accuracy": float(best)}


class Retrieval(Part):
    files = {"retrieval_metrics": {}}
    functions = "shared.zeroshot.recall_metrics"
    authors = "src/training/evaluations/coco_retrieval.py:136"
    atol = 1e-4

    def inputs(self):
        scores, owner = torch.randn(30, 150), torch.arange(150) // 5
        scores[owner, torch.arange(150)] += 2
        return {"scores_img2text": scores, "text_to_image": owner}

    def ours(self, case):
        ranks = zeroshot.retrieval_ranks_from_scores(case["scores_img2text"], case["text_to_image"])
        metrics = zeroshot.recall_metrics(*ranks)
        order = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        return {"metrics": [metrics[name] for name in [*order, "mean_recall"]]}

    def theirs(self, up, case):
        scores, owner = case["scores_img2text"].numpy(), case["text_to_image"].tolist()
        texts = {i: [text for text, image in enumerate(owner) if image == i] for i in range(len(scores))}
        found = up.coco_retrieval.get_retrieval_metrics(scores, scores.T, texts, dict(enumerate(owner)))
        return {"metrics": list(found.values())}


class FeatureStatistics(Part):
    files = {"feature_analysis": {}}
    functions = "protoclip.eval.feature_statistics"
    authors = "src/training/evaluations/analyze_features.py:5"
    rtol, atol = 1e-5, 1e-6

    def inputs(self):
        return {"image_features": unit(40, 24) + 0.1, "text_features": unit(40, 24)}

    def ours(self, case):
        found = evaluation.feature_statistics(case["image_features"], case["text_features"])
        return {name: value for name, value in found.items() if name in case}

    def theirs(self, up, case):
        return up.analyze_features.analyze_features(case["image_features"], case["text_features"], None)


class ClusterScores(Part):
    files = {"cluster_evaluation": {}}
    functions = "protoclip.eval.clustering_scores"
    authors = "src/training/evaluations/zero_shot.py:79"
    tolerances = {"a?i": (0, 1e-6), "*": (1e-4, 0)}
    indices = {
        "n_cluster": "n_cluster", "silhouette": "Silhouette Coefficient", "davies_bouldin": "Davies-Bouldin Index",
        "calinski_harabasz": "Calinski and Harabasz score",
    }  # fmt: skip

    def inputs(self):
        x, y = blobs(180, 6, 16)
        return {"features": x, "labels": y, "labels2": torch.randint(0, 5, (180,))}

    def ours(self, case):
        image = evaluation.clustering_scores(case["features"], case["labels"])
        text = evaluation.clustering_scores(case["features"].flip(1), case["labels2"])
        found = {"ari": image["ari"], "ami": image["ami"]}
        found |= {f"image_{name}": image[name] for name in self.indices}
        return found | {f"text_{name}": text[name] for name in self.indices}

    def theirs(self, up, case):
        x, labels = case["features"], (case["labels"], case["labels2"])
        ari, ami = up.zero_shot.clustering_evaluation(x, labels[0].numpy())
        features = dict(img_feature=x, text_feature=x.flip(1), img_labels=labels[0], text_labels=labels[1])
        found = up.clustering.Clustering.analyze_labels(SimpleNamespace(**features))
        names = {f"{way}_{name}": f"{way}-{other}" for way in ("image", "text") for name, other in self.indices.items()}
        return {"ari": ari, "ami": ami} | {name: found[other] for name, other in names.items()}
