# The batch: one papermill run per record, then the paper notebooks. `make paper` calls it; `snakemake --config profile=paper -n` lists.
# A record's file name ends in the hash of its configuration, data and code, so existence alone decides what is left to do.
import os
from bem.core import ROOT, cache_dir, code_hash, digest
from bem.runs import REPORTS, TEMPLATE, batch, data_hash, load_profile, resolve, sweep
from bem.train import base_key

workdir: ROOT
PROFILE = config.get("profile", "laptop")
WANTED = str(config.get("only", "runs"))
PAPER = ["90_statistics", "91_pareto", "92_routing", "93_claims"]
if PROFILE.startswith("lm-"): PAPER = ["95_language_model"]; from bem.lm import TEMPLATE, batch, load_profile, resolve, sweep         # language models learn from nothing, so they wait for the corpus alone
if PROFILE == "tasks" and WANTED == "runs": PAPER = ["96_tasks"]; from bem.task_runs import TEMPLATE, batch, resolve                # tuned on text, as any profile
relative = lambda path: os.path.relpath(path, ROOT)

p = load_profile(PROFILE)
CORPUS = relative(cache_dir()/f".corpus-{data_hash('default')}")
BASE = CORPUS if PROFILE.startswith("lm-") else relative(cache_dir()/f"base-{base_key(p.host, p.pretrain, data_hash('default'))}.safetensors")
RUNS = {relative(r.path): r.tuned() for r in map(resolve, batch(PROFILE))} if WANTED == "runs" else {}
TRIALS = {relative(r.path): r for r in map(resolve, sweep(PROFILE))} if WANTED == "sweep" else {}

# one stamp per state of the inputs: which records, which notebooks, which modules
STATE = digest([sorted(RUNS), [code_hash(ROOT/f"nbs/paper/{n}.ipynb") for n in PAPER], *(f.read_text() for f in [ROOT/f"nbs/experiments/params/plan-{p.plan}.yml", ROOT/"nbs/experiments/params/claims.yml", *sorted((REPORTS/"bench").glob("*.json"))])])
STAMP = relative(REPORTS/PROFILE/".stamps"/STATE)

onstart:
    os.environ.update(OMP_NUM_THREADS="1", BEM_QUIET="1")
    for left in [*cache_dir().glob(".*.tmp"), *REPORTS.glob("**/.*.tmp")]: left.unlink()      # of writes that were killed
    for name in (os.path.basename(p) for p in {**RUNS, **TRIALS} if os.path.exists(p)):     # of runs that were killed after their record was written
        for left in REPORTS.glob(f"_failed/{name}.*"): left.unlink()

def arguments(wildcards, output):
    "What the template is told: the parts of a run that a user would say."
    s = {**RUNS, **TRIALS}[output[0]].spec
    task = f"-p task {s.task} " if hasattr(s, "task") else ""
    return f"{task}-p profile {s.profile} -p variant {s.variant} -p seed {s.seed} -p lr {s.lr:g} -p tune {s.tune} -p out '{ROOT/output[0]}'"

rule report:
    input: STAMP

rule paper:
    input: ancient(list(RUNS))
    output: touch(STAMP)
    shell: "rm -f reports/{PROFILE}/.stamps/* && make --no-print-directory report PROFILE={PROFILE}"

rule records:
    input: list(RUNS)

rule sweep:
    input: list(TRIALS)

rule data:
    output: touch(CORPUS)
    shell: "python -c 'from bem.data import load_corpus; load_corpus()'"

if BASE != CORPUS:
  rule base:
    input: ancient(rules.data.output)
    output: BASE
    threads: 2
    params: name=PROFILE
    shell: "python -c \"from bem.runs import *; from bem.train import pretrained; p = load_profile('{params.name}'); pretrained(p.host, p.pretrain, data_hash('default'))\""

for path in {**RUNS, **TRIALS}:
    rule:
        name: f"run_{os.path.basename(path).removesuffix('.json').replace('-', '_').replace('.', '_')}"
        input: ancient(BASE)
        output: path
        params: said=arguments, failed=f"reports/_failed/{os.path.basename(path)}.ipynb", done=f"reports/{PROFILE}/runs/{os.path.basename(path)}.ipynb"
        shell:
            "mkdir -p reports/_failed $(dirname {params.done}) && "
            "papermill {TEMPLATE} {params.failed} -k python3 --engine ipc --no-progress-bar {params.said} 2> {params.failed}.log "
            "|| (tail -n 3 {params.failed}.log >&2; echo 'The notebook as far as it ran: {params.failed}' >&2; exit 1) && "
            "mv {params.failed} {params.done} && rm {params.failed}.log"
