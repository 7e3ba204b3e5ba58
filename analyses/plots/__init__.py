"""Figures that a paper would print: labelled data in, matplotlib figures out (needs seaborn).

Every figure reads in black and white as well: curves differ by line, marks by shape, colour maps by
lightness. None is left open in pyplot.
"""

from statescope.analyses.plots.attention import attention_figure
from statescope.analyses.plots.corpus import corpus_figure
from statescope.analyses.plots.decay import decay_figure, retention_figure
from statescope.analyses.plots.failure import failure_figure
from statescope.analyses.plots.growth import growth_figure, passkey_length_figure
from statescope.analyses.plots.laws import position_figure, threshold_figure
from statescope.analyses.plots.loss import loss_figure
from statescope.analyses.plots.mechanism import mechanism_figure
from statescope.analyses.plots.overload import overload_figure
from statescope.analyses.plots.passkey import PasskeyPanel, passkey_figure, passkey_map
from statescope.analyses.plots.predictors import predictors_figure
from statescope.analyses.plots.remembrance import remembrance_figure
from statescope.analyses.plots.state import rank_figure, state_figure
from statescope.analyses.plots.strip import token_strip

__all__ = [
    "PasskeyPanel",
    "attention_figure",
    "corpus_figure",
    "decay_figure",
    "failure_figure",
    "growth_figure",
    "loss_figure",
    "mechanism_figure",
    "overload_figure",
    "passkey_figure",
    "passkey_length_figure",
    "passkey_map",
    "position_figure",
    "predictors_figure",
    "rank_figure",
    "remembrance_figure",
    "retention_figure",
    "state_figure",
    "threshold_figure",
    "token_strip",
]
