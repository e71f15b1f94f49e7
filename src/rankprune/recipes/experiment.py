"""What an experiment is: a config from a TOML file or the command line, and the folders that it uses."""

import os
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rankprune.errors import RankPruneError
from rankprune.recipes.photograph_batches import PhotographConfig
from rankprune.recipes.schedule import TrainConfig
from rankprune.rules import parse_rule
from rankprune.schemes import check_choice

Method = Literal["dense", "trp", "trp+nu", "ours", "decompose", "decompose+finetune"]


@dataclass(frozen=True)
class TrpConfig:
    """The low-rank side of an experiment; `ramp` and `freeze` are fractions of the whole training. See TRP.

    `batch` is how many images a rule that goes by latency times at once; None is one.
    """

    rule: str = "Budget(macs=1/2.2)"
    scheme: str = "spatial"
    every: int = 20
    nuclear: float = 0.0
    nuclear_cadence: Literal["step", "projection"] = "step"
    ramp: float = 0.5
    freeze: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        parse_rule(self.rule)
        check_choice(self.scheme)
        if not 0 <= self.ramp <= (1 if self.freeze is None else self.freeze) <= 1:
            raise RankPruneError(f"ramp={self.ramp}, freeze={self.freeze}: give fractions of the training, freeze >= ramp")


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Methods: "dense" trains and leaves it at that; "trp" and "trp+nu" train with TRP, and "ours" with TRP and what we add to it;
    "decompose" trains nothing and decomposes what it starts from, and "decompose+finetune" trains the decomposed network.

    `start` is where the weights come from: a file in the folder of pretrained models, "torchvision:NAME" or "timm:NAME" for
    those that the packages have, "run:NAME" for the dense weights that experiment ended with, or nothing for a fresh network.
    `teacher` is where those of the network to distil from come from, likewise; nothing stands for the network the experiment
    starts from. It is of the architecture `teacher_model`, or of the same. Several of them, in a list, teach together, by the
    mean of their answers. `reference` is where those of the dense network to compare with come from, usually one trained as
    long; of a run on another machine its result is enough. `holdout` images of the training split are kept out of it and take
    the place of the test split, for making choices. With `photographs` images are of any size and cropped at random; without,
    they are small ones of one size, all in memory.
    """

    name: str
    method: Method = "ours"
    model: str = "resnet20"
    dataset: str = "cifar10"
    start: str | None = None
    teacher: str | tuple[str, ...] | None = None
    teacher_model: str | None = None
    reference: str | None = None
    batch: int = 128
    holdout: int = 0
    training: TrainConfig = field(default_factory=TrainConfig)
    trp: TrpConfig = field(default_factory=TrpConfig)
    photographs: PhotographConfig | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RankPruneError(f"method={self.method!r}: choose one of {', '.join(get_args(Method))}")
        if not self.start and self.method.startswith("decompose"):
            raise RankPruneError(f"method {self.method!r} needs weights to start from: set start to 'run:NAME' or to a file")
        if self.training.distill and not (self.teacher or self.start):
            raise RankPruneError(
                f"distill={self.training.distill} needs a teacher: set teacher or start to 'run:NAME' or to a file"
            )
        if self.training.distill and self.method == "decompose":
            raise RankPruneError(f"distill={self.training.distill}: method 'decompose' trains nothing; leave distill out")
        if self.reference and self.method == "dense":
            raise RankPruneError(f"reference={self.reference!r}: method 'dense' is compared with nothing; leave reference out")
        if self.teacher and not self.training.distill:
            raise RankPruneError(
                f"teacher={self.teacher!r} teaches nothing: give distill a weight, like 0.7 (--distill, or in [training])"
            )
        if self.teacher_model and not self.teacher:
            raise RankPruneError(f"teacher_model={self.teacher_model!r} has no weights: set teacher to 'run:NAME' or to a file")
        if (self.method == "trp+nu" and not self.trp.nuclear) or (self.method == "trp" and self.trp.nuclear):
            raise RankPruneError(
                f"method {self.method!r} with nuclear={self.trp.nuclear}: 'trp+nu' needs one, like 3e-4 (--nuclear, or in "
                "[trp]), 'trp' has none"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Where the weights of the networks to distil from come from; none without distillation."""
        source = self.teacher or self.start
        if not self.training.distill or source is None:
            return ()
        return (source,) if isinstance(source, str) else tuple(source)

    @classmethod
    def read(cls, path: str | Path) -> "Experiment":
        """Read a TOML file; tables [training], [trp] and [photographs] hold their fields, the name is the file's.

        Raises:
            RankPruneError: if it is not TOML or has an unknown field.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RankPruneError(f"cannot read the experiment {str(path)!r}: {error}") from error
        training = _build(TrainConfig, data.pop("training", {}), path)
        trp = _build(TrpConfig, data.pop("trp", {}), path)
        if "photographs" in data:
            data["photographs"] = _build(PhotographConfig, data["photographs"], path)
        return _build(cls, {"name": path.stem, **data, "training": training, "trp": trp}, path)

    def with_seed(self, seed: int) -> "Experiment":
        """The same experiment with another seed, named after it; the runs it builds on are those with that seed, too.

        But several teachers, which may be one network of several seeds, stay who they are.
        """
        if seed == self.training.seed:
            return self

        def named(source: str | None) -> str | None:
            return f"{source}-seed{seed}" if source and source.startswith("run:") else source

        return replace(
            self,
            name=f"{self.name}-seed{seed}",
            start=named(self.start),
            teacher=named(self.teacher) if isinstance(self.teacher, str) else self.teacher,
            reference=named(self.reference),
            training=replace(self.training, seed=seed),
        )


def _build(kind: type, data: Any, path: Path) -> Any:
    if not isinstance(data, dict):
        raise RankPruneError(f"{str(path)!r}: {data!r} stands where a table is expected, with fields of {kind.__name__}")
    hints = get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise RankPruneError(f"{str(path)!r} has unknown fields {sorted(unknown)}; known ones are {', '.join(hints)}")
    for name, value in data.items():
        if not _fits(value, hints[name]):
            raise RankPruneError(f"{str(path)!r}: {name} = {value!r} is of the wrong type")
    return kind(**data)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file may stand for a field of this type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, type(parts[0]))  # which one, it says itself
    if origin is tuple:
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class Folders:
    """Where things are: data sets (one folder each), pretrained models, runs (checkpoints and artefacts), results (JSON)."""

    data: Path
    models: Path
    runs: Path
    results: Path | None = None

    @classmethod
    def from_environment(cls, runs: str | Path = "runs", results: Path | None = None) -> "Folders":
        """`RANKPRUNE_DATA` (default ``data``); pretrained models in its ``models`` folder or beside it."""
        data = Path(os.environ.get("RANKPRUNE_DATA", "data"))
        models = data / "models"
        return cls(data, models if models.is_dir() else Path(os.path.abspath(data)).parent / "models", Path(runs), results)
