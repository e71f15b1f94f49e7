"""The commands as a user gives them."""

from typer.testing import CliRunner

from rankprune.cli.app import app


def invoke(*arguments: str) -> str:
    """What a command prints; it has to succeed."""
    outcome = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output
