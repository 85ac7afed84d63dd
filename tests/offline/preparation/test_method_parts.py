"""A method, and a reconstruction in place of its own, stand for entries of the tables."""

import pytest

from permllm_offline.errors import OfflineError
from permllm_offline.permutation.linear_assignment import assign_group
from permllm_offline.preparation.method_parts import find_parts, parts_of, summary_of, title_of
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.methods import METHODS
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.reconstruction.obs import choose_and_update, update_kept_weights
from permllm_offline.sparsity.importance import ria


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_parts(name: str) -> None:
    parts = find_parts(name)
    assert parts == parts_of(make_recipe({"model": "m", "method": name}))
    assert parts.permutation.learns == (name in ("permllm-wanda", "permllm-ria"))
    assert parts.permutation.assigns == name.endswith(("-lsa", "-global"))
    assert parts.reconstruction.distils == (name == "permllm-best")
    assert parts.reads_text == (name != "magnitude")


def test_a_reconstruction_takes_the_place_of_the_methods_own() -> None:
    parts = find_parts("ria+cp-lsa", "obs")
    assert (parts.importance.score, parts.permutation.allocate) == (ria, assign_group)
    assert parts.reconstruction.layer is update_kept_weights
    assert find_parts("sparsegpt").reconstruction.layer is choose_and_update
    assert find_parts("sparsegpt", "none").reconstruction.layer is None


def test_what_is_said_of_a_recipe_is_what_it_does() -> None:
    own = make_recipe({"model": "m", "method": "permllm-best", "reconstruction": "distillation"})
    assert title_of(own) == "permllm-best"
    assert summary_of(own) == METHODS["permllm-best"].summary
    other = make_recipe({"model": "m", "method": "permllm-best", "reconstruction": "none"})
    assert title_of(other) == "permllm-best, reconstruction none"
    assert "distil" not in summary_of(other)
    assert summary_of(other).startswith("importances of wanda; heuristic channel reallocation")
    assert summary_of(other).endswith("; kept weights stay as they are")


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_masks_are_chosen_by_what_says_so(name: str) -> None:
    assert find_parts("wanda", name).reconstruction.chosen_masks == name.startswith("sparsegpt")


@pytest.mark.parametrize("name", ["best", "", 5, ["wanda"], {"wanda": 1}])
def test_what_is_not_known_is_refused(name: object) -> None:
    with pytest.raises(OfflineError, match=r"^method .* is not known: give one of magnitude, "):
        find_parts(name)
    with pytest.raises(OfflineError, match=r"^reconstruction .* is not known: give one of none, "):
        find_parts("wanda", name)
