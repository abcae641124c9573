"The template becomes a variant of the batch by being copied: no other file is edited."
import json, shutil
import pytest

NAME = "48a_adapters.yours.ipynb"
PAPERMILL = "papermill", "-k", "python3", "--engine", "ipc", "--no-progress-bar"
WANTED = """
import json; from bem.runs import batch, resolve
print(json.dumps([[r.spec.variant, r.spec.seed, str(r.path)] for r in map(resolve, batch("smoke")) if r.spec.variant in ("yours", "lora")]))
"""

@pytest.fixture
def joined(tree, command, cache):
    "A copy of the repository in which somebody has copied the template, and ran it and LoRA."
    shutil.copy(tree/"nbs"/"_variant_template.ipynb", tree/"nbs"/NAME)
    def run(*words):
        done = command(*words, BEM_CACHE=cache, OMP_NUM_THREADS=1, BEM_QUIET=1); assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout
    run("nbdev_export")
    paths = json.loads(run("python", "-c", WANTED))
    for v, seed, path in paths: run(*PAPERMILL, "nbs/experiments/80_adapt.ipynb", "out.ipynb", "-p", "variant", v, "-p", "seed", str(seed), "-p", "out", path)
    return run, paths

def test_the_template_is_one_notebook_that_joins_everything(tree, joined):
    run, paths = joined; assert sorted({v for v, *_ in paths}) == ["lora", "yours"]
    run("nbdev_test", "--path", f"nbs/{NAME}", "--n_workers", "0")
    for n in ("90_statistics", "91_pareto"): run(*PAPERMILL, f"nbs/paper/{n}.ipynb", tree/f"{n}.ipynb", "-p", "profile", "smoke")
    said = json.loads((tree/"reports"/"smoke"/"summary.json").read_text())
    mine = [c for c in said["comparisons"] if c["variant"] == "yours"]
    assert mine and all(c["baseline"] == "lora" and c["exploratory"] and c["family"] == "not planned" and c["budget"]["params_ratio"] <= 1.05 for c in mine)
    for n in ("90_statistics", "91_pareto"):
        shown = [o for c in json.loads((tree/f"{n}.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
        assert "yours" in json.dumps(shown), n                     # in the budget table, and among the points of the plot
