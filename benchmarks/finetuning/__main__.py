"""Do one run's scores foretell retraining where a language model is fine-tuned from fixed weights (protocol FT)?

    python -m benchmarks.finetuning --json finetuning.json --data DIR --truth truth.pt --dropout 0 0.1

A small GPT is pre-trained on the first half of tinyshakespeare and fine-tuned, always from the same weights, on 448
documents (whole speeches, padded) from eight places of the other half; 50 held-out documents of the same scenes are the
queries. So both texts are of one kind; a pre-training on the King James Bible would have needed a second file. Truth:
60 independent random halves x 3 seeds of the order and dropout, about six minutes of one core for each probability of
dropout, and one and a half to pre-train; --truth keeps both. LDS: mean over queries of the Spearman correlation over
halves of the scores' sum with minus the loss.

Scores are those of one run on all documents, three times: f-INE recorded in the run (default, without the gradient
sample, first order; where f-INE has a closing pass, with and without it), TracIn and K-FAC influence functions at the
end of the same run, and BM25, below which no score is worth its name. Without --data there is only the quick form, on
four poems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks.finetuning import scores
from benchmarks.finetuning.judge import judge
from benchmarks.finetuning.model import GPT, Training
from benchmarks.finetuning.text import Sizes, make
from benchmarks.finetuning.truth import Counts, Kept
from benchmarks.network import machine

SIZES = Sizes(rows=448, queries=50, length=48, vocabulary=512)
SEEDS: tuple[int, ...] = (101, 102, 103)
QUICK = Sizes(rows=24, queries=6, length=24, vocabulary=96)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with tinyshakespeare.txt and mnist10k.npz (or INE_DATA)")
    parser.add_argument("--truth", type=Path, help="file that keeps the pre-trained weights and the truth")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="probabilities")
    parser.add_argument("--quick", action="store_true", help="four poems, few steps, nothing kept: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, training, counts, seeds, file = SIZES, Training(), Counts(), SEEDS, args.truth
    if args.quick:
        sizes, counts, seeds, file = QUICK, Counts(halves=6, seeds=2, all_rows=2), SEEDS[:1], None
        training = replace(training, width=16, depth=1, pretraining=20, epochs=2)
        name, text = "four poems", data.excerpt().replace("\n", "\n\n")  # a line is a speech
    else:
        where = data.folder(args.data)
        if where is None:
            raise SystemExit("name a folder with tinyshakespeare.txt with --data or INE_DATA, or see --quick work")
        name, text = "tinyshakespeare", data.text(where)
    task = make(text, sizes)
    kept = Kept(task, training, counts, file)
    results: dict[str, Any] = {
        "protocol": "finetuning",
        "text": name,
        "machine": machine(),
        **{"rows": sizes.rows, "queries": sizes.queries, "vocabulary": task.vocabulary},
        "parameters": sum(p.numel() for p in GPT(task.vocabulary, sizes.length, training).parameters()),
        **{"training": asdict(training), "halves": counts.halves, "retrained": counts.seeds, "seeds": list(seeds)},
        "dropout": {},
    }
    for dropout in args.dropout:
        truth = kept.truth(dropout)
        about = {"seconds": truth.seconds, **truth.reliability()}
        rows: dict[str, Any] = {}
        results["dropout"][f"{dropout:g}"] = {"truth": about, "rows": rows}
        print(f"dropout {dropout:g}:", ", ".join(f"{key} {value:.3f}" for key, value in about.items()), flush=True)
        found: dict[str, list[scores.Scores]] = {}
        for seed in seeds:
            for one in scores.of_run(kept, task, seed, dropout):
                found.setdefault(one.name, []).append(one)
        found["BM25"] = [scores.bm25(task)]
        for score, runs in found.items():
            rows[score] = judge(runs, truth)
            shown = {key: value for key, value in rows[score].items() if isinstance(value, float)}
            print(f"{score:40s}", "  ".join(f"{key} {value:.3f}" for key, value in shown.items()), flush=True)
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
