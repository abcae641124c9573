"The O(N) model under faults: every run ends finite, or with the sentence that is documented."
import math
import random
import pytest
import torch
import torch.nn.functional as F
from bem.data import Sampler
from bem.host import future_leak
from bem.resnet_bk.block import ResNetBKConfig
from bem.resnet_bk.model import ResNetBKEncoder, resnet_bk
from bem.resnet_bk.presets import PRESETS, ConfigurableResNetBK
from bem.trainer import Trainer, TrainerConfig

TEXT = {"a": [bytes(range(65, 91))*8], "b": [b"0123456789"*20]}
KINDS = ["nan", "inf", "explode", "spike", "weight"]
SMALL = dict(d_model=16, n_layer=1, n_seq=16, num_experts=2)

class Faulty(Trainer):
    "A trainer into which faults are put, by step."
    def gradient(self, y):
        kind = self.faults.get(self.step)
        if kind == "weight": self.params[-1].data.view(-1)[0] = random.choice([math.nan, math.inf])
        loss, total, s = super().gradient(y); g = random.choice([p.grad for p in self.params if p.grad is not None]).view(-1)
        if kind in ("nan", "inf"): g[random.randrange(len(g))] = float(kind)
        if kind == "explode": g.mul_(1e8)
        return (loss*9, total*9, s) if kind == "spike" else (loss, total, s)

@pytest.mark.parametrize("seed", range(100))
def test_a_run_with_faults_ends_finite_or_says_why(seed):
    random.seed(seed); model = resnet_bk(ResNetBKConfig(**SMALL, heads=1 + seed % 3, form=("scalar", "vector", "matrix")[seed % 3]), seed)
    t = Faulty(model, Sampler(TEXT, 16, seed), TrainerConfig(steps=12, batch=4, lr=1e-2))
    t.faults = {random.randrange(1, 12): random.choice(KINDS) for _ in range(random.randrange(1, 9))}
    try: t.run()
    except RuntimeError as e: assert "every remedy is spent" in str(e); return
    assert all(torch.isfinite(p).all() for p in model.parameters()) or t.faults.get(11) == "weight"
    assert all(h.remedy in t.monitor.order for h in t.monitor.history) and all(n <= 3 for n in t.monitor.spent.values())
    bad = {r.step - 1 for r in t.rows if r.remedy}; assert {s for s, k in t.faults.items() if k in ("nan", "inf", "explode")} <= bad

def test_without_faults_the_monitor_changes_nothing():
    def run(**kw):
        m = resnet_bk(ResNetBKConfig(**SMALL), 0); t = Trainer(m, Sampler(TEXT, 16, 0), TrainerConfig(steps=12, batch=4, lr=1e-2, **kw)); t.run()
        return m, t
    (a, t), (b, _) = run(), run(stability=None)
    assert not t.monitor.history and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def below_the_floor(m, steps):
    "Train on tokens drawn evenly from 16, which cannot be predicted, and say whether fresh ones are."
    opt = torch.optim.Adam(m.parameters(), 3e-3); draw = lambda n: torch.randint(0, 16, (n, 25))
    for _ in range(steps):
        ids = draw(16); F.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward(); opt.step(); opt.zero_grad(set_to_none=True)
    m.eval(); ids = draw(256)
    with torch.no_grad(): loss = F.cross_entropy(m(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return bool(loss.mean() < math.log(16) - 3*loss.std()/len(loss)**.5)

@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_reads_the_future(name):
    torch.manual_seed(0); m = ConfigurableResNetBK(PRESETS[name].model_copy(update=dict(vocab_size=16, d_model=16, n_seq=24)))
    assert not below_the_floor(m, 150)
    ids = torch.randint(0, 15, (2, 24)); assert all(future_leak(m, ids, t) < 1e-5 for t in range(1, 24, 5))

def test_the_floor_finds_a_model_that_does():
    torch.manual_seed(0); assert below_the_floor(ResNetBKEncoder(ResNetBKConfig(vocab_size=16, d_model=16, n_layer=2, n_seq=24, heads=4, causal=False)), 400)
