"""Names of what ``prune`` writes beside the weights."""

from __future__ import annotations

CARD = "README.md"
RECIPE = "recipe.yaml"
REPORT = "report.json"
COSTS = "costs.json"
PAGE = "report.html"

PAPERS = (CARD, RECIPE, REPORT, COSTS, PAGE)
