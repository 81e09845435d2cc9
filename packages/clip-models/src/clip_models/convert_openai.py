"""The architecture of OpenAI's CLIP models, told from their weights' shapes."""

import re

from torch import Tensor

from clip_models.config import ModelConfig, TextConfig, VisionConfig
from clip_models.errors import ModelError

# Scalars among the weights of OpenAI's archives, and of state dicts made from them.
MARKS = ("input_resolution", "context_length", "vocab_size")


def openai_config(weights: dict[str, Tensor]) -> ModelConfig:
    """Towers whose weights, by their names in memory, these are: a ViT or a ModifiedResNet.

    Heads are 64 wide and the activation is QuickGELU in all of OpenAI's models; shapes do not tell
    either. Source: OpenAI's `build_model`.

    Raises:
        ModelError: weights are missing or of shapes that no such model has.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != dimensions:
            raise ModelError(f"no weights of OpenAI's: {name} is missing or mis-shaped")
        return tuple(weights[name].shape)

    def blocks(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in weights) if m})

    width, embed_dim = shape("text.text_projection", 2)
    text = TextConfig(
        context_length=shape("text.positional_embedding", 2)[0],
        vocab_size=shape("text.token_embedding.weight", 2)[0],
        width=width,
        heads=max(1, width // 64),
        layers=blocks(r"text\.transformer\.resblocks\.(\d+)\."),
    )
    if "visual.proj" in weights:
        width, _, patch, _ = shape("visual.conv1.weight", 4)
        grid = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
        vision = VisionConfig(
            image_size=patch * grid,
            layers=blocks(r"visual\.transformer\.resblocks\.(\d+)\."),
            width=width,
            patch_size=patch,
        )
    else:
        grid = round((shape("visual.attnpool.positional_embedding", 2)[0] - 1) ** 0.5)
        vision = VisionConfig(
            image_size=32 * grid,
            layers=tuple(blocks(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
            width=shape("visual.layer1.0.conv1.weight", 4)[0],
            patch_size=None,
        )
    return ModelConfig(embed_dim, vision, text, quick_gelu=True)
