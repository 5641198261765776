"""NMTune's parts, ours and those of Hhhhhhao/Noisy-Model-Learning@f249dce, on the CPU in fp32."""

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import math
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nmtune import config, datasets, encoders, features, finetune, gram_losses, model, train
from nmtune import eval as evaluation
from shared import zeroshot
from tests.adapters import Part, gradients, leaf, prefixed
from tests.parity import import_beside

CLONE = "Hhhhhhao/Noisy-Model-Learning", "f249dce", "src/models/nml_tune.py"
D, CLASSES = 24, 5
ARGS = dict(  # their flags, those of their README where the scale allows
    seed=3907, model_source="timm", model="toy", train_dataset="Toy", eval_datasets=None, freeze_encoder=True,
    use_weak_strong=False, data_location="", batch_size=8, num_shots=None, noise_ratio=None, lr=1e-3, wd=1e-4,
    warmup_length=0, epochs=3, save=None, cache_dir=None, device="cpu", mlp_after_ratio=4, mlp_after_layers=1,
    mlp_with_res=True, mlp_res_scale_init=1.0, mse_loss_weight=1.0, cov_loss_weight=0.04, svd_loss_weight=0.001,
    load=None, load_mlp_encoder=None, lora=False, ls=0.0, load_zero_shot_classifier=False, results_db="x.jsonl",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- their modules


class Toy(nn.Module):
    """A model as their wrapper expects it of timm; its features are the inputs, or a linear map of them."""

    pretrained_cfg = {
        "input_size": (3, 224, 224), "crop_pct": 0.95, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
    }  # fmt: skip

    def __init__(self, dim: int = D, linear: bool = False):
        super().__init__()
        self.fc = nn.Linear(dim, 3)
        self.body = nn.Linear(dim, dim) if linear else nn.Identity()

    def forward_features(self, x):
        return self.body(x)

    def forward_head(self, x, pre_logits):
        return x

    def forward(self, x):
        return self.body(x)


@functools.cache
def load(root: Path) -> SimpleNamespace:
    """The authors' modules, with stand-ins for what is not installed and for their package of data sets."""
    names = ("clip", "clip.clip", "timm", "timm.models", "open_clip", "open_clip.open_clip")
    names += ("src.datasets", "src.templates")
    stubs = {name: ModuleType(name) for name in names}
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent in stubs:
            setattr(stubs[parent], child, stubs[name])
    stubs["src.datasets"].__path__ = [str(root / "src/datasets")]  # without its __init__, which imports every loader
    stubs["timm.models"].create_model = lambda *_, **__: Toy()
    stubs["open_clip.open_clip"].create_model_and_transforms = None
    wanted = ("nml_tune", "finetune", "nml_finetune", "modeling", "utils", "eval", "svd", "pca", "zeroshot")
    wanted = [f"src.models.{n}" for n in wanted]
    wanted += [f"src.datasets.{n}" for n in ("common", "imagenet", "objectnet", "imagenet_vid_robust", "flowers102")]
    modules = import_beside(root, wanted, stubs)
    up = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)
    up.datasets, up.templates, up.clip = (stubs[name] for name in ("src.datasets", "src.templates", "clip.clip"))
    up.common.np = ModuleType("numpy")
    vars(up.common.np).update({**vars(np), "int": int})  # removed in numpy 1.24
    package = ModuleType("open_clip")
    package.__path__ = [str(root / "open_clip/open_clip")]
    up.transform = import_beside(root, ["open_clip.transform"], {"open_clip": package})["open_clip.transform"]
    return up


@contextlib.contextmanager
def on_cpu():
    """Let `.cuda()` do nothing, and hide what their functions print."""
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(nn.Module, "cuda", lambda self, *_, **__: self),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    with on_cpu():
        yield load(path)


def block(module: ModuleType, test: str) -> Callable:
    """The body of the first `if TEST:` of a module as a function of its variables -> `loss`, which it adds to."""
    tree = ast.parse(inspect.getsource(module))
    node = next(node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == test)
    code = compile(ast.Module(node.body, []), module.__file__, "exec")

    def run(**names):
        scope = {**vars(module), "loss": torch.zeros(()), **names}
        exec(code, scope)
        return scope["loss"]

    return run


class Passes:
    """A loader of given batches: each pass over it yields the next `length` of them."""

    def __init__(self, batches, length: int):
        self.batches, self.length = iter(batches), length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return itertools.islice(self.batches, self.length)


class Stacked:
    """Batches ((feats_w, feats_s), labels) of a loader as ours takes them: rows [view w; view s], and their labels."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((torch.cat(feats), labels.repeat(2)) for feats, labels in self.loader)


def their_run(up, name: str, loader, start: dict, encoder: Toy, num_classes: int, **flags) -> SimpleNamespace:
    """Run their script `name` -> (state dict of the last model that it evaluates; losses, learning rates, first
    gradients by name).

    loader: of their batches; LP has its features from it. start: weights, by our names, of the first classifier that
    they build (LP builds further ones in each epoch).
    """
    module, args = getattr(up, name), SimpleNamespace(**ARGS | flags)
    found, classifiers, backward = SimpleNamespace(losses=[], rates=[], grads=[]), [], torch.Tensor.backward

    class Started(up.modeling.ImageClassifier):
        def __init__(self, image_encoder, classification_head, *arguments, **options):
            super().__init__(image_encoder, classification_head, *arguments, **options)
            if not classifiers:
                own = self.state_dict()
                own |= {key: start[short] for key in own if (short := key.removeprefix("image_encoder.")) in start}
                self.load_state_dict(own)
            classifiers.append(self)

    class Noted(torch.optim.AdamW):
        def step(self):
            found.rates.append(self.param_groups[0]["lr"])
            if not found.rates[1:]:
                found.grads = [copy.deepcopy(p.grad) for p in self.param_groups[0]["params"]]
            super().step()

    def noted(loss):
        found.losses.append(loss.item())
        backward(loss)

    def evaluate(classifier, _):
        found.state = copy.deepcopy(classifier.state_dict())

    up.datasets.dataset2classes = {"Toy": num_classes}
    up.datasets.Toy = lambda *_, **__: SimpleNamespace(train_loader=loader)
    with (
        mock.patch.object(up.modeling, "create_model", lambda *_, **__: copy.deepcopy(encoder)),
        mock.patch.object(module, "evaluate", evaluate),
        mock.patch.object(module, "get_dataloader", lambda *_, **__: loader),
        mock.patch.object(module, "ImageClassifier", Started),
        mock.patch.object(torch.optim, "AdamW", Noted),
        mock.patch.object(torch.Tensor, "backward", noted),
    ):
        getattr(module, name if name == "nml_tune" else "finetune")(args)
    names = [key for key, p in classifiers[0].named_parameters() if p.requires_grad]
    names = [key.removeprefix("image_encoder.") for key in names]
    found.grads = dict(zip(names, found.grads, strict=False))  # of LP, those of its head are asked for by none
    return found


# --------------------------------------------------------------------------------------------------- cases of a file


def exact(number: float) -> float:
    """Hyper-parameters are stored as float32; this restores 0.001 from 0.0010000000475."""
    return float(f"{number:.6g}")


class Numbered(Part):
    """A part whose file has several cases: names are 0/..., 1/..."""

    def inputs(self, shapes):
        return {f"{i}/{name}": x for i, shape in enumerate(shapes) for name, x in self.one_input(*shape).items()}

    def run(self, function, case):
        numbers = sorted({name.split("/")[0] for name in case if name.split("/")[0].isdecimal()}, key=int)
        assert numbers
        found = {}
        for number in numbers:
            names = [name for name in case if name.startswith(f"{number}/")]
            one = {name.removeprefix(f"{number}/"): case[name] for name in names}
            found |= prefixed(f"{number}/", self.one(function, one))
        return found


# ------------------------------------------------------------------------------------------------------------ losses


def views(n: int, dim: int) -> dict[str, Tensor]:
    return {"feats": torch.randn(n, dim), "mlp_feats": torch.randn(n, dim) * torch.linspace(0.2, 2, dim)}


class Losses(Numbered):
    """Terms alone, with weight 1, and all with default weights; ours are those of gram_losses.py."""

    files = {"losses": dict(shapes=[(16, 32), (64, 24), (12, 48), (8, 16), (4, 16)])}
    more = {"losses_large": dict(shapes=[(128, 512)])}
    families = ("losses",)
    functions = "nmtune.model.consistency_loss nmtune.gram_losses.covariance_loss nmtune.gram_losses.DominantShare"
    authors = "src/models/nml_tune.py:34,152-168"
    tolerances = {"*grad": (0, 1e-6), "*": (1e-5, 0)}
    one_input = staticmethod(views)

    def one(self, terms, one):
        found = {}
        for name, term in terms.items():
            z, feats = leaf(one["mlp_feats"]), leaf(one["feats"])
            found[name] = term(z, feats)
            found |= {f"{name}_grad": gradients(found[name], {"z": z})["grad_z"]}
            assert feats.grad is None or not feats.grad.any()
        return found

    forms = gram_losses.covariance_loss, gram_losses.dominant_singular_value_loss

    @property
    def our(self):
        cov, svd = self.forms

        def whole(z, f):
            logits, labels = torch.zeros(len(z), 1), torch.zeros(len(z), dtype=torch.long)  # cross-entropy is 0
            return model.nmtune_loss(logits, labels, z, f)[0]

        return {
            "mse": lambda z, f: model.consistency_loss(z[len(z) // 2 :], f[: len(f) // 2]),
            "cov": lambda z, f: cov(z),
            "svd": lambda z, f: svd(z),
            "reg_default": whole,
        }

    def their(self, up):
        return {name: functools.partial(their_terms, up, weights) for name, weights in WEIGHTS.items()}


WEIGHTS = {"mse": (1.0, 0.0, 0.0), "cov": (0.0, 1.0, 0.0), "svd": (0.0, 0.0, 1.0), "reg_default": (1.0, 0.04, 0.001)}


def their_terms(up, weights, z: Tensor, f: Tensor, loss: Tensor | None = None) -> Tensor:
    """`loss` and what their statements add to it, with weights of mse, cov and svd."""
    loss = torch.zeros(()) if loss is None else loss
    names = {"mlp_feats": z, "mlp_feats_s": z[len(z) // 2 :], "feats_w": f[: len(f) // 2], "mse_loss_fn": nn.MSELoss()}
    weights = dict(zip(("mse", "cov", "svd"), weights, strict=True))
    names |= {f"{name}_loss_weight": weight for name, weight in weights.items()}
    for name in ("mse", "svd", "cov"):
        if weights[name]:
            loss = block(up.nml_tune, f"{name}_loss_weight")(**names, loss=loss)
    return loss


class Equations(Losses):
    """The forms of the equations."""

    files, families = Losses.files, ("losses",)
    functions = "nmtune.model.covariance_loss nmtune.model.dominant_singular_value_loss"
    unused = ("*mse*", "*reg_default*")  # compared above
    forms = model.covariance_loss, model.dominant_singular_value_loss

    @property
    def our(self):
        return {name: term for name, term in super().our.items() if name in ("cov", "svd")}


class Objective(Numbered):
    files = {
        "objective": dict(shapes=[(32, 32, 10, (1.0, 0.04, 0.001)), (16, 20, 4, (0, 0, 0)), (16, 20, 4, (1, 1, 1))])
    }
    functions = "nmtune.model.nmtune_loss"
    authors = "src/models/nml_tune.py:139-171"
    tolerances = {"*grad_*": (0, 1e-6), "*": (1e-5, 0)}

    def one_input(self, n, dim, classes, weights):
        head = {"head_weight": torch.randn(classes, dim) / 4, "head_bias": torch.randn(classes) / 10}
        labels = torch.randint(0, classes, (n // 2,))
        return {**views(n, dim), **head, "labels": labels, "weights": torch.tensor(weights, dtype=torch.float32)}

    def one(self, function, one):
        x = {name: leaf(one[name]) for name in ("mlp_feats", "head_weight", "head_bias")}
        z, weights = x["mlp_feats"], tuple(exact(w) for w in one["weights"].tolist())
        loss = function(F.linear(*x.values()), one["labels"].repeat(2), z, one["feats"], weights)
        return {"loss": loss, **gradients(loss, x)}

    def our(self, logits, labels, z, feats, weights):
        loss, parts = model.nmtune_loss(logits, labels, z, feats, weights)
        assert [name in parts for name in ("mse", "cov", "svd")] == [w != 0 for w in weights]
        return loss

    def their(self, up):
        def loss(logits, labels, z, feats, weights):
            return their_terms(up, weights, z, feats, F.cross_entropy(logits, labels))

        return loss


class FinetuneObjective(Part):
    files = {"finetune_objective": {}}
    functions = "nmtune.model.finetune_loss"
    authors = "src/models/nml_finetune.py:144-166"
    tolerances = {"grad_*": (0, 1e-6), "*": (1e-5, 0)}

    def inputs(self):
        head = {"weight": torch.randn(5, 18) / 4, "bias": torch.randn(5) / 10}
        x = {
            "features": torch.randn(12, 18),
            "labels": torch.randint(0, 5, (12,)),
            "weights": torch.tensor([0.04, 0.001]),
        }
        return {**x, **prefixed("param/classification_head.", head)}

    def run(self, function, case):
        x = {"features": leaf(case["features"])}
        x |= {name: leaf(value) for name, value in case.group("param/classification_head.").items()}
        weights = tuple(exact(w) for w in case["weights"].tolist())
        loss = function(F.linear(*x.values()), case["labels"], x["features"], weights)
        return {"loss": loss, **gradients(loss, x)}

    def our(self, *inputs):
        return model.finetune_loss(*inputs)[0]

    def their(self, up):
        def loss(logits, labels, feats, weights):
            names = {"feats": feats, "cov_loss_weight": weights[0], "svd_loss_weight": weights[1]}
            total = F.cross_entropy(logits, labels)
            for name in ("svd", "cov"):
                total = block(up.nml_finetune, f"{name}_loss_weight")(**names, loss=total)
            return total

        return loss


# ------------------------------------------------------------------------------------------------------------- heads


def head_of(state: dict[str, Tensor], shape: list[float], num_classes: int = 2) -> model.NMTuneHead:
    """shape = [D, ratio, layers, residual, scale init]."""
    dim, ratio, layers, residual, scale_init = map(exact, shape)
    head = model.NMTuneHead(int(dim), num_classes, ratio, int(layers), bool(residual), scale_init)
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("classification_head.") for name in missing)
    return head


def perturbed(head: nn.Module) -> dict[str, Tensor]:
    """Its weights, none of them at a special value."""
    state = head.state_dict()
    return {name: x + 0.1 * torch.rand(x.shape) if x.is_floating_point() else x for name, x in state.items()}


class MlpHead(Numbered):
    files = {"mlp_head": dict(shapes=[(16, 4, 1, 1, 1.0), (12, 4, 1, 0, 1.0), (12, 2, 2, 1, 0.1)])}
    functions = "nmtune.model.NMTuneHead"
    authors = "src/models/modeling.py:137-202"
    atol = 1e-5

    def one_input(self, dim, ratio, layers, residual, scale):
        state = perturbed(model.NMTuneHead(dim, 2, ratio, layers, bool(residual), scale))
        state = {name: x for name, x in state.items() if not name.startswith("classification_head.")}
        shape = torch.tensor([dim, ratio, layers, residual, scale], dtype=torch.float32)
        return {"x": torch.randn(6, dim), "config": shape, **prefixed("param/", state)}

    def one(self, made, one):
        """made(state, shape) -> (module, its transform)."""
        state = {name.removeprefix("param/"): x for name, x in one.items() if name.startswith("param/")}
        head, transform = made({name: torch.as_tensor(x) for name, x in state.items()}, one["config"].tolist())
        found = {}
        for mode in ("eval", "train"):
            head.train(mode == "train")
            x = leaf(one["x"])
            out = found[f"out_{mode}"] = transform(x)
            out.square().mean().backward()
            found[f"grad_x_{mode}"] = x.grad
        buffers = {name: x for name, x in head.state_dict().items() if "running" in name or "num_batches" in name}
        return found | prefixed("after_train/", buffers)

    def our(self, state, shape):
        head = head_of(state, shape)
        return head, head.transform

    def their(self, up):
        def made(state, shape):
            dim, ratio, layers, residual, scale = map(exact, shape)
            flags = dict(mlp_after_ratio=ratio, mlp_after_layers=int(layers))
            flags |= dict(mlp_with_res=bool(residual), mlp_res_scale_init=scale)
            with mock.patch.object(up.modeling, "create_model", lambda *_, **__: Toy(int(dim))):
                encoder = up.modeling.ImageEncoderMLP(SimpleNamespace(**ARGS | flags))
            encoder.load_state_dict({**encoder.state_dict(), **state})
            return encoder, encoder

        return made


class LinearHead(Part):
    files = {"classification_head": {}}
    functions = "nmtune.model.make_classifier"
    authors = "src/models/modeling.py:109, src/models/nml_tune.py:54"
    atol = 1e-5

    def inputs(self):
        x = {"init_weight": torch.randn(5, 12) / 3, "init_bound": math.sqrt(6 / 12), "x": torch.randn(7, 12)}
        return {**x, "bias": torch.randn(5)}

    def run(self, made, case):
        """made(weight, bias, bound of a new head's weights, normalised) -> head."""
        weight, bound, x = case["init_weight"], case["init_bound"], case["x"]
        return {
            "logits_default": made(weight, torch.zeros(len(weight)), bound, False)(x),
            "logits_bias": made(weight, case["bias"], bound, False)(x),
            "logits_normalize": made(weight, case["bias"], bound, True)(x),
        }

    def our(self, weight, bias, bound, normalised):
        classes, dim = weight.shape
        classifier = model.make_classifier(dim, classes)
        assert classifier.weight.abs().max() <= bound and not classifier.bias.any()
        assert model.make_classifier(dim, 1000).weight.abs().max() > 0.5 * bound
        classifier.load_state_dict({"weight": weight, "bias": bias})
        return lambda x: classifier(F.normalize(x, dim=1) if normalised else x)

    def their(self, up):
        return lambda weight, bias, bound, normalised: up.modeling.ClassificationHead(normalised, weight, bias)


class ZeroShotHead(Part):
    files = {"zeroshot_head": {}}
    functions = "nmtune.encoders.zero_shot_weights"
    authors = "src/models/zeroshot.py:18"
    rtol, atol = 1e-5, 1e-6

    def inputs(self):
        return {"text_embeddings": torch.randn(5, 3, 8), "logit_scale": 14.2857, "x": torch.randn(6, 8)}

    def run(self, function, case):
        """function(text encoder, its logit scale, number of templates) -> (weight, logits of x). A text is "c t"."""
        embeddings = case["text_embeddings"]

        def encode_text(ids):
            return embeddings[ids[:, 0], ids[:, 1]]

        scale = torch.tensor(case["logit_scale"]).log()
        tower = SimpleNamespace(encode_text=encode_text, logit_scale=scale)
        tower.eval, tower.to = lambda: tower, lambda device: tower
        weight, logits = function(tower, *embeddings.shape[:2], case["x"])
        return {"weight": weight, "logits": logits}

    @staticmethod
    def tokenizer(texts):
        return torch.tensor([list(map(int, text.split())) for text in texts])

    def our(self, tower, classes, templates, x):
        """With the case's templates in place of our one."""
        filled = [f"{{c}} {t}" for t in range(templates)]

        def build(encode, tokenizer, names, _):
            return zeroshot.build_classifier(encode, tokenizer, names, filled)

        with (
            mock.patch.object(encoders, "create_clip", lambda *_: (tower, None, None)),
            mock.patch.object(encoders, "build_classifier", build),
            mock.patch.object(open_clip, "get_tokenizer", lambda _: self.tokenizer),
        ):
            weight = encoders.zero_shot_weights("toy", None, [str(c) for c in range(classes)])
        return weight, F.normalize(x, dim=1) @ weight.T

    def their(self, up):
        def function(tower, classes, templates, x):
            up.templates.toy = [lambda name, t=t: f"{name} {t}" for t in range(templates)]
            up.datasets.Toy = lambda *_, **__: SimpleNamespace(classnames=[str(c) for c in range(classes)])
            up.clip.tokenize = self.tokenizer
            args = SimpleNamespace(**ARGS, template="toy", classnames=None)
            head = up.zeroshot.get_zeroshot_classifier(args, tower)
            return head.weight, head(x)

        return function


@functools.cache
def resnet50_view():
    return encoders.load_encoder("open_clip", "RN50")[3]


class EvaluationView(Numbered):
    files = {"preprocess_eval": dict(shapes=[(48, 64), (300, 260)])}
    functions = "nmtune.encoders.timm_transforms"
    authors = "src/models/modeling.py:34, open_clip/open_clip/transform.py:63"
    tolerances = {"clip_*": (0, 1e-6), "*": (0, 0.02)}

    def inputs(self, shapes):
        about = {f"timm_{name}": torch.tensor(Toy.pretrained_cfg[name]) for name in ("mean", "std")}
        return {**about, "timm_resize_crop": torch.tensor([236, 224]), **super().inputs(shapes)}

    def one_input(self, height, width):
        return {"image_hwc": torch.randint(0, 256, (height, width, 3))}

    def run(self, made, case):
        """made(resize, crop, mean, std) -> views of timm and CLIP."""
        numbers = case["timm_resize_crop"].tolist(), case["timm_mean"].tolist(), case["timm_std"].tolist()
        views = dict(zip(("timm_eval", "clip_eval"), made(*numbers), strict=True))
        normalize = views["clip_eval"].transforms[-1]
        about = {"clip_mean": list(normalize.mean), "clip_std": list(normalize.std)}
        assert views["timm_eval"].transforms[0].size == numbers[0][0]
        return about | super().run(views, case)

    def one(self, views, one):
        image = Image.fromarray(one["image_hwc"].numpy().astype(np.uint8))
        return {name: view(image)[:, ::4, ::4] for name, view in views.items()}

    def our(self, sizes, mean, std):
        resize, crop = sizes
        about = {"input_size": (3, crop, crop), "interpolation": "bicubic", "crop_pct": crop / (resize - 0.5)}
        return encoders.timm_transforms(about | {"mean": tuple(mean), "std": tuple(std)})[1], resnet50_view()

    def their(self, up):
        return lambda *_: (up.modeling.timm_load("toy", "Toy")[2], up.transform.image_transform(224, is_train=False))


# ---------------------------------------------------------------------------------------------------- noise and subsets


def class_labels(seed, n, classes, permille):
    labels = torch.randint(0, classes, (n,))
    return {"config": torch.tensor([seed, n, classes]), "ratio_permille": permille, "labels": labels}


class LabelNoise(Numbered):
    files = {"label_noise": dict(shapes=[(3, 1000, 10, 50), (4, 1000, 10, 300), (5, 777, 50, 200), (6, 50, 4, 0)])}
    functions = "nmtune.datasets.flip_labels"
    authors = "src/datasets/common.py:184"
    one_input = staticmethod(class_labels)

    def one(self, function, one):
        seed, _, classes = one["config"].tolist()
        labels = one["labels"].numpy()
        noisy, selected = function(labels, classes, one["ratio_permille"] / 1000, seed)
        found = {"noisy_labels": noisy, "changed": (noisy != labels).sum()}
        return found if selected is None else found | {"num_selected": selected}

    def our(self, labels, classes, ratio, seed):
        noisy = datasets.flip_labels(labels, classes, ratio, np.random.RandomState(seed), exclude_true=False)
        if classes == 1:
            return noisy, None  # there is no other class: the paper's noise makes all that are selected wrong
        other = datasets.flip_labels(labels, classes, ratio, np.random.RandomState(seed))
        return noisy, (other != labels).sum()

    def their(self, up):
        def function(labels, classes, ratio, seed):
            np.random.seed(seed)
            _, noisy = up.common.sample_noise_data(np.arange(len(labels)), labels, classes, ratio)
            return noisy, sum(i < ratio * len(labels) for i in range(len(labels)))

        return function


class Subset(Numbered):
    files = {"train_subset": dict(shapes=[(1, 200, 6, 100), (2, 200, 6, 500), (3, 200, 6, 1000)])}
    functions = "nmtune.features.subset_per_class"
    authors = "src/datasets/common.py:155"
    one_input = staticmethod(class_labels)

    def one(self, function, one):
        seed, _, classes = one["config"].tolist()
        labels = one["labels"].numpy()
        rows = np.asarray(function(labels, classes, one["ratio_permille"] / 1000, seed))
        return {"selected": rows, "selected_labels": labels[rows]}

    def our(self, labels, classes, ratio, seed):
        return features.subset_per_class(labels, ratio, np.random.RandomState(seed))

    def their(self, up):
        def function(labels, classes, ratio, seed):
            np.random.seed(seed)
            return up.common.sample_num_shot(np.arange(len(labels)), labels, classes, ratio)[0]

        return function


class CaptionSwap(Numbered):
    files = {"caption_swap": dict(shapes=[(1, 400, 25), (2, 1000, 150)])}
    functions = "nmtune.datasets.swap_captions"
    authors = "open_clip/shuffle_data.py:25@e9c5fb1"

    def one_input(self, seed, n, permille):
        return {"config": torch.tensor([seed, n, n * permille // 1000]), "swap_permille": permille}

    def one(self, function, one):
        seed, n, swaps = one["config"].tolist()
        source = np.asarray(function(n, swaps, seed, one["swap_permille"]))
        return {"source_index": source, "moved": (source != np.arange(n)).sum()}

    def our(self, n, swaps, seed, permille):
        return datasets.swap_captions(n, swaps, random.Random(seed))

    def their(self, up):
        """Their script, which is in an earlier commit, with a list of dictionaries in place of pandas' table."""
        command = ["git", "-C", up.root, "show", "e9c5fb1:open_clip/shuffle_data.py"]
        tree = ast.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        tree.body = [
            node
            for node in tree.body
            if not isinstance(node, (ast.Import, ast.ImportFrom)) and "noise_ratio =" not in ast.unparse(node)
        ]
        code = compile(tree, "shuffle_data.py", "exec")

        class Table(list):
            iloc = property(lambda self: self)

            def to_json(self, *_, **__):
                pass

        def function(n, swaps, seed, permille):
            random.seed(seed)
            table = Table({"caption": i} for i in range(n))
            scope = {"pd": SimpleNamespace(read_json=lambda *_, **__: table), "tqdm": lambda x: x, "np": np}
            exec(code, scope | {"random": random, "deepcopy": copy.deepcopy, "noise_ratio": permille / 1000})
            return [row["caption"] for row in table]

        return function


# ------------------------------------------------------------------------------------------------------------ training


class LearningRate(Part):
    files = {"lr_schedule": {}}
    functions = "nmtune.train.cosine_lr"
    authors = "src/models/utils.py:19"
    rtol = 1e-5

    def inputs(self):
        return {"cases": torch.tensor([[1e-3, 0, 60], [0.01, 5, 25], [5e-4, 7, 40]])}

    def run(self, function, case):
        rows = [(exact(base), int(warmup), int(total)) for base, warmup, total in case["cases"].tolist()]
        return {f"{i}/lr": function(*row) for i, row in enumerate(rows)}

    def our(self, base, warmup, total):
        return [train.cosine_lr(base, warmup, total, step) for step in range(total)]

    def their(self, up):
        def rates(base, warmup, total):
            optimizer = SimpleNamespace(param_groups=[{}])
            adjust = up.utils.cosine_lr(optimizer, base, warmup, total)
            return [adjust(step) or float(optimizer.param_groups[0]["lr"]) for step in range(total)]

        return rates


class Tuning(Part):
    """A whole run of their script; its encoder is the identity. Each pass has the same batches."""

    files = {"train_nmtune": dict(weights=(1.0, 0.04, 0.001)), "train_mlp_baseline": dict(weights=(0.0, 0.0, 0.0))}
    more = {"train_nmtune_paper": dict(weights=(0.01, 0.01, 0.01), epochs=3, sizes=(8, 8, 3))}
    functions = "nmtune.train.train_step nmtune.train.tuning_steps nmtune.train.cosine_lr nmtune.model.nmtune_loss"
    authors = "src/models/nml_tune.py:41-223"
    tolerances = {"grad0/*": (0, 1e-6), "final/*": (0, 1e-4), "loss*": (1e-4, 0), "lr*": (1e-5, 0)}

    def inputs(self, weights, epochs=2, sizes=(8, 8, 5), dim=16, classes=5):
        found = {}
        for i, n in enumerate(sizes):
            feats = {"feats_w": torch.randn(n, dim), "feats_s": torch.randn(n, dim)}
            found |= prefixed(f"batch{i}/", feats | {"labels": torch.randint(0, classes, (n,))})
        hparams = torch.tensor([1e-3, 1e-4, *weights, 4, 1, 1, 1.0, epochs, 0, classes, dim])
        return {**found, "hparams": hparams, **prefixed("param/", perturbed(model.NMTuneHead(dim, classes)))}

    def batches(self, case) -> list:
        numbers = sorted({int(name.split("/")[0][5:]) for name in case if name.startswith("batch")})
        names = [tuple(f"batch{i}/{name}" for name in ("feats_w", "feats_s", "labels")) for i in numbers]
        return [((case[w], case[s]), case[labels]) for w, s, labels in names]

    def ours(self, case):
        lr, wd, *numbers = case["hparams"].tolist()
        lr, wd, *weights = map(exact, (lr, wd, *numbers[:3]))
        ratio, layers, residual, scale, epochs, warmup, classes, dim = numbers[3:]
        state, shape = case.group("param/"), [dim, ratio, layers, residual, scale]
        loader = list(Stacked(self.batches(case)))
        first = head_of(state, shape, int(classes)).train()
        train.train_step(first, *loader[0], torch.optim.SGD(first.parameters(), lr=0.0), weights)
        found = prefixed("grad0/", {name: p.grad for name, p in first.named_parameters()})
        head = head_of(state, shape, int(classes))
        cfg = config.Config(method="nmtune" if any(weights) else "mlp", epochs=int(epochs), lr=lr, weight_decay=wd)
        cfg = dataclasses.replace(cfg, w_mse=weights[0], w_cov=weights[1], w_svd=weights[2], warmup=int(warmup))
        history = train.tune(cfg, head, loader, views=2)
        found |= {f"{name}_per_step": [line[name] for line in history] for name in ("loss", "lr")}
        inert = {f"mlp_after.{3 * i}.bias" for i in range(int(layers))}  # feed a BatchNorm: rounding decides
        final = {f"final/{name}": value for name, value in head.state_dict().items()}
        inert = {name for name in final if name.removeprefix("final/") in inert or "running_mean" in name}
        return found | {name: case[name] if name in inert else value for name, value in final.items()}

    def theirs(self, up, case):
        lr, wd, mse, cov, svd, *numbers = map(exact, case["hparams"].tolist())
        ratio, layers, residual, scale, epochs, warmup, classes, dim = numbers
        flags = dict(lr=lr, wd=wd, mse_loss_weight=mse, cov_loss_weight=cov, svd_loss_weight=svd, epochs=int(epochs))
        flags |= dict(mlp_after_ratio=ratio, mlp_after_layers=int(layers), mlp_with_res=bool(residual))
        flags |= dict(mlp_res_scale_init=scale, warmup_length=int(warmup))
        loader, start, encoder = self.batches(case), case.group("param/"), Toy(int(dim))
        found = their_run(up, "nml_tune", loader, start, encoder, int(classes), **flags)
        final, _ = encoders.split_upstream(found.state)
        values = {"loss_per_step": found.losses, "lr_per_step": found.rates}
        return values | prefixed("grad0/", found.grads) | prefixed("final/", final)


class LinearProbe(Part):
    """Features that are encoded once; in each pass, their loader draws the batches of the case."""

    files = {"train_lp": {}}
    functions = "nmtune.train.tuning_steps nmtune.train.train_step nmtune.model.make_classifier"
    gradient_left = True
    authors = "src/models/finetune.py:110-147"
    tolerances = {"loss*": (1e-4, 0), "lr*": (1e-5, 0), "*": (0, 1e-5)}

    def inputs(self):
        rows = [F.pad(row, (0, 8 - len(row)), value=-1) for _ in range(3) for row in torch.randperm(22).split(8)]
        head = {"weight": torch.randn(4, 10) / 4, "bias": torch.zeros(4)}
        x = {"features": torch.randn(22, 10), "labels": torch.randint(0, 4, (22,)), "batch_index": torch.stack(rows)}
        hparams = torch.tensor([1e-2, 1e-4, 3, 0, 4, 10, 8])
        return {**x, "hparams": hparams, **prefixed("param/classification_head.", head)}

    def batches(self, case, epochs) -> Passes:
        rows = [row[row >= 0] for row in case["batch_index"]]
        return Passes([(case["features"][row], case["labels"][row]) for row in rows], len(rows) // int(epochs))

    def ours(self, case):
        lr, wd, epochs, warmup, classes, dim, _ = map(exact, case["hparams"].tolist())
        probe = model.make_classifier(int(dim), int(classes))
        probe.load_state_dict(case.group("param/classification_head."))
        cfg = config.Config(method="lp", epochs=int(epochs), lr=lr, weight_decay=wd, warmup=int(warmup))
        history = train.tune(cfg, probe, self.batches(case, epochs), views=1)
        found = {f"{name}_per_step": [line[name] for line in history] for name in ("loss", "lr")}
        return found | prefixed("final/classification_head.", probe.state_dict())

    def theirs(self, up, case):
        lr, wd, epochs, warmup, classes, dim, size = map(exact, case["hparams"].tolist())
        loader = self.batches(case, epochs)
        loader.batches = ({"features": x, "labels": labels} for x, labels in loader.batches)
        flags = dict(lr=lr, wd=wd, epochs=int(epochs), warmup_length=int(warmup), batch_size=int(size))
        found = their_run(up, "finetune", loader, case.group("param/"), Toy(int(dim)), int(classes), **flags)
        final = {name: x for name, x in found.state.items() if name.startswith("classification_head.")}
        return {"loss_per_step": found.losses, "lr_per_step": found.rates, **prefixed("final/", final)}


class FullTuning(Part):
    more = {"full_tuning": {}}
    functions = "nmtune.finetune.create_model nmtune.finetune.train_step nmtune.model.finetune_loss"
    authors = "src/models/nml_finetune.py:144"
    atol = 1e-5

    def inputs(self):
        head, body = model.make_classifier(D, CLASSES), nn.Linear(D, D)
        x = {"images": torch.randn(2, 8, D), "labels": torch.randint(0, CLASSES, (2, 8)), "epochs": 3, "lr": 1e-3}
        start = prefixed("classification_head.", head.state_dict()) | prefixed("image_encoder.", body.state_dict())
        return {**x, **prefixed("param/", start)}

    def ours(self, case):
        cfg = config.FinetuneConfig(epochs=case["epochs"], lr=case["lr"], precision="fp32")
        network = finetune.create_model(cfg, "timm", nn.Linear(D, D), D, CLASSES)
        network.load_state_dict(case.group("param/"))
        optimizer, losses = train.make_optimizer(network, cfg.lr, cfg.weight_decay), []
        scaler, total = torch.amp.GradScaler("cpu", enabled=False), cfg.epochs * len(case["images"])
        for step in range(total):
            batch = (case[name][step % len(case["images"])] for name in ("images", "labels"))
            lr = train.cosine_lr(cfg.lr, 0, total, step)
            losses.append(finetune.train_step(network, *batch, optimizer, scaler, lr, cfg)["loss"])
        return {"losses": torch.stack(losses), **prefixed("final/", network.state_dict())}

    def theirs(self, up, case):
        start, encoder = case.group("param/"), Toy(linear=True)
        encoder.body.load_state_dict({name: start.pop(f"image_encoder.{name}") for name in ("weight", "bias")})
        loader = list(zip(case["images"], case["labels"], strict=True))
        flags = dict(freeze_encoder=False, epochs=case["epochs"], lr=case["lr"])
        found = their_run(up, "nml_finetune", loader, start, encoder, CLASSES, **flags)
        names = {key: key.replace("model.model.body.", "") for key in found.state if "fc." not in key}
        return {"losses": found.losses, **{f"final/{own}": found.state[key] for key, own in names.items()}}


# ---------------------------------------------------------------------------------------------------------- evaluation


class Spectrum(Numbered):
    """SVE and LSVR are not in their code: they are the paper's formulas on these singular values."""

    files = {"feature_spectrum": dict(shapes=[(60, 16), (80, 24), (40, 40)])}
    functions = "nmtune.eval.feature_spectrum nmtune.eval.singular_value_entropy"
    functions += " nmtune.eval.largest_singular_value_ratio"
    authors = "src/models/svd.py:38, src/models/pca.py:38"
    tolerances = {"*pca*": (0, 2e-5), "*": (0, 1e-5)}

    def one_input(self, *shape):
        return {"features": torch.randn(shape).relu() * torch.linspace(0.2, 2, shape[1])}

    def one(self, function, one):
        return function(one["features"])

    def our(self, x):
        s, raw = evaluation.feature_spectrum(x), evaluation.feature_spectrum(x, normalize=False, centre="none")
        found = {"singular_values": s, "raw_singular_values": raw}
        found["pca_singular_values"] = evaluation.feature_spectrum(x, centre="sample+feature")
        for name, each in (("", s), ("raw_", raw)):
            found[f"{name}sve"] = evaluation.singular_value_entropy(each)
            found[f"{name}lsvr"] = evaluation.largest_singular_value_ratio(each)
        return found

    def their(self, up):
        def spectrum(module, x):
            loader = [{"features": part, "labels": torch.zeros(len(part))} for part in x.split(33)]
            with mock.patch.object(module, "get_dataloader", lambda *_, **__: loader):
                return module.eval_single_dataset(nn.Identity(), None, SimpleNamespace(device="cpu"))

        def function(x):
            raw = np.linalg.svd(x.numpy().astype(np.float64), compute_uv=False)
            found = {"singular_values": spectrum(up.svd, x)["singular_values"], "raw_singular_values": raw}
            for name, s in (("", found["singular_values"]), ("raw_", raw)):
                share = s.astype(np.float64) / s.sum(dtype=np.float64)
                share = share[share > 0]
                found |= {f"{name}sve": -(share * np.log(share)).sum(), f"{name}lsvr": -np.log(share[0])}
            return found | {"pca_singular_values": spectrum(up.pca, x)["pca_singular"]}

        return function


def groups_of(flat: Tensor, offsets: Tensor) -> list[list[int]]:
    """flat[a:b] of each two offsets in a row."""
    return [flat[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]


def flat(groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(sum(groups, [])), torch.tensor([0, *itertools.accumulate(map(len, groups))])


class Metrics(Part):
    files = {"eval_metrics": {}}
    functions = "nmtune.eval.accuracy nmtune.eval.balanced_accuracy nmtune.eval.project_logits"
    authors = "src/models/eval.py:14, src/datasets/imagenet.py:105, objectnet.py:110, imagenet_vid_robust.py:54"
    atol = 1e-6

    def inputs(self):
        chosen = {f"imagenet_{a}_classes": torch.randperm(1000)[:200].sort().values for a in "ar"}
        order, sizes = torch.randperm(1000).tolist(), [1 + i % 3 for i in range(113)]
        groups = [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(113)]
        objects = dict(zip(("objectnet_groups_flat", "objectnet_groups_offsets"), flat(groups), strict=True))
        x = {"logits": torch.randn(40, 6), "labels": torch.randint(0, 6, (40,)), "big_logits": torch.randn(40, 1000)}
        return {**x, "labels_a": torch.randint(0, 200, (40,)), **chosen, **objects}

    def run(self, up, case):
        """up: functions top1, balanced, imagenet(logits, classes), objects and video(logits, groups)."""
        big, logits, labels = case["big_logits"], case["logits"], case["labels"]
        groups = groups_of(case["objectnet_groups_flat"], case["objectnet_groups_offsets"])
        found = {"top1": up.top1(logits, labels), "balanced_top1": up.balanced(logits, labels)}
        found |= {f"projected_{a}": up.imagenet(big, case[f"imagenet_{a}_classes"].tolist()) for a in "ar"}
        found |= {"top1_a": up.top1(found["projected_a"], case["labels_a"])}
        found |= {
            "projected_objectnet": up.objects(big, groups),
            "projected_first30_groups": up.video(big, groups[:30]),
        }
        return found

    our = SimpleNamespace(
        top1=evaluation.accuracy,
        balanced=evaluation.balanced_accuracy,
        imagenet=lambda logits, classes: evaluation.project_logits(logits, [[c] for c in classes]),
        objects=evaluation.project_logits,
        video=evaluation.project_logits,
    )

    def their(self, up):
        def top1(logits, labels):
            batches = zip(logits.split(30), labels.split(30), strict=True)
            loader = [{"images": x, "labels": y, "metadata": []} for x, y in batches]
            with mock.patch.object(up.eval, "get_dataloader", lambda *_, **__: loader):
                found = up.eval.eval_single_dataset(nn.Identity(), SimpleNamespace(), SimpleNamespace(**ARGS))
            return found["top1"]

        def projected(cls):
            def function(logits, groups):
                stand_in = SimpleNamespace(rev_class_idx_map=dict(enumerate(groups)), merge_op="max")
                return cls.project_logits(stand_in, logits, "cpu")

            return function

        def imagenet(logits, classes):
            return up.imagenet.project_logits(logits, [i in classes for i in range(logits.shape[1])], "cpu")

        def balanced(logits, labels):
            return up.flowers102.Flowers102.post_loop_metrics(None, labels, logits, None, None)["bal_top1"]

        return SimpleNamespace(
            top1=top1,
            balanced=balanced,
            imagenet=imagenet,
            objects=projected(up.objectnet.ObjectNetBase),
            video=projected(up.imagenet_vid_robust.ImageNetVidRobustBase),
        )


class Pmk(Part):
    files = {"pmk_robustness": {}}
    functions = "nmtune.eval.pmk_accuracy"
    authors = "src/datasets/imagenet_vid_robust.py:113"
    atol = 1e-6

    def inputs(self):
        logits, sizes = torch.randn(55, 6), [4, 5] * 6 + [1]
        accepted = [random.sample(range(6), random.choice((1, 2, 4))) for _ in logits]
        names = dict(zip(("labels_flat", "labels_offsets"), flat(accepted), strict=True))
        return {"logits": logits, **names, "set_offsets": torch.tensor([0, *itertools.accumulate(sizes)])}

    def run(self, function, case):
        accepted = groups_of(case["labels_flat"], case["labels_offsets"])
        sets = groups_of(torch.arange(len(case["logits"])), case["set_offsets"])
        return dict(zip(("pm0", "pmk"), function(case["logits"], accepted, sets), strict=True))

    our = staticmethod(evaluation.pmk_accuracy)

    def their(self, up):
        def function(logits, accepted, sets):
            stand_in = SimpleNamespace(label_map=dict(enumerate(accepted)))
            score = up.imagenet_vid_robust.ImageNetVidRobust.score_predictions
            return score(stand_in, dict(enumerate(logits.numpy())), {anchor: rest for anchor, *rest in sets})

        return function
