"""stub for now"""
import torch
import torch.nn.functional as F
from torch import Tensor
from shared import zeroshot


def zero_shot_classifier(text_features: Tensor) -> Tensor:
    return zeroshot.zeroshot_classifier(text_features)


def zero_shot_accuracy(logits: Tensor, target: Tensor, ks=(1, 5)) -> list[float]:
    ranks = zeroshot.label_ranks(logits, target)
    return [(ranks < k).float().mean().item() for k in ks]


def retrieval_metrics(image: Tensor, text: Tensor) -> dict[str, float]:
    index = torch.arange(len(image))
    to_text, to_image = zeroshot.retrieval_ranks(image, text, index)
    metrics = {}
    for way, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        metrics[f"{way}_mean_rank"] = ranks.double().mean().item() + 1
        metrics[f"{way}_median_rank"] = float(ranks.double().quantile(0.5).floor()) + 1
        metrics |= {f"{way}_R@{k}": (ranks < k).double().mean().item() for k in (1, 5, 10)}
    return metrics
