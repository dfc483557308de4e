"""The report of a run: ``report.json``, a self-contained ``report.html``, and model cards."""

from __future__ import annotations

from mlx_distill.report.collect import build_report as build_report
from mlx_distill.report.page import render_html as render_html
from mlx_distill.report.summary import RunReport as RunReport
from mlx_distill.report.summary import read_report as read_report
from mlx_distill.report.summary import write_report as write_report
