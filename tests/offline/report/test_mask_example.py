import torch

from permllm_offline.model.families import FAMILIES
from permllm_offline.model.heads import heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.report.mask_example import SIZE, corner, mask_example, unpermuted_corner
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import decisions_of
from tests.offline.tiny_models import tiny_llama


def test_the_corner_is_that_of_the_masks() -> None:
    model, pattern = tiny_llama(), Pattern(2, 4)
    group = FAMILIES["llama"].groups[0]
    layout = GroupLayout(group, 128, 64, heads_of(model.config))
    attention = model.model.layers[1].self_attn
    weights = {name: attention.get_parameter(f"{name[10:]}.weight") for name in group.linears}
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    decision = decisions_of(model, pattern, 64)[1]
    found = mask_example("layer.{}".format, decision, unpermuted_corner(layout, scores, pattern))
    assert found is not None
    assert found.name == "layer.self_attn.q_proj"
    mask = decision[0].mask("self_attn.q_proj")
    for row in range(SIZE):
        assert found.pruned[row] == "".join("1" if kept else "0" for kept in mask[row, :SIZE])
        for start in range(0, SIZE, 4):
            shown = found.unpermuted[row][start : start + 4]
            score = scores["self_attn.q_proj"][row, start : start + 4]
            assert {i for i in range(4) if shown[i] == "1"} == set(score.topk(2).indices.tolist())
    assert found.pruned != found.unpermuted


def test_small_masks_and_unpermuted_layers() -> None:
    assert corner(torch.tensor([[True, False], [False, True]])) == ["10", "01"]
    model = tiny_llama()
    first, *others = decisions_of(model, Pattern(2, 4), 64)[0]
    plain = type(first)(first.layout, None, first.masks, first.retained)
    assert mask_example("layer.{}".format, [plain, *others], ["01"]) is None
