"""Whether two files of times differ: what is planted is found, and nothing else."""

import json

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks import compare, report

PLACES = [(shape, what) for shape in ("abaw", "clip", "light") for what in ("forward", "training step")]
PAIRS = 40  # of runs that differ by chance alone
MACHINE = {"device": "A CPU", "threads": 2, "python": "3", "torch": "2.13", "numpy": "2", "commit": "abc"}


def rows(seed, factors=None, drift=1.0, run_noise=0.005, samples=20, **machine):
    """A run: all times times ``drift``, those of an implementation or of a row times its factor, each row its noise."""
    generator = np.random.default_rng(seed)
    result = []
    for shape, what in PLACES:
        for implementation in ("eager", "compiled", "fused"):
            own = (factors or {}).get((shape, what, implementation), (factors or {}).get(implementation, 1))
            median = 50 * drift * own * np.exp(run_noise * generator.normal())
            times = median * np.exp(0.02 * generator.normal(size=samples))
            place = {"shape": shape, "batch": 12, "pass": what, "implementation": implementation, "dtype": "float32"}
            result.append({**place, **MACHINE, **machine, "samples_ms": times.round(3).tolist()})
    return result


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """A tenth of them, for there are many files here."""
    monkeypatch.setattr(compare, "RESAMPLES", compare.RESAMPLES // 10)


@pytest.fixture
def run(tmp_path, capsys):
    """``run(before, after, *options)``: exit status, and what was printed where."""

    def call(before, after, *options):
        for name, content in (("before.json", before), ("after.json", after)):
            (tmp_path / name).write_text(json.dumps(content))
        status = compare.main([str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options])
        return status, *capsys.readouterr()

    return call


def verdicts(out):
    found = json.loads(out)["changes"]
    return {(row["shape"], row["pass"], row["implementation"]): row["verdict"] for row in found}


def test_a_known_shift(run):
    slow, fast = ("clip", "forward", "fused"), ("abaw", "training step", "compiled")
    status, out, _ = run(rows(1), rows(2, {slow: 1.2, fast: 0.8}), "--json")
    found = verdicts(out)
    assert status == 1 and found.pop(slow) == "slower" and found.pop(fast) == "faster"
    assert {verdict for key, verdict in found.items() if key[-1] == "eager"} == {"control"}
    assert {verdict for key, verdict in found.items() if key[-1] != "eager"} == {"no difference shown"}
    row = next(row for row in json.loads(out)["changes"] if (row["shape"], row["pass"], row["implementation"]) == slow)
    assert row["interval"][0] < row["ratio"] < row["interval"][1] and row["relative_interval"][0] > 1.1
    assert row["relative"] == pytest.approx(1.2, abs=0.04) and row["p"] < 1e-4


def test_status(run):
    status, out, _ = run(rows(1), rows(2, {"fused": 0.7}))
    assert status == 0 and out.count("faster") == len(PLACES) + 1  # and once in the sentence that explains it
    status, out, _ = run(rows(1), rows(2, {"fused": 1.4}))
    assert status == 1 and "against eager" in out
    assert run(rows(1), rows(1))[0] == 0


def test_drift_is_not_a_difference(run):
    """A machine that takes 1.3 times as long hides nothing, and is taken for nothing."""
    status, out, _ = run(rows(1), rows(2, drift=1.3), "--json")
    assert status == 0 and {*verdicts(out).values()} == {"control", "no difference shown"}
    assert 1.25 < min(json.loads(out)["drift"]) < 1.3 < max(json.loads(out)["drift"]) < 1.35
    status, out, _ = run(rows(1), rows(2, {"fused": 1 / 1.3}, drift=1.3), "--json")
    assert status == 0 and verdicts(out)["clip", "forward", "fused"] == "faster"
    status, out, _ = run(rows(1), rows(2, {"fused": 1.3}, drift=1 / 1.3), "--json")
    assert status == 1 and verdicts(out)["clip", "forward", "fused"] == "slower"
    assert verdicts(out)["clip", "forward", "compiled"] == "no difference shown"


def test_another_control(run):
    out = run(rows(1), rows(2, {"eager": 1.3}), "--control", "compiled", "--json")[1]
    found = verdicts(out)
    assert found["abaw", "forward", "eager"] == "slower" and found["abaw", "forward", "compiled"] == "control"


def test_noise_is_not_a_difference():
    """Chance within a run, and in every other pair what strikes a row as a whole: in 95 % not one row is called."""
    quiet = 0
    for pair in range(PAIRS):
        runs = (rows(2 * pair + i, run_noise=0.02 * (pair % 2)) for i in (0, 1))
        before, after = ({key(row): row for row in run} for run in runs)
        changes = compare.compare(before, after).changes
        quiet += {change.verdict for change in changes} == {"control", "no difference shown"}
    assert quiet >= 0.95 * PAIRS


def key(row):
    return tuple(row[name] for name in compare.KEY)


def test_significant_and_yet_less_than_noise_between_runs(run):
    """Each row moves by 5 % of its own from run to run: with 50 samples a p value alone would call half of them."""
    status, out, _ = run(rows(3, run_noise=0.05, samples=50), rows(4, run_noise=0.05, samples=50), "--json")
    found = json.loads(out)
    assert status == 0 and sum((row["p"] or 1) < 0.05 for row in found["changes"]) >= 4
    assert found["noise"] > 0.1


def test_one_row_of_the_control_shows_no_noise(run):
    def one_place(rows):
        return [row for row in rows if (row["shape"], row["pass"]) == PLACES[0]]

    out = run(one_place(rows(1)), one_place(rows(2, {"fused": 1.15})), "--json")[1]
    assert verdicts(out)["abaw", "forward", "fused"] == "no difference shown"
    assert "20 % is assumed" in json.loads(out)["warnings"][0]
    assert run(one_place(rows(1)), one_place(rows(2, {"fused": 1.4})))[0] == 1


def test_two_controls_that_disagree(run):
    """As measured once on a machine with other work: eager by 1.37 and by 0.65, fused by 1.03 and 1.05."""
    moved = {(*PLACES[0], "eager"): 1.37, (*PLACES[2], "eager"): 0.65, "fused": 1.05}
    both = [
        [row for row in found if row["pass"] == "forward" and row["shape"] != "light"]
        for found in (rows(1), rows(2, moved))
    ]
    status, out, _ = run(*both, "--json")
    assert status == 0 and json.loads(out)["noise"] > 1 and "slower" not in verdicts(out).values()


def test_what_differs_besides_the_code(run):
    out = run(rows(1), rows(2, torch="2.12", threads=4, commit="def"))[1]
    assert "Warning: The files differ in threads: 2 before, 4 after." in out
    assert "Warning: The files differ in torch: 2.13 before, 2.12 after." in out
    assert out.count("Warning") == 2
    assert "Warning" not in run(rows(1), rows(2, commit="def"))[1]


def test_rows_that_only_one_file_has(run):
    before, after = rows(1), rows(2, {"fused": 1.4})
    gone = [row for row in after if (row["shape"], row["implementation"]) != ("clip", "eager")]
    status, out, _ = run(before, gone)
    assert status == 1 and "Only in BEFORE: clip, B = 12, forward, float32, eager; clip" in out
    assert "the typical drift is taken out: clip, B = 12, forward, float32, compiled" in out
    assert "Only in AFTER" in run(gone, before)[1]


def test_too_few_samples(run):
    out = run(rows(1, samples=4), rows(2, {"fused": 1.4}, samples=4))[1]
    assert "Too few samples to show any difference among 12 rows: abaw" in out


def test_what_is_refused(run, tmp_path):
    old = [{name: value for name, value in row.items() if name != "samples_ms"} for row in rows(1)]
    status, out, error = run([*rows(1)[:3], *old[3:]], rows(2))
    assert status == 2 and not out
    assert "15 of 18 have none, such as abaw, B = 12, training step, float32, eager" in error
    assert "measure again with python -m benchmarks.report" in error
    assert "got none" in run(rows(1), [])[2] and "no rows at all" in run(rows(1), [])[2]
    status, _, error = run(rows(1), rows(2), "--control", "nothing")
    assert status == 2 and "In both are compiled, eager, fused" in error
    assert run({"no": "benchmarks"}, rows(1))[0] == 2 and run([1], rows(1))[0] == 2
    assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2


def measured(seconds):
    """A file of pytest-benchmark."""
    names = ("shape", "batch", "pass", "implementation", "dtype", *MACHINE)
    cases = [
        {"stats": {"data": [t / 1e3 for t in row["samples_ms"]][:seconds]}, "extra_info": {n: row[n] for n in names}}
        for row in rows(1, samples=80)
    ]
    return {"benchmarks": cases}


def test_samples_are_kept(run, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured(80)))
    found = report.rows(path)
    whole = rows(1, samples=80)[0]["samples_ms"]
    assert len(found[0]["samples_ms"]) == 50 and found[0]["rounds"] == 80
    assert found[0]["samples_ms"][0] == pytest.approx(whole[0], rel=1e-3)
    assert found[0]["samples_ms"][-1] == pytest.approx(whole[-1], rel=1e-3)
    assert all(float(f"{t:.4g}") == t for row in found for t in row["samples_ms"])
    stored = report.store(found, tmp_path / "results")
    assert json.loads(stored.read_text()) == found and [*stored.parent.iterdir()] == [stored]
    assert run(measured(30), json.loads(stored.read_text()))[0] == 0
