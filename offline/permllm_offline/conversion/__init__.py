"""Other people's sparse checkpoints to this format, and this format to integers or back to dense.

A source (`sources`, `bitmask`, `published_masks`) says which weights were kept; `verdicts` and
`pattern_choice` tell which pattern they obey; `to_sparse`, `to_integers` and `to_dense` write.
"""
