"""Triton kernels over product-quantized weights and their launchers; only `layout` can be imported without triton.

`W[o, g * d + e] = codebook[codes[g, o], e]`: codes are `[groups, out]`, lanes run along `out`. Whoever calls a launcher
has validated that every code is below K: a kernel reads without bounds.
"""
