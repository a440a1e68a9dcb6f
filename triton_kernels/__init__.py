"""Arithmetic on tensors; knows nothing of files. Import it as ddk_pipe.triton_kernels, never by its bare name."""
