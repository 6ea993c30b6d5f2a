"""The models of `bench.prediction`: of many families, sizes that take a CPU core some 10 to 200 ms a step, none used for calibration.

Dropout is off. Batch sizes divide by 8, so that 4 ranks can split them and half the batch as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opweave import zoo_modules
from torch import nn

Batch = dict[str, torch.Tensor]
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model. make: a fresh one, the same each time. make_batch: a global batch of so many samples of its usual length."""

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[nn.Module, int], Batch]
    batch_size: int


def _transformers(config: str, model: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
        return made

    return make


def _module(kind: type[nn.Module], **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return kind(**kwargs)

    return make


def _tokens(length: int, target: bool = False) -> Callable[[nn.Module, int], Batch]:
    """target: an encoder-decoder's labels are another sequence."""

    def make(model: nn.Module, size: int) -> Batch:
        vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
        ids = torch.randint(3, vocabulary, (size, length))
        return {"input_ids": ids, "labels": torch.randint(3, vocabulary, (size, length)) if target else ids.clone()}

    return make


def _images(side: int) -> Callable[[nn.Module, int], Batch]:
    def make(model: nn.Module, size: int) -> Batch:
        classes: Any = model.config.num_labels  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(size, 3, side, side), "labels": torch.randint(0, classes, (size,))}

    return make


def _own(length: int) -> Callable[[nn.Module, int], Batch]:
    return lambda model, size: model.make_batch(size, length)  # type: ignore[operator]


CASES = (
    Case(
        name="mlp", make=_module(zoo_modules.Mlp, width=1024, depth=4, num_classes=256), make_batch=_own(1024), batch_size=128,
    ),
    Case(
        name="mlp-narrow", make=_module(zoo_modules.Mlp, width=256, depth=6, num_classes=64), make_batch=_own(256), batch_size=1024,
    ),
    Case(
        name="opt", make_batch=_tokens(64), batch_size=8,
        make=_transformers(
            "OPTConfig", "OPTForCausalLM", hidden_size=256, num_hidden_layers=4, num_attention_heads=8, ffn_dim=1024,
            word_embed_proj_dim=256, vocab_size=4096, max_position_embeddings=128, dropout=0.0, use_cache=False,
        ),
    ),
    Case(
        name="gpt2", make_batch=_tokens(128), batch_size=8,
        make=_transformers(
            "GPT2Config", "GPT2LMHeadModel", n_embd=192, n_layer=3, n_head=4, vocab_size=2048, n_positions=128, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
        ),
    ),
    Case(
        name="llama", make_batch=_tokens(64), batch_size=8,
        make=_transformers(
            "LlamaConfig", "LlamaForCausalLM", hidden_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=704, vocab_size=2048, max_position_embeddings=128, use_cache=False,
        ),
    ),
    Case(
        name="bert", make_batch=_tokens(64), batch_size=8,
        make=_transformers(
            "BertConfig", "BertForMaskedLM", hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
            vocab_size=4096, max_position_embeddings=128, **_NO_DROPOUT,
        ),
    ),
    Case(
        name="t5", make_batch=_tokens(48, target=True), batch_size=8,
        make=_transformers(
            "T5Config", "T5ForConditionalGeneration", d_model=256, d_kv=32, d_ff=512, num_layers=2, num_heads=8, vocab_size=2048,
            dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
        ),
    ),
    Case(
        name="bart", make_batch=_tokens(64, target=True), batch_size=8,
        make=_transformers(
            "BartConfig", "BartForConditionalGeneration", d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=768, decoder_ffn_dim=768, vocab_size=2048, max_position_embeddings=128, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, classifier_dropout=0.0, use_cache=False,
        ),
    ),
    Case(
        name="vit", make_batch=_images(64), batch_size=16,
        make=_transformers(
            "ViTConfig", "ViTForImageClassification", hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768,
            patch_size=8, image_size=64, num_labels=128, **_NO_DROPOUT,
        ),
    ),
    Case(
        name="resnet", make_batch=_images(64), batch_size=16,
        make=_transformers(
            "ResNetConfig", "ResNetForImageClassification", embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2],
            layer_type="basic", num_labels=128,
        ),
    ),
    Case(
        name="convnet", make=_module(zoo_modules.ConvNet, channels=(32, 64, 128), num_classes=128), make_batch=_own(32), batch_size=32,
    ),
    Case(
        name="gnn", make=_module(zoo_modules.Gnn, features=64, width=256, depth=3, num_classes=64), make_batch=_own(128), batch_size=8,
    ),
)  # fmt: skip

# The same families in sizes that occupy a GPU, for `bench.gpu_calibration`.
GPU_CASES = (
    Case(name="gpu-mlp", make=_module(zoo_modules.Mlp, width=4096, depth=8, num_classes=1024), make_batch=_own(4096), batch_size=4096),
    Case(
        name="gpu-opt", make_batch=_tokens(1024), batch_size=8,
        make=_transformers(
            "OPTConfig", "OPTForCausalLM", hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, ffn_dim=4096,
            word_embed_proj_dim=1024, vocab_size=50272, max_position_embeddings=2048, dropout=0.0, use_cache=False,
        ),
    ),
    Case(
        name="gpu-gpt2", make_batch=_tokens(1024), batch_size=8,
        make=_transformers(
            "GPT2Config", "GPT2LMHeadModel", n_embd=768, n_layer=12, n_head=12, vocab_size=50257, n_positions=1024, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
        ),
    ),
    Case(
        name="gpu-llama", make_batch=_tokens(1024), batch_size=8,
        make=_transformers(
            "LlamaConfig", "LlamaForCausalLM", hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
            intermediate_size=2816, vocab_size=32000, max_position_embeddings=2048, use_cache=False,
        ),
    ),
    Case(
        name="gpu-bert", make_batch=_tokens(512), batch_size=16,
        make=_transformers(
            "BertConfig", "BertForMaskedLM", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            vocab_size=30522, max_position_embeddings=512, **_NO_DROPOUT,
        ),
    ),
    Case(
        name="gpu-vit", make_batch=_images(224), batch_size=64,
        make=_transformers(
            "ViTConfig", "ViTForImageClassification", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            patch_size=16, image_size=224, num_labels=1000, **_NO_DROPOUT,
        ),
    ),
    Case(
        name="gpu-resnet", make=_transformers("ResNetConfig", "ResNetForImageClassification", num_labels=1000), make_batch=_images(224),
        batch_size=64,
    ),
)  # fmt: skip

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
