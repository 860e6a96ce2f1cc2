"""Eigenvectors of many matrices at once."""

import pytest
import torch

from pipeline.curvatures.base import Sample
from pipeline.curvatures.eigenvectors import eigenvectors


def matrix(seed, size=5, rank=5):
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows.mT @ rows).float()


def test_they_take_each_matrix_apart():
    """In its eigenvectors every matrix is diagonal, one without full rank too."""
    matrices = {"one": matrix(0), "two": matrix(1, 7, 2), "three": matrix(2, 3)}
    for name, vectors in eigenvectors(matrices, Sample([], 0)).items():
        turned = vectors.mT @ matrices[name] @ vectors
        torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-5, rtol=0)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(vectors)))


def test_equal_matrices_have_the_same_vectors_in_memory_of_their_own():
    """Layers that share an input have one basis, and a file can hold it for each."""
    found = eigenvectors({"query": matrix(0), "other": matrix(1), "key": matrix(0)}, Sample([], 0))
    assert torch.equal(found["query"], found["key"])
    assert found["query"].data_ptr() != found["key"].data_ptr()
    assert not torch.equal(found["query"], found["other"])


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_has_its_threads_back(threads):
    """What comes after uses as many threads as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        eigenvectors({"one": matrix(0), "two": matrix(1)}, Sample([], 0))
        assert threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
