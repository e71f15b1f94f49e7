"""Decomposed models on the Hugging Face hub: an artefact as rankprune.save writes it, a config.json, and a model card."""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from rankprune.checkpoint import FILES, load, load_plan, save
from rankprune.errors import CheckpointError, MissingExtraError, RankPruneError
from rankprune.integrations.builder import Builder, build, check_arguments, generate_as, generation_of, name_of, own_builder
from rankprune.integrations.model_card import Results, card_text
from rankprune.plan import Plan
from rankprune.wrappers import unwrap

try:
    from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise MissingExtraError("huggingface_hub", "hub") from error

_CONFIG, _CARD = "config.json", "README.md"


class LowRank(ModelHubMixin, library_name="rankprune", tags=["rankprune", "low-rank", "pytorch"]):
    """A decomposed model together with what others need in order to load it and to judge it.

    ``LowRank(small, plan, builder=resnet20).push_to_hub("me/small")`` shares it, and
    ``LowRank.from_pretrained("me/small", resnet20).model`` gets it back. The folder that save_pretrained writes, and a
    downloaded one, are artefacts: ``rankprune.load(folder, dense)`` reads them as well.

    Do not use the save_pretrained or push_to_hub of the model's own class, from transformers or PyTorchModelHubMixin: they do
    not write the plan, and their from_pretrained builds the dense model and leaves its layers at random values, where the
    decomposed ones were.

    Args:
        model: what decompose(model, plan) returned; on any device, fine-tuned or not.
        plan: that very plan.
        builder: what builds the dense model: a function or class that others can import, or its name as
            ``package.module:callable``. It goes into config.json and onto the card. By default it is the model's own class,
            with the arguments it was built from, for models of transformers and classes with PyTorchModelHubMixin. (That mixin
            keeps the default in the place of a value that JSON cannot hold, and models of transformers do not tell what else
            than their config they were built with, like add_pooling_layer=False: give builder and arguments then.)
        arguments: keyword arguments of the builder that JSON can hold.
        results: measured figures for the card's table, like ``{"top-1 %": (88.5, 87.7), "ms, batch 64": (41.9, 40.1)}``: of
            the dense model, or None, and of this one.
        card_data: the card's metadata, like ``ModelCardData(license="mit", datasets=["cifar10"])``. Those of the library
            itself are added.

    Raises:
        RankPruneError: for a builder that cannot be imported by its name, arguments that JSON cannot hold or that the builder
            does not take, or results that are no pairs.
    """

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Not the mixin's, which makes a config of the arguments and takes a builder that is a dataclass for a value."""
        return object.__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        builder: Builder | str | None = None,
        arguments: Mapping[str, Any] | None = None,
        results: Results | None = None,
        card_data: ModelCardData | None = None,
    ) -> None:
        self.model, self.plan, self.card_data = unwrap(model), plan, card_data
        if builder is None and arguments is None:
            builder, arguments = own_builder(self.model)
        self.builder = builder if builder is None else name_of(builder)
        self.arguments = _in_json(dict(arguments or {}))
        if callable(builder):
            check_arguments(builder, self.arguments)
        self.results = _pairs(results or {})

    def save_pretrained(
        self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str | None:
        """Write the artefact, config.json and a model card to a folder. A card that is there already is kept.

        Args:
            model_card_kwargs: ``{"source": repo_id}`` if the card shall name a repository to load from, not this folder, and
                ``"revision"`` for a branch or tag of it.
            options: those of huggingface_hub's ModelHubMixin.save_pretrained: repo_id, push_to_hub and its arguments.

        Returns:
            The URL of the commit if push_to_hub is true.

        Raises:
            CheckpointError: as rankprune.save does.
        """
        card = {"source": str(save_directory), **(model_card_kwargs or {})}
        config = Path(save_directory) / _CONFIG
        older = config.read_bytes() if config.is_file() else None
        try:
            return super().save_pretrained(save_directory, model_card_kwargs=card, **options)
        except BaseException:
            if older is not None and not config.exists():  # the mixin deletes it first
                config.write_bytes(older)
            raise

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        branch: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Upload what save_pretrained writes to a repository on the hub, which is created if there is none.

        A new card takes the place of the repository's, unless ``ignore_patterns="README.md"``.

        Args:
            branch: to push to, by default main; the card names it.
            options: those of huggingface_hub's ModelHubMixin.push_to_hub: private, create_pr, commit_message, and patterns of
                files.

        Returns:
            The URL of the commit.

        Raises:
            CheckpointError: as rankprune.save does.
            huggingface_hub.errors.HfHubHTTPError: whatever the hub refuses; OfflineModeIsEnabled and LocalTokenNotFoundError
                from the same module without a network or a login.
        """
        source = repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        card = {**(model_card_kwargs or {}), "source": source, "revision": branch}
        return super().push_to_hub(repo_id, token=token, branch=branch, model_card_kwargs=card, **options)

    # Not the mixin's hook _from_pretrained: that is called with whatever entries of the downloaded config.json have the names
    # of arguments of ours.
    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        dense: nn.Module | Builder | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a decomposed model from a repository on the hub or a local folder; it is in eval mode.

        Only safetensors and JSON files and the metadata of the card are read. The builder that config.json names is never
        imported or called, since anybody may have written it: pass it yourself. Its arguments do come from config.json, so
        pass one that does no harm with any; of the config of a transformers model, choices of implementations are left out,
        for they can name code.

        Args:
            dense: a dense model of the same architecture, which is untouched, or what builds one: a function or class, called
                with the arguments in config.json. The `config` of a transformers model is made from its dict.
            revision: a branch, tag or commit.
            token: for private repositories; by default the one that `hf auth login` left.
            cache_dir: where downloads are kept, by default huggingface_hub's own place.
            local_files_only: read the cache and do not ask the hub, as with HF_HUB_OFFLINE=1.
            force_download: download again what the cache has.

        Raises:
            RankPruneError: if `dense` is missing or builds no model.
            CheckpointError: if the repository cannot be had, is not of rankprune, or does not fit `dense`, as in load.
        """
        folder = _snapshot(
            str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = _read_config(folder)
        try:
            plan = load_plan(folder)
        except CheckpointError as error:
            if "builder" in config or not config:
                raise
            raise CheckpointError(
                f"{error}. Its {_CONFIG} is of another library, whose save_pretrained keeps no plan: save the model again as "
                "LowRank(model, plan).save_pretrained(folder)"
            ) from error
        arguments = config.get("arguments", {})
        if dense is None:
            raise RankPruneError(
                f"{str(pretrained_model_name_or_path)!r} holds a decomposed model, which is built from a dense one: pass that "
                f"as `dense`, or what builds it. It was saved with the builder {config.get('builder')!r} and the arguments "
                f"{reprlib.repr(arguments)}, which are not run on a file's word"
            )
        card_data = _read_card(folder)
        model = load(folder, dense if isinstance(dense, nn.Module) else build(dense, arguments))
        model.eval()
        try:
            generate_as(model, config.get("generation_config"))
            entries = {name: config.get(name) for name in ("builder", "arguments", "results")}
            return cls(model, plan, **entries, card_data=card_data)
        except (RankPruneError, TypeError, ValueError) as error:
            raise CheckpointError(f"{str(folder / _CONFIG)!r} is damaged: {error}") from error

    def generate_model_card(self, *, source: str, revision: str | None = None) -> ModelCard:
        """The card: metadata, a table of costs and results, how to load the model, and the plan.

        Args:
            source: the repo id or folder that the model will be loaded from.
            revision: the branch or tag of the repository, if not its main one.
        """
        own = self._hub_mixin_info.model_card_data.to_dict()
        given = {} if self.card_data is None else self.card_data.to_dict()
        data = ModelCardData(**{**own, **given, "tags": [*given.get("tags", []), *own["tags"]]})
        text = card_text(
            self.plan,
            architecture=type(self.model).__name__,
            source=source,
            revision=revision,
            builder=self.builder,
            results=self.results,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def _save_pretrained(self, save_directory: Path) -> None:
        save(save_directory, self.model, self.plan)
        config = {"builder": self.builder, "arguments": self.arguments, "results": self.results}
        if (generation := generation_of(self.model)) is not None:
            config["generation_config"] = generation
        (save_directory / _CONFIG).write_text(json.dumps(config, indent=1))


def _snapshot(name: str, **options: Any) -> Path:
    """The folder of that name, or else the files of that repository in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, _CONFIG, _CARD], **options))
    except Exception as error:  # of the hub, and of the several libraries that it downloads with
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is no folder, and cannot be had from the hub ({type(error).__name__}: {reason}); check the name, the "
            "revision, the token, and whether this machine is offline"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds; nothing for a folder that rankprune.save alone wrote."""
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: not JSON ({error}); download or save it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("arguments", {}), dict):
        raise CheckpointError(f"{str(path)!r} is damaged: it holds no arguments of a builder; download or save it again")
    return config


def _read_card(folder: Path) -> ModelCardData | None:
    """The metadata of the card, which may have been edited on the hub, so that they are there when it is written again."""
    path = folder / _CARD
    if not path.is_file():
        return None
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception as error:  # of whatever reads YAML
        raise CheckpointError(f"the metadata at the top of {str(path)!r} are damaged ({error}); correct them") from error
    return data if isinstance(data, ModelCardData) else None


def _in_json(arguments: dict[str, Any]) -> dict[str, Any]:
    """What becomes of them in config.json."""
    try:
        there = json.loads(json.dumps(arguments))
        if not _same(arguments, there):
            raise ValueError("keys come back as strings")
    except (TypeError, ValueError) as error:
        raise RankPruneError(
            f"arguments={arguments!r} cannot be written to {_CONFIG} ({error}); give a builder that takes numbers, strings "
            "or lists and dicts of them by name"
        ) from error
    return there


def _same(value: Any, there: Any) -> bool:
    """Whether a value came back from JSON with its keys; tuples become lists."""
    if isinstance(value, Mapping):
        return value.keys() == there.keys() and all(_same(value[key], there[key]) for key in value)
    return not isinstance(value, list | tuple) or all(map(_same, value, there))


def _pairs(results: Any) -> dict[str, tuple[float | None, float]]:
    if not isinstance(results, Mapping):
        raise RankPruneError(f"results={results!r}: give a dict of a name to a pair of figures")
    kinds = (int | float | None, int | float)
    for name, pair in results.items():
        figures = isinstance(pair, tuple | list) and len(pair) == 2 and all(map(isinstance, pair, kinds))
        if not figures or not all(value is None or math.isfinite(value) for value in pair):
            raise RankPruneError(f"results[{name!r}]={pair!r}: give two numbers, of the dense model (or None) and of this one")
    return {name: (pair[0], pair[1]) for name, pair in results.items()}
