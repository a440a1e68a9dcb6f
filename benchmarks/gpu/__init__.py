"""What the GPU paths cost, for people with a card: the loss, a whole training step, the teacher.

PYTHONPATH=benchmarks python -m gpu [loss] [step] [teacher] [--out FOLDER] [--device cpu]
"""
