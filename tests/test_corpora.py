"Other text than the default: folders and Hugging Face data sets, small and local."
import sys
import pytest
from bem.adapters.base import attach
from bem.core import UserError
from bem.data import MIN_BYTES, load_corpus
from bem.host import HostConfig, small_gpt
from bem.train import TrainConfig, score, train

def text(i, n=200): return " ".join(f"word{i}x{j}" for j in range(n))

@pytest.fixture
def folder(tmp_path):
    "Two domains of thirty files each."
    for domain in ("letters", "recipes"):
        (tmp_path/domain).mkdir()
        for i in range(30): (tmp_path/domain/f"{i}.txt").write_text(text(f"{domain}{i}"))
    return tmp_path

@pytest.fixture
def dataset(tmp_path):
    "A saved data set of forty rows with a text column of another name and a domain column."
    datasets = pytest.importorskip("datasets"); path = tmp_path/"set"
    datasets.Dataset.from_dict({"body": [text(i) for i in range(40)], "domain": ["a", "b"]*20}).save_to_disk(path)
    return path

def test_a_folder_is_a_corpus(folder):
    c = load_corpus(f"dir:{folder}")
    assert c.domains == ["letters", "recipes"] and c.hash == load_corpus(f"dir:{folder}").hash
    (folder/"letters"/"0.txt").write_text(text("new")); assert c.hash != load_corpus(f"dir:{folder}").hash

def test_a_folder_without_subfolders_is_one_domain(folder):
    assert load_corpus(f"dir:{folder/'letters'}").domains == ["letters"]

def test_a_data_set_is_a_corpus(dataset):
    c = load_corpus(f"hf:{dataset}#body")
    assert c.domains == ["a", "b"] and sum(len(c._docs[s][d]) for s in c._docs for d in c.domains) == 40

def test_an_adapter_learns_a_folder(folder):
    c = load_corpus(f"dir:{folder}"); host = small_gpt(HostConfig(d_model=32, n_layer=1, context=64)); held = c.docs("train", "letters")[:4]
    before = score(host, held, 64).mean(); attach(host, "bem-self")
    train(host, {d: c.docs("train", d) for d in c.domains}, TrainConfig(steps=30, batch=8, lr=.05), 64, seed=0)
    assert score(host, held, 64).mean() < before - .3

@pytest.mark.parametrize("name, says", [
    ("hf:{set}", "no column 'text'"), ("dir:{empty}", "no document of at least"), ("dir:{empty}/x", "no folder"), ("hff:x", "no corpus 'hff:x'")])
def test_a_corpus_that_cannot_be(name, says, dataset, tmp_path, one_sentence):
    (tmp_path/"empty").mkdir(); (tmp_path/"empty"/"a.txt").write_text("x"*(MIN_BYTES - 1))
    with one_sentence(UserError, says): load_corpus(name.format(set=dataset, empty=tmp_path/"empty"))

def test_data_sets_need_their_package(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with one_sentence(UserError, "pip install"): load_corpus("hf:anything")
