"""What is kept of an evaluation that was killed."""

from pathlib import Path

from experiments.evaluation.journal import Journal

PROTOCOL = {"weights": "abc", "prefix": "eot"}


def test_answers_come_back_exactly(tmp_path: Path) -> None:
    answers = {
        "a": [-1.2345678901234567e-300, True],
        "b": "text\nwith é",
        "c": [float("nan"), False],
    }
    with Journal(tmp_path / "eval", "task", PROTOCOL) as journal:
        journal.add({"a": answers["a"]})
        journal.add({"b": answers["b"], "c": answers["c"]})
    again = Journal(tmp_path / "eval", "task", PROTOCOL).answers
    assert again["a"] == answers["a"]
    assert again["b"] == answers["b"]
    assert again["c"][0] != again["c"][0]


def test_a_line_cut_short_costs_only_itself(tmp_path: Path) -> None:
    with Journal(tmp_path, "task", PROTOCOL) as journal:
        journal.add({"a": [1.0, True], "b": [2.0, False]})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with Journal(tmp_path, "task", PROTOCOL) as journal:
        assert journal.answers == {"a": [1.0, True]}
        journal.add({"c": [3.0, True]})
    assert Journal(tmp_path, "task", PROTOCOL).answers == {"a": [1.0, True], "c": [3.0, True]}


def test_other_processes_count_and_other_protocols_do_not(tmp_path: Path) -> None:
    with Journal(tmp_path, "task", PROTOCOL, rank=1) as journal:
        journal.add({"a": [1.0, True]})
    with Journal(tmp_path, "task", PROTOCOL | {"weights": "def"}) as journal:
        journal.add({"b": [1.0, True]})
    with Journal(tmp_path, "other", PROTOCOL) as journal:
        journal.add({"c": [1.0, True]})
    first = Journal(tmp_path, "task", PROTOCOL)
    assert set(first.answers) == {"a"}
    first.discard()
    assert [file.name.split(".")[0] for file in tmp_path.iterdir()] == ["other"]
