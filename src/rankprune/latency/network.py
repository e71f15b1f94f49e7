"""The latency of one network: measured by one process for all, set right, and carried in the states of trainings."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rankprune.backends import backend_named
from rankprune.distributed import Team, is_sharded
from rankprune.errors import ExportError, MissingExtraError, RankPruneError
from rankprune.inputs import Inputs, on_device, shapes
from rankprune.latency.meter import Setting, Subject, Variant
from rankprune.latency.table import LatencyTable, correct_table, measure_table


class NetworkLatency:
    """What is known of a network's times: nothing at first, then a table that is the same on all processes of a team.

    Args:
        x: what the model is called with.
        subjects: the layers to time, by name.
        backend, threads: as in Budget.

    Attributes:
        table: None until it is measured or loaded.
    """

    def __init__(self, model: nn.Module, x: Inputs, subjects: Mapping[str, Subject], backend: str, threads: int | None) -> None:
        self.table: LatencyTable | None = None
        self._model, self._x, self._subjects = model, x, subjects
        self._backend, self._threads = backend, threads
        self._device = next(model.parameters()).device

    @property
    def known(self) -> LatencyTable:
        """The table.

        Raises:
            RankPruneError: if there is none yet.
        """
        if self.table is None:
            raise RankPruneError("the network has not been timed yet: that happens when TRP is attached to an optimizer")
        return self.table

    def measure(self, team: Team, choose: Callable[[LatencyTable], Variant]) -> None:
        """Have a table: the first process's, which measures it if it has none, while the others wait.

        Args:
            choose: what the rule would make of the network at such times; that is tried as well.

        Raises:
            RankPruneError: on all processes if one fails, and if the weights are sharded.
            MissingExtraError: if the backend is not installed.
            ExportError: if the backend cannot take the model or a layer.
        """

        def measured() -> LatencyTable:
            if self.table is not None:
                return self.table
            if self._sharded:
                raise RankPruneError(
                    "the network cannot be timed while its weights are sharded over processes: attach a TRP with this rule "
                    "before sharding them, and load its state_dict() into the one made after, before that is attached"
                )
            try:
                x = self._inputs
                table = measure_table(self._model, x, self._subjects, self._backend, self._threads)
                return correct_table(table, self._model, x, self._subjects, choose(table))
            except (MissingExtraError, ExportError) as error:
                error.args = (f"{error}; or budget in MACs, like Budget(macs=0.5)",)
                raise

        self.table = _of_first(team, measured)

    def correct(self, team: Team, variant: Variant, *, fit: bool = True) -> bool:
        """Set the table right by the network with these pairs, which the first process times while the others wait.

        Args:
            fit: whether predictions change; without, that time is only noted.

        Returns:
            Whether the table changed: not if that cannot be timed, or the machine is busy.

        Raises what `measure` does.

        Warns:
            UserWarning: if that cannot be timed, for the table is from another machine or the weights are sharded; then the
                table stays as it is. Where it would only be noted there is no warning.
        """

        def corrected() -> LatencyTable:
            table = self.known
            if self._sharded or self._elsewhere(table.setting):
                if not fit:
                    return table
                warnings.warn(
                    f"ranks go by latencies as measured before ({table.setting}): here they cannot be set right by timing the "
                    "network as it would be decomposed now",
                    stacklevel=2,
                )
                return table
            return correct_table(table, self._model, self._inputs, self._subjects, variant, fit=fit)

        before, self.table = self.table, _of_first(team, corrected)
        return self.table != before

    def load(self, values: Mapping[str, Any]) -> None:
        """Have the table whose dataclasses.asdict this is, wherever it was measured.

        Raises:
            RankPruneError: if it is of another backend, dtype or number of threads, or for other inputs, layers or ranks.
        """
        table = LatencyTable.of(values)
        there, dtype = table.setting, str(next(self._model.parameters()).dtype).removeprefix("torch.")
        if (there.backend, there.dtype, there.threads) != (self._backend, dtype, self._threads or there.threads):
            here = f"{self._backend} in {dtype}" + (f" on {self._threads} threads" if self._threads else "")
            raise RankPruneError(f"this state goes by times measured as {there}, not by {here}; give the same rule and dtype")
        here = shapes(self._x)
        if table.input_shapes != here:
            raise RankPruneError(
                f"this state goes by times measured on inputs of {list(table.input_shapes)}, not of {list(here)}; give "
                "example_inputs of the same shapes"
            )
        tried = {name: {s.name: set(ranks) for s, ranks in subject.ranks.items()} for name, subject in self._subjects.items()}
        if tried != {name: {s: set(ranks) for s, ranks in times.pair_ns.items()} for name, times in table.alone.items()}:
            raise RankPruneError(
                "this state goes by times of other layers or at other ranks; give the same model, scheme, include, exclude and "
                "round_to"
            )
        self.table = table

    @property
    def _inputs(self) -> Inputs:
        """What the model is called with, where it is now: trainers move it. Where it was not moved, inputs stay, too."""
        here = next(self._model.parameters()).device
        return self._x if here == self._device else on_device(self._x, here)

    @property
    def _sharded(self) -> bool:
        return any(map(is_sharded, self._model.parameters()))

    def _elsewhere(self, setting: Setting) -> bool:
        """Whether a setting is not that of the model on this machine."""
        return not backend_named(self._backend).installed or Setting.of(self._model, self._backend, self._threads) != setting


def _of_first(team: Team, compute: Callable[[], LatencyTable]) -> LatencyTable:
    return team.share(lambda: {"table": compute()} if team.rank == 0 else {})["table"]
