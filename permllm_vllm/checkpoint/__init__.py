"""The checkpoint format, alone: how a sparse, permuted model is written down and read back.

Import from the submodules. `pattern`, `packing`, `permutation`, `folding` and `scaled` need torch
alone; `schema`, `reader`, `writer` and `validation` also need safetensors and pydantic. The format
itself is specified in `docs/checkpoint-format.md`; the modules `scaled*`, and
`quantization_entries`, read dense models of 8 bits.
"""
