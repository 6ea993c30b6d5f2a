"""The models of `bench.prediction`: of many families, sizes that take a CPU core some 10 to 200 ms a step, none used for calibration.

Dropout is off. Batch sizes divide by 8, so that 4 ranks can split them and half the batch as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opweave import zoo_modules

Batch = dict[str, torch.Tensor]
Make = Callable[[], nn.Module]
MakeBatch = Callable[[nn.Module, int], Batch]
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model. make: a fresh one, the same each time. make_batch: a global batch of so many samples of its usual length."""

    name: str
    make: Make
    make_batch: MakeBatch
    batch_size: int


def _transformers(config: str, model: str, **kwargs: Any) -> Make:
    def make() -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
        return made

    return make


def _module(kind: type[nn.Module], **kwargs: Any) -> Make:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(**kwargs)

    return make


def _tokens(length: int, target: bool = False) -> MakeBatch:
    """target: an encoder-decoder's labels are another sequence."""

    def make(model: nn.Module, size: int) -> Batch:
        vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
        ids = torch.randint(3, vocabulary, (size, length))
        return {"input_ids": ids, "labels": torch.randint(3, vocabulary, (size, length)) if target else ids.clone()}

    return make


def _images(side: int) -> MakeBatch:
    def make(model: nn.Module, size: int) -> Batch:
        classes: Any = model.config.num_labels  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(size, 3, side, side), "labels": torch.randint(0, classes, (size,))}

    return make


def _own(length: int) -> MakeBatch:
    return lambda model, size: model.make_batch(size, length)  # type: ignore[operator]


# -- families: sizes in, a maker out ------------------------------------------------------------------------------------------------


def _opt(*, width: int, depth: int, heads: int, vocabulary: int, positions: int) -> Make:
    return _transformers(
        "OPTConfig", "OPTForCausalLM", hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, ffn_dim=4 * width,
        word_embed_proj_dim=width, vocab_size=vocabulary, max_position_embeddings=positions, dropout=0.0, use_cache=False,
    )  # fmt: skip


def _gpt2(*, width: int, depth: int, heads: int, vocabulary: int, positions: int) -> Make:
    return _transformers(
        "GPT2Config", "GPT2LMHeadModel", n_embd=width, n_layer=depth, n_head=heads, vocab_size=vocabulary, n_positions=positions,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
    )  # fmt: skip


def _llama(*, width: int, depth: int, heads: int, hidden: int, vocabulary: int, positions: int) -> Make:
    """Two heads share their keys and values."""
    return _transformers(
        "LlamaConfig", "LlamaForCausalLM", hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads // 2, intermediate_size=hidden, vocab_size=vocabulary, max_position_embeddings=positions, use_cache=False,
    )  # fmt: skip


def _bert(*, width: int, depth: int, heads: int, vocabulary: int, positions: int) -> Make:
    return _transformers(
        "BertConfig", "BertForMaskedLM", hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, vocab_size=vocabulary, max_position_embeddings=positions, **_NO_DROPOUT,
    )  # fmt: skip


def _vit(*, width: int, depth: int, heads: int, patch: int, side: int, classes: int) -> Make:
    return _transformers(
        "ViTConfig", "ViTForImageClassification", hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, patch_size=patch, image_size=side, num_labels=classes, **_NO_DROPOUT,
    )  # fmt: skip


def _resnet(**sizes: Any) -> Make:
    return _transformers("ResNetConfig", "ResNetForImageClassification", **sizes)


_T5 = _transformers(
    "T5Config", "T5ForConditionalGeneration", d_model=256, d_kv=32, d_ff=512, num_layers=2, num_heads=8, vocab_size=2048,
    dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
)  # fmt: skip
_BART = _transformers(
    "BartConfig", "BartForConditionalGeneration", d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=768, decoder_ffn_dim=768, vocab_size=2048, max_position_embeddings=128, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, classifier_dropout=0.0, use_cache=False,
)  # fmt: skip


# -- the models ---------------------------------------------------------------------------------------------------------------------


def _case(name: str, make: Make, make_batch: MakeBatch, batch_size: int) -> Case:
    return Case(name=name, make=make, make_batch=make_batch, batch_size=batch_size)


CASES = (
    _case("mlp", _module(zoo_modules.Mlp, width=1024, depth=4, num_classes=256), _own(1024), 128),
    _case("mlp-narrow", _module(zoo_modules.Mlp, width=256, depth=6, num_classes=64), _own(256), 1024),
    _case("opt", _opt(width=256, depth=4, heads=8, vocabulary=4096, positions=128), _tokens(64), 8),
    _case("gpt2", _gpt2(width=192, depth=3, heads=4, vocabulary=2048, positions=128), _tokens(128), 8),
    _case("llama", _llama(width=256, depth=3, heads=8, hidden=704, vocabulary=2048, positions=128), _tokens(64), 8),
    _case("bert", _bert(width=256, depth=4, heads=4, vocabulary=4096, positions=128), _tokens(64), 8),
    _case("t5", _T5, _tokens(48, target=True), 8),
    _case("bart", _BART, _tokens(64, target=True), 8),
    _case("vit", _vit(width=192, depth=4, heads=4, patch=8, side=64, classes=128), _images(64), 16),
    _case(
        "resnet", _resnet(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=128),
        _images(64), 16,
    ),
    _case("convnet", _module(zoo_modules.ConvNet, channels=(32, 64, 128), num_classes=128), _own(32), 32),
    _case("gnn", _module(zoo_modules.Gnn, features=64, width=256, depth=3, num_classes=64), _own(128), 8),
)  # fmt: skip

# The same families in sizes that occupy a GPU, for `bench.gpu_calibration`.
GPU_CASES = (
    _case("gpu-mlp", _module(zoo_modules.Mlp, width=4096, depth=8, num_classes=1024), _own(4096), 4096),
    _case("gpu-opt", _opt(width=1024, depth=12, heads=16, vocabulary=50272, positions=2048), _tokens(1024), 8),
    _case("gpu-gpt2", _gpt2(width=768, depth=12, heads=12, vocabulary=50257, positions=1024), _tokens(1024), 8),
    _case("gpu-llama", _llama(width=1024, depth=12, heads=16, hidden=2816, vocabulary=32000, positions=2048), _tokens(1024), 8),
    _case("gpu-bert", _bert(width=768, depth=12, heads=12, vocabulary=30522, positions=512), _tokens(512), 16),
    _case("gpu-vit", _vit(width=768, depth=12, heads=12, patch=16, side=224, classes=1000), _images(224), 64),
    _case("gpu-resnet", _resnet(num_labels=1000), _images(224), 64),
)

NAMES = tuple(case.name for case in CASES)
BY_NAME = {case.name: case for case in (*CASES, *GPU_CASES)}


def load(name: str, batch_size: int | None = None) -> tuple[nn.Module, Batch]:
    """(model, batch). Raises ValueError with the valid names."""
    if name not in BY_NAME:
        raise ValueError(f"no model {name!r} in this benchmark; there are {', '.join(BY_NAME)}")
    case = BY_NAME[name]
    model = case.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model, case.make_batch(model, batch_size or case.batch_size)
