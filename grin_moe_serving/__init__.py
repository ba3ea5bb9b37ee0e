"""GRIN-MoE in programs that have never heard of it: vLLM's plugin, and a lazy registration with transformers."""
