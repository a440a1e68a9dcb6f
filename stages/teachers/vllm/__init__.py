"""The teacher through vLLM: the engine, which alone imports it, and the worker's half, which runs inside of it.

`limits` is what its public interface cannot give.
"""
