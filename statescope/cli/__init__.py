"""The command line, ``statescope trace | info | report | ...``. Nothing here imports torch."""

from statescope.cli import trace, report, passkey, models, train, sweep, laws, demo, bench  # isort: skip  # in the order --help lists them
from statescope.cli.app import app

__all__ = ["app", "bench", "demo", "laws", "models", "passkey", "report", "sweep", "trace", "train"]
