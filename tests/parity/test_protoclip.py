"""ProtoCLIP's training against the authors': `pytest tests/parity/test_protoclip.py --upstream PATH`, a clone of
megvii-research/protoclip@fde1933. Its parts are in tests/adapters/protoclip.py.
"""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from protoclip import eval as evaluation
from protoclip import model, teacher_file, train
from tests.adapters.protoclip import HEADS, TEXT, TRAIN, authors, optimizer_groups, pairs, their_schedule, twins

from . import Table, clone_of, printed, run_block, seeded, trajectory  # noqa: F401  (seeded: autouse)

WORDS = {**TEXT, "context_length": 24, "vocab_size": 49408}


@pytest.fixture(scope="module")
def up(request):
    with authors(clone_of(request, "megvii-research/protoclip", "fde1933")) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "ProtoCLIP, megvii-research/protoclip@fde1933:src/")


def test_checkpoint(up, table, tmp_path):
    config = open_clip.get_model_config("ViT-emoji")
    args = SimpleNamespace(**HEADS)
    theirs = up.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], args=args).eval()
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    ours, _ = evaluation.load_model(tmp_path / "epoch_3.pt", "ViT-emoji")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images, tokens = torch.randn(4, 3, 40, 40), pairs(4, text=WORDS)[1]
    values = [tuple(each(images, tokens)) for each in (theirs, ours)]
    table.compare("checkpoint of theirs, loaded strictly", "training/main.py:452", "eval.load_model", *values)


def our_steps(network, batches, optimizer, prototypes, episode, cfg):
    """Our steps of an episode as train.main takes them: yields (step, losses)."""
    weights = train.loss_weights(cfg, episode)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    network.train()
    for i, batch in enumerate(itertools.islice(batches, cfg.episode_size // cfg.batch_size)):
        step = cfg.steps_per_episode * episode + i
        train.set_learning_rates(optimizer, cfg, step)
        yield step, train.train_step(network, batch, prototypes, weights, optimizer, scaler, cfg)


def test_trajectory(up, table, tmp_path):
    """Four episodes of the body of their main()'s loop against ours: extraction, K-means, back translation, training.

    The first episode trains with InfoNCE only. Each side draws its samples and builds prototypes from its own features.
    Both use the same precomputed shuffles and views, since their loader draws from the global generator.
    Replaced: `.cuda()` and CUDA's autocast do nothing; faiss runs on the CPU; the teacher file is that of the corpus;
    `sync_prototypes`, which exchanges files, only converts their fp32 prototypes to the model's precision, as the test
    does with ours; openTSNE, pytorch_transformers and pandas have stand-ins that are not called. The difference in
    float64 comes from prototypes, which are computed in fp32. In float32 the curves diverge from the episode on in
    which a rounding error moves a sample to another cluster.
    """
    side, batch_size, episodes_, flags = 16, 32, 4, dict(k=40, infonce_warmup_epoch=1, warmup=20, projection_dim=16)
    pairs_, pixels, captions = trajectory.shard(side + 4)
    size = batch_size * trajectory.STEPS // episodes_ + 7  # with a short last batch, which both leave out
    tokens = open_clip.get_tokenizer("ViT-emoji", context_length=24)(captions)
    file = trajectory.ROOT / "data/emoji/teacher.npz"
    if not file.is_file():
        pytest.skip(f"needs {file}: `python -m protoclip.teacher minilm` makes it")
    external = teacher_file.Teacher(str(file)).features_of(pairs_, np.arange(len(pairs_)))
    np.save(tmp_path / "teacher.npy", external.numpy())
    args = SimpleNamespace(**{
        **TRAIN, **flags, "episode_size": size, "batch_size": batch_size, "epochs": episodes_,
        "external_teacher": str(tmp_path / "teacher.npy"), "dataset_size": len(pairs_), "episodic_training": True,
        "clustering_frequency": 1, "visualize_frequency": -1, "save_logs": False,
    })  # fmt: skip
    orders = [torch.randperm(size).split(batch_size) for _ in range(2 * episodes_)]  # extraction, training, ...
    views = [[torch.randint(0, 5, (2,)).tolist() for _ in order] for order in orders]  # corners of crops, by batch
    starts = twins(up, text=WORDS)

    def batches(number: int, rows, dtype):
        """Batches of pass `number`, over the samples `rows` of an episode."""
        for index, (top, left) in zip(orders[number], views[number], strict=True):
            images = pixels[rows[index], :, top : top + side, left : left + side]
            yield index, images.to(dtype), tokens[rows[index]]

    def theirs(dtype):
        network = copy.deepcopy(starts[0]).to(dtype)
        rows = torch.zeros(size, dtype=torch.long)  # their loop writes each episode's samples here
        passes = (batch for number in range(len(orders)) for batch in batches(number, rows, dtype))
        loader = trajectory.Epochs(passes, len(orders[0]), batch_size)
        loaders = {"train": SimpleNamespace(dataloader=loader, sampler=None)}
        optimizer = optimizer_groups(up, network, args)
        scheduler, clustering = their_schedule(up, args, loaders, optimizer), up.clustering.Clustering(args)

        def in_precision(_):
            for name, value in vars(clustering).items():
                if "centroids" in name:
                    setattr(clustering, name, value.to(dtype))

        clustering.sync_prototypes = in_precision
        up.main.random_seed(7)
        for epoch in range(episodes_):
            run_block(
                up.main, "range(start_epoch, args.epochs)", epoch=epoch, args=args, index_mapping=rows, data=loaders,
                model=network, optimizer=optimizer, scaler=None, scheduler=scheduler, clustering=clustering,
                writer=None, profiling={}, preprocess_val=None, tokenizer=None, evaluate=lambda *_: None,
            )  # fmt: skip

    def in_single_precision(_module, _inputs, output):
        return model.ProtoCLIPOutput(*(x.to(torch.float32) for x in output))

    def ours(dtype):
        network, rng = copy.deepcopy(starts[1]).to(dtype), np.random.RandomState(7)
        cfg = train.Config(
            k=args.k, episodes=episodes_, episode_size=size, infonce_warmup=1, batch_size=batch_size, lr=args.lr,
            warmup=args.warmup, max_grad_norm=args.max_grad_norm, projection_dim=args.projection_dim, precision="fp32",
        )  # fmt: skip
        groups = train.parameter_groups(network, args.wd)
        adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps, fused=True)
        for episode in range(episodes_):
            rows, prototypes = torch.from_numpy(train.sample_episode(len(pairs_), size, rng)), None
            if episode >= cfg.infonce_warmup:
                with network.register_forward_hook(in_single_precision):
                    h = train.extract_features(network, batches(2 * episode, rows, dtype), size, cfg)
                found = model.build_prototypes(*h, args.k, external[rows])
                prototypes = model.Prototypes(*(x.to(dtype) if x.is_floating_point() else x for x in found))
            loader = batches(2 * episode + 1, rows, dtype)
            yield from our_steps(network, loader, adamw, prototypes, episode, cfg)

    where = f"training/main.py:350, {table.where(up.train.train_one_epoch)}"
    curves = trajectory.run(theirs, ours)
    trajectory.compare(table, "protoclip", where, "train.train_step", curves, double=1e-6)
