"""Records in, labelled numbers and figures out. Numpy and xarray only; torch is never imported.

What needs more is not imported here: figures (:mod:`statescope.analyses.plots`, matplotlib) and the model of
passkey failure (:mod:`statescope.analyses.failure`, scikit-learn).
"""

from statescope.analyses.attention import (
    effective_state_size,
    implicit_attention,
    interference,
    mean_distance,
    output_share_of,
    recency_ratio,
)
from statescope.analyses.corpus import by_text, corpus, text_of, texts
from statescope.analyses.erase import erase
from statescope.analyses.forgetting import forgetting, memory_span
from statescope.analyses.growth import crossings, loss_growth
from statescope.analyses.laws import fit_laws
from statescope.analyses.loss import loss_by_position
from statescope.analyses.memories import live_memories, memories
from statescope.analyses.needle import needle_measures
from statescope.analyses.overload import overload
from statescope.analyses.paper import paper_points
from statescope.analyses.passkey import read_answers, recall_length
from statescope.analyses.predictors import predictors
from statescope.analyses.probes import contribution_of, probe_reach, share_of
from statescope.analyses.retention import head_reach, retention, time_scales
from statescope.analyses.runs import read_runs, recall, recall_by_position
from statescope.analyses.snapshots import state_extremes, state_outliers, state_rank
from statescope.analyses.state import norm_budget, overload_growth, overload_ratio, state_statistics
from statescope.analyses.thresholds import learned_to_forget, thresholds

__all__ = [
    "by_text",
    "contribution_of",
    "corpus",
    "crossings",
    "effective_state_size",
    "erase",
    "fit_laws",
    "forgetting",
    "head_reach",
    "implicit_attention",
    "interference",
    "learned_to_forget",
    "live_memories",
    "loss_by_position",
    "loss_growth",
    "mean_distance",
    "memories",
    "memory_span",
    "needle_measures",
    "norm_budget",
    "output_share_of",
    "overload",
    "overload_growth",
    "overload_ratio",
    "paper_points",
    "predictors",
    "probe_reach",
    "read_answers",
    "read_runs",
    "recall",
    "recall_by_position",
    "recall_length",
    "recency_ratio",
    "retention",
    "share_of",
    "state_extremes",
    "state_outliers",
    "state_rank",
    "state_statistics",
    "text_of",
    "texts",
    "thresholds",
    "time_scales",
]
