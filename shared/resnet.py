"""A small residual network for small corpora, registered with timm so that open_clip configs can name it.

Plain blocks of two 3x3 convolutions: on a CPU they do more in the same time than the bottlenecks of open_clip's
ModifiedResNet, whose 1x1 convolutions wait for memory.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

SIZE = 32  # pixels; any multiple of 16 will do
ARCHITECTURE = ByoModelCfg(
    blocks=tuple(ByoBlockCfg(type="basic", d=1, c=width, s=2, gs=0, br=1.0) for width in (64, 128, 256)),
    stem_chs=32,
    stem_type="3x3",
    stem_pool="",
)
default_cfgs = generate_default_cfgs(
    {
        "resnet7_small": {
            "input_size": (3, SIZE, SIZE),
            "pool_size": (2, 2),
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        }
    }
)


@register_model
def resnet7_small(pretrained: bool = False, **options) -> ByobNet:
    """Stem of 32 channels, then blocks of 64, 128 and 256, each halving the image: seven layers, 1.2 M parameters."""
    return build_model_with_cfg(
        ByobNet,
        "resnet7_small",
        pretrained,
        model_cfg=ARCHITECTURE,
        feature_cfg={"flatten_sequential": True},
        **options,
    )
