"""NMTune against the authors' code: `pytest tests/parity/test_nmtune.py --upstream PATH`, a clone of
Hhhhhhao/Noisy-Model-Learning@f249dce. Both sides get the same seeded inputs on the CPU in fp32; the table is printed at
the end.
"""

import ast
import contextlib
import copy
import inspect
import io
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from nmtune import config, datasets, fast_losses, features, finetune, model, train
from nmtune import eval as evaluation
from shared import tars

from . import Table, clone_of, import_beside, printed, race, seeded, trajectory  # noqa: F401  (seeded: autouse)

D, CLASSES, BATCH = 24, 5, 8
ARGS = dict(  # their flags, those of their README where the scale allows
    seed=3907, model_source="timm", model="toy", train_dataset="Toy", eval_datasets=None, freeze_encoder=True,
    use_weak_strong=False, data_location="", batch_size=BATCH, num_shots=None, noise_ratio=None, lr=1e-3, wd=1e-4,
    warmup_length=0, epochs=3, save=None, cache_dir=None, device="cpu", mlp_after_ratio=4, mlp_after_layers=1,
    mlp_with_res=True, mlp_res_scale_init=1.0, mse_loss_weight=1.0, cov_loss_weight=0.04, svd_loss_weight=0.001,
    load=None, load_mlp_encoder=None, lora=False, ls=0.0, load_zero_shot_classifier=False,
)  # fmt: skip
INERT = ("mlp_after.0.bias", "mlp_after.1.running_mean", "num_batches_tracked")  # true gradient 0: rounding decides


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


def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules, with stand-ins for what is not installed and for their package of data sets."""
    root = Path(path).resolve()
    names = (
        "clip",
        "clip.clip",
        "timm",
        "timm.models",
        "open_clip",
        "open_clip.open_clip",
        "src.datasets",
        "src.templates",
    )
    stubs = {name: ModuleType(name) for name in names}
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent in stubs:
            setattr(stubs[parent], child, stubs[name])
    stubs["src.datasets"].__path__ = [str(root / "src/datasets")]  # without its __init__, which imports every loader
    stubs["timm.models"].create_model = lambda *_, **__: Toy()
    stubs["open_clip.open_clip"].create_model_and_transforms = None
    wanted = [
        f"src.models.{n}" for n in ("nml_tune", "finetune", "nml_finetune", "modeling", "utils", "eval", "svd", "pca")
    ]
    wanted += [f"src.datasets.{n}" for n in ("common", "imagenet", "objectnet", "imagenet_vid_robust", "flowers102")]
    modules = import_beside(root, wanted, stubs)
    up = SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)
    up.datasets = stubs["src.datasets"]
    up.timm = stubs["timm.models"]
    up.common.np = ModuleType("numpy")
    vars(up.common.np).update({**vars(np), "int": int})  # removed in numpy 1.24
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


@pytest.fixture(scope="module")
def up(request):
    path = clone_of(request, "Hhhhhhao/Noisy-Model-Learning", "f249dce")
    return load(path)


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "NMTune, Hhhhhhao/Noisy-Model-Learning@f249dce")


class Block:
    """The body of the first `if TEST:` in one of their modules, compiled: their training loop computes losses there."""

    def __init__(self, module: ModuleType, test: str):
        tree = ast.parse(inspect.getsource(module))
        node = next(node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == test)
        self.code = compile(ast.Module(node.body, []), module.__file__, "exec")
        self.scope = vars(module)

    def __call__(self, **names):
        scope = {**self.scope, "loss": torch.zeros(()), **names}
        exec(self.code, scope)
        return scope["loss"]


def their_terms(up) -> dict:
    """{"mse", "cov", "svd"}: functions z, f (n, D) -> the loss term with weight 1, computed by their statements."""
    blocks = {name: Block(up.nml_tune, f"{name}_loss_weight") for name in ("mse", "cov", "svd")}

    def mse(z, f):
        views = {"mlp_feats_s": z[len(z) // 2 :], "feats_w": f[: len(f) // 2]}
        return blocks["mse"](**views, mse_loss_fn=nn.MSELoss(), mse_loss_weight=1.0)

    def cov(z, f):
        return blocks["cov"](mlp_feats=z, cov_loss_weight=1.0)

    def svd(z, f):
        return blocks["svd"](mlp_feats=z, svd_loss_weight=1.0)

    return {"mse": mse, "cov": cov, "svd": svd}


OUR_TERMS = {
    "mse": lambda z, f: model.consistency_loss(z[len(z) // 2 :], f[: len(f) // 2]),
    "cov": lambda z, f: fast_losses.covariance_loss(z),
    "svd": lambda z, f: fast_losses.dominant_singular_value_loss(z),
}
EQUATIONS = {
    "cov": lambda z, f: model.covariance_loss(z),
    "svd": lambda z, f: model.dominant_singular_value_loss(z),
}
OUR_NAMES = {"mse": "consistency_loss", "cov": "covariance_loss", "svd": "dominant_singular_value_loss"}
LINES = {"mse": 152, "cov": 164, "svd": 159}


def value_and_gradient(term, z, f):
    z = z.clone().requires_grad_()
    value = term(z, f)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("n, dim", [(16, 32), (64, 24), (128, 512), (4, 16)])
@pytest.mark.parametrize("name", OUR_TERMS)
def test_terms(up, table, name, n, dim):
    z, f = torch.randn(n, dim) * torch.linspace(0.2, 2, dim), torch.randn(n, dim)
    forms = {"model" if name == "mse" else "fast_losses": OUR_TERMS[name]}
    forms |= {"model": EQUATIONS[name]} if name in EQUATIONS else {}
    for module, term in forms.items():
        terms = their_terms(up)[name], term
        (theirs, ours), seconds = race(*(lambda term=term: value_and_gradient(term, z, f) for term in terms))
        table.compare(
            f"L_{name.upper()}, n={n}, D={dim}", f"src/models/nml_tune.py:{LINES[name]}", f"{module}.{OUR_NAMES[name]}",
            theirs[0], ours[0], gradients=(theirs[1], ours[1]), atol=1e-6, seconds=seconds,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- whole training


class Loader(list):
    """Batches in memory."""


def toy_batches(sizes=(8, 8, 3), dim=D, classes=CLASSES) -> Loader:
    make = lambda n: (torch.randn(n, dim), torch.randn(n, dim))  # noqa: E731
    return Loader((make(n), torch.randint(0, classes, (n,))) for n in sizes)


class Stacked:
    """Batches ((feats_w, feats_s), labels) of a loader as ours takes them: rows [view w; view s], and their labels."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((torch.cat(feats), labels.repeat(2)) for feats, labels in self.loader)


@contextlib.contextmanager
def toy_run(up, module: ModuleType, loader, dim=D, classes=CLASSES, linear=False):
    """Context for their script on `loader` and a toy encoder -> (state dicts of the models it evaluates, encoder)."""
    states: list[dict] = []
    up.datasets.dataset2classes = {"Toy": classes}
    up.datasets.Toy = lambda *_, **__: SimpleNamespace(train_loader=loader)
    encoder = Toy(dim, linear)
    with (
        mock.patch.object(up.modeling, "create_model", lambda *_, **__: copy.deepcopy(encoder)),
        mock.patch.object(module, "evaluate", lambda m, _: states.append(copy.deepcopy(m.state_dict()))),
        on_cpu(),
    ):
        yield states, encoder


def initial(up, module: ModuleType, weights: dict):
    """Give the first classifier that they build `weights` (by our names); LP builds further ones in each epoch."""
    waiting = [weights]

    class Started(up.modeling.ImageClassifier):
        def __init__(self, image_encoder, classification_head, *args, **kwargs):
            super().__init__(image_encoder, classification_head, *args, **kwargs)
            if waiting:
                own, start = self.state_dict(), waiting.pop()
                own |= {key: start[short] for key in own if (short := key.removeprefix("image_encoder.")) in start}
                self.load_state_dict(own)

    return mock.patch.object(module, "ImageClassifier", Started)


@pytest.mark.parametrize("weights", [(1.0, 0.04, 0.001), (0.0, 0.0, 0.0), (0.01, 0.01, 0.01)])
def test_whole_tuning(up, table, weights):
    loader = toy_batches()
    head = model.NMTuneHead(D, CLASSES)
    start = copy.deepcopy(head.state_dict())
    w_mse, w_cov, w_svd = weights
    args = SimpleNamespace(**ARGS | dict(mse_loss_weight=w_mse, cov_loss_weight=w_cov, svd_loss_weight=w_svd))
    with toy_run(up, up.nml_tune, loader) as (states, _), initial(up, up.nml_tune, start):
        up.nml_tune.nml_tune(args)
    cfg = config.Config(epochs=args.epochs, lr=args.lr, weight_decay=args.wd, w_mse=w_mse, w_cov=w_cov, w_svd=w_svd)
    train.tune(cfg, head, Stacked(loader), views=2)
    theirs, _ = model.split_upstream(states[-1])
    ours = head.state_dict()
    assert theirs.keys() == ours.keys()
    keep = [key for key in ours if not key.endswith(INERT)]
    name = f"9 steps of tuning, weights {weights}"
    pick = [{key: side[key] for key in keep} for side in (theirs, ours)]
    table.compare(name, up.nml_tune.nml_tune, "train.tune", *pick, rtol=0, atol=1e-4)


def test_linear_probe(up, table):
    batches = Loader({"features": torch.randn(n, D), "labels": torch.randint(0, CLASSES, (n,))} for n in (8, 8, 3))
    probe = model.make_classifier(D, CLASSES)
    start = {f"classification_head.{key}": value.clone() for key, value in probe.state_dict().items()}
    with (
        toy_run(up, up.finetune, batches) as (states, _),
        initial(up, up.finetune, start),
        mock.patch.object(up.finetune, "get_dataloader", lambda *_, **__: batches),
    ):
        up.finetune.finetune(SimpleNamespace(**ARGS | dict(lr=1e-2)))
    cfg = config.Config(method="lp", epochs=ARGS["epochs"], lr=1e-2, weight_decay=ARGS["wd"])
    train.tune(cfg, probe, [(b["features"], b["labels"]) for b in batches], views=1)
    theirs = {k.rpartition(".")[2]: v for k, v in states[-1].items() if k.startswith("classification_head.")}
    table.compare("9 steps of LP", up.finetune.finetune, "train.tune", theirs, probe.state_dict(), rtol=0, atol=1e-5)


def test_full_fine_tuning(up, table):
    batches = Loader((torch.randn(n, D), torch.randint(0, CLASSES, (n,))) for n in (8, 8))
    torch.manual_seed(1)
    args = SimpleNamespace(**ARGS | dict(freeze_encoder=False))
    head = model.make_classifier(D, CLASSES)
    start = {f"classification_head.{key}": value.clone() for key, value in head.state_dict().items()}
    with (
        toy_run(up, up.nml_finetune, batches, linear=True) as (states, encoder),
        initial(up, up.nml_finetune, start),
    ):
        up.nml_finetune.finetune(args)
    ours = finetune.ImageClassifier(copy.deepcopy(encoder.body), D, CLASSES)
    ours.classification_head.load_state_dict(head.state_dict())
    optimizer = train.make_optimizer(ours, args.lr, args.wd)
    total = args.epochs * len(batches)
    for step in range(total):
        x, labels = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = train.cosine_lr(args.lr, 0, total, step)
        feats, logits = ours(x)
        optimizer.zero_grad()
        model.finetune_loss(logits, labels, feats)[0].backward()
        optimizer.step()
    names = {
        "classification_head.weight": "classification_head.weight",
        "classification_head.bias": "classification_head.bias",
    }
    names |= {f"image_encoder.{p}": f"image_encoder.model.model.body.{p}" for p in ("weight", "bias")}
    theirs = {own: states[-1][other] for own, other in names.items()}
    kept = {own: ours.state_dict()[own] for own in names}
    where = "src/models/nml_finetune.py:144"
    table.compare("6 steps of full fine-tuning", where, "model.finetune_loss", theirs, kept, rtol=0, atol=1e-5)


def test_trajectory(up, table):
    """Eight epochs of their nml_tune against ours. Features are pixels of a shard, classes are groups of emoji.

    The two views are two crops; both sides also use the short last batch of an epoch.
    Replaced: `.cuda()` does nothing; the encoder is the identity; their package of data sets and their evaluation after
    an epoch are stubs, and so are timm, clip and open_clip, of which their clone has copies.
    """
    epochs, batch_size, side = 8, 41, 8
    pairs, pixels, _ = trajectory.shard(side + 2)
    groups = [about["group"] for _, about in tars.descriptions([str(trajectory.SHARD)])]
    names = sorted(set(groups))
    labels = torch.tensor([names.index(group) for group in groups])
    batches = []
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(len(pairs)).split(batch_size)):
        corners = torch.randint(0, 3, (2, 2)).tolist()
        views = tuple(pixels[batch, :, y : y + side, x : x + side].flatten(1) for y, x in corners)
        batches.append((views, labels[batch]))
    length, dim = len(batches) // epochs, 3 * side**2
    start = model.NMTuneHead(dim, len(names))
    args = SimpleNamespace(**ARGS | dict(epochs=epochs, batch_size=batch_size, warmup_length=20))

    def loader(dtype):
        return trajectory.Epochs(((tuple(v.to(dtype) for v in vs), y) for vs, y in batches), length, batch_size)

    def theirs(dtype):
        run, started = toy_run(up, up.nml_tune, loader(dtype), dim, len(names)), start.state_dict()
        with trajectory.default_dtype(dtype), run, initial(up, up.nml_tune, started):
            up.nml_tune.nml_tune(args)

    def ours(dtype):
        head = copy.deepcopy(start).to(dtype)
        cfg = config.Config(epochs=epochs, lr=args.lr, weight_decay=args.wd, warmup=args.warmup_length)
        train.tune(cfg, head, Stacked(loader(dtype)), views=2)

    curves = trajectory.run(theirs, ours)
    trajectory.compare(table, "nmtune", up.nml_tune.nml_tune, "train.tune", curves)


# ------------------------------------------------------------------------------------------------------ schedules, data


def test_schedule(up, table):
    for warmup, total in ((0, 50), (7, 40)):
        optimizer, rates = SimpleNamespace(param_groups=[{}]), []
        adjust = up.utils.cosine_lr(optimizer, 1e-3, warmup, total)
        for step in range(total):
            adjust(step)
            rates.append(float(optimizer.param_groups[0]["lr"]))
        ours = [train.cosine_lr(1e-3, warmup, total, step) for step in range(total)]
        table.compare(
            f"learning rate, warm-up {warmup}", up.utils.cosine_lr, "train.cosine_lr", rates, ours, atol=1e-12
        )


def test_noise_and_subset(up, table):
    labels = np.random.RandomState(5).randint(0, 7, 500)
    for ratio in (0.05, 0.3):
        np.random.seed(3)
        _, theirs = up.common.sample_noise_data(np.arange(500), labels, 7, ratio)
        ours = datasets.flip_labels(labels, 7, ratio, np.random.RandomState(3), exclude_true=False)
        table.compare(
            f"label noise {ratio}", up.common.sample_noise_data, "datasets.flip_labels", theirs, ours, rtol=0, atol=0
        )
        np.random.seed(3)
        theirs, _ = up.common.sample_num_shot(np.arange(500), labels, 7, ratio)
        ours = features.subset_per_class(labels, ratio, np.random.RandomState(3))
        table.compare(
            f"subset {ratio}", up.common.sample_num_shot, "features.subset_per_class", theirs, ours, rtol=0, atol=0
        )


def test_transforms(up, table):
    with on_cpu():
        _, _, theirs = up.modeling.timm_load("toy", "Toy")
    ours = model.timm_transforms(Toy.pretrained_cfg)[1]
    for shape in ((48, 64, 3), (300, 260, 3)):
        image = Image.fromarray(np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8))
        name = f"evaluation transform, {shape[1]}x{shape[0]}"
        table.compare(name, up.modeling.timm_load, "model.timm_transforms", theirs(image), ours(image), rtol=0, atol=0)
    assert open_clip.get_model_config("RN50") is not None


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("shape", [(60, 16), (80, 24), (40, 40)])
def test_spectrum(up, table, shape):
    x = torch.randn(shape).relu() * torch.linspace(0.2, 2, shape[1])
    loader = [{"features": x[:33], "labels": torch.zeros(33)}, {"features": x[33:], "labels": torch.zeros(len(x) - 33)}]
    for module, key, center in ((up.svd, "singular_values", "sample"), (up.pca, "pca_singular", "sample+feature")):
        with mock.patch.object(module, "get_dataloader", lambda *_, **__: loader), on_cpu():
            theirs = module.eval_single_dataset(nn.Identity(), None, SimpleNamespace(device="cpu"))[key]
        ours = evaluation.feature_spectrum(x, center=center)
        name = f"singular values, {center}, {shape[0]}x{shape[1]}"
        table.compare(name, module.eval_single_dataset, "eval.feature_spectrum", theirs, ours, rtol=0, atol=2e-5)


def test_accuracy(up, table):
    logits, labels = torch.randn(50, 6), torch.randint(0, 6, (50,))
    loader = [{"images": logits[:30], "labels": labels[:30], "metadata": []}]
    loader += [{"images": logits[30:], "labels": labels[30:], "metadata": []}]
    with mock.patch.object(up.eval, "get_dataloader", lambda *_, **__: loader), on_cpu():
        args = SimpleNamespace(device="cpu", results_db="x.jsonl")
        theirs = up.eval.eval_single_dataset(nn.Identity(), SimpleNamespace(), args)["top1"]
    ours = evaluation.accuracy(logits, labels)
    table.compare("top-1", up.eval.eval_single_dataset, "eval.accuracy", theirs, ours, rtol=0, atol=1e-6)
    theirs = up.flowers102.Flowers102.post_loop_metrics(None, labels, logits, None, None)["bal_top1"]
    ours = evaluation.balanced_accuracy(logits, labels)
    where = up.flowers102.Flowers102.post_loop_metrics
    table.compare("balanced top-1", where, "eval.balanced_accuracy", theirs, ours, rtol=0, atol=1e-6)


def test_projections(up, table):
    logits = torch.randn(20, 1000)
    chosen = sorted(random.Random(0).sample(range(1000), 200))
    mask = [i in chosen for i in range(1000)]
    theirs = up.imagenet.project_logits(logits, mask, "cpu")
    ours = evaluation.project_logits(logits, [[c] for c in chosen])
    where = up.imagenet.project_logits
    table.compare("ImageNet-A/-R logits", where, "eval.project_logits", theirs, ours, rtol=0, atol=0)
    groups = {i: random.Random(i).sample(range(1000), 1 + i % 3) for i in range(113)}
    for cls in (up.objectnet.ObjectNetBase, up.imagenet_vid_robust.ImageNetVidRobustBase):
        kept = groups if cls is up.objectnet.ObjectNetBase else {i: groups[i] for i in range(30)}
        stand_in = SimpleNamespace(rev_class_idx_map=kept, merge_op="max")
        theirs = cls.project_logits(stand_in, logits, "cpu")
        ours = evaluation.project_logits(logits, list(kept.values()))
        name = f"{cls.__name__.removesuffix('Base')} logits"
        table.compare(name, cls.project_logits, "eval.project_logits", theirs, ours, rtol=0, atol=0)


def test_pmk(up, table):
    chance, n = random.Random(0), 60
    logits = torch.randn(n, 6)
    accepted = [chance.sample(range(6), chance.choice((1, 2, 4))) for _ in range(n)]
    sets = [list(range(i, i + 5)) for i in range(0, n, 5)]
    stand_in = SimpleNamespace(label_map={str(i): accepted[i] for i in range(n)})
    preds = {str(i): logits[i].numpy() for i in range(n)}
    where = up.imagenet_vid_robust.ImageNetVidRobust.score_predictions
    theirs = where(stand_in, preds, {str(s[0]): [str(i) for i in s[1:]] for s in sets})
    ours = evaluation.pmk_accuracy(logits, accepted, sets)
    table.compare("pm-0, pm-k", where, "eval.pmk_accuracy", theirs, ours, rtol=0, atol=1e-6)
