"""Draft backbones, one module a model family: `DraftLayer`, `RMSNorm` and `RotaryEmbedding`.

A family whose layers have several streams a token also has a `StreamHead`; one that computes some of its parts in
float32, whatever the type of the head, names them in `KEPT_IN_FLOAT32`.
"""

from types import ModuleType

import transformers

from ..configuration_dspark import DSparkConfig
from . import gemma4, qwen3

BACKBONES = {"qwen3": qwen3, "gemma4": gemma4}


def backbone_of(config: DSparkConfig) -> ModuleType:
    """The module of `backbones` that the config names.

    Raises:
        ImportError: when the installed transformers does not have the model that its layers are of.
    """
    if config.backbone in BACKBONES:
        return BACKBONES[config.backbone]
    try:
        # Only where it is needed: not every release has the model, and no other head needs its code.
        from . import deepseek_v4
    except ImportError as error:
        raise ImportError(
            f"The head's stages are layers of DeepSeek V4, which transformers {transformers.__version__} does not "
            "have. Install a newer one."
        ) from error
    return deepseek_v4
