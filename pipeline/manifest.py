"""The manifest: one YAML file that says what to do, checked before anything is loaded.

Units stand in the names or descriptions. Unknown keys are refused with the nearest known name. A relative
path is relative to the manifest's folder and may not leave it; an absolute path is the user's own word.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import Field

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import Folder, is_url, open_folder

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0.05, le=20)]
MOST_SEQ_LEN = 1 << 20
MOST_SHARD_WINDOWS = 1 << 16  # a shard's index and its commit record stay small
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Section(pydantic.BaseModel):
    """A part of the manifest: values that exist are valid, and never change afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DatasetSource(Section):
    """A Hugging Face dataset (needs the package `datasets`)."""

    dataset: str = Field(description="dataset id on the hub, or a local dataset folder")
    config: str | None = Field(None, description="the dataset's configuration, where it has several")
    split: str = Field("train", description="the dataset's split")
    revision: str | None = Field(None, description="git revision on the hub; pins the data")


Source = str | DatasetSource


class Domain(Section):
    """Where the text of one domain comes from."""

    train: list[Source] = Field(
        min_length=1,
        description="files, globs or folders (.jsonl, .parquet, plain text; .gz and .zst are unpacked), or datasets",
    )
    validation: list[Source] | None = Field(
        None, description="the same for validation; without it a share of the documents is set aside"
    )
    text_field: str = Field("text", description="the field of a record that holds the text")
    messages_field: str = Field(
        "messages", description="a record with this field is a chat: loss on the assistant's turns only"
    )

    @pydantic.field_validator("train", "validation", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value


class Prepare(Section):
    """How text becomes windows of tokens."""

    validation_fraction: Fraction = Field(
        0.05, description="share of a domain's documents set aside by their hash where no validation is named"
    )
    max_validation_windows: Positive = Field(64, description="windows per domain kept for validation")
    max_train_windows: Positive | None = Field(
        None, description="windows per domain kept for training; none: all of the text"
    )


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
    device: str = Field(
        "auto",
        description="hf backend: auto, cpu, cuda, cuda:0, ...; balanced or sequential: spread over all GPUs"
        " (auto does so where one is too small)",
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
        None,
        description="most tokens validated per interval, as a share of the tokens trained in it; fewer windows then,"
        " at least one a domain",
    )
    checkpoint_steps: Positive | None = Field(
        None, description="steps between two checkpoints, beside the one at each weight update"
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


class Project:
    """A checked manifest and the folder it lives in; turns its names into paths."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.manifest = manifest
        self.root = root.resolve()

    def path(self, text: str, *, field: str) -> Path:
        """`text` as a path that is absolute by the user's word or stays inside the manifest's folder.

        Raises DdkError for a relative path that leaves it.
        """
        path = Path(text).expanduser()
        if path.is_absolute():
            return path
        inside = (self.root / path).resolve()
        if not inside.is_relative_to(self.root):
            raise DdkError(
                f"{field}: {text} leaves the manifest's folder {self.root}",
                hint="write it as an absolute path if that is what you want",
            )
        return self.root / path

    def model(self, text: str, *, field: str) -> str:
        """A model folder as an absolute path, or a hub id as it is."""
        if text.startswith(("/", "./", "../", "~")) or self.path(text, field=field).is_dir():
            return str(self.path(text, field=field))
        return text

    @property
    def output(self) -> Path:
        return self.path(self.manifest.output, field="output")

    @property
    def tokens(self) -> Path:
        return self.output / "tokens"

    @functools.cached_property
    def cache(self) -> Folder:
        """Where the teacher's predictions are; raises DdkError for a URL of an unknown kind."""
        named = self.manifest.cache.path
        if named and is_url(named):
            return open_folder(named)
        return open_folder(self.path(named, field="cache.path") if named else self.output / "cache")

    @property
    def run(self) -> Path:
        return self.output / "distill" / self.manifest.distill.name

    @property
    def teacher_model(self) -> str:
        return self.model(self.manifest.teacher.model, field="teacher.model")

    @property
    def tokenizer(self) -> str:
        named = self.manifest.tokenizer
        return self.model(named, field="tokenizer") if named else self.teacher_model


def load_project(path: Path, overrides: list[str] | None = None) -> Project:
    """Read a YAML manifest, apply dotted overrides ("distill.steps=50"), check it.

    Raises DdkError with one line: the file, the field, what is wrong, and the nearest known name.
    """
    values = read_yaml(path)
    for override in overrides or []:
        _apply(values, override)
    try:
        manifest = Manifest.model_validate(values)
    except pydantic.ValidationError as failure:
        raise first_problem(path, failure) from None
    return Project(manifest, path.parent)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises DdkError, naming the line, if there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DdkError(f"{path}: no such manifest", hint="write one with `ddk-pipe init`") from None
    except IsADirectoryError:
        raise DdkError(f"{path}: is a folder, not a manifest", hint="name the YAML file inside it") from None
    except UnicodeDecodeError as problem:
        raise DdkError(f"{path}: not UTF-8 ({problem.reason})", hint="save it as UTF-8") from None
    except yaml.YAMLError as problem:
        where = getattr(problem, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        what = getattr(problem, "problem", None) or "not YAML"
        raise DdkError(f"{path}:{line} {what}", hint="mend the YAML there") from None
    if not isinstance(values, dict):
        raise DdkError(f"{path}: not a mapping of fields", hint="write one with `ddk-pipe init`")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise DdkError(f"--set {override}: expected field=value", hint="for example --set distill.steps=50")
    *parents, last = name.split(".")
    node = values
    for parent in parents:
        below = node.get(parent)
        node[parent] = node = dict(below) if isinstance(below, dict) else {}
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DdkError(f"--set {override}: the value is not YAML", hint="quote it") from None


def first_problem(
    path: Path, failure: pydantic.ValidationError, root: type[Section] | None = None
) -> DdkError:
    """The first thing that is wrong with the file, in one line; `root` is what it was to be (none: Manifest)."""
    problems = failure.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    names = [str(part) for part in problem["loc"] if part not in ("str", "DatasetSource")]
    field = ".".join(names) or "manifest"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_of(names[:-1], root or Manifest)
        nearest = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(sorted(known))}"
        return DdkError(f"{path}: {field}: unknown key{more}", hint=hint)
    if problem["type"] == "missing":
        return DdkError(f"{path}: {field}: missing{more}", hint="see `ddk-pipe schema`")
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    return DdkError(
        f"{path}: {field}: {message}, got {_short(problem['input'])}{more}", hint="see `ddk-pipe schema`"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_of(names: list[str], section: type[Section]) -> list[str]:
    """Field names of the section that a dotted location leads to from another."""
    for name in names:
        field = section.model_fields.get(name)
        below = _section_in(field.annotation) if field else None
        section = below or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    arguments = getattr(annotation, "__args__", ())
    return next((found for part in arguments if (found := _section_in(part))), None)


def reference() -> Iterator[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, description), for `ddk-pipe schema` and the docs."""
    yield from _reference(Manifest, "")


def _reference(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        below = _section_in(field.annotation)
        label = prefix + name
        if below is not None and below is not DatasetSource:
            inner = f"{label}.<name>." if "dict" in str(field.annotation) else f"{label}."
            if field.description:
                yield label, "section", "", field.description
            yield from _reference(below, inner)
            continue
        default = "required" if field.is_required() else str(field.default)
        yield label, _type_name(field.annotation), default, field.description or ""


def _type_name(annotation: Any) -> str:
    """A type as a reader of YAML thinks of it: "int", "a | b", "list[str]"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if annotation is type(None):
        return "null"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    return str(getattr(annotation, "__name__", annotation))


STARTER = """\
# ddk-pipe manifest. Paths are relative to this file. `ddk-pipe schema` lists every field.
output: out                       # tokens/, cache/ and distill/ go here

domains:                          # at least one; a name and where its text comes from
  notes:
    train: [text/notes.jsonl]     # one {"text": ...} a line; also .jsonl.gz, .jsonl.zst, .parquet, *.txt, a folder
  support_chat:
    train: [text/chats.jsonl]     # {"messages": [...]} a line: loss on the assistant's turns only
    # validation: [text/chats-validation.jsonl]   # without it 5% of the documents are set aside

teacher:
  model: path/to/teacher          # a folder with safetensors, or a Hugging Face id
  backend: auto                   # vllm where it is installed, else hf (transformers)

seq_len: 512                      # tokens per window; at most what teacher and student can take

cache:
  scheme: pps                     # unbiased; one knob:
  tau: 0.02                       # smaller: more bytes, less noise (0.05 about 15, 0.01 about 42 bytes/position)

student:
  keep_layers: [0, 2, 4, 6]       # start from these layers of the teacher; or `model:`, or `config:`

distill:
  steps: 500
  batch_tokens: 4096
  interval_steps: 50              # the domain weights are updated this often
  gamma: 0.2                      # loss = CE + gamma * KL
  mixing: ddk                     # or uniform, natural, doremi, ...
  optimizer: {learning_rate: 3.0e-4}
"""
