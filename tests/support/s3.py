"""A local S3: moto's server in a process of its own, spoken to over HTTP by the same client as a real one."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

BUCKET = "teacher-cache"
# Not in this process: moto brings flask, and vLLM looks into every loaded module, which flask's proxies answer by raising.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment that leads obstore there; the bucket BUCKET exists."""
    import boto3

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,  # closed when we end, however we end
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin and server.stdout
    with server:
        host, port = server.stdout.readline().split()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        try:
            yield environment
        finally:
            server.stdin.close()


def new_prefix() -> str:
    """A URL in the bucket that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/cache"


def together(*jobs: Callable[[], object]) -> list[object]:
    """Run callables in threads that start at the same moment; returns their results, or what they raised."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return job()
        except Exception as problem:  # noqa: BLE001 (the caller looks at it)
            return problem

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))
