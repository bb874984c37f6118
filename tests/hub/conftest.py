"""Packed folders shared by the tests of this room; a test that changes one copies it first."""

import shutil
from pathlib import Path

import pytest
from packed_models import packed_model, save


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return `family -> packed folder`, each made once, from the model of seed 0."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            out = tmp_path_factory.mktemp("packed") / family
            made[family] = save(packed_model(family), out)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """A packed LLaMA split into several files."""
    out = tmp_path_factory.mktemp("packed") / "sharded"
    return save(packed_model("llama"), out, max_shard_size="100KB")


@pytest.fixture
def copy_of(tmp_path):
    """Return `folder -> copy of it that the test may spoil`."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy
