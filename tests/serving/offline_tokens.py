"""Greedy tokens of models by vLLM's `LLM`, one model at a time in this process, printed as JSON.

python -m tests.serving.offline_tokens DIRECTORY...
"""

import json
import os
import sys

PROMPTS = [[5, 6, 7, 8], [40, 3, 21], list(range(2, 58, 3))]
TOKENS = 16


def main(directories: list[str]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0
    )
    answers = {}
    for directory in directories:
        model = LLM(
            directory,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            skip_tokenizer_init=True,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [one.outputs[0] for one in model.generate(prompts, sampling, use_tqdm=False)]
        answers[directory] = [
            {
                "tokens": list(output.token_ids),
                "log_probabilities": [
                    step[token].logprob
                    for token, step in zip(output.token_ids, output.logprobs, strict=True)
                ],
            }
            for output in outputs
        ]
        del model
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
