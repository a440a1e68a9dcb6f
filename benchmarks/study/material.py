"""What the study starts from: texts, a tokenizer, a teacher and two students, made once and kept.

Everything here is input. The teacher and the starting points of the students are trained by cross-entropy alone, as a
user's models would have been before ddk-pipe sees them; all that is compared afterwards goes through ddk-pipe.

text       11 real domains, 3 MB each, cut to a Zipf mix (domain n has 1/n of the first one's tokens): the files alone are
           equally large, and a natural mix that is even would make "natural" and "uniform" the same
tokenizer  byte-level BPE of 4,096 tokens
teacher    Llama, 128 wide, 3 layers, on all the text in equal shares: `near` has seen 1.1M tokens and is ahead of the
           students by the perplexity ratios that the paper's pairs have, `teacher` 8M, and is far ahead
student    Llama, 64 wide, 2 layers: `skewed` has seen its first three domains three times in four, `even` all alike
smollm2    the real teacher, SmolLM2-135M out of a pip package
noise      strings of random letters; `teacher-noise` is `near` after it learnt the validation part by heart: a gap
           that no student can close, whatever it is trained on
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.stages.demo.material import write_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The first three are what the skewed student knows: the commonest of the Zipf mix.
DOMAINS = (
    "code_python",
    "tech_docs_en",
    "legal_en",
    "speeches_en",
    "code_go",
    "encyclopedia_en",
    "de_docs",
    "literature_en",
    "formal_math",
    "zh_docs",
    "zh_poetry",
)
KNOWN, KNOWN_SHARE = 3, 0.75
VOCAB, SEQ_LEN = 4096, 256
END = "<|endoftext|>"
VALIDATION_EVERY = 20  # one document of so many, by its hash, as ../shared/data/README.md has it
LARGEST_BYTES = 2_600_000  # of training text, in the first domain
BATCH = 8  # windows
RATE, WARMUP = 3e-3, 0.05
TEACHER_TOKENS, NEAR_TOKENS, STUDENT_TOKENS = 8_000_000, 1_130_000, 614_400
NOISE = "noise"
NOISE_TOKENS, NOISE_SHARE = (
    3_000_000,
    0.6,
)  # that teacher-noise sees beyond `near`, and how much of them is noise
NOISE_DOCUMENTS = {"validation": 36, "train": 300}
NOISE_LETTERS = 400  # a document: about one window of tokens
SHAPES = {"teacher": (128, 3), "student": (64, 2)}  # width, layers


def make_material(corpus: Path, folder: Path, wanted: set[str]) -> None:
    """Texts, tokenizer and the wanted models in `folder`; what is there stays. `corpus` holds DOMAIN.jsonl.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        _write_text(corpus, folder / "text", domain)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        _train_tokenizer(folder / "text", tokenizer)
    _write_noise(folder / "text")
    even = np.full(len(DOMAINS), 1 / len(DOMAINS))
    rest = (1 - KNOWN_SHARE) / (len(DOMAINS) - KNOWN)
    skewed = np.array([KNOWN_SHARE / KNOWN if n < KNOWN else rest for n in range(len(DOMAINS))])
    models = {
        "teacher": Pretraining("teacher", even, TEACHER_TOKENS, "all", 0),
        "student-skewed": Pretraining("student", skewed, STUDENT_TOKENS, "train", 1),
        "student-even": Pretraining("student", even, STUDENT_TOKENS, "train", 2),
        "teacher-near": Pretraining("teacher", even, NEAR_TOKENS, "all", 3),
        "teacher-noise": Pretraining(
            "teacher",
            np.append(even * (1 - NOISE_SHARE), NOISE_SHARE),
            NOISE_TOKENS,
            "all",
            4,
            start="teacher-near",
        ),
    }
    if "smollm2" in wanted:
        write_teacher(folder / "smollm2")
    for name, plan in models.items():
        starts = {models[other].start for other in wanted & models.keys()}
        if name in wanted | starts and not (folder / name).exists():
            _pretrain(folder / name, plan)


@dataclass(frozen=True)
class Pretraining:
    """How a model comes about."""

    shape: str  # of SHAPES
    shares: NDArray[np.float64]  # of each domain, one more for the noise
    tokens: int
    text: str  # "all" or "train"
    seed: int
    start: str | None = None  # the model to go on from


# --- text -----------------------------------------------------------------------------------------


def _write_text(corpus: Path, folder: Path, domain: str) -> None:
    """all/, train/ and validation/DOMAIN.jsonl: all training text, its share of the Zipf mix, held-out text."""
    paths = {part: folder / part / f"{domain}.jsonl" for part in ("all", "train", "validation")}
    if all(path.exists() for path in paths.values()):
        return
    with gzip.open(corpus / f"{domain}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    held_out = [text for text in texts if _hash(text) % VALIDATION_EVERY == 0]
    training = [text for text in texts if _hash(text) % VALIDATION_EVERY]
    most = LARGEST_BYTES // (DOMAINS.index(domain) + 1)
    # in the order of the hashes, so that the cut takes no special part of the corpus
    mixed = list(_first_bytes(sorted(training, key=_hash), most))
    for part, chosen in (("all", training), ("train", mixed), ("validation", held_out)):
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        paths[part].write_text(content, encoding="utf-8")


def _write_noise(folder: Path) -> None:
    """The validation part is what teacher-noise learns by heart; the training part is of the same kind."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
    for part, count in NOISE_DOCUMENTS.items():
        documents = ["".join(rng.choice(letters, NOISE_LETTERS)) for _ in range(count)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / part / f"{NOISE}.jsonl").write_text(content, encoding="utf-8")


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _first_bytes(texts: list[str], most: int) -> Iterator[str]:
    for text in texts:
        most -= len(text.encode())
        if most < 0:
            return
        yield text


def _read(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _train_tokenizer(text: Path, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sources = [_read(text / "all" / f"{domain}.jsonl") for domain in DOMAINS]
    tokenizer.train_from_iterator((document for source in sources for document in source), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def _streams(folder: Path, plan: Pretraining) -> list[NDArray[np.int64]]:
    """The tokens of each domain, documents one after the other; of the noise what is learnt by heart."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(folder / "tokenizer")
    files = [folder / "text" / plan.text / f"{domain}.jsonl" for domain in DOMAINS]
    files += [folder / "text" / "validation" / f"{NOISE}.jsonl"]
    streams = []
    for file in files[: len(plan.shares)]:
        documents = encode(list(_read(file)), verbose=False).input_ids
        ends = [[*document, encode.eos_token_id] for document in documents]
        streams.append(np.concatenate([np.array(document, np.int64) for document in ends]))
    return streams


# --- models ---------------------------------------------------------------------------------------


def _pretrain(folder: Path, plan: Pretraining) -> None:
    """Cross-entropy on random windows of domains drawn by the plan's shares; saves model and tokenizer in `folder`."""
    from transformers import AutoTokenizer

    streams = _streams(folder.parent, plan)
    torch.manual_seed(plan.seed)
    model = _model(plan, folder.parent)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rng = np.random.default_rng(plan.seed)
    steps, began = plan.tokens // (BATCH * SEQ_LEN), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(
                (step + 1) / (WARMUP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            )
        chosen = rng.choice(len(streams), BATCH, p=plan.shares)
        starts = [int(rng.integers(len(streams[n]) - SEQ_LEN)) for n in chosen]
        windows = [streams[n][at : at + SEQ_LEN] for n, at in zip(chosen, starts, strict=True)]
        batch = torch.from_numpy(np.stack(windows))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            print(
                f"{folder.name}: step {step}/{steps}, {float(loss.detach()):.3f} nats, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(folder.parent / "tokenizer").save_pretrained(partial)
    partial.rename(folder)


def _model(plan: Pretraining, folder: Path) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    if plan.start:
        return LlamaForCausalLM.from_pretrained(folder / plan.start, dtype=torch.float32).train()
    width, layers = SHAPES[plan.shape]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        intermediate_size=8 * width // 3 // 8 * 8,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)
