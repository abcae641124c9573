"Gates and claims: what is missing never passes, what is better is never held against a variant, and the ledger is answered from files alone."
import importlib
import json, math, shutil
import pytest
from hypothesis import given, strategies as st
from bem.claims import Artefacts, Part, Measurement, _measures, answer, ledger, load_claims, part_verdict
from bem.core import ROOT, UserError
from bem.gates import PARITY, AcceptanceValidator, Gate, all_of, any_of, gate, parity_gates, promote

NAMES = ["confirmed", *PARITY.values(), "latency", "gain, size", "gain, interval", "gain, significance", "Pareto"]
RANK = {"FAIL": 0, "NOT_TESTED": 1, "PASS": 2}
statuses = st.sampled_from(sorted(RANK))
def made(status, name="g"): return Gate(name=name, status=status, value=1., limit=1., evidence="drawn")

@given(st.dictionaries(st.sampled_from(NAMES), statuses), st.sampled_from(NAMES))
def test_a_better_gate_never_hurts_and_a_missing_one_never_helps(drawn, name):
    gates = {n: made(s) for n, s in drawn.items()}; before = RANK[promote(gates)]
    assert RANK[promote({**gates, name: made("PASS")})] >= before >= RANK[promote({**gates, name: made("FAIL")})]
    without = {n: g for n, g in gates.items() if n != name}
    assert promote(without) == promote({**without, name: made("NOT_TESTED")})
    if name in NAMES[:6]: assert promote(without) != "PASS"

@given(st.lists(statuses), st.lists(statuses))
def test_the_logic_of_three_values(a, b):
    flip = {"PASS": "FAIL", "FAIL": "PASS", "NOT_TESTED": "NOT_TESTED"}
    assert all_of(*a) == flip[any_of(*(flip[s] for s in a))] and all_of(*a, *b) == all_of(*b, *a)
    assert (all_of(*a) == "PASS") == bool(a and set(a) == {"PASS"})

@given(st.one_of(st.none(), st.floats()), st.floats(-1e9, 1e9), st.sampled_from(["at most", "at least", "above"]))
def test_no_gate_passes_without_a_number(value, limit, kind):
    g = gate("g", value, limit, "drawn", kind)
    assert (g.status == "NOT_TESTED") == (value is None or not math.isfinite(value)) == (g.value is None)

@given(st.dictionaries(st.sampled_from(sorted(PARITY)), st.floats(0, 1e12)), st.dictionaries(st.sampled_from(sorted(PARITY)), st.floats(1, 1e12)))
def test_parity_has_one_side_and_needs_both_costs(ours, theirs):
    for k, name in PARITY.items():
        g = parity_gates(ours, theirs)[name]
        if k not in ours or k not in theirs: assert g.status == "NOT_TESTED"
        elif ours[k] <= theirs[k]: assert g.status == "PASS"
        elif ours[k] > 1.0501*theirs[k]: assert g.status == "FAIL"

def test_a_gate_cannot_lie(one_sentence):
    for status in ("PASS", "FAIL"):
        with one_sentence(UserError, "needs a value"): Gate(name="g", status=status, evidence="trust me")
    with one_sentence(UserError, "no cost is negative"): parity_gates({"memory_bytes": -1.}, {"memory_bytes": 1.})
    assert AcceptanceValidator().validate().status == "NOT_TESTED"

# -- the ledger

def test_every_claim_is_there_and_every_measure_exists():
    claims = load_claims()
    used = {p.by for c in claims for p in c.parts.values()} - {""}
    for by in used: getattr(importlib.import_module(by.rpartition(".")[0] or "bem.claims"), by.rpartition(".")[2])
    assert [c.id for c in claims] == list(range(1, len(claims) + 1)) and {by.rpartition(".")[2] for by in used} <= set(_measures)
    assert all(c.takes and c.claimed and c.source for c in claims)

@given(st.floats(-9, 9), st.floats(0, 3), st.floats(-9, 9), st.floats(0, 3), st.floats(0, 1))
def test_a_verdict_follows_the_interval(low, width, a, size, p):
    m = Measurement(value=low + width/2, ci=[low, low + width], p=p, evidence="drawn"); v = part_verdict(Part(accepts=[a, a + size]), m)
    if v == "supported": assert a <= low and low + width <= a + size and p <= .05
    if v == "refuted": assert low + width < a or low > a + size
    assert part_verdict(Part(accepts=[a, a + size]), m.model_copy(update=dict(exploratory=True))) == "inconclusive"

@pytest.mark.parametrize("profile", ["paper", "laptop", "nobody"])
def test_the_ledger_answers_the_same_twice(profile):
    rows = ledger(profile)
    assert json.dumps(rows, allow_nan=False) == json.dumps(ledger(profile), allow_nan=False)
    assert all(r["verdict"] == "not measured here" for r in rows if r["measured"] is None) and all(r["evidence"] and r["hardware"] for r in rows)

def test_numbers_come_from_the_files(tmp_path):
    "Change the file and the answer changes; take it away and there is none."
    shutil.copytree(ROOT/"reports"/"bench", tmp_path/"reports"/"bench"); path = tmp_path/"reports"/"bench"/"step.json"; bench = json.loads(path.read_text())
    for r in bench["rows"]: r.update(forward_ratio=3., forward_low=2.9, forward_high=3.1)
    path.write_text(json.dumps(bench)); claim = next(c for c in load_claims() if c.id == 30)
    assert answer(claim, Artefacts(root=tmp_path))["measured"] == 200 and answer(claim, Artefacts(root=tmp_path))["verdict"] == "refuted"
    path.unlink(); assert answer(claim, Artefacts(root=tmp_path))["verdict"] == "not measured here"

def test_a_file_that_is_cut_is_named(tmp_path, one_sentence):
    (tmp_path/"reports"/"paper").mkdir(parents=True); (tmp_path/"reports"/"paper"/"summary.json").write_text('{"comp')
    with one_sentence(UserError, "summary.json is not whole JSON"): ledger(root=tmp_path)

def test_a_proof_that_is_named_is_there():
    "Unless its notebook is still to be written."
    here = Artefacts(); parts = [p for c in load_claims() for p in c.parts.values() if p.by == "proved"]
    assert parts and [p.of for p in parts if here.cells(p.of.get("notebook", "")) and _measures["proved"](here, **p.of) is None] == []
