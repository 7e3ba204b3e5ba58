"""``python -m statescope.cli``."""

from statescope.cli import app

app()
