"The names of the guides: what they promise, over drawn inputs, on a Hugging Face host, and with input that makes no sense."
import json
from types import SimpleNamespace
import numpy as np
import pytest, torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
import bem, bem.contracts
from bem.adapters.base import attach, fit_budget, get_variant, list_variants
from bem.contracts import AdvancedBEMComponent, BEMComponent, BEMConfig, BudgetConstraints, BudgetParityError, BudgetValidator, ExperimentResult
from bem.contracts import find_device, run_experiment
from bem.core import ROOT, UserError, notebook_code
from bem.host import HostConfig, small_gpt
from bem.stats import StatisticalValidationError

SHAPE = HostConfig(d_model=32, n_layer=2, n_head=2, context=48)
MLP = "blocks/0/mlp/down"

def stirred(name, seed=0, **changes):
    "A host under an adapter with weights as after training."
    host = small_gpt(SHAPE, seed); a = attach(host, get_variant(name, rank=3, **changes), seed); g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): [p.add_(.2*torch.randn(p.shape, generator=g)) for p in a.parameters()]
    if s := a.config.side_size(): a.give(torch.rand(2, s, generator=g))
    return host, a

def calls(host, a):
    "What every site read, was given, and answered, and the code that it showed."
    seen, hooks = {}, [u.register_forward_hook(lambda u, args, out: seen.update({u: (*args, out)})) for u in a.updates.values()]
    for u in a.updates.values(): u.keep_code = True
    with torch.no_grad(): host(torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1)))
    for h in hooks: h.remove()
    return {u: (x, base, out, u.last_code if u.last_code is not None else code) for u, (x, base, code, out) in seen.items()}

def test_the_names_are_where_people_look():
    for name in "BEMComponent AdvancedBEMComponent BEMConfig ExperimentResult run_experiment BudgetParityError BudgetConstraints BudgetValidator".split():
        assert getattr(bem, name) is getattr(bem.contracts, name)
    assert bem.StatisticalValidationError is StatisticalValidationError

# -- components

@pytest.mark.parametrize("name", sorted(set(list_variants()) - {"control-nonlinear", "pt4-film", "bem-lagged", "bem-lagged-own", "control-lagged"}))
def test_forward_is_the_matrix_that_it_shows(name):
    host, a = stirred(name); maps = dict(host.named_modules())
    for u, (x, base, out, code) in calls(host, a).items():
        c = BEMComponent(u, maps[u.site.name])
        for t in (0, 16, 39):
            W = c.get_delta_weights(None if code is None else code.expand(2, 40, -1)[1, t])
            assert W.shape == (u.site.d_out, u.site.d_in) and (out - base)[1, t].norm() > 1e-4
            torch.testing.assert_close(base[1, t] + x[1, t] @ W.T, out[1, t], rtol=1e-4, atol=1e-4*float((out - base)[1, t].norm()))

def test_what_is_no_matrix_is_refused(one_sentence):
    with one_sentence(UserError, "is no matrix under this code"): BEMComponent(stirred("control-nonlinear")[1].updates[MLP]).get_delta_weights()
    with one_sentence(UserError, "reads the tokens before"): BEMComponent(stirred("bem-lagged")[1].updates[MLP]).get_delta_weights(torch.ones(3))
    film = stirred("pt4-film")[1].updates["blocks/0"]
    with one_sentence(UserError, "is no matrix under this code", "whole block"): BEMComponent(film).get_delta_weights(torch.ones(film.n_code))
    with one_sentence(UserError, "is no matrix under this code", "frozen map"): BEMComponent(stirred("spectral")[1].updates[MLP]).get_delta_weights()

@pytest.mark.parametrize("name, code, says", [
    ("bem-chunk", None, "another weight under every code"), ("bem-chunk", torch.ones(4), "has 3 entries"), ("lora", torch.ones(3), "has 0 entries"),
    ("bem-self", torch.ones(2, 3), "has 3 entries"), ("spectral-self", torch.ones(1), "has 3 entries")])
def test_a_code_that_does_not_fit(name, code, says, one_sentence):
    with one_sentence(UserError, says): BEMComponent(stirred(name)[1].updates[MLP]).get_delta_weights(code)

def test_the_matrix_is_differentiable_and_looking_leaves_no_trace():
    u = stirred("bem-self")[1].updates[MLP]; u.keep_code = True; u.last_code = "as it was"
    BEMComponent(u).get_delta_weights(torch.ones(3)).square().sum().backward()
    assert u.Vt.grad.abs().sum() > 0 and u.Ut.grad.abs().sum() > 0 and u.last_code == "as it was" and u.keep_code

def test_a_component_needs_something_to_wrap(one_sentence):
    with one_sentence(UserError, "A Linear is no component"): BEMComponent(nn.Linear(2, 2))
    with one_sentence(UserError, "whole adapter cannot be composed"): AdvancedBEMComponent(stirred("lora")[1]).compose_with_others([])
    host, a = stirred("lora"); a.detach()
    with one_sentence(UserError, "not attached"): BEMComponent(a).count_flops()

@pytest.mark.parametrize("name", ["lora", "bem-hierarchical", "bem-retrieval", "spectral-self"])
def test_watching_changes_nothing(name):
    host, a = stirred(name); ids = torch.randint(0, 256, (2, 40)); before = host(ids)
    out, seen = AdvancedBEMComponent(a).forward_with_monitoring(ids)
    assert torch.equal(out, before) and set(seen) == {s.name for s in a.sites} and not any(u.keep_code or u._forward_hooks for u in a.updates.values())
    assert all(m["delta_norm"] > 0 and (name == "lora" or m["code_norm"] > 0) for m in seen.values())

def test_nan_is_caught_on_the_way_in_and_out(one_sentence):
    c = AdvancedBEMComponent(stirred("lora")[1].updates[MLP]); x = torch.ones(2, 128)
    with one_sentence(UserError, "The input holds"): c.forward_with_monitoring(x*float("nan"))
    c.part.Ut.data[0, 0] = float("inf")
    with one_sentence(UserError, "The output holds"): c.forward_with_monitoring(x)

@given(st.lists(st.sampled_from(["lora", "bem-constant", "bem-chunk", "bem-self"]), min_size=1, max_size=4))
@torch.no_grad()
def test_a_sum_is_the_sum(names):
    parts = [stirred(n, i)[1].updates[MLP] for i, n in enumerate(names)]; first, *rest = map(AdvancedBEMComponent, parts)
    both = first.compose_with_others(rest)
    x, y, codes = torch.randn(5, 128), torch.randn(5, 32), {u: torch.randn(3) for u in parts if u.n_code}
    whole = torch.cat(list(codes.values())) if codes else None
    torch.testing.assert_close(both(x, y, whole) - y, sum(u(x, y, codes.get(u)) - y for u in parts), rtol=1e-4, atol=1e-4)
    assert both.count_flops() == sum(u.flops() for u in parts) and both.count_parameters() == sum(p.numel() for u in parts for p in u.parameters())

def test_a_sum_needs_one_site(one_sentence):
    _, a = stirred("lora"); one, other, *_ = map(AdvancedBEMComponent, a.updates.values())
    with one_sentence(UserError, "compose updates of one site"): one.compose_with_others([other])

# -- budgets

@given(st.floats(1, 1e9), st.floats(0, .5), st.floats(0, 2))
def test_the_gate_is_one_sided_and_closed(base, tolerance, ratio):
    passed = BudgetValidator(BudgetConstraints(baseline_params=base, tolerance=tolerance)).validate_all(dict(params=ratio*base))["passed"]
    assert passed == (ratio <= 1 + tolerance) or abs(ratio - 1 - tolerance) < 1e-9

@pytest.mark.parametrize("metrics", [{}, dict(params=100), dict(params=100, flops=None), dict(params=float("nan"), flops=1), dict(parms=100, flops=1)])
def test_what_was_not_measured_does_not_pass(metrics):
    assert not BudgetValidator(BudgetConstraints(baseline_params=100, baseline_flops=100)).validate_all(metrics)["passed"]

def test_parity_of_components(one_sentence):
    (h1, a), (h2, b) = stirred("lora"), stirred("bem-hierarchical"); lora, other = BEMComponent(a), BEMComponent(b)
    assert lora.validate_budget_parity(other)["passed"] and lora.validate_budget_parity(a)["passed"]
    with one_sentence(BudgetParityError, "params", "fit_budget"): other.validate_budget_parity(lora)
    assert other.validate_budget_parity(lora, tolerance=9.)["passed"]
    with one_sentence(BudgetParityError, "was not measured"): lora.validate_budget_parity(BudgetConstraints(baseline_params=1e9, baseline_memory_mb=1.))
    with one_sentence(UserError, "is no component"): lora.validate_budget_parity(h1)
    b.detach(); fitted = BEMComponent(attach(h2, fit_budget(get_variant("bem-self"), h2, lora.count_parameters())))
    assert fitted.validate_budget_parity(lora)["passed"]

# -- configuration

leaves = st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
options = st.dictionaries(st.text(min_size=1), leaves | st.lists(leaves) | st.dictionaries(st.text(), leaves))

@given(name=st.text(), options=options, seed=st.integers(0, 10**9), n=st.integers(2, 99), lr=st.floats(0, 1))
@settings(max_examples=40)
def test_a_configuration_comes_back_as_it_was(tmp_path, name, options, seed, n, lr):
    config = BEMConfig(experiment_name=name, options=options, seed=seed, n_seeds=n, lr=lr)
    assert BEMConfig.from_yaml(config.to_yaml(tmp_path/"a.yml")) == config

@pytest.mark.parametrize("text, says", [
    ("sede: 1", "no key 'sede'"), ("seed: -1", "seed = -1"), ("n_seeds: 1", "n_seeds = 1"), ("lr: fast", "lr = 'fast'"), ("seed: true", "seed = True"),
    ("1: 2", "no key '1'"), ("- 1", "holds a list"), ("a: [", "not valid YAML"),
    ("a: !!python/object:os.system {}", "not valid YAML"), ("options: 3", "options = 3")])
def test_a_file_that_makes_no_sense(text, says, tmp_path, one_sentence):
    (tmp_path/"a.yml").write_text(text)
    with one_sentence(UserError, says): BEMConfig.from_yaml(tmp_path/"a.yml")
    with one_sentence(UserError, "no file b.yml"): BEMConfig.from_yaml(tmp_path/"b.yml")

def test_options_that_no_file_can_hold(tmp_path, one_sentence):
    with one_sentence(UserError, "YAML cannot write"): BEMConfig(options=dict(a=SimpleNamespace())).to_yaml(tmp_path/"a.yml")
    assert list(tmp_path.iterdir()) == []

# -- experiments

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for d in "ab":
        (folder/d).mkdir()
        for i in range(40): (folder/d/f"{i}.txt").write_text(f"{d}{i} " + " ".join(str((i*7919 + j*j) % 997) for j in range(300)))
    return f"dir:{folder}"

def config(text, **kw): return BEMConfig(**{**dict(variant="bem-self", n_seeds=2, steps=3, lr=.02, corpus=text), **kw})

@pytest.fixture(scope="module")
def result(corpus): return run_experiment(config(corpus, experiment_name="try"), small_gpt(SHAPE), "cpu")

def test_an_experiment_is_a_fair_one(result):
    params, (variant, baseline) = [c["params_trainable"] for c in result.costs.values()], (np.array(result.scores[a]) for a in ("variant", "baseline"))
    assert variant.shape == baseline.shape == (2, len(result.domains)) and [c.slice for c in result.comparisons] == ["mixture", "a", "b"]
    assert .95 <= params[0]/params[1] <= 1.05 and result.lr == dict(variant=.02, baseline=.02)
    assert all(c.exploratory and c.p_adjusted >= .5 and c.verdict for c in result.comparisons)
    assert result.comparison.effect == pytest.approx((baseline - variant).mean()) and "bem-self" in result.summary() and "exploratory" in result.summary()

def test_the_same_experiment_has_the_same_result(result, corpus):
    torch.manual_seed(5); host = small_gpt(SHAPE).eval(); ids = torch.zeros(1, 9, dtype=torch.long); before = host(ids)
    again = run_experiment(config(corpus, experiment_name="try"), host, "cpu")
    assert again == result and not host.training and not hasattr(host, "adapters") and torch.equal(host(ids), before)
    assert all(p.requires_grad for p in host.parameters())
    assert again != again.model_copy(update=dict(data="0"))

def test_a_variant_against_itself_has_no_effect(corpus):
    r = run_experiment(config(corpus, variant="lora"), small_gpt(SHAPE), "cpu")
    assert (r.comparison.effect, r.comparison.p, r.comparison.verdict) == (0, 1, "inconclusive")

def test_a_hugging_face_host_that_reads_bytes(corpus):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0); host = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    c = config(corpus, variant="bem-hierarchical", options=dict(prefix=8, chunk=4))
    first, second = (run_experiment(c, host, "cpu") for _ in range(2))
    assert first == second and first.comparison.effect != 0 and not hasattr(host, "adapters")     # dropout and all

def test_a_host_with_other_tokens(corpus, one_sentence):
    tf = pytest.importorskip("transformers"); host = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50257, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    with one_sentence(UserError, "vocabulary of 50257", "your_model.ipynb"): run_experiment(config(corpus), host, "cpu")

@pytest.mark.parametrize("kw, says", [
    (dict(variant="lroa"), "no variant 'lroa'"), (dict(options=dict(rnak=1)), "no key 'rnak'"), (dict(seed=1000), "Seed 1000 is sealed"),
    (dict(seed=999), "Seed 1000 is sealed"), (dict(budget=2), "No rank pattern"), (dict(corpus="dir:nowhere"), "no folder"),
    (dict(corpus="wiki"), "no corpus 'wiki'"), (dict(profile="lptop"), "no profile 'lptop'")])
def test_an_experiment_that_makes_no_sense(kw, says, corpus, one_sentence):
    host = small_gpt(SHAPE)
    with one_sentence(UserError, says): run_experiment(config(corpus, **kw), host, "cpu")
    assert not hasattr(host, "adapters")

def test_the_paper_profile_opens_no_sealed_document(corpus):
    assert {r.split for rs in config(corpus, profile="paper").runs().values() for r in rs} == {"validation"}

def test_a_device_that_is_not_there(one_sentence):
    for name in ("gpu", "cuda:99"):
        with one_sentence(UserError, f"no device '{name}'"): find_device(name)

@pytest.mark.parametrize("where", ["loss", "score"])
def test_a_divergence_is_named_and_the_host_put_back(where, corpus, monkeypatch, one_sentence):
    if where == "loss": monkeypatch.setattr(bem.contracts, "train", lambda *a, **kw: ([1], [float("nan")]))
    else: monkeypatch.setattr(bem.contracts, "score", lambda model, ts, *a, **kw: [float("inf")]*len(ts))
    host = small_gpt(SHAPE)
    with one_sentence(UserError, "bem-self diverged at lr = 0.02 with seed 0"): run_experiment(config(corpus), host, "cpu")
    assert not hasattr(host, "adapters") and host.training

def test_a_result_comes_back_from_its_file(result, tmp_path, one_sentence):
    path = result.to_json(tmp_path/"r.json"); assert ExperimentResult.from_json(path).model_dump() == result.model_dump()
    text, changed = path.read_text(), lambda **kw: json.dumps({**json.loads(path.read_text()), **kw})
    for bad, says in {text[:-50]: "can be read", "[]": "holds a list", changed(more=1): "no key 'more'", changed(format=2): "format = 2"}.items():
        path.write_text(bad)
        with one_sentence(UserError, says): ExperimentResult.from_json(path)
    with one_sentence(UserError, "can be read"): ExperimentResult.from_json(tmp_path/"none.json")

# -- the tutorial, as somebody else meets it

def tutorial(**given):
    "Run the tutorial's cells with these parameters; its names."
    code, names = notebook_code(ROOT/"nbs"/"tutorials"/"your_model.ipynb"), {}
    for name, value in given.items():
        old = next(l for l in code.split("\n") if l.startswith(f"{name}:")); code = code.replace(old, f"{name} = {value!r}")
    exec(code, names); return names

@pytest.fixture
def words(tmp_path):
    for i in range(9): (tmp_path/f"{i}.txt").write_text(f"letter {i} " + " ".join(str(j*i % 101) for j in range(300)))
    (tmp_path/"image.png").write_bytes(bytes(range(256))*9)
    return tmp_path

def test_the_tutorial_refuses_a_folder_without_text(tmp_path, one_sentence):
    pytest.importorskip("transformers")
    with one_sentence(UserError, "has 0 files of UTF-8 text"): tutorial(folder=str(tmp_path))
    with one_sentence(UserError, "has 0 files of UTF-8 text"): tutorial(folder="nowhere")

@pytest.fixture
def saved(tmp_path, words):
    "A tiny model of a class, with a tokenizer that was made from the words."
    tf, tk = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    def save(model, config, **kw):
        tok = tk.Tokenizer(tk.models.BPE()); tok.pre_tokenizer, tok.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
        tok.train([str(words/"3.txt")], tk.trainers.BpeTrainer(vocab_size=300, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        folder = tmp_path/"model"; torch.manual_seed(0); getattr(tf, model)(getattr(tf, config)(vocab_size=300, **kw)).save_pretrained(folder)
        tf.PreTrainedTokenizerFast(tokenizer_object=tok).save_pretrained(folder); return str(folder)
    return save

def test_the_tutorial_adapts_a_saved_model_in_its_own_tokens(saved, words, tmp_path):
    model = saved("GPT2LMHeadModel", "GPT2Config", n_positions=64, n_embd=32, n_layer=2, n_head=2); import matplotlib; matplotlib.use("agg")
    names = tutorial(model_name=model, folder=str(words), out=str(tmp_path/"out"), steps=4, context=48, rank=8)
    assert len(names["held"]) == 3 and not any("png" in n for n in names["texts"]) and names["interval"].low < names["interval"].high
    assert {p.name for p in (tmp_path/"out").iterdir()} == {"lora", "bem-hierarchical"} and names["decode"](names["encode"]("letter 7 ")) == "letter 7 "

@pytest.mark.parametrize("model, config, kw, says", [
    ("BertLMHeadModel", "BertConfig", dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), "is not causal"),
    ("T5ForConditionalGeneration", "T5Config", dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), "could not be loaded as a causal language model")])
def test_the_tutorial_refuses_what_is_no_causal_model(model, config, kw, says, saved, words, one_sentence):
    with one_sentence(UserError, says): tutorial(model_name=saved(model, config, **kw), folder=str(words))

def test_the_tutorial_refuses_a_model_that_is_not_there(words, tmp_path, one_sentence):
    pytest.importorskip("transformers")
    with one_sentence(UserError, "neither a folder nor a name on the hub"): tutorial(model_name=str(tmp_path/"none"), folder=str(words))
