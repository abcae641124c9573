# make paper | test | frontier | figures | tune | readme.  PROFILE=laptop (default), paper or smoke.  PYTHON names the interpreter, 3.11 or 3.12.
PROFILE ?= laptop
PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/bash
READY := $(VENV)/ready
IN := source $(VENV)/bin/activate &&
BUSY = { [ $$? -ne 75 ] || echo 'Another batch is running in this folder; wait for it or stop it.' >&2; exit 1; }
BATCH = mkdir -p .snakemake && $(IN) OMP_NUM_THREADS=1 flock -n -E 75 -o .snakemake/batch.lock snakemake --cores all --config profile=$(PROFILE)

.PHONY: help paper tune frontier figures report test lint notebooks readme env
help:
	@sed -n '1s/^# //p' Makefile; sed -n 's/^\([a-z]*\):.*## /  make \1   /p' Makefile

env: $(READY)
$(READY): lock/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python {v[0]}.{v[1]} was found, 3.11 or 3.12 is needed; name one with PYTHON=python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(IN) pip install -q --disable-pip-version-check -r lock/requirements.txt && pip install -q --disable-pip-version-check --no-deps -e .
	@touch $(READY)

paper: $(READY)  ## everything of a profile: corpus, base, runs, report; of laptop and paper the language models too
	@$(BATCH) || $(BUSY)
	@if [ -e nbs/experiments/params/lm-$(PROFILE).yml ]; then $(MAKE) --no-print-directory paper PROFILE=lm-$(PROFILE); fi

tune: $(READY)  ## learning-rate sweep of a profile; commit reports/tune afterwards
	@$(BATCH) only=sweep -- sweep || $(BUSY)

frontier: $(READY)  ## the frontier study: its five settings, then the notebook that compares them
	@for p in frontier-4 frontier-16 frontier-48 frontier-second frontier-gpt2; do $(MAKE) --no-print-directory paper PROFILE=$$p || exit 1; done
	@$(MAKE) --no-print-directory PROFILE=frontier report-94_frontier
figures: PROFILE = paper
figures: report  ## every figure and table of the committed records, no training

report: $(READY)  ## paper notebooks of a profile, from its records
ifneq (,$(filter lm-%,$(PROFILE)))
	@$(MAKE) --no-print-directory PROFILE=$(PROFILE) report-95_language_model
	@echo "Open 95_language_model.html in reports/$(PROFILE)"
else ifeq (tasks,$(PROFILE))
	@$(MAKE) --no-print-directory PROFILE=tasks report-96_tasks
	@echo "Open 96_tasks.html in reports/tasks"
else
	@$(MAKE) --no-print-directory -j2 PROFILE=$(PROFILE) report-90_statistics report-91_pareto report-92_routing
	@$(MAKE) --no-print-directory PROFILE=$(PROFILE) report-93_claims
	@echo "Open 90_statistics.html, 91_pareto.html, 92_routing.html and 93_claims.html in reports/$(PROFILE)"
endif

report-%: $(READY)
	@mkdir -p reports/_failed reports/$(PROFILE) && $(IN) \
	  papermill nbs/paper/$*.ipynb reports/_failed/$*.ipynb -k python3 --engine ipc --no-progress-bar -p profile $(PROFILE) 2> reports/_failed/$*.log || { tail -n 3 reports/_failed/$*.log >&2; exit 1; }
	@$(IN) nbdev_clean --fname reports/_failed/$*.ipynb && mv reports/_failed/$*.ipynb reports/$(PROFILE)/ && rm reports/_failed/$*.log && jupyter nbconvert --to html --log-level ERROR reports/$(PROFILE)/$*.ipynb

lint: $(READY)
	$(IN) ruff check -q nbs tests

notebooks: $(READY)  ## every notebook runs
	$(IN) OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing

readme: $(READY)
	$(IN) jupyter nbconvert --log-level ERROR --to markdown nbs/index.ipynb --RegexRemovePreprocessor.patterns='^#\|\s*hide' --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove-input --output-dir . --output README

test: $(READY) lint notebooks
	$(IN) OMP_NUM_THREADS=1 pytest
