"What every registered variant promises, over random hosts, ranks, lengths and batches. A new variant is held to all of it without a word here."
import json, shutil, tempfile
from pathlib import Path
from typing import NamedTuple
import pytest, torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from bem.adapters.base import attach, count_parameters, fit_budget, get_variant, list_variants, load
from bem.core import UserError
from bem.host import Cache, HostConfig, decode_gap, future_leak, small_gpt
from bem.runs import PARAMS, arms, load_profile
from bem.side import DomainSide
from bem.sites import find_sites
from bem.train import TrainConfig, train

every_variant = pytest.mark.parametrize("name", sorted(list_variants()))
SHAPE = HostConfig(d_model=16, n_layer=2, n_head=2, context=24)

class Case(NamedTuple):
    "A host, an adapter's rank and an input."
    shape:HostConfig; rank:int; batch:int; tokens:int; seed:int

@st.composite
def cases(draw):
    heads = draw(st.sampled_from([1, 2, 3, 4])); d = heads*draw(st.integers(-(-8//heads), 48//heads))
    shape = HostConfig(d_model=d, n_layer=draw(st.integers(1, 3)), n_head=heads, context=draw(st.integers(8, 40)))
    return Case(shape, draw(st.integers(1, min(d, 12))), draw(st.integers(1, 4)), draw(st.integers(1, shape.context)), draw(st.integers(0, 99)))

def variant(name, **changes):
    "Configuration of a variant, with a prefix and chunks, where it has them, so short that short sequences have many of them."
    for short in (dict(chunk=3, prefix=2), dict(prefix=2)):
        try: return get_variant(name, **short, **changes)
        except UserError: pass
    return get_variant(name, **changes)

def told(adapter, rows):
    "The adapter with a side signal, if it reads one: the row of a sequence has its one at the number of the sequence."
    s = adapter.config.side_size()
    return adapter.give(torch.eye(s)[torch.as_tensor(rows) % s] if s else None)

def tokens(case, seed=0, n=None): return torch.randint(0, 256, (case.batch, n or case.tokens), generator=torch.Generator().manual_seed(case.seed + seed))

def stir(adapter, std=.1, seed=0):
    "Weights as if trained: every parameter moved."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): [p.add_(torch.randn(p.shape, generator=g)*std) for p in adapter.parameters()]
    return adapter

def adapted(name, case, **changes):
    host = small_gpt(case.shape, case.seed)
    return host, told(stir(attach(host, variant(name, rank=case.rank, **changes), case.seed)), range(case.batch))

def state(host):
    "Everything by which a trace of an adapter could be found."
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in host.named_modules()}
    return hooks, {n: p.requires_grad for n, p in host.named_parameters()}, set(vars(host))

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def copied(host): return {k: v.clone() for k, v in host.state_dict().items()}

@every_variant
@given(cases())
def test_starts_as_the_host(name, case):
    host, ids = small_gpt(case.shape, case.seed), tokens(case); before = host(ids)
    told(attach(host, variant(name, rank=case.rank), case.seed), range(case.batch))
    assert torch.equal(host(ids), before)

@every_variant
@given(cases(), st.data())
def test_is_causal_to_the_last_bit(name, case, data):
    host, _ = adapted(name, case)
    assert future_leak(host, tokens(case), data.draw(st.integers(0, case.tokens - 1))) == 0

@every_variant
@given(cases(), st.data())
def test_reads_in_pieces_what_it_reads_at_once(name, case, data):
    host, _ = adapted(name, case)
    assert decode_gap(host, tokens(case), data.draw(st.lists(st.integers(0, case.tokens), max_size=8))) < 1e-4

@every_variant
@given(cases(), st.data())
@torch.no_grad()
def test_rows_of_a_batch_are_strangers(name, case, data):
    host, adapter = adapted(name, case); ids, row = tokens(case), data.draw(st.integers(0, case.batch - 1))
    other = tokens(case, seed=1); other[row] = ids[row]; out = host(ids)[row]
    assert torch.equal(out, host(other)[row])
    told(adapter, [row]); torch.testing.assert_close(host(ids[row:row + 1])[0], out, rtol=1e-4, atol=1e-4)

@every_variant
@given(cases(), st.data())
@torch.no_grad()
def test_rows_of_a_cache_go_on_as_what_they_were(name, case, data):
    host, adapter = adapted(name, case); ids, cut = tokens(case, n=case.shape.context), data.draw(st.integers(1, case.shape.context - 1))
    rows, cache = torch.tensor(data.draw(st.lists(st.integers(0, case.batch - 1), min_size=1, max_size=5))), Cache()
    host(ids[:, :cut], cache); cache.reorder_cache(rows); told(adapter, rows)
    torch.testing.assert_close(host(ids[rows, cut:], cache), host(ids[rows])[:, cut:], rtol=1e-4, atol=1e-4)

@every_variant
@given(cases(), st.data())
def test_detaches_without_a_trace(name, case, data):
    host, ids = small_gpt(case.shape, case.seed), tokens(case)
    for p in host.parameters(): p.requires_grad_(data.draw(st.booleans()))
    out, weights, traces = host(ids).detach(), copied(host), state(host)
    adapter = told(stir(attach(host, variant(name, rank=case.rank))), range(case.batch)); assert not torch.equal(host(ids), out)
    assert adapter.detach() is host
    assert torch.equal(host(ids), out) and same(weights, copied(host)) and state(host) == traces
    attach(host, variant(name, rank=case.rank)).detach(); assert state(host) == traces      # and the host can be used again

@every_variant
@given(cases())
def test_gradient_reaches_the_adapter_and_only_it(name, case):
    host, ids = small_gpt(case.shape, case.seed), tokens(case, n=case.shape.context); weights = copied(host)
    config = variant(name, rank=case.rank, alpha=1.)        # no cap binds at this scale; one that does passes no gradient, as it should
    adapter = told(stir(attach(host, config, case.seed)), range(case.batch))
    own = {n for n, _ in adapter.named_parameters()}; opt = torch.optim.AdamW(adapter.parameters(), 1e-2)
    for _ in range(2):
        start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        opt.zero_grad(); nn.functional.cross_entropy(host(ids).flatten(0, 1), ids.flatten()).backward()
        assert {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == own
        opt.step(); assert not any(torch.equal(p, start[n]) for n, p in adapter.named_parameters())
    adapter.detach()
    assert all(p.grad is None for p in host.parameters()) and same(weights, copied(host))

@every_variant
@given(cases())
@settings(max_examples=4)
def test_training_moves_the_adapter_and_not_the_base(name, case):
    host = small_gpt(case.shape, case.seed); weights = copied(host); adapter = attach(host, variant(name, rank=case.rank))
    start, s = [p.detach().clone() for p in adapter.parameters()], adapter.config.side_size()
    source = DomainSide(["a", "b", "c", "d"][:s]) if s else None
    _, curve = train(host, {"a": [bytes(range(200))]}, TrainConfig(steps=3, batch=2, evals=1), case.shape.context, 0, {"a": [bytes(range(99))]}, source)
    assert len(curve) == 1 and curve[0] > 0 and not all(torch.equal(a, b) for a, b in zip(start, adapter.parameters()))
    adapter.detach(); assert same(weights, copied(host))

@every_variant
@given(cases())
def test_counts_what_is_there(name, case):
    host, config = small_gpt(case.shape), variant(name, rank=case.rank); n = count_parameters(config, host)
    adapter = attach(host, config)
    assert n == adapter.num_parameters() == sum(p.numel() for p in host.parameters() if p.requires_grad)

@every_variant
@given(cases(), st.integers(1, 60_000))
def test_meets_a_budget_or_says_why_not(name, case, budget):
    host = small_gpt(case.shape)
    try: config = fit_budget(variant(name), host, budget)
    except UserError as e: assert "No rank pattern" in str(e) and str(e).endswith(".")
    else: assert abs(attach(host, config).num_parameters()/budget - 1) <= .05

@pytest.mark.parametrize("rank", [4, 8, 16])      # a controller alone has more parameters than a LoRA of rank 2
def test_every_variant_meets_the_budget_of_a_lora(rank):
    host = small_gpt(); budget = count_parameters(get_variant("lora", rank=rank), host)
    found = {name: count_parameters(fit_budget(get_variant(name), host, budget), host)/budget for name in list_variants()}
    assert all(.95 <= f <= 1.05 for f in found.values()), found

@pytest.mark.parametrize("profile", [p.stem.removeprefix("profile-") for p in sorted(PARAMS.glob("profile-*.yml"))])
def test_every_arm_meets_the_budget_of_its_profile(profile):
    p = load_profile(profile); host = small_gpt(p.host); budget = count_parameters(p.at_sites(get_variant("lora", rank=p.lora_rank)), host)
    found = {v: count_parameters(fit_budget(p.at_sites(get_variant(v)), host, budget), host)/budget for v in arms(profile) if not v.startswith("peer-")}
    assert all(abs(f - 1) <= .05 for f in found.values()), found

@every_variant
@pytest.mark.parametrize("budget", [1, 10**9])
def test_refuses_an_impossible_budget(name, budget, one_sentence):
    with one_sentence(UserError, "No rank pattern", str(budget)): fit_budget(variant(name), small_gpt(SHAPE), budget)

@every_variant
@given(d=st.integers(8, 24), above=st.integers(1, 99), single=st.booleans())
def test_refuses_a_rank_above_the_width(name, d, above, single, one_sentence):
    host = small_gpt(HostConfig(d_model=d, n_layer=1, n_head=1, context=8)); traces = state(host)
    rank = dict(rank=1, rank_pattern={find_sites(host, variant(name).sites)[-1].name: d + above}) if single else dict(rank=d + above)
    with one_sentence(UserError, f"Rank {d + above}", f"1 to {d}"): attach(host, variant(name, **rank))
    assert state(host) == traces

def test_a_refused_adapter_leaves_the_host_alone(one_sentence):
    host = small_gpt(SHAPE)
    with torch.no_grad(): host.blocks[1].mlp.down.weight[:, 4:] = 0      # too few directions for a spectral core, found at the last site
    traces = state(host)
    with one_sentence(UserError, "has only 4 singular directions"): attach(host, variant("spectral", rank=8))
    assert state(host) == traces

# -- files

@every_variant
@given(cases())
def test_comes_back_from_disk(name, case):
    host, adapter = adapted(name, case, rank_pattern={find_sites(small_gpt(case.shape), variant(name).sites)[0].name: 1}); ids = tokens(case); out = host(ids)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder); adapter.detach()
        assert sorted(p.name for p in Path(folder).iterdir()) == ["adapter.safetensors", "adapter_config.json"]
        again = told(load(host, folder), range(case.batch))
    assert again.config == adapter.config and torch.equal(host(ids), out)

def edit(folder, **changes):
    path = folder/"adapter_config.json"; meta = json.loads(path.read_text()); meta["config"] |= changes.pop("config", {})
    path.write_text(json.dumps(meta | changes))
def cut(path): path.write_bytes(path.read_bytes()[:-100])

DAMAGE = {
    "truncated weights":       (lambda f: cut(f/"adapter.safetensors"), "no adapter that can be read"),
    "empty weights":           (lambda f: (f/"adapter.safetensors").write_bytes(b""), "no adapter that can be read"),
    "no weights":              (lambda f: (f/"adapter.safetensors").unlink(), "no adapter that can be read"),
    "no configuration":        (lambda f: (f/"adapter_config.json").unlink(), "no adapter that can be read"),
    "no folder":               (shutil.rmtree, "no adapter that can be read"),
    "truncated configuration": (lambda f: cut(f/"adapter_config.json"), "no adapter that can be read"),
    "configuration of a list": (lambda f: (f/"adapter_config.json").write_text("[]"), "no adapter that can be read"),
    "unknown key":             (lambda f: edit(f, config=dict(rnak=3)), "has no key 'rnak'"),
    "wrong type":              (lambda f: edit(f, config=dict(rank="8")), "rank = '8'"),
    "foreign format":          (lambda f: edit(f, format=2), "format 2"),
    "foreign code":            (lambda f: edit(f, module="os", type="system"), "No variant with a system is registered"),
    "another rank":            (lambda f: edit(f, config=dict(rank=3)), "do not fit its adapter_config.json"),
    "another host":            (lambda f: edit(f, host="0"*16), "was trained on the host 0000000000000000")}

@every_variant
@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_a_damaged_folder(name, damage, tmp_path, one_sentence):
    case = Case(SHAPE, 4, 2, 20, 0); host, adapter = adapted(name, case); adapter.save(tmp_path/"a"); adapter.detach()
    break_it, says = DAMAGE[damage]; break_it(tmp_path/"a"); out, traces = host(tokens(case)), state(host)
    with one_sentence(UserError, says): load(host, tmp_path/"a")
    assert state(host) == traces and torch.equal(host(tokens(case)), out)

@every_variant
def test_refuses_the_weights_of_another_host(name, tmp_path, one_sentence):
    _, adapter = adapted(name, Case(SHAPE, 4, 1, 1, 0)); adapter.save(tmp_path)
    with one_sentence(UserError, "load that host first"): load(small_gpt(SHAPE, 1), tmp_path)

def test_refuses_a_second_adapter_of_one_name_or_at_one_site(one_sentence):
    host, _ = adapted("lora", Case(SHAPE, 4, 1, 1, 0)); traces = state(host)
    with one_sentence(UserError, "an adapter named 'default' already"): attach(host, "lora")
    with one_sentence(UserError, "blocks.0.attn.out has the adapter 'default' already"): attach(host, "lora", name="second")
    assert state(host) == traces
