"""Better algorithms than the definitions, in plain PyTorch: what runs on CPU, in float64 and without Triton."""
