"""Batch samplers: every image once, ranks disjoint, shapes alike, repeats of rare classes, exact resume."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.data import samplers
from detection.data.records import Record
from detection.data.samplers import TrainBatchSampler, repeat_factors
from detection.data.store import RecordStore

Batches = list[list[tuple[int, int]]]


def store(sizes: list[tuple[int, int]], labels: list[list[int]] | None = None) -> RecordStore:
    records = []
    for i, (height, width) in enumerate(sizes):
        ls = np.array([] if labels is None else labels[i], np.int64)
        n, flags = len(ls), np.zeros(len(ls), np.bool_)
        boxes = np.tile(np.array([[0, 0, 1, 1]], np.float32), (n, 1))
        records.append(Record(i, f"{i}", width, height, boxes, ls, boxes[:, 0], flags, flags, ls))
    return RecordStore(records)


def alternating(count: int) -> RecordStore:
    return store([(10, 20) if i % 3 else (20, 10) for i in range(count)])


def epoch(sampler: TrainBatchSampler, monkeypatch: pytest.MonkeyPatch, world: int = 1) -> list[Batches]:
    """The batches of every rank."""
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(samplers, "rank_and_world", lambda rank=rank: (rank, world))
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(24, 4), (25, 4), (3, 4), (1, 2)])
def test_ranks_share_the_data_set(count: int, batch_size: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = epoch(TrainBatchSampler(alternating(count), batch_size), monkeypatch, world)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    seen = Counter(i for batches in ranks for batch in batches for i, _ in batch)
    assert set(seen) == set(range(count))
    padding = -count % (batch_size * world)
    assert seen.total() == count + padding
    if not padding:
        assert set(seen.values()) == {1}


def test_seeds_are_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = TrainBatchSampler(alternating(40), 4)
    seeds = []
    for number in range(3):
        sampler.set_epoch(number)
        seeds += [s for batches in epoch(sampler, monkeypatch, 2) for batch in batches for _, s in batch]
    assert len(set(seeds)) == 120


def test_order_and_seeds_do_not_depend_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process or two: an image gets the same augmentation."""
    sampler = TrainBatchSampler(alternating(24), 4)
    one, two = (epoch(sampler, monkeypatch, world) for world in (1, 2))
    assert [b for pair in zip(*two, strict=True) for b in pair] == one[0]


def test_epochs_and_seeds_differ_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int, number: int) -> Batches:
        sampler = TrainBatchSampler(alternating(24), 4, seed=seed)
        sampler.set_epoch(number)
        return epoch(sampler, monkeypatch)[0]

    assert run(1, 2) == run(1, 2)
    for other in (run(1, 3), run(2, 2), run(2, 1)):
        assert [i for batch in other for i, _ in batch] != [i for batch in run(1, 2) for i, _ in batch]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 7))
def test_groups_are_mixed_only_in_what_is_left(wide: list[bool], batch_size: int) -> None:
    sampler = TrainBatchSampler(store([(10, 20) if w else (20, 10) for w in wide]), batch_size)
    mixed = sum(len({wide[i] for i, _ in batch}) > 1 for batch in sampler)
    assert mixed <= 1
    assert len(list(sampler)) == -(-len(wide) // batch_size)


def test_square_counts_as_wide_and_grouping_can_be_off() -> None:
    s = store([(10, 10), (10, 20)] * 8 + [(20, 10)] * 16)
    assert all(len({i < 16 for i, _ in batch}) == 1 for batch in TrainBatchSampler(s, 4))
    plain = list(TrainBatchSampler(s, 4, group_by_aspect=False))
    assert any(len({i < 16 for i, _ in batch}) == 2 for batch in plain)


def test_repeat_factors_are_lvis() -> None:
    """Detectron2's own example: threshold 0.5, images with classes {0, 1}, {0} and none."""
    s = store([(10, 10)] * 3, [[1, 2, 2], [1], []])
    torch.testing.assert_close(repeat_factors(s, 0.5), torch.tensor([1.5**0.5, 1.0, 1.0], dtype=torch.float64))
    assert repeat_factors(store([(1, 1)] * 2), 0.5).tolist() == [1.0, 1.0]


def test_rare_images_repeat_with_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of 100 holds class 2: at threshold 0.0625 it is seen 2.5 times an epoch on average."""
    sampler = TrainBatchSampler(store([(10, 10)] * 100, [[2]] + [[1]] * 99), 1, repeat_threshold=0.0625)
    counts, lengths = [], set()
    for number in range(120):
        sampler.set_epoch(number)
        draws = list(itertools.chain.from_iterable(epoch(sampler, monkeypatch)[0]))
        seen = Counter(i for i, _ in draws)
        assert set(seen) == set(range(100)) and seen[0] in (2, 3)
        assert len({s for i, s in draws if i == 0}) == seen[0]
        counts.append(seen[0])
        lengths.add(len(draws))
    assert lengths == {102}  # 99 + 2.5 rounded up; the half goes to another image
    assert abs(np.mean(counts) - 2.5) < 0.15


@pytest.mark.parametrize("world", [1, 2])
def test_resume_continues_where_it_stopped(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampler() -> TrainBatchSampler:
        return TrainBatchSampler(alternating(24), 2, seed=3)

    monkeypatch.setattr(samplers, "rank_and_world", lambda: (world - 1, world))
    whole = sampler()
    whole.set_epoch(5)
    expected = list(whole)
    resumed = sampler()
    resumed.load_state_dict({"epoch": 5, "start_batch": 4})
    resumed.set_epoch(5)  # Lightning says it again
    assert list(resumed) == expected[4:]
    assert list(resumed) == expected  # the next pass is whole
    resumed.load_state_dict({"epoch": 5, "start_batch": 4})
    resumed.set_epoch(6)
    assert len(list(resumed)) == len(expected)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        TrainBatchSampler(store([]), 2)
