"""The CUDA kernels, in Triton. Only `lmx.core.gpu.launch` may be imported before it says that Triton is there."""
