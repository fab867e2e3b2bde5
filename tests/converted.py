"""A small Llama in both formats, for the tests of conversion; each test has copies of its own."""

import pytest

from liger_aot.convert import hf_to_sat

from checkpoints import copy
from checkpoints import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(folder / "hf")
    hf_to_sat(folder / "hf", folder / "sat")
    return folder


@pytest.fixture
def hf(llama, tmp_path):
    return copy(llama / "hf", tmp_path / "hf")


@pytest.fixture
def sat(llama, tmp_path):
    return copy(llama / "sat", tmp_path / "sat")
