"""Records in, labelled numbers and figures out. Numpy and xarray only; torch is never imported.

What needs more is not imported here: figures (:mod:`statescope.analyses.plots`, matplotlib) and the model of
passkey failure (:mod:`statescope.analyses.failure`, scikit-learn).
"""

from statescope.analyses.corpus import by_text, corpus, text_of, texts
from statescope.analyses.forgetting import forgetting, memory_span
from statescope.analyses.loss import loss_by_position
from statescope.analyses.memories import live_memories, memories
from statescope.analyses.needle import needle_measures
from statescope.analyses.overload import overload
from statescope.analyses.passkey import read_answers, recall_length
from statescope.analyses.probes import contribution_of, probe_reach, share_of
from statescope.analyses.retention import head_reach, retention, time_scales
from statescope.analyses.snapshots import state_extremes, state_outliers, state_rank
from statescope.analyses.state import norm_budget, overload_growth, overload_ratio, state_statistics

__all__ = [
    "by_text",
    "contribution_of",
    "corpus",
    "forgetting",
    "head_reach",
    "live_memories",
    "loss_by_position",
    "memories",
    "memory_span",
    "needle_measures",
    "norm_budget",
    "overload",
    "overload_growth",
    "overload_ratio",
    "probe_reach",
    "read_answers",
    "recall_length",
    "retention",
    "share_of",
    "state_extremes",
    "state_outliers",
    "state_rank",
    "state_statistics",
    "text_of",
    "texts",
    "time_scales",
]
