"""Methods without a fit: on a module that a Trainer trained before, or that comes from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ine_callback.errors import InfluenceError
from ine_callback.integrations.progress import progress_of
from ine_callback.integrations.trainer import evaluating, overrides, transferred
from ine_callback.methods.bif.bif import BIF
from ine_callback.methods.bif.in_fit import run_chains
from ine_callback.methods.bif.row_losses import RowLoss
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import FitEndMethods, Interrupted
from ine_callback.methods.influence.influence import IF
from ine_callback.methods.influence.run import weights_without
from ine_callback.methods.influence.token_influence import TokenInfluence
from ine_callback.queries import Query, parse
from ine_callback.queries.module_loss import ModuleLoss
from ine_callback.queries.sources import DataSource
from ine_callback.report import InfluenceReport
from ine_callback.scores import Attribution
from ine_callback.utilities.isolation import isolated

OWNER_BIF, OWNER_IF, OWNER_UNLEARNING = "run_bif", "run_if", "run_unlearning"


def run_bif(
    trainer: Trainer,
    module: LightningModule,
    bif: BIF | None = None,
    queries: str | Query | list[str | Query] | dict[str, Any] | Callable[..., Any] = "val",
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    loss_fn: RowLoss | None = None,
    report: InfluenceReport | None = None,
    max_query_rows: int = 2000,
) -> Attribution:
    """Bayesian influence of training rows, with a Trainer's device, precision and progress bar but without a fit.

    For a fit whose chains failed or were not asked for, and for checkpoints
    (``Model.load_from_checkpoint(path)``). The module comes back bit for bit as it was, on the device where it was.

    Args:
        trainer: The Trainer of the fit, or one with the same precision.
        module: The trained module.
        bif: Settings; ``at`` has no part in it.
        queries: As for :class:`~ine_callback.InfluenceCallback`; ``"self"`` is f-INE's alone.
        train_dataloaders: The training loader; its data set must be indexable. By default the datamodule's, else that
            of the Trainer's last fit, else the module's own.
        val_dataloaders: Validation loaders, for ``"val"``; found in the same way.
        datamodule: Where loaders come from; it is prepared and set up for ``"fit"``.
        loss_fn: Losses of single rows, see :func:`~ine_callback.bif_scores`.
        report: f-INE's report of the fit: it chooses the rows of a large training set. To keep the chains in it:
            ``report.with_attributions(scores)``.
        max_query_rows: Rows taken of a larger query loader, a fixed random sample.

    Returns:
        The scores; score > 0: training on the row lowers the query.

    Raises:
        InfluenceError: If there are several processes, no loader, or no row losses, rows or queries.

    Example:
        >>> import lightning, torch
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> rows = lambda module, batch: module(batch).square().mean(1)
        >>> trainer = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> found = run_bif(trainer, BoringModel(), BIF(draws=20), datamodule=BoringDataModule(), loss_fn=rows)
        >>> found.scores.shape
        (64, 1)
    """
    with _context(
        OWNER_BIF, trainer, module, queries, train_dataloaders, val_dataloaders, datamodule, max_query_rows
    ) as context:
        context.scores = None if report is None else report.scores
        try:
            found = run_chains(bif or BIF(), context, loss_fn)
        except Interrupted as stopped:
            found = stopped.found
        return replace(found, notes=(*context.source.notes, *found.notes))


def run_if(
    trainer: Trainer,
    module: LightningModule,
    method: IF | TokenInfluence | None = None,
    queries: str | Query | list[str | Query] | dict[str, Any] | Callable[..., Any] = "val",
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    max_query_rows: int = 2000,
) -> Attribution:
    """Influence functions of a trained module, with a Trainer's device, precision and progress bar but without a fit.

    ``damping="run"`` needs the learning rates of a fit, and is not known here.

    Args:
        trainer: The Trainer of the fit, or one with the same precision.
        module: The trained module.
        method: Settings; ``at`` has no part in it.
        queries: As for :class:`~ine_callback.InfluenceCallback`; ``"self"`` is f-INE's alone. A
            :class:`~ine_callback.TokenInfluence` has its own texts and needs none.
        train_dataloaders: The training loader; its data set must be indexable.
        val_dataloaders: Validation loaders, for ``"val"``.
        datamodule: Where loaders come from; it is prepared and set up for ``"fit"``.
        max_query_rows: Rows taken of a larger query loader, a fixed random sample.

    Returns:
        The scores; score > 0: training on the row lowers the query.

    Raises:
        InfluenceError: If there are several processes, no loader, rows or queries, or the method refuses.

    Example:
        >>> import lightning, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Line(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.line = torch.nn.Linear(1, 1)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
        ...
        ...     validation_step = training_step
        >>> data = DataLoader(TensorDataset(torch.ones(6, 1), torch.arange(6.0)[:, None]))
        >>> trainer = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> run_if(trainer, Line(), IF("exact"), train_dataloaders=data, val_dataloaders=data).scores.shape
        (6, 1)
    """
    method = method or IF()
    asked = queries if "queries" in method.needs else None
    with _context(
        OWNER_IF, trainer, module, asked, train_dataloaders, val_dataloaders, datamodule, max_query_rows
    ) as context:
        methods = FitEndMethods([method], OWNER_IF, on_error="raise")
        methods.run(context)
        if not methods.found:
            raise KeyboardInterrupt
        (found,) = methods.found
        return replace(found, notes=(*context.source.notes, *methods.notes, *found.notes))


def run_unlearning(
    trainer: Trainer,
    module: LightningModule,
    rows: Sequence[int],
    method: IF | None = None,
    train_dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
) -> dict[str, Tensor]:
    """The weights that a training without some rows would have ended at, by one Newton step.

    To be loaded with ``module.load_state_dict(found, strict=False)``. The module itself stays as it is.

    Args:
        trainer: The Trainer of the fit, or one with the same precision.
        module: The trained module.
        rows: Dataset indices of the rows to leave out.
        method: Solver, damping and layers; by default EK-FAC. Iterative solvers take EK-FAC's inverse here.
        train_dataloaders: The training loader; its data set must be indexable.
        datamodule: Where loaders come from; it is prepared and set up for ``"fit"``.

    Returns:
        All parameters by name; layers that ``method`` leaves out are as they were.

    Raises:
        InfluenceError: As :func:`run_if`, and where the rows' gradients under all labels do not fit into memory.
    """
    settings = replace(method or IF(), groups={"rows": list(rows)})
    data = train_dataloaders, None, datamodule
    with _context(OWNER_UNLEARNING, trainer, module, None, *data, 1) as context, isolated(module):
        return weights_without(settings, context)["rows"]


@contextlib.contextmanager
def _context(
    owner: str,
    trainer: Trainer,
    module: LightningModule,
    queries: Any,
    train_dataloaders: Any,
    val_dataloaders: Any,
    datamodule: LightningDataModule | None,
    max_query_rows: int,
) -> Iterator[FitContext]:
    """The trained module with its data, as a method gets it in a fit."""
    if trainer.world_size > 1:
        raise InfluenceError(f"{owner}: {trainer.world_size} processes are not supported; use Trainer(devices=1).")
    train, val = _loaders(owner, trainer, module, train_dataloaders, val_dataloaders, datamodule)
    with _connected(trainer, module, datamodule):
        loss = ModuleLoss(module, owner)
        source = DataSource(owner, loss, train, val, max_query_rows)
        asked = {} if queries is None else parse(queries, owner)
        context = FitContext(
            module,
            [bound for name, query in asked.items() for bound in query.bind(name, source)],
            source,
            loss.training,
            lambda batch: transferred(trainer, batch),
            lambda: evaluating(trainer),
            progress=progress_of(trainer),
            owner=owner,
        )
        if not context.queries and queries is not None:
            raise InfluenceError(f"{owner}: there is no query: 'self' is f-INE's alone; add 'val' or another one.")
        yield context


def _loaders(
    owner: str, trainer: Trainer, module: LightningModule, train: Any, val: Any, datamodule: LightningDataModule | None
) -> tuple[Any, list[Any]]:
    """The training loader and the validation loaders."""
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
    train = _first(train, datamodule, trainer.train_dataloader, module, "train_dataloader")
    val = _first(val, datamodule, trainer.val_dataloaders, module, "val_dataloader")
    loaders = [] if train is None else tree_leaves(train)
    if len(loaders) != 1:
        raise InfluenceError(f"{owner}: {len(loaders)} training loaders were found; pass train_dataloaders=loader.")
    return loaders[0], [] if val is None else tree_leaves(val)


def _first(
    given: Any, datamodule: LightningDataModule | None, of_trainer: Any, module: LightningModule, name: str
) -> Any:
    if given is not None:
        return given
    if datamodule is not None and overrides(datamodule, name):
        return getattr(datamodule, name)()
    if of_trainer is not None:
        return of_trainer
    return getattr(module, name)() if overrides(module, name) else None


@contextlib.contextmanager
def _connected(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[None]:
    """The module is the Trainer's and on its device; afterwards on its own device again."""
    before, owner = module.device, module._trainer
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    # the hooks that move a batch are the datamodule's or the module's, as in a fit
    trainer._data_connector.attach_datamodule(module, datamodule or getattr(trainer, "datamodule", None))
    module.trainer = trainer
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(before)
        module._trainer = owner
