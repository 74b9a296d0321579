"""Regimes of Hugging Face: tiny models from a configuration, and LoRA; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.oracle import TELLS

from .regime import Classifier, Data, Item, Regime, adam, vectors

WORDS, LONGEST = 11, 6


def padded(labelled: bool) -> Data:
    """Rows of 3 to 6 words, padded to the longest of the batch: ids, mask and labels, as a collator makes them.

    Args:
        labelled: Whether every word is a label of its own (a language model), else one class a row.
    """

    def draw(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(1, WORDS, (rows, LONGEST), generator=generator)
        lengths = torch.randint(3, LONGEST + 1, (rows,), generator=generator)
        ids[torch.arange(LONGEST) >= lengths[:, None]] = 0
        return ids, torch.randint(2, (rows,), generator=generator)

    def collate(items: list[Item]) -> Any:
        from transformers import BatchEncoding

        ids = torch.stack([x for x, _, _ in items])
        ids = ids[:, : int((ids > 0).sum(1).max())]
        labels = ids.masked_fill(ids == 0, -100) if labelled else torch.stack([y for _, y, _ in items])
        fields = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
        return BatchEncoding({**fields, "row": torch.tensor([row for _, _, row in items])})

    return vectors(collate=collate, rows_of=lambda batch: batch["row"], draw=draw)


class Hugging(Classifier):
    """A model that computes its loss itself."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(**{key: value for key, value in batch.items() if key != "row"}).loss

    def terms(self, single: Any) -> int:
        labels = single["labels"]
        return int((labels[:, 1:] != -100).sum()) if labels.dim() > 1 else 1


SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=8, n_embd=8, n_layer=2, n_head=2, **no_dropout))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **sizes, num_key_value_heads=1, max_position_embeddings=8))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=WORDS, pad_token_id=0, **sizes, **no_dropout, max_position_embeddings=8)
    return BertForSequenceClassification(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)


def checkpointed(reentrant: bool) -> nn.Module:
    net = llama()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return net


def language() -> Data:
    return padded(labelled=True)


def sequence_classes() -> Data:
    return padded(labelled=False)


HUGGING_FACE = [
    Regime(
        "GPT-2",
        "Hugging Face",
        lambda: Hugging(gpt2()),
        language,
        left_out=() if TELLS else ("net.transformer.wpe.weight",),
        needs="transformers",
    ),
    Regime("Llama", "Hugging Face", lambda: Hugging(llama()), language, needs="transformers"),
    Regime("Llama, AdamW", "Hugging Face", lambda: Hugging(llama(), adam), language, needs="transformers"),
    Regime(
        "Llama, gradient checkpointing",
        "Hugging Face",
        lambda: Hugging(checkpointed(reentrant=False)),
        language,
        needs="transformers",
    ),
    Regime(
        "Llama, gradient checkpointing, reentrant",
        "Hugging Face",
        lambda: Hugging(checkpointed(reentrant=True)),
        language,
        plain_form=lambda module: module.net.gradient_checkpointing_disable(),
        needs="transformers",
        slow=True,
    ),
    Regime(
        "BERT",
        "Hugging Face",
        lambda: Hugging(bert()),
        sequence_classes,
        left_out=() if TELLS else ("net.bert.embeddings.position_embeddings.weight",),
        needs="transformers",
    ),
    Regime(
        "GPT-2, fallback",
        "Hugging Face",
        lambda: Hugging(gpt2()),
        language,
        influence={"uncaptured": "fallback"},
        needs="transformers",
        slow=True,
    ),
    Regime("LoRA (PEFT)", "Hugging Face", lambda: Hugging(lora()), language, needs="peft"),
]
