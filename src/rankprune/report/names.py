"""What to call results of experiments, and how to tell them apart."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankprune.report.results import IMAGES, Result, budget_of, from_scratch, settings_of


def label(r: Result) -> str:
    """What to call the method of a result: its name, its scheme, and what it does otherwise than others of that name."""
    words = [r["method"], r["scheme"] or ""]
    words += ["by budget"] if r["method"].startswith("trp") and budget_of(r) else []
    words += [_taught(r["config"])] if r["config"].get("training", {}).get("distill") else []
    words += ["from scratch"] if from_scratch(r) else []
    return " ".join(word for word in words if word)


def _taught(config: Mapping[str, Any]) -> str:
    teacher, model = config.get("teacher"), config.get("teacher_model")
    if isinstance(teacher, list):
        return f"distilled from {len(teacher)} {model or 'networks'}"
    return f"distilled from {model}" if model else "distilled"


def told_apart(results: Sequence[Result], words: Callable[[Result], str] = label) -> Callable[[Result], str]:
    """What to call each of these beside the others: its label, and what else tells it from those that have the same.

    Args:
        words: what to call it alone, `label` or `method`.
    """
    epochs, settings, each = epochs_among(results), settings_apart(results), defaultdict(set)
    for r in results:
        each[words(r)].add(epochs(r))

    def name(r: Result) -> str:
        trained = f"{epochs(r) or 0} epochs" if len(each[words(r)]) > 1 else ""
        return ", ".join(filter(None, (words(r), settings(r), trained)))

    return name


def settings_apart(results: Sequence[Result]) -> Callable[[Result], str]:
    """What each was made with that others of these, which look the same in a table, were not, like "lr 0.05".

    Rules are left out, for they show in what a network costs, but for how a budget weighs layers.
    """
    epochs = epochs_among(results)
    alike: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)

    def look(r: Result) -> tuple[str, ...]:
        return r["model"], task(r), label(r), epochs(r)

    def settings(r: Result) -> dict[str, str]:
        images = {key: str(r[key]) for key in IMAGES if r.get(key) is not None}
        power = {"size_power": f"{budget.size_power:g}"} if (budget := budget_of(r)) else {}
        return images | power | {key: value for key, value in flat(settings_of(r)) if key != "trp.rule"}

    for r in results:
        alike[look(r)].append(settings(r))

    def told(r: Result) -> str:
        mine, all_of_them = settings(r), alike[look(r)]
        keys = dict.fromkeys(key for each in all_of_them for key in each)
        differing = [key for key in keys if len({each.get(key) for each in all_of_them}) > 1]
        return ", ".join(f"{key.rpartition('.')[2]} {mine.get(key, 'off')}" for key in differing)

    return told


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as texts; those of a table under its name and theirs, like training.lr."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows


def epochs_among(results: Sequence[Result]) -> Callable[[Result], str]:
    """How long each was trained: its epochs, after those of the runs among these that it goes on from, like 6 + 14."""
    by_source = {f"run:{r['name']}": r for r in results}

    def told(r: Result) -> str:
        trainings = [r]
        while (before := by_source.get(trainings[0]["config"].get("start"))) not in (None, *trainings):
            trainings.insert(0, before)
        return " + ".join(str(t["epochs"]) for t in trainings if t.get("epochs"))

    return told


def method(r: Result) -> str:
    """The same without the scheme."""
    return label({**r, "scheme": None})


def task(r: Result) -> str:
    """The images that accuracies are on, and the part of a photograph; those on others cannot be compared with them."""
    photographs = r["config"].get("photographs")
    side = f"{photographs['test_size']} x {photographs['test_size']}" if photographs else ""
    split = r["test_split"] if r["test_split"] != "test" else ""
    return ", ".join(filter(None, (r["dataset"], side, split)))


def drawn_together(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The results by title: those of the same network on the same images, from scratch or not."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for r in results:
        title = f"{r['model']} on {task(r)}" + (", from scratch" if from_scratch(r) else "")
        images = [str(r.get(field)) for field in IMAGES]  # others may have the same name
        cut = str((r["config"].get("photographs") or {}).get("test_resize"))
        groups[title, cut, *images].append(r)
    return [(title, together) for (title, *_), together in groups.items()]
