"""What a fork has to wait for, so that no child inherits it half-way."""

import os
import threading

LOCK = threading.Lock()  # of whatever folders and readers keep; one for all, so that a fork can wait for it
os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
