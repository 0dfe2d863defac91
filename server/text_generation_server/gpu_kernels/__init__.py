"""Triton kernels for GPUs; Triton's interpreter runs them on a CPU, for tests. Importing any of them needs Triton."""
