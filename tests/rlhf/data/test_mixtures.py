"""Several sets as one: all rows of each, or the largest mixture with the shares asked for."""

import json

import pytest

from rlhf import data
from rlhf.data.mixtures import Joined, largest_mixture, mixed, named_sets
from rlhf.data.store import Mapped
from tests.tiny import write_jsonl


def fill(folder, **counts):
    return {
        name: write_jsonl(folder / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
        for name, count in counts.items()
    }


def texts(name, **options):
    return [row["text"] for row in data.load_rows(name, "text", **options)]


def test_all_rows_of_several_sets(tmp_path, caplog):
    paths = fill(tmp_path, a=2, b=3)
    assert texts(f"{paths['b']},{paths['a']}") == ["b 0", "b 1", "b 2", "a 0", "a 1"]
    assert [row["at"] for row in data.load_rows(f"{paths['a']},{paths['b']}", "text")][1:3] == [
        f"{paths['a']}:2",
        f"{paths['b']}:1",
    ]
    assert caplog.messages[0] == f"data: 3 of 3 rows of {paths['b']}, 2 of 2 rows of {paths['a']}"


def test_shares_of_sets(tmp_path, caplog):
    """All of the set that runs out first; of the others at even distances."""
    paths = fill(tmp_path, a=100, b=3)
    name = f"{paths['a']}:0.7,{paths['b']}:0.3"
    assert texts(name) == [f"a {i}" for i in (0, 14, 28, 42, 57, 71, 85)] + ["b 0", "b 1", "b 2"]
    assert caplog.messages == [f"data: 7 of 100 rows of {paths['a']}, 3 of 3 rows of {paths['b']}"]
    assert texts(f"{paths['a']}:7,{paths['b']}:3") == texts(name)
    assert len(texts(f"{paths['a']}:1,{paths['a']}:1")) == 200


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [3, 1, 4], [1e-9, 1], [1, 1e9, 5]])
def test_no_larger_mixture_has_these_shares(weights):
    sizes = [60, 1000, 7][: len(weights)]
    counts = largest_mixture(sizes, weights)
    total = sum(counts)
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    for count, weight in zip(counts, weights, strict=True):
        assert count == 1 or abs(count - total * weight / sum(weights)) <= len(sizes)
    one_more = [total * weight / sum(weights) for weight in weights]
    assert any(count + 1 > size for count, size in zip(one_more, sizes, strict=True))


def test_every_set_has_its_own_format(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "test.jsonl", [{"text": "b"}])
    (tmp_path / "c.txt").write_text("c")
    assert texts(f"{tmp_path}/a.csv,{tmp_path}/b,{tmp_path}/*.txt", split="test") == ["a", "b", "c"]


def test_commas_and_colons_in_names(tmp_path):
    for name in ("a,b.jsonl", "c:1", "d.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "c:1").rename(tmp_path / "c.jsonl:1")
    first, second, third = (f"{tmp_path}/{name}" for name in ("a,b.jsonl", "c.jsonl:1", "d.jsonl"))
    assert named_sets(first) == [(first, None)] and named_sets(second) == [(second, None)]
    assert named_sets(f"{third},{first}") == [(third, None), (first, None)]
    assert named_sets(f"{first}:2,{second}:3,{third}:.5") == [(first, 2.0), (second, 3.0), (third, 0.5)]
    assert named_sets("team/set, other/set") == [("team/set", None), ("other/set", None)]
    assert named_sets("hf://a/b,hf://c/d") == [("hf://a/b", None), ("hf://c/d", None)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jsonl,", "one of them by nothing"),
        ("a.jsonl:0,b.jsonl:1", r"got a\.jsonl:0, wants weights above 0"),
        ("a.jsonl:-1,b.jsonl:1", r"got a\.jsonl:-1, wants"),
        ("a.jsonl:nan,b.jsonl:1", r"got a\.jsonl:nan, wants"),
        ("a.jsonl:inf,b.jsonl:1", r"got a\.jsonl:inf, wants"),
        ("a.jsonl:0.5,b.jsonl", "gives some sets a weight and some none"),
        ("a.jsonl:half,b.jsonl:half", r"got a\.jsonl:half, b\.jsonl:half, wants"),
    ],
)
def test_bad_lists_of_sets(name, reason):
    with pytest.raises(data.DataError, match=reason):
        data.load_rows(name, "text")


def test_rows_that_are_not_in_memory_stay_there():
    """The mixture makes those that are asked for."""
    made = []

    class Lazy(Mapped):
        def take(self, numbers):
            return Lazy(self.make, [self.items[number] for number in numbers])

    def make(item):
        made.append(item)
        return {"text": item}

    rows = mixed([Lazy(make, list(range(100))), [{"text": 100}, {"text": 101}]], ["a", "b"], [0.5, 0.5])
    assert isinstance(rows, Joined) and len(rows) == 4 and not made
    assert rows[-1] == {"text": 101} and rows[1] == {"text": 50} and made == [50]
    assert [row["text"] for row in rows] == [0, 50, 100, 101]
    assert [row["text"] for row in rows[1:3]] == [50, 100]
    assert [row["text"] for row in rows.take([3, 0, 2])] == [101, 0, 100]
    with pytest.raises(IndexError):
        rows[4]


def test_a_mixture_of_files_and_rows_in_memory_has_a_key():
    """It changes with what the rows in memory say, and with where they come from."""

    class Known(Mapped):
        key = "the files"

    class Unknown(Mapped):
        key = None

    def key(*rows, files=Known):
        return Joined([files(str, [1, 2]), list(rows)]).key

    first = {"text": "a", "at": "a.jsonl:1"}
    keys = [key(first), key(first | {"text": "b"}), key(first | {"at": "b.jsonl:1"}), key(first, first)]
    assert len({json.dumps(one) for one in keys}) == 4 and key(first) == key(dict(first))
    assert key(first, files=Unknown) is None
