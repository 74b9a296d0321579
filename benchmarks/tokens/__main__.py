"""Token influence with suppression (IF-Guide): are unwanted tokens found, and is a training without them rid of them?

    python -m benchmarks.tokens --json tokens.json --data DIR

Two corpora (benchmarks/tokens/problems.py), five seeds each. A transformer is trained on all texts and its tokens are
scored; it is trained anew from the same seed with the chosen tokens suppressed. Judged by the share of texts it then
writes with unwanted passages, and by its perplexity on held-out clean text. ``default`` is the package's choice of
tokens, which is the paper's; ``as many`` takes as many as are unwanted, without neighbours. The proxy is a model of
half the width. Random tokens, and leaving out as many of the worst documents as are planted, are for comparison.
Nothing is tuned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.data import folder
from benchmarks.influence.shared import context_of, scored
from benchmarks.metrics import Floats, auroc
from benchmarks.network import machine
from benchmarks.tokens.markdown import section
from benchmarks.tokens.model import Transformer, judged, loss_of, trained
from benchmarks.tokens.problems import Bools, Problem, as_row, language, shakespeare
from ine_callback import TokenInfluence, TokenMask, token_mask
from ine_callback.scores import Attribution

SEEDS = 5
METHODS: dict[str, dict[str, Any]] = {
    "EK-FAC": {},
    "EK-FAC, no negative texts": {"negative": None},
    "diagonal": {"curvature": "diagonal"},
    "no curvature": {"curvature": "identity"},
    "EK-FAC by position": {"parts": "position"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with tinyshakespeare.txt (or INE_DATA); without it one corpus")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: to see it work")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where, seeds = folder(args.data), 1 if args.quick else args.seeds
    makers: dict[str, Any] = {"language": language}
    if where is not None:
        makers["shakespeare"] = lambda seed, quick: shakespeare(seed, quick, where)
    found = {
        name: [measured(make(seed, args.quick), seed) for seed in track(range(seeds), description=name)]
        for name, make in makers.items()
    }
    summary = {name: _means(each) for name, each in found.items()}
    results = {"protocol": "tokens", "machine": machine(), "seeds": seeds, "tokens": summary, "each": found}
    args.json.write_text(json.dumps(results, indent=1))
    print("\n".join(section(results)))


def measured(p: Problem, seed: int) -> dict[str, float]:
    """All numbers of one seed."""
    model = trained(p, seed)
    found = {f"base: {k}": v for k, v in judged(p, model).items()}
    found["share of unwanted tokens"] = float(p.unwanted[:, 1:].double().mean())
    each = {name: _scored(p, model, options) for name, options in METHODS.items()}
    for name, one in each.items():
        shift = -1 if name.endswith("position") else 0  # where label t + 1 is predicted
        found |= _ranks(p, one, name, shift)
    proxy = _scored(p, trained(p, seed, width=p.width // 2), {})
    found |= _ranks(p, proxy, "proxy of half the width", 0)
    planted = int(p.unwanted[:, 1:].sum())
    as_many: dict[str, Any] = {"quantile": 0.98, "window": 0, "budget": planted / p.unwanted[:, 1:].numel()}
    masks = {
        "default": _mask(p, token_mask(each["EK-FAC"])),
        "as many": _mask(p, token_mask(each["EK-FAC"], **as_many)),
        "as many, proxy": _mask(p, token_mask(proxy, **as_many)),
        "the unwanted ones": p.unwanted,
        "as many random ones": _random(p, planted, seed),
    }
    for name, mask in masks.items():
        found |= {f"{name}: {k}": v for k, v in judged(p, trained(p, seed, mask)).items()}
        if name.startswith(("default", "as many")):
            found[f"{name}: precision"] = float((mask & p.unwanted).sum() / mask.sum())
            found[f"{name}: recall"] = float((mask & p.unwanted).sum() / planted)
    worst = torch.from_numpy(each["EK-FAC"].scores[:, 0].argsort()[: int((~p.unwanted.any(1)).sum())].copy())
    found |= {f"without the worst documents: {k}": v for k, v in judged(p, trained(p, seed, rows=worst)).items()}
    return found


def _scored(p: Problem, model: Transformer, options: dict[str, Any]) -> Attribution:
    method = TokenInfluence(**{"positive": p.positive, "negative": p.negative, "damping": "auto"} | options)
    return scored(context_of(model, loss_of, (p.texts, p.texts), {}), method)


def _ranks(p: Problem, found: Attribution, name: str, shift: int) -> dict[str, float]:
    """AUROC of tokens, and of documents by the sum of their tokens."""
    scores: Floats = found.tokens.scores[:, 0].reshape(len(p.texts), -1)  # type: ignore[union-attr]
    bad: Bools = p.unwanted.numpy()
    by_label = scores[:, 1:] if shift == 0 else scores[:, : bad.shape[1] - 1]
    return {
        f"{name}: AUROC of tokens": float(auroc(by_label.ravel(), bad[:, 1:].ravel())),
        f"{name}: AUROC of documents": float(auroc(found.scores[:, 0], np.asarray(bad.any(1)))),
    }


def _mask(p: Problem, mask: TokenMask) -> Tensor:
    return torch.from_numpy(np.stack([mask.of(row, text) for row, text in enumerate(p.texts.numpy())]))


def _random(p: Problem, count: int, seed: int) -> Tensor:
    chosen = torch.zeros(p.texts.numel(), dtype=torch.bool)
    chosen[torch.randperm(chosen.numel(), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return chosen.view_as(p.texts)


def _means(each: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: as_row([one[name] for one in each]) for name in each[0]}


if __name__ == "__main__":
    main()
