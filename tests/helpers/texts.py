"""A tiny language model in a Hugging Face Trainer, beside the same training as a plain loop; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from ine_callback import FINE, InfluenceReport, Recorder

WORDS, LONGEST, ROWS = 40, 7, 22  # six batches of four rows, the last one of two
PLAIN = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.05, "max_grad_norm": 0.5}


class Texts(torch.utils.data.Dataset):
    """Rows of 3 to 7 words, no two alike."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, LONGEST + 1, (rows,), generator=generator).tolist()
        self.rows = [torch.randint(1, WORDS, (length,), generator=generator).tolist() for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([item["input_ids"] + [0] * (longest - len(item["input_ids"])) for item in items])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def small_model(dropout: float = 0.0) -> nn.Module:
    set_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, **ends, attention_dropout=dropout))


class Journal(Trainer):
    """A Trainer that writes down which rows it trained on; a step that is named breaks down, once."""

    breaks: int | None = None

    @property
    def visits(self) -> list[int]:
        """How often each row was trained on."""
        return torch.bincount(torch.tensor([row for batch in self.batches for row in batch]), minlength=ROWS).tolist()

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any) -> Tensor:
        known = [tuple(row) for row in self.train_dataset.rows]
        lines = [tuple(line[line > 0].tolist()) for line in inputs["input_ids"]]
        self.__dict__.setdefault("batches", []).append([known.index(line) for line in lines])
        loss = super().training_step(model, inputs, *args)
        if self.state.global_step == self.breaks:
            self.breaks = None
            raise ConnectionError("the file server is gone")
        return loss


def trainer_of(out: Path, model: nn.Module | None = None, val: Any = None, **options: Any) -> Journal:
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "optim": "sgd"}
    arguments = TrainingArguments(output_dir=str(out), **{**quiet, **PLAIN, **options})
    val = Texts(6, 1) if val is None else val
    return Journal(
        small_model() if model is None else model, arguments, padded, train_dataset=Texts(ROWS, 0), eval_dataset=val
    )


def state_of(trainer: Trainer) -> list[Any]:
    """All that a training leaves, without its times."""
    told = [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in log_of(trainer)]
    return [*trainer.model.state_dict().values(), torch.get_rng_state(), told]


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.state.log_history


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def plain_loop(trainer: Journal, queries: list[str]) -> tuple[nn.Module, InfluenceReport]:
    """The Trainer's batches in a loop of our own, its loss written out: a mean over the words of all micro-batches.

    Without a closing pass, which would draw other labels: the Trainer's loss has other terms where it ignores them.
    """
    args, train = trainer.args, trainer.train_dataset
    model = small_model()
    lower = (lambda: torch.autocast("cpu", torch.bfloat16)) if args.bf16 else nullcontext

    def told(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with lower():
            logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")

    def words(batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] >= 0).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    steps = list(steps_of(trainer.batches, args.gradient_accumulation_steps, int(args.num_train_epochs)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / len(steps)))
    known = {"val": padded([trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))]), "self": "self"}
    recorder = Recorder(
        model, optimizer, ROWS, {name: known[name] for name in queries},
        lambda module, batch: told(module, batch) / words(batch), [FINE(closing=False)], len(steps), [(scheduler, 1)],
        initial_weights="fixed", refresh_every=2, accumulate=args.gradient_accumulation_steps, on_error="raise",
    )  # fmt: skip
    model.train()
    with recorder:
        for step in steps:
            batches = [padded([train[row] for row in rows]) for rows in step]
            for rows, batch in zip(step, batches, strict=True):
                with recorder.batch(rows, batch):
                    loss = told(model, batch) / sum(map(words, batches))
                    recorder.see(loss)
                    loss.backward()
            recorder.measure_clipping()
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, recorder.report()


def steps_of(batches: list[list[int]], together: int, epochs: int) -> Iterator[list[list[int]]]:
    """The batches of each optimizer step; an epoch's last step may have fewer."""
    each = len(batches) // epochs
    for epoch in range(epochs):
        own = batches[epoch * each : (epoch + 1) * each]
        yield from (own[k : k + together] for k in range(0, each, together))
