"""The parts: what is stored and decided. Imports neither vllm nor triton, and runs on a laptop."""
