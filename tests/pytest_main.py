"""What Bazel runs for a test: pytest on the files it is given."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:xdist", *sys.argv[1:]]))
