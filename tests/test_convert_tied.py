"""Heads tied to the embedding in Hugging Face's files, of which SAT has a copy of its own."""

import json

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import edit
from checkpoints import identical
from checkpoints import put
from checkpoints import put_hf
from checkpoints import refused
from checkpoints import save
from checkpoints import tensors


def test_a_head_that_was_trained_apart_is_written(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    put(tmp_path / "sat", **{"mixins.lm.lm_head.weight": torch.ones(128, 64)})
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors(tmp_path / "back")["lm_head.weight"], torch.ones(128, 64))


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("vocabulary", [128, 1024])
def test_a_head_of_the_same_numbers_is_tied_where_the_configuration_says_so(mp, vocabulary, tmp_path):
    """Below 1000 every rank holds the embedding, and a part of the head."""
    for name, tied in (("llama", False), ("llama-tied", True)):
        save(tmp_path / name, name, vocab_size=vocabulary)
        put_hf(
            tmp_path / name, {} if tied else {"lm_head.weight": tensors(tmp_path / name)["model.embed_tokens.weight"].clone()}
        )
        hf_to_sat(tmp_path / name, tmp_path / f"{name}-sat", mp=mp)
        sat_to_hf(tmp_path / f"{name}-sat", tmp_path / f"{name}-back", verify=True)
        assert json.loads((tmp_path / f"{name}-back/config.json").read_text())["tie_word_embeddings"] == tied
        assert identical(tensors(tmp_path / name), tensors(tmp_path / f"{name}-back")) == []


def test_a_head_of_other_zeros_is_written(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    words, head = torch.full((128, 64), 0.5), torch.full((128, 64), 0.5)
    words[0], head[0] = 0.0, -0.0
    put(tmp_path / "sat", **{"transformer.word_embeddings.weight": words, "mixins.lm.lm_head.weight": head})
    edit(tmp_path / "sat/config.json", tie_word_embeddings=True)
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True)
    assert bool(tensors(tmp_path / "back")["lm_head.weight"][0].signbit().all())


def test_a_tied_head_written_twice_is_read(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    put_hf(tmp_path / "hf", {"lm_head.weight": tensors(tmp_path / "hf")["model.embed_tokens.weight"].clone()})
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors(tmp_path / "back")


def test_a_tied_head_without_its_embedding_is_listed(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    put_hf(tmp_path / "hf", {"lm_head.weight": torch.zeros(128, 64)}, drop=("model.embed_tokens.weight",))
    refused(
        hf_to_sat, tmp_path / "hf", "1 problem, nothing was written", "missing: model.embed_tokens.weight of shape [128, 64]"
    )
