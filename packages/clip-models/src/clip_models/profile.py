"""Parameters and multiply-accumulates of a model, in closed form from its configuration."""

# w width, m MLP width, n tokens of a sequence, E embedding

from typing import Any

from clip_models.config import ModelConfig


def profile(config: ModelConfig) -> dict[str, Any]:
    """Parameters and GMACs (1e9 multiply-accumulates of one forward pass of one pair).

    The formula of the scaling-law study (2212.07143, Table 24, within 0.3%). A timm tower has no
    closed form: its figures, and the totals, are None.
    """
    vision, text = config.vision_cfg, config.text_cfg
    embed = config.embed_dim

    w, m = text.width, int(text.width * text.mlp_ratio)
    n = text.context_length
    text_parameters = _blocks(text.layers, w, m) + (text.vocab_size + n) * w + 2 * w + w * embed
    text_macs = _block_macs(text.layers, n, w, m) + w * embed

    figures: dict[str, Any] = {"image_size": vision.image_size, "embed_dim": embed}
    image_parameters = image_macs = parameters = macs = None
    if vision.timm_model_name is None:
        w, m = vision.width, int(vision.width * vision.mlp_ratio)
        patches = (vision.image_size // vision.patch_size) ** 2
        patch_weights = 3 * vision.patch_size**2 * w
        n = patches + 1
        # patch embedding, class token, positions, two norms, projection
        image_parameters = (
            _blocks(vision.layers, w, m) + patch_weights + w + n * w + 4 * w + w * embed
        )
        image_macs = _block_macs(vision.layers, n, w, m) + patches * patch_weights + w * embed
        scalars = 1 if config.init_logit_bias is None else 2
        parameters = image_parameters + text_parameters + scalars
        macs = image_macs + text_macs
    return {
        **figures,
        "parameters": parameters,
        "image_parameters": image_parameters,
        "text_parameters": text_parameters,
        "gmacs": _giga(macs),
        "image_gmacs": _giga(image_macs),
        "text_gmacs": _giga(text_macs),
    }


def _blocks(layers: int, w: int, m: int) -> int:
    """Attention (4 w^2 + 4 w), MLP (2 w m + m + w) and two norms (4 w), in each layer."""
    return layers * (4 * w * w + 4 * w + 2 * w * m + m + w + 4 * w)


def _block_macs(layers: int, n: int, w: int, m: int) -> int:
    return layers * (n * (4 * w * w + 2 * w * m) + 2 * n * n * w)


def _giga(macs: int | None) -> float | None:
    return None if macs is None else round(macs / 1e9, 4)
