"""A tokenizer that keeps what it was given."""


class Beginning:
    """A tokenizer of a model whose every text begins with token 7."""

    window_begin = 7

    def __init__(self) -> None:
        self.tokenized = ""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        self.tokenized += text
        return {"input_ids": [ord(letter) for letter in text]}
