"""Our own CUDA kernels in Triton, imported only where they run, and oneDNN's products on a CPU."""
