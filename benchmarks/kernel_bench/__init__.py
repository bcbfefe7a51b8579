"""Parts of `benchmarks/kernels.py`: what is compared (cases, layers, peers), how (timers, run), and what is told."""
