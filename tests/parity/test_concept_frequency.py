"""The authors' functions beside ours: `pytest -s tests/parity/test_concept_frequency.py --upstream CLONE`.

CLONE is bethgelab/frequency_determines_performance at 11ef009. Their modules are imported with stand-ins for imports
that these functions do not need (dask, datasets, their loaders). From scripts and notebooks, only the block that is
compared is run.
"""

import ast
import copy
import json
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from concept_frequency import concepts, evaluate, model, statistics, train
from concept_frequency.config import Config
from concept_frequency.published.files import BINS, Results
from shared import clip
from shared.clip import without_padding

from . import Table, check_commit, import_beside, race, run_block, trajectory


def module(name: str, **values) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(values)
    return made


@pytest.fixture(scope="module")
def table(request):
    root = request.config.getoption("upstream")
    if root is None:
        pytest.skip("needs --upstream PATH")
    check_commit(root, "11ef009")
    made = Table(root)
    yield made
    print(f"\n\n{made}")


@pytest.fixture(scope="module")
def up(table) -> SimpleNamespace:
    stubs = {
        "spacy": module("spacy", load=lambda name: None),
        "dask": module("dask"),
        "dask.dataframe": module("dask.dataframe"),
        "dask.diagnostics": module("dask.diagnostics", ProgressBar=None),
        "datasets": module("datasets", load_dataset=None),
        "downstream_dataloader": module("downstream_dataloader", DataLoader=None),
    }
    try:
        import pandas  # noqa: F401
    except ImportError:
        stubs["pandas"] = module("pandas")
    names = {
        "words": "text_search_inverted_index_get_word_dictionaries",
        "search": "text_search_matches_inverted_index",
        "extract": "downstream_retrieval_extract_concepts",
    }
    found = import_beside(table.root / "src", list(names.values()), stubs)
    return SimpleNamespace(**{short: found[name] for short, name in names.items()})


def documents(n: int, seed: int = 0) -> list[list[SimpleNamespace]]:
    """Lists of tokens like spaCy's, with words of Zipf frequencies, parts of speech, upper and lower case, symbols."""
    rng = np.random.default_rng(seed)
    words = [f"{a}{b}" for a in ("dog", "Cat", "t-shirt", "2nd ", "eagle", "ü") for b in "abcdefghij"]
    share = 1 / np.arange(1, len(words) + 1)
    share /= share.sum()

    def token():
        return SimpleNamespace(
            lemma_=words[rng.choice(len(words), p=share)], pos_=rng.choice(["NOUN", "PROPN", "VERB"])
        )

    return [[token() for _ in range(rng.integers(0, 9))] for _ in range(n)]


def test_index_and_search(up, table):
    docs = documents(4000)
    pairs = [[(t.lemma_, t.pos_) for t in doc] for doc in docs]
    (theirs, ours), seconds = race(
        lambda: up.words.create_unigram_dictionary_spacy(docs),
        lambda: model.InvertedIndex.build(map(model.noun_set, pairs)),
        3,
    )
    postings = {term: sorted(set(rows)) for term, rows in theirs.items()}
    mine = {term: ours.postings(term).tolist() for term in ours.terms}
    name = "noun sets and inverted index"
    table.compare(
        name, up.words.create_unigram_dictionary_spacy, "InvertedIndex.build", sorted_values(postings),
        sorted_values(mine),
        rtol=0, atol=0, seconds=seconds, note="their lists repeat the first id",
    )  # fmt: skip

    rng = np.random.default_rng(1)
    terms = [*ours.terms, "unknown"]
    queries = [[terms[i] for i in rng.integers(0, len(terms), rng.integers(1, 4))] for _ in range(500)]
    (theirs_n, ours_n), seconds = race(
        lambda: [up.search.search_for_text(None, theirs, query, "")[0] for query in queries],
        lambda: [len(ours.search(model.known_terms(query, ours.place))) for query in queries],
        3,
    )
    table.compare(
        "multi-word search",
        up.search.search_for_text,
        "InvertedIndex.search",
        theirs_n,
        ours_n,
        rtol=0,
        atol=0,
        seconds=seconds,
    )


def sorted_values(postings: dict) -> dict:
    return {term: torch.tensor(postings[term]) for term in sorted(postings)}


def test_caption_concepts(up, table):
    docs = documents(2000, 2)
    pairs = [[(t.lemma_, t.pos_) for t in doc] for doc in docs]
    (theirs, ours), seconds = race(
        lambda: up.extract.extract_concepts(docs), lambda: concepts.caption_concepts(pairs), 3
    )
    assert sorted(theirs[0]) == ours.names
    assert theirs[1] == ours.to_texts and theirs[3] == ours.to_images
    found = [Counter(len(rows) for rows in each.values()) for each in (theirs[3], ours.to_images)]
    table.compare(
        "nouns of captions", up.extract.extract_concepts, "caption_concepts", dict(sorted(found[0].items())),
        dict(sorted(found[1].items())), atol=0, rtol=0, seconds=seconds,
    )  # fmt: skip


def notebook_function(path: Path, name: str, **values):
    """A function of a notebook, from the cell that defines it; `values` are its globals."""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and f"def {name}(" in source:
            scope: dict = dict(values)
            exec(compile(source, path.name, "exec"), scope)
            return scope[name]
    raise LookupError(f"{path} defines no {name}")


@pytest.mark.parametrize(("task", "prompts"), [("classification", "class"), ("retrieval", "t2i_k=10")])
def test_curves(table, task, prompts):
    import os

    notebook = {
        "classification": "zero_shot_integrated_search_results",
        "retrieval": "retrieval_integrated_search_results",
    }[task]
    place = {"classification": "zero_shot_evaluations", "retrieval": "retrieval_evaluations"}[task]
    kept = {}

    def dump(value, file):
        kept["curve"] = value

    quiet = SimpleNamespace(path=os.path, makedirs=lambda *a, **k: None)
    function = notebook_function(
        table.root / f"notebooks/{notebook}.ipynb", "save_plotting_info", os=quiet, json=json, np=np,
        pickle=SimpleNamespace(dump=dump), results_dir=str(table.root / place),
        search_counts_dir=str(table.root / "search_counts"), open=lambda p, m="r": None if "w" in m else open(p),
    )  # fmt: skip
    published = Results(table.root)
    for name in ("RN50|cc3m", "ViT-B-16|yfcc15m", "ViT-B-32|laion400m"):
        backbone, _, pretraining = name.partition("|")

        def ours(name=name):
            counts, scores, _ = Results(table.root).pairs(task, "integrated", name, prompts)
            return statistics.log_linear_curve(counts, scores, BINS[task])

        (_, curve), seconds = race(lambda b=backbone, p=pretraining: function(b, p, prompts), ours, 2)
        theirs = [kept["curve"][key] for key in ("exp_bins", "cum_means", "cum_stds")]
        table.compare(
            f"curve, {task}, {name.replace('|', ' ')}", f"notebooks/{notebook}.ipynb", "log_linear_curve", theirs,
            [curve.position, curve.mean, curve.std], rtol=1e-9, atol=1e-9, seconds=seconds,
        )  # fmt: skip
        assert len(published.pairs(task, "integrated", name, prompts)[0]) == curve.size.sum()


# ---------------------------------------------------------------------------------------------------------------- RAM++


@pytest.fixture(scope="module")
def ram(table) -> SimpleNamespace:
    """Their Swin and BERT, with stand-ins for functions that newer transformers lack."""
    names = [
        "PreTrainedModel", "apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer",
    ]  # fmt: skip
    old = module("transformers.modeling_utils", **dict.fromkeys(names))
    old.PreTrainedModel = torch.nn.Module
    old.apply_chunking_to_forward = lambda forward, size, dim, *inputs: forward(*inputs)
    package = module("transformers", __path__=[])
    outputs = module("transformers.modeling_outputs")
    outputs.__getattr__ = lambda name: object
    docs = module("transformers.file_utils")
    docs.__getattr__ = lambda name: lambda *a, **k: lambda f: f
    log = SimpleNamespace(get_logger=lambda name: SimpleNamespace(warn=print))
    stubs = {
        "transformers": package,
        "transformers.activations": module("transformers.activations", ACT2FN={"gelu": torch.nn.functional.gelu}),
        "transformers.modeling_utils": old,
        "transformers.modeling_outputs": outputs,
        "transformers.file_utils": docs,
        "transformers.utils": module("transformers.utils", logging=log),
        "transformers.models": module("transformers.models", __path__=[]),
        "transformers.models.bert": module("transformers.models.bert", __path__=[]),
        "transformers.models.bert.configuration_bert": module("c", BertConfig=SimpleNamespace),
    }
    found = import_beside(table.root / "ram_model/ram/models", ["swin_transformer", "bert"], stubs)
    return SimpleNamespace(swin=found["swin_transformer"], bert=found["bert"])


def test_ram_plus(ram, table):
    torch.manual_seed(0)
    swin = ram.swin.SwinTransformer(
        img_size=224, patch_size=4, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7
    ).eval()
    config = SimpleNamespace(
        hidden_size=768, num_attention_heads=4, encoder_width=512, attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0, intermediate_size=3072, hidden_act="gelu", chunk_size_feed_forward=0,
        add_cross_attention=True, num_hidden_layers=2,
    )  # fmt: skip
    encoder = ram.bert.BertEncoder(config).eval()
    for layer in encoder.layer:
        del layer.attention
    ours = model.RAMPlus("swin_tiny_patch4_window7_224", 224).eval()
    state = {f"visual_encoder.{k}": v for k, v in swin.state_dict().items()}
    state |= {f"tagging_head.encoder.{k}": v for k, v in encoder.state_dict().items()}
    rest = {k: v for k, v in ours.head.state_dict().items() if not k.startswith("tagging_head")}
    ours.load_checkpoint(state | rest)
    images = torch.randn(2, 3, 224, 224)
    queries, tokens = torch.randn(2, 5, 768), torch.randn(2, 50, 512)
    with torch.no_grad():
        theirs = swin(images)
        mine = ours.visual_encoder.forward_features(images).flatten(1, 2)
        mine = torch.cat([mine.mean(dim=1, keepdim=True), mine], dim=1)
        table.compare("RAM++ image tokens", ram.swin.SwinTransformer.forward, "model.RAMPlus", theirs, mine, atol=1e-4)
        mask = torch.zeros(2, 1, 1, 50)
        (theirs, mine), seconds = race(
            lambda: encoder(
                queries, encoder_hidden_states=tokens, encoder_attention_mask=mask, mode="tagging", return_dict=False
            )[0],
            lambda: ours.head.tagging_head(queries, tokens),
            3,
        )
    table.compare(
        "RAM++ tagging head", ram.bert.BertEncoder.forward, "model.TaggingHead", theirs, mine, seconds=seconds
    )


def test_retrieval(table):
    """Their retrieval evaluation of whole sets, on the CPU."""
    tree = ast.parse((table.root / "src/retrieval_eval.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "evaluate")
    code = ast.unparse(function).replace(".cuda()", "")
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=-1)
    text = torch.nn.functional.normalize(
        image.repeat_interleave(5, 0) + 1.5 * torch.randn(300, 16, generator=generator), dim=-1
    )
    docs = documents(300, 3)
    found = concepts.caption_concepts([[(t.lemma_, t.pos_) for t in doc] for doc in docs])
    text_to_image = torch.arange(300) // 5
    scope = {
        "torch": torch, "device": "cpu", "print": lambda *a: None,
        "get_embeddings": lambda *a: (image, text, torch.arange(300).view(60, 5), text_to_image),
    }  # fmt: skip
    exec(compile(code, "src/retrieval_eval.py", "exec"), scope)
    by_text = {i: [n for n in found.names if i in found.to_texts[n]] for i in range(300)}
    by_image = {i: [n for n in found.names if i in found.to_images[n]] for i in range(60)}
    (theirs, ours), seconds = race(
        lambda: scope["evaluate"](None, None, None, None, None, by_text, None, by_image),
        lambda: [evaluate.concept_recall(image, text, found, k) for k in (1, 5, 10)],
        2,
    )
    t2i, i2t, by_i2t, by_t2i = theirs
    order = lambda each: {k: each[k] for k in sorted(each)}  # noqa: E731
    expected = [
        t2i,
        i2t,
        *(order(by_t2i[k]["conceptwise"]) for k in (1, 5, 10)),
        *(order(by_i2t[k]["conceptwise"]) for k in (1, 5, 10)),
    ]
    mine = [[r[0] for r in ours], [r[1] for r in ours], *(order(r[2]) for r in ours), *(order(r[3]) for r in ours)]
    table.compare(
        "recall of concepts", "src/retrieval_eval.py:164", "concept_recall", expected, mine, atol=1e-6, seconds=seconds
    )


def test_trajectory(table):
    """Four epochs of open_clip_train's train_one_epoch, with optimizer, schedule and loss of its main(), against ours.

    The authors have no training code, since they measure models trained by others. open_clip's trainer, which is
    installed with open_clip, takes its place. Replaced: its `data`, which needs pandas, by a list of batches.
    """
    without_loader = {"open_clip_train.data": module("open_clip_train.data", get_data=None)}
    names = ["open_clip_train.main", "open_clip_train.train"]
    main, loop = import_beside(Path(open_clip.__file__).parents[1], names, without_loader).values()
    epochs, batch_size, side = 4, 32, 16
    _, pixels, captions = trajectory.shard(side)
    torch.manual_seed(0)
    vision = dict(image_size=side, layers=2, width=32, head_width=16, patch_size=8)
    text = dict(context_length=24, vocab_size=49408, width=32, heads=2, layers=2)
    start = open_clip.CLIP(24, vision, text, output_dict=True)
    tokens = open_clip.SimpleTokenizer(context_length=24)(captions)
    size = trajectory.STEPS // epochs * batch_size
    cfg = Config(epochs=epochs, batch_size=batch_size, dataset_size=size, warmup=20, precision="fp32")
    per_epoch = cfg.steps_per_epoch
    rows = trajectory.orders(len(captions), batch_size, epochs * per_epoch)
    args = SimpleNamespace(
        model="CLIP", train_data="shards", opt="adamw", trace=False, precision="fp32", device="cpu", rank=0,
        local_rank=0, world_size=1, horovod=False, wd=cfg.weight_decay, lr=cfg.lr, beta1=0.9, beta2=0.999, eps=1e-8,
        warmup=cfg.warmup, epochs=epochs, lr_scheduler="cosine", skip_scheduler=False, accum_freq=1, distill=False,
        siglip=False, local_loss=False, gather_with_grad=False, grad_clip_norm=cfg.max_grad_norm,
        log_every_n_steps=100, batch_size=batch_size, wandb=False,
    )  # fmt: skip

    def batches(dtype):
        return ((pixels[batch].to(dtype), tokens[batch]) for batch in rows)

    def theirs(dtype):
        network, loader = copy.deepcopy(start).to(dtype), trajectory.Epochs(batches(dtype), per_epoch, batch_size)
        loaders = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
        made = run_block(main, "args.train_data or args.dataset_type == 'synthetic'", args=args, model=network)
        made |= run_block(main, "'train' in data and optimizer is not None", **made | {"data": loaders})
        for epoch in range(epochs):
            loss, optimizer, scheduler = open_clip.create_loss(args), made["optimizer"], made["scheduler"]
            loop.train_one_epoch(network, loaders, loss, epoch, optimizer, None, scheduler, None, args)

    def ours(dtype):
        network = copy.deepcopy(start).to(dtype)
        network.output_dict = False
        network = without_padding(network)
        groups = train.parameter_groups(network, cfg.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
        scaler = torch.amp.GradScaler(enabled=False)
        for step, (images, texts) in enumerate(batches(dtype)):
            train.set_learning_rate(adamw, cfg, step)
            yield train.train_step(network, images, clip.cut_padding(texts, images.device), adamw, scaler, cfg)

    where = f"open_clip_train/train.py:{loop.train_one_epoch.__code__.co_firstlineno}"
    curves, against = trajectory.run(theirs, ours), "open_clip's trainer"
    trajectory.compare(table, "concept_frequency", where, "train.train_step", curves, against=against)
