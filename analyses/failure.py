"""Whether the state at the question explains which passkeys are lost, beyond length and depth.

Two classifiers are held against each other on prompts that neither was fitted to: one knows only how long
the prompt is and where the needle stands, the other also the measures of the state. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from statescope.analyses.passkey import wilson

Floats = NDArray[np.float64]

BASELINE, STATE, BOTH = MODELS = ("length and depth", "state", "both")

FOLDS, REPEATS, SHUFFLES = 5, 3, 3
INNER_FOLDS = 4
STRENGTHS = tuple(float(c) for c in np.logspace(-4, 0, 5))
"""Inverse strengths of the penalty among which the training folds choose."""

RESAMPLES = 2000
LEAST = 20
"""Prompts of either outcome without which nothing is fitted."""

LOG_LIMIT = 24 * float(np.log(2))
"""Logs are cut off here: what is smaller than the rest by 2**24 leaves no trace in a float32 state."""


def explain_failure(table: xr.Dataset, confidence: float = 0.95, seed: int = 0) -> xr.Dataset:
    r"""Say how much the state at the question tells about success, beyond length and depth.

    .. math:: AUC = P(p_{right} > p_{wrong}) + P(p_{right} = p_{wrong}) / 2

    over pairs of one right and one wrong prompt of the same test fold.

    Parameters
    ----------
    table : Dataset, (length, depth, trial[, layer, head])
        From :func:`statescope.experiments.failure.failure_table`; every variable by layer and head is a
        measure. Prompts that were not asked are left out.
    confidence : float
        Of every interval.
    seed : int
        Of folds, shuffles and resampling.

    Returns
    -------
    Dataset
        By ``model`` (``"length and depth"``, ``"state"``, ``"both"``): ``auc`` (0.5 is chance);
        ``auc_gain``, over length and depth; ``auc_same_cell``, over pairs of the same length and depth, where
        length and depth are worth 0.5 exactly; ``brier``, the mean square of (probability - outcome), and
        ``brier_gain``, by how much it is smaller. By ``measure``: ``importance``, the AUC lost by
        ``"both"`` where the measure is shuffled among the test prompts, in all heads together (measures
        that say the same share their importance). By ``model`` and ``bin``: how often prompts succeed
        (``observed``) that are given a probability (``predicted``). By ``model`` and ``prompt``:
        ``probability``. Each number has its interval, ``_low`` to ``_high``. ``attrs["sentence"]`` says it
        in words.

    Raises
    ------
    ValueError
        If there are no measures, or fewer than 20 right or wrong prompts; says what to do.

    Notes
    -----
    Logistic regression with an L2 penalty on standardised features, its strength chosen inside the
    training folds. *Heads are summarised*: of every measure, the mean, the smallest and the largest over all
    layers and heads. Passkeys live in few heads, which the extremes find without being told by the outcome;
    and the number of features does not grow with the model. (With every head a feature of its own, 224 for
    the bundled checkpoints and thousands for larger models, some hundred prompts are too few.) The
    baseline may take any function of length and depth (an indicator for every cell of the grid, beside
    smooth terms). Folds keep all prompts of a passkey together; scaling and penalty see training folds only.
    AUC compares within test folds, because fitted success rates of left-out prompts err against their own
    outcomes. Intervals resample passkeys, with the fitted models as they are: they say how sure the numbers
    are for these fits, not how fits to other prompts would vary. What tells success need not cause it.
    """
    prompts = _Prompts.of(table)
    with threadpool_limits(1):  # the matrices are small: threads would wait for each other
        trials = _cross_validate(prompts, seed)
    weights = _resampled(prompts.group, seed)
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    found: dict[Hashable, Any] = {}

    def put(name: str, dims: tuple[str, ...], values: Floats, long_name: str) -> None:
        """Keep the values at unit weights (first) and the interval over the resampled ones."""
        low, high = np.quantile(values[..., 1:], ends, axis=-1)
        for suffix, part in (("", values[..., 0]), ("_low", low), ("_high", high)):
            found[name + suffix] = (dims, part, {"long_name": long_name, "units": "1"})

    auc = np.stack([trials.auc(name, weights) for name in MODELS])
    same = np.stack([trials.auc(name, weights, same_cell=True) for name in MODELS])
    square = np.stack([(trials.mean(name) - prompts.right) ** 2 for name in MODELS])
    brier = square @ weights.T / weights.sum(1)
    importance = auc[-1] - np.stack([trials.auc(name, weights) for name in prompts.measures])
    put("auc", ("model",), auc, "area under the curve")
    put("auc_gain", ("model",), auc - auc[0], "area under the curve, gained over length and depth")
    put("auc_same_cell", ("model",), same, "area under the curve, same length and depth")
    put("brier", ("model",), brier, "Brier score")
    put("brier_gain", ("model",), brier[0] - brier, "Brier score, gained over length and depth")
    put("importance", ("measure",), importance, "area under the curve, lost where a measure is shuffled")
    found |= _reliability(prompts, trials, confidence)
    about = {name: table.attrs.get(name) for name in ("model_id", "train_length", "haystack", "seed")}
    result = xr.Dataset(
        found,
        {
            "model": list(MODELS),
            "measure": list(prompts.measures),
            **{name: ("prompt", values) for name, values in prompts.labels.items()},
        },
        attrs={**about, "confidence": confidence, "prompts": len(prompts.right)},
    )
    result.attrs["sentence"] = _sentence(result)
    return result


@dataclass(frozen=True)
class _Prompts:
    """The table as features, one row a prompt."""

    right: Floats
    group: NDArray[np.int64]  # by passkey
    cell: NDArray[np.int64]  # by length and depth
    place: Floats  # (prompt, feature): length and depth
    measures: Mapping[str, Floats]  # (prompt, feature): mean, smallest and largest over the heads
    labels: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, table: xr.Dataset) -> _Prompts:
        names = [str(n) for n, v in table.data_vars.items() if {"layer", "head"} <= set(v.dims)]
        if not names:
            raise ValueError("table has no measures by layer and head; make it with failure_table")
        rows = table.stack(prompt=("length", "depth", "trial")).transpose("prompt", ...)
        rows = rows.isel(prompt=rows["correct"].notnull().values)
        right = rows["correct"].values.astype(np.float64)
        wrong = int((1 - right).sum())
        if min(wrong, len(right) - wrong) < LEAST:
            raise ValueError(
                f"table has {len(right) - wrong} right and {wrong} wrong prompts; expected {LEAST} or more of"
                " either: ask more, at lengths around failure"
            )
        length, depth = (rows[name].values.astype(np.float64) for name in ("length", "depth"))
        cell = np.unique(np.stack([length, depth]), axis=1, return_inverse=True)[1].ravel()
        since = np.log(np.maximum(length - rows["needle_stop"].values, 1))
        smooth = np.stack([np.log(length), depth, since, since * np.log(length)], 1)
        heads = {name: rows[name].values.reshape(len(right), -1).astype(np.float64) for name in names}
        return cls(
            right,
            np.unique(rows["passkey"].values, return_inverse=True)[1],
            cell,
            np.concatenate([smooth, np.eye(cell.max() + 1)[cell]], 1),
            {name: _summary(np.clip(values, -LOG_LIMIT, LOG_LIMIT)) for name, values in heads.items()},
            {name: rows[name].values for name in ("length", "depth", "trial", "correct")},
        )

    def features(self, model: str, shuffled: str = "", order: Any = slice(None)) -> Floats:
        """Features of a model; one measure may be taken from other prompts."""
        state = [v[order] if name == shuffled else v for name, v in self.measures.items()]
        chosen = {BASELINE: [self.place], STATE: state, BOTH: [self.place, *state]}
        return np.concatenate(chosen[model], 1)


@dataclass(frozen=True)
class _Trials:
    """Probabilities for prompts that were left out of the fit, by model (or shuffled measure)."""

    right: NDArray[np.bool_]
    cell: NDArray[np.int64]
    fold: NDArray[np.int64]  # (repeat, prompt)
    probability: Mapping[str, Floats]  # (repeat, shuffle, prompt)

    def mean(self, name: str) -> Floats:
        """Mean probability over the repeats."""
        return np.asarray(self.probability[name].mean((0, 1)))

    def auc(self, name: str, weights: Floats, same_cell: bool = False) -> Floats:
        """AUC over pairs of one test fold, for every row of weights of the prompts."""
        yes, no = np.flatnonzero(self.right), np.flatnonzero(~self.right)
        pairs = np.zeros((len(yes), len(no)))
        ordered = np.zeros_like(pairs)
        for fold, shuffles in zip(self.fold, self.probability[name], strict=True):
            allowed = fold[yes, None] == fold[no]
            if same_cell:
                allowed &= self.cell[yes, None] == self.cell[no]
            for p in shuffles:
                pairs += allowed
                ordered += allowed * (0.5 + 0.5 * np.sign(p[yes, None] - p[no]))
        w_yes, w_no = weights[:, yes], weights[:, no]
        total = np.einsum("wi,wi->w", w_yes @ pairs, w_no)
        won = np.einsum("wi,wi->w", w_yes @ ordered, w_no)
        return np.where(total > 0, won / np.maximum(total, 1e-300), 0.5)


def _summary(heads: Floats) -> Floats:
    return np.stack([heads.mean(1), heads.min(1), heads.max(1)], 1)


def _cross_validate(prompts: _Prompts, seed: int) -> _Trials:
    rng = np.random.default_rng(seed)
    n = len(prompts.right)
    fold = np.zeros((REPEATS, n), dtype=np.int64)
    probability = {name: np.zeros((REPEATS, 1, n)) for name in MODELS}
    probability |= {name: np.zeros((REPEATS, SHUFFLES, n)) for name in prompts.measures}
    for repeat in range(REPEATS):
        splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed + repeat)
        for k, (train, test) in enumerate(splits.split(prompts.place, prompts.right, prompts.group)):
            fold[repeat, test] = k
            for name in MODELS:
                fitted = _fit(prompts, name, train)
                probability[name][repeat, 0, test] = _predict(fitted, prompts.features(name)[test])
            for name in prompts.measures:  # the last model fitted is the one that knows everything
                for shuffle in range(SHUFFLES):
                    order = np.arange(n)
                    order[test] = rng.permutation(test)
                    shuffled = prompts.features(BOTH, name, order)[test]
                    probability[name][repeat, shuffle, test] = _predict(fitted, shuffled)
    return _Trials(prompts.right == 1, prompts.cell, fold, probability)


def _fit(prompts: _Prompts, model: str, train: NDArray[np.int64]) -> Any:
    steps = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    choice = {"logisticregression__C": STRENGTHS}
    search = GridSearchCV(steps, choice, cv=StratifiedGroupKFold(INNER_FOLDS), scoring="neg_log_loss")
    return search.fit(prompts.features(model)[train], prompts.right[train], groups=prompts.group[train])


def _predict(fitted: Any, features: Floats) -> Floats:
    # Rounded, so that prompts alike in every feature are ties: matrix products differ in the last digits.
    return np.round(fitted.predict_proba(features)[:, 1], 9)


def _resampled(group: NDArray[np.int64], seed: int) -> Floats:
    """Weights of the prompts: ones, then how often each one's group was drawn, for every resample."""
    groups = int(group.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    return np.concatenate([np.ones((1, len(group))), drawn[:, group]])


def _reliability(prompts: _Prompts, trials: _Trials, confidence: float) -> dict[Hashable, Any]:
    """Success by predicted probability, in tenths; bins without prompts are NaN."""
    p = np.stack([trials.mean(name) for name in MODELS])
    inside = np.minimum((p * 10).astype(int), 9)[:, None] == np.arange(10)[:, None]  # (model, bin, prompt)
    count = inside.sum(-1)
    some = np.where(count, count, np.nan)
    successes = (inside * prompts.right).sum(-1)
    low, high = wilson(successes, some, confidence)
    columns = {
        "count": (count, "prompts by predicted probability"),
        "predicted": ((inside * p[:, None]).sum(-1) / some, "mean predicted probability"),
        "observed": (successes / some, "share answered rightly"),
        "observed_low": (low, "share answered rightly, lower end of the Wilson interval"),
        "observed_high": (high, "share answered rightly, upper end of the Wilson interval"),
    }
    found: dict[Hashable, Any] = {
        name: (("model", "bin"), values, {"long_name": about, "units": "1"})
        for name, (values, about) in columns.items()
    }
    about = {"long_name": "probability of a right answer, fitted without the prompt", "units": "1"}
    return found | {"probability": (("model", "prompt"), p, about)}


def _sentence(result: xr.Dataset) -> str:
    def said(name: str, model: str, sign: str = "") -> str:
        value, low, high = (float(result[name + end].sel(model=model)) for end in ("", "_low", "_high"))
        return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    low, high = (float(result[f"auc_gain{end}"].sel(model=BOTH)) for end in ("_low", "_high"))
    verdict = (
        "it adds to them" if low > 0 else "it takes from them" if high < 0 else "no addition can be shown"
    )
    right, total = int(result["correct"].sum()), result.attrs["prompts"]
    return (
        f"Of {total} passkeys {right} were recalled. Length and depth tell which with AUC"
        f" {said('auc', BASELINE)},"
        f" the state at the question with {said('auc', STATE)}, both together with {said('auc', BOTH)}: a"
        f" difference of {said('auc_gain', BOTH, '+')}, so {verdict}. Between prompts of the same length and"
        f" depth, the state's AUC is {said('auc_same_cell', STATE)}"
        f" ({result.attrs['confidence']:.0%} intervals, resampling passkeys)."
    )
