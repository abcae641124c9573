"Adapters on Hugging Face decoders: what they promise, how they generate, how they train, and what they refuse."
import copy, gc, json, shutil, socket
import pytest, torch, torch.nn as nn
import transformers as hf
from hypothesis import given, settings, strategies as st
from bem.adapters.base import attach, get_variant, list_variants, load
from bem.adapters.generated import GeneratedConfig
from bem.adapters.lora import LoraConfig
from bem.core import NonFiniteError, UserError
from bem.host import Cache, HostConfig, small_gpt
from bem.hub import load_host
from bem.sites import find_sites

hf.logging.set_verbosity_error(); hf.logging.disable_progress_bar()

@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args): raise AssertionError("a test asked for a network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse); monkeypatch.setattr(socket.socket, "connect", refuse)

CHUNK, PREFIX, VOCAB = 3, 4, 97
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: .04}       # of a logit, relative to the largest one
SHARED = dict(vocab_size=VOCAB, initializer_range=.15, bos_token_id=0, eos_token_id=0, pad_token_id=0)

WIDE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)

def gpt2(): return hf.GPT2LMHeadModel(hf.GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
def llama(): return hf.LlamaForCausalLM(hf.LlamaConfig(**SHARED, **WIDE, num_key_value_heads=2))
def small(): return small_gpt(HostConfig(d_model=32, n_layer=2, n_head=4, context=64))
HUB, HOSTS = dict(gpt2=gpt2, llama=llama), dict(gpt2=gpt2, llama=llama, small=small)

short = dict(rank=4, hidden=8)
chunked, prefixed = dict(**short, chunk=CHUNK, prefix=PREFIX, heads=2), dict(**short, prefix=PREFIX, heads=2)
def inside(level, **kw): return GeneratedConfig(level="self", context=level, **kw)
LEVELS = dict(
    lora=LoraConfig(rank=4), constant=GeneratedConfig(level="constant", rank=4), self=GeneratedConfig(level="self", rank=4),
    prefix=GeneratedConfig(level="prefix", **prefixed), chunk=GeneratedConfig(**chunked), token=GeneratedConfig(level="token", **prefixed),
    self_prefix=inside("prefix", **prefixed), self_chunk=inside("chunk", **chunked), self_token=inside("token", **prefixed),
    uncertain=GeneratedConfig(uncertainty=True, **chunked), smooth=GeneratedConfig(ema=.6, **chunked),
    governed=GeneratedConfig(orthonormal=True, max_singular_value=1., max_frobenius=1.5, **chunked),
    everywhere=GeneratedConfig(sites=["qkv", "attn_out", "mlp_up", "mlp_down"], cache_policy="chunked_qkv", **chunked),
    lagged=get_variant("bem-lagged", rank=4, sites=["attn_out", "mlp_down", "head"]),
    **{n: get_variant(n, rank=4) for n in ("control-nonlinear", "control-shuffled", "control-random", "spectral", "spectral-self")})
CONTROLLERS = {n: c.build(small_gpt()).controller for n, c in LEVELS.items()}
WRITTEN = [n for n, c in CONTROLLERS.items() if c is not None and list(c.parameters())]           # levels whose codes are learned

SOME = ["prefix", "chunk", "self_token", "everywhere"]

every_host = pytest.mark.parametrize("host", HOSTS)
every_hub_host = pytest.mark.parametrize("host", HUB)
every_level = pytest.mark.parametrize("level", LEVELS)
every_written_level, some_levels = pytest.mark.parametrize("level", WRITTEN), pytest.mark.parametrize("level", SOME)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
CASES = [(h, d) for h in HOSTS for d in (torch.float32, torch.bfloat16) if (h, d) != ("small", torch.float32)]      # that one has tests of its own
every_case = pytest.mark.parametrize("host, dtype", CASES, ids=[f"{h}-{str(d)[6:]}" for h, d in CASES])

def build(host, dtype=torch.float32, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed); return HOSTS[host]().to(dtype).eval()
def stir(adapter, std=.3, seed=0):
    "Weights as if trained, and strongly."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): [p.copy_(torch.randn(p.shape, generator=g)*std) for p in adapter.parameters()]
    return adapter
def adapted(host, level, dtype=torch.float32, **kw):
    model = build(host, dtype)
    return model, stir(attach(model, LEVELS[level], **kw))
def tokens(b, t, seed=0): return torch.randint(1, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))
def logits(model, ids, cache=None, **kw):
    "Logits of any host."
    if isinstance(model, hf.PreTrainedModel): return model(ids, past_key_values=cache, use_cache=cache is not None, **kw).logits
    return model(ids, cache)
def new_cache(model): return hf.DynamicCache() if isinstance(model, hf.PreTrainedModel) else Cache()
def changed(model, before): return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
def own(adapter): return {f"adapters.{adapter.name}.{n}" for n, _ in adapter.named_parameters()}
def copied(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def traces(model):
    "Everything by which an adapter could be found."
    hooks = {n: [len(h) for k, h in vars(m).items() if k.endswith("_hooks")] for n, m in model.named_modules()}
    return hooks, {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()}, set(vars(model)), list(model._modules)
def close(a, b, dtype): assert (a - b).abs().max() <= TOLERANCE[dtype]*b.abs().max()

# -- what every level promises on every host in every precision

@every_case
@every_level
@torch.no_grad()
def test_starts_as_the_host_and_leaves_no_trace(host, level, dtype):
    model, ids = build(host, dtype), tokens(2, 20)
    for i, p in enumerate(model.parameters()): p.requires_grad_(i % 2 == 0)
    out, weights, before = logits(model, ids), copied(model), traces(model)
    adapter = attach(model, LEVELS[level]); assert torch.equal(logits(model, ids), out)
    stir(adapter); assert not torch.equal(logits(model, ids), out)
    assert adapter.detach() is model and torch.equal(logits(model, ids), out) and same(copied(model), weights) and traces(model) == before

@every_case
@every_level
@torch.no_grad()
def test_is_causal_to_the_last_bit_and_rows_are_strangers(host, level, dtype):
    model, _ = adapted(host, level, dtype); ids = tokens(3, 20); out = logits(model, ids)
    for t in (1, 3, 5, 12, 19):
        other = ids.clone(); other[:, t:] = other[:, t:] % (VOCAB - 1) + 1
        assert torch.equal(logits(model, other)[:, :t], out[:, :t]) and not torch.equal(logits(model, other)[:, t:], out[:, t:])
    other = tokens(3, 20, seed=1); other[1] = ids[1]
    assert torch.equal(logits(model, other)[1], out[1])

@every_case
@every_level
@given(st.lists(st.integers(1, 29), max_size=7), st.integers(0, 99))
@settings(max_examples=3)
@torch.no_grad()
def test_reads_in_pieces_what_it_reads_at_once(host, level, dtype, cuts, seed):
    model, _ = adapted(host, level, dtype); ids, cache = tokens(2, 30, seed), new_cache(model); edges = [0, *sorted({*cuts}), 30]
    pieces = torch.cat([logits(model, ids[:, a:b], cache) for a, b in zip(edges, edges[1:])], 1)
    close(pieces, logits(model, ids), dtype)

@every_case
@every_level
def test_gradient_reaches_the_adapter_and_only_it(host, level, dtype):
    model, adapter = adapted(host, level, dtype); ids, weights = tokens(2, 20), copied(model)
    nn.functional.cross_entropy(logits(model, ids).flatten(0, 1).float(), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in adapter.parameters())
    adapter.detach(); assert all(p.grad is None for p in model.parameters()) and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

@every_case
@every_level
@torch.no_grad()
def test_comes_back_from_disk_and_only_on_its_host(host, level, dtype, tmp_path, one_sentence):
    model, adapter = adapted(host, level, dtype); ids = tokens(2, 20); out = logits(model, ids)
    adapter.save(tmp_path); adapter.detach()
    again = load(model, tmp_path); assert again.config == adapter.config and torch.equal(logits(model, ids), out)
    other = build(host, dtype, seed=1) if host != "small" else small_gpt(model.config, seed=1).to(dtype); before = traces(other)
    with one_sentence(UserError, "load that host first"): load(other, tmp_path)
    assert traces(other) == before

# -- generation

def ragged(lengths=(5, 11, 8), seed=2):
    "Left-padded prompts."
    n = max(lengths); ids, mask = tokens(len(lengths), n, seed), torch.ones(len(lengths), n, dtype=torch.long)
    for i, l in enumerate(lengths): ids[i, :n - l] = 0; mask[i, :n - l] = 0
    return dict(input_ids=ids, attention_mask=mask)
def continued(model, prompts, n=13, **kw):
    "New tokens; none of the rows ends early."
    torch.manual_seed(5)
    return model.generate(**prompts, max_new_tokens=n, eos_token_id=None, pad_token_id=0, **{**dict(do_sample=False), **kw})[:, prompts["input_ids"].shape[1]:]

GREEDY, BEAMS, SAMPLING, SAMPLED_BEAMS = {}, dict(num_beams=3), dict(do_sample=True, top_k=20), dict(num_beams=2, do_sample=True, num_return_sequences=2)

@every_hub_host
@pytest.mark.parametrize("level, mode", [
    *((l, GREEDY) for l in WRITTEN), *((l, BEAMS) for l in SOME), ("chunk", SAMPLING), ("self_token", SAMPLING), ("chunk", SAMPLED_BEAMS)],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "greedy")
def test_generates_the_same_with_and_without_a_cache(host, level, mode):
    model, adapter = adapted(host, level); prompts = ragged(); with_cache = continued(model, prompts, 22, **mode)
    assert torch.equal(with_cache, continued(model, prompts, 22, use_cache=False, **mode))
    adapter.detach(); assert not torch.equal(with_cache, continued(model, prompts, 22, **mode))

@every_hub_host
@some_levels
@pytest.mark.parametrize("how", [dict(cache_implementation="static"), dict(prefill_chunk_size=4)], ids=["static", "pieces"])
def test_generates_the_same_with_a_cache_of_fixed_size_and_in_pieces(host, level, how):
    model, _ = adapted(host, level); prompts = ragged()
    assert torch.equal(continued(model, prompts, **how), continued(model, prompts, use_cache=False))

OTHERS = dict(
    flat=lambda: hf.OPTForCausalLM(hf.OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, init_std=.15, max_position_embeddings=64)),
    wide_mask=lambda: hf.BloomForCausalLM(hf.BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4)),
    sliding=lambda: hf.MistralForCausalLM(hf.MistralConfig(**SHARED, **WIDE, num_key_value_heads=2, sliding_window=8)))

@pytest.mark.parametrize("family", OTHERS)       # one flattens its sequences, one is given a mask as wide as the cache, one forgets keys
@pytest.mark.parametrize("level", ["chunk", "self_token", "lagged"])
def test_other_families_generate_the_same_too(family, level):
    torch.manual_seed(0); model = OTHERS[family]().eval(); prompts = ragged(); bare = continued(model, prompts)
    stir(attach(model, LEVELS[level])); alone = continued(model, prompts, use_cache=False)
    for how in ({}, dict(cache_implementation="static")): assert torch.equal(continued(model, prompts, **how), alone)
    assert not torch.equal(alone, bare)

def test_a_past_that_does_not_count_its_tokens_is_refused(one_sentence):
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)).eval(); ids = tokens(1, 5)
    attach(model, LEVELS["chunk"]); model(ids, use_cache=False)
    with one_sentence(UserError, "does not count its tokens", "use_cache=False"): model(ids, use_cache=True)

@every_hub_host
@some_levels
def test_a_padded_row_generates_what_it_generates_alone(host, level):
    model, _ = adapted(host, level); prompts = ragged(); together = continued(model, prompts)
    for i, l in enumerate((5, 11, 8)): assert torch.equal(together[i:i + 1], continued(model, {k: v[i:i + 1, -l:] for k, v in prompts.items()}))

@every_hub_host
@every_dtype
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit_of_a_token(host, dtype):
    model, _ = adapted(host, "self_chunk", dtype); ids = tokens(1, 9); alone = logits(model, ids)
    for left, right in ((4, 0), (0, 4)):
        padded = nn.functional.pad(ids, (left, right)); mask = (padded > 0).long(); places = (mask.cumsum(1) - 1).clamp(min=0)
        close(logits(model, padded, attention_mask=mask, position_ids=places)[:, left:left + 9], alone, dtype)

@every_hub_host
@every_written_level
@torch.no_grad()
def test_what_is_in_the_cache_stays_as_it_is(host, level):
    model, _ = adapted(host, level); ids, cache, seen = tokens(2, 24), hf.DynamicCache(), []
    for a, b in ((0, 5), (5, 6), (6, 13), (13, 14), (14, 24)):
        logits(model, ids[:, a:b], cache)
        for old in seen: assert all(torch.equal(x, y[:, :, :x.shape[2]]) for x, y in zip(old, [t for l in cache.layers for t in (l.keys, l.values)]))
        seen.append([t.clone() for l in cache.layers for t in (l.keys, l.values)])

@every_hub_host
def test_reports_how_often_a_code_was_at_hand(host, one_sentence):
    model, adapter = adapted(host, "chunk"); prompts, n = ragged(), 20; continued(model, prompts, n)
    read = prompts["attention_mask"].sum(1) + n - 1; report = adapter.cache_report()       # the last token is never read
    assert report == dict(lookups=int(read.sum()), evaluations=int((read//CHUNK).sum()), hit_rate=1 - int((read//CHUNK).sum())/int(read.sum()), invalidations=0)
    cache = hf.DynamicCache(); logits(model, tokens(2, 7), cache); cache.crop(-1)
    with one_sentence(UserError): logits(model, tokens(2, 1), cache)
    assert adapter.cache_report()["invalidations"] == 1

def cropped(model, adapter, cache): logits(model, tokens(2, 7), cache); cache.crop(-2)
def foreign(model, adapter, cache):
    with adapter.disabled(): logits(model, tokens(2, 7), cache)
def other_batch(model, adapter, cache): logits(model, tokens(3, 7), cache)

@every_hub_host
@every_written_level
@pytest.mark.parametrize("spoil, says", [
    (cropped, "holds 5 tokens and this adapter has read 7"), (foreign, "holds 7 tokens and this adapter has read 0"),
    (other_batch, "of a batch of 3, the input of 2")])
@torch.no_grad()
def test_refuses_a_cache_that_is_not_its_own(host, level, spoil, says, one_sentence):
    model, adapter = adapted(host, level); cache = hf.DynamicCache(); spoil(model, adapter, cache); held = [l.keys.clone() for l in cache.layers]
    with one_sentence(UserError, says, "begin with a new cache"): logits(model, tokens(2, 1), cache)
    assert adapter.invalidations == 1 and all(torch.equal(k, l.keys) for k, l in zip(held, cache.layers))

def test_says_so_when_generation_shortens_the_cache(one_sentence):
    model, _ = adapted("llama", "chunk"); ids = tokens(1, 4).repeat(1, 4)
    with one_sentence(UserError, "do not shorten it"): continued(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), prompt_lookup_num_tokens=3)

@every_hub_host
@some_levels
@torch.no_grad()
def test_a_prompt_is_read_once_and_continued_often(host, level):
    model, _ = adapted(host, level); prompt, prefilled = tokens(1, 8), hf.DynamicCache(); logits(model, prompt, prefilled)
    for seed in (7, 8):
        ids = torch.cat([prompt, tokens(1, 3, seed)], 1); prompts = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(continued(model, prompts, past_key_values=copy.deepcopy(prefilled)), continued(model, prompts, use_cache=False))
    prefilled.batch_repeat_interleave(3); ids = tokens(3, 7, 9)
    close(logits(model, ids, prefilled), logits(model, torch.cat([prompt.expand(3, -1), ids], 1))[:, 8:], torch.float32)

# -- training

def loss_of(model, ids): return nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
def gradients(model, adapter, ids):
    adapter.zero_grad(); loss_of(model, ids).backward()
    return {n: p.grad.clone() for n, p in adapter.named_parameters()}
def checkpointed(model, reentrant=False):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant}); return model.train()

@every_host
@pytest.mark.parametrize("level", ["lora", "self", "chunk", "self_chunk", "token"])
def test_a_plain_loop_learns(host, level):
    model = build(host); adapter, ids = attach(model.train(), LEVELS[level]), tokens(4, 24); weights = copied(model)
    opt, losses = torch.optim.AdamW(adapter.parameters(), 3e-2), []
    for _ in range(8): opt.zero_grad(); loss = loss_of(model, ids); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1] < losses[0] - .05
    assert changed(model, weights) == own(adapter)

@every_hub_host
@pytest.mark.parametrize("how", [{}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)), dict(bf16=True)],
    ids=["plain", "checkpointed", "bf16"])
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_the_trainer_of_the_hub_learns(host, how, tmp_path):
    model = build(host); adapter, ids = attach(model, LEVELS["self_chunk"]), tokens(4, 24); weights = copied(model)
    quiet = dict(logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    args = hf.TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=3e-2, **quiet, **how)
    trainer = hf.Trainer(model, args, train_dataset=[dict(input_ids=i, labels=i) for i in ids]); trainer.train()
    losses = [l["loss"] for l in trainer.state.log_history if "loss" in l]
    assert len(losses) == 8 and losses[-1] < losses[0] - .05 and changed(model, weights) == own(adapter)

@every_hub_host
@every_level
def test_checkpointed_blocks_give_the_same_gradients(host, level):
    model, adapter = adapted(host, level); ids = tokens(2, 20); plain = gradients(model.train(), adapter, ids)
    with_blocks_twice = gradients(checkpointed(model), adapter, ids)
    for n, g in plain.items(): torch.testing.assert_close(with_blocks_twice[n], g, msg=lambda m, n=n: f"{n}: {m}")

@every_hub_host
def test_an_evaluation_between_forward_and_backward_changes_no_gradient(host):
    model, adapter = adapted(host, "self_chunk"); ids = tokens(2, 20); plain = gradients(checkpointed(model), adapter, ids)
    adapter.zero_grad(); loss = loss_of(model, ids)
    with torch.no_grad(): model(tokens(3, 9))
    loss.backward(); assert all(torch.equal(p.grad, plain[n]) for n, p in adapter.named_parameters())

@every_hub_host
@pytest.mark.parametrize("level", ["chunk", "lagged", "control-shuffled"])
def test_two_forward_passes_before_one_backward_under_checkpointing_are_refused(host, level, one_sentence):
    model, adapter = adapted(host, level); checkpointed(model)
    with one_sentence(UserError, "2 forward passes wait"): (loss_of(model, tokens(2, 9)) + loss_of(model, tokens(2, 9, 1))).backward()
    gc.collect(); gradients(model, adapter, tokens(2, 9))                                   # and nothing is left of it
    model.eval(); (loss_of(model, tokens(2, 9)) + loss_of(model, tokens(2, 9, 1))).backward()   # without checkpointing it is allowed

@every_hub_host
@every_written_level
def test_reentrant_checkpointing_is_refused_where_it_loses_gradients(host, level, tmp_path, one_sentence):
    model, adapter = adapted(host, level); checkpointed(model, reentrant=True); says = "gradient_checkpointing_kwargs={'use_reentrant': False}"
    with one_sentence(UserError, "Reentrant", says): loss_of(model, tokens(2, 9))
    model.eval()(tokens(2, 9))                                                              # nothing is checkpointed here

@every_hub_host
@pytest.mark.parametrize("level", [n for n in LEVELS if CONTROLLERS[n] is None])
def test_reentrant_checkpointing_is_right_without_a_controller(host, level):
    model, adapter = adapted(host, level); ids = tokens(2, 20); plain = gradients(model.train(), adapter, ids)
    twice = gradients(checkpointed(model, reentrant=True), adapter, ids)
    for n, g in plain.items(): torch.testing.assert_close(twice[n], g)

@every_host
@every_level
def test_autocast(host, level):
    model, adapter = adapted(host, level); ids = tokens(2, 20); stir(adapter, .1); exact = logits(model, ids).detach()
    with torch.autocast("cpu", torch.bfloat16): out = logits(model, ids); loss = nn.functional.cross_entropy(out.flatten(0, 1).float(), ids.flatten())
    loss.backward(); close(out.float(), exact, torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in adapter.parameters())

# -- two adapters, copies, conversions

@every_hub_host
@pytest.mark.parametrize("first, second, order", [("chunk", "self_token", 1), ("chunk", "self_token", -1), ("self", "prefix", 1)])
def test_two_adapters_keep_to_their_sites(host, first, second, order):
    model, prompts = build(host), ragged(); bare, before = continued(model, prompts), traces(model)
    put = lambda l, site: stir(attach(model, LEVELS[l].model_copy(update=dict(sites=[site])), name=l))
    pair = [put(first, "attn_out"), put(second, "mlp_down")][::order]
    both = continued(model, prompts, **BEAMS); assert torch.equal(both, continued(model, prompts, use_cache=False, **BEAMS))
    pair[0].detach(); one = continued(model, prompts); assert torch.equal(one, continued(model, prompts, use_cache=False)) and not torch.equal(both, one)
    pair[1].detach(); assert torch.equal(continued(model, prompts), bare) and traces(model) == before and not torch.equal(one, bare)

@every_hub_host
def test_a_copied_host_has_adapters_of_its_own(host):
    model, adapter = adapted(host, "self_chunk"); ids = tokens(2, 20); gradients(model, adapter, ids); out = logits(model, ids)
    twin = copy.deepcopy(model); theirs = twin.adapters["default"]; assert torch.equal(logits(twin, ids), out) and theirs.host is twin
    stir(theirs, seed=1); assert torch.equal(logits(model, ids), out) and not torch.equal(logits(twin, ids), out)
    theirs.detach(); adapter.detach(); assert torch.equal(logits(model, ids), logits(twin, ids)) and traces(model)[0] == traces(twin)[0]

@every_hub_host
@pytest.mark.parametrize("level", [n for n in LEVELS if "spectral" not in n])        # those take their directions from the host's weights as they are stored
@torch.no_grad()
def test_a_host_may_change_its_precision_under_an_adapter(host, level):
    model, adapter = adapted(host, level); fresh, _ = adapted(host, level, torch.bfloat16); ids = tokens(2, 20)
    model.to(torch.bfloat16); assert torch.equal(logits(model, ids), logits(fresh, ids)) and {p.dtype for p in adapter.parameters()} == {torch.float32}

@pytest.mark.parametrize("name", sorted(list_variants()))
def test_every_registered_variant_generates_and_trains_here(name):
    model = build("llama"); adapter = stir(attach(model, get_variant(name, rank=4))); sides = torch.eye(3, s) if (s := adapter.config.side_size()) else None
    prompts = ragged((31, 5, 36)); adapter.give(sides); assert torch.equal(continued(model, prompts), continued(model, prompts, use_cache=False))
    ids = tokens(3, 40); plain = gradients(model.train(), adapter, ids); twice = gradients(checkpointed(model), adapter, ids)
    for n, g in plain.items(): torch.testing.assert_close(twice[n], g)

# -- what is refused

def bert(): return hf.BertModel(hf.BertConfig(vocab_size=VOCAB, **WIDE))
def bart():
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in dict(layers=1, attention_heads=4, ffn_dim=48).items()}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, **sides))
def t5(): return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))

@every_hub_host
def test_loads_a_host_from_a_folder(host, tmp_path):
    model, ids = build(host), tokens(2, 20); model.save_pretrained(tmp_path); again = load_host(tmp_path)
    assert not again.training and torch.equal(logits(again, ids), logits(model, ids)) and load_host(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16

def pickled(folder):
    llama().save_pretrained(folder); (folder/"model.safetensors").unlink(); torch.save(llama().state_dict(), folder/"pytorch_model.bin")

@pytest.mark.parametrize("fill, says", [
    (pickled, "could not be loaded"), (lambda d: None, "could not be loaded"),
    (lambda d: bert().save_pretrained(d), "is not causal"), (lambda d: t5().save_pretrained(d), "could not be loaded"),
    (lambda d: (llama().save_pretrained(d), (d/"model.safetensors").write_bytes(b"x"*9)), "could not be loaded")],
    ids=["pickled", "empty", "bert", "t5", "damaged"])
def test_refuses_a_folder_without_a_decoder(fill, says, tmp_path, one_sentence):
    fill(tmp_path)
    with one_sentence(UserError, says): load_host(tmp_path)

@pytest.mark.parametrize("name, says", [
    ("./nowhere", "neither a folder nor a name on the hub"), ("a/b/c", "neither a folder nor a name"), ("", "neither"),
    ("nobody/nothing", "could not be loaded")])
def test_refuses_a_name_that_is_nowhere(name, says, one_sentence):
    with one_sentence(UserError, says, f"'{name}'"): load_host(name, local_files_only=True)

def test_says_when_transformers_is_missing(monkeypatch, one_sentence):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with one_sentence(UserError, "pip install 'bem[hub]'"): load_host("gpt2")

@pytest.mark.parametrize("make, says", [(bert, "is not causal"), (bart, "is not causal"), (t5, "could not read two tokens")])
def test_refuses_what_is_no_decoder(make, says, one_sentence):
    model = make(); before = traces(model)
    with one_sentence(UserError, says): attach(model, LEVELS["chunk"])
    assert traces(model) == before

@every_dtype
@pytest.mark.parametrize("scale", [.02, 1.])
def test_a_causal_host_is_never_taken_for_an_encoder(dtype, scale):
    for seed in range(3):
        for make in (gpt2, llama):
            torch.manual_seed(seed); model = make()
            for p in model.parameters(): p.data.normal_(0, scale)
            assert len(find_sites(model.to(dtype))) == 4

@every_hub_host
@pytest.mark.parametrize("config, says", [
    (dict(chunk=64), "chunk = 64 is not shorter than the host's context of 64"), (dict(level="prefix", prefix=64), "prefix = 64 never ends"),
    (dict(sites=["nowhere"]), "has no site 'nowhere'"), (dict(sites="q_proj("), "is no regular expression"),
    (dict(sites=["lm_head"]), "lm_head is the head"), (dict(cache_policy="loose"), "There is no cache policy 'loose'"),
    (dict(level="token", sites=["qkv"]), "allows no code at"), (dict(level="token", sites=["qkv"], cache_policy="chunked_qkv"), "allows codes per chunk at"),
    (dict(level="self", sites=["qkv"], cache_policy="chunked_qkv"), "allows codes per chunk at"),
    (dict(rank=33), "Rank 33"), (dict(rank_pattern={"nowhere": 2}), "is no site of this host")])
def test_refuses_a_configuration_that_cannot_be(host, config, says, one_sentence):
    model = build(host); before = traces(model)
    with one_sentence(UserError, says): attach(model, GeneratedConfig(**config))
    assert traces(model) == before

@every_hub_host
def test_refuses_a_site_that_is_taken(host, one_sentence):
    model, _ = adapted(host, "chunk"); before = traces(model)
    with one_sentence(UserError, "has the adapter 'default' already"): attach(model, LEVELS["lora"], name="second")
    with one_sentence(UserError, "has an adapter named 'default' already"): attach(model, LEVELS["lora"])
    assert traces(model) == before

@every_hub_host
@every_written_level
def test_refuses_codes_that_are_not_finite(host, level, one_sentence):
    model, _ = adapted(host, level); model.get_input_embeddings().weight.data[5] = torch.nan
    with torch.no_grad(), one_sentence(NonFiniteError, "codes that are not finite"): model(torch.tensor([[5]*6]))

def test_refuses_a_checkpoint_of_another_host_or_configuration(tmp_path, one_sentence):
    model, adapter = adapted("llama", "chunk"); adapter.save(tmp_path); adapter.detach(); path = tmp_path/"adapter_config.json"
    with one_sentence(UserError, "has no site"): load(build("gpt2"), _renamed(tmp_path, "o_proj"))
    with one_sentence(UserError, "load that host first"): load(build("gpt2"), tmp_path)
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    with one_sentence(UserError, "do not fit its adapter_config.json"): load(model, tmp_path)
    path.write_text(path.read_text().replace('"hidden": 8', '"hidden": 9'))
    with one_sentence(UserError, "must divide hidden = 9"): load(model, tmp_path)

def _renamed(folder, site):
    "The same folder for an adapter at a site by name."
    other = shutil.copytree(folder, folder/"named"); path = other/"adapter_config.json"; meta = json.loads(path.read_text()); meta["config"]["sites"] = [site]
    path.write_text(json.dumps(meta)); return other

@every_hub_host
def test_refuses_packed_sequences_and_masks_that_do_not_show_padding(host, one_sentence):
    model, _ = adapted(host, "chunk"); ids = tokens(1, 8)
    with one_sentence(UserError, "one sequence per row"): model(ids, position_ids=torch.arange(4).repeat(2)[None])
    with one_sentence(UserError, "give one of shape (sequences, tokens)"): model(ids, attention_mask=torch.ones(1, 1, 3, 8, dtype=torch.bool))

@every_hub_host
def test_says_when_the_first_block_was_left_out(host, one_sentence):
    model, _ = adapted(host, "chunk"); blocks = getattr(model.base_model, "h", None) or model.base_model.layers
    model(tokens(1, 8)); first, blocks[0] = blocks[0], nn.Identity(); blocks[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with one_sentence(UserError, "reached before the host's first block"): model(tokens(1, 8))
    blocks[0] = first; model(tokens(1, 8))
