"""Other people's sparse checkpoints to this format, and this format to integers or back to dense.

A source (`plain`, `bitmask`) says which weights were kept; `recovery` and `channel_order` find the
channel order in which they obey the pattern; `to_sparse`, `to_integers` and `to_dense` write.
"""
