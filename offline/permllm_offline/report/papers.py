"""Names of what ``prune`` and ``convert`` write beside the weights."""

from __future__ import annotations

CARD = "README.md"
RECIPE = "recipe.yaml"
REPORT = "report.json"
COSTS = "costs.json"
PAGE = "report.html"

PAPERS = (CARD, RECIPE, REPORT, COSTS, PAGE)
"""Of a prune."""

CONVERSION = "conversion.json"
"""The report of a conversion to sparse."""
