"""A package, so that none of this name in site-packages is taken in its place."""
