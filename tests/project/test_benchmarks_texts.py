"""`benchmarks.texts`: its texts are cut at lines, and its report names what misses an aim."""

from __future__ import annotations

from typing import Any

from benchmarks.texts.__main__ import grid, report
from benchmarks.texts.make import joined


def test_a_text_ends_with_a_line() -> None:
    assert joined(["one\n", "two\nthr", "ee\nfour\n"], 12) == "one\ntwo\n"
    assert joined(["one\n"], 100) == "one\n"


def test_the_grid_has_four_dropouts_two_widths_and_two_decays() -> None:
    options = grid(50_000)
    assert len(options) == len(set(options)) == 16
    assert "--dropout 0.3 --embed-dim 64 --weight-decay 1.0" in options


def stored(*losses: tuple[str, float]) -> dict[str, Any]:
    runs = {f"sea|{key}": {"loss": loss} for key, loss in losses}
    return {"texts": {"sea": {"characters": 9, "fivegram": 2.0, "xz": None}}, "runs": runs}


def missed(*losses: tuple[str, float]) -> list[str]:
    header, *lines = report(stored(*losses))
    return [line[header.index("missed") :] for line in lines]


def test_the_report_names_a_time_that_is_worse_than_half_of_it() -> None:
    assert missed(("1|0|", 1.0), ("2|0|", 1.009)) == ["", ""]
    assert missed(("1|0|", 1.0), ("2|0|", 1.011)) == ["", "worse than half the time"]


def test_the_report_takes_the_median_of_seeds() -> None:
    losses = [("1|0|", 1.0), ("2|0|", 5.0), ("2|1|", 1.0), ("2|2|", 0.9)]
    assert missed(*losses) == ["", ""]


def test_the_report_names_hand_set_options_that_are_better_by_more_than_3_percent() -> None:
    assert missed(("1|0|", 1.02), ("1|0|--dropout 0", 1.0)) == [""]
    found = missed(("1|0|", 1.04), ("1|0|--dropout 0", 1.0), ("1|0|--dropout 0.1", 1.2))
    assert found == ["grid: --dropout 0"]


def test_the_report_names_a_better_5_gram_model_from_one_minute_on() -> None:
    assert missed(("0.5|0|", 2.1), ("1|0|", 2.05)) == ["", "5-gram"]
