"Every CUDA source compiles for three generations of GPUs without spilling, and runs on the CPU free of undefined behaviour at the sizes where kernels break."
import importlib
import numpy as np
import pytest, torch
from bem.core import ROOT, UserError
from bem.cuda.source import TYPES, Source, compile_cubin, nvrtc

try: nvrtc()
except UserError as e: pytest.skip(str(e), allow_module_level=True)

MODULES = [importlib.import_module(f"bem.cuda.{p.stem}") for p in sorted((ROOT/"bem"/"cuda").glob("*.py")) if not p.stem.startswith("_")]
SOURCES = {s.name: s for m in MODULES for s in vars(m).values() if isinstance(s, Source)}

def test_there_are_kernels(): assert {"lowrank", "concat", "controller", "kronecker", "mix", "film", "resolvent"} <= set(SOURCES)

@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("name", SOURCES)
def test_machine_code(name, arch):
    code, takes = compile_cubin(SOURCES[name], arch)
    assert code[:4] == b"\x7fELF" and len(takes) == len(SOURCES[name].entries)
    for entry, f in zip(SOURCES[name].entries, takes): assert f.spilled == f.stack == 0 and f.registers <= 255 and f.shared <= 48*1024, entry

# -- the same sources on the CPU, with checks for undefined behaviour in front of everything

SIZES = (1, 7, 31, 32, 33, 64, 65)

@pytest.fixture
def strict(monkeypatch):
    "Every launch of this test is emulated, with checks, its fibers in an order of their own."
    from bem.cuda import emulate, launch
    rng = np.random.default_rng(0)
    def run(source, entry, grid, block, *args, shared=0):
        emulate.emulate(source, entry, grid, block, *args, shared=shared, order=rng.permutation(int(np.prod(block))), strict=True)
    monkeypatch.setattr(launch, "emulate", run); monkeypatch.setenv("BEM_BACKEND", "emulate")

def make(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
CLOSE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
def close(found, true, dtype): torch.testing.assert_close(found.double(), true, rtol=CLOSE[dtype], atol=CLOSE[dtype])

@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_update(strict, dtype, tokens):
    from bem.cuda.lowrank import lowrank_update
    for i, (d_in, d_out, r) in enumerate(((1, 1, 1), (64, 33, 17), (65, 64, 64), (129, 256, 16))):
        x, base, c = make(tokens, d_in, dtype=dtype), make(tokens, d_out, seed=1, dtype=dtype), make(tokens, r, seed=4)
        Vt, Ut = make(r, d_in, seed=2).mul(d_in**-.5).to(dtype), make(r, d_out, seed=3).mul(r**-.5).to(dtype)
        gate = dict(gate=make(r, r, seed=5)/r, bias=make(r, seed=6)) if i % 2 else {}
        z = x.double() @ Vt.double().T; h = z*(1 + torch.tanh(z @ gate["gate"].double().T + gate["bias"] + c)) if gate else z*c
        close(lowrank_update(x, base, Vt, Ut, c, .5, **gate), base.double() + .5*h @ Ut.double(), dtype)

@pytest.mark.parametrize("dtype", list(TYPES)[1:], ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_joined(strict, dtype, tokens):
    from bem.cuda.concat import concat_weight, joined_update
    pre, c, W = make(tokens, 72, dtype=dtype), make(tokens, 9, seed=4), make(24, 72, seed=1).mul(72**-.5).to(dtype)
    Vt, Ut = make(9, 72, seed=2).mul(72**-.5).to(dtype), make(9, 24, seed=3).mul(.3).to(dtype)
    a = torch.nn.functional.silu(pre.double()); true = a @ W.double().T + .5*((a @ Vt.double().T)*c) @ Ut.double()
    close(joined_update(pre, Vt, concat_weight(W, Ut, .5), "silu", c=c), true, dtype)

@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_variants(strict, dtype, tokens):
    from bem.cuda.variants import film_residual, kronecker_features, mix_features
    from bem.ops.film import film
    from bem.ops.hadamard import block_fwht
    x, A, C = make(tokens, 6*9, dtype=dtype), make(4, 6, seed=1)/3, make(5, 9, seed=2)/3
    close(kronecker_features(x, A, C), x.double() @ torch.kron(A, C).double().T, dtype)
    for r in (1, 31, 33, 64): z, c = make(tokens, r), make(tokens, r, seed=1); close(mix_features(z, c, dtype), block_fwht(block_fwht(z.double())*c), dtype)
    h, g, b = make(tokens, 33, dtype=dtype), 20*make(tokens, 5, seed=1), 20*make(tokens, 33, seed=2)
    close(film_residual(h, g, b, h), h.double() + film(h.double(), g.double(), b.double()), dtype)

@pytest.mark.parametrize("tokens", (*SIZES, 256, 257))
def test_controller(strict, tokens):
    from bem.cuda.controller import fused_codes
    from bem.routing.controller import HierarchicalController
    torch.manual_seed(0); q = HierarchicalController(33, [3, 5], "chunk", chunk=16, prefix=20, uncertainty=True, ema=.5).requires_grad_(False)
    for p in q.parameters(): torch.nn.init.normal_(p, std=.5)
    torch.testing.assert_close(fused_codes(q, h := make(2, tokens, 33))[0], q(h)[0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("tokens", (*SIZES, 1023, 1024, 1025))
def test_resolvent(strict, tokens, causal):
    from bem.cuda.resolvent import backward, forward
    for each in (True, False):
        a, k, E, eta = 3*make(2, tokens), make(2, max(tokens - 1, 1) if each else 1, seed=1).square(), make(2, seed=2), make(2, seed=3).abs() + .1
        grad, args = make(2, 2, tokens, seed=4), [t.double() for t in (a, k, E, eta)]
        true = torch.ops.bem.resolvent(*args, causal), *torch.ops.bem.resolvent_backward(*args, grad.double(), causal)
        found = forward(a, k, E, eta, causal), *backward(a, k, E, eta, grad, causal)
        for f, t in zip(found, true): assert (f - t).abs().max() < 1e-4*t.abs().max().clamp(min=1)
