"The rules of the house, held against every notebook; and the same rules held against a house that breaks them."
import ast, json, re, statistics, subprocess, sys
from pathlib import Path
import nbformat, papermill, pytest
from bem.adapters.base import get_variant, list_variants
from bem.core import ROOT, notebook_code
from bem.runs import load_profile, trials

NUMBERED = re.compile(r"^(\d\d[a-z]?)_(.+)$")
CHECK = re.compile(r"\bassert\b|\b(test|assert)_\w+\(|\bexpect_fail\(|\bcheck_grad\w*\(")
ABSOLUTE = re.compile(r"(?<![\w.:/)\]}~<*-])/(?:home|root|Users|work|mnt|media|opt|tmp)/")
PARENT = re.compile(r"\.\./(\w[\w.-]*)")

def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def number(path): return NUMBERED.match(path.stem).group(1)
def exported(path):
    "Module that a notebook exports, or None."
    found = re.findall(r"^#\|\s*default_exp (\S+)$", "\n".join(map(source, cells(path))), re.M)
    assert len(found) <= 1, f"{path.name} exports {found}"
    return found[0] if found else None

def notebooks(root, folder=""): return sorted(p for p in (root/"nbs"/folder).glob("*.ipynb") if NUMBERED.match(p.stem))
def modules(root): return notebooks(root)
def templates(root): return notebooks(root, "experiments")
def tutorials(root): return sorted((root/"nbs"/"tutorials").glob("*.ipynb"))        # no numbers: nothing is exported, so nothing stands on them
def everything(root): return [p for f in ("", "experiments", "paper") for p in notebooks(root, f)]
def named(paths): return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])

# -- the rules: each returns what is wrong

def form(path):
    "Title first, one module per notebook under its own name, a neutral kernel, nothing local."
    nb, first = json.loads(path.read_text()), source(cells(path)[0])
    if not re.match(r"# \S.*\n+> \S", first): yield "the first cell is not a title and a '>' subtitle"
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3": yield "the kernel is not python3"
    if any(c.get("execution_count") for c in nb["cells"]): yield "execution counts are stored"
    for c in nb["cells"]:
        if ABSOLUTE.search(source(c)): yield f"an absolute path: {ABSOLUTE.search(source(c)).group()}"
    if path.parent.name == "nbs" and exported(path) != NUMBERED.match(path.stem).group(2): yield f"default_exp is {exported(path)}"

def floor(path, root):
    "Imports from notebooks that are not lower."
    level = {f"bem.{exported(p)}": number(p) for p in modules(root)}
    for n in ast.walk(ast.parse(notebook_code(path))):
        if not isinstance(n, (ast.Import, ast.ImportFrom)): continue
        names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module, *(f"{n.module}.{a.name}" for a in n.names)]
        yield from (f"imports {m} of {level[m]}" for m in names if m in level and level[m] >= number(path))

def parameters(path):
    "One tagged cell, one typed and commented parameter per line, all of which papermill understands; no outputs; a guard."
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1: yield f"{len(tagged)} cells are tagged 'parameters'"; return
    lines = source(tagged[0]).splitlines()
    for l in lines:
        if not re.fullmatch(r"\w+:\w+ = [^;]*\S\s+# \S.*", l): yield f"not 'name:type = default  # meaning': {l}"
    seen = papermill.inspect_notebook(str(path))
    for l in lines:
        if seen.get(l.split(":")[0], {}).get("inferred_type_name", "None") == "None": yield f"papermill cannot read: {l}"
    if any(c.get("outputs") for c in cells(path)): yield "outputs are stored"
    if "refuse_unknown(globals()" not in notebook_code(path): yield "refuse_unknown is not called"

@named(everything(ROOT) + tutorials(ROOT))
def test_form(path): assert list(form(path)) == []

@named(everything(ROOT))
def test_number_is_the_floor(path): assert list(floor(path, ROOT)) == []

@named(templates(ROOT))
def test_template(path): assert list(parameters(path)) == []

@named(tutorials(ROOT))
def test_tutorial(path):
    "A template that shows its outputs, short enough to be read in one go."
    assert [p for p in parameters(path) if p != "outputs are stored"] == [] and exported(path) is None
    assert sum(c["cell_type"] == "code" for c in cells(path)) <= 10

def test_there_is_something_to_hold_the_rules_against(): assert len(modules(ROOT)) > 10 and templates(ROOT) and tutorials(ROOT)

def test_every_module_has_a_notebook():
    files = {".".join(p.relative_to(ROOT/"bem").with_suffix("").parts) for p in (ROOT/"bem").rglob("*.py") if not p.stem.startswith("_")}
    assert files == {exported(p) for p in modules(ROOT)}

def test_tags_survive_cleaning(): assert re.search(r"^allowed_cell_metadata_keys\s*=\s*tags$", (ROOT/"settings.ini").read_text(), re.M)

# -- the rules bite

@pytest.mark.parametrize("break_it, says", [
    (lambda nb: [c["metadata"].pop("tags", None) for c in nb.cells], "0 cells are tagged"),
    (lambda nb: nb.cells[1].update(source="seed = 0"), "not 'name:type"),
    (lambda nb: nb.cells[1].update(source="seed:int = 0; lr:float = 1.  # two on a line"), "not 'name:type"),
    (lambda nb: [c.update(source=c.source.replace("refuse_unknown(globals()", "print((0)")) for c in nb.cells], "refuse_unknown is not called"),
    (lambda nb: nb.cells[3].update(outputs=[nbformat.v4.new_output("stream", text="x")]), "outputs are stored")])
def test_a_broken_template_is_caught(tree, break_it, says):
    path = templates(tree)[0]; nb = nbformat.read(path, 4); break_it(nb); nbformat.write(nb, path)
    assert any(says in p for p in parameters(path))

def test_a_high_import_and_a_wrong_name_are_caught(tree):
    path = tree/"nbs"/"00_core.ipynb"; nb = nbformat.read(path, 4)
    nb.cells[1].source, nb.cells[2].source, nb.cells[0].source = "#| default_exp kore", "from bem.runs import resolve", "no title"
    nb.metadata.kernelspec["name"] = "mine"; nbformat.write(nb, path)
    assert len(list(form(path))) == 3 and list(floor(path, tree)) == ["imports bem.runs of 42"]

# -- generated files are what the notebooks generate

def contents(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}

@pytest.mark.parametrize("tool, part", [("nbdev_export", "bem"), ("nbdev_clean", "nbs")])
def test_running_it_again_changes_nothing(tree, command, tool, part):
    before = contents(tree/part); done = command(tool)
    assert done.returncode == 0, done.stderr
    after = contents(tree/part)
    assert sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) == []

def test_readme_is_the_index(tree, command):
    hide = [r"--RegexRemovePreprocessor.patterns=^#\|\s*hide", "--TagRemovePreprocessor.enabled=True", "--TagRemovePreprocessor.remove_input_tags=remove-input"]
    done = command(sys.executable, "-m", "nbconvert", "--to", "markdown", "nbs/index.ipynb", *hide, "--output-dir", ".", "--output", "README")
    assert done.returncode == 0, done.stderr
    assert (ROOT/"README.md").exists() and (tree/"README.md").read_text() == (ROOT/"README.md").read_text()

# -- style, in numbers

@pytest.fixture(scope="module")
def style():
    every = [c for p in modules(ROOT) for c in cells(p)]
    code = [source(c) for c in every if c["cell_type"] == "code"]
    return dict(markdown=sum(c["cell_type"] == "markdown" for c in every), code=len(code), checked=sum(bool(CHECK.search(s)) for s in code),
                lines=[len([l for l in s.splitlines() if not l.startswith("#|")]) for s in code if re.search(r"^#\|\s*export", s, re.M)])

def test_exported_cells_are_short(style):
    assert statistics.median(style["lines"]) <= 12 and statistics.quantiles(style["lines"], n=10)[-1] <= 25

def test_prose_keeps_up_with_code(style): assert .7 <= style["markdown"]/style["code"] <= 1.3

def test_one_cell_in_four_checks_something(style): assert style["checked"] >= style["code"]/4

# -- the repository

@pytest.fixture(scope="module")
def tracked():
    run = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode: pytest.skip("not a git checkout")
    return [ROOT/n for n in run.stdout.split("\0") if n and (ROOT/n).is_file()]

def test_no_file_is_large(tracked): assert [p.name for p in tracked if p.stat().st_size > 2_000_000] == []

def test_no_path_leads_out_of_the_repository(tracked):
    inside, out = {p.name for p in ROOT.iterdir()}, []
    for p in tracked:
        try: text = p.read_text()
        except UnicodeDecodeError: continue
        found = [*ABSOLUTE.finditer(text), *(m for m in PARENT.finditer(text) if m[1] not in inside)]
        out += [f"{p.relative_to(ROOT)}: {m.group()}" for m in found]
    assert out == []

def test_ruff_is_clean():
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "-q", "--output-format", "concise", "nbs", "tests"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

# -- one room more

TOY = '''
from bem.adapters.base import register
from bem.adapters.lora import LoraConfig
class ToyConfig(LoraConfig): "LoRA under another name."
register("toy", ToyConfig())
'''
PROBE = '''
import json, sys; from bem.core import ROOT
from bem.runs import batch, list_variants, resolve
def keys(): return {f"{r.spec.variant}-{r.spec.seed}": r.key for r in map(resolve, batch("smoke"))}
def add(name, text): path = ROOT/"bem"/name; path.write_text((path.read_text() if path.exists() else "") + text); return keys()
said = [list_variants(), keys(), add("adapters/toy.py", sys.argv[1]), list_variants()["toy"], add("host.py", "# remark"), add("sites.py", "CHANGED = 1")]
print(json.dumps(said))
'''

def test_a_new_variant_joins_and_only_meaning_makes_stale(command):
    done = command(sys.executable, "-c", PROBE, TOY)
    assert done.returncode == 0, done.stderr
    variants, before, joined, module, remarked, changed = json.loads(done.stdout)
    assert "toy" not in variants and module == "bem.adapters.toy"
    assert {k.rsplit("-", 1)[0] for k in joined.keys() - before.keys()} == {"toy"} and before.items() <= joined.items()
    assert remarked == joined                                                            # a comment makes nothing stale
    assert changed.keys() == joined.keys() and not changed.items() & joined.items()      # a module two imports away, everything

def test_the_checkout_was_left_alone(): assert not (Path(ROOT)/"bem"/"adapters"/"toy.py").exists()

@pytest.mark.parametrize("path", sorted((ROOT/"nbs"/"experiments"/"params").glob("profile-*.yml")), ids=lambda p: p.stem)
def test_a_profile_speaks_of_variants_that_exist(path):
    name = path.stem.removeprefix("profile-"); p = load_profile(name); known = list_variants(peers=True); tried = {v for v, _ in trials(name)}
    assert set(p.arms) | set(p.options) <= set(known) and (not p.arms or set(p.options) <= set(p.arms) | tried)
    for v, fields in p.options.items(): get_variant(v, **fields)
