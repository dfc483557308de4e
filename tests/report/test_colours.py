"""The contrast of the page's colours."""

from __future__ import annotations

import re

import numpy as np

from mlx_distill.config import ASSETS


def luminance(rgb: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_readable_in_light_and_dark() -> None:
    """WCAG contrast: 4.5 for text, also on every shade of the confusion matrices, and 3 for marks."""
    style = (ASSETS / "report" / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for text in (light, light + dark):
        colours = {
            name: tuple(int(code[i : i + 2], 16) for i in (0, 2, 4))
            for name, code in re.findall(r"--([\w-]+): #([0-9a-f]{6})", text)
        }
        triples = {
            name: tuple(map(int, values.split(",")))
            for name, values in re.findall(r"--(yes|no): ([\d, ]+);", text)
        }
        for name in ("ink", "soft", "teacher", "student", "quantized", "control", "bad", "good"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
            assert contrast(colours[name], colours["card"]) >= 4.5, name
        for name in ("before", *(f"t{i}" for i in range(6))):
            assert contrast(colours[name], colours["paper"]) >= 3, name
        deep = float(re.findall(r"--deep: ([.\d]+)", text)[-1])
        for name, most in (("yes", 0.5), ("no", 0.05 + deep)):
            for share in np.linspace(0.04, most, 9):
                shade = tuple(
                    share * c + (1 - share) * p for c, p in zip(triples[name], colours["paper"], strict=True)
                )
                assert contrast(colours["ink"], shade) >= 4.5, (name, share)
