"""The row kernel in every dtype, at every temperature, in the launches that ship, and for the loss alone."""

from __future__ import annotations

import torch
from kernel_cases import Cases, Findings, six_rows, wrong
from row_kernel import DTYPES, compare, kernel, short_steps

CASES = case = Cases(short_steps)


# ---------------------------------------------------------------- every dtype, temperature and k

for _name, _dtype in DTYPES.items():
    for _t in (1.0, 2.0, 0.7):
        for _k in (1, 5, 12):

            @case(f"{_name} T={_t:g} k={_k}")
            def _(dtype: torch.dtype = _dtype, temperature: float = _t, kept: int = _k) -> Findings:
                return compare(six_rows(kept=kept), dtype, temperature)


# ---------------------------------------------------------------- the launches that ship

for _vocab, _k in ((5000, 40), (2049, 256), (4500, 257), (300, 300)):
    for _name in ("float32", "bfloat16"):

        @case(f"shipped launch, V={_vocab} k={_k} {_name}")
        def _(vocab: int = _vocab, kept: int = _k, dtype: torch.dtype = DTYPES[_name]) -> Findings:
            return compare(six_rows(vocab, kept), dtype, 2.0)


# ---------------------------------------------------------------- gradient=False

for _name, _dtype in DTYPES.items():

    @case(f"gradient=False, {_name}: logits unchanged, same ce and kl")
    def _(dtype: torch.dtype = _dtype) -> Findings:
        p = six_rows()
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        ce, kl, logits, margin = kernel(p, dtype, 2.0, gradient=False)
        want_ce, want_kl, _, _ = kernel(p, dtype, 2.0)
        same = torch.equal(logits.contiguous().view(bits), p.logits.to(dtype).view(bits))
        return [
            ("logits, bit for bit", wrong(same), 0.0),
            ("columns right of them", wrong(bool((margin == 7).all())), 0.0),
            ("ce and kl", wrong(torch.equal(ce, want_ce) and torch.equal(kl, want_kl)), 0.0),
        ]


if __name__ == "__main__":
    CASES.main()
