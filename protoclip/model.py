"""ProtoCLIP: Prototypical Contrastive Language Image Pretraining (arXiv 2206.10996, TNNLS 2023).

Authors' code, called upstream: megvii-research/protoclip@fde1933, cited as `U:<path>:<line>`, paths under its `src/`.
The paper's contribution is in this file:
  - two projection heads beside a plain CLIP, and a second learnable temperature   `ProtoCLIP`
  - K-means prototypes of one modality as class targets for the other              `kmeans`, `prototypical_loss`
  - Prototypical Back Translation (PBT): prototypes re-expressed in the student's  `prototypical_back_translation`
    own feature space, so that grouping samples need not close the modality gap
  - an external teacher, which PBT makes possible                                  `build_prototypes`, `protoclip_loss`

Shapes: B batch, N episode, K prototypes, E embedding, P projection, X external dimension, S image side, L tokens,
R ranks (processes).
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import faiss
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import clip, run
from shared.errors import UserError

# ------------------------------------------------------------------------------------------------- encoders and heads


def projection_head(
    embed_dim: int, hidden_dim: int = 2048, projection_dim: int = 128, num_layers: int = 1
) -> nn.Sequential:
    """g: (B, E) -> (B, P). `num_layers` blocks of Linear-BatchNorm-ReLU, then a Linear; 0 blocks = one Linear.

    Source: U:open_clip/model.py:421. Torch's default initialisation.
    """
    layers: list[nn.Module] = []
    width = embed_dim
    for _ in range(num_layers):
        layers += [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        width = hidden_dim
    return nn.Sequential(*layers, nn.Linear(width, projection_dim))


class ProtoCLIPOutput(NamedTuple):
    image_features: Tensor  # (B, E) norm(z_I)
    text_features: Tensor  # (B, E) norm(z_T)
    image_projected: Tensor | None  # (B, P) h_I = norm(g_I(z_I)); None without heads
    text_projected: Tensor | None  # (B, P) h_T = norm(g_T(z_T)); None without heads
    logit_scale: Tensor  # () exp(s)
    logit_scale_proto: Tensor | None  # () exp(s_p); None without heads


class ProtoCLIP(open_clip.CLIP):
    """An open_clip CLIP with two projection heads and a prototype temperature (U:open_clip/model.py:326-531).

    Attribute names are upstream's, so that its checkpoints load strictly; the towers alone load into open_clip.
    `heads=False` is the CLIP baseline without heads; the same seed gives the same initial towers.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict,
        text_cfg: dict,
        quick_gelu: bool = True,
        heads: bool = True,
        hidden_dim: int = 2048,
        projection_dim: int = 128,
        num_layers: int = 1,
    ):
        super().__init__(embed_dim, vision_cfg, text_cfg, quick_gelu=quick_gelu)
        self.quick_gelu = quick_gelu
        self.text_projection_head = self.image_projection_head = self.logit_scale_proto = None
        if heads:
            self.text_projection_head = projection_head(embed_dim, hidden_dim, projection_dim, num_layers)
            self.image_projection_head = copy.deepcopy(self.text_projection_head)  # both start equal: U:...:434
            self.logit_scale_proto = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return clip.encode_text(self, text, normalize)  # open_clip's, without padding

    def forward(self, image: Tensor, text: Tensor) -> ProtoCLIPOutput:
        """image (B, 3, S, S) float, text (B, L) int64 -> ProtoCLIPOutput, features in fp32 even under autocast."""
        z_image, z_text = self.encode_image(image), self.encode_text(text)
        h_image = h_text = scale_proto = None
        if self.logit_scale_proto is not None:  # the heads see the *unnormalised* embeddings
            h_image = F.normalize(self.image_projection_head(z_image).float(), dim=-1)
            h_text = F.normalize(self.text_projection_head(z_text).float(), dim=-1)
            scale_proto = self.logit_scale_proto.exp()
        z_image, z_text = F.normalize(z_image.float(), dim=-1), F.normalize(z_text.float(), dim=-1)
        return ProtoCLIPOutput(z_image, z_text, h_image, h_text, self.logit_scale.exp(), scale_proto)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp both temperatures to [1/100, 1]; called after every optimizer step (U:training/train.py:206)."""
        for scale in (self.logit_scale, self.logit_scale_proto):
            if scale is not None:
                scale.clamp_(0, math.log(100))


def create_model(
    name: str,
    heads: bool = True,
    hidden_dim: int = 2048,
    projection_dim: int = 128,
    num_layers: int = 1,
    image_size: int | None = None,
    quick_gelu: bool | None = None,
) -> ProtoCLIP:
    """A ProtoCLIP with the towers of an open_clip config (`open_clip.list_models()`), randomly initialised.

    If `quick_gelu` is None, QuickGELU is forced on, RN50 included, whatever the config says (as upstream,
    U:open_clip/model.py:347); only with a timm image tower the text tower keeps GELU (:359). UserError for a config
    with a custom text tower.
    """
    config = clip.open_clip_config(name)
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "hf_model_name" in text or config.get("custom_text"):
        raise UserError(f"model {name!r} has a custom text tower; ProtoCLIP needs open_clip's plain CLIP text tower")
    if image_size is not None:
        vision["image_size"] = image_size
    quick_gelu = "timm_model_name" not in vision if quick_gelu is None else quick_gelu
    model = ProtoCLIP(config["embed_dim"], vision, text, quick_gelu, heads, hidden_dim, projection_dim, num_layers)
    clip.average_at_start(model)
    model.visual.image_mean, model.visual.image_std = clip.STATISTICS
    return model.to(memory_format=torch.channels_last)  # makes convolutions faster, ViTs are unaffected


def image_statistics(model: open_clip.CLIP) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel (values 0 to 1) for the normalisation of the model's images."""
    return model.visual.image_mean, model.visual.image_std


# ----------------------------------------------------------------------------------------------------------- losses


def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, gather: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """L_CLIP, symmetric InfoNCE over unit features (B, E) x (B, E) -> (). U:training/loss.py:84.

    `gather` collects the features of all ranks. With it, this rank's samples are classified among those of all ranks,
    and the mean over ranks is the loss of the global batch.
    """
    images, texts = (x if gather is None else gather(x) for x in (image_features, text_features))
    image_logits = logit_scale * image_features @ texts.T  # (B, R*B)
    text_logits = logit_scale * text_features @ images.T  # a separate product, to round as upstream
    labels = run.own_columns(image_features, gathered=gather is not None)
    return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def prototypical_loss(
    student_features: Tensor,
    student_prototypes: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    teacher_centroids: Tensor | None = None,
    target_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of L_Proto: classify student features h (B, P) among prototypes S (K, P). U:training/loss.py:114.

    logit_scale () is exp(s_p); labels y (B,) int64 are the teacher's cluster assignments. With `target_temperature`
    tau > 0 the target is soft, softmax(C[y] C^T / tau) over the teacher's own centroids C (K, P), which are then
    required; None or <= 0 means the hard label. Empty clusters are zero rows of `student_prototypes` and stay in the
    softmax with logit 0. Returns the loss () and, only to log, the percentage of samples that are given their label ().
    """
    logits = logit_scale * student_features @ student_prototypes.T  # (B, K)
    accuracy = 100 * (logits.detach().argmax(dim=1) == labels).float().mean()
    if target_temperature is None or target_temperature <= 0:
        return F.cross_entropy(logits, labels), accuracy
    if teacher_centroids is None:
        raise UserError("soft targets (target_temperature > 0) need teacher_centroids (K, P)")
    targets = (teacher_centroids[labels] @ teacher_centroids.T / target_temperature).softmax(dim=1)
    return F.cross_entropy(logits, targets), accuracy


def protoclip_loss(
    output: ProtoCLIPOutput,
    index: Tensor,
    prototypes: "Prototypes | None",
    weights: tuple[float, float] = (1, 1),
    target_temperature: float = 0.01,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """L = L_CLIP + w_proto/2 (L_{I->T} + L_{T->I}) + w_external/2 (L_{I->X} + L_{T->X}). U:training/train.py:123-186.

    I, T, X: image, text, external teacher. L_{I->T} is the `prototypical_loss` of images among text clusters.

    index (B,) int64 are the samples' positions in the episode, which select their pseudo-labels. With `gather`,
    `output` and the loss are those of this rank's samples; see `clip_loss`. Returns `loss`, its unweighted terms
    `clip`, `proto`, `external`, and `accuracy_*` in percent. Prototypical terms of weight 0 are not computed; their
    inputs then get zero gradients, as upstream (and as DistributedDataParallel needs).
    """
    w_proto, w_external = weights
    h_image, h_text, scale = output.image_projected, output.text_projected, output.logit_scale_proto
    p, zero = prototypes, output.logit_scale.new_zeros(())
    clip_term = clip_loss(output.image_features, output.text_features, output.logit_scale, gather)
    losses = {"clip": clip_term, "proto": zero, "external": zero}

    if w_proto != 0 and p is not None:
        image_labels, text_labels = p.image_labels[index], p.text_labels[index]
        # The prototypes for each student: with PBT in its own space, without it the other modality's centroids.
        for_image = p.text if p.image_from_text is None else p.image_from_text
        for_text = p.image if p.text_from_image is None else p.text_from_image
        image, image_accuracy = prototypical_loss(h_image, for_image, scale, text_labels, p.text, target_temperature)
        text, text_accuracy = prototypical_loss(h_text, for_text, scale, image_labels, p.image, target_temperature)
        losses["proto"] = 0.5 * (image + text)
        losses |= {"accuracy_image_to_text": image_accuracy, "accuracy_text_to_image": text_accuracy}

    if w_external != 0 and p is not None and p.external_labels is not None:
        labels = p.external_labels[index]  # always hard
        image, image_accuracy = prototypical_loss(h_image, p.image_from_external, scale, labels)
        text, text_accuracy = prototypical_loss(h_text, p.text_from_external, scale, labels)
        losses["external"] = 0.5 * (image + text)
        losses |= {"accuracy_image_to_external": image_accuracy, "accuracy_text_to_external": text_accuracy}

    loss = clip_term + w_proto * losses["proto"] + w_external * losses["external"]
    if scale is not None:
        loss = loss + 0.0 * (h_image.sum() + h_text.sum() + scale)
    return {"loss": loss, **losses}


def divide_gradient(output: ProtoCLIPOutput, world_size: int) -> ProtoCLIPOutput:
    """The same output, with the gradient of its features divided by the number of ranks.

    Gradients then equal those of upstream, which gathers features without gradient to other ranks' features
    (U:training/loss.py:47-56): the encoders' are R times smaller than the global batch's, the temperatures' are not.
    """

    def divided(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim != 2 else x.detach() + (x - x.detach()) / world_size

    return ProtoCLIPOutput(*map(divided, output))


# ------------------------------------------------------------------------------------- prototypes of one episode


class Prototypes(NamedTuple):
    """Pseudo-labels and prototypes of one episode; constants without gradient."""

    image_labels: Tensor  # (N,) int64 clusters of h_I
    text_labels: Tensor  # (N,) int64 clusters of h_T
    image: Tensor  # (K, P) K-means centroids of h_I
    text: Tensor  # (K, P) K-means centroids of h_T
    image_from_text: Tensor | None = None  # (K, P) means of h_I over the text clusters
    text_from_image: Tensor | None = None  # (K, P) means of h_T over the image clusters
    external_labels: Tensor | None = None  # (N,) int64 clusters of the external teacher
    image_from_external: Tensor | None = None  # (K, P) means of h_I over the external teacher's clusters
    text_from_external: Tensor | None = None  # (K, P) means of h_T over the external teacher's clusters

    def to(self, device: torch.device) -> "Prototypes":
        return Prototypes(*(x if x is None else x.to(device) for x in self))


def kmeans(features: Tensor, k: int, niter: int = 20, nredo: int = 3, seed: int = 1234) -> tuple[Tensor, Tensor]:
    """faiss K-means of (N, D) -> labels (N,) int64, centroids (k, D) float32. U:training/clustering.py:123.

    Euclidean, not spherical: centroids of unit vectors are plain means, not normalised again. Best of `nredo` runs.
    faiss trains on at most 256 * k of the N samples. UserError if N < k.
    """
    x = features.detach().float().cpu().contiguous().numpy()
    if len(x) < k:
        raise UserError(f"K-means of {k} prototypes needs at least {k} samples, the episode has {len(x)}")
    gpu = getattr(faiss, "get_num_gpus", int)() > 0  # with faiss-gpu, as upstream
    clustering = faiss.Kmeans(x.shape[1], k, niter=niter, nredo=nredo, seed=seed, gpu=gpu, min_points_per_centroid=1)
    threads = faiss.omp_get_max_threads()
    # torchrun gives each process one thread, but K-means runs on rank 0 alone; one process keeps to its own threads,
    # since more of them than free cores wait for each other
    faiss.omp_set_num_threads(run.cores() if torch.distributed.is_initialized() else torch.get_num_threads())
    try:
        clustering.train(x)
        _, labels = clustering.index.search(x, 1)
    finally:
        faiss.omp_set_num_threads(threads)  # torch may share faiss' threads
    return torch.from_numpy(labels[:, 0]), torch.from_numpy(clustering.centroids)


def kmeans_error(features: Tensor, labels: Tensor, centroids: Tensor) -> float:
    """Mean squared distance of features (N, D) to their centroids (k, D). U:training/clustering.py:145 logs its sum."""
    return (features - centroids[labels]).square().sum(dim=1).mean().item()


def prototypical_back_translation(features: Tensor, labels: Tensor, k: int) -> Tensor:
    """PBT: mean of the student's features (N, P) over each of the teacher's k clusters -> (k, P).

    Source: U:training/clustering.py:153. Means are not normalised again; empty clusters are zero rows. Labels beyond
    the N features are ignored. Sums are in fp64; features are converted in blocks, since converting all of them at once
    would take longer than the sums.
    """
    labels = labels[: len(features)]
    sums = features.new_zeros(k, features.shape[1], dtype=torch.double)
    for block, clusters in zip(features.split(4096), labels.split(4096), strict=True):
        sums.index_add_(0, clusters, block.double())
    return (sums / torch.bincount(labels, minlength=k).clamp(min=1)[:, None]).to(features.dtype)


def build_prototypes(
    image_projected: Tensor,
    text_projected: Tensor,
    k: int,
    external: Tensor | None = None,
    back_translate: bool = True,
    niter: int = 20,
    nredo: int = 3,
) -> Prototypes:
    """Prototypes of one episode from its cached features h_I, h_T (N, P) and the external teacher's (N, X).

    Source: U:training/main.py:371-431, U:training/clustering.py:105-121. NaN features are set to 0. UserError if
    N < k, or if an external teacher is used without back translation.
    """
    if external is not None and not back_translate:
        raise UserError("an external teacher needs back_translate=True: its centroids are not in the student's space")
    h_image = torch.where(image_projected.isnan(), 0.0, image_projected)
    h_text = torch.where(text_projected.isnan(), 0.0, text_projected)
    image_labels, image = kmeans(h_image, k, niter, nredo)
    text_labels, text = kmeans(h_text, k, niter, nredo)
    prototypes = Prototypes(image_labels, text_labels, image, text)
    if back_translate:
        prototypes = prototypes._replace(
            image_from_text=prototypical_back_translation(h_image, text_labels, k),
            text_from_image=prototypical_back_translation(h_text, image_labels, k),
        )
    if external is not None:
        labels, _ = kmeans(external, k, niter, nredo)
        prototypes = prototypes._replace(
            external_labels=labels,
            image_from_external=prototypical_back_translation(h_image, labels, k),
            text_from_external=prototypical_back_translation(h_text, labels, k),
        )
    return prototypes
