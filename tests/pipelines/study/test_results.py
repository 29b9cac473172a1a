"""Files of rows survive an interruption in the middle of a line."""

from study.plan import RunId
from study.results import append, by_run, read


def test_a_line_that_was_cut_is_dropped_and_overwritten(tmp_path):
    assert read(tmp_path / "none", "runs") == []
    rows = [{"arm": "a", "world": 0, "seed": seed} for seed in range(3)]
    for row in rows:
        append(tmp_path, "runs", row)
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole) - 1, whole.rfind(b"\n", 0, -1), -1):
        path.write_bytes(whole[:length])
        assert read(tmp_path, "runs") == rows[:2]
        append(tmp_path, "runs", rows[2])
        assert path.read_bytes() == whole


def test_of_several_rows_of_a_run_the_last_counts():
    rows = [{"arm": "a", "world": 0, "seed": 1, "x": x} for x in range(2)]
    assert by_run(rows) == {RunId(1, 0, "a"): rows[1]}
