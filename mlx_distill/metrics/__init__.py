"""Metrics of predictions with confidence intervals, and significance tests for paired models."""

from __future__ import annotations

from mlx_distill.metrics.agreement import accuracy_gain as accuracy_gain
from mlx_distill.metrics.agreement import agreement as agreement
from mlx_distill.metrics.agreement import agreement_gain as agreement_gain
from mlx_distill.metrics.agreement import by_slice as by_slice
from mlx_distill.metrics.agreement import disagreements as disagreements
from mlx_distill.metrics.agreement import label_kl as label_kl
from mlx_distill.metrics.agreement import score_gap as score_gap
from mlx_distill.metrics.agreement import teacher_confusion as teacher_confusion
from mlx_distill.metrics.agreement import verdict_agreement as verdict_agreement
from mlx_distill.metrics.answers import answer_f1 as answer_f1
from mlx_distill.metrics.answers import answers_by_slice as answers_by_slice
from mlx_distill.metrics.answers import compare_answers as compare_answers
from mlx_distill.metrics.answers import differing_answers as differing_answers
from mlx_distill.metrics.answers import exact_match as exact_match
from mlx_distill.metrics.answers import field_f1 as field_f1
from mlx_distill.metrics.answers import is_free as is_free
from mlx_distill.metrics.answers import overlap_f1 as overlap_f1
from mlx_distill.metrics.answers import teacher_pairs as teacher_pairs
from mlx_distill.metrics.answers import truth_pairs as truth_pairs
from mlx_distill.metrics.classification import accuracy as accuracy
from mlx_distill.metrics.classification import accuracy_by_distribution as accuracy_by_distribution
from mlx_distill.metrics.classification import by_group as by_group
from mlx_distill.metrics.classification import confusion as confusion
from mlx_distill.metrics.classification import confusion_counts as confusion_counts
from mlx_distill.metrics.classification import f1 as f1
from mlx_distill.metrics.classification import false_negative_rate as false_negative_rate
from mlx_distill.metrics.classification import false_positive_rate as false_positive_rate
from mlx_distill.metrics.classification import json_valid as json_valid
from mlx_distill.metrics.classification import latency as latency
from mlx_distill.metrics.classification import macro_f1 as macro_f1
from mlx_distill.metrics.classification import precision as precision
from mlx_distill.metrics.classification import recall as recall
from mlx_distill.metrics.classification import score_mae as score_mae
from mlx_distill.metrics.intervals import bonett_price as bonett_price
from mlx_distill.metrics.intervals import bootstrap_mean as bootstrap_mean
from mlx_distill.metrics.intervals import compare_paired as compare_paired
from mlx_distill.metrics.intervals import mcnemar_mid_p as mcnemar_mid_p
from mlx_distill.metrics.intervals import newcombe as newcombe
from mlx_distill.metrics.intervals import paired_bootstrap as paired_bootstrap
from mlx_distill.metrics.intervals import rate as rate
from mlx_distill.metrics.intervals import wilson as wilson
