"""ROUGE and BLEU of free texts, computed by rouge-score and sacrebleu."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.metrics.answers import text_words
from mlx_distill.metrics.clusters import cluster_sums
from mlx_distill.metrics.intervals import Estimate

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_RESAMPLES = 1_000


def _check_installed(module: str, metric: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(
            f"the metric {metric} needs {module.replace('_', '-')}, which is not installed",
            fix="pip install 'mlx-distill[text-metrics]'",
        )


class _Words:
    """The tokenizer of rouge-score: words in any script. Its own knows only a to z, and finds nothing in
    other scripts.
    """

    def __init__(self, stem: bool) -> None:
        self._stem: Callable[[str], str] = str
        if stem:
            from nltk.stem.porter import PorterStemmer

            porter = PorterStemmer()
            self._stem = lambda word: porter.stem(word) if len(word) > 3 else word

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) for word in text_words(text)]


def rouge(type: str, stem: bool = False) -> Callable[[str, str], float]:
    """The F-measure of ROUGE of a text and its reference.

    Args:
        type: One of :data:`ROUGE_TYPES`.
        stem: Compare the stems of English words.

    Raises:
        ConfigError: rouge-score is not installed.

    Lin (2004), "ROUGE: a package for automatic evaluation of summaries".
    """
    _check_installed("rouge_score", "rouge")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([type], tokenizer=_Words(stem))

    def score(text: str, reference: str) -> float:
        return float(scorer.score(reference, text)[type].fmeasure)

    return score


def bleu(tokenize: str = "13a") -> Callable[..., Estimate]:
    """Corpus BLEU, between 0 and 1, of pairs of a text and its reference, with a percentile bootstrap
    interval over the pairs, or over their clusters: a function of pairs, confidence and clusters or None.

    Args:
        tokenize: A tokenizer of sacrebleu.

    Raises:
        ConfigError: sacrebleu is not installed, or has no such tokenizer.

    Papineni et al. (2002), "BLEU"; Post (2018), "A call for clarity in reporting BLEU scores".
    """
    _check_installed("sacrebleu", "bleu")
    from sacrebleu.metrics import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise ConfigError(
            f"the metric bleu: no tokenizer {tokenize!r}", fix=f"one of {', '.join(sorted(BLEU.TOKENIZERS))}"
        )
    scorer = BLEU(tokenize=tokenize, effective_order=True)

    def score(
        pairs: Sequence[tuple[str, str]], confidence: float, clusters: Sequence[Hashable] | None = None
    ) -> Estimate:
        import numpy as np

        n = len(pairs)
        if not n:
            return {"value": None, "low": None, "high": None, "n": 0}
        counts = np.array([_counts(scorer.sentence_score(text, [truth])) for text, truth in pairs])
        value = _corpus_bleu(counts.sum(axis=0))
        counts = cluster_sums(counts, clusters)
        units, rng = len(counts), np.random.default_rng(0)
        even = np.full(units, 1 / units)
        scores = [_corpus_bleu(rng.multinomial(units, even) @ counts) for _ in range(_RESAMPLES)]
        low, high = np.quantile(scores, [0.5 - confidence / 2, 0.5 + confidence / 2])
        return {"value": value, "low": float(low), "high": float(high), "n": n}

    return score


def _counts(sentence: Any) -> list[int]:
    """What the BLEU of a corpus is the sum of: matches and totals of 1- to 4-grams, and both lengths."""
    return [*sentence.counts, *sentence.totals, sentence.sys_len, sentence.ref_len]


def _corpus_bleu(counts: Any) -> float:
    from sacrebleu.metrics import BLEU

    numbers = [int(count) for count in counts]
    matches, totals, (length, reference_length) = numbers[:4], numbers[4:8], numbers[8:]
    return float(
        BLEU.compute_bleu(matches, totals, length, reference_length, smooth_method="exp").score / 100
    )


def text_of(value: Any) -> str:
    """A field as text: the items of a list are lines."""
    if isinstance(value, (list, tuple)):
        return "\n".join(str(item) for item in value)
    return "" if value is None else str(value)
