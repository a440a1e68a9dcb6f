"""What a manifest may say, field by field: types, limits, defaults. Units stand in the names or descriptions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from ddk_pipe.pipeline.manifest.section import Fraction, Positive, Section
from ddk_pipe.pipeline.manifest.text import Attention, Domain, Prepare

Temperature = Annotated[float, Field(ge=0.05, le=20)]
MOST_SEQ_LEN = 1 << 20
MOST_SHARD_WINDOWS = 1 << 16  # a shard's index and its commit record stay small
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class VllmOptions(Section):
    """Options of the vLLM engine."""

    capture: Literal["worker", "prompt_logprobs"] = Field(
        "worker",
        description="worker: select from the full distribution on the worker, any scheme;"
        " prompt_logprobs: vLLM's public interface, slower, only for topk and threshold",
    )
    tensor_parallel_size: Positive = Field(1, description="GPUs that share one copy of the teacher")
    gpu_memory_utilization: Fraction = Field(0.9, description="share of each GPU's memory vLLM may take")
    max_num_batched_tokens: Positive = Field(8192, description="tokens per engine step (chunked prefill)")
    cpu_kvcache_gib: Positive = Field(1, description="memory for the KV cache on a CPU, GiB")


class Teacher(Section):
    """The model that is run once."""

    model: str = Field(description="model folder (safetensors) or Hugging Face id")
    revision: str | None = Field(None, description="git revision on the hub")
    backend: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto: vllm where it is installed, else hf (transformers)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    logits: Literal["float32", "model"] = Field("float32", description="model: rounded to the dtype")
    device: str = Field(
        "auto", description="hf: auto, cpu, cuda, cuda:0, ...; balanced or sequential: spread over all GPUs"
    )
    batch_windows: Positive = Field(8, description="windows per forward pass")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    vllm: VllmOptions = VllmOptions()


class Cache(Section):
    """What is kept of the teacher's predictions."""

    path: str | None = Field(
        None, description="folder of the cache, or a URL such as s3://bucket/prefix; none: <output>/cache"
    )
    scheme: Literal["pps", "threshold", "topk", "random"] = Field(
        "pps",
        description="pps: unbiased, few entries; threshold and topk: a head and one bucket; random: draws with replacement",
    )
    tau: Annotated[float, Field(gt=1e-6, lt=1)] = Field(
        0.02, description="pps, threshold: keep every probability >= tau exactly"
    )
    k: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="topk: entries per position")
    cap: Annotated[int, Field(ge=1, le=4096)] = Field(256, description="threshold: most entries per position")
    draws: Annotated[int, Field(ge=1, le=255)] = Field(50, description="random: draws per position")
    temperatures: list[Temperature] = Field(
        [1.0], min_length=1, description="each is its own exact or unbiased target set, paid for in bytes"
    )
    seed: int = Field(0, ge=0, description="of the draws")
    shard_windows: Annotated[int, Field(ge=1, le=MOST_SHARD_WINDOWS)] = Field(
        64, description="windows per shard: the unit of work, commit and retry"
    )


class Student(Section):
    """Where the student starts: exactly one of the three."""

    model: str | None = Field(None, description="continue from this model folder or Hugging Face id")
    config: dict[str, Any] | str | None = Field(
        None, description="fresh weights from this transformers configuration (mapping, or a config.json)"
    )
    keep_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="start from these layers of the teacher, counted from 0"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> Student:
        named = [name for name in ("model", "config", "keep_layers") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"name exactly one of model, config, keep_layers (got {named or 'none'})")
        return self


class Optimizer(Section):
    """AdamW."""

    name: Literal["adamw"] = Field("adamw", description="the optimizer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices only")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm")


class Schedule(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="shape after the warm-up; wsd: constant, then linear over the last decay_fraction",
    )
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the steps")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: share of the steps")
    final_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="last rate / peak rate")

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1")
        return self


class GammaSchedule(Section):
    """gamma over the steps, as a multiple of distill.gamma."""

    name: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="from first_ratio to final_ratio"
    )
    first_ratio: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gamma of the first step / distill.gamma"
    )
    final_ratio: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gamma of the last step / distill.gamma"
    )


class Distill(Section):
    """Training the student from the cache."""

    name: Annotated[str, Field(pattern=f"^{DOMAIN_NAME.pattern}$")] = Field(
        "student", description="the run's folder: <output>/distill/<name>"
    )
    targets: Literal["cache", "online"] = Field(
        "cache",
        description="cache: the teacher is not needed; online: the teacher in memory, its whole distribution at every"
        " step, as a baseline (reads tokens/, no cache)",
    )
    gamma: Annotated[float, Field(ge=0)] = Field(
        0.2, description="weight of KL beside CE (0.2 in the paper); 0 is continued pre-training"
    )
    gamma_schedule: GammaSchedule = GammaSchedule()
    temperature: Temperature = Field(1.0, description="one of cache.temperatures")
    temperature_squared: bool = Field(True, description="multiply KL by T^2; the paper prints none (T = 1)")
    gradient_skip: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="CPU: leave out small output-layer gradients at random, unbiased, at this threshold per token"
        " (1e-3 is mild); saves much of the loss's time where the student is confident",
    )
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or reverse (needs a scheme with a tail bucket)"
    )
    tail: Literal["keep", "renormalise"] = Field(
        "keep",
        description="a cache's tail bucket (threshold, topk); renormalise: throw it away and scale what is left to sum 1,"
        " as much top-k distillation does: biased, to compare with",
    )
    mixing: str = Field(
        "ddk",
        description="rule for the domain weights: ddk, ddk_unsmoothed, uniform, natural, doremi, sheared, gap_softmax,"
        " learnability, or one of the entry point group ddk_pipe.mixing",
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="ddk: smoothing of Eq. 2")
    prior: Literal["uniform", "natural"] | dict[str, Annotated[float, Field(ge=0)]] = Field(
        "uniform",
        description="ddk: what (1 - alpha) is spread by; 1/N in the paper; natural: by size; or a share per domain",
    )
    largest_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="ddk: clamp of the perplexity ratios, which the paper does not have; none: no clamp"
    )
    mixing_options: dict[str, float | int | bool | str] = Field(
        {}, description="other options of the rule, e.g. {eta: 0.5, floor: 0.001} of doremi and sheared"
    )
    stop_gap_nats: float | None = Field(
        None,
        description="stop once every domain's gap (student CE - teacher CE) is below it at a weight update;"
        " the paper says only 'minimal disparity'",
    )
    exhausted: Literal["reshuffle", "repeat"] = Field(
        "reshuffle",
        description="a domain that runs out starts a new order, or the same again (the paper: wraps around)",
    )
    initial: Literal["ddk", "uniform", "natural"] | None = Field(
        None,
        description="weights of the first interval: ddk (Eq. 1), uniform, natural (by size); none: Eq. 1 for the ddk"
        " rules, by size for natural, else uniform. The paper prints a random subset for it",
    )
    interval_steps: Positive = Field(100, description="K: steps between two updates of the weights")
    steps: Positive = Field(1000, description="optimizer steps")
    batch_tokens: Positive = Field(8192, description="tokens per optimizer step")
    micro_batch_windows: Positive = Field(8, description="windows per forward pass")
    validation_windows: Positive = Field(16, description="windows per domain behind each weight update")
    validation_budget: Fraction | None = Field(
        0.1,
        description="most tokens validated per interval, as a share of the tokens trained in it; fewer windows then,"
        " at least one a domain; null: always validation_windows",
    )
    checkpoint_steps: Positive | None = Field(None, description="steps between two beside those at updates")
    log_steps: Positive | None = Field(
        None,
        description="steps between two readings of the loss (at most 2 s); none: 10 on a GPU, 1 on a CPU",
    )
    keep_last: Positive = Field(1, description="checkpoints kept, the newest ones")
    keep_best: bool = Field(False, description="keep also the one of the lowest mean validation gap")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="where the record goes beside Parquet; each needs its package"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="under torchrun: whole students that share gradients, or a student in shards (FSDP2)",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations backward: less memory, slower"
    )
    compile: bool = Field(False, description="torch.compile of the student's layers")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    seed: int = Field(0, ge=0, description="of the data order and of fresh weights")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on a GPU, float32 on a CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, ...")

    @pydantic.model_validator(mode="after")
    def _tail_is_of_a_cache(self) -> Distill:
        if self.targets == "online" and self.tail != "keep":
            raise ValueError(
                "tail: renormalise is about a cache, and targets: online reads none; use tail: keep"
            )
        return self


class Manifest(Section):
    """Everything ddk-pipe needs to know about one project."""

    output: str = Field("out", description="folder for tokens, cache and runs, from the manifest's folder")
    domains: dict[str, Domain] = Field(min_length=1, description="name: where its text comes from")
    teacher: Teacher = Field(description="the model that is run once")
    tokenizer: str | None = Field(None, description="tokenizer folder or id; none: the teacher's")
    seq_len: Annotated[int, Field(ge=8, le=MOST_SEQ_LEN)] = Field(1024, description="tokens per window")
    attention: Attention = Field(
        "document",
        description="what a token sees, as teacher and as student: its own document, whose positions count from 0; or all"
        " of its window before it, as caches had it before there was a choice",
    )
    prepare: Prepare = Prepare()
    cache: Cache = Cache()
    student: Student | None = Field(None, description="needed by distill")
    distill: Distill = Distill()

    @pydantic.field_validator("domains")
    @classmethod
    def _names_are_folders(cls, value: dict[str, Domain]) -> dict[str, Domain]:
        for name in value:
            if not DOMAIN_NAME.fullmatch(name):
                raise ValueError(f"domain name {name!r}: use letters, digits, '_', '-' and '.'")
        return value
