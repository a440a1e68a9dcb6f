import numpy as np

from ddk_pipe.pipeline.targets import LOG_STEPS, NO_LOG, decode_log, encode_log
from ddk_pipe.pipeline.targets.quantisers import label_units


def test_log_codes() -> None:
    values = np.array([0.0, -0.5, -31.9, -100.0, -np.inf, np.nan])
    codes = encode_log(values)
    assert codes.tolist()[3:] == [65534, 65535, 65535]
    assert np.abs(decode_log(codes[:3], none=0.0) - values[:3]).max() <= 0.5 / LOG_STEPS + 1e-6
    assert np.isnan(decode_log(codes[5:], none=np.nan)[0])


def test_label_weights_are_exponentials_of_their_codes() -> None:
    """The table is made by multiplication so that no library's exp can move a count of draws."""
    units = label_units()
    codes = np.arange(0, 40_000, 97)
    assert np.allclose(units[codes] / 2**40, np.exp(-codes / LOG_STEPS), rtol=1e-3, atol=1e-9)
    assert np.allclose(units[:4096] / 2**40, np.exp(-np.arange(4096) / LOG_STEPS), rtol=1e-10)
    assert units[NO_LOG] == 0
