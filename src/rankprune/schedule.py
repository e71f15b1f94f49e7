"""When a training projects, and by which rule at which step."""

from dataclasses import dataclass

from rankprune.errors import RankPruneError
from rankprune.rules import RankRule, check_rule


@dataclass(frozen=True)
class Schedule:
    """A projection after every `every`-th step, by a rule that is annealed over `ramp` steps, to ranks kept from `freeze` on.

    Raises:
        RankPruneError: for values out of range, or a ramp for a rule that cannot be annealed.
    """

    rule: RankRule
    every: int
    ramp: int = 0
    freeze: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise RankPruneError(f"every={self.every}: give a whole number of optimizer steps, at least 1, like 20")
        if not isinstance(self.ramp, int) or not isinstance(self.freeze, int | None):
            raise RankPruneError(
                f"ramp={self.ramp!r}, freeze={self.freeze!r}: give numbers of optimizer steps, as int (half of a training is "
                "steps // 2); only the callbacks of trainers take shares"
            )
        if not 0 <= self.ramp <= (self.ramp if self.freeze is None else self.freeze):
            raise RankPruneError(
                f"ramp={self.ramp}, freeze={self.freeze}: give a ramp from 0, and freeze no earlier than its end"
            )
        check_rule(self.rule, self.ramp)

    def projects_after(self, steps: int) -> bool:
        """Whether a projection follows the last of so many steps."""
        return steps % self.every == 0

    def rule_after(self, steps: int) -> RankRule:
        """The rule after so many steps: the one itself, or on the ramp a milder one, by a cubic that is fast at first."""
        return self.rule if steps >= self.ramp else self.rule.relaxed(1 - (1 - steps / self.ramp) ** 3)

    def keeps_ranks_after(self, steps: int) -> bool:
        """Whether ranks are chosen no more after so many steps."""
        return self.freeze is not None and steps >= self.freeze
