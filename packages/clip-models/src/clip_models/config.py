"""open_clip's `model_cfg` and `preprocess_cfg`, read strictly.

A field that open_clip does not have is an error; so is a field of open_clip's that changes the
network in a way these towers do not offer. Nothing is guessed or dropped.
"""

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from clip_models.errors import ModelError

_T = TypeVar("_T")

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Fields of open_clip that are read only at the value named: they choose parts we do not build.
_FIXED_VISION: dict[str, Any] = {
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "pos_embed_type": "learnable",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}
_FIXED_TEXT: dict[str, Any] = {
    "tokenizer_mode": None,
    "embed_cls": False,
    "pad_id": 0,
    "final_ln_after_pool": False,
    "output_tokens": False,
}
# Fields that say where open_clip gets first weights from: a model directory has its own.
_IGNORED = {"timm_model_pretrained"}
_FIXED_BLOCK: dict[str, Any] = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def _read(cls: type[_T], values: dict[str, Any], fixed: dict[str, Any], where: str) -> _T:
    """`cls(**values)` after refusing unknown, unsupported and missing fields by name."""
    known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    taken: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            taken[name] = value
        elif name in _IGNORED:
            continue
        elif name not in fixed:
            raise ModelError(f"{where}: unknown field {name!r}; known: {', '.join(sorted(known))}")
        elif value != fixed[name]:
            raise ModelError(
                f"{where}: {name} = {value!r} is not supported, only {fixed[name]!r}; "
                "open this model in open_clip"
            )
    for f in fields(cls):  # pyright: ignore[reportArgumentType]
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in taken:
            raise ModelError(f"{where}: field {f.name!r} is missing")
    return cls(**taken)


@dataclass(frozen=True)
class VisionConfig:
    """open_clip's `vision_cfg`.

    A timm model if `timm_model_name`, OpenAI's ResNet if `layers` lists four stages, else a vision
    transformer.
    """

    image_size: int = 224
    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | None = 16  # None: a ResNet has none
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    timm_model_name: str | None = None
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):  # as JSON has it
            object.__setattr__(self, "layers", tuple(self.layers))
        size: Any = self.image_size
        if not isinstance(size, int):
            raise ModelError(
                f"vision_cfg: image_size = {size!r} is not supported, only one integer; "
                "open this model in open_clip"
            )
        if self.timm_model_name is not None:
            return
        if isinstance(self.layers, tuple):
            if len(self.layers) != 4:
                raise ModelError(f"vision_cfg: layers {self.layers}; a ResNet has four stages")
            return
        if not isinstance(self.patch_size, int):
            raise ModelError(f"vision_cfg: patch_size = {self.patch_size!r}; it must be an integer")
        if self.pool_type not in ("tok", "avg"):
            raise ModelError(f"vision_cfg: pool_type {self.pool_type!r}; known: tok, avg")
        if self.width % self.head_width or self.image_size < self.patch_size:
            raise ModelError(
                f"vision_cfg: width {self.width} must be a multiple of head_width "
                f"{self.head_width}, and image_size {self.image_size} at least patch_size "
                f"{self.patch_size}"
            )


@dataclass(frozen=True)
class TextConfig:
    """open_clip's `text_cfg`.

    A Hugging Face model if `hf_model_name`, else CLIP's text transformer, causal unless
    `no_causal_mask` (SigLIP). `hf_tokenizer_name` replaces CLIP's tokenizer under either.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    no_causal_mask: bool = False
    pool_type: str = "argmax"
    eos_id: int = 2
    proj_type: str = "linear"
    proj_bias: bool = False
    act_kwargs: dict[str, Any] | None = None
    norm_kwargs: dict[str, Any] | None = None
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str | None = "mlp"
    hf_pooler_type: str = "mean_pooler"
    hf_tokenizer_name: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.hf_model_name is not None:
            if self.hf_proj_type not in ("mlp", "linear", None):
                raise ModelError(
                    f"text_cfg: hf_proj_type {self.hf_proj_type!r}; known: mlp, linear"
                )
            return
        if self.width % self.heads:
            raise ModelError(
                f"text_cfg: width {self.width} must be a multiple of heads {self.heads}"
            )
        if self.pool_type not in ("argmax", "eos", "first", "last"):
            raise ModelError(
                f"text_cfg: pool_type {self.pool_type!r}; known: argmax, eos, first, last"
            )
        if self.proj_type not in ("linear", "none"):
            raise ModelError(f"text_cfg: proj_type {self.proj_type!r}; known: linear, none")
        if self.act_kwargs not in (None, {}, {"approximate": "none"}, {"approximate": "tanh"}):
            raise ModelError(f"text_cfg: act_kwargs {self.act_kwargs!r}; known: approximate: tanh")
        if not (self.norm_kwargs or {}).keys() <= {"eps"}:
            raise ModelError(f"text_cfg: norm_kwargs {self.norm_kwargs!r}; known: eps")


@dataclass(frozen=True)
class ModelConfig:
    """open_clip's `model_cfg`.

    Attributes:
        embed_dim: E, the width both towers project to.
        quick_gelu: OpenAI's activation; needed by OpenAI's weights, wrong for LAION's.
        custom_text: the text tower's names start with `text.` (open_clip's CustomTextCLIP).
        init_logit_scale: the log of the logit scale at the start, ln(1 / 0.07).
        init_logit_bias: start of SigLIP's logit bias; None: no bias.
    """

    embed_dim: int
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None

    @property
    def text_prefixed(self) -> bool:
        """Whether the file holds the text tower under `text.`, not at the top level."""
        return self.custom_text or self.text_cfg.hf_model_name is not None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a `model_cfg`.

        Raises:
            ModelError: an unknown, unsupported or missing field, by name.
        """
        values = dict(values)
        towers: tuple[tuple[str, Any, dict[str, Any]], ...] = (
            ("vision_cfg", VisionConfig, _FIXED_VISION | _FIXED_BLOCK),
            ("text_cfg", TextConfig, _FIXED_TEXT | _FIXED_BLOCK),
        )
        for name, tower, fixed in towers:
            if not isinstance(values.get(name), dict):
                raise ModelError(f"model_cfg: field {name!r} is missing or is not a table")
            values[name] = _read(tower, values[name], fixed, name)
        return _read(cls, values, {"nonscalar_logit_scale": False}, "model_cfg")

    def to_dict(self) -> dict[str, Any]:
        """The `model_cfg` as open_clip reads it; fields at open_clip's own defaults stay out."""
        values = asdict(self)
        for table, default in (
            (values, ModelConfig(self.embed_dim)),
            (values["vision_cfg"], VisionConfig()),
            (values["text_cfg"], TextConfig()),
        ):
            for f in fields(default):
                if f.name not in _ALWAYS and table[f.name] == getattr(default, f.name):
                    del table[f.name]
        if self.vision_cfg.timm_model_name is not None:
            for name in ("layers", "width", "head_width", "mlp_ratio", "patch_size"):
                del values["vision_cfg"][name]
        if self.text_cfg.hf_model_name is not None:
            for name in ("vocab_size", "width", "heads", "layers", "mlp_ratio"):
                del values["text_cfg"][name]
        return values


# Written always; others only where they differ from the default, as the published configs do.
_ALWAYS = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "image_size",
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "context_length",
    "vocab_size",
    "heads",
}


@dataclass(frozen=True)
class PreprocessConfig:
    """open_clip's `preprocess_cfg`, less `size`, which is the tower's own."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a `preprocess_cfg`.

        Raises:
            ModelError: an unknown or unsupported field or value, by name.
        """
        values = {k: v for k, v in values.items() if k != "size" and v is not None}
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(float(v) for v in values[name])
        return _read(cls, values, {"mode": "RGB", "fill_color": 0}, "preprocess_cfg")

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear", "random"):
            raise ModelError(
                f"preprocess_cfg: interpolation {self.interpolation!r}; known: bicubic, bilinear"
            )
        if self.resize_mode not in ("shortest", "squash", "longest"):
            raise ModelError(
                f"preprocess_cfg: resize_mode {self.resize_mode!r}; "
                "known: shortest, longest, squash"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ModelError("preprocess_cfg: mean and std need three values each, one a channel")
