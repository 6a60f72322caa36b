"""Local Hugging Face checkpoints: config.json, and safetensors weights read one tensor at a time.

Only headers are read when a checkpoint is opened; a tensor is read from its file when asked for, so that a 7B never stands in
memory. Knows nothing about architectures: tensor names are the files' own (see `export.families`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import CheckpointError, StorageError
from runtime.manifest import sha256_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# What a bundle holds beside its graphs, as far as the checkpoint has it.
TEXT_FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", *PROCESSOR_FILES,
    GENERATION_FILE,
)  # fmt: skip
# safetensors' code -> numpy's name, and how the bytes are read
FLOAT_TYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a tensor lies: `bytes` bytes from `offset` of `file`, row-major, little-endian; `dtype` is safetensors' code."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class Checkpoint:
    """A checkpoint directory with its config and the places of its tensors. Holds no file open and no tensor.

    Attributes:
        name: the directory's name, or the repository's (`owner/name`).
        directory: the directory.
        config: config.json, as parsed.
        weight_files: the safetensors files, in their names' order.
    """

    def __init__(
        self, name: str, directory: Path, config: dict[str, Any], weight_files: tuple[Path, ...], tensors: dict[str, TensorRecord]
    ) -> None:
        self.name = name
        self.directory = directory
        self.config = config
        self.weight_files = weight_files
        self._tensors = tensors

    @classmethod
    def open(cls, location: str | Path) -> Checkpoint:
        """Opens a directory, or a Hugging Face repository (`owner/name`) that is in the local cache.

        Raises:
            CheckpointError: it is missing, incomplete, truncated, quantised, or has no safetensors weights.
            StorageError: a file cannot be read.
        """
        directory = find_checkpoint(location)
        try:
            config = _read_config(directory)
            files = _weight_files(directory)
            tensors = _read_tensors(directory, files)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot read {error.filename or directory}: {error.strerror}") from error
        name = directory.resolve().name if directory == Path(location) else Path(location).as_posix()
        return cls(name, directory, config, files, tensors)

    def names(self) -> tuple[str, ...]:
        """All tensor names, as they stand in the files."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._record(name).shape

    def dtype(self, name: str) -> str:
        """numpy's name of a floating-point type that `read` takes, otherwise safetensors' own code (such as "I8")."""
        code = self._record(name).dtype
        return FLOAT_TYPES[code][0] if code in FLOAT_TYPES else code

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, owned by the caller; nothing else of its file is read.

        Raises:
            CheckpointError: there is no such tensor, or its type is not float32, float16 or bfloat16.
            StorageError: the file cannot be read.
        """
        record = self._record(name)
        if record.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"tensor {name} has type {record.dtype}; only {', '.join(FLOAT_TYPES)} can be read: use the original checkpoint"
            )
        count = math.prod(record.shape)
        try:
            raw = np.fromfile(record.file, FLOAT_TYPES[record.dtype][1], count, offset=record.offset)
        except OSError as error:
            raise StorageError(f"cannot read {record.file}: {error.strerror}") from error
        if raw.size != count:
            raise CheckpointError(f"{record.file} ended within tensor {name}: it was changed while being read; fetch the file again")
        if record.dtype == "BF16":  # bfloat16 is the upper half of a float32
            wide = raw.astype("<u4")
            wide <<= 16
            raw = wide.view("<f4")
        return raw.astype(np.float32, copy=False).reshape(record.shape)

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files."""
        return sum(path.stat().st_size for path in self.weight_files)

    @cached_property
    def revision(self) -> str:
        """SHA-256 over the weight files' own SHA-256s in their names' order; reads every weight file once, when first asked for."""
        return hashlib.sha256("".join(f"{sha256_of(path)}\n" for path in self.weight_files).encode()).hexdigest()

    def text_files(self) -> dict[str, str]:
        """Tokenizer, chat template, processor and generation files: name and text, those of `TEXT_FILES` that exist.

        A missing generation_config.json is made from config.json's special tokens, as Hugging Face does.

        Raises:
            CheckpointError: there is no tokenizer.json, no image processor's file, or one of the files is not UTF-8 text.
        """
        texts = {name: self._text(name) for name in TEXT_FILES if (self.directory / name).is_file()}
        for needed in ((TOKENIZER_FILE,), PROCESSOR_FILES):
            if not any(name in texts for name in needed):
                raise CheckpointError(
                    f"{self.directory} holds no {' or '.join(needed)}: fetch it, or save the processor there with save_pretrained"
                )
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        sources = (self.config, self.config.get("text_config") or {})
        tokens = {name: source[name] for source in reversed(sources) for name in special if source.get(name) is not None}
        if tokens:
            texts.setdefault(GENERATION_FILE, json.dumps(tokens, indent=2) + "\n")
        return texts

    def image_token(self, token_id: int) -> str:
        """The text of the token that stands for an image in a rendered prompt.

        Raises:
            CheckpointError: tokenizer.json is missing or has no such token.
        """
        tokenizer = _read_object(self.directory / TOKENIZER_FILE) if (self.directory / TOKENIZER_FILE).is_file() else {}
        for token in tokenizer.get("added_tokens") or ():
            if isinstance(token, dict) and token.get("id") == token_id and token.get("content"):
                return str(token["content"])
        raise CheckpointError(
            f"{self.directory / TOKENIZER_FILE} has no added token {token_id}, which {CONFIG_FILE} names as the image token: "
            "save the checkpoint's own tokenizer and processor there"
        )

    def _text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.directory / name} is not UTF-8 text: fetch the file again") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.directory / name}: {error.strerror}") from error

    def _record(self, name: str) -> TensorRecord:
        if name not in self._tensors:
            raise CheckpointError(f"the checkpoint {self.directory} has no tensor {name}")
        return self._tensors[name]


def find_checkpoint(location: str | Path, cache: Path | None = None) -> Path:
    """The directory of a checkpoint named by its path or by its Hugging Face repository (looked up in the local cache only).

    Args:
        cache: the hub's cache directory; the hub library's own default when left out.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(location)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is not a directory: name the directory that holds {CONFIG_FILE} and the weights with --checkpoint DIR"
        )
    if not _HUB_ID.fullmatch(path.as_posix()):
        raise CheckpointError(f"there is no directory {path}: name a Hugging Face checkpoint with --checkpoint DIR")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path.as_posix(), cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{path.as_posix()} is neither a directory nor complete in the Hugging Face cache ({cache or constants.HF_HUB_CACHE}): "
            f"download it (`hf download {path.as_posix()}`), or name a local one with --checkpoint DIR"
        ) from error


# ---------------------------------------------------------------- config.json


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object: fetch the file again")
    return value


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no {CONFIG_FILE}: name a Hugging Face checkpoint's directory with --checkpoint DIR")
    config = _read_object(path)
    for where, section in (("", config), *((f"{k}.", v) for k, v in config.items() if isinstance(v, dict))):
        for entry in ("quantization_config", "compression_config"):
            if section.get(entry) is not None:
                raise CheckpointError(
                    f"the checkpoint {directory} is already quantised ({CONFIG_FILE} has {where}{entry}): "
                    "use the original checkpoint, quantisation is the export's work"
                )
    return config


# ---------------------------------------------------------------- weights


def _weight_files(directory: Path) -> tuple[Path, ...]:
    if (directory / WEIGHTS_FILE).is_file():
        return (directory / WEIGHTS_FILE,)
    if (directory / INDEX_FILE).is_file():
        files = tuple(directory / name for name in sorted(set(_weight_map(directory).values())))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{INDEX_FILE} names {len(files)} weight files, but {missing[0]}{more} is missing from {directory}: fetch the weights again"
            )
        return files
    old = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if old:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({old[0]}), which are not read: convert to safetensors, "
            "by loading the model with transformers and calling save_pretrained"
        )
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: fetch the checkpoint's weights")


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = _read_object(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE} has no weight_map: fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise CheckpointError(
                f"{directory / INDEX_FILE} gives {file!r} as the file of {name}, expected a safetensors file's name beside it"
            )
    return weight_map


def _read_tensors(directory: Path, files: tuple[Path, ...]) -> dict[str, TensorRecord]:
    """All tensors of all files; with an index, each that it names must be in the file it names."""
    by_file = {path.name: _read_header(path) for path in files}
    tensors: dict[str, TensorRecord] = {}
    for file, records in by_file.items():
        twice = sorted(tensors.keys() & records.keys())
        if twice:
            raise CheckpointError(f"tensor {twice[0]} is in {tensors[twice[0]].file.name} and in {file}: fetch the weights again")
        tensors.update(records)
    if files[0].name != WEIGHTS_FILE:
        for name, file in _weight_map(directory).items():
            if name not in by_file[file]:
                raise CheckpointError(f"{INDEX_FILE} says that {name} is in {file}, but it is not: fetch both again")
    if not tensors:
        raise CheckpointError(f"the weight files of {directory} hold no tensors: fetch them again")
    return tensors


def _read_header(path: Path) -> dict[str, TensorRecord]:
    """The header of a safetensors file: 8 bytes of length, then JSON; the data's offsets count from the header's end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} ({size} bytes) is truncated or not a safetensors file: fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _record(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a safetensors file (its header cannot be understood): fetch it again") from error


def _record(path: Path, name: str, entry: dict[str, Any], data_start: int, file_size: int) -> TensorRecord:
    begin, end = (int(value) for value in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(value) for value in entry["shape"])
    if data_start + end > file_size:
        raise CheckpointError(
            f"{path} is truncated: it has {file_size} bytes, and tensor {name} ends at byte {data_start + end}; fetch the file again"
        )
    wanted = math.prod(shape) * np.dtype(FLOAT_TYPES[dtype][1]).itemsize if dtype in FLOAT_TYPES else end - begin
    if not 0 <= begin <= end or min(shape, default=0) < 0 or wanted != end - begin:
        raise CheckpointError(
            f"{path} is damaged: tensor {name} of type {dtype} and shape {list(shape)} cannot take {end - begin} bytes; fetch it again"
        )
    return TensorRecord(path, dtype, shape, data_start + begin, end - begin)
