"The O(N) model under faults: every run ends finite, or with the sentence that is documented."
import math
import random
import pytest
import torch
from bem.data import Sampler
from bem.resnet_bk.block import ResNetBKConfig
from bem.resnet_bk.model import resnet_bk
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
    random.seed(seed); model = resnet_bk(ResNetBKConfig(**SMALL, heads=1 + seed % 3, form=("scalar", "vector")[seed % 2]), seed)
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
