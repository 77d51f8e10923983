"""Our own CUDA kernels in Triton, imported only where they run."""
