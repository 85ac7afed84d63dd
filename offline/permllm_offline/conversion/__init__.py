"""Other people's sparse checkpoints to this format, and this format back to a dense checkpoint.

A source (`plain`, `bitmask`) says which weights were kept; `recovery` and `verdicts` find the
channel order in which they obey the pattern; `to_sparse` and `to_dense` write.
"""
