"""Datasets by name and directory, without a network: what is cached or saved here can be read, the rest is said."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ingest_files import book, full_row, other_conversation, rows, run, single_row, write

from her_nemo.config.errors import UserError


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a dataset that lies in the cache as a download from the Hub would."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    source = tmp_path / "tales"
    source.mkdir()
    write(source / "train.jsonl", [single_row(n) for n in range(3)])
    datasets.disable_progress_bars()
    datasets.load_dataset(str(source), cache_dir=str(cache))
    shutil.copytree(cache / "tales", cache / "someone___tales")
    shutil.rmtree(source)
    return "someone/tales"


def test_a_cached_name(cached: str, tmp_path: Path) -> None:
    card = run(Path(cached), tmp_path / "out", dataset_split="train")
    assert card["format"] == "her_single_turn"
    assert [row["turn_index"] for row in rows(tmp_path / "out")] == [0, 1, 2]
    assert rows(tmp_path / "out")[0]["messages"] == single_row()["messages"]


def test_a_name_that_is_not_cached(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the dataset 'someone/unheard-of'.*HF_HUB_OFFLINE is set"):
        run(Path("someone/unheard-of"), tmp_path / "out")


def test_a_split_that_is_not_there(cached: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the dataset 'someone/tales'"):
        run(Path(cached), tmp_path / "out", dataset_split="nope")


def test_a_saved_dataset_with_nulls_for_absent_keys(tmp_path: Path) -> None:
    import datasets

    # Arrow gives every row every character's name as a key, null where the row has no such character.
    other = full_row(1)
    other["character_datasets"] = {"Edmund": other["character_datasets"]["Edmund"]}
    dataset = datasets.Dataset.from_list([full_row(0), other])
    assert dataset[1]["character_datasets"]["Gloucester"] is None
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "saved"))
    card = run(tmp_path / "saved", tmp_path / "out")
    assert card["format"] == "her_full"
    assert (card["ledger"]["samples"], card["ledger"]["unexplained"]) == (3, 0)


def test_parquet_and_arrow_files(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list([single_row(n) for n in range(3)])
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    run(tmp_path / "a.parquet", tmp_path / "one")
    dataset.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    shutil.copy(arrow, tmp_path / "b.arrow")
    run(tmp_path / "b.arrow", tmp_path / "two")
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert len(rows(tmp_path / "one")) == 3


def test_json_lines_called_json(tmp_path: Path) -> None:
    lines = write(tmp_path / "x.jsonl", [single_row(0), single_row(1)])
    run(lines.rename(tmp_path / "x.json"), tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 2


def test_the_data_room_imports_no_torch() -> None:
    program = (
        "import sys, her_nemo.data.ingest, her_nemo.stages.data_inspect\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_result_can_be_read_again(tmp_path: Path) -> None:
    run(write(tmp_path / "lear.json", book(other_conversation(1))), tmp_path / "one")
    card = run(tmp_path / "one" / "conversations.parquet", tmp_path / "two")
    assert card["format"] == "conversations"
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
