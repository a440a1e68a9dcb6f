"""The tensors of a checkpoint as safetensors files: written by every process, read by any number of them.

torch.distributed.checkpoint's own files hold pickles (`.metadata`, and `torch.load` of what that calls bytes). Its
Hugging Face format holds none: plain safetensors, whose headers say which part of which tensor they are. A checkpoint
is read only if it holds the run's tensors, every element once, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

FILE_BYTES = 1 << 30  # the writer holds a file's bytes a second time
HEADER_BYTES = 4096  # of a file's header, at most, for each tensor of the run


def tensor_writer(folder: Path, tensors: Mapping[str, Tensor]) -> HuggingFaceStorageWriter:
    """A storage writer of DCP that puts these into safetensors files of `folder`, of a gigabyte where tensors allow.

    Every process of the world makes one, of the same names and whole shapes.
    """
    file_of, taken = {}, 0
    for name, tensor in tensors.items():
        taken += tensor.numel() * tensor.element_size()
        file_of[name] = taken // FILE_BYTES + 1
    return HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors by this process alone, whatever others it has; the files are on the disk on return.

    By the steps of DCP's own `save`, which warns where it is told to do without other processes: to silence that in a
    thread would silence all others'.
    """
    writer, planner = tensor_writer(folder, tensors), DefaultSavePlanner()
    writer.set_up_storage_writer(is_coordinator=True)
    planner.set_up_planner(dict(tensors), writer.storage_meta(), is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, _ = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    writer.write_data(planner.finish_plan(plan), planner).wait()


class TensorReader(HuggingFaceStorageReader):
    """Reads what `tensor_writer` wrote into `tensors`, whose names, dtypes and whole shapes the files must have.

    `read_metadata` raises ValueError, or what safetensors raises, for files of anything else.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(str(folder))
        self.folder, self.tensors = folder, tensors

    def read_metadata(self) -> Metadata:
        """What the headers say, checked; no element has been read then."""
        files = list(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError("it holds no *.safetensors")
        for file in files:
            self._check_file(file)
        metadata = super().read_metadata()
        found: dict[str, Any] = metadata.state_dict_metadata
        if found.keys() != self.tensors.keys():
            name = min(found.keys() ^ self.tensors.keys())
            what = "is not of the run" if name in found else "is missing"
            raise ValueError(f"tensor {name[:100]!r} {what}")
        for name, tensor in self.tensors.items():
            _check_parts(name, found[name], tensor)
        return metadata

    def _check_file(self, file: Path) -> None:
        """Before it is opened: a link leads elsewhere, a pipe never ends, and a header may be 100 MB."""
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{file.name} is not an ordinary file")
        with open(file, "rb") as content:
            header = int.from_bytes(content.read(8), "little")
        if header > HEADER_BYTES * (len(self.tensors) + 1):
            raise ValueError(f"{file.name} has a header of {header:,} bytes")


def _check_parts(name: str, found: TensorStorageMetadata, tensor: Tensor) -> None:
    """Raises ValueError unless the parts are rows of the tensor that together are all of it, each once."""
    if found.properties.dtype != tensor.dtype:
        raise ValueError(f"tensor {name!r} is of {found.properties.dtype}, the run's of {tensor.dtype}")
    shape, end = tuple(tensor.shape) or (1,), 0  # a scalar counts as a vector of one
    parts = [
        part for part in found.chunks if part.sizes.numel()
    ]  # of fewer rows than processes, some have none
    for part in sorted(parts, key=lambda part: tuple(part.offsets)):
        offsets, sizes = tuple(part.offsets) or (0,), tuple(part.sizes) or (1,)
        if len(offsets) != len(shape) or any(offsets[1:]) or sizes[1:] != shape[1:]:
            raise ValueError(f"tensor {name!r} is in parts of another shape than {list(shape)}")
        if offsets[0] != end:
            raise ValueError(f"tensor {name!r} lacks rows, or has some twice")
        end += sizes[0]
    if end != shape[0] and tensor.numel():
        raise ValueError(f"tensor {name!r} lacks rows, or has too many")
