"""Which examples a continued scoring still has to score, found without holding the ids of all that are scored."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from montessori_ray.stages.score import without


@given(st.lists(st.integers(0, 40), unique=True), st.data())
def test_without_leaves_out_what_is_scored_whatever_the_order(numbers: list[int], data: st.DataObject) -> None:
    scored = data.draw(st.lists(st.sampled_from(numbers), unique=True)) if numbers else []
    rows = [{"example_id": f"e{number}"} for number in numbers]
    left = without(rows, iter([f"e{number}" for number in scored]))
    assert [row["example_id"] for row in left] == [f"e{number}" for number in numbers if number not in set(scored)]


def test_without_reads_no_further_than_it_must() -> None:
    read: list[str] = []

    def scored() -> Iterator[str]:
        for number in (1, 0, 3, 2, 5, 4):
            read.append(f"e{number}")
            yield read[-1]

    assert list(without([{"example_id": "e0"}, {"example_id": "e1"}, {"example_id": "e2"}], scored())) == []
    assert read == ["e1", "e0", "e3", "e2"]
