"""The checkpoint format, alone: how a sparse, permuted model is written down and read back.

Import from the submodules. `pattern`, `packing`, `permutation` and `folding` need torch alone;
`schema`, `reader`, `writer` and `validation` also need safetensors and pydantic. The format itself
is specified in `docs/checkpoint-format.md`.
"""
