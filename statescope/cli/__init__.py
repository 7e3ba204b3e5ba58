"""The command line, ``statescope trace | info | batch | ...``. Nothing here imports torch."""

from statescope.cli import trace, batch, report, passkey, models, train, sweep, laws, card, demo, bench  # isort: skip  # in the order --help lists them
from statescope.cli.app import app

__all__ = [
    "app",
    "batch",
    "bench",
    "card",
    "demo",
    "laws",
    "models",
    "passkey",
    "report",
    "sweep",
    "trace",
    "train",
]
