r"""Kimi Delta Attention (arXiv 2510.26692, eq. 1): the gated delta rule with a decay for every key.

.. math::

    S_t = (I - \beta_t k_t k_t^\top) \operatorname{diag}(\alpha_t)\, S_{t-1} + \beta_t k_t v_t^\top,
    \qquad y_t = S_t^\top q_t / \sqrt{d_k}

In the terms of :class:`~statescope.recurrence.Recurrence` as :mod:`statescope.adapters.gated_delta`, whose
arguments these functions share, with :math:`g = \log \alpha` one number per key.
"""

from __future__ import annotations

from statescope.adapters.gated_delta import read_gated_delta_rule
from statescope.adapters.interface import Adapter

MODELS = ("kimi_linear", "bailing_hybrid", "glm5_next")

_KIND = ("Kimi Delta Attention", MODELS, "decay per key, delta rule", read_gated_delta_rule)

_NOTE = "beyond its index_topk glm5_next attends by the length of what it reads, so that segments tell"

CHUNK_KDA = Adapter("chunk_kimi_delta_attention", *_KIND, note=_NOTE)
RECURRENT_KDA = Adapter("recurrent_kimi_delta_attention", *_KIND, note=_NOTE)
