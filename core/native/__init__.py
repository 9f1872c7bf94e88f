"""The CPU kernels: one optional shared library with a C ABI, and the torch operations that call it."""
