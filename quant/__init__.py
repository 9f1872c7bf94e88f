"""Quantization: pure functions, modules, the streaming quantizer and its report."""
