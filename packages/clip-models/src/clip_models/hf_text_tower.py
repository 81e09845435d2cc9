"""A Hugging Face text model as text tower, with the pooling, projection and names of open_clip's.

Only transformers' own model classes are built: code that comes with a model is never run.
"""

# B batch, L context length, W width of the model, E embedding

import inspect
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from clip_models.config import TextConfig
from clip_models.eager import eager
from clip_models.errors import ModelError
from clip_models.hf_tokenizer import reason_of

_POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
# what transformers raises for a name that is not there, a broken file or an absurd value
_FAILURES = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


class HFTextTower(nn.Module):
    """open_clip's HFTextEncoder: a model of transformers, a pooling and a projection.

    Of an encoder-decoder the encoder is taken.

    Attributes:
        config: open_clip's `text_cfg`.
        hf_config: the model's own configuration, which goes into the model directory.
        fast: cut the columns that are padding in every caption of a batch; they are masked out
            everywhere, so the result is the same. Off in tests that compare.
    """

    def __init__(
        self, config: TextConfig, embed_dim: int, hf_config: PretrainedConfig | None = None
    ) -> None:
        """Random weights where `hf_config` is given, else what `config.hf_model_name` stands for.

        That is a local directory, a model in the hub's cache or one on the hub; its weights too are
        taken unless `hf_model_pretrained` is false.

        Raises:
            ModelError: no such model or weights, or one that this tower has no use for.
        """
        super().__init__()
        if config.hf_pooler_type not in _POOLERS:
            raise ModelError(
                f"text_cfg: hf_pooler_type {config.hf_pooler_type!r}; known: {', '.join(_POOLERS)}"
            )
        self.config = config
        self.fast = True
        self.hf_config: Any = hf_config or read_hf_config(cast(str, config.hf_model_name))
        self.transformer: Any = _transformer(
            config, self.hf_config, pretrained=hf_config is None and config.hf_model_pretrained
        )
        self.proj = _projection(config, self.hf_config.hidden_size, embed_dim)

    def features(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, <= L], padded as the model's tokenizer does -> [B, W], pooled.

        Tokens may stay on the CPU: cutting the padding then needs no wait for the GPU.
        """
        padding = self.hf_config.pad_token_id
        if self.fast:
            tokens_BL = _cut(tokens_BL, padding)
        tokens_BL = tokens_BL.to(self.transformer.device, non_blocking=True)
        mask_BL = (tokens_BL != padding).long()
        output = self.transformer(input_ids=tokens_BL, attention_mask=mask_BL)
        x_BLW, mask_BL1 = output.last_hidden_state, mask_BL.unsqueeze(-1)
        match self.config.hf_pooler_type:
            case "mean_pooler":
                return (x_BLW * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
            case "max_pooler":
                # open_clip fills where the mask is set, and with a mask that torch refuses; meant
                # is the maximum over what is no padding
                return x_BLW.masked_fill(mask_BL1 == 0, -torch.inf).amax(dim=1)
            case "cls_pooler" if getattr(output, "pooler_output", None) is not None:
                return output.pooler_output
            case _:
                return x_BLW[:, 0]

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Token ids [B, <= L], padded as the model's tokenizer does -> [B, E]"""
        return self.proj(self.features(tokens_BL))

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze the model, or only its embeddings and all but its last layers.

        The projection stays free.
        """
        if not unlocked_layers:
            self.transformer.requires_grad_(False)
            return
        encoder = getattr(self.transformer, "encoder", self.transformer)
        layers = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList))
        embeddings = getattr(self.transformer, "embeddings", None)
        first = self.transformer.get_input_embeddings() if embeddings is None else embeddings
        for module in [first, *layers][:-unlocked_layers]:
            module.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        if enable:
            self.transformer.activation_checkpointing_enable()
        else:
            self.transformer.activation_checkpointing_disable()


def read_hf_config(source: str | Path) -> PretrainedConfig:
    """The configuration of a text model: `source` is a directory with config.json or a hub's name.

    Raises:
        ModelError: nothing there, broken, of an unknown kind, or one that asks for its own code.
    """
    hf_config: Any = None
    try:
        values, _ = PretrainedConfig.get_config_dict(source)
        if "auto_map" not in values:
            hf_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _FAILURES as error:
        raise ModelError(
            f"Hugging Face text model {str(source)!r} cannot be read: {reason_of(error)}"
        ) from error
    if hf_config is None:
        raise ModelError(
            f"{source}: its config.json asks for code of its own (auto_map), which is never run; "
            "only the model types of transformers itself can be a text tower"
        )
    for name in ("hidden_size", "pad_token_id"):
        if getattr(hf_config, name, None) is None:
            raise ModelError(
                f"{source}: a {hf_config.model_type} model with no {name} in its config.json "
                "cannot be a text tower"
            )
    return hf_config


def _transformer(config: TextConfig, hf_config: Any, pretrained: bool) -> nn.Module:
    name = cast(str, config.hf_model_name)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "trust_remote_code": False,
        "attn_implementation": None,  # torch's own: a config.json can name one to download
    }
    model_class = MODEL_MAPPING.get(type(hf_config), None)
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = config.hf_pooler_type == "cls_pooler"
    try:
        if pretrained:
            model = _pretrained(name, hf_config, options)
        elif torch.get_default_device().type == "meta":
            # about to be filled from a file: no random numbers, but the buffers that no file has
            # are computed; memory that nothing wrote to costs nothing
            with torch.device("cpu"), no_init_weights():
                model = AutoModel.from_config(hf_config, **options)
        else:
            model = AutoModel.from_config(hf_config, **options)
    except _FAILURES as error:
        raise ModelError(
            f"Hugging Face text model {name!r} cannot be built: {reason_of(error)}"
            + ('; for random weights: "hf_model_pretrained": false' if pretrained else "")
        ) from error
    return model.encoder if hf_config.is_encoder_decoder else model


def _pretrained(name: str, hf_config: Any, options: dict[str, Any]) -> Any:
    # otherwise transformers asks a service on the hub to convert what is not in safetensors
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    model, info = AutoModel.from_pretrained(
        name, config=hf_config, use_safetensors=True, output_loading_info=True, **options
    )
    # a pooler is what language models are published without
    if missing := sorted(n for n in info["missing_keys"] if not n.startswith("pooler.")):
        raise ValueError(f"its weights lack {', '.join(missing[:4])}")
    return model


def _projection(config: TextConfig, width: int, embed_dim: int) -> nn.Module:
    match config.hf_proj_type:
        case "linear":
            return nn.Linear(width, embed_dim, bias=False)
        case "mlp":
            hidden = (width + embed_dim) // 2
            return nn.Sequential(
                nn.Linear(width, hidden, bias=False),
                nn.GELU(),
                nn.Linear(hidden, embed_dim, bias=False),
            )
        case _:
            if width != embed_dim:
                raise ModelError(
                    f"text_cfg: hf_proj_type null needs a text model of width {embed_dim} "
                    f"(embed_dim), this one has {width}; take linear or mlp"
                )
            return nn.Identity()


@eager
def _cut(tokens_BL: Tensor, padding: int) -> Tensor:
    """Without the last columns that are padding in every row.

    Unless a row is padding and nothing else: then all of it is attended to.
    """
    kept_BL = tokens_BL != padding
    if not kept_BL.any(dim=1).all():
        return tokens_BL
    return tokens_BL[:, : tokens_BL.shape[1] - int(kept_BL.any(dim=0).flip(0).long().argmax())]
