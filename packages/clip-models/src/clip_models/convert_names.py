"""The weights' names of transformers' CLIPModel and SiglipModel beside ours.

A table maps one name of ours (in memory) to theirs; several of theirs are joined along the first
dimension, as our attention keeps query, key and value in one matrix.
"""

from pathlib import Path

import torch
from torch import Tensor

from clip_models.errors import ModelError
from clip_models.weights import name_faults

Names = dict[str, list[str]]

_NATIVE_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT = {
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    **{f"text.ln_final.{x}": f"text_model.final_layer_norm.{x}" for x in ("weight", "bias")},
}
# x @ P here, a Linear there
_TRANSPOSED = ("visual.proj", "text.text_projection")


def clip_names(vision_layers: int, text_layers: int) -> Names:
    """Names of a CLIPModel."""
    single = {
        **_TEXT,
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "text.text_projection": "text_projection.weight",
    }
    for x in ("weight", "bias"):
        single[f"visual.ln_pre.{x}"] = f"vision_model.pre_layrnorm.{x}"  # their spelling
        single[f"visual.ln_post.{x}"] = f"vision_model.post_layernorm.{x}"
    vision = _native_blocks("visual.transformer", "vision_model", vision_layers)
    return {ours: [theirs] for ours, theirs in single.items()} | vision | _text_blocks(text_layers)


def siglip_names(vision_layers: int, text_layers: int) -> Names:
    """Names of a SiglipModel with timm's tower; its pooling's matrix is split in `.q` and `.kv`."""
    embeddings, head, pool = (
        "vision_model.embeddings",
        "vision_model.head",
        "visual.trunk.attn_pool",
    )
    single = {
        **_TEXT,
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "visual.trunk.pos_embed": f"{embeddings}.position_embedding.weight",
        f"{pool}.latent": f"{head}.probe",
    }
    for x in ("weight", "bias"):
        single |= {
            f"visual.trunk.patch_embed.proj.{x}": f"{embeddings}.patch_embedding.{x}",
            f"visual.trunk.norm.{x}": f"vision_model.post_layernorm.{x}",
            f"{pool}.q.{x}": f"{head}.attention.in_proj_{x}.q",
            f"{pool}.kv.{x}": f"{head}.attention.in_proj_{x}.kv",
            f"{pool}.proj.{x}": f"{head}.attention.out_proj.{x}",
            f"{pool}.norm.{x}": f"{head}.layernorm.{x}",
            f"{pool}.mlp.fc1.{x}": f"{head}.mlp.fc1.{x}",
            f"{pool}.mlp.fc2.{x}": f"{head}.mlp.fc2.{x}",
            f"text.text_projection.{x}": f"text_model.head.{x}",
        }
    vision = _blocks("visual.trunk.blocks", "vision_model", vision_layers, _TIMM_BLOCK, "attn.qkv.")
    return {ours: [theirs] for ours, theirs in single.items()} | vision | _text_blocks(text_layers)


def split_pooling(found: dict[str, Tensor]) -> None:
    """Take SigLIP's pooling apart in query and the rest, as timm has it."""
    for x in ("weight", "bias"):
        name = f"vision_model.head.attention.in_proj_{x}"
        if name in found:
            joined = found.pop(name)
            width = joined.shape[0] // 3
            found[f"{name}.q"], found[f"{name}.kv"] = joined[:width], joined[width:]


def to_ours(found: dict[str, Tensor], names: Names, file: Path) -> dict[str, Tensor]:
    """Their weights, read from `file`, under our names.

    Raises:
        ModelError: a weight is missing or surplus, or query, key and value do not fit together.
    """
    found = {k: v for k, v in found.items() if not k.endswith(".position_ids")}  # old buffers
    expected = {theirs for several in names.values() for theirs in several}
    if faults := name_faults(expected, found):
        raise ModelError(f"{file} {'; '.join(faults)}: it and config.json are not of one model")
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        try:
            tensor = found[theirs[0]] if len(theirs) == 1 else torch.cat([found[n] for n in theirs])
        except RuntimeError as error:
            raise ModelError(f"{file}: {', '.join(theirs)} do not fit together") from error
        if ours == "visual.trunk.pos_embed":
            tensor = tensor.unsqueeze(0)
        weights[ours] = tensor.T if ours in _TRANSPOSED else tensor
    return weights


def to_theirs(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our weights under a CLIPModel's names."""
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor = state[ours].T if ours in _TRANSPOSED else state[ours]
        parts = [tensor] if len(theirs) == 1 else tensor.chunk(len(theirs))
        weights |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return weights


def _text_blocks(layers: int) -> Names:
    return _native_blocks("text.transformer", "text_model", layers)


def _native_blocks(ours: str, theirs: str, layers: int) -> Names:
    return _blocks(f"{ours}.resblocks", theirs, layers, _NATIVE_BLOCK, "attn.in_proj_")


def _blocks(ours: str, theirs: str, layers: int, block: dict[str, str], joined: str) -> Names:
    names: Names = {}
    for i in range(layers):
        here, there = f"{ours}.{i}", f"{theirs}.encoder.layers.{i}"
        for x in ("weight", "bias"):
            names |= {f"{here}.{a}.{x}": [f"{there}.{b}.{x}"] for a, b in block.items()}
            names[f"{here}.{joined}{x}"] = [f"{there}.self_attn.{p}_proj.{x}" for p in "qkv"]
    return names
