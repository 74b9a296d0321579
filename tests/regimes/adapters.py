"""Regimes of adapters (PEFT): weights computed from small parameters, prompts, vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .hugging_face import Hugging, language, llama
from .regime import Regime

GROUP = "adapters (PEFT)"


class Prompting(Hugging):
    """Before a row's words there are prompts, so that the first word is a term of the loss, too."""

    def terms(self, single: Any) -> int:
        return int((single["labels"] != -100).sum())


class Allocating(Hugging):
    """AdaLoRA: the model's own loss holds a penalty on the adapters' orthogonality; ranks are masked after steps."""

    def of_no_row(self) -> Tensor:
        named = ((name, p) for name, p in self.named_parameters() if "lora_A" in name or "lora_B" in name)
        squares = [p @ p.T if "lora_A" in name else p.T @ p for name, p in named]
        return 0.5 * torch.stack([torch.norm(one - torch.eye(len(one), dtype=one.dtype)) for one in squares]).mean()

    def loss(self, batch: Any) -> Tensor:
        whole = super().loss(batch)  # in evaluation mode as the query has it
        return whole - self.of_no_row() if self.training else whole

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().loss(batch)

    def after_step(self, steps: int) -> None:
        assert isinstance(self.net.base_model, nn.Module)
        self.net.base_model.update_and_allocate(steps)

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_step(self.trainer.global_step)


def adapted(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A small Llama with an adapter of PEFT.

    Args:
        kind: Name of the configuration's class.
        options: What it is given.
    """

    def make() -> nn.Module:
        import peft

        return peft.get_peft_model(llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **options))

    return make


def lora(**options: Any) -> Callable[[], nn.Module]:
    return adapted("LoraConfig", **{"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SQUARE = {"target_modules": ["q_proj", "o_proj"]}
NETS: dict[str, Callable[[], nn.Module]] = {
    "DoRA": lora(use_dora=True),
    "LoRA of the embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "IA3": adapted("IA3Config", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": adapted("VeraConfig", r=4, **SQUARE),
    "OFT": adapted("OFTConfig", oft_block_size=4, r=0, **ATTENTION),
    "BOFT": adapted("BOFTConfig", boft_block_size=4, **SQUARE),
    "HRA": adapted("HRAConfig", r=2, **ATTENTION),
    "LoKr": adapted("LoKrConfig", r=2, **ATTENTION),
    "FourierFT": adapted("FourierFTConfig", n_frequency=4, **SQUARE),
    "LN tuning": adapted("LNTuningConfig", target_modules=["input_layernorm"]),
    "trainable tokens": adapted("TrainableTokensConfig", token_indices=[1, 2, 3], target_modules=["embed_tokens"]),
    "prefix tuning": adapted("PrefixTuningConfig", num_virtual_tokens=2),
    "LoHa": adapted("LoHaConfig", r=2, **ATTENTION),
    "LLaMA-Adapter": adapted("AdaptionPromptConfig", adapter_len=2, adapter_layers=2),
}
RANKS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 12, "orth_reg_weight": 0.5}
IN_DOUBLE: dict[str, Any] = {"trainer": lambda: {"precision": "64-true"}, "dtype": torch.float64, "tolerance": 1e-6}
PROMPTS = {
    "prompt tuning": adapted("PromptTuningConfig", num_virtual_tokens=2),
    "p-tuning": adapted("PromptEncoderConfig", num_virtual_tokens=2, encoder_hidden_size=8),
}
DROPPING = {"LoRA, dropout": lora(lora_dropout=0.1), "DoRA, dropout": lora(lora_dropout=0.1, use_dora=True)}


def _regime(name: str, net: Callable[[], nn.Module], kind: type[Hugging] = Hugging, **options: Any) -> Regime:
    return Regime(name, GROUP, lambda: kind(net()), language, needs="peft", slow=True, **options)


ADAPTERS = [
    *(_regime(name, net) for name, net in NETS.items()),
    *(_regime(name, net, Prompting) for name, net in PROMPTS.items()),
    _regime("AdaLoRA, ranks masked", adapted("AdaLoraConfig", **RANKS, **ATTENTION), Allocating, **IN_DOUBLE),
    *(_regime(name, net, shares="among") for name, net in DROPPING.items()),
]
