"""Batches: every item once, fixed shapes for arrays, little padding for sequences, and windows back into examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Arrays, Ragged, Sequences

lengths = st.lists(st.integers(1, 40), max_size=60)


def sequences(length_S, per_token=True, example_S=None):
    rows = [list(range(1, length + 1)) for length in length_S]
    example_S = np.arange(len(rows)) if example_S is None else np.asarray(example_S)
    return Sequences({"input_ids": Ragged.of(rows, 0)}, example_S, np.asarray(length_S, np.int64), per_token)


@given(lengths, st.integers(1, 200))
def test_every_sequence_is_in_one_batch_with_all_its_tokens(length_S, batch_tokens):
    """Any lengths, any budget: each sequence stands once, whole, padded on the right."""
    found = {}
    for batch in sequences(length_S).batches(1, batch_tokens):
        for item, row in zip(batch.item_B.tolist(), batch.arrays["input_ids"].tolist(), strict=True):
            assert item not in found
            found[item] = [token for token in row if token]
            assert found[item] == row[: len(found[item])]
    assert {i: list(range(1, length + 1)) for i, length in enumerate(length_S)} == found


@given(lengths, st.integers(1, 200))
def test_no_batch_is_over_budget_unless_it_is_one_sequence(length_S, batch_tokens):
    """Padding counts: what is multiplied is what is paid for."""
    for batch in sequences(length_S).batches(1, batch_tokens):
        assert batch.arrays["input_ids"].size <= batch_tokens or len(batch.item_B) == 1


def test_little_of_mixed_lengths_is_padding():
    """2,000 texts of 10 to 1,024 tokens under a budget of 4,096: under 1 % of what goes through the model is padding."""
    length_S = np.random.default_rng(0).integers(10, 1025, 2000).tolist()
    batches = list(sequences(length_S).batches(1, 4096))
    assert sum(length_S) > 0.99 * sum(batch.arrays["input_ids"].size for batch in batches)


def test_few_texts_are_hardly_padded_either():
    """24 texts of 10 to 1,024 tokens: under 5 % is padding (12 % in 5 full batches), in at most half as many batches."""
    length_S = np.random.default_rng(0).integers(10, 1025, 24).tolist()
    batches = list(sequences(length_S).batches(1, 4096))
    assert sum(length_S) > 0.95 * sum(batch.arrays["input_ids"].size for batch in batches)
    assert len(batches) <= 12


def test_a_batch_that_has_hardly_begun_takes_what_comes():
    """Tiny texts of very different lengths share one: a pass of its own costs each more than padding."""
    assert [list(range(16))[::-1]] == [batch.item_B.tolist() for batch in sequences(range(1, 17)).batches(1, 4096)]


@given(st.integers(0, 70), st.integers(1, 32))
def test_arrays_go_in_batches_of_one_shape(rows, batch_rows):
    """All of them, in order, the last batch filled up with its last row."""
    arrays = {"x": np.arange(rows)}
    batches = list(Arrays(arrays).batches(batch_rows)) if rows else []
    assert list(range(rows)) == [i for batch in batches for i in batch.item_B.tolist()]
    assert all(len(batch.arrays["x"]) == batch_rows for batch in batches)
    assert all((batch.arrays["x"][len(batch.item_B) :] == rows - 1).all() for batch in batches)


@pytest.mark.parametrize(("per_token", "expected"), [(True, [1.0, (2 * 3 + 4 * 1) / 4]), (False, [1.0, 6.0])])
def test_windows_come_back_as_their_example(per_token, expected):
    """Sums are added, means weighted by their tokens; the number of tokens is that of the example."""
    windows = sequences([5, 3, 1], per_token, example_S=[0, 1, 1])
    assert expected == windows.of_examples(np.array([1.0, 2.0, 4.0])).tolist()
    assert [[expected[0], expected[1]]] * 2 == windows.of_examples(np.array([[1.0, 2.0, 4.0]] * 2)).tolist()
    assert [5, 4] == windows.num_tokens_N.tolist()


def test_no_sequences_are_fine():
    """A shard whose texts were all rejected."""
    none = sequences([])
    assert [] == list(none.batches(1, 100))
    assert (0,) == none.of_examples(np.empty(0)).shape
    assert (0,) == none.num_tokens_N.shape
