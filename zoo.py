"""The model zoo: models by name, each with random weights and a batch, for planning, tests and benchmarks.

    model, batch = zoo.load("opt-30b")            # on the meta device: shapes only
    model, batch = zoo.load("opt-tiny")           # on the CPU, seeded random weights
    model, batch = zoo.load("gpt2", (16, 512))    # batch size, sequence length (image models: image side)

A row names the published configuration it follows. Dropout is off everywhere, so that one step has one result. Every family has a `-tiny`
member whose sizes divide by the meshes 2, 4, 2x2 and 2x4.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import zoo_modules

Batch = dict[str, torch.Tensor]
BatchSize = tuple[int, int]
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model. config and model are class names in transformers, or model is one of `zoo_modules` where config is "".

    batch: default (batch size, sequence length; image side or voxel side for images). make_batch(row, model, (B, S)) makes a batch.
    num_parameters: distinct ones. source: where the numbers come from.
    """

    name: str
    family: str
    model: str
    batch: BatchSize
    make_batch: Callable[[Row, nn.Module, BatchSize], Batch]
    config: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_parameters: int = 0
    source: str = ""

    @property
    def is_tiny(self) -> bool:
        return self.name.endswith("-tiny")


class UnknownModelError(ValueError):
    """A name that is neither in the zoo nor `package.module:function`."""


# Batches


def _tokens(row: Row, model: nn.Module, size: BatchSize) -> Batch:
    ids = torch.randint(3, model.config.vocab_size, size)  # type: ignore[union-attr, arg-type, operator]
    return {"input_ids": ids, "labels": ids.clone()}


def _sequences(row: Row, model: nn.Module, size: BatchSize) -> Batch:
    """Source and target of an encoder-decoder."""
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    return {"input_ids": torch.randint(3, vocabulary, size), "labels": torch.randint(3, vocabulary, size)}  # type: ignore[arg-type, operator]


def _images(row: Row, model: nn.Module, size: BatchSize) -> Batch:
    config = model.config
    pixels = torch.randn(size[0], config.num_channels, size[1], size[1])  # type: ignore[union-attr, arg-type]
    return {"pixel_values": pixels, "labels": torch.randint(0, config.num_labels, (size[0],))}  # type: ignore[union-attr, arg-type]


def _own(row: Row, model: nn.Module, size: BatchSize) -> Batch:
    """Plain modules make their own."""
    return model.make_batch(*size)  # type: ignore[operator]


# Families: what all their sizes share


def _opt(name: str, hidden: int, layers: int, heads: int, params: int, **extra: Any) -> Row:
    kwargs = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048, "dropout": 0.0, **extra,
    }  # fmt: skip
    return Row(
        name=name, family="opt", config="OPTConfig", model="OPTForCausalLM", kwargs=kwargs, make_batch=_tokens, num_parameters=params,
        batch=(8, 16) if name.endswith("-tiny") else (8, 1024), source="Zhang et al. 2022, arXiv:2205.01068, table 1",
    )  # fmt: skip


def _gpt2(name: str, hidden: int, layers: int, heads: int, params: int, **extra: Any) -> Row:
    kwargs = {
        "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50257, "n_positions": 1024, "attn_pdrop": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, **extra,
    }  # fmt: skip
    return Row(
        name=name, family="gpt2", config="GPT2Config", model="GPT2LMHeadModel", kwargs=kwargs, make_batch=_tokens, num_parameters=params,
        batch=(8, 16) if name.endswith("-tiny") else (8, 1024), source="Radford et al. 2019, table 2; transformers model cards",
    )  # fmt: skip


def _llama(name: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, params: int, source: str) -> Row:
    kwargs = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": ffn, "vocab_size": vocabulary, "max_position_embeddings": 4096,
    }  # fmt: skip
    return Row(
        name=name, family="llama", config="LlamaConfig", model="LlamaForCausalLM", kwargs=kwargs, make_batch=_tokens, num_parameters=params,
        batch=(8, 16) if name.endswith("-tiny") else (8, 1024), source=source,
    )  # fmt: skip


def _row(name: str, family: str, model: str, batch: BatchSize, params: int, source: str, make_batch: Any, **kwargs: Any) -> Row:
    """A row whose config class goes with its model class."""
    config = _CONFIGS[family]
    return Row(
        name=name, family=family, config=config, model=model, kwargs=kwargs, batch=batch, make_batch=make_batch, num_parameters=params,
        source=source,
    )  # fmt: skip


_CONFIGS = {
    "bert": "BertConfig", "t5": "T5Config", "bart": "BartConfig", "vit": "ViTConfig", "resnet": "ResNetConfig",
    "mobilenet": "MobileNetV2Config", "mixtral": "MixtralConfig", "qwen3-moe": "Qwen3MoeConfig", "mamba": "MambaConfig",
    "unet3d": "", "mlp": "", "convnet": "", "gnn": "",
}  # fmt: skip

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
_BART_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "classifier_dropout": 0.0, "use_cache": False}
_OURS = "opweave"

ROWS: tuple[Row, ...] = (
    _opt("opt-125m", 768, 12, 12, 125_239_296),
    _opt("opt-350m", 1024, 24, 16, 331_196_416, word_embed_proj_dim=512, do_layer_norm_before=False),
    _opt("opt-1.3b", 2048, 24, 32, 1_315_758_080),
    _opt("opt-2.7b", 2560, 32, 32, 2_651_596_800),
    _opt("opt-6.7b", 4096, 32, 32, 6_658_473_984),
    _opt("opt-13b", 5120, 40, 40, 12_853_473_280),
    _opt("opt-30b", 7168, 48, 56, 29_974_540_288),
    _opt("opt-66b", 9216, 64, 72, 65_719_701_504),
    _opt("opt-175b", 12288, 96, 96, 174_604_468_224),
    _opt("opt-tiny", 64, 2, 8, 137_088, vocab_size=512, max_position_embeddings=64),
    _gpt2("gpt2", 768, 12, 12, 124_439_808),
    _gpt2("gpt2-medium", 1024, 24, 16, 354_823_168),
    _gpt2("gpt2-large", 1280, 36, 20, 774_030_080),
    _gpt2("gpt2-xl", 1600, 48, 25, 1_557_611_200),
    _gpt2("gpt2-tiny", 64, 2, 8, 136_960, vocab_size=512, n_positions=64, bos_token_id=1, eos_token_id=2),
    _llama("llama-7b", 4096, 32, 32, 32, 11008, 32000, 6_738_415_616, "Touvron et al. 2023, arXiv:2307.09288"),
    _llama("llama-8b", 4096, 32, 32, 8, 14336, 128256, 8_030_261_248, "Llama 3, arXiv:2407.21783, table 3"),
    _llama("llama-70b", 8192, 80, 64, 8, 28672, 128256, 70_553_706_496, "Llama 3, arXiv:2407.21783, table 3"),
    _llama("llama-tiny", 64, 2, 8, 8, 128, 512, 147_776, _OURS),
    _row(
        "bert-large", "bert", "BertForMaskedLM", (8, 512), 335_174_458, "Devlin et al. 2018, arXiv:1810.04805", _tokens,
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=30522, **_NO_DROPOUT,
    ),
    _row(
        "bert-tiny", "bert", "BertForMaskedLM", (8, 16), 108_864, _OURS, _tokens,
        **_TINY, intermediate_size=128, vocab_size=512, max_position_embeddings=64, **_NO_DROPOUT,
    ),
    _row(
        "t5-3b", "t5", "T5ForConditionalGeneration", (8, 512), 2_851_598_336, "Raffel et al. 2019, arXiv:1910.10683, section 3.7",
        _sequences,
        d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32, vocab_size=32128, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    ),
    _row(
        "t5-tiny", "t5", "T5ForConditionalGeneration", (8, 16), 197_888, _OURS, _sequences,
        d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=8, vocab_size=512, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    ),
    _row(
        "bart-large", "bart", "BartForConditionalGeneration", (8, 512), 406_291_456, "Lewis et al. 2019, arXiv:1910.13461", _sequences,
        d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16, encoder_ffn_dim=4096,
        decoder_ffn_dim=4096, vocab_size=50265, **_BART_NO_DROPOUT,
    ),
    _row(
        "bart-tiny", "bart", "BartForConditionalGeneration", (8, 16), 208_896, _OURS, _sequences,
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=128,
        decoder_ffn_dim=128, vocab_size=512, max_position_embeddings=64, **_BART_NO_DROPOUT,
    ),
    _row(
        "vit-h", "vit", "ViTForImageClassification", (32, 224), 632_045_800,
        "Dosovitskiy et al. 2020, arXiv:2010.11929, table 1 (H/14)", _images,
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14, image_size=224,
        num_labels=1000, **_NO_DROPOUT,
    ),
    _row(
        "vit-tiny", "vit", "ViTForImageClassification", (8, 32), 81_616, _OURS, _images,
        **_TINY, intermediate_size=128, patch_size=8, image_size=32, num_labels=16, **_NO_DROPOUT,
    ),
    _row(
        "resnet-50", "resnet", "ResNetForImageClassification", (64, 224), 25_557_032, "He et al. 2015, arXiv:1512.03385, table 1", _images,
        num_labels=1000,
    ),
    _row(
        "resnet-tiny", "resnet", "ResNetForImageClassification", (8, 32), 12_448, _OURS, _images,
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], num_labels=16,
    ),
    _row(
        "mobilenet-v2", "mobilenet", "MobileNetV2ForImageClassification", (64, 224), 3_504_872,
        "Sandler et al. 2018, arXiv:1801.04381, table 2", _images, num_labels=1000, classifier_dropout_prob=0.0,
    ),
    _row(
        "mobilenet-tiny", "mobilenet", "MobileNetV2ForImageClassification", (8, 64), 258_608, _OURS, _images,
        depth_multiplier=0.25, num_labels=16, classifier_dropout_prob=0.0,
    ),
    _row(
        "mixtral-8x7b", "mixtral", "MixtralForCausalLM", (8, 1024), 46_702_792_704, "Jiang et al. 2024, arXiv:2401.04088, table 1", _tokens,
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, num_local_experts=8,
        num_experts_per_tok=2, vocab_size=32000, max_position_embeddings=4096,
    ),
    _row(
        "mixtral-tiny", "mixtral", "MixtralForCausalLM", (8, 16), 492_864, _OURS, _tokens,
        **_TINY, num_key_value_heads=8, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2, vocab_size=512,
        max_position_embeddings=64,
    ),
    _row(
        "qwen3-30b-a3b", "qwen3-moe", "Qwen3MoeForCausalLM", (8, 1024), 30_532_122_624, "Qwen3, arXiv:2505.09388, table 2", _tokens,
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151936,
        max_position_embeddings=4096,
    ),
    _row(
        "qwen3-moe-tiny", "qwen3-moe", "Qwen3MoeForCausalLM", (8, 16), 197_984, _OURS, _tokens,
        **_TINY, num_key_value_heads=8, head_dim=8, intermediate_size=128, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, vocab_size=512, max_position_embeddings=64,
    ),
    # The scan runs step by step outside of its GPU kernels: the graph grows with the sequence, so the default one is short.
    _row(
        "mamba-1.4b", "mamba", "MambaForCausalLM", (8, 16), 1_372_178_432, "Gu and Dao 2023, arXiv:2312.00752, table 12", _tokens,
        hidden_size=2048, num_hidden_layers=48, state_size=16, vocab_size=50280, use_cache=False,
    ),
    _row(
        "mamba-tiny", "mamba", "MambaForCausalLM", (8, 8), 92_096, _OURS, _tokens,
        hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=512, use_cache=False,
    ),
    _row(
        "unet3d", "unet3d", "UNet3d", (4, 128), 5_602_915, "Çiçek et al. 2016, arXiv:1606.06650, figure 2", _own,
        in_channels=3, channels=(32, 64, 128, 256), num_classes=3,
    ),
    _row("unet3d-tiny", "unet3d", "UNet3d", (8, 8), 18_692, _OURS, _own, in_channels=1, channels=(8, 16), num_classes=4),
    _row("mlp", "mlp", "Mlp", (4096, 4096), 138_445_824, _OURS, _own, width=4096, depth=8, num_classes=1024),
    _row("mlp-tiny", "mlp", "Mlp", (8, 64), 9_360, _OURS, _own, width=64, depth=2, num_classes=16),
    _row("convnet", "convnet", "ConvNet", (64, 64), 628_264, _OURS, _own, channels=(64, 128, 256), num_classes=1000),
    _row("convnet-tiny", "convnet", "ConvNet", (8, 16), 1_688, _OURS, _own, channels=(8, 16), num_classes=16),
    _row("gnn", "gnn", "Gnn", (64, 1024), 12_919_872, _OURS, _own, features=256, width=1024, depth=4, num_classes=64),
    _row("gnn-tiny", "gnn", "Gnn", (8, 16), 7_080, _OURS, _own, features=16, width=32, depth=2, num_classes=8),
)  # fmt: skip

_BY_NAME = {row.name: row for row in ROWS}


def names() -> list[str]:
    """All names, in the table's order."""
    return list(_BY_NAME)


def describe() -> list[dict[str, Any]]:
    """One dict per model: name, family, num_parameters, batch, source."""
    return [
        {"name": r.name, "family": r.family, "num_parameters": r.num_parameters, "batch": list(r.batch), "source": r.source} for r in ROWS
    ]


def row(name: str) -> Row:
    """The row of a name. Raises UnknownModelError with the valid names."""
    if name not in _BY_NAME:
        raise UnknownModelError(
            f"no model {name!r} in the zoo; there are {', '.join(names())}. For a model of your own give `package.module:function`, a "
            "function that returns (model, batch)"
        )
    return _BY_NAME[name]


def build(name: str) -> nn.Module:
    """The model alone: on the meta device, tiny ones on the CPU with seeded random weights (the global random state is left as it was)."""
    found = row(name)
    if not found.is_tiny:
        with torch.device("meta"):
            return _instantiate(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return _instantiate(found)


def load(name: str, batch: BatchSize | None = None) -> tuple[nn.Module, Batch]:
    """(model, batch) by name. batch: (batch size, sequence length or image side), else the row's own.

    Raises UnknownModelError, and ImportError where transformers is needed and missing.
    """
    found = row(name)
    model = build(name)
    size = tuple(batch) if batch is not None else found.batch
    if len(size) != 2 or any(s < 1 for s in size):
        raise ValueError(f"batch {batch} is not (batch size, sequence length or image side), two positive numbers")
    if not found.is_tiny:
        with torch.device("meta"):
            return model, found.make_batch(found, model, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)
        return model, found.make_batch(found, model, size)


def _instantiate(found: Row) -> nn.Module:
    if not found.config:
        return getattr(zoo_modules, found.model)(**found.kwargs).train()
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"the zoo model {found.name} needs transformers; install it with `pip install 'opweave[models]'`") from error
    config = getattr(transformers, found.config)(**found.kwargs)
    return getattr(transformers, found.model)(config).train()


def resolve(spec: str, batch: BatchSize | None = None) -> tuple[nn.Module, Any]:
    """(model, batch) of a zoo name or of `package.module:function`.

    The function returns (model, batch); it is given `batch` where it takes an argument of that name.
    """
    if ":" not in spec:
        return load(spec, batch)
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownModelError(
            f"{spec!r}: cannot import {module_name!r} ({error}); the form is `package.module:function`, importable from here"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UnknownModelError(f"{spec!r}: {module_name} has no function {function_name!r}")
    takes_batch = "batch" in inspect.signature(function).parameters
    result = function(batch=batch) if takes_batch else function()
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        raise ValueError(f"{spec!r} returned a {type(result).__name__}; it must return (model, batch) with an nn.Module first")
    return result
