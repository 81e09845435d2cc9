"""Parameters and multiply-accumulates of a model, in closed form from its configuration."""

# w width, m MLP width, n tokens of a sequence, E embedding

from typing import Any, cast

from clip_models.config import ModelConfig, TextConfig, VisionConfig


def profile(config: ModelConfig) -> dict[str, Any]:
    """Parameters and GMACs (1e9 multiply-accumulates of one forward pass of one pair).

    The formula of the scaling-law study (2212.07143, Table 24, within 0.3%). A timm tower has no
    closed form, nor has a ResNet or a Hugging Face text model: their figures, and the totals, are
    None.
    """
    vision, text = config.vision_cfg, config.text_cfg
    image = text_figures = (None, None)
    if vision.timm_model_name is None and isinstance(vision.layers, int):
        image = _image_figures(vision, config.embed_dim)
    if text.hf_model_name is None:
        text_figures = _text_figures(text, config.embed_dim)
    parameters, macs = (
        None if a is None or b is None else a + b for a, b in zip(image, text_figures, strict=True)
    )
    scalars = 1 if config.init_logit_bias is None else 2
    return {
        "image_size": vision.image_size,
        "embed_dim": config.embed_dim,
        "parameters": None if parameters is None else parameters + scalars,
        "image_parameters": image[0],
        "text_parameters": text_figures[0],
        "gmacs": _giga(macs),
        "image_gmacs": _giga(image[1]),
        "text_gmacs": _giga(text_figures[1]),
    }


def _text_figures(text: TextConfig, embed: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of CLIP's text transformer."""
    w, m, n = text.width, int(text.width * text.mlp_ratio), text.context_length
    has_projection = text.proj_type == "linear"
    projection = w * embed if has_projection else 0
    bias = embed if has_projection and text.proj_bias else 0
    scales = 0 if text.ls_init_value is None else text.layers * 2 * w
    parameters = _blocks(text.layers, w, m) + (text.vocab_size + n) * w + 2 * w
    return parameters + scales + projection + bias, _block_macs(text.layers, n, w, m) + projection


def _image_figures(vision: VisionConfig, embed: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a vision transformer."""
    w, m = vision.width, int(vision.width * vision.mlp_ratio)
    layers, patch = cast(int, vision.layers), cast(int, vision.patch_size)
    patches = (vision.image_size // patch) ** 2
    patch_weights = 3 * patch**2 * w
    n = patches + 1
    # patch embedding, class token, positions, one or two norms, projection
    norms = 2 * w if vision.no_ln_pre else 4 * w
    scales = 0 if vision.ls_init_value is None else layers * 2 * w
    parameters = _blocks(layers, w, m) + patch_weights + w + n * w + norms + scales + w * embed
    return parameters, _block_macs(layers, n, w, m) + patches * patch_weights + w * embed


def _blocks(layers: int, w: int, m: int) -> int:
    """Attention (4 w^2 + 4 w), MLP (2 w m + m + w) and two norms (4 w), in each layer."""
    return layers * (4 * w * w + 4 * w + 2 * w * m + m + w + 4 * w)


def _block_macs(layers: int, n: int, w: int, m: int) -> int:
    return layers * (n * (4 * w * w + 2 * w * m) + 2 * n * n * w)


def _giga(macs: int | None) -> float | None:
    return None if macs is None else round(macs / 1e9, 4)
