"""The metrics against scikit-learn and statsmodels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_distill.metrics import calibration
from mlx_distill.metrics.classification import confusion_counts, f1, macro_f1, precision, recall
from mlx_distill.metrics.clusters import clustered_mean
from mlx_distill.metrics.homogeneity import benjamini_hochberg
from mlx_distill.metrics.intervals import newcombe, t_quantile, wilson
from mlx_distill.metrics.paired import bonett_price, compare_means, compare_paired, mcnemar_mid_p
from mlx_distill.metrics.raters import cohen_kappa

# The references warn of their own futures.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
LABELS = ["a", "b", "c"]


def labelled(n: int = 240, seed: int = 0) -> tuple[list[str], list[str | None], list[dict[str, Any]]]:
    """Truths, answers (some invalid) and the rows that hold them."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(LABELS, n, p=[0.6, 0.3, 0.1])
    answers = [
        None if rng.random() < 0.05 else str(t if rng.random() < 0.7 else rng.choice(LABELS)) for t in truth
    ]
    rows = [
        {"truth": {"kind": str(t)}, "answer": None if a is None else {"kind": a}, "label": a}
        for t, a in zip(truth, answers, strict=True)
    ]
    return truth.tolist(), answers, rows


def test_precision_recall_and_f1_equal_scikit_learn() -> None:
    from sklearn import metrics as sk

    truth, answers, rows = labelled()
    counts = confusion_counts(rows, "kind", ["b", "c"])
    positive = [t in "bc" for t in truth]
    # An invalid answer is wrong: the opposite of the truth.
    given = [not p if a is None else a in "bc" for p, a in zip(positive, answers, strict=True)]
    for ours, theirs in ((precision, sk.precision_score), (recall, sk.recall_score), (f1, sk.f1_score)):
        assert ours(counts)["value"] == pytest.approx(theirs(positive, given), abs=1e-12)


def test_macro_f1_equals_scikit_learn_over_the_classes_that_occur() -> None:
    from sklearn import metrics as sk

    truth, answers, rows = labelled()
    names = [a or "invalid" for a in answers]
    expected = sk.f1_score(truth, names, labels=LABELS, average="macro", zero_division=0)
    estimate = macro_f1(rows, "kind", [*LABELS, "unused"])
    assert estimate["value"] == pytest.approx(expected, abs=1e-12) and estimate["classes"] == LABELS


@pytest.mark.parametrize("average", ["micro", "macro", "samples"])
def test_multilabel_f1_equals_scikit_learn(average: Any) -> None:
    from sklearn import metrics as sk
    from sklearn.preprocessing import MultiLabelBinarizer

    from mlx_distill.evaluate.multilabel import multilabel_f1
    from mlx_distill.metrics.answers import field_f1, truth_pairs

    rng, names = np.random.default_rng(2), np.array(["joy", "loss", "faith", "road"])
    pairs = [[names[rng.random(4) < p].tolist() or ["joy"] for p in (0.4, 0.5)] for _ in range(80)]
    rows = [{"truth": {"themes": t}, "answer": {"themes": a}} for t, a in pairs]
    coder = MultiLabelBinarizer().fit(names[:, None])
    truth, answers = (coder.transform([pair[i] for pair in pairs]) for i in (0, 1))
    expected = sk.f1_score(truth, answers, average=average, zero_division=1.0)
    if average == "samples":
        ours = field_f1(truth_pairs(rows), "themes")
    else:
        ours = multilabel_f1(rows, "themes", average, resamples=50)
    assert ours["value"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_kappa_equals_scikit_learn_and_its_error_statsmodels(weights: Any) -> None:
    from sklearn.metrics import cohen_kappa_score
    from statsmodels.stats.inter_rater import cohens_kappa

    rng = np.random.default_rng(4)
    first = rng.integers(1, 6, 130)
    second = np.where(rng.random(130) < 0.5, first, rng.integers(1, 6, 130))
    ours = cohen_kappa(first.tolist(), second.tolist(), weights=weights)
    assert ours["value"] == pytest.approx(cohen_kappa_score(first, second, weights=weights), abs=1e-12)
    table = np.zeros((5, 5))
    np.add.at(table, (first - 1, second - 1), 1)
    kind = {None: None, "linear": "linear", "quadratic": "quadratic"}[weights]
    theirs = cohens_kappa(table, wt=kind)
    assert ours["low"] == pytest.approx(theirs.kappa_low, abs=1e-9)
    assert ours["high"] == pytest.approx(theirs.kappa_upp, abs=1e-9)


def test_brier_and_the_calibration_curve_equal_scikit_learn() -> None:
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    rng = np.random.default_rng(5)
    p = rng.beta(2, 2, 400)
    truth = (rng.random(400) < p).astype(np.int64)
    table = np.column_stack([1 - p, p])
    assert calibration.brier_score(table, truth) == pytest.approx(2 * brier_score_loss(truth, p), abs=1e-12)
    figures = calibration.calibration_error(np.log(table), truth)
    assert figures.nll == pytest.approx(log_loss(truth, table), abs=1e-12)
    confidence, right = table.max(axis=1), table.argmax(axis=1) == truth
    accuracies, confidences = calibration_curve(right, confidence, n_bins=8, strategy="quantile")
    result = calibration.reliability(table, truth, bins=8, draws=10)
    assert [part.confidence for part in result.bins] == pytest.approx(confidences.tolist(), abs=1e-12)
    assert [part.accuracy["value"] for part in result.bins] == pytest.approx(accuracies.tolist(), abs=1e-12)
    sizes = np.array([part.n for part in result.bins])
    ece = float((sizes * np.abs(accuracies - confidences)).sum() / 400)
    assert calibration.expected_calibration_error(table, truth, bins=8) == pytest.approx(ece, abs=1e-12)


def test_intervals_of_rates_equal_statsmodels() -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

    for k, n in ((0, 20), (3, 7), (271, 300), (20, 20)):
        theirs = proportion_confint(k, n, method="wilson")
        assert wilson(k, n) == pytest.approx(theirs, abs=1e-12)
    for counts in ((56, 70, 48, 80), (0, 20, 3, 25), (9, 9, 2, 10)):
        theirs = confint_proportions_2indep(*counts, method="newcomb", compare="diff")
        assert newcombe(*counts) == pytest.approx(theirs, abs=1e-9)


def test_mcnemar_is_statsmodels_exact_test_less_half_of_what_was_seen() -> None:
    from scipy.stats import binom
    from statsmodels.stats.contingency_tables import mcnemar

    for b, c in ((1, 8), (12, 4), (30, 41)):
        exact = mcnemar([[50, b], [c, 20]], exact=True).pvalue
        assert mcnemar_mid_p(b, c) == pytest.approx(exact - binom.pmf(min(b, c), b + c, 0.5), abs=1e-12)


def test_benjamini_hochberg_equals_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p_values = np.random.default_rng(6).random(20) ** 2
    theirs = multipletests(p_values, method="fdr_bh")[1]
    assert benjamini_hochberg(p_values.tolist()) == pytest.approx(theirs.tolist(), abs=1e-12)


def ols(values: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Mean and clustered error by statsmodels: a regression on a constant, with weights."""
    import statsmodels.api as sm

    weights = np.ones(values.size) if weights is None else weights
    fit = sm.WLS(values, np.ones(values.size), weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    count = len(set(groups.tolist()))
    # Its own small-sample factor has (n - 1) / (n - k) besides, which copies of rows would change.
    return float(fit.params[0]), float(fit.bse[0] * np.sqrt(count / (count - 1)))


def test_clustered_means_equal_a_regression_with_clustered_errors() -> None:
    rng = np.random.default_rng(7)
    groups = rng.integers(0, 25, 140)
    values = rng.normal(size=140) + rng.normal(size=25)[groups]
    mean, error = ols(values, groups)
    estimate = clustered_mean(values.tolist(), groups.tolist())
    half = t_quantile(0.95, 24) * error
    assert estimate["value"] == pytest.approx(mean, abs=1e-12)
    assert (estimate["low"], estimate["high"]) == pytest.approx((mean - half, mean + half), abs=1e-9)
    other = rng.normal(size=140)
    result = compare_means(values.tolist(), other.tolist(), clusters=groups.tolist())
    mean, error = ols(values - other, groups)
    assert result["difference"]["low"] == pytest.approx(mean - t_quantile(0.95, 24) * error, abs=1e-9)


def test_clustered_comparisons_equal_a_regression_with_the_two_added_clusters() -> None:
    rng = np.random.default_rng(8)
    groups = rng.integers(0, 25, 140)
    first, second = rng.random((2, 140)) < 0.7
    result = compare_paired(first.tolist(), second.tolist(), clusters=groups.tolist())
    values = np.append(first.astype(float) - second, [1.0, -1.0])
    size = 140 / 25
    mean, error = ols(values, np.append(groups, [25, 26]), np.append(np.ones(140), [size, size]))
    half = t_quantile(0.95, 24) * error
    ends = (result["difference"]["low"], result["difference"]["high"])
    assert ends == pytest.approx((mean - half, mean + half), abs=1e-9)


def test_bonett_price_is_the_variance_of_the_differences_with_two_rows_added() -> None:
    from statsmodels.stats.weightstats import DescrStatsW

    d = np.concatenate([np.ones(13), -np.ones(5), np.zeros(120), [1, -1]])
    described = DescrStatsW(d, ddof=0)
    half = 1.959963984540054 * described.std / np.sqrt(d.size)
    assert bonett_price(13, 5, 138) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-12)
