"""The same recording in a Hugging Face Trainer: a tiny BERT learns of which kind of word a text has more.

Nothing is downloaded: texts and model are made here; 10 % of the labels are wrong.

    python examples/hf_trainer.py --out hf_trainer
"""

from __future__ import annotations

import argparse

import rich
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from ine_callback.integrations.hugging_face import InfluenceTrainerCallback

WORDS, LENGTH = 40, 12


class Texts(Dataset):
    """Texts of word numbers; the label says whether even numbers are in the majority. Some labels are wrong."""

    def __init__(self, rows: int, wrong: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, WORDS, (rows, LENGTH + 1), generator=generator)
        true = ((self.ids % 2 == 0).sum(1) > LENGTH // 2).long()
        self.wrong = torch.rand(rows, generator=generator) < wrong
        self.labels = torch.where(self.wrong, 1 - true, true)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]}


def make_trainer(train: Dataset, val: Dataset, out: str, epochs: float, seed: int, **options: object) -> Trainer:
    set_seed(seed)
    config = BertConfig(
        **{"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 64, "max_position_embeddings": LENGTH + 1},
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    )
    settings = {
        **{"output_dir": out, "num_train_epochs": epochs, "learning_rate": 2e-3, "per_device_train_batch_size": 32},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": seed},
    }
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(BertForSequenceClassification(config), arguments, train_dataset=train, eval_dataset=val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default="hf_trainer", help="the Trainer's output folder; the report goes to influence/"
    )
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core

    train, val = Texts(1000, wrong=0.1, seed=args.seed), Texts(200, wrong=0.0, seed=args.seed + 1)
    trainer = make_trainer(train, val, args.out, args.epochs, args.seed)
    influence = InfluenceTrainerCallback(trainer, queries=["val", "self"], initial_weights="random")
    trainer.train()
    report = influence.report
    rich.print(report)
    suspects = report.suspect_labels(100)
    print(f"Of the 100 rows to check first {int(train.wrong[suspects].sum())} are wrong, of {int(train.wrong.sum())}.")


if __name__ == "__main__":
    main()
