"""Tasks through lm-eval, on data that lies beside their description."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm_offline import evaluate
from permllm_offline.cli import main
from permllm_offline.text.zero_shot import Tasks, _metrics
from tests.offline.tiny_models import random_text

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from permllm_vllm.hf import SparseLinear

TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""
QUESTIONS = 40
PAPER = "hellaswag,arc_easy,arc_challenge,openbookqa,rte"
"""Tasks of the paper's tables, which lm-eval knows under these names."""


@pytest.fixture(scope="module")
def questions() -> list[dict[str, object]]:
    texts = [random_text(12, seed).split() for seed in range(QUESTIONS)]
    return [
        {"question": " ".join(words[:6]), "choices": words[6:10], "answer": index % 4}
        for index, words in enumerate(texts)
    ]


@pytest.fixture
def tasks(questions: list[dict[str, object]], tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    (folder / "tiny_choice.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def expected_accuracy(model: Path, questions: list[dict[str, object]]) -> float:
    """Score every choice in a loop: the sum of the log-probabilities of its tokens."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = 0
    for one in questions:
        scores = []
        for choice in one["choices"]:
            prompt = tokenizer.encode(str(one["question"]))
            whole = tokenizer.encode(f"{one['question']} {choice}")
            with torch.no_grad():
                found = log_softmax(network(torch.tensor([whole])).logits[0], dim=-1)
            scores.append(sum(found[i - 1, whole[i]] for i in range(len(prompt), len(whole))))
        right += int(torch.stack(scores).argmax()) == one["answer"]
    return right / len(questions)


@pytest.fixture(scope="module")
def sparse(tiny_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "sparse"
    options = ("--output", str(output), "--method", "magnitude")
    assert main(["prune", str(tiny_model_directory), *options]) == 0
    return output


def test_dense_and_sparse_checkpoints_alike(
    tiny_model_directory: Path,
    sparse: Path,
    questions: list[dict[str, object]],
    tasks: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    found = []
    for model in (tiny_model_directory, sparse):
        result = tmp_path / "result.json"
        options = ("--tasks", "tiny_choice", "--tasks-path", str(tasks), "--json", str(result))
        text = ("--dataset", str(text_file), "--max-windows", "1", "--sequence-length", "32")
        assert main(["eval", str(model), *options, *text, "--dtype", "float32"]) == 0
        measured = json.loads(result.read_text())
        accuracy = measured["tasks"]["tiny_choice"]["acc"]
        assert accuracy == expected_accuracy(model, questions)
        assert 0 < measured["tasks"]["tiny_choice"]["acc_stderr"] < 0.1
        assert measured["perplexity"] > 1
        found.append(accuracy)
    assert found[0] != found[1]


def test_filters_of_one_metric_stay_apart() -> None:
    found = {
        "alias": "gsm8k",
        "acc,none": 0.25,
        "acc_stderr,none": 0.01,
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.02,
        "exact_match,flexible-extract": 0.75,
        "exact_match_stderr,flexible-extract": "N/A",
    }
    assert _metrics(found) == {
        "acc": 0.25,
        "acc_stderr": 0.01,
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.02,
        "exact_match,flexible-extract": 0.75,
    }


def test_what_would_be_served_answers(
    sparse: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the weights alone: kernels may round activations."""
    asked = []

    def record(tasks: Tasks, model: Any, *_: object, **options: object) -> dict[str, object]:
        asked.append(model)
        return {}

    monkeypatch.setattr(Tasks, "evaluate", record)
    evaluate(sparse, tasks="tiny_choice,", tasks_path=tasks)
    (model,) = asked
    linears = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    assert linears
    assert all(isinstance(layer, SparseLinear) for layer in linears)


@pytest.mark.parametrize(
    ("options", "examples", "questions_asked", "batch"),
    [((), 0, QUESTIONS, 8), (("--few-shot", "2", "--limit", "7", "--batch-size", "5"), 2, 7, 5)],
)
def test_what_is_asked_of_the_model(
    options: tuple[str, ...],
    examples: int,
    questions_asked: int,
    batch: int,
    tiny_model_directory: Path,
    questions: list[dict[str, object]],
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.models.huggingface import HFLM

    batches, prompts = set(), []
    answer = HFLM.loglikelihood

    def record(model: Any, requests: list[Any], *more: Any, **named: Any) -> Any:
        batches.add(int(model.batch_size))
        prompts.extend(request.args[0] for request in requests)
        return answer(model, requests, *more, **named)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    line = ["eval", str(tiny_model_directory), "--tasks", "tiny_choice"]
    assert main([*line, "--tasks-path", str(tasks), *options]) == 0
    assert batches == {batch}
    assert {prompt.split("\n\n")[-1] for prompt in prompts} == {
        one["question"] for one in questions[:questions_asked]
    }
    assert {prompt.count("\n\n") for prompt in prompts} == {examples}


def test_lm_eval_loads_a_permllm_checkpoint_itself(
    sparse: Path, questions: list[dict[str, object]], tasks: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(sparse), "dtype": "float32", "device": "cpu"},
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["tiny_choice"]["acc,none"] == expected_accuracy(sparse, questions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--tasks", f"{PAPER},no_such_task"), "knows no task 'no_such_task': see"),
        (("--tasks", ","), "knows no task of no name"),
        (("--tasks", "tiny_choice", "--tasks-path", "nowhere"), "is not a folder"),
        (("--dataset", "x.txt", "--tasks-path", "nowhere"), "give their names with --tasks"),
        (("--dataset", "x.txt", "--limit", "5"), "--limit 5 is about the questions of tasks"),
        (("--dataset", "x.txt", "--few-shot", "0"), "--few-shot 0 is about the questions of tasks"),
        (("--tasks", "arc_easy", "--max-windows", "3"), "--max-windows 3 is about perplexity"),
        (("--tasks", "arc_easy", "--batch-size", "0"), "must be at least 1"),
    ],
)
def test_bad_requests_are_refused(
    tiny_model_directory: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eval", str(tiny_model_directory), *options]) == 2
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_had_is_an_error_with_the_remedy(
    tiny_model_directory: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tasks / "questions.jsonl").unlink()
    options = ("--tasks", "tiny_choice", "--tasks-path", str(tasks))
    assert main(["eval", str(tiny_model_directory), *options]) == 2
    error = capsys.readouterr().err
    assert "lm-eval could not run tiny_choice" in error
    assert "Traceback" not in error


def test_without_lm_eval_the_error_says_how_to_get_it(
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("permllm_offline.text.zero_shot.find_spec", lambda name: None)
    assert main(["eval", str(tiny_model_directory), "--tasks", "arc_easy"]) == 2
    assert "pip install 'lm-eval>=0.4.13'" in capsys.readouterr().err
