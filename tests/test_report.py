"""What is written and printed of an evaluation whose inductive figure was not taken after each step."""

import csv
import json
from pathlib import Path

from distmaml import report
from distmaml.recipes.sinusoid import sinusoid_maml_5s
from distmaml.scoring import Evaluated, Interval

SCORES = {
    "transductive": {"query_accuracy": {k: Interval(0.2 + 0.1 * k, 0.01) for k in range(5)}},
    "inductive": {"query_accuracy": {0: Interval(0.2, 0.02), 1: Interval(0.25, 0.02), 4: Interval(0.5, 0.03)}},
}


def test_metrics_are_of_the_steps_that_were_scored_and_of_the_last_one() -> None:
    found = report.metrics_of(SCORES)
    steps = {f"test_inductive/query_accuracy_step_{k}": mean for k, mean in ((0, 0.2), (1, 0.25), (4, 0.5))}
    last = {"test_inductive/query_accuracy": 0.5, "test_inductive/query_accuracy_interval": 0.03}
    assert {name: value for name, value in found.items() if "inductive" in name} == steps | last
    assert found["test/query_accuracy"] == found["test/query_accuracy_step_4"] == 0.2 + 0.1 * 4
    assert found["test/query_accuracy_interval"] == 0.01


def test_the_table_has_a_dash_where_there_is_no_figure() -> None:
    lines = [line.split("  ") for line in report.table(SCORES).splitlines()]
    assert [line[-1].strip() for line in lines[1:]] == [
        "20.00 +- 2.00 %", "25.00 +- 2.00 %", "-", "-", "50.00 +- 3.00 %"
    ]  # fmt: skip


def test_the_files_have_null_and_no_line_where_there_is_no_figure(tmp_path: Path) -> None:
    json_file, csv_file = report.write_evaluation(sinusoid_maml_5s(), tmp_path, Evaluated(7, SCORES, {"gpu": "a GPU"}))
    assert json.loads(json_file.read_text())["machine"] == {"gpu": "a GPU"}
    scores = json.loads(json_file.read_text())["scores"]
    assert [entry and entry["mean"] for entry in scores["inductive"]["query_accuracy"]] == [0.2, 0.25, None, None, 0.5]
    assert len(scores["transductive"]["query_accuracy"]) == 5
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert [row["inner_step"] for row in rows if row["batch_norm"] == "inductive"] == ["0", "1", "4"]
