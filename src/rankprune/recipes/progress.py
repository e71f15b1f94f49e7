"""Where a training stands: what it tells while it runs, and the journal that it goes on from."""

from dataclasses import dataclass, field

from torch import Tensor

from rankprune.plan import Plan


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after each step: `loss` is a tensor still on its device, so that looking at it is what costs.

    `images` are those of one step, of all processes together; `plan` is that of the last projection, if there was one.
    """

    epoch: int
    step: int
    steps_per_epoch: int
    lr: float
    loss: Tensor
    images: int
    plan: Plan | None = None


@dataclass(frozen=True)
class EpochLog:
    """One finished epoch: mean training loss, seconds taken, the ranks then in force (empty before a projection), the part
    of the seconds for which training waited for its input, what "auto" as precision came to, and what it was computed by:
    an epoch that was interrupted by what ended it.
    """

    epoch: int
    loss: float
    seconds: float
    ranks: dict[str, int]
    input_share: float | None = None
    precision: str | None = None
    by: str | None = None


@dataclass
class Journal:
    """The finished epochs; and of the present one the steps done, the sum of their losses, and seconds taken and waited."""

    log: list[EpochLog] = field(default_factory=list)
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
