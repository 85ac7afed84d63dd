"""The tiny model and the text of the tests of offline."""

from tests.offline.conftest import text_file, tiny_model_directory

__all__ = ["text_file", "tiny_model_directory"]
