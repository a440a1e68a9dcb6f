"""Ten domains with their losses and sizes, for the tests of mixing."""

import numpy as np

from ddk_pipe.pipeline.mixing import FloatArray

N = 10
RATIOS = np.array([1.8, 1.45, 1.2] + [1.3] * 7)
SIZES = np.arange(1, N + 1)


def losses(ratios: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(student_ce, teacher_ce) in nats that have these perplexity ratios."""
    teacher_ce = np.linspace(1.5, 3.5, len(ratios))
    return teacher_ce + np.log(ratios), teacher_ce
