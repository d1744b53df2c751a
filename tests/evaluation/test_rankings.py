"""Tables by time, their figures, and what judges agree on, against numbers that were worked out by hand."""

import json
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from sddit_diffusers.evaluation.figures import draw
from sddit_diffusers.evaluation.findings import Findings, Found
from sddit_diffusers.evaluation.studies import Study, Table
from sddit_diffusers.evaluation.tables import (
    Results,
    agreements,
    as_json,
    first_below,
    markdown,
    rows_of,
    seconds_to,
)

RUNS = {"DiT": {"method": "dit"}, "fast": {}, "slow": {}, "bad": {}}
PAPER = dict.fromkeys(RUNS)
PAIRS = {"at all": ["fast", "DiT"], "now": ["slow", "fast"]}
TABLES = [
    Table("Ranking", "ranking", PAPER, reference="DiT"),
    Table("Time", "time", PAPER, reference="DiT"),
    Table("Judges", "judges", PAPER, columns=["fid_a", "fid_b", "fid_c"]),
    Table("Gains", "gains", {"at all": 0.5, "now": None}, pairs=PAIRS),
]
# The scores at steps 100, 200 and 400 of seeds 0 and 1.
CURVES = {
    "DiT": ([8, 4, 2], [8, 4, 1]),
    "fast": ([4, 2, 1], [4, 1, 0.5]),
    "slow": ([8, 4, 1], [8, 4, 0.25]),
    "bad": ([9, 8, 7], [9, 8, 0.5]),
}
SPEEDS = {"DiT": 2.0, "fast": 1.0, "slow": 0.5, "bad": 4.0}
# The other judges turn the runs around, or see one of them otherwise.
OTHERS = {"fid_b": dict(DiT=3, fast=4, slow=3.5, bad=1), "fid_c": dict(DiT=2, fast=1, slow=4, bad=3)}


def study_of(tables=TABLES, **changes):
    return Study(
        "Title", "About.", {}, [0, 1], "fid_a", RUNS | changes, tables, summary=["So."], notes=["A note."]
    )


def findings_of(**changes):
    study = study_of(**changes)
    settings = {run: {"rate": 1} | study.settings_of(run) for run in study.runs}
    return Findings(study, settings, {run: {"later": False} for run in study.runs})


@pytest.fixture
def findings():
    findings = findings_of()
    for run, curves in CURVES.items():
        for seed, curve in enumerate(curves):
            rows = [
                {"step": step, "fid_a": float(score)}
                for step, score in zip((100, 200, 400), curve, strict=True)
            ]
            rows[-1] |= {name: float(of[run]) for name, of in OTHERS.items()}
            findings.trainings[run, seed] = Found(rows)
    findings.speeds = SPEEDS
    return findings


@pytest.fixture
def results(findings):
    results = Results()
    findings.tell(results)
    return results


def test_a_score_between_two_is_where_its_logarithm_is():
    assert first_below([100, 200, 400], [8, 4, 1], 2) == 300
    assert first_below([100, 200, 400], [8, 4, 1], 4) == 200
    assert first_below([100, 200], [8, 4], 6) == pytest.approx(100 + 100 * math.log(8 / 6) / math.log(2))
    assert first_below([100, 200], [8, 4], 9) == 100  # at once: it is not known since when
    assert first_below([100, 200], [8, 4], 3) is None
    assert first_below([100, 200, 300], [4, 8, 1], 4) == 100  # the first time, whatever comes
    assert first_below([100, 200], [0.1, -0.1], 0) == 200  # which have no logarithm
    assert first_below([100, 200], [-0.1, -0.3], -0.2) == 100


def test_each_seed_is_held_against_the_reference_s(results):
    """DiT ends at 2 and at 1 after 200 s; "fast" has these after 200 s, "slow" after 600."""
    assert seconds_to("DiT", "DiT", results) == {0: 200, 1: 200}
    assert seconds_to("fast", "DiT", results) == {0: 200, 1: 200}
    assert seconds_to("slow", "DiT", results) == pytest.approx({0: 600, 1: 600})
    assert seconds_to("bad", "DiT", results)[0] is None
    late = (200 + 200 * math.log(8) / math.log(16)) / 4
    assert seconds_to("bad", "DiT", results)[1] == pytest.approx(late)


def test_a_reference_that_gets_worse_again_is_there_when_it_first_was(findings):
    """A twin of it takes all of its time, and not half."""
    for run in ("DiT", "fast"):
        for seed in (0, 1):
            for row, score in zip(findings.trainings[run, seed].metrics, (8.0, 2.0, 4.0), strict=True):
                row["fid_a"] = score
    findings.speeds = SPEEDS | {"fast": SPEEDS["DiT"]}
    results = Results()
    findings.tell(results)
    rows = {row[0]: row[1:] for row in rows_of(TABLES[0], study_of(), results)[1]}
    there = (100 + 100 * math.log(2) / math.log(4)) / 2
    assert rows["fast"][5] == pytest.approx([there, there]) and rows["fast"][6] == [1, 1]
    assert rows["DiT"][4:] == rows["fast"][4:]


def test_a_ranking_is_in_the_order_of_time(results):
    study = study_of()
    head, rows = rows_of(study.tables[0], study, results)
    assert head[2:5] == ["s a step", "s in all", "fid_a"]
    assert head[5:] == ["× DiT's", "s to DiT's", "× DiT's time"]
    assert [row[0] for row in rows] == ["fast", "DiT", "slow", "bad"]  # of two equal ones the better
    assert rows[1] == ["DiT", None, [0.5], [200], [2, 1], [1, 1], [200, 200], [1, 1]]
    assert rows[0][5] == [0.5, 0.5] and rows[2][5] == [0.5, 0.25]
    assert rows[3][6][0] is None and rows[3][7][0] is None
    assert [row[0] for row in rows_of(study.tables[1], study, results)[1]] == list(RUNS)
    text = markdown(study, results, "figures")
    assert "| DiT | – | 0.5 | 200 | 1.5 ± 0.71 | 1 ± 0 | 200 ± 0 | 1 ± 0 |" in text
    assert "| bad | – | 0.25 | 100 | 3.75 ± 4.6 | 2 ± 2.1 | 87.5 (1 of 2) | 0.4375 (1 of 2) |" in text
    assert text.startswith("# Title\n\nAbout.\n\nSo.\n\n## Ranking\n\n| run |")
    assert "](my%20figures/ranking.png)" in markdown(study, results, "my figures")
    assert "| a b |" in markdown(study_of([Table("T", "steps", {"a\nb": None})], **{"a\nb": {}}), results)
    assert "](figures/ranking.png)" in text and text.endswith("A note.\n")


def test_gains_are_ratios_of_the_same_seed(results, findings):
    """At 100 steps "fast" has half of DiT's score with both seeds, at 200 a half and a quarter."""
    study = study_of()
    head, rows = rows_of(study.tables[3], study, results)
    assert head == ["pair", "paper", "fid_a, with", "without", "×", "× at 100", "× at 200"]
    assert rows[0] == ["at all", 0.5, [1, 0.5], [2, 1], [0.5, 0.5], [0.5, 0.5], [0.5, 0.25]]
    assert rows[1][4:] == [[1, 0.5], [2, 2], [2, 4]]
    del findings.trainings["fast", 0]
    findings.trainings["DiT", 1].metrics[0]["fid_a"] = 0.0
    findings.tell(results := Results())
    assert rows_of(study.tables[3], study, results)[1][0][2:] == [[0.5], [1], [0.5], [None], [0.25]]
    assert "| at all (1 of 2 seeds) | 0.5 | 0.5 | 1 | 0.5 | – |" in markdown(study, results)


def test_gains_are_told_by_other_metrics_too(results):
    """By "fid_b" the worse of a pair is the better one."""
    gains = Table("Gains", "gains", {"at all": 0.5, "now": None}, pairs=PAIRS, columns=["fid_b", "fid_c"])
    head, rows = rows_of(gains, study_of([gains]), results)
    assert head[4:] == ["×", "× fid_b", "× fid_c", "× at 100", "× at 200"]
    assert rows[0][4:7] == [[0.5, 0.5], [4 / 3, 4 / 3], [0.5, 0.5]] and rows[1][5:7] == [[0.875] * 2, [4, 4]]


def test_gains_of_a_distillation_are_those_of_the_ends(results):
    study = study_of(fast={"of": "DiT"})
    rows = rows_of(study.tables[3], study, results)[1]
    assert rows[0][4:] == [[0.5, 0.5], [], []] and rows[1][4:] == [[1, 0.5], [], []]


def test_seeds_are_those_that_both_of_a_pair_have(findings):
    del findings.trainings["fast", 0], findings.trainings["DiT", 1]
    findings.tell(results := Results())
    study = study_of()
    text = markdown(study, results)
    assert "| at all | 0.5 | – | – | – | – | – |" in text
    assert "| now (1 of 2 seeds) | – | 0.25 | 0.5 | 0.5 |" in text
    slow = next(row for row in rows_of(study.tables[0], study, results)[1] if row[0] == "slow")
    assert slow[5] == [0.5, None] and slow[7] == pytest.approx([3])


def test_what_is_there_at_once_has_no_share_of_no_time(findings):
    """A distillation is scored before its first step."""
    for run in ("DiT", "fast"):
        findings.trainings[run, 0].metrics[0] |= {"step": 0, "fid_a": 1.0}
    findings.tell(results := Results())
    rows = {row[0]: row[1:] for row in rows_of(TABLES[0], study_of(), results)[1]}
    assert rows["fast"][5][0] == rows["DiT"][5][0] == 0 and rows["fast"][6][0] is rows["DiT"][6][0] is None


def test_judges_agree_by_ranks(results):
    """By the means of fid_a: fast 0.75, slow 0.625, bad 3.75, DiT 1.5; of d² the sum is 18, and 12."""
    table, n = TABLES[2], 4
    by_hand = {"fid_b": 1 - 6 * 18 / (n * (n * n - 1)), "fid_c": 1 - 6 * 12 / (n * (n * n - 1))}
    assert agreements(table, results) == pytest.approx(by_hand)
    assert as_json(study_of(), results)["tables"][2]["agreements"] == pytest.approx(by_hand)
    told = "of fid_a, from the best run to the worst: -0.80 with fid_b, -0.20 with fid_c."
    assert told in markdown(study_of(), results)
    assert agreements(table, Results()) == {"fid_b": None, "fid_c": None}
    for run in RUNS:
        for seed in (0, 1):
            results.add(run, seed, ("metric", "fid_c"), 0.0)
    assert agreements(table, results)["fid_c"] is None  # of equal values there is no order


def test_judges_of_which_more_is_better_agree_too():
    results, columns = Results(), ["fid_resnet", "recall_resnet", "precision_pixels"]
    for run, fid, recall in zip(RUNS, (1.0, 2.0, 3.0, 4.0), (0.9, 0.7, 0.5, 0.3), strict=True):
        for column, value in zip(columns, (fid, recall, -recall), strict=True):
            results.add(run, 0, ("metric", column), value)
    table = Table("Judges", "judges", PAPER, columns=columns)
    assert agreements(table, results) == pytest.approx({"recall_resnet": 1, "precision_pixels": -1})


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.kind)
@pytest.mark.figures
def test_figures_of_what_there_is(results, table, tmp_path):
    """Bars, lines and points have colours; titles and axes have none."""
    drawn = []
    for found in (results, Results()):
        draw(table, study_of(), found, tmp_path)
        with Image.open(tmp_path / f"{table.name}.png") as picture:
            drawn.append((np.ptp(np.asarray(picture.convert("RGB")), axis=2) > 60).sum())
    assert drawn[0] > 0 == drawn[1]


@pytest.mark.parametrize("kind", ["ranking", "metrics", "speed"])
@pytest.mark.figures
def test_figures_of_equal_seeds(kind, tmp_path):
    """Whose mean may be rounded to a number that is none of theirs."""
    study, results = study_of([], _run={}), Results()
    study.seeds, names = [0, 1, 2], {"DiT": 0.1, "_run": 0.7}
    for run, value in names.items():
        for seed in study.seeds:
            for what in (("last",), ("score", 100), ("metric", "kl")):
                results.add(run, seed, what, value)
        results.add(run, 0, ("speed",), value)
    table = Table("T", kind, dict.fromkeys(names), reference="DiT", columns=["kl"])
    draw(table, study, results, tmp_path)
    assert (tmp_path / "t.png").is_file()


def test_the_ranking_tells_how_many_seeds_a_bar_has(tmp_path, monkeypatch):
    study, results, told = study_of([]), Results(), []
    for run, seed in (("DiT", 0), ("DiT", 1), ("SD-DiT", 0)):
        results.add(run, seed, ("last",), 1.0)
    set_yticks = Axes.set_yticks
    monkeypatch.setattr(
        Axes,
        "set_yticks",
        lambda axis, *given, **options: told.append(given) or set_yticks(axis, *given, **options),
    )
    draw(Table("T", "ranking", {"DiT": None, "SD-DiT": None}, reference="DiT"), study, results, tmp_path)
    assert ["DiT", "SD-DiT (1 of 2 seeds)"] in [[*names] for _, *rest in told for names in rest]


def test_legends_tell_of_all_that_is_drawn(tmp_path, monkeypatch):
    """Whatever it is called, and whatever the first run lacks."""
    study, results, told = study_of([], _run={}), Results(), []
    for value, name in enumerate(("kl", "entropy"), 1):
        results.add("_run", 0, ("metric", name), value)
    results.add("_run", 0, ("score", 1), 1.0)
    legend = Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axis, **given: told.append(legend(axis, **given)))
    paper = {"DiT": None, "_run": None}
    draw(Table("T", "metrics", paper, columns=["kl", "entropy"]), study, results, tmp_path)
    draw(Table("T", "steps", paper), study, results, tmp_path)
    names = [[text.get_text().strip("\u200b") for text in legend.get_texts()] for legend in told]
    assert names == [["kl", "entropy"], ["_run"]]


def test_what_was_not_run_is_last_and_a_seed_that_is_missing_counts_not(findings):
    del findings.trainings["fast", 0], findings.trainings["fast", 1], findings.trainings["bad", 1]
    results = Results()
    findings.tell(results)
    rows = rows_of(TABLES[0], study_of(), results)[1]
    assert [row[0] for row in rows] == ["DiT", "slow", "bad", "fast"]
    assert rows[2][6] == [None] and rows[3][6] == [] == rows[3][5] == rows[3][4]
    told = [line.split(" |")[0] for line in markdown(study_of(), results).split("\n")]
    assert {"| DiT", "| slow", "| bad (1 of 2 seeds)", "| fast"} <= {*told}


def test_time_is_measured_to_a_distance_alone():
    with pytest.raises(ValueError, match="Ranking: of recall_pixels more is better"):
        Study("T", "A", {}, [0], "recall_pixels", RUNS, TABLES[:1])


def test_what_was_measured_earlier_stays(findings, tmp_path):
    """Where the same training comes again without it; images of samplings that are not asked for do not."""
    path, probe = tmp_path / "results.json", [{"probe": "k-NN", "features": "f", "sigma": 1.0, "accuracy": 1}]
    findings.trainings["fast", 0].probe = probe
    findings.images = [{"run": "fast", "of": {"s_churn": 1.0}, "a_second": 2.0}]
    path.write_text(json.dumps({"found": findings.as_json()}))
    again = findings_of()
    again.read(path)
    again.add("fast", 0, Found([{"step": 1, "fid_a": 3.0}]))
    assert again.trainings["fast", 0] == Found([{"step": 1, "fid_a": 3.0}], probe) and again.images == []


def test_findings_come_back_from_their_file(findings, tmp_path):
    path = tmp_path / "results.json"
    findings.trainings["fast", 0].metrics.insert(0, {"step": 0, "fid_a": 9.0})  # as of a distillation
    path.write_text(json.dumps({"title": "T", "found": findings.as_json()}))
    for again in (findings_of(), findings_of(other={})):
        again.read(path)
        assert again.trainings == findings.trainings and again.speeds == SPEEDS
    with pytest.raises(ValueError, match="rate of fast was 1, and is 2 in the study"):
        findings_of(fast={"rate": 2}).read(path)
    with pytest.raises(ValueError, match="of of fast was None, and is 'DiT' in the study"):
        findings_of(fast={"of": "DiT"}).read(path)
    with pytest.raises(ValueError, match="later of fast was False, and is True in the study"):
        findings_of(fast={"later": True}).read(path)  # what the file's version did not know
    for damage in ({"metrics": []}, {"metrics": [{"step": 1, "fid_b": 1.0}]}):
        found = findings.as_json()
        found["runs"]["fast"]["seeds"]["1"] = vars(Found([])) | damage
        path.write_text(json.dumps({"found": found}))
        with pytest.raises(ValueError, match="results.json: fast has no 'fid_a', which is the study's"):
            findings_of().read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no results of a study"):
        again.read(path)


def test_a_sampling_that_is_asked_for_otherwise_is_not_known(findings, tmp_path):
    tables = [Table("S", "sampling", {"N": None}, run="fast", samplings={"N": {"num_inference_steps": 4}})]
    study, path = study_of(tables), tmp_path / "results.json"
    for steps, known in ((4, ["N"]), (5, [])):
        findings.trainings["fast", 0].samplings = {"N": {"of": {"num_inference_steps": steps}, "score": 2.0}}
        path.write_text(json.dumps({"found": findings.as_json()}))
        again = Findings(study, findings.settings, findings.usual)
        again.read(path)
        assert list(again.trainings["fast", 0].samplings) == known


def test_speeds_that_were_measured_apart_are_not_mixed(findings, tmp_path):
    path = tmp_path / "results.json"
    speeds = {"fast": 9.0, "new": 1.0}
    path.write_text(json.dumps({"found": {"runs": {}, "speeds": speeds, "images": []}}))
    findings.read(path)
    assert findings.speeds == SPEEDS
    findings.take_speeds({"DiT": 3.0, "fast": 9.0, "of no table": 2.0}, is_whole=True)
    assert findings.speeds == {"DiT": 3.0, "fast": 9.0}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("time", {}, "a table of kind time needs reference"),
        ("ranking", {"reference": "MDT"}, "its reference is 'MDT', which is none of its runs"),
        ("judges", {"columns": ["fid"]}, "needs two or more"),
        ("gains", {}, "a table of kind gains needs pairs"),
        ("gains", {"pairs": {"one": ["DiT"]}}, "the pair 'one' has 1 runs; it is of two"),
        ("gains", {"pairs": {"one": ["DiT", "fast"]}}, "paper must have the names of the pairs"),
    ],
)
def test_wrong_tables_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        Table("T", kind, PAPER, **changes)
