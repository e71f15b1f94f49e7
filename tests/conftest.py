from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "rankprune",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine fails no test
)
hypothesis.settings.load_profile("rankprune")

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # It is built for another torch, and then two operators have no schema. Without them neither torchvision can be imported nor
    # what imports it if it is there: lightning, timm, transformers. The library is kept because the schemas go with it.
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that latencies are kept in, one for each test and never the user's."""
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cache_by_own_clock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, where latencies are taken by our clock, and "timeless" is a backend."""
    import own_clock

    own_clock.add(monkeypatch, own_clock.Timeless())
    own_clock.use(monkeypatch)
    return cache
