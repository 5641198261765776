"""A-CLIP's small model and training run, for its tests."""

import pytest
import torch
from scripts import SHARDS

from attentive_mask_clip.model import ACLIP, CLIP, SLIP


@pytest.fixture(autouse=True)
def attention_as_in_training():
    """Disable the flash attention kernel on the CPU, like `shared.run.setup`."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(before)


def boxes_in(height: int, width: int, count: int) -> torch.Tensor:
    """Random boxes (count, 4)."""
    tops, lefts = torch.randint(0, height - 1, (count,)), torch.randint(0, width - 1, (count,))
    heights = [int(torch.randint(1, height - top + 1, ())) for top in tops.tolist()]
    widths = [int(torch.randint(1, width - left + 1, ())) for left in lefts.tolist()]
    return torch.stack([tops, lefts, torch.tensor(heights), torch.tensor(widths)], dim=1)


SIZES = dict(
    embed_dim=12, image_size=16, patch_size=4, vision_width=16, vision_layers=2, vision_heads=2, context_length=6,
    vocab_size=30, text_width=16, text_heads=2, text_layers=1,
)  # fmt: skip


def tiny(method: str = "aclip", **settings) -> ACLIP | SLIP | CLIP:
    torch.manual_seed(0)
    ssl = {} if method == "clip" else dict(ssl_hidden=10, ssl_dim=8)
    return {"aclip": ACLIP, "slip": SLIP, "clip": CLIP}[method](**{**SIZES, **ssl, **settings})


def batch(B: int = 3, views: int = 2, side: int = 16, ema_side: int = 16) -> tuple[torch.Tensor, ...]:
    """views (V*B, 3, H, W), EMA view, tokens, boxes (B, V+1, 4); the EMA view is the whole 40 x 30 image."""
    torch.manual_seed(1)
    boxes = torch.stack([*(boxes_in(40, 30, B) for _ in range(views)), torch.tensor([[0, 0, 40, 30]]).expand(B, 4)])
    images, ema_view = torch.randn(views * B, 3, side, side), torch.randn(B, 3, ema_side, ema_side)
    return images, ema_view, torch.randint(1, 30, (B, 6)), boxes.transpose(0, 1)


TINY = f"""--model test --data {SHARDS}/00000.tar --dataset-size 96 --image-size 20 --epochs 3 --batch-size 32
    --warmup-epochs 1 --lr 1e-3 --precision fp32 --workers 0 --eval-every 0 --log-every 1""".split()
