"""What a name means: files, patterns, folders of splits and shards as the hub and `datasets` lay them out."""

import json
import re
import sys

import pytest

from rlhf import data
from rlhf.data import files, mixtures, sources
from rlhf.data.streaming import stream_rows
from tests.tiny import write_jsonl


def fill(folder, *names):
    """Files that hold one row each, which says where it stands."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"text": name}])


def found(name, split="train", config=None):
    """The files that rows came from, as told by the rows and by their places."""
    read = list(files.read(str(name), "text", split, config))
    assert all(at.endswith(f"{row['text']}:1") for at, row in read)
    assert files.size(str(name), split, config) == sum(len(json.dumps(row)) + 1 for _, row in read)
    assert len(files.fingerprint(str(name), split, config)) == len(read)
    return [row["text"] for _, row in read]


def refused(name, reason, split="train", config=None):
    with pytest.raises(data.DataError, match=reason) as caught:
        found(name, split, config)
    assert "\n" not in str(caught.value)


def test_shards_of_a_split(tmp_path):
    names = [f"train-{i:05d}-of-00003.jsonl" for i in range(3)]
    fill(tmp_path, *names, "test-00000-of-00001.jsonl", "README.md", "LICENSE", ".cache/x.jsonl", "dataset_infos.json")
    assert found(tmp_path) == names
    assert found(tmp_path, "test") == ["test-00000-of-00001.jsonl"]
    refused(tmp_path, r"no rows of the split 'validation'; it holds .*train-00000-of-00003\.jsonl", "validation")
    (tmp_path / names[0]).unlink()
    refused(tmp_path, r"not all of the 3 files train-\.\.\. are here, missing are numbers 0$")
    fill(tmp_path, names[0], "train-00000-of-00001.jsonl")
    refused(tmp_path, r"holds train-\.\.\. of 1 and of 3 files")


def test_shards_may_count_from_one_and_carry_a_hash(tmp_path):
    names = [f"train-{i + 1}-of-2-{'0a1b' * 4}.jsonl" for i in range(2)]
    fill(tmp_path, *names)
    assert found(tmp_path) == names


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    fill(tmp_path, *(f"train_{i}.jsonl" for i in (10, 9, 100)))
    assert found(tmp_path) == ["train_9.jsonl", "train_10.jsonl", "train_100.jsonl"]
    assert found(tmp_path / "*.jsonl") == found(tmp_path)


def test_a_snapshot_of_the_hub(tmp_path):
    fill(tmp_path, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", ".git/train.jsonl")
    fill(tmp_path, "README.md", ".gitattributes")
    assert found(tmp_path) == ["data/train-00000-of-00001.jsonl"]
    assert found(tmp_path, "test") == ["data/test-00000-of-00001.jsonl"]


def test_folders_of_splits(tmp_path):
    fill(tmp_path, "train/b.jsonl", "train/a.jsonl", "test/a.jsonl", "notes.txt")
    refused(tmp_path, "no rows of the split 'dev'; it holds notes.txt, test/, train/", "dev")
    (tmp_path / "test" / "a.jsonl").unlink()
    (tmp_path / "test").rmdir()
    assert found(tmp_path) == ["train/a.jsonl", "train/b.jsonl"]
    refused(tmp_path, "no rows of the split 'dev'; it holds notes.txt, train/", "dev")


def test_folders_of_configurations(tmp_path):
    fill(tmp_path, "main/train-00000-of-00001.jsonl", "hard/train.jsonl", "hard/test.jsonl")
    assert found(tmp_path, config="main") == ["main/train-00000-of-00001.jsonl"]
    assert found(tmp_path, "test", "hard") == found(tmp_path, "test") == ["hard/test.jsonl"]
    refused(tmp_path, "'train' of several configurations: choose one of hard, main", "train")
    refused(tmp_path, "has no configuration 'easy'.*it holds hard/, main/", config="easy")


def test_a_plain_folder_of_shards(tmp_path):
    """Of any split, as one file is; but not where names tell of splits."""
    fill(tmp_path, "part-1.jsonl", "part-2.jsonl", "README.md")
    assert found(tmp_path) == found(tmp_path, "test") == ["part-1.jsonl", "part-2.jsonl"]
    fill(tmp_path, "other.jsonl")
    refused(tmp_path, r"several files could be meant \(other\.jsonl, part-1\.jsonl, part-2\.jsonl\): name one, or give")
    (tmp_path / "other.jsonl").rename(tmp_path / "my_validation.jsonl")
    refused(tmp_path, "no rows of the split 'train'")


def test_names_of_splits_below_go_before_names_of_none(tmp_path):
    """As where a snapshot holds the raw files of a set beside its shards."""
    fill(tmp_path, "all.jsonl", "ready.jsonl", "data/train-00000-of-00001.jsonl")
    assert found(tmp_path) == ["data/train-00000-of-00001.jsonl"]
    refused(tmp_path, r"no rows of the split 'test'; it holds all\.jsonl, data/, ready\.jsonl", "test")


def test_shards_with_long_names(tmp_path):
    names = [f"part-0000{i}-8f14e45f-ceea-467f-a0e6-1c3b5d7f9a2b-c000.snappy.jsonl" for i in range(3)]
    fill(tmp_path, *names)
    assert found(tmp_path) == names


def test_names_that_only_begin_like_the_split(tmp_path):
    fill(tmp_path, "train_sft-00000-of-00001.jsonl", "test.jsonl")
    assert found(tmp_path) == ["train_sft-00000-of-00001.jsonl"]
    fill(tmp_path, "train_prefs.jsonl")
    refused(tmp_path, "several splits of names like 'train': choose one of train_prefs, train_sft")
    assert found(tmp_path, "train_prefs") == ["train_prefs.jsonl"]
    fill(tmp_path, "trainer.jsonl", "train.jsonl")
    assert found(tmp_path) == ["train.jsonl"]


def test_the_same_rows_twice_are_an_error(tmp_path):
    fill(tmp_path, "train.jsonl", "train.json")
    refused(tmp_path, r"several files could be meant \(train\.json, train\.jsonl\): name one")
    (tmp_path / "train.json").rename(tmp_path / "train.jsonl.gz")
    refused(tmp_path, r"several files could be meant \(train\.jsonl, train\.jsonl\.gz\): name one")


def test_patterns_of_names(tmp_path):
    fill(tmp_path, "a/x.jsonl", "a/b/y.jsonl", "a/b/z.json", "a/README.md")
    assert found(tmp_path / "a" / "*") == ["a/x.jsonl"]
    assert found(tmp_path / "**" / "*.jsonl") == ["a/b/y.jsonl", "a/x.jsonl"]
    assert found(tmp_path / "a" / "b" / "[yz].*") == ["a/b/y.jsonl", "a/b/z.json"]
    refused(tmp_path / "*.csv", r"\*\.csv: no file has a name like this")
    fill(tmp_path, "what[1].jsonl")
    assert found(tmp_path / "what[1].jsonl") == ["what[1].jsonl"]


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: [rows/part-*, more/last.jsonl]
  - split: test
    path: ./rows/held*
- config_name: small
  data_files: rows/part-0.jsonl
- config_name: folder
  data_dir: more
- config_name: gone
  data_files: {train: gone/*}
---
# Rows
"""


def test_the_card_of_a_snapshot(tmp_path):
    fill(tmp_path, "rows/part-0.jsonl", "rows/part-1.jsonl", "rows/held.jsonl", "more/last.jsonl", "rows/part-0.md5")
    (tmp_path / "README.md").write_text(CARD)
    everything = ["more/last.jsonl", "rows/part-0.jsonl", "rows/part-1.jsonl"]
    assert found(tmp_path) == found(tmp_path, "train", "default") == everything
    assert found(tmp_path, "test") == ["rows/held.jsonl"]
    assert found(tmp_path, config="small") == ["rows/part-0.jsonl"]
    assert found(tmp_path, config="folder") == ["more/last.jsonl"]
    refused(tmp_path, "no split 'dev', its README.md names train, test", "dev")
    refused(tmp_path, "no configuration 'large': choose one of default, small, folder, gone", config="large")
    refused(tmp_path, r"its README\.md names gone/\*, which is not here", config="gone")
    (tmp_path / "README.md").write_text(CARD.replace("default", "large"))
    refused(tmp_path, "several configurations: choose one of large, small, folder, gone")
    for card in ("---\nconfigs: [\n---", "---\nlicense: mit\n---", "---\nconfigs: 3\n---", "# Rows"):
        (tmp_path / "README.md").write_text(card)
        refused(tmp_path, "'dev' of several configurations: choose one of more, rows .*pattern of names", "dev")


def test_what_datasets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    texts = [{"text": f"row {i}", "label": None if i else 1} for i in range(5)]
    whole = datasets.Dataset.from_list(texts)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": whole.select([1, 3]), "test": whole}).save_to_disk(tmp_path / "two")

    def texts_of(name, split="train"):
        return [(at.removeprefix(f"{tmp_path}/"), row["text"]) for at, row in files.read(str(name), "sft", split, None)]

    shards = [f"one/data-0000{i}-of-00002.arrow" for i in range(2)]
    places = [f"{shards[0]}:{i}" for i in (1, 2, 3)] + [f"{shards[1]}:{i}" for i in (1, 2)]
    assert texts_of(tmp_path / "one") == list(zip(places, [f"row {i}" for i in range(5)], strict=True))
    assert [text for _, text in texts_of(tmp_path / "two")] == ["row 1", "row 3"]
    assert len(texts_of(tmp_path / "two", "test")) == 5
    refused(tmp_path / "two", "no split 'validation', its splits are train, test", "validation")
    (tmp_path / shards[1]).unlink()
    refused(tmp_path / "one", r"data-00001-of-00002\.arrow of the saved set is missing")


def test_a_name_that_datasets_knows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    rows = datasets.Dataset.from_list([{"text": "a", "other": None}, {"text": "b", "other": 1}])

    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append(name)
        if name != "team/texts":
            raise RuntimeError("no such\nset")
        chosen = rows.select(range(2 if (config, split) == ("main", "test") else 1))
        return chosen.to_iterable_dataset() if streaming else chosen

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    files._named.cache_clear()
    assert list(files.read("team/texts", "text", "test", "main")) == [
        ("team/texts:1", {"text": "a"}),
        ("team/texts:2", {"text": "b", "other": 1}),
    ]
    first, second = (files.fingerprint("team/texts", split, "main") for split in ("test", "train"))
    assert json.loads(json.dumps(first)) == first != second
    assert files.size("team/texts", "test", "main") > 0 and len(calls) == 2
    streamed = stream_rows("team/texts", "text", split="test", config="main", bad_rows="skip")
    assert [row["text"] for row in streamed] == ["a", "b"]
    refused("team/none", "team/none: no such file, and datasets.load_dataset says: no such set$")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "data.parquet", "./name", "/no/where", "~/no/where"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", "not to be used")
    refused(name, rf"^{re.escape(name)}: no such file$")


def test_a_name_longer_than_a_path_can_be(tmp_path):
    fill(tmp_path, "a.jsonl")
    names = [f"{tmp_path}/a.jsonl"] * 200
    assert [one for one, _ in mixtures.named_sets(",".join(names))] == names
    assert sources.files_of(",".join(names), "train", None) is None


def test_a_part_of_a_split_is_of_named_sets_only(tmp_path):
    fill(tmp_path, "a.jsonl")
    refused(tmp_path / "a.jsonl", r"got the split 'train\[:10\]', wants a whole split", "train[:10]")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def iterdir(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    refused(tmp_path, rf"^{tmp_path}: cannot be read \(Permission denied\)$")
