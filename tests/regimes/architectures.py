"""Regimes of Hugging Face's architectures: mixtures of experts, encoders and decoders, pictures and speech; tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .hugging_face import SMALL, WORDS, Hugging, language
from .regime import Data, Item, Regime, vectors

GROUP = "Hugging Face's architectures"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {**SMALL, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 8, "num_experts_per_tok": 2}


class Labelled(Hugging):
    """Each label is a term of the loss, the first one too."""

    def terms(self, single: Any) -> int:
        return int((single["labels"] != -100).sum())


def of_equal_length(name: str, *shape: int, words: int = 0) -> Data:
    """Rows of numbers under a name, or of words where that has none, and a class or words as labels."""

    def draw(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(1, WORDS, (rows, words or 1), generator=generator)
        x = torch.randn(rows, *shape, generator=generator) if shape else ids
        return x, ids if words else torch.randint(3, (rows,), generator=generator)

    def collate(items: list[Item]) -> dict[str, Tensor]:
        x, labels = (torch.stack([item[k] for item in items]) for k in (0, 1))
        return {name: x, "labels": labels, "row": torch.tensor([row for *_, row in items])}

    return vectors(collate=collate, rows_of=lambda batch: batch["row"], draw=draw)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=3))


def by_matrices() -> nn.Module:
    net = mixtral()
    net.set_experts_implementation("batched_mm")
    return net


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 3, "moe_intermediate_size": 8, "decoder_sparse_step": 1, "head_dim": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, **experts))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    words = {"vocab_size": WORDS, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**words, **sizes, dropout_rate=0.0))


def masked_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = {"vocab_size": WORDS, "pad_token_id": 0, "max_position_embeddings": 8}
    return BertForMaskedLM(BertConfig(**words, **SIZES, **no_dropout))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    pictures = {"image_size": 6, "patch_size": 3, "num_channels": 1, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**SIZES, **pictures))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    words = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    side = {"layers": 1, "attention_heads": 2, "ffn_dim": 12}
    sizes = {f"{name}_{size}": n for name in ("encoder", "decoder") for size, n in side.items()}
    speech = {"num_mel_bins": 4, "d_model": 8, "max_source_positions": 6, "max_target_positions": 8}
    return WhisperForConditionalGeneration(WhisperConfig(**words, **sizes, **speech, dropout=0.0))


def _regime(
    name: str, net: Callable[[], nn.Module], data: Callable[[], Data] = language, kind: type[Hugging] = Hugging
) -> Regime:
    return Regime(name, GROUP, lambda: kind(net()), data, needs="transformers", slow=True)


ARCHITECTURES = [
    _regime("Mixtral, grouped products", mixtral),
    _regime("Mixtral, a product for each token", by_matrices),
    _regime("Qwen3 MoE", qwen),
    _regime("BERT, words masked, tied head", masked_bert, kind=Labelled),
    _regime("T5, relative positions", t5, lambda: of_equal_length("input_ids", words=5), Labelled),
    Regime(
        "T5, padded in some batches",
        GROUP,
        lambda: Labelled(t5()),
        language,
        needs="transformers",
        slow=True,
        unfamiliar=(11,),
    ),
    _regime("ViT", vit, lambda: of_equal_length("pixel_values", 1, 6, 6)),
    _regime("Whisper", whisper, lambda: of_equal_length("input_features", 4, 12, words=5), Labelled),
]
