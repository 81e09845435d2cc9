"""Tiny Hugging Face text models and tokenizers, made offline."""

import json
from pathlib import Path
from typing import Any

import torch
from clip_models import ModelConfig
from clip_models.config import TextConfig, VisionConfig
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    BertConfig,
    BertTokenizer,
    M2M100Config,
    MT5Config,
    NllbTokenizer,
    PretrainedConfig,
    RobertaConfig,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

CORPUS = [
    "a cat sits on the mat",
    "Two dogs on a beach, at sunset!",
    "Zürich, 北京 and a naïve café",
    "it's 1234 miles; <b>bold</b> & free",
]
TEXTS = [
    "",
    "a cat",
    "  Two DOGS\n on_a   beach!  ",
    "Zürich &amp; 北京, 😀 «naïve» cafÃ©",
    "sits on the mat " * 30,
    "it's <s> special </s> [SEP] <pad>",
]
BERT_LIKE = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
POOLERS = ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler", "max_pooler"]
KINDS = ["roberta", "bert", "xlm-roberta", "mt5", "m2m_100"]


def _bpe(specials: list[str], metaspace: bool) -> tuple[dict[str, int], list[str]]:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel()
    backend.pre_tokenizer = split
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _unigram(specials: list[str]) -> list[tuple[str, float]]:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]


def _wordpiece() -> dict[str, int]:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    return backend.get_vocab()


def make_tokenizer(kind: str) -> Any:
    """As the hub has it for models of this kind: transformers' own class over a trained model."""
    roberta = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "roberta":
        vocab, merges = _bpe(roberta, metaspace=False)
        return RobertaTokenizer(vocab=vocab, merges=merges)
    if kind == "bert":
        return BertTokenizer(vocab=_wordpiece())
    if kind == "xlm-roberta":
        return XLMRobertaTokenizer(vocab=_unigram(roberta))
    if kind == "m2m_100":
        vocab, merges = _bpe([*roberta, "eng_Latn", "deu_Latn"], metaspace=True)
        return NllbTokenizer(
            vocab=vocab,
            merges=merges,
            src_lang="eng_Latn",
            additional_special_tokens=["eng_Latn", "deu_Latn"],
        )
    return T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0)


def make_config(kind: str, vocab_size: int) -> PretrainedConfig:
    if kind == "mt5":
        return MT5Config(
            vocab_size=vocab_size, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=2
        )
    if kind == "m2m_100":
        return M2M100Config(
            vocab_size=vocab_size,
            d_model=32,
            encoder_layers=3,
            encoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=48,
        )
    config = {"roberta": RobertaConfig, "bert": BertConfig, "xlm-roberta": XLMRobertaConfig}[kind]
    return config(vocab_size=vocab_size, hidden_size=32, max_position_embeddings=44, **BERT_LIKE)


def make_text_model(kind: str, path: Path, weights: bool = True) -> Path:
    """A directory as the hub has it: config.json, tokenizer files, weights in safetensors."""
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(path)
    config = make_config(kind, len(tokenizer))
    if not weights:
        config.save_pretrained(path)
        return path
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def clip_config(name: Path | str, **text: Any) -> ModelConfig:
    """A small image tower, and the text model and tokenizer that `name` stands for."""
    values = {"hf_model_name": str(name), "hf_tokenizer_name": str(name), "context_length": 24}
    vision = VisionConfig(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    return ModelConfig(16, vision, TextConfig(**(values | text)))
