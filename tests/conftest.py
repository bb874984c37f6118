"""What tests of several rooms share."""

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = "the quick brown fox jumps over a lazy dog while seven wizards box with gin and tea "
    path.write_text("".join(words[i % 17 :] + "\n" for i in range(40)))
    return str(path)
