import functools
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

from liger_aot.ops import _check

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

embedding = torch.ops.liger.embedding.default
embedding_fwd = torch.ops.liger.embedding_fwd.default
embedding_bwd = torch.ops.liger.embedding_bwd.default


def formula(padding_idx=None):
    return lambda weight, indices: F.embedding(indices, weight, padding_idx)


# Each index once; most of them often; runs that lie in a chunk of 32, cross one boundary, or several, or end at one; one run.
INDICES = {
    "one": torch.tensor([3]),
    "each once": torch.randperm(50),
    "few": torch.randint(3, (4, 30)),
    "many": torch.randint(50, (3, 40)),
    "runs": torch.arange(7).repeat_interleave(torch.tensor([5, 27, 20, 100, 8, 32, 33])),
    "ends": torch.arange(4).repeat_interleave(32),
    "one run": torch.full((7 * 32,), 7),
    "three dimensions": torch.randint(50, (2, 3, 5)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_matches_torchs(path, indices, dtype):
    """Shuffled: the sort puts them in order."""
    shuffled = indices.flatten()[torch.randperm(indices.numel())].view(indices.shape)
    for each in (indices, shuffled):
        check(embedding, formula(), torch.randn(50, 40).to(dtype), fixed(each))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 1024, 1300])
def test_widths(path, n, dtype):
    check(embedding, formula(), torch.randn(9, n).to(dtype), fixed(torch.randint(9, (70,))))


@pytest.mark.parametrize("padding_idx", [0, 1, 3, -1, -9])
def test_padding_gets_no_gradient(path, padding_idx):
    indices = torch.arange(9).repeat_interleave(torch.tensor([40, 1, 2, 70, 5, 3, 1, 1, 50]))
    weight = torch.randn(9, 40)
    results = check(functools.partial(embedding, padding_idx=padding_idx), formula(padding_idx), weight, fixed(indices))
    assert not results["gradient 0"][padding_idx].any()
    assert torch.equal(results["output 0"], weight[indices])


def test_sums_do_not_depend_on_other_rows(interpreted):
    """A row's sum is the same bits in whatever company its run is sorted, as long as it begins where a chunk does."""
    dy, alone = torch.randn(128, 40), torch.zeros(96, dtype=torch.int64)
    company = torch.cat((alone + 1, torch.arange(2, 34)))
    want = embedding_bwd(dy[:96], alone, 1, -1)[0]
    assert torch.equal(embedding_bwd(dy, company, 34, -1)[1], want)
    assert torch.equal(embedding_bwd(torch.cat((dy[96:], dy[:96])), torch.cat((alone[:32], alone + 1)), 2, -1)[1], want)
    assert {"embedding_shares", "embedding_bwd"} <= set(interpreted.launched)


def test_views_and_offsets(path):
    base = torch.randn(60, 154)
    for weight in (base[3:40, 5:60], base[:40, ::2], base.t()[:40], base[:1, :30].expand(40, 30)):
        check(embedding, formula(), weight, fixed(torch.randint(len(weight), (140,))[::2].view(10, 7).t()))
    assert torch.equal(embedding(base, torch.tensor([[1, 2]], dtype=torch.int32)), base[1:3][None])


@pytest.mark.parametrize(("table", "indices"), [((5, 8), (0,)), ((5, 8), (2, 0)), ((5, 0), (3,)), ((0, 8), (0,))], ids=str)
def test_nothing_in_nothing_out(path, table, indices):
    weight = torch.ones(table, requires_grad=True)
    y = embedding(weight, torch.zeros(indices, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (*indices, table[1])
    assert torch.equal(weight.grad, torch.zeros(table))


@pytest.mark.parametrize("wrong", [-1, -7, 9, 2**40])
def test_an_index_out_of_range_is_nan_on_a_device(interpreted, wrong):
    weight = torch.randn(9, 40, requires_grad=True)
    indices = torch.randint(9, (70,))
    indices[[5, 6, 40]] = wrong
    y = embedding(weight, indices)
    dy = torch.randn(70, 40)
    y.backward(dy)
    assert y[[5, 6, 40]].isnan().all()
    right = (indices >= 0) & (indices < 9)
    assert torch.equal(y[right], weight[indices[right]])
    torch.testing.assert_close(weight.grad, torch.zeros(9, 40).index_add_(0, indices[right], dy[right]))


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_index_out_of_range_is_an_error_where_that_costs_nothing(path, wrong, monkeypatch):
    monkeypatch.setattr(_check, "CHECK", path is not None)
    with pytest.raises(ValueError, match=re.escape(f"embedding: indices must be in [0, 9), the rows of weight, got {wrong}")):
        embedding(torch.randn(9, 4), torch.tensor([0, wrong]))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_is_an_operator(padding_idx):
    weight, indices = torch.randn(10, 24), torch.randint(10, (3, 4))
    check_operator(embedding, (embedding_fwd, (weight, indices)), weight, indices, padding_idx=padding_idx)
    torch.library.opcheck(embedding_bwd, (torch.randn(3, 4, 24), indices, 10, -1 if padding_idx is None else padding_idx))


BAD = [
    (lambda w, i: (w.double(), i), "embedding: weight must be float32, float16 or bfloat16, got torch.float64"),
    (lambda w, i: (w[0], i), "embedding: weight must have shape (classes, n), got (4,)"),
    (lambda w, i: (w, i.float()), "embedding: indices must be int64 or int32, got torch.float32; convert them with .long()"),
    (lambda w, i: (w, i.to("meta")), "embedding: indices must be on cpu like weight, got meta; move them with .to()"),
    (lambda w, i: (w, i, 9), "embedding: padding_idx must be one of the 9 rows of weight, got 9"),
    (lambda w, i: (w, i, -10), "embedding: padding_idx must be one of the 9 rows of weight, got -10"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[11:52] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        embedding(*bad(torch.randn(9, 4), torch.tensor([0, 1])))
