"""The one door to Ray: whether it was asked for, and a cluster named by RAY_ADDRESS or one started on this machine."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.stages.common.progress import say

ENGINES = ("local", "ray")
MAX_RESTARTS = 20  # of one actor: spot instances come and go

STORE_BYTES = (
    200 << 20
)  # of a Ray started here: shards and students go to the disk, never through Ray's object store


def check_engine(engine: str) -> None:
    """Raises DdkError for an engine that nobody knows, and for Ray where it is not installed."""
    if engine not in ENGINES:
        raise DdkError(f"--engine {engine}: unknown", hint=f"use one of {', '.join(ENGINES)}")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise DdkError("--engine ray: Ray is not installed", hint=install_hint("ray"))


def connect(stage: str) -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS or started here; `stage` opens the lines that say where."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        # "local": else Ray joins whatever cluster somebody has started on this machine
        own = {"address": "local", "object_store_memory": STORE_BYTES}
        where = {} if os.environ.get("RAY_ADDRESS") else own
        context = ray.init(
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONSAFEPATH": "1"}},  # or vLLM takes our triton_kernels for its own
            **where,
        )
        dashboard = context.dashboard_url or "none"
        say(f"{stage}: Ray at {context.address_info['gcs_address']}, dashboard {dashboard},")
        say(f"{stage}: its logs under {context.address_info['session_dir']}/logs on each node")
    return ray
