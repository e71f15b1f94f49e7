"""The Plan: what happens to each layer. Rules produce it; projection, decomposition, reports and checkpoints consume it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from rankprune.columns import aligned
from rankprune.errors import CheckpointError, RankPruneError
from rankprune.files import check_folder, draft_of
from rankprune.latency import Setting

FORMAT = 1
"""Version of the JSON form. A reader refuses any other."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: the scheme and rank it gets, or the reason why it stays dense; with both, projections hold it at that rank.

    `shape` is that of its weight. MACs are over the whole example batch, None where none was given. Parameters include the
    bias. `error` is the share of the weight's energy that the truncation loses, only by projection where the layer stays dense:
    sum of s_j^2 beyond the rank over that of all; in a calibrated plan, of the energy of the layer's outputs. Milliseconds are
    predicted ones, in the plan's setting, where its rule goes by latency.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str | None
    rank: int | None
    full_rank: int | None
    macs_before: int | None
    macs_after: int | None
    params_before: int
    params_after: int
    error: float
    reason: str | None
    ms_before: float | None = None
    ms_after: float | None = None

    @property
    def becomes_pair(self) -> bool:
        """Whether it is decomposed."""
        return self.rank is not None and self.reason is None


@dataclass(frozen=True)
class Plan:
    """All layers that hold a weight matrix, in the model's order, and the cost of the whole dense model.

    `uncounted` names modules that ran but whose MACs could not be counted: they are missing from all MACs here. Where the rule
    goes by latency, `ms_dense` is how long the dense model was measured to take, in this `setting` and on inputs of these
    `input_shapes`, and `ms_measured` how long it took decomposed like this, with random weights, if that was timed. A plan
    is `calibrated` if ranks were chosen by the layers' outputs on calibration inputs.
    """

    layers: tuple[LayerPlan, ...]
    macs_dense: int | None
    params_dense: int
    scheme: str
    rule: str
    uncounted: tuple[str, ...] = ()
    ms_dense: float | None = None
    ms_measured: float | None = None
    setting: Setting | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()
    calibrated: bool = False

    @cached_property
    def decomposed(self) -> dict[str, LayerPlan]:
        """The layers that become a pair, by name."""
        return {layer.name: layer for layer in self.layers if layer.becomes_pair}

    @cached_property
    def projected(self) -> dict[str, LayerPlan]:
        """The layers with a rank, by name: those that become a pair, and those that stay dense at that rank."""
        return {layer.name: layer for layer in self.layers if layer.rank is not None}

    @cached_property
    def choices(self) -> dict[str, tuple[str, int]]:
        """Scheme and rank of each layer with a rank, by name."""
        return {e.name: (e.scheme, e.rank) for e in self.layers if e.scheme is not None and e.rank is not None}

    @cached_property
    def skipped(self) -> dict[str, str]:
        """The layers that stay dense, each with its reason."""
        return {layer.name: layer.reason or "" for layer in self.layers if not layer.becomes_pair}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each decomposed layer."""
        return {name: self.choices[name][1] for name in self.decomposed}

    @property
    def macs(self) -> int | None:
        """MACs of the whole model after decomposition, on the example batch."""
        if self.macs_dense is None:
            return None
        return self.macs_dense + sum((e.macs_after or 0) - (e.macs_before or 0) for e in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the whole model after decomposition."""
        return self.params_dense + sum(e.params_after - e.params_before for e in self.layers)

    @property
    def ms(self) -> float | None:
        """Milliseconds of the whole model after decomposition, as predicted from the measured times of its layers."""
        if self.ms_dense is None:
            return None
        return self.ms_dense + sum((e.ms_after or 0) - (e.ms_before or 0) for e in self.layers)

    def __or__(self, other: "Plan") -> "Plan":
        """Both plans in one, for parts of a model that were planned apart; without times, for these do not add up.

        Raises:
            RankPruneError: if they are not of one model and the same example inputs, or give one layer a rank each.
        """
        mine, theirs = ([(e.name, e.kind, e.shape, e.macs_before) for e in plan.layers] for plan in (self, other))
        if mine != theirs:
            raise RankPruneError("these plans are not of the same model, or not of example inputs of the same shapes")
        if both := sorted(self.projected.keys() & other.projected.keys()):
            raise RankPruneError(f"both plans give the layers {both[:3]} a rank; leave them out of one with exclude=")
        return replace(
            self,
            layers=tuple(_either(a, b) for a, b in zip(self.layers, other.layers, strict=True)),
            scheme=self.scheme if self.scheme == other.scheme else "auto",
            rule=f"{self.rule}; {other.rule}",
            ms_dense=None,
            ms_measured=None,
            setting=None,
            input_shapes=(),
            calibrated=self.calibrated or other.calibrated,
        )

    def to_json(self) -> str:
        """The plan as a JSON text; from_json gives back an equal plan."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what to_json wrote.

        Raises:
            CheckpointError: if the text is not a plan of this format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"this is not a plan: not JSON ({error})") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise CheckpointError(f"this is not a plan of format {FORMAT}; write it again with this version of rankprune")
        try:
            layers = tuple(_layer(entry) for entry in data.pop("layers"))
            if len({layer.name for layer in layers}) < len(layers):
                raise KeyError("a layer that is there twice")
            setting = data.pop("setting", None)
            data["uncounted"] = tuple(data["uncounted"])
            data["input_shapes"] = tuple(map(_shape, data.get("input_shapes", ())))
            _check_types(cls, data)
            _check_types(Setting, setting or {})
            return cls(layers=layers, setting=None if setting is None else Setting(**setting), **data)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"this plan lacks a field or has an unknown one, or one of a wrong type ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file.

        Raises:
            RankPruneError: if there is no such folder.
        """
        check_folder(Path(path))
        with draft_of(Path(path)) as draft:
            draft.write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan from a JSON file.

        Raises:
            CheckpointError: if there is no such file, or it is not a plan.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the plan {str(path)!r}: {error}") from error

    def __str__(self) -> str:
        """A table with a row for each layer, and the totals."""
        rows = [("layer", "weight", "scheme", "rank", "error", "MACs", "params")]
        for e in self.layers:
            shape = "x".join(map(str, e.shape))
            macs = f"{e.macs_before:,} > {e.macs_after:,}" if e.macs_before is not None else ""
            if not e.becomes_pair:
                rows.append((e.name, f"{e.kind} {shape}", "dense", "", "", f"{e.reason}", ""))
            else:
                rank, params = f"{e.rank}/{e.full_rank}", f"{e.params_before:,} > {e.params_after:,}"
                rows.append((e.name, f"{e.kind} {shape}", e.scheme or "", rank, f"{e.error:.2%}", macs, params))
        lines = aligned(rows, "<<<<<--")
        if self.calibrated:
            lines.append("errors are of the layers' outputs on calibration inputs")
        if self.macs is not None and self.macs_dense:
            lines.append(f"MACs {self.macs_dense:,} > {self.macs:,} ({self.macs_dense / self.macs:.2f}x fewer)")
        if self.uncounted:
            lines.append(f"MACs not counted: {', '.join(self.uncounted)}")
        lines.append(f"params {self.params_dense:,} > {self.params:,} ({self.params_dense / self.params:.2f}x fewer)")
        if self.ms is not None and self.ms_dense:
            where = "" if self.setting is None else f"; {_where(self.setting)}, {_shapes(self.input_shapes)}"
            measured = "" if self.ms_measured is None else f", measured {self.ms_measured:.2f}"
            faster = f"{self.ms_dense / self.ms:.2f}x faster"
            lines.append(f"ms {self.ms_dense:.2f} > {self.ms:.2f} ({faster}, predicted{measured}{where})")
        return "\n".join(lines)


def _either(a: LayerPlan, b: LayerPlan) -> LayerPlan:
    """Of two entries of a layer, of which at most one has a rank, that one; if none has, the layer has the reasons of both."""
    entry = replace(b if a.rank is None else a, ms_before=None, ms_after=None)
    if entry.rank is not None or a.reason == b.reason:
        return entry
    return replace(entry, reason=f"{a.reason}; {b.reason}")


def _where(setting: Setting) -> str:
    """The backend, and what it runs on."""
    threads = f"{setting.threads} thread{'s' if setting.threads > 1 else ''}"
    return f"{setting.backend}, {threads if setting.device == 'cpu' else setting.cpu}"


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def _layer(entry: dict[str, Any]) -> LayerPlan:
    if set(entry) != {f.name for f in fields(LayerPlan)}:
        raise KeyError(f"a layer with the fields {sorted(entry)}")
    _check_types(LayerPlan, entry)
    if (entry["scheme"] is None) != (entry["rank"] is None):
        raise KeyError("a layer with a scheme and no rank, or a rank and no scheme")
    return LayerPlan(**{**entry, "shape": _shape(entry["shape"])})


def _shape(sizes: Iterable[Any]) -> tuple[int, ...]:
    shape = tuple(sizes)
    if not all(type(size) is int for size in shape):
        raise TypeError(f"the shape {list(shape)}")
    return shape


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError for a number or text of another type than the field of that name; JSON has whole numbers for floats."""
    for name, hint in get_type_hints(kind).items():
        types = get_args(hint) or (hint,)
        if name in values and {*types} <= {bool, int, float, str, NoneType}:
            allowed = (*types, int) if float in types else types
            if type(values[name]) not in allowed:
                raise TypeError(f"{name}: {values[name]!r}")
