"""The toy problem as a LightningModule, and a Trainer that is quiet."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import toy
from rankprune.integrations.lightning import TRPCallback


class Lit(toy.Net, pl.LightningModule):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch)["loss"]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return toy.sgd(self)


def loader() -> DataLoader:
    return DataLoader(toy.Data(), batch_size=toy.BATCH)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": toy.EPOCHS, "log_every_n_steps": toy.EVERY}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **settings})


def callback(**more: Any) -> TRPCallback:
    return TRPCallback(**toy.settings(**{"ramp": 0.5, **more}))
