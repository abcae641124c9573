"The template from the command line, and the batch: finished, killed, resumed, and at rest."
import os, re, resource, signal, subprocess, sys
import pytest
from bem.core import digest, read_yaml
from bem.record import load_record, load_records
from bem.runs import RunSpec, TEMPLATE, resolve

# -- one run

@pytest.fixture(scope="module")
def twice(tmp_path_factory, base):
    "The template with its defaults, two times: records and processor seconds, which a busy machine does not stretch."
    folder, out = tmp_path_factory.mktemp("adapt"), []
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for n in "ab":
        words = [sys.executable, "-m", "papermill", str(TEMPLATE), f"{n}.ipynb", "-k", "python3", "--engine", "ipc", "--no-progress-bar",
                 "-p", "out", str(folder/f"{n}.json")]
        spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        before = spent(); done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out.append((load_record(folder/f"{n}.json"), spent() - before))
    return out

def test_a_smoke_run_is_quick(twice): assert max(seconds for _, seconds in twice) < 20

def test_a_smoke_run_says_everything(twice):
    r, _ = twice[0]; expected = resolve(RunSpec())
    assert (r.profile, r.variant, r.seed, r.status, r.split) == ("smoke", "lora", 0, "ok", "validation")
    assert (r.key, r.code, r.data) == (expected.key, expected.code, expected.data)
    assert set(r.scores) == {"prose", "python", "cpp", "json", "languages"} and all(0 < s < 20 for v in r.scores.values() for s in v)
    assert abs(r.costs["params_trainable"]/r.costs["budget"] - 1) <= .05 and r.costs["flops_per_token"] > r.costs["flops_per_token_host"]

def test_a_smoke_run_repeats_to_the_last_digit(twice):
    a, b = (r.model_dump(exclude={"seconds", "digest"}) for r, _ in twice)
    assert a == b

# -- the batch

@pytest.fixture
def batch(tree, cache, environment):
    "Snakemake on the smoke profile, one seed, in a copy with a cache of its own: a function that starts it."
    path = tree/"nbs"/"experiments"/"params"/"profile-smoke.yml"
    path.write_text(re.sub(r"(?m)^seeds: .*$", "seeds: [0]", path.read_text())); assert read_yaml(path)["seeds"] == [0]
    (tree/"bem"/"adapters"/"controls.py").unlink()                   # fewer variants, the same batch
    env = environment(BEM_ROOT=tree, PYTHONPATH=tree, BEM_CACHE=cache)
    def start(*words):
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *words, "--quiet", "host", "--config", "profile=smoke", "--", "records"]
        return subprocess.Popen(command, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    return start

def finish(process):
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    return text

def wait_for_a_run(process):
    "Read Snakemake's log up to the count that follows its first finished run; returns the names of the rules that have finished."
    done, text = [], ""
    for line in process.stdout:
        text += line; done += re.findall(r"Finished job.*\bRule: (run_\w+)", line)
        if done and "steps (" in line: return done
    raise AssertionError(f"no run finished:\n{text}")

def rule(name): return "run_" + re.sub(r"\W", "_", name.removesuffix(".json"))
def marks(folder): return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, digest(p.read_bytes())) for p in folder.glob("*.json")}

def test_a_killed_batch_resumes_and_then_rests(tree, batch):
    records = tree/"reports"/"smoke"/"records"
    first = batch()
    try: done = wait_for_a_run(first)
    finally: os.killpg(first.pid, signal.SIGKILL); first.wait(); first.stdout.close()
    before = {n: m for n, m in marks(records).items() if rule(n) in done}
    assert len(before) == len(done) and all(load_record(p) for p in records.glob("*.json"))      # what is there is whole
    finish(batch())                                                  # the same command again, and nothing else
    after = marks(records)
    assert before.items() <= after.items() and len(before) < len(after)
    names = {r.variant for r in load_records(records)}
    assert len(names) == len(after) and {"lora", "bem-self", "bem-chunk", "bem-constant", "spectral", "spectral-self"} <= names
    assert [p.name for p in records.iterdir() if p.suffix != ".json"] == [] and not list((tree/"reports"/"_failed").glob("*"))
    assert "Nothing to be done" in finish(batch()) and marks(records) == after
