"""Does it pay to train again without the rows that the report lists? Digits with 10 % wrong labels.

Each seed draws new wrong labels, records one training with a query that no validation data enter ("self"), and trains
anew, from other first weights, without as many rows each time: those of ``report.drop_list(q=.05)``, those with the
highest loss after training, and random ones; and with all rows. Clean validation data then judge.

    python examples/retrain.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from digits import fit, noisy_digits
from scipy import stats
from torch.utils.data import Subset

from ine_callback import InfluenceCallback

NOTHING, LISTED, LOSS, RANDOM = "nothing", "drop_list(q=.05)", "highest loss", "random rows"


def one_seed(seed: int, epochs: int) -> dict[str, tuple[float, int, int]]:
    """Validation accuracy, rows dropped and how many of these were wrong, of each way to choose them."""
    train, val, true = noisy_digits(seed)
    images, given = train.tensors
    influence = InfluenceCallback("self")
    trainer, _ = fit(train, val, [influence], epochs, seed)
    listed = influence.report.drop_list(q=0.05)
    with torch.no_grad():
        loss = F.cross_entropy(trainer.lightning_module.eval()(images), given, reduction="none").numpy()
    size, everyone = len(listed), np.arange(len(given))
    chosen = {
        NOTHING: everyone[:0],
        LISTED: listed,
        LOSS: np.argsort(-loss)[:size],
        RANDOM: np.random.default_rng(seed).permutation(everyone)[:size],
    }
    found = {}
    for name, dropped in chosen.items():
        again, _ = fit(Subset(train, np.setdiff1d(everyone, dropped)), val, [], epochs, seed + 1000)
        accuracy = float(again.callback_metrics["val_accuracy"])
        found[name] = accuracy, len(dropped), int((given != true)[dropped].sum())
    return found


def interval(values: np.ndarray) -> str:
    """Mean in per cent and half of its 95 % interval (Student's t over the seeds)."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{100 * values.mean():6.2f} ± {100 * half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is fastest on one core
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    runs = []
    for seed in range(args.seeds):
        runs.append(one_seed(seed, args.epochs))
        print(f"seed {seed}: " + ", ".join(f"{name} {each[0]:.1%}" for name, each in runs[-1].items()), flush=True)
    accuracy = {name: np.array([run[name][0] for run in runs]) for name in runs[0]}
    print("\nValidation accuracy in per cent, and how much more than another way (paired by seed):")
    print(f"{'dropped':18s}{'rows':>6s}{'wrong':>7s}{'accuracy':>18s}{'than nothing':>18s}{'than random':>18s}")
    for name, values in accuracy.items():
        rows, wrong = (np.mean([run[name][k] for run in runs]) for k in (1, 2))
        gains = [interval(values - accuracy[other]) if name != other else "" for other in (NOTHING, RANDOM)]
        print(f"{name:18s}{rows:6.0f}{wrong:7.0f}{interval(values):>18s}{gains[0]:>18s}{gains[1]:>18s}")
    print(f"drop_list less highest loss: {interval(accuracy[LISTED] - accuracy[LOSS])}")


if __name__ == "__main__":
    main()
