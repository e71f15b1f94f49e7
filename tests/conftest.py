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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
