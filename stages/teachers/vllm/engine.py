"""The teacher through vLLM: the one module that imports it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline import manifest
from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.models import read_config, text_config
from ddk_pipe.pipeline.targets import PADDING_ID, Kept, Plan, Selected, SparseTargets
from ddk_pipe.stages.common import Unheard, pick_device, pick_dtype
from ddk_pipe.stages.teachers.precision import OTHERWISE, widens
from ddk_pipe.stages.teachers.protocol import Window
from ddk_pipe.stages.teachers.serving import SHOW, Service
from ddk_pipe.stages.teachers.vllm import worker as vllm_worker
from ddk_pipe.stages.teachers.vllm.limits import check_capture, check_head
from ddk_pipe.stages.teachers.vllm.prompts import Prompt, prompts_of, put_together
from ddk_pipe.stages.teachers.vllm.worker import ROUNDED, unpack

OLDEST = (0, 24)  # both runners have had the same two methods since (facts of their sources, up to 0.33)
RUNNERS = {
    "v1": ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    "v2": ("vllm.v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker"),
}
PROMPTS_A_WINDOW = 8  # at once: documents are shorter than windows
QUIET = "ERROR"  # level of vLLM's own log
EXTENSION = "ddk_pipe.stages.teachers.vllm.worker.SelectionExtension"


class VllmTeacher:
    """Runs the documents of windows as prompts of vLLM's engine and collects what its workers select.

    On a CPU the engine lives in this process (V1 runner); on GPUs in processes of its own.
    """

    def __init__(
        self, folder: Path, options: manifest.Teacher, *, seq_len: int, vocab_size: int | None = None
    ) -> None:
        device = torch.device(pick_device(options.device))
        set_environment(device, options)
        vllm = import_vllm()
        config = text_config(
            read_config(folder, field="teacher.model", trust_remote_code=options.trust_remote_code)
        )
        head_size = int(config.vocab_size)  # vLLM cuts its own padding to this, not to the tokenizer's ids
        self._vocab_size = min(vocab_size or head_size, head_size)
        check_head(options, head_size, self._vocab_size)
        self.folder = folder
        self.options, self.device, self.version = options, device, vllm.__version__
        self.runner = ""
        self._plan: Plan | None = None
        self._sent = 0  # vLLM numbers its requests from 0 on
        self._broken: Exception | None = None
        number = pick_dtype(options.dtype, device)
        dtype, self.wide = str(number).removeprefix("torch."), widens(options, number)
        self.service = Service(f"vLLM {self.version}", folder, dtype, other="hf", unheard=unheard())
        with self.service.one_line("does not take"), _aside():
            self.engine = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                hf_overrides={"head_dtype": "float32"} if self.wide else {},
                max_model_len=seq_len,
                max_num_batched_tokens=max(options.vllm.max_num_batched_tokens, seq_len),
                max_num_seqs=min(
                    PROMPTS_A_WINDOW * options.batch_windows, options.vllm.max_num_batched_tokens
                ),
                max_logprobs=-1,
                enforce_eager=device.type == "cpu",
                enable_prefix_caching=False,  # a cached prefix has no logits: its positions would be garbage
                skip_tokenizer_init=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                trust_remote_code=options.trust_remote_code,
                tensor_parallel_size=options.vllm.tensor_parallel_size,
                gpu_memory_utilization=options.vllm.gpu_memory_utilization,
                worker_extension_cls=EXTENSION,
            )
        self._notes = _temporary_file(self)
        self._call("ddk_note_failures", str(self._notes))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "vllm",
            "vllm": self.version,
            "torch": torch.__version__,
            "device": str(self.device),
            "capture": self.options.vllm.capture,
            "runner": self.runner,
        }

    def close(self) -> None:
        del self.engine
        self._notes.unlink(missing_ok=True)

    def select(self, windows: list[Window], plan: Plan) -> list[Selected]:
        by_public_interface = self.options.vllm.capture == "prompt_logprobs"
        each = [prompts_of(window) for window in windows]
        prompts = [prompt for of_window in each for prompt in of_window]
        found = iter(
            (self._from_prompt_logprobs if by_public_interface else self._from_worker)(prompts, plan)
        )
        return [
            put_together(window, of_window, list(itertools.islice(found, len(of_window))), plan)
            for window, of_window in zip(windows, each, strict=True)
        ]

    def _from_worker(self, prompts: list[Prompt], plan: Plan) -> list[Selected]:
        self._install(plan)
        requests = [str(self._sent + index) for index in range(len(prompts))]
        announced = [
            (request, prompt.key, prompt.labels.astype(np.int64).tobytes(), prompt.first, prompt.positions)
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        self._call("ddk_expect", announced)
        self._generate(prompts, _sampling(prompt_logprobs=0))
        answers = self._call("ddk_take")
        failed = {request: why for answer in answers for request, why in answer["failed"].items()}
        done: dict[str, Any] = next((answer["done"] for answer in answers if answer["done"]), {})
        for request, prompt in zip(requests, prompts, strict=True):
            if request not in done:
                why = failed.get(request, "vLLM returned nothing for it")
                raise DdkError(
                    f"window {prompt.key}: {why} (model {self.folder})",
                    hint=OTHERWISE
                    if why.startswith(ROUNDED)
                    else "try teacher.dtype: float32 or backend: hf",
                )
        return [unpack(done[request]) for request in requests]

    def _install(self, plan: Plan) -> None:
        if self._plan == plan:
            return
        for answer in self._call("ddk_install", plan.to_dict(), self._vocab_size, self.wide):
            if answer.startswith("refused"):
                raise DdkError(
                    f"vLLM {self.version}: the worker hook does not fit ({answer})",
                    hint="use backend: hf, or vllm.capture: prompt_logprobs (topk and threshold only)",
                )
            self.runner = answer
        self._plan = plan

    def _generate(self, prompts: list[Prompt], sampling: Any) -> list[Any]:
        from vllm.inputs import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=prompt.tokens[:-1].tolist()) for prompt in prompts]
        self._sent += len(asked)
        with self._serving():
            return list(self.engine.generate(asked, sampling, use_tqdm=False)) if asked else []

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of the extension, on every worker."""
        with self._serving():
            return list(self.engine.collective_rpc(method, args=arguments))

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Around every call of the engine. One that has failed is asked no more: what it had begun is still there, and
        would be among the answers to the next call."""
        if self._broken is not None:
            raise self._broken
        try:
            with self.service.one_line("cannot serve", self._first_note):
                yield
        except Exception as problem:
            self._broken = problem
            raise

    def _first_note(self) -> str:
        """What a step raised in the worker, "" if that is not known: from a process of its own it does not come here."""
        return self._notes.read_text().split("\n")[0]

    def _from_prompt_logprobs(self, prompts: list[Prompt], plan: Plan) -> list[Selected]:
        check_capture(self.options, plan)
        k = plan.k if plan.scheme == "topk" else plan.cap
        # the document's last token is the only one that may be generated: its log-probability comes with the largest
        samplings = [
            _sampling(
                prompt_logprobs=k, logprobs=k, flat_logprobs=True, allowed_token_ids=[int(prompt.tokens[-1])]
            )
            for prompt in prompts
        ]
        outputs = self._generate(prompts, samplings)
        floor = plan.tau if plan.scheme == "threshold" else 0.0
        return [
            _from_flat(output.prompt_logprobs, output.outputs[0].logprobs, prompt.labels, k, floor)
            for output, prompt in zip(outputs, prompts, strict=True)
        ]


def _sampling(**options: Any) -> Any:
    """vLLM's SamplingParams for one token."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **options)


def _from_flat(prompt: Any, generated: Any, marked: NDArray[np.int64], k: int, floor: float) -> Selected:
    """vLLM's FlatLogprobs: k + 1 entries a token (the true one, then the k largest); token 0 has none.

    Entry t scores token t given tokens before it, which is our position t - 1; the last position has none. That of
    the last token is `generated`, those of the others are the prompt's.
    """
    rows = len(marked) - 1
    token_ids, scores = (
        [*getattr(prompt, name), *getattr(generated, name)] for name in ("token_ids", "logprobs")
    )
    ids = torch.tensor(np.asarray(token_ids, np.int64).reshape(rows, k + 1))
    logprobs = torch.tensor(np.asarray(scores, np.float32).reshape(rows, k + 1))
    labels = torch.from_numpy(marked)
    live = labels[:rows] >= 0
    label = torch.full((rows + 1,), float("nan"))
    label[:rows] = torch.where(live, logprobs[:, 0], float("nan"))
    kept = live[:, None] & (logprobs[:, 1:].exp() >= floor)
    out_ids = torch.full((rows + 1, k), PADDING_ID, dtype=torch.int64)
    out_ids[:rows] = torch.where(kept, ids[:, 1:], PADDING_ID)
    weights = torch.full((rows + 1, k), float("-inf"))
    weights[:rows] = torch.where(kept, logprobs[:, 1:], float("-inf"))
    order = torch.where(out_ids >= 0, out_ids, torch.iinfo(torch.int64).max).argsort(1)
    mass = weights.double().exp().sum(1)
    # 1 - sum is all that this interface leaves: near 1 the float32 log-probabilities limit the tail to about 1e-6
    tail = torch.where(mass > 0, torch.log1p(-mass.clamp_max(1 - 1e-7)), float("-inf"))
    targets = SparseTargets(
        ids=out_ids.gather(1, order).int(), logprobs=weights.gather(1, order), tail=tail.float()
    )
    return Selected(label, (Kept.exact(targets),))


def import_vllm() -> Any:
    """The package, with nothing of ours under a name that it looks for."""
    keep_our_name_from_vllm()
    with _aside():
        import vllm

    return vllm


@functools.cache
def unheard() -> Unheard:
    """One for the process: vLLM's log handlers, made when it is imported, hold on to the stream they find."""
    return Unheard()


def _aside() -> AbstractContextManager[None]:
    """What vLLM prints goes to a file, unless its user wants to see that: notes on its imports, the NUMA node, ..."""
    loud = os.environ.get("VLLM_LOGGING_LEVEL", QUIET) != QUIET or os.environ.get(SHOW)
    return nullcontext() if loud else unheard().listening()


def check_engine() -> None:
    """Before anything is loaded: raises DdkError if this vLLM is too old, or has no model runner our hook fits.

    Which runner it will use is known only once the engine is up: the hook looks again when it is installed.
    """
    version = import_vllm().__version__
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise DdkError(
            f"vLLM {version} is too old, at least {'.'.join(map(str, OLDEST))} is needed",
            hint=f"{install_hint('vllm')}, or set teacher.backend: hf",
        )
    with _aside():
        found = {name: vllm_worker.arguments_of(_class(*where)) for name, where in RUNNERS.items()}
    if all(found[name] != known for name, known in vllm_worker.known_arguments().items()):
        raise DdkError(
            f"vLLM {version}: the worker hook does not fit ({found})",
            hint="use backend: hf, or vllm.capture: prompt_logprobs (topk and threshold only)",
        )


def _temporary_file(owner: object) -> Path:
    """An empty file that is gone at the latest with its owner."""
    handle, name = tempfile.mkstemp(prefix="ddk-pipe-")
    os.close(handle)
    weakref.finalize(owner, Path(name).unlink, missing_ok=True)
    return Path(name)


def _class(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:  # of what only another platform has
        return None


def set_environment(device: torch.device, options: manifest.Teacher) -> None:
    """vLLM reads these when it is imported; what the user has set wins."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": QUIET, "VLLM_CONFIGURE_LOGGING": "1"}
    if device.type == "cpu":
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(options.vllm.cpu_kvcache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def keep_our_name_from_vllm() -> None:
    """Call right before `import vllm`, in the process that imports it.

    vLLM prefers any importable top-level `triton_kernels` to its own copy, and a folder of ours has that name.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # children started by `python -m` or `python -c`
    ours = Path("triton_kernels", "sparse_kl.py")  # a file only our folder has
    sys.path[:] = [entry for entry in sys.path if not Path(entry, ours).exists()]
    spec = importlib.util.find_spec("triton_kernels")  # still there: already imported
    if spec and spec.origin and Path(spec.origin).with_name(ours.name).exists():
        raise DdkError(
            f"{spec.origin} is loaded under the name of a package that vLLM imports",
            hint="import ddk_pipe.triton_kernels, never triton_kernels",
        )
