"From records to a summary: what does not fit together is refused, what diverged is named, what is computed again is the same."
import shutil, sys
import pytest
import bem.evidence as evidence
from bem.core import ROOT, UserError
from bem.record import Curve, Record, save_record
from bem.runs import RunSpec, resolve

VARIANTS, SEEDS = ("lora", "bem-self"), (0, 1)

@pytest.fixture
def runs(tmp_path, monkeypatch):
    "Four smoke runs whose records lie in a folder of their own."
    monkeypatch.setattr("bem.runs.REPORTS", tmp_path)
    made = [resolve(RunSpec(variant=v, seed=s)) for v in VARIANTS for s in SEEDS]
    for r in made: write(r)
    return made

def write(run, path=None, **changes):
    "The record of a run, as the template would write it, or changed."
    fields = dict(profile="smoke", variant=run.spec.variant, seed=run.spec.seed, key=run.key, code="c", data="d", lock="l",
                  status="ok", split="validation", config={}, lr=.01, lr_source="given", steps=3, items="i", base="b", scores={"json": [2., 3., 4.]},
                  curve=Curve(step=[3], bits_per_byte=[4.]), costs={"params_trainable": 9.}, seconds={"train": 1.}, environment={"device": "cpu"})
    return save_record(Record(**{**fields, **changes}), path or run.path)

def test_what_fits_is_gathered(runs):
    records, stale, diverged, absent = evidence.gather("smoke", runs)
    assert [(r.variant, r.seed) for r in records] == [(v, s) for v in VARIANTS for s in SEEDS] and stale == diverged == absent == []

def test_a_gap_is_named(runs, one_sentence):
    runs[1].path.unlink()
    with one_sentence(UserError, "no record of lora with seed 1", "make paper PROFILE=smoke"): evidence.gather("smoke", runs)

def test_an_older_record_is_used_and_named(runs):
    new = runs[1].path; write(runs[1], new.with_name("lora-s1-00000000.json"), key="0"*16); new.unlink()
    assert evidence.gather("smoke", runs)[1] == ["lora, seed 1"]

def test_twins_are_refused(runs, one_sentence):
    write(runs[1], runs[1].path.with_name("lora-s1-00000000.json"), key="0"*16)
    with one_sentence(UserError, "claim the same run, lora with seed 1"): evidence.gather("smoke", runs)

@pytest.mark.parametrize("lie", [dict(seed=0), dict(variant="spectral"), dict(profile="laptop"), dict(key="f"*16)])
def test_a_record_under_another_name_is_refused(runs, lie, one_sentence):
    write(runs[1], **lie)
    with one_sentence(UserError, runs[1].path.name, "not what its name says"): evidence.gather("smoke", runs)

@pytest.mark.parametrize("odd", ["items", "data", "base"])
def test_records_that_do_not_fit_are_refused(runs, odd, one_sentence):
    write(runs[1], **{odd: "x"})
    with one_sentence(UserError, f"disagree about their {odd}"): evidence.gather("smoke", runs)

def test_an_arm_that_diverged_is_left_out_and_named(runs):
    write(runs[3], status="diverged", scores={})
    records, _, diverged, _ = evidence.gather("smoke", runs)
    assert {r.variant for r in records} == {"lora"} and diverged == ["bem-self, seed 1, lr 0.01"]

def test_a_summary_computed_again_is_the_same(tree, command):
    "The committed summary comes out of the committed records, byte for byte, in a copy of the checkout."
    shutil.copytree(ROOT/"reports"/"paper", tree/"reports"/"paper"); shutil.copytree(ROOT/"reports"/"tune", tree/"reports"/"tune")
    made = tree/"reports"/"paper"/"summary.json"; made.unlink()
    done = command(sys.executable, "-m", "papermill", "nbs/paper/90_statistics.ipynb", "out.ipynb", "-k", "python3", "--engine", "ipc", "--no-progress-bar")
    assert done.returncode == 0, done.stderr
    assert made.read_bytes() == (ROOT/"reports"/"paper"/"summary.json").read_bytes()
    for f in (tree/"figures").glob("*"): assert f.read_bytes() == (ROOT/"figures"/f.name).read_bytes(), f.name

def test_an_arm_that_was_not_run_is_named_and_not_missed(runs):
    for r in runs[2:]: r.path.unlink()
    records, _, _, absent = evidence.gather("smoke", runs)
    assert {r.variant for r in records} == {"lora"} and absent == ["bem-self"]
