"""Tests, a folder for every folder of the project."""

import pytest

# So that a failed assertion of a shared oracle shows its values, as one in a test file does.
pytest.register_assert_rewrite("tests.support")
