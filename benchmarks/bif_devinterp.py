"""BIF beside devinterp's ``bif``: cost of a draw, and whether both libraries find the same covariances.

    python -m benchmarks.bif_devinterp --json bif-devinterp.json --data DIR

Both sample plain SGLD around one trained network of protocol G1 (benchmarks/g1.py): 1,000 rows, 200 queries, 4 chains.
devinterp 2.0 knows language models alone: rows of token numbers, and ``loss_fn(model, input_ids)``, a loss for each
token but the first. So a row here is the text (its number, 0) and ``loss_fn`` looks the row up: one "token", whose loss
is the row's. Rows and queries are its observables, evaluated at every draw. How the settings map, from its source:

    chain         w ← w − (lr/2) (nbeta ∇L_B + localization (w − w*)) + √lr ξ, ξ ~ N(0, 1), in ``SGMCMC.sgld``: ours,
                  with lr = step_size, n_beta and localization of the same meaning, no factor apart
    minibatch     the same; its ``batch_size`` is also that of its observables, while ours are evaluated in batches of
                  ``eval_rows``, a setting of their own: all rows at once
    rows of it    each once an epoch, the first epoch's order again in all others; ours are drawn with replacement
    start         at w*; ours in the quadratic posterior's law: so ``burn_in`` is ten times the slowest relaxation
    draw          after the first of ``num_steps_bw_draws`` steps; ours after the last of ``thinning``
    chains        one after the other, all on the same minibatches; ours advance together, on the same minibatches
    covariance    over the draws of all chains together ("stack", as it recommends), n − 1; ours is the mean over chains
    sign          ours is theirs: both are the plain covariance, no minus

Each library is called ``--calls`` times, in turn, so that both meet the same load. Milliseconds are CPU time of all
threads in a call, less a call with a tenth of the draws, for a draw of all four chains: its steps, its evaluation of
rows and queries, its share of the covariance. devinterp also writes every loss to disk. Agreement is Pearson's
correlation of the covariances [rows x queries], mean over half of the calls, between two halves. ``scale`` is how large
devinterp's are where ours are 1, by products of independent halves, in which Monte-Carlo noise cancels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import g1
from benchmarks.bif import row_entropies, trained
from benchmarks.data import folder
from benchmarks.metrics import Floats
from benchmarks.network import machine
from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.evaluation import EachRow
from ine_callback.methods.bif.run import bif_scores

CHAINS, BATCH, THINNING, BURN_IN = 4, 200, 5, 200
STEP_SIZE, N_BETA, LOCALIZATION = 1e-3, 100.0, 100.0
Sampler = Callable[[g1.Problem, nn.Module, int, int], Floats]


def ours(problem: g1.Problem, model: nn.Module, draws: int, seed: int) -> Floats:
    """Covariances [rows, queries] by ``bif_scores``."""
    bif = BIF(
        chains=CHAINS,
        draws=draws,
        thinning=THINNING,
        burn_in=BURN_IN,
        step_size=STEP_SIZE,
        n_beta=N_BETA,
        localization=LOCALIZATION,
        batch_size=BATCH,
        preconditioner="none",
        reduced=False,
        eval_rows=len(problem.x),
        seed=seed,
    )
    queries = {"row": EachRow((problem.xq, problem.yq))}
    return bif_scores(model, (problem.x, problem.y), queries, bif, row_entropies, progress=False).plain


def theirs(problem: g1.Problem, model: nn.Module, draws: int, seed: int) -> Floats:
    """Covariances [rows, queries] by devinterp's ``bif``."""
    from datasets import Dataset
    from devinterp.slt.bif import bif

    x, y = torch.cat([problem.x, problem.xq]), torch.cat([problem.y, problem.yq])
    rows, everything = len(problem.x), len(x)

    def losses(module: nn.Module, input_ids: Tensor) -> Tensor:
        at = input_ids[:, 0]
        return F.cross_entropy(module(x[at]), y[at], reduction="none")[:, None]

    def numbers(first: int, end: int) -> Any:
        return Dataset.from_dict({"input_ids": [[k, 0] for k in range(first, end)]}).with_format("torch")

    with tempfile.TemporaryDirectory() as where, contextlib.redirect_stderr(io.StringIO()):  # its bars
        found = bif(
            model,
            numbers(0, rows),
            {"row": (numbers(0, rows), rows // BATCH), "query": (numbers(rows, everything), len(problem.xq) // BATCH)},
            lr=STEP_SIZE,
            n_beta=N_BETA,
            localization=LOCALIZATION,
            batch_size=BATCH,
            num_chains=CHAINS,
            num_draws=draws,
            num_steps_bw_draws=THINNING,
            num_burnin_steps=BURN_IN,
            num_init_loss_batches=1,
            init_seed=100 + CHAINS * seed,  # chain c takes this plus c
            loss_fn=losses,
            correlation_method="sequence",
            compute_covariance=True,
            device="cpu",
            output_path=Path(where) / "draws.zarr",
        )
        order = np.argsort(found["input_ids"].values[:, 0])  # it shuffles its observables
        covariance: Floats = found["influences"].values[np.ix_(order[:rows], order[rows:])].astype(np.float64)
    return covariance


LIBRARIES: dict[str, Sampler] = {"ine_callback": ours, "devinterp": theirs}


def timed(sampler: Sampler, problem: g1.Problem, draws: int, seed: int) -> tuple[Floats, float]:
    """Covariances, and CPU seconds of the call."""
    model, started = trained(0, problem), time.process_time()
    found = sampler(problem, model, draws, seed)
    return found, time.process_time() - started


def compare(problem: g1.Problem, draws: int, calls: int) -> dict[str, Any]:
    """Both libraries on the same network, in turn, each call with a seed of its own (an even number of them)."""
    runs: dict[str, list[Floats]] = {name: [] for name in LIBRARIES}
    cost: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    few = draws // 10
    for seed in range(calls):
        for name, sampler in LIBRARIES.items():
            _, little = timed(sampler, problem, few, seed)
            found, much = timed(sampler, problem, draws, seed)
            runs[name].append(found)
            cost[name].append(1e3 * (much - little) / (draws - few))
            print(f"{name:14s}seed {seed}  {cost[name][-1]:.2f} ms a draw, {much:.1f} s for {draws}", flush=True)
    a, b = (halves(np.stack(runs[name])) for name in LIBRARIES)
    return {
        "milliseconds_a_draw": cost,
        "times_faster": np.divide(cost["devinterp"], cost["ine_callback"]).tolist(),
        "agreement": {
            "ine_callback with itself": pearson([(a[0], a[1])]),
            "devinterp with itself": pearson([(b[0], b[1])]),
            "ine_callback with devinterp": pearson([(one, other) for one in a for other in b]),
        },
        "scale": float((a.mean(0) * b.mean(0)).sum() / (a[0] * a[1]).sum()),
    }


def halves(found: Floats) -> Floats:
    """Two independent means [2, rows, queries] over half of the calls each."""
    return np.stack([found[::2].mean(0), found[1::2].mean(0)])


def pearson(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    """Correlation of the entries, mean over pairs of matrices."""
    return float(np.mean([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs]))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--data", help="folder with mnist10k.npz (or INE_DATA); else scikit-learn's digits")
    parser.add_argument("--draws", type=int, default=300, help="draws of each chain in a call")
    parser.add_argument("--calls", type=int, default=10, help="calls of each library, an even number")
    parser.add_argument("--quick", action="store_true", help="two calls of 60 draws: to see it work")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("devinterp"):
        raise SystemExit('benchmarks.bif_devinterp needs devinterp: pip install -e ".[peers]"')
    importlib.import_module("devinterp.slt.bif")  # seconds that are no draw's
    torch.set_num_threads(1)  # the matrices are small: more threads are slower
    where = folder(args.data)
    draws, calls = (60, 2) if args.quick else (args.draws, args.calls)
    results = {
        "protocol": "bif_devinterp",
        "data": "scikit-learn digits" if where is None else "10,000 MNIST digits",
        "machine": machine(),
        **{"draws": draws, "calls": calls},
        **{"chains": CHAINS, "thinning": THINNING, "batch_size": BATCH, "burn_in": BURN_IN},
        **{"step_size": STEP_SIZE, "n_beta": N_BETA, "localization": LOCALIZATION},
        **compare(g1.load(where), draws, calls),
    }
    args.json.write_text(json.dumps(results, indent=1))
    print(
        f"{results['agreement']}, times faster {np.median(results['times_faster']):.2f}, scale {results['scale']:.3f}"
    )


if __name__ == "__main__":
    main()
