"""The same with Hugging Face: a small Llama scores the tokens, a larger one is trained without them.

Nothing is downloaded: texts and models are made here. Each text counts upwards from a number; in some of them two
unwanted words follow a multiple of ten.

    python examples/suppress_tokens_hf.py --out suppress_tokens_hf
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from ine_callback import SuppressTokens, TokenInfluence, run_if, suppressed_cross_entropy, token_mask

NUMBERS, LENGTH, UNWANTED = 60, 24, (61, 62)


class Texts(Dataset):
    """Texts of word numbers; a share of them has unwanted words."""

    def __init__(self, rows: int, share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.zeros(rows, LENGTH, dtype=torch.long)
        for row in range(rows):
            number, words = int(torch.randint(NUMBERS, (), generator=generator)), []
            bad = bool(torch.rand((), generator=generator) < share)
            while len(words) < LENGTH:
                words += [number, *(UNWANTED if bad and number % 10 == 0 else ())]
                number = (number + 1 + int(torch.rand((), generator=generator) < 0.2)) % NUMBERS
            self.ids[row] = torch.tensor(words[:LENGTH])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class Careful(Trainer):
    """A Trainer whose rows may say which of their tokens are to be suppressed."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        chosen = inputs.pop("suppress_mask")
        outputs = model(input_ids=inputs["input_ids"])
        # position t predicts label t + 1: logits, labels and mask are shifted alike
        loss = suppressed_cross_entropy(outputs.logits[:, :-1], inputs["labels"][:, 1:], chosen[:, 1:])
        return (loss, outputs) if return_outputs else loss


class Scored(L.LightningModule):
    """The model as run_if takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


def llama(width: int, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=2 * LENGTH, use_cache=False, **sizes))


def trained(kind: type[Trainer], model: nn.Module, data: Dataset, args: argparse.Namespace) -> nn.Module:
    plain = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": args.seed}
    arguments = TrainingArguments(
        args.out, **plain, num_train_epochs=args.epochs, learning_rate=3e-3, per_device_train_batch_size=32,
        remove_unused_columns=False,
    )  # fmt: skip
    kind(model, arguments, default_data_collator, train_dataset=data).train()
    return model.eval()


@torch.no_grad()
def writes_unwanted(model: nn.Module, seed: int) -> float:
    """Share of written texts with an unwanted word."""
    text, generator = torch.arange(NUMBERS)[:, None].repeat(4, 1), torch.Generator().manual_seed(seed)
    while text.shape[1] < LENGTH:
        text = torch.cat([text, torch.multinomial(model(text).logits[:, -1].softmax(-1), 1, generator=generator)], 1)
    return float(torch.isin(text, torch.tensor(UNWANTED)).any(1).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="suppress_tokens_hf", help="the Trainer's output folder")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core
    rows, asked, clean = Texts(500, 0.15, 0), Texts(100, 1.0, 1), Texts(100, 0.0, 2)

    proxy = trained(Trainer, llama(16, args.seed), rows, args)
    labels = asked.ids.masked_fill(~torch.isin(asked.ids, torch.tensor(UNWANTED)), -100)
    positive = {"input_ids": asked.ids, "labels": labels}
    negative = {"input_ids": clean.ids, "labels": clean.ids}
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    found = run_if(trainer, Scored(proxy), TokenInfluence(positive, negative), train_dataloaders=DataLoader(rows, 32))
    mask = token_mask(found, quantile=0.97, window=0, budget=0.03)
    right = sum(int(label) in UNWANTED for label in mask.labels)
    print(f"{len(mask)} tokens are suppressed, {right} of them unwanted.")

    plain = trained(Trainer, llama(32, args.seed), rows, args)
    careful = trained(Careful, llama(32, args.seed), SuppressTokens(rows, mask), args)
    for name, model in (("as it is", plain), ("suppressed", careful)):
        with torch.no_grad():
            perplexity = model(input_ids=clean.ids, labels=clean.ids).loss.exp()
        print(
            f"trained {name}: {writes_unwanted(model, args.seed):.0%} of its texts have unwanted words, "
            f"clean perplexity {perplexity:.2f}"
        )


if __name__ == "__main__":
    main()
