"Bad input costs one sentence, a nonzero exit where there is a command, and nothing else: nothing lost, nothing half written."
import json, os, resource, shutil, signal, subprocess, sys, time, zipfile
import numpy as np
import pytest
import bem.comparison, bem.data
from bem.adapters.base import attach, get_variant, load
from bem.comparison import compare, judge_family, register_test
from bem.core import ROOT, UserError, atomic_write, read_yaml
from bem.data import Sampler, load_corpus, write_manifest
from bem.host import HostConfig, small_gpt
from bem.record import Curve, Record, _digest, load_record, load_records, save_record
from bem.runs import RunSpec, TEMPLATE, load_profile, profile_from, refuse_unknown, resolve
from bem.stats import StatisticalValidationError, bca_interval, benjamini_hochberg_correction, sign_flip, two_level_bootstrap


# -- words

@pytest.mark.parametrize("words, says", [
    (dict(sede=3), "no key 'sede'"), (dict(variant="lroa"), "no variant 'lroa'"), (dict(profile="lptop"), "no profile 'lptop'"),
    (dict(seed="abc"), "RunSpec.seed = 'abc'"), (dict(seed=-1), "RunSpec.seed = -1"), (dict(seed=1.5), "seed = 1.5"), (dict(seed=True), "seed = True"),
    (dict(lr="fast"), "lr = 'fast'"), (dict(lr=2.), "lr = 2.0"), (dict(lr=float("nan")), "lr = nan"), (dict(steps=-3), "steps = -3"),
    (dict(options=3), "RunSpec.options = 3"), (dict(options={"rnak": 3}), "no key 'rnak'"), (dict(options={"alpha": "8"}), "alpha = '8'"),
    (dict(options={"rank": 8}), "fitted to the budget"), (dict(profile="paper", seed=1000, lr=.1), "cannot be chosen"),
    (dict(options={"sites": []}), "sites = []"), (dict(variant="bem-self", options={"chunk": 8}), "has no effect without codes per chunk"),
    (dict(profile="paper", seed=5), "The test split is sealed"), (dict(profile="smoke", seed=1000), "Seed 1000 is sealed")])
def test_a_run_that_makes_no_sense(words, says, one_sentence):
    with one_sentence(UserError, says): resolve(RunSpec(**words))

@pytest.mark.parametrize("change, says", [
    (dict(sede=1), "no key 'sede'"), (dict(host={"d_model": 30, "n_head": 4}), "must divide d_model = 30"), (dict(host={"depth": 3}), "no key 'depth'"),
    (dict(split="tset"), "split = 'tset'"), (dict(seeds=[]), "seeds = []"), (dict(adapt={"steps": 0}), "steps = 0")])
def test_a_profile_that_makes_no_sense(change, says, one_sentence):
    with one_sentence(UserError, says): profile_from({**load_profile("smoke").model_dump(), **change})

@pytest.mark.parametrize("text, says", [("- 1", "holds a list"), ("", "holds a NoneType"), ("a: [1", "not valid YAML")])
def test_a_parameter_file_that_is_none(text, says, tmp_path, one_sentence):
    (tmp_path/"a.yml").write_text(text)
    with one_sentence(UserError, says): read_yaml(tmp_path/"a.yml")
    with one_sentence(UserError, "no file b.yml"): read_yaml(tmp_path/"b.yml")

def test_a_name_that_no_template_has(one_sentence):
    refuse_unknown(dict(variant="lora", seed=1, _hidden=0))
    with one_sentence(UserError, "no parameter 'sede'", "seed"): refuse_unknown(dict(variant="lora", sede=1))

WRONG = {"sede 3": "no parameter 'sede'", "corpus dir:x": "no parameter 'corpus'",
         "variant lroa": "no variant 'lroa'", "seed abc": "RunSpec.seed = 'abc'", "profile lptop": "no profile 'lptop'"}

@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    "Four wrong command lines, started together to save time: what they said, and where they would have written."
    folder = tmp_path_factory.mktemp("papermill"); env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    base = [sys.executable, "-m", "papermill", str(TEMPLATE), "-k", "python3", "--engine", "ipc", "--no-progress-bar"]
    start = lambda i, p: subprocess.Popen([*base, f"{i}.ipynb", "-p", *p.split(), "-p", "out", str(folder/f"{i}.json")],
                                          cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    runs = {p: start(i, p) for i, p in enumerate(WRONG)}
    return folder, {p: (r.communicate()[0], r.returncode) for p, r in runs.items()}

@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line(words, refused):
    folder, said = refused; text, code = said[words]
    assert code != 0 and WRONG[words] in text and "UserError" in text
    assert list(folder.glob("*.json")) == []

def test_a_batch_of_a_profile_that_is_not_there(command):
    done = command(sys.executable, "-m", "snakemake", "--cores", "1", "-n", "--config", "profile=lptop")
    assert done.returncode != 0 and "There is no profile 'lptop'; the profiles are" in done.stdout + done.stderr

# -- text

@pytest.mark.parametrize("name, says", [
    ("wikipedia", "no corpus 'wikipedia'"), ("dir:", "no corpus 'dir:'"), ("dir:nowhere", "no folder"), ("dir:empty", "no document"),
    ("dir:short", "no document")])
def test_a_corpus_that_is_not_there(name, says, tmp_path, monkeypatch, one_sentence):
    monkeypatch.chdir(tmp_path); (tmp_path/"empty").mkdir(); atomic_write(tmp_path/"short"/"a"/"x.txt", "brief")
    with one_sentence(UserError, says): load_corpus(name)

@pytest.fixture
def own_corpus(tmp_path, monkeypatch):
    "A default corpus of one document, in a cache of its own; returns its archive and its manifest."
    import hashlib
    cache, text = tmp_path/"cache", b"#pragma once\n"*60
    pins = hashlib.sha256((ROOT/"data"/"requirements.txt").read_bytes()).hexdigest()[:12]
    archive, manifest = cache/"packages"/pins/"pybind11-3.1.0-py3-none-any.whl", tmp_path/"manifest.csv"
    atomic_write(archive.parent/"complete", ""); shutil.copy(ROOT/"data"/"requirements.txt", tmp_path)
    with zipfile.ZipFile(archive, "w") as z: z.writestr("a.h", text)
    clean = text.strip()
    write_manifest([dict(domain="cpp", split="train", package="pybind11", path="a.h", sha256=hashlib.sha256(clean).hexdigest(), bytes=len(clean))], manifest)
    monkeypatch.setenv("BEM_CACHE", str(cache)); monkeypatch.setattr(bem.data, "MANIFEST", manifest)
    monkeypatch.setattr(bem.data.read_manifest, "__defaults__", (manifest,))
    return archive

def blobs(archive): return list(archive.parents[2].glob("corpus-*"))

def test_a_document_with_another_hash(own_corpus, one_sentence):
    with zipfile.ZipFile(own_corpus, "w") as z: z.writestr("a.h", b"#pragma twice\n"*60)
    with one_sentence(UserError, "a.h of pybind11", "another hash"): load_corpus()
    assert blobs(own_corpus) == []

def test_a_truncated_cache_is_made_again(own_corpus):
    docs = load_corpus().docs("train", "cpp"); blob, = blobs(own_corpus)
    blob.write_bytes(blob.read_bytes()[:99])
    assert load_corpus().docs("train", "cpp") == docs and len(blob.read_bytes()) == len(docs[0])

def test_a_changed_cache_is_made_again(own_corpus):
    docs = load_corpus().docs("train", "cpp"); blob, = blobs(own_corpus)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    assert load_corpus().docs("train", "cpp") == docs and blob.read_bytes() == docs[0]

@pytest.mark.parametrize("ask, says", [
    (("test", "cpp"), "sealed"), (("dev", "cpp"), "no split 'dev'"), (("train", "ccp"), "no domain 'ccp'"), (("validation", "cpp"), "no validation document")])
def test_a_part_that_is_closed_or_empty(own_corpus, ask, says, one_sentence):
    with one_sentence(UserError, says): load_corpus().docs(*ask)

def test_documents_too_short_to_train_on(one_sentence):
    with one_sentence(UserError, "Domain 'a' has no document of 64 bytes"): Sampler({"a": [b"short"]}, 64, 0)

def test_a_sequence_too_long_to_read(one_sentence):
    import torch
    with one_sentence(UserError, "9 tokens do not fit"): small_gpt(HostConfig(d_model=8, n_head=1, context=8))(torch.zeros(1, 9, dtype=torch.long))

# -- records

FIELDS = dict(profile="smoke", variant="lora", seed=0, key="k"*16, code="c", data="d", lock="l", status="ok", split="validation", config={}, lr=.01,
              lr_source="given", steps=3, items="i", scores={"python": [2.5, 3.]}, costs={"params_trainable": 9.}, seconds={"train": 1.},
              environment={"device": "cpu"})
def record(**changes): return Record(**{**FIELDS, "curve": Curve(step=[3], bits_per_byte=[4.]), **changes})

@pytest.fixture
def saved(tmp_path): return save_record(record(), tmp_path/"lora-s0-kkkkkkkk.json")

def rewritten(sign=True, drop=(), **changes):
    "Edit a record's fields, with a fresh digest as a forger would make it, or without."
    def edit(text):
        fields = {k: v for k, v in {**json.loads(text), **changes}.items() if k not in drop}
        return json.dumps({**fields, "digest": _digest(fields)} if sign else fields).encode()
    return edit

@pytest.mark.parametrize("damage, says", [
    (lambda t: t[:-30], "not whole JSON"), (lambda t: b"", "not whole JSON"), (lambda t: b"\xff\xfe\x00", "not whole JSON"),
    (lambda t: b"[]", "record format None"),
    (lambda t: t.replace(b"2.5", b"1.5"), "was changed after it was written"), (rewritten(sign=False, seed=7), "was changed after it was written"),
    (rewritten(format=2), "record format 2"), (rewritten(drop=("format",)), "record format None"),
    (rewritten(sede=7), "no key 'sede'"), (rewritten(drop=("seed",)), "needs the key 'seed'"), (rewritten(seed="7"), "seed = '7'"),
    (rewritten(scores={}), "has no scores"), (rewritten(status="diverged"), "diverged but has scores"),
    (lambda t: t.replace(b"2.5", b"NaN"), "digest does not match"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_damaged_record(damage, says, saved, one_sentence):
    saved.write_bytes(damage(saved.read_bytes())); before = saved.read_bytes()
    with one_sentence(UserError, says): load_record(saved)
    with one_sentence(UserError): load_records(saved.parent)
    assert saved.read_bytes() == before

def test_two_records_of_one_run(saved, one_sentence):
    save_record(record(key="z"*16), saved.with_name("lora-s0-zzzzzzzz.json"))
    with one_sentence(UserError, "lora-s0-kkkkkkkk.json and lora-s0-zzzzzzzz.json claim the same run"): load_records(saved.parent)
    assert len(list(saved.parent.glob("*.json"))) == 2

@pytest.mark.parametrize("changes, says", [
    (dict(scores={"python": [float("nan")]}), "nan"), (dict(scores={"python": [float("inf")]}), "inf"), (dict(scores={}), "has no scores"),
    (dict(costs={"flops": "many"}), "'many'")])
def test_a_record_that_must_not_be_written(changes, says, saved, one_sentence):
    before = saved.read_bytes()
    with one_sentence(UserError, says): save_record(record(**changes), saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]

# -- scores

table = np.random.default_rng(0).normal(2, .1, (4, 9))
def holed(value=float("nan")): t = table.copy(); t[1, 2] = value; return t

@pytest.mark.parametrize("call, says", [
    (lambda: compare(holed(), table, family="f"), "[1, 2] is nan"), (lambda: compare(table, holed(float("inf")), family="f"), "[1, 2] is inf"),
    (lambda: compare(table[:1], table[:1], family="f"), "1 seed"), (lambda: two_level_bootstrap(table[:1]), "1 seed"),
    (lambda: sign_flip(table[:1, 0]), "1 seed"),
    (lambda: compare(table, table[:3], family="f"), "pairs need the same"), (lambda: compare([["a"]], table, family="f"), "not a rectangular table"),
    (lambda: compare([], [], family="f"), "has shape (0,)"), (lambda: compare(table, table, family="f", test="t-test"), "No test is named 't-test'"),
    (lambda: bca_interval(table[0, :2]), "at least 3 documents"), (lambda: judge_family([]), "0 comparisons"),
    (lambda: benjamini_hochberg_correction([.1, float("nan")]), "p_values[1] is nan"), (lambda: benjamini_hochberg_correction([1.2]), "p_values[0] is 1.2"),
    (lambda: benjamini_hochberg_correction([]), "at least one p-value"), (lambda: register_test("sign_flip")(lambda d: d), "already registered"),
    (lambda: benjamini_hochberg_correction(["low"]), "p_values"),
    (lambda: compare(table, table + .1, family="f", test="nan"), "p_value"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_scores_that_carry_no_statistic(call, says, one_sentence, monkeypatch):
    answer = dict(test_statistic=0., p_value=float("nan"), effect_size=None, confidence_interval=(0., 0.), method_description="none")
    monkeypatch.setitem(bem.comparison._tests, "nan", lambda d, **kw: answer)
    with one_sentence(StatisticalValidationError, says): call()

def test_identical_scores_are_inconclusive():
    c, = judge_family([compare(table, table, family="f", n_resamples=200)])
    assert (c.effect, c.ci_low, c.ci_high, c.p, c.verdict) == (0, 0, 0, 1, "inconclusive")

# -- disks and kills

def full(*_, **__): raise OSError(28, "No space left on device")

@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "fdopen"])
def test_a_full_disk_leaves_what_was_there(call, tmp_path, monkeypatch, one_sentence):
    old, new = atomic_write(tmp_path/"a.txt", "old"), tmp_path/"b.txt"
    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        for p in (old, new):
            with one_sentence(UserError, "could not be written (No space left on device)"): atomic_write(p, "new")
    assert old.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]

def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    "A real partial write: the kernel stops the file at a thousand bytes."
    target = atomic_write(tmp_path/"a.bin", b"old")
    def limit(): signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    code = "import sys; from bem.core import atomic_write; atomic_write(sys.argv[1], b'x'*10**6)"
    done = subprocess.run([sys.executable, "-B", "-c", code, str(target)], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]

@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_keeps_a_saved_adapter_readable(nth, tmp_path, monkeypatch):
    host = small_gpt(HostConfig(d_model=16, n_layer=1, n_head=2, context=16)); adapter = attach(host, get_variant("lora", rank=2)); adapter.save(tmp_path)
    calls, sync = iter(range(1, 9)), os.fsync
    with monkeypatch.context() as m, pytest.raises(UserError, match="No space"):
        m.setattr(os, "fsync", lambda fd: full() if next(calls) == nth else sync(fd)); adapter.save(tmp_path)
    adapter.detach()
    assert load(host, tmp_path).config.rank == 2 and len(list(tmp_path.iterdir())) == 2

WRITER = "import sys; from bem.core import atomic_write\nwhile True:\n  for c in 'ab': atomic_write(sys.argv[1], c*2_000_000)"

@pytest.mark.parametrize("delay", [0, .013, .05, .11])
def test_a_kill_leaves_the_old_or_the_new(delay, tmp_path):
    target = tmp_path/"a.json"; writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
    try:
        until = time.monotonic() + 30
        while not target.exists() and time.monotonic() < until: time.sleep(.005)
        time.sleep(delay)
    finally: writer.send_signal(signal.SIGKILL); writer.wait()
    text = target.read_text()
    assert text in ("a"*2_000_000, "b"*2_000_000)
    assert all(p == target or p.name.startswith(".a.json.") and p.suffix == ".tmp" for p in tmp_path.iterdir())
