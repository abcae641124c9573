"One thread, quiet and reproducible; and a copy of the checkout for every test that changes files."
import os

os.environ.update(OMP_NUM_THREADS="1", IN_TEST="1", BEM_QUIET="1")      # before torch is imported

import shutil, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, settings
from bem.core import ROOT, cache_dir

torch.set_num_threads(1)
settings.register_profile("bem", derandomize=True, deadline=None, max_examples=10, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("bem")

PARTS = ("nbs", "bem", "data", "lock", "figures", "settings.ini", "pyproject.toml", "Snakefile", "profiles", "README.md", ".gitattributes")

@contextmanager
def _one_sentence(error, *parts):
    "The block raises `error` with one sentence, on one line, that contains `parts`."
    with pytest.raises(error) as e: yield
    text = str(e.value)
    assert e.type.__module__.startswith("bem."), f"raised a bare {e.type.__name__}: {text}"
    assert text.endswith(".") and "\n" not in text and len(text) < 600
    for p in parts: assert p in text

@pytest.fixture
def one_sentence(): return _one_sentence

@pytest.fixture(scope="session")
def base()->Path:
    "Cache file of the smoke base, trained here if it is not there yet."
    from bem.runs import data_hash, load_profile
    from bem.train import base_key, pretrained
    p = load_profile("smoke"); args = p.host, p.pretrain, data_hash("default")
    pretrained(*args)
    return cache_dir()/f"base-{base_key(*args)}.safetensors"

@pytest.fixture
def cache(tmp_path, base)->Path:
    "A cache of its own with the corpus and the smoke base in it."
    folder = tmp_path/"cache"; folder.mkdir()
    for f in (base, *cache_dir().glob("corpus-*.bin")): shutil.copy2(f, folder)
    return folder

@pytest.fixture
def tree(tmp_path)->Path:
    "Copy of the checkout, without caches and reports."
    for p in (ROOT/n for n in PARTS):
        if p.is_dir(): shutil.copytree(p, tmp_path/"tree"/p.name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis", ".ipynb_checkpoints"))
        elif p.exists(): shutil.copy2(p, tmp_path/"tree"/p.name)
    return tmp_path/"tree"

def _environment(**extra)->dict:
    "Environment of a command, as a user has it: without the marks of a test."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", **{k: str(v) for k, v in extra.items()}}

@pytest.fixture
def environment(): return _environment

@pytest.fixture
def command(tree):
    "Run a command in the copy, with the copy's package."
    def run(*words, **extra):
        return subprocess.run([*map(str, words)], cwd=tree, env=_environment(BEM_ROOT=tree, PYTHONPATH=tree, **extra), capture_output=True, text=True)
    return run
