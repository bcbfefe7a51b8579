"""Triton kernels and their launchers; only `layout` can be imported without triton.

A product-quantized weight is `W[o, g * d + e] = codebook[codes[o, g], e]`, and its codes `[out, groups]` are read where
they lie. Whoever calls a launcher has validated that every code is below K: a kernel reads without bounds.
"""
